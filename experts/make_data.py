"""Makes a dataset in D4RL's format without a download, by D4RL's recipe, from black boxes.

    python experts/make_data.py --env hopper-medium-v2 --out data/hopper-medium-v2.hdf5
    python oap.py --env hopper-medium-v2 --dataset data/hopper-medium-v2.hdf5
    python experts/make_data.py --env hopper-medium-replay-v2 --out data/replay.hdf5 \\
        --replay runs/experts/hopper/checkpoint.pt --rows 305000
    python experts/make_data.py --env Pendulum-v1 --quality medium --out data/pendulum.hdf5 \\
        --expert runs/experts/Pendulum-v1/expert.pt --medium runs/experts/Pendulum-v1/2375.pt
    python experts/make_data.py --env pen-human-v1 --minari D4RL/pen/human-v2 --out data/pen.hdf5

random: uniform actions; medium, expert: a SAC policy with its noise; medium-expert: half of each;
medium-replay: the first transitions of a run of train.py. D4RL's own files have other policies.
"""

import argparse
import io
import math
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from train import Actor, oap, run

QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")  # of a D4RL file
Arrays = dict[str, np.ndarray]

def load_actor(path: str, env: oap.Env) -> tuple[Actor, dict]:
    """The policy of a black box that train.py made, and all that is in its file."""
    oap.check(Path(path).is_file(), f"there is no black box {path}; train.py makes one")
    saved = oap.load(path, "cpu")
    with oap.blame(f"{path} has no policy of train.py's for this environment"):
        (actor := Actor(*env.dims)).load_state_dict(saved["actor"])
        oap.load_black_box(path, env, 0, "cpu")  # which refuses another robot's
    return actor, saved

def uniform(state: Tensor | np.ndarray, env: oap.Env) -> Tensor:
    return torch.rand(len(state), *env.action_space.shape) * 2 - 1  # (B, A)

def join(parts: list[Arrays]) -> Arrays:
    return {key: np.concatenate([part[key] for part in parts]) for key in KEYS}

@torch.no_grad()
def collect(name: str, actor: Actor | None, size: int, seed: int) -> Arrays:
    """`size` rows, in whole episodes but for the last; without an actor, of uniform actions."""
    env, parts = oap.make_env(name), []
    more = min(10, math.ceil(size / env.spec.max_episode_steps)) - 1
    envs = [env, *(oap.make_env(name) for _ in range(more))]
    bar = tqdm(total=size, unit=" rows", disable=None)
    while sum(len(part["rewards"]) for part in parts) < size:  # an episode of each
        rows = [[] for _ in envs]
        states = {i: x.reset(seed=seed + i)[0] for i, x in enumerate(envs)}
        seed += len(envs)
        while states:
            state = torch.as_tensor(np.stack(list(states.values())), dtype=torch.float32)
            actions = actor.sample(state)[0] if actor else uniform(state, env)
            for i, action in zip(list(states), actions.numpy(), strict=True):
                next_state, reward, terminal, truncated, _ = envs[i].step(action)
                rows[i].append((states[i], env.raw_action(action), reward, terminal,
                                truncated and not terminal))
                states[i] = next_state
                if terminal or truncated:
                    del states[i]
            bar.update(min(len(actions), size - bar.n))
        parts += [dict(zip(KEYS, map(np.array, zip(*x)), strict=True)) for x in rows]
    bar.close()
    arrays = {key: x[:size] for key, x in join(parts).items()}
    arrays["timeouts"][-1] = not arrays["terminals"][-1]  # what followed is cut off
    return arrays

def replay(path: str, rows: int, env: oap.Env) -> Arrays:
    """The first transitions of a run of train.py. A timeout is where another episode follows."""
    data = oap.Data(1, *env.dims, "cpu")
    with oap.blame(f"{path} has no transitions", KeyError):
        every = oap.load(path, "cpu")["transitions"]
    oap.check(len(every) >= rows, f"{path} has {len(every):,} transitions, not {rows:,}")
    state, action, reward, next_state, done = (x.numpy() for x in data.split(every[:rows]))
    ends = np.append((next_state[:-1] != state[1:]).any(1), True)
    columns = state, env.raw_action(action), reward, done == 1, ends & (done == 0)
    return dict(zip(KEYS, columns, strict=True))

def from_minari(name: str, env: oap.Env) -> tuple[Arrays, dict[str, float]]:
    """A dataset of Minari's, and its reference returns, if it has them.

    An episode's last observation becomes a row of its own, with a timeout, an action that was never
    taken, and no reward: D4RL's format has no other place for it, and readers drop such rows.
    """
    parts = []
    with oap.blame(f"--minari {name}"):  # whatever its import, its storage and the network raise
        import minari

        dataset = minari.load_dataset(name, download=True)
        for e in dataset.iterate_episodes():
            columns = (e.observations, np.pad(e.actions, ((0, 1), (0, 0)), "edge"), *(
                np.pad(x, (0, 1)) for x in (e.rewards, e.terminations)))
            timeout = np.arange(len(e.observations)) == len(e.rewards)
            parts.append(dict(zip(KEYS, (*columns, timeout), strict=True)))
        arrays, known = join(parts), dataset.storage.metadata
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        shape = arrays[key].shape[1:]
        oap.check(shape == space.shape, f"--minari {name}: {key} are {shape}, not {space.shape}")
    return arrays, {k: float(known[k]) for k in ("ref_min_score", "ref_max_score") if k in known}

def references(expert: str, env: oap.Env) -> dict[str, float]:
    """The returns that are the scores 0 and 100: a random policy's, and the expert's."""
    high = load_actor(expert, env)[1]["return"]
    low = oap.evaluate([env], lambda state: uniform(state, env), 100, oap.env_seed(0)).mean().item()
    oap.check(high > low, f"{expert} has a return of {high:,.1f}, a random policy {low:,.1f}")
    return {"ref_min_score": low, "ref_max_score": high}

def make(args: argparse.Namespace) -> None:
    """Writes the dataset. Raises oap.BadInput."""
    torch.manual_seed(args.seed)
    env, robot, out = oap.make_env(args.env), oap.find_robot(args.env), Path(args.out)
    quality = args.quality or args.env.removeprefix(f"{robot.name}-").rpartition("-v")[0]
    expert, medium = (given or str(oap.HERE / "experts" / f"{robot.name}{which}.pt")
                      for given, which in ((args.expert, ""), (args.medium, "-medium")))
    oap.check(args.minari or quality in QUALITIES, f"--quality is missing: {', '.join(QUALITIES)}")
    oap.check(args.minari or quality != "medium-replay" or args.replay and args.rows,
              "medium-replay needs --replay, train.py's checkpoint.pt, and --rows")
    oap.check(not out.is_dir(), f"--out {out} is a folder")
    with oap.blame(f"--out {out}", OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
    attributes = {}
    if args.minari:
        arrays, attributes = from_minari(args.minari, env)
    elif robot not in oap.ROBOTS and (args.expert or Path(expert).is_file()):
        attributes = references(expert, env)
    if quality == "medium-replay" and not args.minari:
        arrays = replay(args.replay, args.rows, env)
    elif not args.minari:
        models = {"random": [None], "medium": [medium], "expert": [expert],
                  "medium-expert": [medium, expert]}[quality]
        actors = [model and load_actor(model, env)[0] for model in models]
        print(f"{args.size:,} rows: about {math.ceil(args.size / 200_000)} min on one core for a"
              " robot like Hopper, and twice as long for pen")
        arrays = join([collect(args.env, actor, args.size // len(actors), args.seed + 10**6 * i)
                       for i, actor in enumerate(actors)])
    with h5py.File(buffer := io.BytesIO(), "w") as file:  # on a full disk, hdf5 itself would crash
        for key, x in arrays.items():
            kind = bool if key in ("terminals", "timeouts") else np.float32
            file.create_dataset(key, data=x.astype(kind), compression="gzip")
        file.attrs.update({} if robot in oap.ROBOTS else attributes)
    oap.write(out, buffer.getvalue())
    print(f"{out}: {len(arrays['rewards']):,} rows")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--env", required=True, help="a task of D4RL's, or a Gymnasium id")
    add("--quality", choices=QUALITIES, help="default: what the task's name says")
    add("--out", required=True, help="the hdf5 file to write")
    add("--size", type=oap.number(2, kind=int), default=1_000_000, help="rows")
    add("--seed", type=oap.number(0, kind=int), default=0, help="of all random numbers")
    add("--expert", help="black box instead of experts/<robot>.pt")
    add("--medium", help="black box instead of experts/<robot>-medium.pt")
    add("--replay", help="checkpoint.pt of a run of train.py, for medium-replay")
    add("--rows", type=oap.number(1, kind=int), help="how many of it: until the medium policy")
    add("--minari", help="dataset of Minari's to convert, instead of making one")
    return parser.parse_args(argv)

if __name__ == "__main__":
    sys.exit(run(lambda: make(parse_args())))
