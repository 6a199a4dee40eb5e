"""Tests of experts/: python -m pytest -q experts. They need neither a network nor a GPU."""

import argparse
import copy
import io
import os
import signal
import subprocess
import sys
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

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
sys.path.insert(0, str(HERE))
import make_data  # noqa: E402
import train  # noqa: E402
from train import oap  # noqa: E402

TRAIN = "--env test_experts:Push-v0 --steps 600 --random-steps 300 --eval-every 100" \
    " --checkpoint-every 50 --batch-size 64 --out".split()

class Push(gym.Env):
    """A point on a line, pushed by actions in [-2, 3]; leaving [-2, 2] ends the episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 3.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.array([10 + self.x, self.x], np.float32), {}

    def step(self, action):
        self.x += 0.3 * float(action[0])
        state = np.array([10 + self.x, self.x], np.float32)
        return state, 1 - self.x**2, abs(self.x) > 2, False, {}

gym.register("Push-v0", Push, max_episode_steps=20)

def start(*argv) -> subprocess.Popen:
    """train.py, in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / "train.py", *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of train.py on Push that was killed, and started again."""
    out = tmp_path_factory.mktemp("trained")
    checkpoint = out / "test_experts-Push-v0/checkpoint.pt"
    process = start(*TRAIN, out)
    while not checkpoint.is_file() or torch.load(checkpoint)["step"] < 250:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(checkpoint)["step"]
    output, error = (process := start(*TRAIN, out)).communicate()
    assert process.returncode == 0 and f"continues after step {done}" in output, error
    return checkpoint.parent

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def test_the_density_of_sampled_actions(double):
    """log π(a) = log N(u) - Σ log(1 - tanh²u), also where tanh(u) is 1 in floating point."""
    torch.manual_seed(0)
    actor, state = train.Actor(3, 2), torch.randn(500, 3)
    action, log_prob = actor.sample(state)
    mean, log_std = actor.net(state).chunk(2, -1)
    z = (action.atanh() - mean) / log_std.exp()
    expected = -z**2 / 2 - log_std - np.log(2 * np.pi) / 2 - (1 - action**2).log()
    torch.testing.assert_close(log_prob, expected.sum(-1), rtol=0, atol=1e-8)
    torch.testing.assert_close(actor(state), mean.tanh())
    actor.net[-1].bias.data[:2] = 30
    assert actor.sample(state)[1].isfinite().all()

def test_ten_updates_equal_the_published_algorithm(double):
    """rlkit's SACTrainer, written plainly: all losses first, then all steps."""
    torch.manual_seed(1)
    agent = train.SAC(5, 3, argparse.Namespace(device="cpu", lr=3e-4, discount=0.99, polyak=0.005))
    actor, q1, q2 = nets = copy.deepcopy([agent.actor.net, agent.critic.q1, agent.critic.q2])
    q1_target, q2_target = copy.deepcopy([q1, q2])
    log_alpha = torch.zeros((), requires_grad=True)
    parameters = [*(list(net.parameters()) for net in nets), [log_alpha]]
    optimizers = [torch.optim.Adam(x, 3e-4) for x in parameters]

    def sample(state):
        mean, log_std = actor(state).chunk(2, -1)
        policy = torch.distributions.TransformedDistribution(
            torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp()),
            torch.distributions.TanhTransform(cache_size=1))
        action = policy.rsample()
        return action, policy.log_prob(action).sum(1, keepdim=True)

    for i in range(10):
        s, s2, a, r = (torch.randn(64, *shape) for shape in ((5,), (5,), (3,), ()))
        a, done = a.tanh(), (torch.rand(64) < 0.1).double()
        torch.manual_seed(i)
        agent.update(oap.Batch(s, a, r, s2, done, a))
        torch.manual_seed(i)
        with torch.no_grad():
            a2, log_pi2 = sample(s2)
            x2 = torch.cat([s2, a2], 1)
            value = torch.min(q1_target(x2), q2_target(x2)) - log_alpha.exp() * log_pi2
            y = r[:, None] + 0.99 * (1 - done[:, None]) * value
        pi, log_pi = sample(s)
        x, x_pi = torch.cat([s, a], 1), torch.cat([s, pi], 1)
        losses = [(log_alpha.exp().detach() * log_pi - torch.min(q1(x_pi), q2(x_pi))).mean(),
                  F.mse_loss(q1(x), y), F.mse_loss(q2(x), y),
                  -(log_alpha * (log_pi - 3).detach()).mean()]
        gradients = [torch.autograd.grad(loss, p, retain_graph=True)
                     for loss, p in zip(losses, parameters, strict=True)]
        for optimizer, p, g in zip(optimizers, parameters, gradients, strict=True):
            for weight, weight.grad in zip(p, g, strict=True):
                pass
            optimizer.step()
        for net, target in ((q1, q1_target), (q2, q2_target)):
            for p, t in zip(net.parameters(), target.parameters(), strict=True):
                t.data = 0.005 * p.data + 0.995 * t.data
    for ours, plain in ((agent.actor.net, actor), (agent.critic.q1, q1), (agent.critic.q2, q2),
                        (agent.critic_target.q2, q2_target)):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    assert agent.temperature["log"].item() == pytest.approx(log_alpha.item(), abs=1e-10)

def test_a_killed_run_goes_on_and_others_are_refused(trained):
    rows = (trained / "progress.csv").read_text("utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(100, 601, 100))]
    expert, saved = (oap.load(trained / f"{x}.pt", "cpu") for x in ("expert", "checkpoint"))
    best = max(saved["rows"], key=lambda row: row["return"])
    assert expert["step"] == best["step"] and len(saved["transitions"]) == saved["step"] == 600
    assert expert["return"] > 12  # of 20; a random policy's is about 3
    files = {path: path.read_bytes() for path in trained.iterdir()}
    for change, code in (("--seed=0", 0), ("--lr=0.1", 2), ("--steps=x", 2)):
        _, error = (process := start(*TRAIN, trained.parent, change)).communicate()
        assert (process.returncode, error.count("\n")) == (code, code // 2), error
    assert files == {path: path.read_bytes() for path in trained.iterdir()}

def make(out: Path, *argv) -> dict:
    """The arrays and the attributes of the file that make_data.py writes for Push."""
    make_data.make(make_data.parse_args(["--env=Push-v0", f"--out={out}", *argv]))
    with h5py.File(out) as file:
        return {key: file[key][()] for key in file} | dict(file.attrs)

@pytest.mark.parametrize("quality", make_data.QUALITIES)
def test_qualities(quality, trained, tmp_path):
    record = min(trained.glob("[0-9]*.pt"), key=lambda path: int(path.stem))
    data = make(tmp_path / "x.hdf5", f"--quality={quality}", "--size=500", f"--medium={record}",
                f"--expert={trained}/expert.pt", f"--replay={trained}/checkpoint.pt", "--rows=450")
    n = 450 if quality == "medium-replay" else 500
    assert [data[key].shape for key in make_data.KEYS] == [(n, 2), (n, 1), (n,), (n,), (n,)]
    assert [data[key].dtype for key in make_data.KEYS] == 3 * [np.float32] + 2 * [np.dtype(bool)]
    expert = oap.load(trained / "expert.pt", "cpu")["return"]
    assert data["ref_min_score"] < data["ref_max_score"] == expert
    x, action = data["observations"][:, 1], data["actions"][:, 0]  # the environment's own actions
    next_x, end = x + 0.3 * action, data["terminals"] | data["timeouts"]
    np.testing.assert_allclose(next_x[:-1][~end[:-1]], x[1:][~end[:-1]], atol=1e-4)
    np.testing.assert_array_equal(data["terminals"], abs(next_x) > 2)
    assert end[-1] and not (data["terminals"] & data["timeouts"]).any()
    assert quality != "random" or (action.min() < -1.9 and action.max() > 2.9)
    lengths = np.diff(np.flatnonzero(end), prepend=-1)
    early = [i for i, length in zip(np.flatnonzero(end), lengths, strict=True)
             if length != 20 and not data["terminals"][i]]  # where a part or a run was cut off
    allowed = {"medium-expert": {249, 499}, "medium-replay": set(range(200, 450))}
    assert max(lengths) <= 20 and set(early) <= allowed.get(quality, {499})

@pytest.mark.parametrize("argv, words", (
    ([], "--quality is missing"), (["--quality=medium-replay"], "needs --replay"),
    (["--quality=medium"], "no black box"), (["--minari=none-v0"], "--minari none-v0"),
    (["--quality=expert", f"--expert={HERE / 'hopper.pt'}"], "has no policy"),
    (["--quality=medium-replay", "--rows=901", "--replay={}/checkpoint.pt"], "600 transitions"),
))
def test_bad_input_of_make_data(argv, words, trained, tmp_path, capsys):
    argv = [word.format(trained) for word in argv]
    assert train.run(lambda: make(tmp_path / "x.hdf5", *argv)) == 2
    assert words in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not any(tmp_path.iterdir())

def test_minari(tmp_path, monkeypatch):
    """Of a stand-in for the package: an episode that ends by itself, and one that is cut off."""
    episodes = [types.SimpleNamespace(
        observations=np.random.rand(n + 1, 2), actions=np.random.rand(n, 1), rewards=np.ones(n),
        terminations=np.arange(n) == last) for n, last in ((4, 3), (20, -1))]
    storage = types.SimpleNamespace(metadata={"ref_min_score": 1, "ref_max_score": 9.0})
    dataset = types.SimpleNamespace(iterate_episodes=lambda: episodes, storage=storage)
    monkeypatch.setitem(sys.modules, "minari", types.SimpleNamespace(
        load_dataset=lambda name, download: dataset))
    data = make(tmp_path / "x.hdf5", "--minari=x-v0")
    assert data["timeouts"].nonzero()[0].tolist() == [4, 25]
    assert data["terminals"].nonzero()[0].tolist() == [3]
    assert (data["ref_min_score"], data["ref_max_score"]) == (1, 9)
    read, _ = oap.load_dataset(tmp_path / "x.hdf5", oap.make_env("Push-v0"))
    for key, columns in (("state", [e.observations[:-1] for e in episodes]),
                         ("action", [e.actions for e in episodes]),
                         ("next_state", [e.observations[1:] for e in episodes]),
                         ("done", [e.terminations for e in episodes])):
        np.testing.assert_allclose(read[key], np.concatenate(columns), rtol=1e-6)
    assert read["returns"].tolist() == [4, 20]

@pytest.mark.parametrize("path", sorted(HERE.glob("*.pt")), ids=lambda path: path.stem)
def test_shipped_black_boxes(path):
    """Each fits its task, can be asked, and has a policy that make_data.py can use."""
    env = oap.make_env(oap.load(path, "cpu")["env"])
    box, _ = oap.load_black_box(str(path), env, 0, "cpu")
    state = torch.as_tensor(np.stack([env.reset(seed=i)[0] for i in range(20)])).float()
    actor, saved = make_data.load_actor(str(path), env)
    value = box.value(state, actor(state).detach())
    assert value.isfinite().all() and value.std() > 0 and np.isfinite(saved["return"])
    assert saved["mean"].shape == saved["std"].shape == env.observation_space.shape
    assert path.stat().st_size < 1.1e6

def test_another_robot_s_black_box_is_refused():
    env = oap.make_env("halfcheetah-medium-v2")  # of as many numbers as walker2d
    for load in (lambda path: oap.load_black_box(path, env, 0, "cpu"),
                 lambda path: make_data.load_actor(path, env)):
        with pytest.raises(oap.BadInput, match=": .*walker2d$"):
            load(str(HERE / "walker2d.pt"))

@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not there")
@pytest.mark.parametrize("name, task, original", [
    ("sac-Hopper-v3.zip", "hopper-medium-v2", 2259), ("dapg-pen.npz", "pen-expert-v1", 3077)])
def test_published_experts_return_what_they_did_in_the_original_stack(name, task, original):
    """OAP_EPISODES=100 python -m pytest -q -s -k published_experts prints README's figures."""
    if name.endswith(".npz"):
        p, rng = dict(np.load(SHARED / "experts" / name)), np.random.default_rng(0)

        def policy(s):
            x = (s - p["in_shift"]) / (p["in_scale"] + 1e-8)
            for k in "01":
                x = np.tanh(x @ p[f"w{k}"].T + p[f"b{k}"])
            mean = (x @ p["w2"].T + p["b2"]) * p["out_scale"] + p["out_shift"]
            noise = np.exp(p["log_std"]) * rng.normal(size=mean.shape)
            return torch.tensor(mean + noise).clamp(-1, 1)
    else:
        with zipfile.ZipFile(SHARED / "experts" / name) as archive:
            w = torch.load(io.BytesIO(archive.read("policy.pth")), "cpu", weights_only=True)

        def policy(s):
            x = torch.as_tensor(s, dtype=torch.float32)
            for layer in ("latent_pi.0", "latent_pi.2", "mu"):
                x = F.linear(x if layer == "latent_pi.0" else x.relu(),
                             w[f"actor.{layer}.weight"], w[f"actor.{layer}.bias"])
            return x.tanh()

    episodes = int(os.environ.get("OAP_EPISODES", 10))
    envs = [oap.make_env(task) for _ in range(10)]
    returns = oap.evaluate(envs, policy, episodes, oap.env_seed(0))
    error = returns.std(ddof=1) / episodes**0.5
    print(f"\n{name}: {returns.mean():.0f} ± {error:.0f} in {episodes} episodes")
    assert abs(returns.mean() - original) < 3 * error + 0.02 * original
