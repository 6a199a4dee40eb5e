"""Trains a black box with SAC (Haarnoja et al. 2018, rlkit's settings), as the paper did.

    python experts/train.py --env pen-human-v1           # 3M steps -> runs/experts/pen/expert.pt
    python oap.py --env pen-human-v1 --expert runs/experts/pen/expert.pt

Every evaluation that is the best so far is kept as <step>.pt, for Figure 5 and make_data.py. The
last of these, scored in 100 other episodes, becomes expert.pt. After a stop, the same command goes
on from checkpoint.pt, which has all transitions, with a new episode. As in rlkit, an update has all
losses from the old weights before any step, and batches come from the newest million transitions.
"""

import argparse
import copy
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import oap  # noqa: E402

REPLAY = 1_000_000  # transitions that batches are drawn from, the newest

class Actor(nn.Module):
    """SAC's policy π(a|s), the tanh of a Gaussian."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.net = oap.mlp(state_dim, 256, 256, 2 * action_dim)

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state).chunk(2, -1)[0].tanh()  # (B, A), without noise

    def sample(self, state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(state).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp(), validate_args=False)
        u = normal.rsample()
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh²u), and never -inf
        return u.tanh(), (normal.log_prob(u) - log_slope).sum(-1)  # (B, A), (B,) log π

class SAC(nn.Module):
    def __init__(self, state_dim: int, action_dim: int, args: argparse.Namespace):
        super().__init__()
        self.args, self.actor = args, Actor(state_dim, action_dim)
        self.critic = oap.Critic(state_dim, action_dim)
        self.critic_target = copy.deepcopy(self.critic)
        self.temperature = nn.ParameterDict({"log": torch.zeros(())})
        self.to(args.device)
        self.optimizers = [
            oap.adam(net, args.lr) for net in (self.actor, self.critic, self.temperature)]

    def update(self, batch: oap.Batch) -> dict[str, Tensor]:
        s, a, r, s2, done, _ = batch
        actor_opt, critic_opt, temperature_opt = self.optimizers
        temperature = self.temperature["log"].detach().exp()
        with torch.no_grad():
            a2, log_prob2 = self.actor.sample(s2)
            value = self.critic_target(s2, a2).amin(-1) - temperature * log_prob2  # (B,)
            target = r + self.args.discount * (1 - done) * value
        critic_loss = oap.bellman_loss(self.critic(s, a), target)
        pi, log_prob = self.actor.sample(s)
        actor_loss = (temperature * log_prob - self.critic(s, pi).amin(-1)).mean()
        excess = a.shape[1] - log_prob.detach().mean()  # of the entropy, over its target, -A
        oap.descend(actor_opt, actor_loss)  # first: its gradient needs the critic's old weights
        oap.descend(critic_opt, critic_loss)
        oap.descend(temperature_opt, self.temperature["log"] * excess)
        oap.polyak_update(self.critic_target, self.critic, self.args.polyak)
        return {"critic_loss": critic_loss.detach(), "temperature": temperature}

def train(args: argparse.Namespace) -> None:
    """Trains a black box, or goes on with one. Raises oap.BadInput."""
    name = oap.find_robot(args.env).name + (args.tag and f"-{args.tag}")
    folder = Path(args.out, re.sub(r"[^\w.-]", "-", name))
    device, rng = args.device, torch.cuda if args.device.startswith("cuda") else torch
    oap.check(args.eval_every <= args.steps, "--eval-every is longer than --steps")
    with oap.blame(f"--device {device}", (RuntimeError, AssertionError)):
        (probe := torch.zeros(1, device=device)).item()
        if probe.is_cuda:
            torch.cuda.set_device(probe.device)  # whose random state a checkpoint has
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.manual_seed(args.seed)
    env, envs = oap.make_env(args.env), [oap.make_env(args.env) for _ in range(10)]
    _lock = oap.claim(folder, vars(args))
    if (folder / "expert.pt").is_file():
        return print(f"{folder} is finished")
    agent, data = SAC(*env.dims, args), oap.Data(args.steps, *env.dims, device)
    rows, done, seconds = [], 0, 0.0
    if (checkpoint := folder / "checkpoint.pt").is_file():
        saved = oap.load(checkpoint, device)
        with oap.blame(f"{checkpoint} is another run's; rm -r {folder} begins anew"):
            rows, done, seconds = saved["rows"], saved["step"], saved["seconds"]
            agent.load_state_dict(saved["agent"])
            for optimizer, state in zip(agent.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            data.append(*data.split(saved["transitions"]))
            rng.set_rng_state(saved["rng"].cpu())
        print(f"{folder} continues after step {done:,}")

    @torch.no_grad()
    def policy(state: np.ndarray, act: Callable = agent.actor) -> Tensor:
        return act(torch.as_tensor(state, dtype=torch.float32, device=device))

    started, (state, _) = time.monotonic() - seconds, env.reset(seed=args.seed + done)
    for step in tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, disable=None):
        action = policy(state, agent.actor.sample)[0] if step > args.random_steps else (
            torch.rand(env.dims[1], device=device) * 2 - 1)
        next_state, reward, terminal, truncated, _ = env.step(action.cpu().numpy())
        data.append(state, action, reward, next_state, terminal)
        state = env.reset()[0] if terminal or truncated else next_state
        index = torch.randint(max(0, step - REPLAY), step, (args.batch_size,), device=device)
        columns = data.split(data.rows[index])
        update = agent.update(oap.Batch(*columns, columns[1]))
        if step % args.eval_every == 0:
            best = max((row["return"] for row in rows), default=-math.inf)
            value = oap.evaluate(envs, policy, 10, oap.env_seed(args.seed, step)).mean().item()
            seconds, log = time.monotonic() - started, {k: x.item() for k, x in update.items()}
            rows.append({"step": step, "return": value, "seconds": seconds} | log)
            oap.write_csv(folder / "progress.csv", rows)
            if value > best:
                oap.save(folder / f"{step}.pt", {
                    "env": args.env, "algo": "sac", "step": step, "return": value,
                    "mean": torch.zeros(env.dims[0]), "std": torch.ones(env.dims[0]),
                    "actor": agent.actor.state_dict(), "critic": agent.critic.state_dict()})
            left = tqdm.format_interval(seconds / step * (args.steps - step))
            tqdm.write(f"step {step:>9,}  return {value:8,.1f}  best {max(best, value):8,.1f}"
                       f"  left {left:>8}  critic_loss {log['critic_loss']:8.3g}")
        if step % args.checkpoint_every == 0 or step == args.steps:
            oap.save(checkpoint, {
                "step": step, "rows": rows, "seconds": time.monotonic() - started,
                "agent": agent.state_dict(), "transitions": data.rows[:step].clone(),
                "optimizers": [x.state_dict() for x in agent.optimizers],
                "rng": rng.get_rng_state()})
    best = max(rows, key=lambda row: row["return"])["step"]
    model = oap.load(folder / f"{best}.pt", device)
    agent.actor.load_state_dict(model["actor"])
    model["return"] = oap.evaluate(envs, policy, 100, oap.env_seed(args.seed, 0)).mean().item()
    oap.save(folder / "expert.pt", model)
    print(f"{folder / 'expert.pt'}: return {model['return']:,.1f} in 100 other episodes")

def run(work: Callable[[], None]) -> int:
    """A script's work. Returns the exit code: 2, after one line, for what the user can mend."""
    sys.path.append(str(Path.cwd()))  # for environments of one's own
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as oap.py does
    try:
        work()
        return 0
    except (oap.BadInput, BrokenPipeError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted; start the same command again"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count, share = parser.add_argument, oap.number(1, kind=int), oap.number(0, high=1)
    add("--env", required=True, help="any of a robot's tasks in D4RL, or a Gymnasium id")
    add("--seed", type=oap.number(0, kind=int), default=0, help="of all random numbers")
    add("--out", default="runs/experts", help="the black box comes into <out>/<robot>")
    add("--tag", default="", help="appended to the folder's name")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="TF32")
    add("--steps", type=count, default=3_000_000, help="in the environment, an update each")
    add("--random-steps", type=oap.number(0, kind=int), default=1_000, help="at first, uniform")
    add("--eval-every", type=count, default=5_000, help="steps between evaluations")
    add("--checkpoint-every", type=count, default=50_000, help="steps between checkpoints")
    add("--batch-size", type=count, default=256, help="transitions per update")
    add("--lr", type=oap.number(0), default=3e-4, help="Adam's learning rate, of every network")
    add("--discount", type=share, default=0.99, help="gamma")
    add("--polyak", type=share, default=0.005, help="rate of the target network")
    sys.exit(run(lambda: train(parser.parse_args())))
