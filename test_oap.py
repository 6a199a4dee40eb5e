"""Tests of oap.py, in its order: python -m pytest -q. They use neither a network nor a GPU."""

import ast
import base64
import contextlib
import copy
import csv
import functools
import http.server
import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oap

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU can't be forked
torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
RECORDINGS = sorted(HERE.glob("testdata/*.npz")) + sorted(SHARED.glob("golden/*.npz"))

class Point(gym.Env):
    """A point on a line, pushed by actions in [-2, 3]: leaving [-2, 2] ends the episode."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 3.0, (1,), np.float32)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return self.state(), {}

    def state(self):
        return np.array([10 + self.x, 1000 * self.x], np.float32)

    def step(self, action):
        assert self.action_space.contains(action)
        Point.steps += 1
        self.x += 0.3 * float(action[0])
        return self.state(), 1 - self.x**2, abs(self.x) > 2, False, {}

gym.register("Point-v0", Point, max_episode_steps=20)

def write_hdf5(path, arrays, **attributes):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file.attrs.update(attributes)
    return path

def point_data(n=500, seed=0):
    """D4RL's arrays of Point-v0 under random actions."""
    env, rng, rows, over = gym.make("Point-v0"), np.random.default_rng(seed), [], True
    while len(rows) < n:
        if over:
            state, _ = env.reset(seed=len(rows))
        action = rng.uniform(-2, 3, 1).astype(np.float32)
        next_state, reward, terminal, timeout, _ = env.step(action)
        rows.append((state, action, reward, terminal, timeout and not terminal))
        state, over = next_state, terminal or timeout
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    return {k: np.array(column) for k, column in zip(keys, zip(*rows, strict=True), strict=True)}

@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with Point-v0's data and a black box of it, a module of one's own, and runs."""
    folder = tmp_path_factory.mktemp("files")
    write_hdf5(folder / "point.hdf5", point_data(), ref_min_score=-20.0, ref_max_score=20.0)
    torch.manual_seed(0)
    oap.save(folder / "point.pt", {"critic": oap.Critic(2, 1).state_dict(), "return": 10.0,
                                   "mean": torch.tensor([10.0, 0.0]), "std": torch.ones(2)})
    bad = {k: x * math.nan for k, x in oap.Critic(2, 1).state_dict().items()}
    oap.save(folder / "nan.pt", {"critic": bad})
    (folder / "mine.py").write_text(
        "def prefer(states, a, b):\n    states /= 1000\n    x = states[:, 1]\n"
        "    return abs(x + .3 * a[:, 0]) <= abs(x + .3 * b[:, 0])\n")
    return folder

@pytest.fixture
def run(files, monkeypatch):
    """Runs oap.py's main with Point-v0 and small numbers; gives the exit code."""
    monkeypatch.chdir(files)
    small = ("--env=Point-v0 --dataset=point.hdf5 --expert=point.pt --steps=40 --finetune-steps=20"
             " --interval=20 --budget=30 --eval-every=20 --eval-episodes=3 --ranknet-epochs=2"
             " --batch-size=16 --random-steps=10 --device=cpu")
    return lambda *argv: oap.main([*small.split(), *argv])

def rows_of(folder, drop=("seconds",)):
    with open(Path(folder, "progress.csv"), encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(file)]

def make_args(*argv):
    return oap.parse_args(["--env=Point-v0", "--dataset=x", "--device=cpu", *argv])

def batch_of(rng, size=64, dtype=torch.float64):
    """For states of 5 and actions of 3 dimensions."""
    normal = functools.partial(torch.randn, size, generator=rng, dtype=dtype)
    return oap.Batch(normal(5), normal(3).tanh(), normal(), normal(5), (normal() < 0).to(dtype),
                     normal(3).tanh())

# ---------------------------------------------------------------------------- schemes and arguments

def test_table_5_and_the_protocols_are_the_defaults():
    for env, alpha, beta, expectile, dropout, shift in (
        ("hopper-medium-v2", 2.5, 3, 0.7, 0, 0), ("antmaze-umaze-v0", 2.5, 10, 0.9, 0, -1),
        ("pen-human-v1", 0.1, 0.5, 0.7, 0.1, 0),
    ):
        for algo in oap.ALGORITHMS:
            args = oap.parse_args([f"--env={env}", f"--algo={algo}"])
            assert (args.td3bc_alpha, args.iql_beta, args.iql_expectile, args.iql_dropout,
                    args.reward_shift) == (alpha, beta, expectile, dropout, shift)
            assert args.normalize == (algo == "td3bc")
            assert args.reward_scale == (algo == "iql" and env.startswith("hopper"))
    assert (args.steps, args.finetune_steps, args.budget, args.interval, args.ranknet_epochs,
            args.batch_size, args.lr, args.discount, args.polyak, args.policy_noise,
            args.noise_clip, args.policy_delay, args.eval_every, args.eval_episodes) == (
        1e6, 1e5, 1e5, 1e5, 100, 256, 3e-4, 0.99, 0.005, 0.2, 0.5, 2, 5_000, 10)
    assert not oap.parse_args(["--env=hopper-medium-v2", "--scheme=online"]).normalize

def test_every_flag_is_read(capsys):
    tree = ast.parse((HERE / "oap.py").read_text("utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("args", "self.args")}
    with pytest.raises(SystemExit):
        oap.parse_args(["--help"])
    flags = set(re.findall(r"^  --(?!no-)([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(flags) > 35 and {flag.replace("-", "_") for flag in flags} <= read

def test_whole_numbers_may_be_written_as_1e6():
    assert make_args("--steps=2e6").steps == 2_000_000
    for bad in ("--steps=1.5", "--steps=0", "--lr=nan", "--discount=1.1", "--steps=many"):
        with pytest.raises(SystemExit, match="2"):
            make_args(bad)

# ----------------------------------------------------------------------------------- OAP, section 3

@pytest.mark.parametrize("budget, steps, interval, timing, rounds", [
    (100_000, 1_000_000, 100_000, "interval", {t * 100_000: 10_000 for t in range(1, 11)}),
    (100, 10, 3, "interval", {3: 30, 6: 30, 9: 30}),  # never more than K
    (7, 10, 3, "ft", {10: 7}), (math.inf, 6, 3, "interval", {3: math.inf, 6: math.inf}),
])
def test_rounds_ask_the_same_count_and_never_more_than_k(budget, steps, interval, timing, rounds):
    assert oap.query_rounds(types.SimpleNamespace(
        budget=budget, steps=steps, interval=interval, timing=timing)) == rounds

@pytest.mark.parametrize("asked, count, expected", [
    ([0, 0, 0, 0, 0], 2, [3, 1]),
    ([0, 0, 0, 1, 0], 2, [1, 2]),  # never asked first; of equals (2 and 4), the lower index
    ([1, 1, 0, 1, 0], 3, [2, 4, 3]),  # too few are left: the most divergent asked one again
    ([1, 1, 1, 1, 1], 9, [3, 1, 2, 4, 0]),  # no sample twice
    ([0, 0, 0, 0, 0], 0, []),
])
def test_select_queries(asked, count, expected):
    ranking = torch.tensor([1.0, 7.0, 5.0, 9.0, 5.0])
    assert oap.select_queries(ranking, torch.tensor(asked, dtype=bool), count).tolist() == expected

def test_ranknet_loss_and_its_symmetries():
    score = lambda s, a: a.squeeze(-1)  # noqa: E731
    s, a, pi = torch.zeros(2, 1), torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    loss = oap.ranknet_loss(score, s, a, pi, torch.tensor([True, True]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2)
    p = torch.tensor([True, False])
    assert oap.ranknet_loss(score, s, a, pi, p) == oap.ranknet_loss(score, s, pi, a, ~p)
    assert oap.ranknet_loss(score, s, a, a, p).item() == pytest.approx(math.log(2))
    assert oap.pseudo_query(score, s, a, a).all()  # a tie keeps the data's action

def test_ranknet_has_the_papers_widths_and_dropout():
    layers = list(oap.RankNet(3, 2).net)
    widths = [(x.in_features, x.out_features) for x in layers[::3]]
    assert widths == [(5, 512), (512, 256), (256, 1)]
    assert [x.p for x in layers if isinstance(x, nn.Dropout)] == [0.5, 0.5]

class Larger(nn.Module):
    """Finds the larger action better, whatever it learns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, s, a):
        return a.sum(-1) + 0 * self.weight

@pytest.mark.parametrize("ranknet", [None, Larger()])
def test_rounds_equal_a_slow_and_obvious_version(ranknet):
    rng = np.random.default_rng(0)
    n, k = 40, 12
    state, action = rng.normal(size=(n, 3)), rng.uniform(-1, 1, (n, 2))
    q = lambda s, a: (s[:2] * a).sum() - (a**2).sum()  # noqa: E731
    box = oap.BlackBox(4 * k, q=lambda s, a: (s[:, :2] * a).sum(1) - (a**2).sum(1))
    oap_ = oap.OAP(torch.tensor(state), torch.tensor(action), box, ranknet, epochs=1)
    asked, preferred = set(), action.copy()
    for t in range(4):
        policy = lambda s, t=t: (s[:, :2] * (t + 1)).tanh()  # noqa: E731
        log = oap_.round(policy, k) | oap_.audit()
        pi = np.tanh(state[:, :2] * (t + 1))
        distance = {i: ((pi[i] - action[i]) ** 2).sum() for i in range(n)}
        chosen = sorted(distance, key=lambda i: (i in asked, -distance[i]))[:k]
        asked |= set(chosen)
        answers = {i: q(state[i], action[i]) >= q(state[i], pi[i]) for i in chosen}
        if ranknet and len(asked) < n:
            answers |= {i: action[i].sum() >= pi[i].sum() for i in set(range(n)) - asked}
        for i, prefers_data in answers.items():
            preferred[i] = action[i] if prefers_data else pi[i]
        np.testing.assert_allclose(oap_.preferred.numpy(), preferred, atol=1e-12)
        assert set(oap_.asked.nonzero().flatten().tolist()) == asked
        assert log["prefers_policy"] == pytest.approx(np.mean([not answers[i] for i in chosen]))
        assert log["divergence"] == pytest.approx(np.mean(list(distance.values())))
        gain = [q(state[i], preferred[i]) - q(state[i], action[i]) for i in asked]
        assert log["asked_gain"] == pytest.approx(np.mean(gain))
        assert ("ranknet_loss" in log) == (ranknet is not None and len(asked) < n)
    gain = [q(state[i], preferred[i]) - q(state[i], action[i]) for i in range(n)]
    assert log["improvement"] == pytest.approx(np.mean(gain))  # Eq. 7, over D
    assert box.spent == 4 * k and len(asked) == n
    with pytest.raises(RuntimeError, match="48 \\+ 1 queries are over 48"):
        oap_.round(policy, 1)
    pytest.raises(oap.BadInput, oap_.round, lambda s: 2 * s[:, :2].sign(), 1)

def test_a_round_of_no_queries_changes_nothing():
    box, ranknet = oap.BlackBox(0, q=lambda s, a: a[:, 0]), oap.RankNet(2, 1).eval()
    oap_ = oap.OAP(torch.randn(20, 2), torch.zeros(20, 1), box, ranknet)
    before = copy.deepcopy(oap_.state_dict())
    oap_.round(lambda s: s[:, :1].tanh(), 0)
    assert all(torch.equal(x, before[k]) for k, x in oap_.state_dict().items())
    assert not oap_.asked.any()

def test_an_audit_asks_about_ten_thousand_samples_without_counting_them():
    asked, state, ranknet = [], torch.randn(25_009, 2), oap.RankNet(2, 1).eval()
    box = oap.BlackBox(9, prefer=lambda s, a, b: asked.append(len(s)) or a[:, 0] > b[:, 0])
    oap_ = oap.OAP(state, torch.zeros(25_009, 1), box, ranknet, epochs=1)
    log = oap_.round(lambda s: s[:, :1].tanh(), 9) | oap_.audit()
    assert asked == [9, 8334] and box.spent == 9 and 0.4 < log["unasked_prefer_policy"] < 0.6

@pytest.mark.parametrize("algo", oap.ALGORITHMS)
def test_ranknet_learns_answers_about_states_of_any_scale(algo):
    """Dimensions differ by a thousand; answers are linear in the normalised state (issue 16)."""
    torch.manual_seed(0)
    scale = torch.tensor([1000.0, 1.0, 0.1, 50.0])
    state = (torch.randn(4000, 4) + 3) * scale
    action, pi = torch.rand(4000, 2) * 2 - 1, torch.rand(4000, 2) * 2 - 1
    data = oap.Data(4000, 4, 2, "cpu")
    data.append(state, action, torch.zeros(4000), state, torch.zeros(4000))
    if algo == "td3bc":  # whose policy sees normalised states
        data.mean, data.std = oap.moments(state)
    policy_actions = dict(zip(map(tuple, state.tolist()), pi, strict=True))
    policy = lambda s: torch.stack([policy_actions[tuple(x)] for x in s.tolist()])  # noqa: E731
    box = oap.BlackBox(1500, q=lambda s, a: (((s / scale - 3)[:, :2]) * a).sum(1))
    oap_ = oap.OAP(*data.split(data.rows)[:2], box, oap.RankNet(4, 2).eval(), 30)
    assert (oap_.round(policy, 1500) | oap_.audit())["ranknet_accuracy"] > 0.9

# ----------------------------------------------------------------------------------------- networks

def test_moments_of_millions_of_large_numbers():
    state = (torch.arange(2_000_000) % 2 * 2.0 - 1 + 4_000_000)[:, None]
    mean, std = oap.moments(state)
    assert mean.item() == 4_000_000 and std.item() == pytest.approx(1.001)

# ----------------------------------------------------------------------------------- TD3+BC and IQL

def test_eq_6_by_hand():
    pi, preferred = torch.tensor([[0.5, 0.0], [-0.5, 1.0]]), torch.tensor([[0.5, 1.0], [0.0, 1.0]])
    q = torch.tensor([4.0, -2.0])  # λ = 2.5 / mean(4, 2); squared distances are 0, 1, 0.25, 0
    loss = oap.td3bc_actor_loss(pi, q, preferred, 2.5).item()
    assert loss == pytest.approx(-2.5 / 3 * 1 + 1.25 / 4)
    assert oap.td3bc_actor_loss(pi, q, preferred, 0.0).item() == 1.25 / 4  # behaviour cloning

def test_expectile_and_weights_by_hand():
    assert oap.expectile_loss(torch.tensor([2.0, -2.0]), 0.7).item() == pytest.approx(
        (0.7 * 2**2 + 0.3 * 2**2) / 2)
    loss = oap.iql_actor_loss(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 9.0]), 3.0)
    assert loss.item() == pytest.approx((math.exp(1.5) * 1 + 100 * 2) / 2)

def plain_net(i, o):
    return nn.Sequential(
        nn.Linear(i, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, o)).double()

def copy_into(net, other):
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        p.data.copy_(q.data)

def make_agent(algo, updates, *argv, dtype=torch.float64):
    scheme = ["--scheme=oap"] if updates is None else ["--scheme=offline", f"--steps={updates}"]
    args = make_args(f"--algo={algo}", "--eval-every=1", *scheme, *argv)
    agent = oap.ALGORITHMS[algo](5, 3, args).to(dtype)
    nets = [agent.actor, agent.critic] + ([agent.value] if algo == "iql" else [])
    agent.optimizers = [oap.adam(net, args.lr) for net in nets]
    return agent

def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def polyak(*pairs):
    for net, target in pairs:
        for p, pt in zip(net.parameters(), target.parameters(), strict=True):
            pt.data.copy_(0.005 * p.data + 0.995 * pt.data)

def assert_equal(*pairs):
    for ours, theirs in pairs:
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-10), (p - q).abs().max()

def test_td3bc_updates_equal_the_published_algorithm():
    rng, agent = torch.Generator().manual_seed(2), make_agent("td3bc", None)
    actor, q1, q2 = plain_net(5, 3), plain_net(8, 1), plain_net(8, 1)
    copy_into(agent.actor, actor), copy_into(agent.actor_target, actor)
    for critic in (agent.critic, agent.critic_target):
        copy_into(critic.q1, q1), copy_into(critic.q2, q2)
    actor_t, q1_t, q2_t = map(copy.deepcopy, (actor, q1, q2))
    actor_opt = torch.optim.Adam(actor.parameters(), 3e-4)
    critic_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], 3e-4)
    for t in range(1, 41):
        b = batch_of(rng)
        torch.manual_seed(t)
        noise = torch.randn_like(b.action)
        with torch.no_grad():
            a2 = (torch.tanh(actor_t(b.next_state)) + (noise * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
            x2 = torch.cat([b.next_state, a2], 1)
            y = b.reward[:, None] + 0.99 * (1 - b.done[:, None]) * torch.min(q1_t(x2), q2_t(x2))
        x = torch.cat([b.state, b.action], 1)
        step(critic_opt, F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y))
        if t % 2 == 0:
            pi = torch.tanh(actor(b.state))
            q = q1(torch.cat([b.state, pi], 1))
            step(actor_opt,
                 -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, b.preferred))
            polyak((q1, q1_t), (q2, q2_t), (actor, actor_t))
        torch.manual_seed(t)
        agent.update(b, t % 2 == 0)
    assert_equal((agent.actor, actor), (agent.critic.q1, q1), (agent.critic.q2, q2),
                 (agent.actor_target, actor_t), (agent.critic_target.q2, q2_t))

@pytest.mark.parametrize("updates", [20, None])
def test_iql_updates_equal_the_published_algorithm(updates):
    rng, agent = torch.Generator().manual_seed(2), make_agent("iql", updates)
    mean, v, q1, q2 = plain_net(5, 3), plain_net(5, 1), plain_net(8, 1), plain_net(8, 1)
    log_std = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    copy_into(agent.actor.net, mean), copy_into(agent.value, v)
    for critic in (agent.critic, agent.critic_target):
        copy_into(critic.q1, q1), copy_into(critic.q2, q2)
    q1_t, q2_t = map(copy.deepcopy, (q1, q2))
    actor_opt = torch.optim.Adam([*mean.parameters(), log_std], 3e-4)
    v_opt = torch.optim.Adam(v.parameters(), 3e-4)
    q_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], 3e-4)
    for t in range(1, 21):
        b = batch_of(rng)
        x, x_preferred = (torch.cat([b.state, a], 1) for a in (b.action, b.preferred))
        with torch.no_grad():
            q, q_preferred = (torch.min(q1_t(z), q2_t(z)) for z in (x, x_preferred))
        u = q - v(b.state)
        step(v_opt, ((0.7 - (u < 0).double()).abs() * u**2).mean())
        with torch.no_grad():
            weight = torch.exp(3 * (q_preferred - v(b.state))).clamp(max=100)
        policy = torch.distributions.Normal(torch.tanh(mean(b.state)), log_std.clamp(-5, 2).exp())
        decay = (1 + math.cos(math.pi * (t - 1) / (updates or math.inf))) / 2
        actor_opt.param_groups[0]["lr"] = 3e-4 * decay
        step(actor_opt, -(weight * policy.log_prob(b.preferred).sum(1, keepdim=True)).mean())
        with torch.no_grad():
            y = b.reward[:, None] + 0.99 * (1 - b.done[:, None]) * v(b.next_state)
        step(q_opt, F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y))
        polyak((q1, q1_t), (q2, q2_t))
        agent.update(b, t % 2 == 0)
    assert_equal((agent.critic.q1, q1), (agent.value, v), (agent.critic_target.q2, q2_t),
                 (agent.actor.net, mean))
    assert torch.allclose(agent.actor.log_std, log_std, rtol=0, atol=1e-10)

def test_iql_has_dropout_in_the_actor_s_loss_alone():
    agents = [make_agent("iql", None, "--iql-dropout=0.5") for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    b = batch_of(torch.Generator().manual_seed(0))
    assert torch.equal(agents[0].actor(b.state), agents[0].actor(b.state))
    for seed, agent in enumerate(agents):
        torch.manual_seed(seed)
        agent.update(b, True)
    first, second = agents
    assert not torch.equal(first.actor.net[0].weight, second.actor.net[0].weight)
    assert torch.equal(first.critic.q1[0].weight, second.critic.q1[0].weight)

class Recorder(TorchDispatchMode):
    """What a CUDA graph keeps: the operations, with their inputs and outputs in memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != (
                        new.untyped_storage().data_ptr()):  # else a view, or changed in place
                    old.copy_(new)

def trained(algo, replayed):
    """Parameters after 46 updates, in which the data, ã and (IQL) the learning rate change."""
    torch.manual_seed(0)
    agent, data = make_agent(algo, 50, dtype=torch.float32), oap.Data(60, 5, 3, "cpu")
    rows = torch.randn(60, data.rows.shape[1])
    data.append(*data.split(rows[:30]))
    data.preferred, recorders = data.rows[:, 5:8].clone(), {}
    data.preferred[30:] = rows[30:, 5:8]
    advance = lambda actor: agent.update(data.sample(16), actor)  # noqa: E731
    for t in range(46):
        if t == 20:
            data.append(*data.split(rows[30:]))
        if t == 30:
            data.preferred.copy_(-data.preferred)
        if not replayed or t < 6:  # warming up makes the optimizers' state
            advance(t % 2 == 1)
        elif t < 8:
            with Recorder() as recorders[t % 2 == 1]:
                advance(t % 2 == 1)
        else:
            recorders[t % 2 == 1].replay()
    return torch.cat([p.flatten() for p in agent.parameters()])

@pytest.mark.parametrize("algo", oap.ALGORITHMS)
def test_a_replayed_update_equals_an_eager_one(algo, monkeypatch):
    """As far as a CPU can tell what a CUDA graph would do (FACTS.md 8)."""
    eager = trained(algo, replayed=False)
    assert torch.equal(eager, trained(algo, replayed=True))
    sample = oap.Data.sample

    def baked(self, count):  # with a size that the graph would not see change
        on_device, self.size_on_device = self.size_on_device, self.size
        batch, self.size_on_device = sample(self, count), on_device
        return batch

    monkeypatch.setattr(oap.Data, "sample", baked)
    assert torch.equal(eager, trained(algo, replayed=False))
    assert not torch.equal(eager, trained(algo, replayed=True))

def test_a_graph_warms_up_records_without_running_and_replays(monkeypatch):
    counts, recording = {"run": 0, "recorded": 0, "replayed": 0}, []
    replayed = lambda graph: counts.update(replayed=counts["replayed"] + 1)  # noqa: E731
    @contextlib.contextmanager
    def record(graph, stream):
        assert stream == "that of the replays"
        recording.append(graph)
        yield
        recording.pop()

    def advance(update_actor):
        counts["recorded" if recording else "run"] += 1
        return {"actor": update_actor}

    for name, fake in {"current_stream": lambda: "that of the replays", "graph": record,
                       "CUDAGraph": type("Graph", (), {"replay": replayed})}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = oap.graphed(advance)
    assert all(replay(t % 2 == 0) == {"actor": t % 2 == 0} for t in range(20))
    assert counts == {"run": 6, "recorded": 2, "replayed": 14}

# -------------------------------------------------------------------------- files and black boxes

def test_a_black_box_counts_refuses_and_audits_do_not_count():
    seen = []
    box = oap.BlackBox(5, prefer=lambda s, a, b: seen.append((s, a, b)) or s[:, 0] > 1)
    state, action = torch.tensor([[1.5], [0.5], [2.0]]), torch.zeros(3, 1)
    assert box(state, action, action + 1).tolist() == [True, False, True]
    assert isinstance(seen[0][0], np.ndarray) and seen[0][2].tolist() == [[1], [1], [1]]
    assert box.answer(state, action, action).tolist() == [True, False, True] and box.spent == 3
    assert box.value(state, action).isnan().all()
    with pytest.raises(RuntimeError, match="3 \\+ 3 queries are over 5"):
        box(state, action, action)
    for wrong in (lambda s, a, b: a > b, lambda s, a, b: a[:, 0] * math.nan):
        with pytest.raises(oap.BadInput, match="as many bools"):
            oap.BlackBox(5, prefer=wrong)(state, action, action)
    with pytest.raises(oap.BadInput, match="finite numbers"):
        oap.BlackBox(5, q=lambda s, a: s[:, 0] * math.nan)(state, action, action)

def sb3_zip(path, *nets, **data):
    weights = {"actor.mu.weight": torch.zeros(1), "critic_target.qf0.0.weight": torch.zeros(1)}
    for i, net in enumerate(nets):
        weights |= {f"critic.qf{i}.{k}": v for k, v in net.state_dict().items()}
    torch.save(weights, buffer := io.BytesIO())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"policy_kwargs": {"use_sde": False}} | data))
        archive.writestr("policy.pth", buffer.getvalue())
    return str(path)

def serialized(kind):
    return {":serialized:": base64.b64encode(pickle.dumps(np.zeros(3, kind))).decode()}

def test_black_boxes_from_files(tmp_path, files, monkeypatch):
    env = oap.make_env("Point-v0")
    state, action = torch.randn(9, 2) * 3, torch.rand(9, 1) * 2 - 1
    relu = {"policy_kwargs": {"activation_fn": "<class 'torch.nn.modules.activation.ReLU'>"}}
    nets = [plain_net(3, 1).float() for _ in range(2)]
    q = torch.cat([net(torch.cat([state, action], 1)) for net in nets], 1).amin(1)
    for seen in (serialized("f8"), None):  # Stable-Baselines3 scales actions as we do
        sb3 = sb3_zip(tmp_path / "sac.zip", *nets, **relu, _last_obs=seen,
                      _last_original_obs=serialized("f8"))
        box, _ = oap.load_black_box(sb3, env, 100, "cpu")
        assert torch.allclose(box.value(state, action), q, atol=1e-5)
    box, about = oap.load_black_box(str(files / "point.pt"), env, 100, "cpu")
    critic = oap.Critic(2, 1)
    critic.load_state_dict(torch.load(files / "point.pt")["critic"])
    raw = state - torch.tensor([10.0, 0.0])
    assert torch.allclose(box.value(state, action), critic(raw, action).amin(1))
    assert about == {"expert_return": 10.0, "expert_sha256": oap.sha256(files / "point.pt")}
    monkeypatch.syspath_prepend(files)
    box, about = oap.load_black_box("mine:prefer", env, 100, "cpu")
    state, best, worse = torch.tensor([[10.0, -150.0]]), torch.zeros(1, 1), torch.full((1, 1), 0.1)
    assert box(state, best, worse) and not box(state, worse, best) and state[0, 1] == -150
    assert about == {"expert_sha256": f"{oap.sha256(files / 'mine.py')} prefer"}

def test_files_that_are_no_black_boxes(tmp_path, files):
    class Pickled:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)
    good = (files / "point.pt").read_bytes()
    net = plain_net(3, 1).float()
    at = good.index(torch.load(files / "point.pt")["critic"]["q1.0.weight"].numpy().tobytes()) + 99
    torch.save({"critic": {"q1.0.weight": Pickled()}}, tmp_path / "evil")
    script = torch.jit.trace(lambda s, a: a, (torch.zeros(1, 2), torch.zeros(1, 1)))
    script.save(str(tmp_path / "script"))
    for name, content in {"bit": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], "empty": b"",
                          "cut": good[:9999], "html": b"<html>", "text": b"no zip"}.items():
        (tmp_path / name).write_bytes(content)
    tanh = {"policy_kwargs": {"activation_fn": "<class 'torch.nn.modules.activation.Tanh'>"}}
    sb3_zip(tmp_path / "tanh", net, **tanh)
    sb3_zip(tmp_path / "norm", net, _last_obs=serialized("f4"), _last_original_obs=serialized("f8"))
    sb3_zip(tmp_path / "tqc", plain_net(3, 25).float())
    sb3_zip(tmp_path / "ppo")
    sb3_zip(tmp_path / "wide", plain_net(8, 1).float())
    oap.save(tmp_path / "other", {"model": torch.zeros(3)})
    point = torch.load(files / "point.pt") | {"mean": torch.zeros(3)}
    oap.save(tmp_path / "shift", point | {"env": "Swimmer-v5"})  # of as many numbers in all
    for name, message in {"evil": "weights", "script": "", "bit": "damaged", "empty": "", "cut": "",
                          "html": "", "text": "", "tanh": "Tanh", "norm": "VecNormalize",
                          "tqc": "quantiles", "ppo": "no plain Q", "wide": "Q takes 8",
                          "other": "no plain Q", "shift": "size",
                          "missing": "no black box"}.items():
        with pytest.raises(oap.BadInput, match=message or None) as error:
            oap.load_black_box(str(tmp_path / name), oap.make_env("Point-v0"), 1, "cpu")
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()

def test_no_file_is_half_written(tmp_path, monkeypatch):
    oap.write(path := tmp_path / "file", b"old")

    def full_disk(self, content):
        with self.open("wb") as file:
            file.write(content[:3])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(oap.BadInput, match="file can't be written: .*No space"):
        oap.write(path, b"new content")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

# ------------------------------------------------------------------------------------- environments

@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_one_step_equals_the_original_simulator(path):
    if not any(path.stem.startswith(robot.name + "-") for robot in oap.ROBOTS):
        pytest.skip("a robot that this program does not know")
    rows, env = dict(np.load(path)), oap.make_env(path.stem)
    assert env.spec.max_episode_steps == rows["max_episode_steps"]
    env.env.action_space.dtype = np.dtype(float)  # as recorded: float32 would round
    robot, steps = env.unwrapped, []
    for qpos, qvel, extra, action in zip(*(rows[k] for k in ("qpos", "qvel", "extra", "action")),
                                         strict=True):
        env.reset()
        if hasattr(robot, "target_obj_body_id"):
            robot.model.body_quat[robot.target_obj_body_id] = extra
        env.goal = extra
        robot.set_state(qpos, qvel)
        steps.append(env.step(action)[:3])
    next_obs, reward, terminal = map(np.array, zip(*steps, strict=True))
    assert np.abs(next_obs - rows["next_obs"]).max() <= 1e-9
    assert np.abs(reward - rows["reward"]).max() <= 1e-9
    assert np.array_equal(terminal, rows["terminal"].astype(bool))

def test_old_capsules():
    hopper, cheetah = (oap.make_env(f"{name}-medium-v2").unwrapped.model
                       for name in ("hopper", "halfcheetah"))
    torso, radius, length = hopper.body("torso"), 0.05, 0.4
    assert torso.mass[0] == pytest.approx(1000 * math.pi * radius**2 * (length + radius))
    across = torso.mass[0] * (3 * radius**2 + (length + radius) ** 2) / 12
    assert torso.inertia == pytest.approx([across, across, torso.mass[0] * radius**2 / 2])
    assert cheetah.body_mass.sum() == pytest.approx(14)
    stock = oap.make_env("Hopper-v4").unwrapped.model  # a Gymnasium id is left as it is
    assert stock.body_mass.sum() / hopper.body_mass.sum() == pytest.approx(1.036, abs=1e-3)

@pytest.mark.parametrize("maze, cell", [
    ("umaze", (0, 8)), ("medium-play", (20, 20)), ("large-diverse", (32, 24))])
def test_antmaze_start_goal_and_success(maze, cell):
    env = oap.make_env(f"antmaze-{maze}-v0")
    obs = np.array([env.reset(seed=0)[0]] + [env.reset()[0] for _ in range(99)])
    assert np.abs(obs[:, :2]).max() <= 0.1 and np.abs(obs[:, 2] - 0.75).max() <= 0.1
    np.testing.assert_allclose(np.linalg.norm(obs[:, 3:7], axis=1), 1)
    goals = np.array([env.reset() and env.goal - cell for _ in range(300)])
    assert goals.min() >= 0 and goals.max() <= 1.5 and abs(goals.mean() - 0.75) < 0.06
    env.goal = env.unwrapped.data.qpos[:2].copy()
    assert env.step(np.zeros(8))[1:3] == (1.0, True)

class Odd(Point):
    """Whole numbers as first state, float32 rewards in arrays; it spoils what it is given."""
    def reset(self, **kwargs):
        return super().reset(**kwargs)[0].astype(int), {}

    def step(self, action):
        _, reward, *others = super().step(action)
        action[:] = 9
        self.shown = np.array([self.x, getattr(self, "broken", 1.0)])
        return self.shown, np.array([reward], np.float32), *others

def test_odd_environments_are_seen_as_plain_ones():
    env = oap.Env(gym.wrappers.TimeLimit(Odd(), 20), oap.find_robot("Odd"))
    state, _ = env.reset(seed=0)
    assert state.dtype == np.float64
    action = np.array([0.5], np.float32)
    next_state, reward, terminal, _, _ = env.step(action)
    assert action == 0.5 and isinstance(reward, float) and type(terminal) is bool
    env.unwrapped.shown[:] = 7
    assert next_state[0] == env.unwrapped.x != 7
    for extreme in (-1, 1, 1 + 1e-6):
        assert env.env.action_space.contains(env.raw_action(np.array([extreme], np.float32)))
    env.unwrapped.broken = math.nan
    with pytest.raises(oap.BadInput, match="gave a state"):
        env.step(action)

@pytest.mark.parametrize("action, observation, limit", [
    (gym.spaces.Discrete(2), None, 9), (gym.spaces.Box(-np.inf, np.inf, (1,)), None, 9),
    (gym.spaces.Box(np.array([0.0, 1.0]), np.array([1.0, 1.0])), None, 9), (None, None, None),
    (None, gym.spaces.Box(0, 1, (3, 3)), 9)])
def test_environments_that_do_not_fit_are_named_at_once(action, observation, limit):
    class Unfit(Point):
        action_space = action or Point.action_space
        observation_space = observation or Point.observation_space

    gym.register("Unfit-v0", Unfit, max_episode_steps=limit)
    with pytest.raises(oap.BadInput, match="--env Unfit-v0"):
        oap.make_env("Unfit-v0")
    del gym.registry["Unfit-v0"]

# --------------------------------------------------------------------------------------------- data

def d4rl_rows(raw, horizon):
    """d4rl.qlearning_dataset's loop, written from its description in FACTS.md: a row at a time."""
    rows, episode_step = [], 0
    for i in range(len(raw["rewards"]) - 1):
        done = bool(raw["terminals"][i])
        timeout = raw["timeouts"][i] if "timeouts" in raw else episode_step == horizon - 1
        if timeout:
            episode_step = 0
            continue
        if done:
            episode_step = 0
        rows.append((i, done))
        episode_step += 1
    return rows

@pytest.mark.parametrize("seed", range(6))
def test_datasets_are_read_as_d4rl_does(tmp_path, seed):
    rng, n = np.random.default_rng(seed), 400
    raw = {"observations": rng.normal(size=(n, 2)).astype(">f4"), "terminals": rng.random(n) < 0.1,
           "actions": rng.uniform(-2, 3, (n, 1)), "rewards": rng.normal(size=(n, 1))}
    if seed % 2:
        raw["timeouts"] = (rng.random(n) < 0.1) & ~raw["terminals"]
    path = write_hdf5(tmp_path / "d.hdf5", raw, ref_min_score=1.0, ref_max_score=2.0)
    read, references = oap.load_dataset(path, oap.make_env("Point-v0"))
    index, done = map(np.array, zip(*d4rl_rows(raw, 20), strict=True))
    for key, expected in {"state": raw["observations"][index], "action": raw["actions"][index],
                          "next_state": raw["observations"][index + 1], "done": done,
                          "reward": raw["rewards"][index, 0]}.items():
        np.testing.assert_array_equal(read[key], expected.astype(read[key].dtype))
    assert references == {"ref_min_score": 1.0, "ref_max_score": 2.0}
    if seed % 2:
        ends = np.flatnonzero((raw["terminals"] | raw["timeouts"])[:-1]) + 1
        kept = [np.intersect1d(e, index) for e in np.split(np.arange(n), ends)]
        np.testing.assert_allclose(
            read["returns"], [raw["rewards"][k].sum() for k in kept if len(k)], atol=1e-5)

def test_what_networks_see_and_what_the_environment_gave(files, monkeypatch):
    monkeypatch.chdir(files)
    env = oap.make_env("Point-v0")
    raw, _ = oap.load_dataset(files / "point.hdf5", env)
    args = make_args("--dataset=point.hdf5", "--scheme=o2o", "--algo=iql", "--budget=7",
                     "--normalize", "--reward-shift=-1")
    data, about = oap.load_data(args, env)
    state, action, *_ = data.split(data.rows)
    n = len(raw["reward"])
    assert data.size == data.offline == n and len(data.rows) == n + 7
    np.testing.assert_array_equal(state[:n], raw["state"])
    expected = ((raw["action"] - 0.5) / 2.5).clip(-1 + 1e-5, 1 - 1e-5)  # IQL's limits
    np.testing.assert_allclose(action[:n], expected, atol=1e-6)
    b, scale = data.sample(4000), 1000 / np.ptp(raw["returns"])
    np.testing.assert_allclose(b.state.mean(0), 0, atol=0.1)
    for end in (np.min, np.max):
        assert end(b.reward.numpy()) == pytest.approx(end(raw["reward"]) * scale - 1, abs=1e-3)
    assert b.preferred is b.action and about["data_return"] == pytest.approx(raw["returns"].mean())
    data.append(np.array([1.0, 2.0]), torch.tensor([0.5]), 3.0, np.array([4.0, 5.0]), True)
    assert data.rows[n].tolist() == [1, 2, 0.5, 3, 4, 5, 1] and data.size_on_device == n + 1
    seen = torch.cat([data.sample(1000).action for _ in range(20)])
    assert (seen == 0.5).float().mean().item() == pytest.approx(1 / (n + 1), rel=0.6)

def broken_datasets(folder):
    good = point_data(60)
    nan, wide = good["rewards"].copy(), good["actions"] * 1.5
    nan[3] = np.nan
    for name, change in {
        "lacks": {"actions": None}, "nan": {"rewards": nan}, "bounds": {"actions": wide},
        "shape": {"observations": good["observations"][:, :1]}, "short": {"rewards": nan[:9]},
        "all timeouts": {"timeouts": np.ones(60, bool)}, "text": {"rewards": np.array([b"a"] * 60)},
        "complex": {"rewards": nan * 1j}, "no rows": {k: v[:0] for k, v in good.items()},
        "one row": {k: v[:1] for k, v in good.items()},
    }.items():
        arrays = {k: v for k, v in (good | change).items() if v is not None}
        write_hdf5(folder / f"{name}.hdf5", arrays)
    with h5py.File(folder / "link.hdf5", "w") as file:
        file["observations"] = h5py.ExternalLink("nowhere.hdf5", "/x")
    write_hdf5(folder / "references.hdf5", good, ref_min_score=2.0, ref_max_score=1.0)
    (folder / "cut.hdf5").write_bytes((folder / "nan.hdf5").read_bytes()[:2000])
    (folder / "html.hdf5").write_text("<html>Not found</html>")
    (folder / "empty.hdf5").touch()
    return [path.name for path in folder.glob("*.hdf5")] + ["missing.hdf5"]

def test_broken_datasets_are_one_line_that_names_them(tmp_path, run, capsys):
    for name in broken_datasets(tmp_path):
        assert run(f"--dataset={tmp_path / name}", "--out=broken") == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error, error
    assert not Path("broken").exists()

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of pen-human-v1, which answers as `server.answers` says, and its mirror."""
    write_hdf5(tmp_path / "pen.hdf5", {"x": np.arange(9999)})
    body = (tmp_path / "pen.hdf5").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = server.answers[self.path.split("/")[1]]
            if answer == "missing":
                return self.send_error(404)
            sent = {"cut": body[:-500], "html": b"<html>", "other": body + b"x"}.get(answer, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body if answer == "cut" else sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(oap, "MIRROR", f"{url}/mirror")
    known = {"pen-human-v1.hdf5": oap.sha256(tmp_path / "pen.hdf5")}
    monkeypatch.setattr(oap, "checksums", lambda: known)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    server.url, server.folder = f"{url}/first/pen-human-v1.hdf5", tmp_path / "d4rl"
    yield server
    server.shutdown()

@pytest.mark.parametrize("first", ["whole", "missing", "cut", "html", "other"])
def test_downloads_are_checked_and_the_mirror_is_tried(server, first):
    server.answers = {"first": first, "mirror": "missing"}
    if first == "whole":
        assert oap.dataset_file(server.url) == server.folder / "pen-human-v1.hdf5"
    else:
        with pytest.raises(oap.BadInput, match="put D4RL's file at .*first: .*mirror: "):
            oap.dataset_file(server.url)
        assert list(server.folder.iterdir()) == []
        server.answers["mirror"] = "whole"
        oap.dataset_file(server.url)
    assert [path.name for path in server.folder.iterdir()] == ["pen-human-v1.hdf5"]
    server.answers = {}  # from now on nobody is asked
    oap.dataset_file(server.url)

# ------------------------------------------------------------------------- evaluation and training

def test_evaluation_depends_on_nothing_but_its_seed():
    envs = [oap.make_env("Point-v0") for _ in range(4)]
    policy = lambda s: torch.as_tensor(-s[:, 1:] / 1000)  # noqa: E731
    first = oap.evaluate(envs, policy, 7, 1)
    torch.manual_seed(1), np.random.seed(1)
    assert np.array_equal(first, oap.evaluate(envs, policy, 7, 1)) and first.shape == (7,)
    assert not np.array_equal(first, oap.evaluate(envs, policy, 7, 2))

@pytest.mark.parametrize("algo", oap.ALGORITHMS)
@pytest.mark.parametrize("scheme, steps, interactions, queries", [
    ("offline", 40, 0, 0), ("online", 40, 30, 0), ("online-mix", 40, 30, 0), ("o2o", 60, 30, 0),
    ("oap", 60, 0, 30)])
def test_every_scheme_with_both_algorithms(run, algo, scheme, steps, interactions, queries, capsys,
                                           monkeypatch):
    evaluate, outside = oap.evaluate, []

    def evaluating(*args):
        before = Point.steps
        result = evaluate(*args)
        outside.append(Point.steps - before)
        return result

    monkeypatch.setattr(oap, "evaluate", evaluating)
    before = Point.steps
    audit = "--no-audit" if scheme == "online" else "--audit"
    assert run(f"--scheme={scheme}", f"--algo={algo}", "--out=schemes", audit) == 0
    rows = rows_of(f"schemes/Point-v0/{algo}-{scheme}/0")
    assert [int(row["step"]) for row in rows] == list(range(20, steps + 1, 20))
    assert (int(rows[-1]["interactions"]), int(rows[-1]["queries"])) == (interactions, queries)
    halfway = {"online": 20, "online-mix": 15}  # 10 at random, then one every other update
    assert int(rows[0]["interactions"]) == halfway.get(scheme, 0)
    assert Point.steps - before - sum(outside) == interactions  # offline and OAP: none
    if scheme == "oap":
        assert [int(row["queries"]) for row in rows] == [15, 30, 30] and rows[1]["ranknet_accuracy"]
        assert rows[0]["improvement"] and not rows[2]["prefers_policy"]
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines if line.startswith("seed"))
    model = oap.load(f"schemes/Point-v0/{algo}-{scheme}/0/model.pt", "cpu")
    assert model["return"] == pytest.approx(np.mean([float(row["return"]) for row in rows]))
    assert math.isfinite(model["score"])  # `online` has what scores 0 and 100 from the file, too
    assert (Path(f"schemes/Point-v0/{algo}-{scheme}/0/audit.npz").is_file()) == (scheme != "online")
    box, _ = oap.load_black_box(f"schemes/Point-v0/{algo}-{scheme}/0/model.pt",
                                oap.make_env("Point-v0"), 1, "cpu")  # a run's model is one, too
    assert box.value(torch.zeros(3, 2), torch.zeros(3, 1)).shape == (3,)

@pytest.mark.parametrize("argv, name, queries", [
    (["--timing=ft"], "oap-ft", "30"), (["--budget=inf"], "oap-inf", None),
    (["--no-ranknet"], "oap-no-ranknet", "30"),
    (["--expert=mine:prefer", "--tag=mine"], "oap-mine", "30"),
    (["--scheme=o2o", "--timing=interval"], "o2o-interval", "0")])
def test_variants(run, files, monkeypatch, argv, name, queries):
    monkeypatch.syspath_prepend(files)
    assert run(*argv, "--out=variants") == 0
    rows = rows_of(f"variants/Point-v0/td3bc-{name}/0")
    n = len(oap.load_dataset(files / "point.hdf5", oap.make_env("Point-v0"))[0]["reward"])
    assert rows[-1]["queries"] == (queries or str(2 * n))

@pytest.mark.parametrize("scheme", ("oap", "offline"))
@pytest.mark.parametrize("algo", oap.ALGORITHMS)
def test_neither_evaluations_nor_audits_feed_learning(run, algo, scheme):
    models = []
    for i, extra in enumerate(("--eval-every=10", "--eval-every=30", "--audit")):
        argv = f"--algo={algo} --scheme={scheme} --iql-dropout=0.1 --out=fed{i}".split()
        assert run(*argv, extra) == 0
        models.append(oap.load(f"fed{i}/Point-v0/{algo}-{scheme}/0/model.pt", "cpu")["actor"])
    assert all(torch.equal(models[0][key], model[key]) for model in models for key in model)

def test_only_schemes_of_one_phase_have_iql_s_decay():
    for scheme, t_max in (("offline", 1e5), ("online", 1e5), ("oap", math.inf), ("o2o", math.inf)):
        args = make_args("--algo=iql", f"--scheme={scheme}", "--steps=100000")
        assert oap.IQL(5, 3, args).t_max == t_max

def test_a_finished_run_is_left_alone_and_not_mistaken_for_another(run, files, capsys, tmp_path):
    (tmp_path / "copy.hdf5").write_bytes((files / "point.hdf5").read_bytes())
    assert run("--out=twice") == run("--out=twice", f"--dataset={tmp_path}/copy.hdf5") == 0
    assert "is finished" in capsys.readouterr().out
    assert "copy" not in Path("twice/Point-v0/td3bc-oap/0/config.json").read_text("utf-8")
    swapped = point_data()
    swapped["actions"][[0, 1]] = swapped["actions"][[1, 0]]  # the same sum
    write_hdf5(tmp_path / "swapped.hdf5", swapped)
    for argv, message in ((["--lr=1e-4"], "lr 0.0003, not 0.0001"),
                          ([f"--dataset={tmp_path}/swapped.hdf5"], "dataset_sha256"),
                          (["--expert=mine:prefer"], "expert_sha256")):
        assert run("--out=twice", *argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

def test_a_folder_is_trained_in_by_one_process(run, capsys):
    with oap.claim(folder := Path("locked/Point-v0/td3bc-oap/0"), {}):
        assert run("--out=locked") == 2 and "another process trains" in capsys.readouterr().err
    (folder / "config.json").write_text("{")
    assert run("--out=locked") == 2 and "rm -r" in capsys.readouterr().err

def forked(argv, kill_after=None):
    """The exit code of oap.main(argv) in a child process, killed some time after its checkpoint."""
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
            os._exit(oap.main(argv))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@pytest.mark.parametrize("algo", oap.ALGORITHMS)
@pytest.mark.parametrize("scheme", ["offline", "oap", "online"])
def test_a_killed_run_ends_like_an_uninterrupted_one(files, monkeypatch, scheme, algo):
    monkeypatch.chdir(files)
    argv = ("--env=Point-v0 --dataset=point.hdf5 --expert=point.pt --steps=400 --finetune-steps=50"
            " --interval=80 --budget=100 --eval-every=25 --eval-episodes=2 --ranknet-epochs=3"
            " --checkpoint-every=7 --device=cpu --random-steps=10"
            f" --scheme={scheme} --algo={algo} --out=").split()
    argv, out = argv[:-1], "--out=whole"
    started = time.monotonic()
    assert forked([*argv, out]) == 0
    lasted = time.monotonic() - started
    rng, kills = np.random.default_rng(len(scheme + algo)), 0
    whole, killed = (f"{out}/Point-v0/{algo}-{scheme}/0" for out in ("whole", "killed"))
    while not (done := Path(killed, "model.pt").exists()) and kills < 3:
        kills += forked([*argv, "--out=killed"], rng.uniform(0.1, 0.7) * lasted) == -signal.SIGKILL
    assert kills and (done or forked([*argv, "--out=killed"]) == 0)
    assert not list(Path(killed).glob("checkpoint*"))
    if scheme == "online":  # continues with a new episode
        assert int(rows_of(killed)[-1]["interactions"]) == 100
        return
    assert rows_of(whole) == rows_of(killed)
    models = [oap.load(f"{folder}/model.pt", "cpu") for folder in (whole, killed)]
    for part in ("actor", "critic"):
        assert all(torch.equal(x, models[1][part][k]) for k, x in models[0][part].items())

def test_a_damaged_checkpoint_is_one_line_and_kept(run, capsys, monkeypatch):
    save = oap.save
    monkeypatch.setattr(
        oap, "save", lambda path, x: save(path, x) if "model" not in path.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--out=damaged")  # a round's checkpoint: no other is due
    path = Path("damaged/Point-v0/td3bc-oap/0/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-100])
    size, _ = path.stat().st_size, capsys.readouterr()
    assert run("--out=damaged") == 2
    assert "checkpoint.pt can't be read" in capsys.readouterr().err and path.stat().st_size == size

def test_a_diverged_run_stops_with_one_line(run, capsys):
    assert run("--out=diverged", "--lr=1e12") == 2
    error = capsys.readouterr().err
    assert "diverged by update 20" in error and error.count("\n") == 1

def test_weights_and_biases_if_installed(run, monkeypatch):
    logged, fake = [], types.ModuleType("wandb")
    fake.init = lambda **_: types.SimpleNamespace(log=lambda row, step: logged.append(step))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run("--wandb", "--out=wandb") == 0 and logged == [20, 40, 60]

# --------------------------------------------------------------------------------------------- main

BAD = """--env=hopper-meduim-v2 / --env=Nothing-v0 / --env=nothing:Nothing-v0 / --env=Ant-v2
--env=Pendulum-v1 --dataset= / --expert=point.hdf5 / --expert=nothing:prefer / --expert=nowhere.pt
--expert=mine:nothing / --expert=sys:exit / --random-steps=0 / --budget=1 / --interval=41
--scheme=offline --timing=ft / --scheme=o2o --budget=inf / --scheme=online --audit / --tag=../x
--scheme=online --normalize / --eval-every=61 / --cuda-graph / --device=abacus / --device=meta
--device=cuda:77 / --out=point.hdf5 / --scheme=onlin / --wings=2 / --seed=-1 / --tag=no-ranknet
--steps=many / --scheme=offline --audit --expert=nan.pt / --env=:x / --env=./mine:Id"""

@pytest.mark.parametrize("argv", BAD.replace("\n", " / ").split(" / "))
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, argv):
    try:
        code = run("--tag=bad", *argv.split())
    except SystemExit as error:  # argparse's own
        code = error.code
    error = capsys.readouterr().err
    assert code == 2 and (error.startswith("oap.py: ") or "error: " in error)
    assert error.count("\n") == 1 and not list(Path().glob("**/*bad*"))

def test_a_user_s_own_exception_keeps_its_traceback(run, files):
    (files / "late.py").write_text("def prefer(s, a, b):\n    raise ConnectionError\n")
    with pytest.raises(ConnectionError):
        run("--expert=late:prefer", "--out=late")

def test_the_program_as_a_process(tmp_path, files):
    """The demo, --help where only ASCII prints, an environment of one's own, a closed pipe."""
    call = functools.partial(subprocess.run, capture_output=True, cwd=tmp_path, text=True)
    demo = call([sys.executable, HERE / "oap.py"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert demo.returncode == 0, demo.stderr
    offline, ours = map(float, re.findall(r"^score of \w+ +([\d.]+)$", demo.stdout, re.M))
    assert ours > offline + 5 and "Next: " in demo.stdout
    latin = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    assert call([sys.executable, HERE / "oap.py", "--help"], env=latin).returncode == 0
    (tmp_path / "mine.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "gymnasium.register('Mine-v0', PendulumEnv, max_episode_steps=9)\n")
    argv = [sys.executable, HERE / "oap.py", "--env=mine:Mine-v0", "--scheme=online", "--steps=40",
            "--budget=20", "--eval-every=1", "--out=mine"]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, error = process.communicate()
    assert process.returncode == 2 and error.count(b"\n") == 1 and b"Traceback" not in error
    assert call(argv).returncode == 0
    assert (tmp_path / "mine/mine-Mine-v0/td3bc-online/0/model.pt").exists()
