"""Are a black box's answers true? For samples of D, compares Q*(s, π(s)) - Q*(s, a) with what
happens in the simulator after π(s) and after a. For Hopper, Walker2d and HalfCheetah.

    python oap.py --scheme offline --steps 100000 --env halfcheetah-medium-v2 --dataset FILE
    python results/answers.py runs/halfcheetah-medium-v2/td3bc-offline/0 --dataset FILE

The simulator is set to s, does one of the actions, and then follows the black box's policy with its
noise: the discounted rewards estimate that policy's Q(s, action), without SAC's entropies and what
comes after --steps. Half an hour on one core.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experts"))
from make_data import load_actor  # noqa: E402
from train import Actor, oap, run  # noqa: E402

POLICIES = {"td3bc": oap.Actor, "iql": oap.GaussianActor}

@torch.no_grad()
def rollouts(envs: list[oap.Env], state: np.ndarray, action: np.ndarray, actor: Actor, steps: int,
             discount: float = 0.99) -> np.ndarray:
    """Discounted returns (n,) of `action` (n, A) in `state` (n, O) and then `actor`'s actions."""
    value, model = np.zeros(len(state)), envs[0].unwrapped.model
    for first in range(0, len(state), len(envs)):
        running = dict(zip(range(first, len(state)), envs))
        for i, env in running.items():
            env.reset()
            position, velocity = np.split(state[i].astype(float), [model.nq - 1])
            env.unwrapped.set_state(np.append(0, position), velocity)  # states have no x
        actions = action[list(running)]
        for t in range(steps):
            states = {}
            for (i, env), x in zip(running.items(), actions, strict=True):
                next_state, reward, terminal, _, _ = env.step(x)
                value[i] += discount**t * reward
                states |= {} if terminal else {i: next_state}
            if not states:
                break
            running = {i: running[i] for i in states}
            actions = torch.as_tensor(np.stack([*states.values()]), dtype=torch.float32)
            actions = actor.sample(actions)[0].numpy()
    return value

def measure(args: argparse.Namespace) -> None:
    """Prints a table. Raises oap.BadInput."""
    torch.manual_seed(args.seed)
    oap.check((args.run / "model.pt").is_file(), f"{args.run} is no finished run: no model.pt")
    saved = oap.load(args.run / "model.pt", "cpu")
    with oap.blame(f"{args.run} is no run of hopper, walker2d or halfcheetah"):
        oap.check(oap.find_robot(saved["env"]) in oap.ROBOTS[:3], saved["env"])
        envs = [oap.make_env(saved["env"]) for _ in range(50)]
        policy = POLICIES[saved["algo"]](*envs[0].dims)
        policy.load_state_dict(saved["actor"])
    expert = args.expert or f"{oap.HERE}/experts/{envs[0].robot.name}.pt"
    actor, _ = load_actor(args.follow or expert, envs[0])
    box, _ = oap.load_black_box(expert, envs[0], 0, "cpu")
    data, _ = oap.load_dataset(args.dataset, envs[0])
    state, action = torch.as_tensor(data["state"]), torch.as_tensor(data["action"])
    pi = oap.in_chunks(lambda s: policy((s - saved["mean"]) / saved["std"]), state)
    order = oap.divergence(action, pi).argsort(descending=True)
    print(f"{expert} answers, {args.follow or expert} acts afterwards")
    kinds = {"all of D": order, f"the {args.most:,} most divergent": order[: args.most]}
    for name, among in kinds.items():
        chosen = among[torch.randperm(len(among))[: args.samples]]
        s, a, b = state[chosen], action[chosen], pi[chosen]
        prefers_policy = ~box.answer(s, a, b).numpy()  # (n,) Eq. 2
        claim = (box.value(s, b) - box.value(s, a)).numpy()  # (n,)
        truth = np.mean([rollouts(envs, s.numpy(), b.numpy(), actor, args.steps)
                         - rollouts(envs, s.numpy(), a.numpy(), actor, args.steps)
                         for _ in tqdm(range(args.repeats), name, disable=None)], 0)  # (n,)
        print(f"{len(s):,} of {name}, {prefers_policy.mean():.1%} answers for the policy; gain:")
        gains = {"ã, as Q* says": claim * prefers_policy,
                 "ã, in the simulator": truth * prefers_policy, "π(s), in the simulator": truth}
        for what, x in gains.items():
            print(f"    {what:<24}{x.mean():8.2f} ± {x.std() / len(x) ** 0.5:.2f}", flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, oap.number(1, kind=int)
    add("run", type=Path, help="folder of a finished run, whose policy is π")
    add("--dataset", type=Path, required=True, help="the hdf5 file it was trained on")
    add("--expert", help="black box instead of experts/ROBOT.pt")
    add("--follow", help="black box whose policy acts afterwards, instead of --expert's own")
    add("--samples", type=count, default=1_500, help="of each kind")
    add("--most", type=count, default=10_000, help="how many samples are the most divergent")
    add("--repeats", type=count, default=4, help="rollouts of each sample and action")
    add("--steps", type=count, default=300, help="of a rollout")
    add("--seed", type=oap.number(0, kind=int), default=0, help="of all random numbers")
    arguments = parser.parse_args()
    sys.exit(run(lambda: measure(arguments)))
