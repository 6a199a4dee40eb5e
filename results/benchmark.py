"""Updates a second of this machine, oap.py's beside the published algorithms written plainly, and
what evaluations and OAP's rounds take of a run. On random data of HalfCheetah's shapes."""

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import oap  # noqa: E402

ROWS, STATE, ACTION, BATCH, REPEATS = 1_000_000, 17, 6, 256, 11

def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def plain(algo: str, columns: list[np.ndarray], device: str) -> Callable[[bool], None]:
    """An update as in Fujimoto's TD3_BC.py, or IQL's in the same style: a replay buffer of NumPy
    arrays, a module for each network, Adam as it comes."""
    pi, v, q1, q2 = (
        nn.Sequential(nn.Linear(i, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                      nn.Linear(256, o)).to(device) for i, o in (
            (STATE, ACTION), (STATE, 1), (STATE + ACTION, 1), (STATE + ACTION, 1)))
    log_std = nn.Parameter(torch.zeros(ACTION, device=device))
    pi_target, q1_target, q2_target = map(copy.deepcopy, (pi, q1, q2))
    pairs = [(q1, q1_target), (q2, q2_target), *[(pi, pi_target)] * (algo == "td3bc")]
    pi_adam, q_adam, v_adam = (torch.optim.Adam(x, 3e-4) for x in (
        [*pi.parameters(), log_std], [*q1.parameters(), *q2.parameters()], v.parameters()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(pi_adam, 1_000_000)

    def update(update_actor: bool) -> None:
        index = np.random.randint(ROWS, size=BATCH)
        s, a, r, s2, done = (torch.FloatTensor(x[index]).to(device) for x in columns)
        x = torch.cat([s, a], 1)
        if algo == "td3bc":
            with torch.no_grad():
                noise = (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)
                x2 = torch.cat([s2, (pi_target(s2).tanh() + noise).clamp(-1, 1)], 1)
                y = r + (1 - done) * 0.99 * torch.min(q1_target(x2), q2_target(x2))
        else:
            with torch.no_grad():
                q = torch.min(q1_target(x), q2_target(x))
            u = q - v(s)
            descend(v_adam, (torch.where(u > 0, 0.7, 0.3) * u**2).mean())
            with torch.no_grad():
                weight = ((q - v(s)) * 3).exp().clamp(max=100)
                y = r + (1 - done) * 0.99 * v(s2)
            policy = torch.distributions.Normal(pi(s).tanh(), log_std.clamp(-5, 2).exp())
            descend(pi_adam, -(weight * policy.log_prob(a).sum(1, keepdim=True)).mean())
            schedule.step()
        descend(q_adam, F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y))
        if algo == "td3bc" and update_actor:
            own = pi(s).tanh()
            q = q1(torch.cat([s, own], 1))
            descend(pi_adam, -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(own, a))
        for net, target in pairs if algo == "iql" or update_actor else ():
            for p, p_target in zip(net.parameters(), target.parameters()):
                p_target.data.copy_(0.005 * p.data + 0.995 * p_target.data)

    return update

def seconds(work: Callable[[bool], object], times: int = 1) -> float:
    """What calls take, with all that they begin on a GPU. Every other one updates TD3's actor."""
    started = time.perf_counter()
    for i in range(times):
        work(i % 2 == 1)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=90, help="for updates (default: 90)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    if cuda := flags.device.startswith("cuda"):
        torch.cuda.set_stream(torch.cuda.Stream(flags.device))  # the default one can't be captured
    print(f"{flags.device}, {flags.threads} threads, PyTorch {torch.__version__}: about"
          f" {flags.seconds + 30:.0f} seconds, less than {flags.seconds + 90:.0f}.", flush=True)
    data = oap.Data(ROWS, STATE, ACTION, flags.device)
    data.rows.uniform_(-1, 1)[:, -1] = 0  # no row is terminal
    data.size = data.offline = data.size_on_device.fill_(ROWS).item()
    state, action = data.split(data.rows)[:2]
    preferred, speed = action.clone(), {}
    columns = [x.cpu().numpy().copy() for x in data.rows.split(data.widths, 1)]
    print(f"\n{'updates a second (x plain)':<28}" + "".join(map("{:>16}".format, (
        "plain    ", "oap.py, offline", "oap.py, OAP", "graphed")[: 3 + cuda])))
    for algo, precision in itertools.product(oap.ALGORITHMS, ("highest", "medium")):
        args = oap.parse_args(
            ["--env=halfcheetah-medium-v2", "--algo", algo, "--device", flags.device])
        agent = oap.ALGORITHMS[algo](STATE, ACTION, args)
        torch.set_float32_matmul_precision(precision)

        def ours(preferred: torch.Tensor | None, update_actor: bool, agent=agent) -> dict:
            data.preferred = preferred
            return agent.update(data.sample(BATCH), update_actor)

        sides = [plain(algo, columns, flags.device), partial(ours, None), partial(ours, preferred)]
        sides += [oap.graphed(sides[-1])] if cuda else []
        each = [seconds(x, 10) and seconds(x, 10) / 10 for x in sides]  # the first warms up
        counts = [math.ceil(flags.seconds / 4 / len(sides) / REPEATS / x) for x in each]
        rates = np.array([[n / seconds(x, n) for x, n in zip(sides, counts)]
                          for _ in range(REPEATS)])  # in turns, as a machine's speed changes
        middle, ratio = np.median(rates, 0), np.median(rates / rates[:, :1], 0)
        speed.setdefault(algo, middle[-1])
        print(f"{algo + ', matmul ' + precision:<28}{middle[0]:12,.0f}    " + "".join(
            f"{x:9,.0f} ({y:.2f})" for x, y in zip(middle[1:], ratio[1:])), flush=True)

    torch.set_float32_matmul_precision("highest")
    few, updates, asked = ROWS // 10, args.steps + args.finetune_steps, args.budget / 10
    box = oap.BlackBox(math.inf, lambda s, a: agent.critic(s, a).amin(-1))
    ranknet = oap.RankNet(STATE, ACTION).to(flags.device)
    learner = oap.OAP(state[:few], action[:few], box, ranknet, epochs=1)  # four steps
    of_round = seconds(lambda _: learner.round(agent.actor, int(asked / 10))) * ROWS / few
    learner.asked[: 200 * BATCH] = True
    of_step = seconds(lambda _: learner.train_ranknet()) / (learner.asked.sum().item() / BATCH)
    steps = sum(args.ranknet_epochs * math.ceil(k * asked / BATCH) for k in range(1, 11))
    envs, act = [oap.make_env(args.env) for _ in range(args.eval_episodes)], torch.no_grad()(
        lambda x: agent.actor(torch.as_tensor(x, dtype=torch.float32, device=flags.device)))
    of_evaluation = seconds(lambda _: oap.evaluate(envs, act, args.eval_episodes, oap.env_seed(0)))
    print("\nWhat a run of OAP takes, in minutes, scaled up from a few of each. RankNet's training,"
          f"\n100 epochs in each round, is counted by its steps.\n{'':<36}"
          + "".join(f"{x:>16}" for x in speed))
    parts = [(f"{updates:,} updates", [updates / x for x in speed.values()])] + [
        (f"{times:,} {name}", [times * one] * len(speed)) for times, name, one in (
            (updates // args.eval_every, "evaluations (from 1)", of_evaluation),
            (10, f"rounds (from 1, {few:,} rows)", of_round),
            (steps, "steps of RankNet (from 200)", of_step))]
    for name, spent in parts:
        print(f"{name:<36}" + "".join(f"{x / 60:8,.1f} ({x / sum(of):5.1%})" for x, of in zip(
            spent, zip(*(x for _, x in parts)))))

if __name__ == "__main__":
    main()
