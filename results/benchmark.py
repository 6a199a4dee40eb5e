"""Updates a second of this machine, oap.py's beside the published algorithms written plainly, and
what evaluations and OAP's rounds take of a run. On random data of HalfCheetah's shapes."""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import oap  # noqa: E402

ROWS, STATE, ACTION, BATCH, REPEATS = 1_000_000, 17, 6, 256, 11

def net(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(i, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, o))

def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def average(*pairs: tuple[nn.Module, nn.Module]) -> None:
    for p, target in ((p, t) for net, of in pairs for p, t in zip(net.parameters(), of.parameters())):
        target.data.copy_(0.005 * p.data + 0.995 * target.data)

def plain(algo: str, columns: list[np.ndarray], device: str) -> Callable[[bool], None]:
    """An update as in Fujimoto's TD3_BC.py, or IQL's in the same style: a replay buffer of NumPy
    arrays, a module for each network, Adam as it comes."""
    pi, v, q1, q2 = (net(*io).to(device) for io in (
        (STATE, ACTION), (STATE, 1), (STATE + ACTION, 1), (STATE + ACTION, 1)))
    log_std = nn.Parameter(torch.zeros(ACTION, device=device))
    pi_target, q1_target, q2_target = map(copy.deepcopy, (pi, q1, q2))
    pi_adam, q_adam, v_adam = (torch.optim.Adam(x, 3e-4) for x in (
        [*pi.parameters(), log_std], [*q1.parameters(), *q2.parameters()], v.parameters()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(pi_adam, 1_000_000)

    def sample() -> list[torch.Tensor]:
        index = np.random.randint(ROWS, size=BATCH)
        return [torch.FloatTensor(x[index]).to(device) for x in columns]

    def td3bc(delayed: bool) -> None:
        s, a, r, s2, done = sample()
        with torch.no_grad():
            noise = (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)
            x2 = torch.cat([s2, (pi_target(s2).tanh() + noise).clamp(-1, 1)], 1)
            y = r + (1 - done) * 0.99 * torch.min(q1_target(x2), q2_target(x2))
        x = torch.cat([s, a], 1)
        descend(q_adam, F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y))
        if delayed:
            own = pi(s).tanh()
            q = q1(torch.cat([s, own], 1))
            descend(pi_adam, -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(own, a))
            average((q1, q1_target), (q2, q2_target), (pi, pi_target))

    def iql(delayed: bool) -> None:
        s, a, r, s2, done = sample()
        x = torch.cat([s, a], 1)
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
        average((q1, q1_target), (q2, q2_target))

    return {"td3bc": td3bc, "iql": iql}[algo]

def seconds(work: Callable, *args) -> float:
    """How long a call takes, with all that it begins on a GPU."""
    started = time.perf_counter()
    work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started

def many(update: Callable[[bool], object], count: int) -> None:
    for i in range(count):
        update(i % 2 == 1)  # TD3+BC updates its actor half as often

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=100, help="for updates (default: 100)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    device, cuda, speed = flags.device, flags.device.startswith("cuda"), {}
    print(f"{device}, {flags.threads} threads, PyTorch {torch.__version__}. This takes less than"
          f" {flags.seconds + 75:.0f} seconds.\n", flush=True)
    data = oap.Data(ROWS, STATE, ACTION, device)
    data.rows.uniform_(-1, 1)[:, -1] = 0  # none is done
    data.size = data.offline = data.size_on_device.fill_(ROWS).item()
    state, action = data.split(data.rows)[:2]
    data.preferred = action.clone()
    columns = [x.cpu().numpy().copy() for x in data.rows.split(data.widths, 1)]

    print(f"updates a second, matmul      plain   oap.py  ratio{'    graph  ratio' * cuda}")
    for algo in oap.ALGORITHMS:
        args = oap.parse_args(["--env=halfcheetah-medium-v2", "--algo", algo, "--device", device])
        agent = oap.ALGORITHMS[algo](STATE, ACTION, args, math.inf)
        ours = lambda delayed: agent.update(data.sample(BATCH), delayed)  # noqa: B023, E731
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            sides = [plain(algo, columns, device), ours, *([oap.graphed(ours)] if cuda else [])]
            per_call = [seconds(many, side, 10) and seconds(many, side, 10) / 10 for side in sides]
            counts = [2 * math.ceil(flags.seconds / 8 / len(sides) / REPEATS / x) for x in per_call]
            rates = np.array([[n / seconds(many, side, n) for side, n in zip(sides, counts)]
                              for _ in range(REPEATS)])  # in turns, since machines change speed
            middle, ratio = np.median(rates, 0), np.median(rates / rates[:, :1], 0)
            speed[algo, precision] = middle[1]
            print(f"{algo:<7}{precision:<19}{middle[0]:9,.0f}" + "".join(
                f"{x:9,.0f}{y:7.2f}" for x, y in zip(middle[1:], ratio[1:])), flush=True)

    ...
