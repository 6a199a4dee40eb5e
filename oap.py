"""OAP, "Boosting Offline RL with Action Preference Query" (Yang et al., ICML 2023), in one file.

    python oap.py                                          # a demo: no download, two minutes
    python oap.py --scheme oap --env pen-human-v1          # the method; it asks experts/pen.pt

OAP improves an offline policy without touching the environment. Every M_inter updates it asks a
black box (an expert's Q) which action is better in a state s of the dataset D: the recorded a, or
the policy's own π(s). It asks where the two differ most; a RankNet learns the answers and gives
them for the rest of D; from then on the policy constraint pulls towards the preferred action ã
instead of always towards a.

Where the paper is in this file:

    Table 1, Table 2      training schemes                SCHEMES
    Table 5               hyperparameters                 parse_args, PER_DOMAIN
    Algorithm 1           the loop; the body of its "if"  train; OAP.round
    Eq. 2                 asking the black box            BlackBox.__call__
    l_i, Table 5          which samples to ask about      divergence, select_queries
    Eq. 3, Eq. 4          RankNet's loss; pseudo queries  ranknet_loss, pseudo_query
    Eq. 5, Eq. 6          the adjusted policy constraint  td3bc_actor_loss, iql_actor_loss
    Eq. 7, Figure 6       how much better ã is than a     OAP.audit; --audit
    Table 3, Figures 5, 7 variants                        --budget, --no-ranknet, --expert, --timing

What the paper leaves open, and what is done here:

 1. l_i is summed over the action's dimensions, each in [-1, 1]. π(s) is the deterministic policy;
    for IQL, the Gaussian's mean. Q* is the smaller of the black box's two.
 2. Samples never asked come first. If a round needs more (pen-human has under 5,000 in all), the
    most divergent others are asked again, about the new π(s). None is asked twice in one round.
 3. A tie keeps the data's action, in Eq. 2 and in Eq. 4.
 4. ã does not move between rounds: where π(s) was preferred, ã stays that action, whatever π does.
    Asked samples keep the black box's answer. RankNet answers anew, in each round, for the others.
 5. RankNet keeps its weights between rounds, each with 100 epochs over all of D_q (Table 5), always
    in batches of 256 normalised states, the common learning rate, own dropout masks for a and π(s).
    It is not trained where all of D has been asked, as nothing is left for it to answer.
 6. Eq. 6 is not printed for IQL: ã replaces a in the advantage-weighted regression, both in the
    weight exp(β(Q(s, ã) - V(s))) and in the likelihood. V and Q learn from the data's action.
 7. Table 5's λ is TD3+BC's α; Eq. 6's λ is α / mean|Q|. (π(s) - ã)² is a mean over dimensions.
 8. A round asks K M_inter / N_train samples (`--timing ft`: K). None comes after update N_train.
 9. IQL's actor has its authors' cosine decay of the learning rate in `offline`, `online` and
    `online-mix` alone: with it, OAP's last rounds would hardly change the policy. All layers are
    initialised as PyTorch does it; IQL's authors take orthogonal matrices.
10. Interactions are spread evenly over their phase, in `online` after 1,000 random ones, with noise
    (TD3+BC) or sampled (IQL). Batches are uniform. The constraint stays: own samples have ã = a.
11. With D, TD3+BC normalises states; IQL clips D's actions to 1 - 1e-5 and, except on AntMaze and
    Adroit, scales rewards by 1000 / (best - worst return). AntMaze's rewards are lowered by 1 for
    both, as IQL's authors do. Evaluations: 10 episodes (AntMaze: 10 goals) every 5,000 updates.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import sys
import tempfile
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"  # of D4RL's files
REFERENCES = "ref_min_score", "ref_max_score"  # the returns that score 0 and 100

# ---------------------------------------------------------------------------- schemes and arguments

class Scheme(NamedTuple):
    data: bool  # does it learn from the dataset D?
    acts: bool  # does it act in the environment? Then K is a number of interactions
    asks: bool  # does it ask the black box? Then K is a number of queries
    timing: str  # when K is spent: "interval", during the first phase; "ft", after it
    finetune: bool  # is there a second phase, of --finetune-steps updates?

SCHEMES = {
    "offline":    Scheme(data=True,  acts=False, asks=False, timing="interval", finetune=False),
    "online":     Scheme(data=False, acts=True,  asks=False, timing="interval", finetune=False),
    "online-mix": Scheme(data=True,  acts=True,  asks=False, timing="interval", finetune=False),
    "o2o":        Scheme(data=True,  acts=True,  asks=False, timing="ft",       finetune=True),
    "oap":        Scheme(data=True,  acts=False, asks=True,  timing="interval", finetune=True),
}
PER_DOMAIN = {  # Table 5; reward_shift is choice 11's
    "td3bc_alpha":   {"gym": 2.5, "antmaze": 2.5, "adroit": 0.1},
    "iql_beta":      {"gym": 3.0, "antmaze": 10., "adroit": 0.5},
    "iql_expectile": {"gym": 0.7, "antmaze": 0.9, "adroit": 0.7},
    "iql_dropout":   {"gym": 0.0, "antmaze": 0.0, "adroit": 0.1},
    "reward_shift":  {"gym": 0.0, "antmaze": -1., "adroit": 0.0},
}

def number(low: float, kind: type = float, high: float = 1e15) -> Callable[[str], float]:
    """An argparse type: a number in [low, high]. A whole one may be written as 1e6."""
    def number(text: str) -> float:  # argparse's errors show this name
        if not low <= float(text) <= high or kind(float(text)) != float(text):
            raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} of {low:g} to {high:g}")
        return kind(float(text))
    return number

def query_rounds(args: argparse.Namespace) -> dict[int, float]:
    """{the update after which a round comes: how many samples it asks about} (choice 8)."""
    every = args.steps if args.timing == "ft" else args.interval
    return dict.fromkeys(range(every, args.steps + 1, every), args.budget * every / args.steps)

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with every default in its place. Raises BadInput or exits as argparse does."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False,  # without usage, an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch, unset = parser.add_argument, argparse.BooleanOptionalAction, argparse.SUPPRESS
    count, whole, least0, share = number(1, int, 1e9), number(0, int), number(0), number(0, high=1)
    add("--scheme", choices=SCHEMES, default="oap", help="Table 1's training schemes")
    add("--env", default="pen-human-v1", help="D4RL task, or a Gymnasium id with --dataset")
    add("--algo", choices=ALGORITHMS, default="td3bc", help="offline RL algorithm")
    add("--seed", type=whole, default=0, help="of all random numbers")
    add("--dataset", default="", help="hdf5 file in D4RL's format instead of the task's own")
    add("--expert", default=unset, help="black box (README); default: experts/ROBOT.pt")
    add("--out", default="runs", help="folder of all runs")
    add("--tag", default="", help="appended to the name of the run's folder")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="TF32")
    add("--cuda-graph", action=switch, default=unset, help="replay updates; default: on a GPU")
    add("--checkpoint-every", type=count, default=20_000, help="updates between checkpoints")
    add("--wandb", action=switch, default=False, help="log to Weights & Biases too")
    add("--steps", type=count, default=1_000_000, help="updates of the first phase, N_train")
    add("--finetune-steps", type=count, default=100_000, help="updates of the second phase")
    add("--budget", type=number(1, high=math.inf), default=1e5, help="queries or interactions, K")
    add("--interval", type=count, default=100_000, help="updates between rounds, M_inter")
    add("--timing", choices=("interval", "ft"), default=unset, help="Figure 7; default: scheme's")
    add("--ranknet", action=switch, default=True, help="--no-ranknet: Table 3's OAP(w/ RN)")
    add("--ranknet-epochs", type=count, default=100, help="over D_q, in each round")
    add("--audit", action=switch, default=False, help="measure RankNet, Eq. 7 and Figure 6")
    add("--eval-every", type=count, default=5_000, help="updates between evaluations")
    add("--eval-episodes", type=count, default=10, help="per evaluation")
    add("--normalize", action=switch, default=unset, help="states; default: td3bc with D")
    add("--reward-scale", action=switch, default=unset, help="choice 11; default: iql with D")
    add("--reward-shift", type=number(-1e15), default=unset, help="default: 0; AntMaze -1")
    add("--batch-size", type=count, default=256, help="samples per update")
    add("--lr", type=least0, default=3e-4, help="Adam's learning rate, of every network")
    add("--discount", type=share, default=0.99, help="gamma")
    add("--polyak", type=share, default=0.005, help="update rate of target networks")
    add("--random-steps", type=count, default=1_000, help="before the first update, without D")
    add("--td3bc-alpha", type=least0, default=unset, help="lambda; default: 2.5; Adroit 0.1")
    add("--policy-noise", type=least0, default=0.2, help="of the target policy")
    add("--noise-clip", type=least0, default=0.5, help="bound of --policy-noise")
    add("--policy-delay", type=count, default=2, help="critic updates per update of the actor")
    add("--exploration-noise", type=least0, default=0.1, help="when interacting")
    add("--iql-beta", type=least0, default=unset, help="default: 3; AntMaze 10; Adroit 0.5")
    add("--iql-expectile", type=share, default=unset, help="default: 0.7; AntMaze 0.9")
    add("--iql-dropout", type=number(0, high=0.99), default=unset, help="default: 0; Adroit 0.1")
    args = parser.parse_args(argv)

    scheme, robot = SCHEMES[args.scheme], find_robot(args.env)
    defaults = {name: default[robot.domain] for name, default in PER_DOMAIN.items()} | {
        "timing": scheme.timing, "normalize": scheme.data and args.algo == "td3bc",
        "reward_scale": scheme.data and args.algo == "iql" and robot.domain == "gym",
        "cuda_graph": "cuda" in args.device, "expert": str(HERE / f"experts/{robot.name}.pt")}
    args = argparse.Namespace(**(defaults | vars(args)))
    check(not scheme.data or args.dataset or robot in ROBOTS,
          f"--env {args.env} is no task of the paper's robots: it needs --dataset FILE")
    check(args.timing != "ft" or scheme.finetune, f"--timing ft: {args.scheme} has one phase")
    check(not scheme.acts or args.budget % 1 == 0, "--budget is no whole number")
    check(not scheme.asks or max(query_rounds(args).values(), default=0) >= 1,
          "nothing would be asked: --interval is longer than --steps, or --budget is too small")
    check(scheme.data or not (args.normalize or args.reward_scale or args.audit),
          f"--normalize, --reward-scale and --audit need D, and {args.scheme} has none")
    args.finetune_steps = args.finetune_steps if scheme.finetune else 0
    check(args.eval_every <= args.steps + args.finetune_steps,
          "--eval-every is longer than the run: nothing would be measured")
    check(re.fullmatch(r"(?!(ft|interval|inf|no-ranknet|mix)(-|$))[\w.-]*", args.tag),
          "--tag: letters, digits, '.', '_' and '-' alone, and no variant's name")
    check(not args.cuda_graph or "cuda" in args.device, "--cuda-graph needs a GPU")
    with blame(f"--device {args.device}"):
        check(args.device.startswith(("cpu", "cuda")), "neither cpu nor cuda")
        args.device = str(torch.zeros(1, device=args.device).device)  # cuda: cuda:0
    return args

# ----------------------------------------------------------------------------------- OAP, section 3

def divergence(action: Tensor, policy_action: Tensor) -> Tensor:
    """The ranking criterion l_i = (π(s_i) - a_i)²: (N, A), (N, A) -> (N,)."""
    return ((policy_action - action) ** 2).sum(-1)

def select_queries(ranking: Tensor, asked: Tensor, count: int) -> Tensor:
    """Indices (count,) of samples, never asked first (Table 5), then the most divergent."""
    order = ranking.argsort(descending=True, stable=True)  # (N,)
    return torch.cat([order[~asked[order]], order[asked[order]]])[:count]

class RankNet(nn.Module):
    """The ranking function f_r(s, a): "3 MLP layers", with Table 5's widths and dropout."""
    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(state_dim + action_dim, 512, 256, 1, dropout=0.5)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([state, action], -1)).squeeze(-1)  # (B,)

def ranknet_loss(ranknet: nn.Module, state: Tensor, action: Tensor, policy_action: Tensor,
                 prefers_data: Tensor) -> Tensor:
    """Eq. 3: the cross entropy of P = sigmoid(f(s, a) - f(s, π(s))) to P̄ = prefers_data (B,)."""
    o = ranknet(state, action) - ranknet(state, policy_action)  # (B,)
    return F.binary_cross_entropy_with_logits(o, prefers_data.to(o.dtype))

def pseudo_query(ranknet: nn.Module, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
    """Eq. 4: does RankNet find `action` at least as good as `other`? (N,) bools."""
    return in_chunks(lambda s, a, b: ranknet(s, a) >= ranknet(s, b), state, action, other)

class OAP(nn.Module):
    """Algorithm 1's state for a dataset D of N samples: ã, the query dataset D_q, and RankNet.

    An offline algorithm becomes OAP if its policy constraint uses `preferred` (N, A) and `round` is
    called every M_inter updates. Policy and black box take `state` (N, O); RankNet takes normalised
    states, f(state, action) -> (B,), or is None. To resume, save the optimizers and `spent`, too.
    """
    def __init__(self, state: Tensor, action: Tensor, black_box: "BlackBox",
                 ranknet: nn.Module | None, epochs: int = 100, lr: float = 3e-4):
        super().__init__()
        self.state, self.action, self.black_box, self.ranknet = state, action, black_box, ranknet
        mean, std = moments(state)
        self.normalized = (state - mean) / std  # (N, O), what RankNet sees
        self.epochs, self.optimizers = epochs, [] if ranknet is None else [adam(ranknet, lr)]
        # D_q = {(s_k, a_k, π^k(s_k), ã_k)}: the asked rows, each with its last answer (choice 2).
        self.register_buffer("asked", torch.zeros_like(action[:, 0], dtype=torch.bool))  # (N,)
        self.register_buffer("policy_action", torch.zeros_like(action))  # (N, A): π(s), as judged
        self.register_buffer("prefers_data", torch.ones_like(self.asked))  # (N,): and the answer
        self.register_buffer("preferred", action.clone())  # (N, A): ã_i = a_i

    def round(self, policy: Callable[[Tensor], Tensor], count: int) -> dict[str, float]:
        """The body of Algorithm 1's "if": asks about `count` samples, changes `preferred` in place,
        and returns a log. Raises BadInput if actions are not in [-1, 1]."""
        pi = in_chunks(policy, self.state)  # (N, A)
        check(all((x.abs() <= 1).all() for x in (self.action, pi)), "actions not in [-1, 1]")
        ranking = divergence(self.action, pi)  # (N,)
        k = select_queries(ranking, self.asked, count)  # (count,)
        self.prefers_data[k] = self.black_box(self.state[k], self.action[k], pi[k])  # Eq. 2
        self.asked[k], self.policy_action[k] = True, pi[k]
        log = {"divergence": ranking.mean().item(),
               "prefers_policy": 1 - self.prefers_data[k].float().mean().item()}
        rest = ~self.asked
        if self.ranknet is not None and self.asked.any() and rest.any():
            log["ranknet_loss"] = self.train_ranknet()  # Eq. 3
            self.prefers_data[rest] = pseudo_query(  # Eq. 4
                self.ranknet, self.normalized[rest], self.action[rest], pi[rest])
            self.policy_action[rest] = pi[rest]
        torch.where(self.prefers_data[:, None], self.action, self.policy_action, out=self.preferred)
        return log

    def train_ranknet(self) -> float:
        """Descends Eq. 3 for `epochs` over D_q. Returns the mean loss of the last one, in nats."""
        queries = [x[self.asked] for x in (
            self.normalized, self.action, self.policy_action, self.prefers_data)]
        self.ranknet.train()  # with dropout
        for _ in range(self.epochs):
            order = torch.randperm(len(queries[0]), device=self.asked.device)
            losses = [
                descend(self.optimizers[0], ranknet_loss(self.ranknet, *(x[i] for x in queries)))
                for i in order.split(256)]  # choice 5
        self.ranknet.eval()
        return torch.stack(losses).mean().item()

    def audit(self) -> dict[str, float]:
        """How good the answers are: asks without counting, so that no learner may see this."""
        q = self.black_box.value
        gain = q(self.state, self.preferred) - q(self.state, self.action)  # (N,)
        log = {"improvement": gain.mean().item(),  # Eq. 7
               "asked_gain": gain[self.asked].mean().item()}
        rest = (~self.asked).nonzero().squeeze(1)
        if self.ranknet is not None and len(rest):
            i = rest[:: math.ceil(len(rest) / 10_000)]  # evenly, at most 10,000
            truth = self.black_box.answer(self.state[i], self.action[i], self.policy_action[i])
            log |= {"ranknet_accuracy": (self.prefers_data[i] == truth).float().mean().item(),
                    "unasked_prefer_policy": 1 - truth.float().mean().item()}
        return log

# ----------------------------------------------------------------------------------------- networks

def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these sizes, with ReLU and, if asked for, dropout between them."""
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers[: -2 if dropout else -1])

class Critic(nn.Module):
    """Twin Q(s, a)."""
    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.q1 = mlp(state_dim + action_dim, 256, 256, 1)
        self.q2 = mlp(state_dim + action_dim, 256, 256, 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([state, action], -1)
        return torch.cat([self.q1(x), self.q2(x)], -1)  # (B, 2)

class Actor(nn.Module):
    """TD3's deterministic policy π(s)."""
    def __init__(self, state_dim: int, action_dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = mlp(state_dim, 256, 256, action_dim, dropout=dropout)

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state).tanh()  # (B, A)

class GaussianActor(Actor):
    """IQL's π(a|s): a Gaussian around π(s), whose standard deviation does not depend on s."""
    def __init__(self, state_dim: int, action_dim: int, dropout: float = 0.0):
        super().__init__(state_dim, action_dim, dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def distribution(self, state: Tensor) -> torch.distributions.Normal:
        std = self.log_std.clamp(-5, 2).exp()  # (A,)
        return torch.distributions.Normal(self(state), std, validate_args=False)

def adam(net: nn.Module, lr: float) -> torch.optim.Adam:
    lr = next(net.parameters()).new_tensor(lr)  # a CUDA graph would not see a number change
    return torch.optim.Adam(net.parameters(), lr, fused=True, capturable=lr.is_cuda)

def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """A step of the optimizer's parameters; other networks in the loss get no gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()
    return loss.detach()

@torch.no_grad()
def polyak_update(target: nn.Module, net: nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate net."""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), rate)

@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors) without gradients, piece by piece: all of D at once would be slow."""
    size, whole = 1024, None  # allocated once: many small pieces would take far more memory
    for start in range(0, max(1, len(tensors[0])), size):
        piece = function(*(t[start : start + size] for t in tensors))
        whole = piece.new_empty(len(tensors[0]), *piece.shape[1:]) if whole is None else whole
        whole[start : start + size] = piece
    return whole

def moments(state: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation + 1e-3, (O,), of states (N, O): TD3+BC's normalisation."""
    wide = state.double()  # in float32, the sums of millions of large numbers would be wrong
    return wide.mean(0).to(state.dtype), wide.std(0, correction=0).to(state.dtype) + 1e-3

# ----------------------------------------------------------------------------------- TD3+BC and IQL

class Batch(NamedTuple):
    state: Tensor  # (B, O), in the networks' units
    action: Tensor  # (B, A), in [-1, 1] like every action that a network sees
    reward: Tensor  # (B,)
    next_state: Tensor  # (B, O)
    done: Tensor  # (B,): 1 if next_state is terminal; 0 otherwise, also at a timeout
    preferred: Tensor  # (B, A): ã, towards which the policy constraint pulls; without OAP, a itself

def bellman_loss(q: Tensor, target: Tensor) -> Tensor:
    """The squared errors of both Q (B, 2) to a target (B,)."""
    return (q - target[:, None]).square().mean(0).sum()

def td3bc_actor_loss(pi: Tensor, q: Tensor, preferred: Tensor, alpha: float) -> Tensor:
    """Eq. 6 as a loss, -λ Q(s, π(s)) + (π(s) - ã)², with λ = α / mean|Q|. Eq. 5 has ã = a."""
    return -alpha / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, preferred)

class TD3BC(nn.Module):
    """TD3+BC (Fujimoto & Gu 2021)."""
    def __init__(self, state_dim: int, action_dim: int, args: argparse.Namespace):
        super().__init__()
        self.args, self.actor = args, Actor(state_dim, action_dim)
        self.critic = Critic(state_dim, action_dim)
        self.actor_target, self.critic_target = map(copy.deepcopy, (self.actor, self.critic))
        self.to(args.device)
        self.optimizers = [adam(self.actor, args.lr), adam(self.critic, args.lr)]

    def explore(self, state: Tensor) -> Tensor:
        return torch.normal(self.actor(state), self.args.exploration_noise).clamp(-1, 1)  # (B, A)

    def update(self, batch: Batch, update_actor: bool) -> dict[str, Tensor]:
        """Updates the critic and, if `update_actor`, the actor and the target networks."""
        s, a, r, s2, done, preferred = batch
        args, (actor_opt, critic_opt) = self.args, self.optimizers
        with torch.no_grad():
            noise = args.policy_noise * torch.randn_like(a)
            a2 = self.actor_target(s2) + noise.clamp(-args.noise_clip, args.noise_clip)
            next_q = self.critic_target(s2, a2.clamp(-1, 1)).amin(-1)  # (B,)
            target = r + args.discount * (1 - done) * next_q
        losses = {"critic_loss": descend(critic_opt, bellman_loss(self.critic(s, a), target))}
        if update_actor:
            pi = self.actor(s)
            q = self.critic.q1(torch.cat([s, pi], -1))
            actor_loss = td3bc_actor_loss(pi, q, preferred, args.td3bc_alpha)
            losses["actor_loss"] = descend(actor_opt, actor_loss)
            polyak_update(self.critic_target, self.critic, args.polyak)
            polyak_update(self.actor_target, self.actor, args.polyak)
        return losses

def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """IQL's Eq. 5: makes V(s) an upper expectile of Q(s, a), for error = Q - V (B,)."""
    return ((expectile - (error < 0).to(error.dtype)).abs() * error**2).mean()

def iql_actor_loss(log_prob: Tensor, advantage: Tensor, beta: float) -> Tensor:
    """Eq. 6 for IQL (choice 6): its authors' Eq. 7, of log π(ã|s) and A = Q(s, ã) - V(s), (B,)."""
    return -((beta * advantage).exp().clamp(max=100) * log_prob).mean()

class IQL(nn.Module):
    """Implicit Q-learning (Kostrikov et al. 2022), in its authors' order: V, policy, Q."""
    def __init__(self, state_dim: int, action_dim: int, args: argparse.Namespace):
        super().__init__()
        self.t_max = math.inf if args.finetune_steps else args.steps  # choice 9; inf: no decay
        self.args, self.actor = args, GaussianActor(state_dim, action_dim, args.iql_dropout)
        self.critic, self.value = Critic(state_dim, action_dim), mlp(state_dim, 256, 256, 1)
        self.critic_target = copy.deepcopy(self.critic)
        self.register_buffer("t", torch.zeros(()))  # updates so far
        self.to(args.device).eval()
        self.optimizers = [adam(net, args.lr) for net in (self.actor, self.critic, self.value)]

    def explore(self, state: Tensor) -> Tensor:
        return self.actor.distribution(state).sample().clamp(-1, 1)  # (B, A)

    def update(self, batch: Batch, update_actor: bool) -> dict[str, Tensor]:
        """Updates everything; `update_actor` is TD3's alone."""
        s, a, r, s2, done, preferred = batch
        args, (actor_opt, critic_opt, value_opt) = self.args, self.optimizers
        with torch.no_grad():
            q = self.critic_target(s, a).amin(-1)  # (B,)
            q_preferred = q if preferred is a else self.critic_target(s, preferred).amin(-1)
        value_loss = expectile_loss(q - self.value(s).squeeze(-1), args.iql_expectile)
        value_loss = descend(value_opt, value_loss)
        with torch.no_grad():
            advantage = q_preferred - self.value(s).squeeze(-1)
            target = r + args.discount * (1 - done) * self.value(s2).squeeze(-1)
        decay = (1 + torch.cos(self.t * (math.pi / self.t_max))) / 2
        actor_opt.param_groups[0]["lr"].copy_(args.lr * decay)
        log_prob = self.actor.train().distribution(s).log_prob(preferred).sum(-1)  # with dropout
        self.actor.eval()
        actor_loss = descend(actor_opt, iql_actor_loss(log_prob, advantage, args.iql_beta))
        critic_loss = descend(critic_opt, bellman_loss(self.critic(s, a), target))
        polyak_update(self.critic_target, self.critic, args.polyak)
        self.t += 1
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "value_loss": value_loss}

ALGORITHMS = {"td3bc": TD3BC, "iql": IQL}

# -------------------------------------------------------------------------- files and black boxes

class BadInput(ValueError):
    """A mistake that the user can correct: `main` prints it as one line and returns 2."""

def check(condition: bool, problem: str) -> None:
    if not condition:
        raise BadInput(problem)

@contextlib.contextmanager
def blame(what: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception):
    """Turns these errors into BadInput: "what: the error's first line"."""
    try:
        yield
    except errors as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{what}: {first_line}") from error

def write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and then renames it: none is ever half written."""
    part = path.with_name(f"{path.name}.part")
    with blame(f"{path} can't be written", OSError):
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

def save(path: Path, state: dict) -> None:
    torch.save(state, buffer := io.BytesIO())
    write(path, buffer.getvalue())

def write_csv(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    write(path, "".join(",".join(map(str, line)) + "\n" for line in table).encode())

def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def load(path: str | Path, device: str) -> dict:
    """What `save` wrote, or "critic" and "sb3" of a Stable-Baselines3 zip. No code is ever run."""
    with blame(f"{path} can't be read as weights"), zipfile.ZipFile(path) as archive:  # torch's too
        check(not archive.testzip(), "it is damaged")
        if "policy.pth" not in archive.namelist():
            return torch.load(path, device, weights_only=True)
        nets = torch.load(io.BytesIO(archive.read("policy.pth")), device, weights_only=True)
        critic = {k.removeprefix("critic."): x for k, x in nets.items() if k.startswith("critic.")}
        return {"critic": critic, "sb3": json.loads(archive.read("data"))}

class BlackBox:
    """The expert that OAP asks, at most `budget` times: is a at least as good as b in state s?

    It is made from q(s, a) -> (B,), of tensors, or from prefer(s, a, b) -> (B,) bools, of NumPy
    arrays. Both get the environment's own states, and actions in [-1, 1].
    """
    def __init__(self, budget: float, q: Callable | None = None, prefer: Callable | None = None):
        self.budget, self.q, self.prefer, self.spent = budget, q, prefer, 0

    def __call__(self, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
        """Eq. 2: (B,) bools, is `action` at least as good as `other`? Counts B queries."""
        if self.spent + len(state) > self.budget:
            raise RuntimeError(f"{self.spent:,} + {len(state):,} queries are over {self.budget:,}")
        self.spent += len(state)
        return self.answer(state, action, other)

    def answer(self, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
        """The same without counting: for audits, never for what learns."""
        if self.q is not None:
            return self.value(state, action) >= self.value(state, other)
        copies = [np.array(x.numpy(force=True)) for x in (state, action, other)]
        answer = np.asarray(self.prefer(*copies))
        check(answer.shape == (len(state),) and np.isin(answer, (0, 1)).all(),
              f"black box: its answer to {len(state)} rows must be as many bools")
        return torch.as_tensor(answer.astype(bool), device=state.device)

    def value(self, state: Tensor, action: Tensor) -> Tensor:
        """Q*(s, a) (B,), or NaN if the black box only compares."""
        if self.q is None:
            return torch.full_like(state[:, 0], math.nan)
        value = in_chunks(self.q, state, action)
        check(value.shape == (len(state),) and value.isfinite().all(),
              f"black box: Q(s, a) of {len(state)} rows must be as many finite numbers")
        return value

def load_black_box(spec: str, env: "Env", budget: float, device: str) -> tuple[BlackBox, dict]:
    """A black box, and what config.json says of it. Raises BadInput if it does not fit.

    `spec` is a model.pt of this program's, a Stable-Baselines3 SAC or TD3 zip, or "module:function"
    of a function(states, a, b) -> (B,) bools, which gets the environment's own actions.
    """
    module, colon, name = spec.rpartition(":")
    if colon and all(part.isidentifier() for part in module.split(".")):
        with blame(f"black box {spec}", ModuleNotFoundError):
            found, raw = importlib.import_module(module), env.raw_action
        function, file = getattr(found, name, None), getattr(found, "__file__", None)
        check(callable(function) and file, f"black box {spec}: there is no such function")
        box = BlackBox(budget, prefer=lambda s, a, b: function(s, raw(a), raw(b)))
        return box, {"expert_sha256": f"{sha256(file)} {name}"}
    check(os.path.isfile(spec), f"no black box {spec}: --expert names one; see experts/README.md")
    saved, networks, width = load(spec, device), {}, sum(env.dims)
    with blame(f"black box {spec}"):
        sb3 = saved.get("sb3", {})
        for key, x in saved.get("critic", {}).items():  # weights and biases of each Q, in order
            networks.setdefault(key.partition(".")[0], []).append(x)
        seen, original = (str(sb3.get(k)) for k in ("_last_obs", "_last_original_obs"))
        activation = (sb3.get("policy_kwargs") or {}).get("activation_fn", ".ReLU'>")
        check(networks and all(x.startswith("q") for x in networks), "it has no plain Q(s, a)")
        # VecNormalize turns float64 states into float32, so that the two differ in length.
        check("None" in (seen, original) or len(seen) == len(original),
              "it was trained with VecNormalize, which its zip lacks")
        check(activation.endswith(".ReLU'>"), f"{activation} is not ReLU")
        other = find_robot(str(saved.get("env")))
        check(other == env.robot or other not in ROBOTS or env.robot not in ROBOTS,
              f"it is for {other.name}")
        for first, *_, last in networks.values():
            check(first.shape[1] == width, f"Q takes {first.shape[1]} numbers, (s, a) has {width}")
            check(len(last) == 1, "it has quantiles instead of Q(s, a), as a TQC")
        critics = [mlp(width, *map(len, x[1::2])).to(device) for x in networks.values()]
        for critic, layers in zip(critics, networks.values(), strict=True):
            critic.load_state_dict(dict(zip(critic.state_dict(), layers, strict=True)))
        mean = torch.as_tensor(saved.get("mean", 0), device=device).expand(env.dims[0])
        std = torch.as_tensor(saved.get("std", 1), device=device).expand(env.dims[0])
        expert_return = float(saved["return"]) if "return" in saved else None
    def q(state: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([(state - mean) / std, action], -1)
        return torch.cat([critic(x) for critic in critics], -1).amin(-1)
    return BlackBox(budget, q), {"expert_sha256": sha256(spec), "expert_return": expert_return}

# ------------------------------------------------------------------------------------- environments

class Robot(NamedTuple):
    name: str
    domain: str
    gym_id: str
    horizon: int | None = None  # D4RL's
    maze: str = ""  # rows of cells: 1 wall, 0 free, r start, g goal

ROBOTS = [
    Robot("hopper", "gym", "Hopper-v4", 1000),  # -v5 changed the rewards
    Robot("walker2d", "gym", "Walker2d-v4", 1000),
    Robot("halfcheetah", "gym", "HalfCheetah-v4", 1000),
    Robot("antmaze-umaze", "antmaze", "Ant-v5", 700, "11111/1r001/11101/1g001/11111"),
    Robot("antmaze-medium", "antmaze", "Ant-v5", 1000,
          "11111111/1r011001/10010001/11000111/10010001/10100101/100010g1/11111111"),
    Robot("antmaze-large", "antmaze", "Ant-v5", 1000, "111111111111/1r0001000001/101101010101"
          "/100000010001/101111011101/100101000001/110101010111/100100010g01/111111111111"),
    Robot("pen", "adroit", "AdroitHandPen-v1", 100),
]

def find_robot(env: str) -> Robot:
    """Of a D4RL task, pen-human-v1, or of any Gymnasium id, Pendulum-v1, which is left as it is."""
    return next((r for r in ROBOTS if env.startswith(r.name + "-")), Robot(env, "gym", env))

def restore_capsules(model: mujoco.MjModel, xml_path: str) -> None:
    """Gives a model, compiled from `xml_path`, the inertias that it had under MuJoCo 2.1.0.

    There, a capsule of radius r and cylinder length h weighed and turned like a solid cylinder of
    length h + r. So the file is compiled again, with such cylinders instead of its capsules.
    """
    root = ElementTree.parse(xml_path).getroot()
    for geom in root.iterfind(".//geom[@type='capsule']"):
        geom.set("type", "cylinder")
        radius, *half_length = map(float, geom.get("size").split())
        if half_length:
            geom.set("size", f"{radius!r} {half_length[0] + radius / 2!r}")
        else:
            start, end = np.array(geom.get("fromto").split(), float).reshape(2, 3)
            tip = (end - start) / np.linalg.norm(end - start) * radius / 2
            geom.set("fromto", " ".join(map(repr, np.r_[start - tip, end + tip].tolist())))
    old = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(old, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))

def maze_cells(maze: str, kind: str) -> np.ndarray:
    """Centres (n, 2) of one kind of cells, in metres from the start. A cell is 4 m wide."""
    grid = np.array([list(row) for row in maze.split("/")])
    return 4.0 * (np.argwhere(grid == kind) - np.argwhere(grid == "r"))[:, ::-1]

def write_ant_maze(maze: str, path: str) -> None:
    """D4RL's ant in a maze. Gymnasium's ant differs from it in the three values set here."""
    root = ElementTree.parse(Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml").getroot()
    root.find("option").set("timestep", "0.02")
    root.find("default/geom").set("solimp", ".8 .8 .01")
    for motor in root.iter("motor"):
        motor.set("gear", "30")  # D4RL: gear 1, and controls of +-30
    for x, y in maze_cells(maze, "1"):
        block = {"type": "box", "size": "2 2 1", "pos": f"{x} {y} 1", "conaffinity": "1"}
        ElementTree.SubElement(root.find("worldbody"), "geom", block)
    ElementTree.ElementTree(root).write(path)

class Env(gym.Wrapper):
    """What this program sees of an environment: actions in [-1, 1]; states and rewards that are
    finite floats, and copies; and D4RL's starts, goals, rewards and ends where they differ."""
    def __init__(self, env: gym.Env, robot: Robot):
        super().__init__(env)
        low, high = env.action_space.low.astype(float), env.action_space.high.astype(float)
        self.robot, self.middle, self.half = robot, (high + low) / 2, (high - low) / 2
        self.action_space = gym.spaces.Box(-1.0, 1.0, low.shape)
        self.dims = env.observation_space.shape[0], len(low)  # O, A

    def raw_action(self, action: np.ndarray) -> np.ndarray:
        """(..., A) in [-1, 1] -> the environment's own."""
        box = self.env.action_space
        return (self.middle + self.half * action).clip(box.low, box.high).astype(box.dtype)

    def finite(self, state: np.ndarray, reward: float = 0.0) -> tuple[np.ndarray, float]:
        state, reward = np.array(state, float), np.asarray(reward, float).item()
        fits = state.shape == self.observation_space.shape and np.isfinite([*state, reward]).all()
        check(fits, f"{self.robot.gym_id} gave a state {state}, reward {reward}, or was given NaN")
        return state, reward

    def reset(self, **kwargs):
        state, info = self.env.reset(**kwargs)
        if self.robot.maze:
            # MuJoCo 2.1 to 3.1 normalise the noisy start's quaternion in place, 3.3 does not.
            state[3:7] /= np.linalg.norm(state[3:7])
            self.unwrapped.data.qpos[3:7] = state[3:7]
            random = self.unwrapped.np_random  # D4RL's v0 draws one goal for a whole process
            self.goal = (maze_cells(self.robot.maze, "g")[0]
                         + random.uniform(0, 1, 2) + random.uniform(0, 0.5, 2))
        return self.finite(state)[0], info

    def step(self, action):
        state, reward, terminal, truncated, info = self.env.step(self.raw_action(action))
        if self.robot.maze:
            reward = terminal = np.linalg.norm(state[:2] - self.goal) <= 0.5
        elif self.robot.name == "pen":
            terminal = state[26] < 0.075  # dropped
        return *self.finite(state, reward), bool(terminal), bool(truncated), info

def make_env(name: str) -> Env:
    """D4RL's environment of a task, with the physics of MuJoCo 2.1.0; or Gymnasium's, as it is."""
    robot = find_robot(name)
    check(re.fullmatch(r"(\w[\w.-]*:)?[^:]+", name), f"--env {name}: neither a task nor module:id")
    options = {"max_episode_steps": robot.horizon}  # None: the id's own
    with (tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(),
          contextlib.redirect_stderr(io.StringIO())):  # advice to use other versions than D4RL's
        warnings.simplefilter("ignore")
        if robot.domain == "adroit":
            import gymnasium_robotics
            gym.register_envs(gymnasium_robotics)
        if robot.maze:
            write_ant_maze(robot.maze, f"{folder}/ant_maze.xml")
            options |= {"xml_file": f"{folder}/ant_maze.xml",
                        "include_cfrc_ext_in_observation": False,
                        "exclude_current_positions_from_observation": False}
        with blame(f"--env {name}", (gym.error.Error, ImportError)):
            env = gym.make(robot.gym_id, disable_env_checker=True, **options)
        if robot in ROBOTS:
            if robot.domain != "adroit":  # whose capsules are in bodies with explicit inertias
                restore_capsules(env.unwrapped.model, env.unwrapped.fullpath)
            for flag in ("mjDSBL_NATIVECCD", "mjDSBL_MULTICCD"):  # new collision code
                env.unwrapped.model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, flag, 0))
    state, action, end = env.observation_space, env.action_space, env.spec.max_episode_steps
    check(end and all(isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (state, action))
          and action.is_bounded() and (action.low < action.high).all() and action.dtype.kind == "f",
          f"--env {name}: it needs a time limit, vectors as states, and bounded floats as actions")
    return Env(env, robot)

# --------------------------------------------------------------------------------------------- data

def d4rl_infos(task: str) -> tuple[str, dict[str, float]]:
    """A task's URL and the returns that score 0 and 100; d4rl's __init__ would need mujoco-py."""
    package = importlib.util.find_spec("d4rl")
    check(package, "d4rl is missing: pip install --no-deps d4rl==1.1")
    infos = runpy.run_path(f"{package.submodule_search_locations[0]}/infos.py")
    check(task in infos["DATASET_URLS"], f"--env: D4RL has no task {task}")
    return infos["DATASET_URLS"][task], {k: infos[k.upper()][task] for k in REFERENCES}

def checksums() -> dict[str, str]:
    """{name of a D4RL file: its SHA-256}."""
    return dict(line.split()[::-1] for path in HERE.glob("testdata/d4rl.sha256")
                for line in path.read_text("utf-8").splitlines())

def dataset_file(url: str) -> Path:
    """A D4RL file in D4RL_DATASET_DIR or ~/.d4rl/datasets, downloaded if it is missing."""
    folder = Path(os.path.expanduser(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")))
    server, _, name = url.rpartition("/")
    path, failures = folder / name, ""
    for source in () if path.is_file() else (server, MIRROR):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (tempfile.TemporaryDirectory(dir=folder) as part,
                  urllib.request.urlopen(f"{source}/{name}", timeout=30) as reply,
                  tqdm.wrapattr(reply, "read", total=reply.length, desc=name) as body):
                file = Path(part, name)
                file.write_bytes(b"".join(iter(lambda: body.read(2**20), b"")))  # by the megabyte
                h5py.File(file).close()  # neither cut off nor an error page
                check(checksums().get(name) in (None, sha256(file)), "wrong checksum")
                return file.rename(path)
        except Exception as error:  # noqa: BLE001, whatever networks and servers raise
            failures += f"; {source}: {error}"
    check(path.is_file(), f"put D4RL's file at {path}, or name it with --dataset{failures}")
    return path

def load_dataset(path: Path, env: Env) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What d4rl.qlearning_dataset makes of a file, its trajectories' returns, and its references.

    Rows with a timeout and the last row are dropped, as nothing follows them. After a terminal row,
    next_state is the next episode's start, which `done` masks. A file without timeouts has one
    where an episode reaches the horizon. Raises BadInput.
    """
    raw, shapes = {}, {"observations": env.observation_space.shape,
                       "actions": env.action_space.shape, "rewards": (), "terminals": ()}
    with blame(f"dataset {path}"), np.errstate(over="ignore"), h5py.File(path) as file:
        references = {k: float(file.attrs[k]) for k in REFERENCES if k in file.attrs}
        low, high = (references.get(k, math.nan) for k in REFERENCES)
        check(not references or -math.inf < low < high < math.inf, f"{REFERENCES}: {low}, {high}")
        shapes |= {"timeouts": ()} if "timeouts" in file else {}
        for key, shape in shapes.items():
            x = file[key][()].astype(np.float32, casting="same_kind")
            expected = len(raw.get("observations", x)), *shape
            raw[key] = x.squeeze(-1) if x.shape == (*expected, 1) else x  # d4rl takes both
            check(raw[key].shape == expected, f"{key} are {raw[key].shape}, not {expected}")
            check(np.isfinite(raw[key]).all(), f"some {key} are not finite numbers")
        done, timeout = raw["terminals"] > 0, raw.get("timeouts", 0 * raw["terminals"]) > 0
        inside = np.abs(raw["actions"] - env.middle) <= env.half * (1 + 1e-5)
        check(inside.all(), "some actions are outside of the environment's bounds")
    state, action, reward = raw["observations"], raw["actions"], raw["rewards"]
    if "timeouts" not in raw:
        age = 0  # d4rl's count of an episode's rows, which begins with 1 after a terminal row
        for i, terminal in enumerate(done):
            timeout[i] = age == env.spec.max_episode_steps - 1
            age = 0 if timeout[i] else 1 if terminal else age + 1
    keep = np.flatnonzero(~timeout[:-1])
    check(len(keep), f"dataset {path}: no row is followed by another of its episode")
    trajectory = np.searchsorted(np.flatnonzero((done | timeout)[:-1]), keep)
    returns = np.bincount(trajectory, reward[keep])[np.unique(trajectory)]
    return {"state": state[keep], "action": action[keep], "reward": reward[keep],
            "next_state": state[keep + 1], "done": done[keep], "returns": returns}, references

class Data:
    """Transitions as the environment gave them, but with actions in [-1, 1]: D's N rows, then the
    learner's own. `sample` normalises states and scales rewards."""
    def __init__(self, rows: int, state_dim: int, action_dim: int, device: str, reward_shift=0.0):
        self.widths = state_dim, action_dim, 1, state_dim, 1
        self.rows = torch.zeros(rows, sum(self.widths), device=device)
        self.mean, self.std = self.rows.new_zeros(state_dim), self.rows.new_ones(state_dim)
        self.reward_scale, self.reward_shift = 1.0, reward_shift
        self.size = self.offline = 0  # rows in use, and N of them D's
        self.size_on_device = torch.zeros((), dtype=torch.long, device=device)  # for a CUDA graph
        self.preferred: Tensor | None = None  # (N, A): OAP's ã

    def append(self, *columns) -> None:
        """n transitions: state (n, O), action (n, A), reward (n,), next_state (n, O), done (n,)."""
        rows = torch.cat([
            torch.as_tensor(x, dtype=torch.float32, device=self.rows.device).reshape(-1, width)
            for x, width in zip(columns, self.widths, strict=True)], 1)
        self.rows[self.size : self.size + len(rows)] = rows
        self.size += len(rows)
        self.size_on_device.fill_(self.size)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        state, action, reward, next_state, done = rows.split(self.widths, -1)  # views
        return state, action, reward.squeeze(-1), next_state, done.squeeze(-1)

    def sample(self, count: int) -> Batch:
        """Uniform over D and own transitions. A CUDA graph would freeze the bound of a randint."""
        index = torch.randint(2**62, (count,), device=self.rows.device) % self.size_on_device
        state, action, reward, next_state, done = self.split(self.rows[index])
        state, next_state = (state - self.mean) / self.std, (next_state - self.mean) / self.std
        reward = reward * self.reward_scale + self.reward_shift
        preferred = action if self.preferred is None else self.preferred[index]
        return Batch(state, action, reward, next_state, done, preferred)

def load_data(args: argparse.Namespace, env: Env) -> tuple[Data, dict]:
    """D, with room for interactions, and what config.json says of it. Raises BadInput."""
    scheme, known, about = SCHEMES[args.scheme], env.robot in ROBOTS, {}
    url, references = d4rl_infos(args.env) if known else ("", {})
    rows = int(args.budget) if scheme.acts else 0
    if scheme.data or args.dataset:  # `online` takes only its references
        path = Path(args.dataset or dataset_file(url))
        raw, about = load_dataset(path, env)
        about |= {"dataset_sha256": sha256(path), "data_return": raw["returns"].mean().item()}
        if known and about["dataset_sha256"] != checksums().get(Path(url).name):
            print(f"note: by its checksum, {path} is not known to be D4RL's file of {args.env}")
        rows += len(raw["reward"]) if scheme.data else 0
    data = Data(rows, *env.dims, args.device, args.reward_shift)
    if scheme.data:
        limit = 1 - 1e-5 if args.algo == "iql" else 1.0
        action = ((raw["action"] - env.middle) / env.half).clip(-limit, limit)
        data.append(raw["state"], action, raw["reward"], raw["next_state"], raw["done"])
        data.offline = data.size
        if args.normalize:
            data.mean, data.std = moments(data.split(data.rows[: data.size])[0])
        if args.reward_scale:
            data.reward_scale = 1000 / float(np.ptp(raw["returns"]) or 1000)
    return data, about | references

# ------------------------------------------------------------------------- evaluation and training

SHOWN = "prefers_policy", "asked_gain", "critic_loss", "actor_loss"  # a row's first two
MAY_CHANGE = "out", "cuda_graph", "checkpoint_every", "wandb", "dataset", "expert", "versions"

def env_seed(*numbers: int) -> int:
    """A seed that shares no episodes with those of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def evaluate(envs: list[Env], policy: Callable, episodes: int, seed: int) -> np.ndarray:
    """Undiscounted returns (episodes,), of raw states (E, O) -> actions (E, A) in [-1, 1]."""
    returns = np.zeros(episodes)
    for first in range(0, episodes, len(envs)):  # an episode in each environment
        states = {i: env.reset(seed=seed + i)[0] for i, env in zip(range(first, episodes), envs)}
        while states:
            actions = policy(np.stack(list(states.values()))).cpu().numpy()
            for i, action in zip(list(states), actions, strict=True):
                states[i], reward, terminal, truncated, _ = envs[i - first].step(action)
                returns[i] += reward
                if terminal or truncated:
                    del states[i]
    return returns

def run_folder(args: argparse.Namespace) -> Path:
    """<out>/<env>/<algo>-<scheme>[-ft|-interval|-inf|-no-ranknet][-tag]/<seed>."""
    scheme, env = SCHEMES[args.scheme], re.sub(r"[^\w.-]", "-", args.env)
    names = [args.algo, args.scheme, args.timing if args.timing != scheme.timing else "",
             "inf" if scheme.asks and math.isinf(args.budget) else "",
             "no-ranknet" if scheme.asks and not args.ranknet else "", args.tag]
    return Path(args.out, env, "-".join(filter(None, names)), str(args.seed))

def claim(folder: Path, config: dict) -> io.TextIOBase:
    """Writes config.json; BadInput if another run's is there. The returned file is a lock."""
    path = folder / "config.json"
    with blame(f"--out {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        with blame(f"another process trains in {folder}", BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not path.is_file():  # written once, with the commit that began the run
        write(path, json.dumps(config, indent=2).encode())
    with blame(f"{path} can't be read; rm -r {folder} begins anew"):
        old = dict(json.loads(path.read_text("utf-8")))
    changed = [f"{k} {old.get(k)}, not {v}" for k, v in config.items()
               if k not in MAY_CHANGE and str(old.get(k)) != str(v)]
    check(not changed, f"{folder} has a run with {'; '.join(changed)}: --tag names another run,"
          f" rm -r {folder} begins anew")
    return lock

def graphed(advance: Callable[[bool], dict]) -> Callable[[bool], dict]:
    """`advance`, replayed from a CUDA graph for each argument: one launch instead of a hundred.
    What it reads must stay where it is in memory and be changed in place."""
    graphs, calls = {}, {False: 0, True: 0}
    def replay(update_actor: bool) -> dict[str, Tensor]:
        calls[update_actor] += 1
        if calls[update_actor] <= 3:  # to warm up, as capturing asks for
            return advance(update_actor)
        if update_actor not in graphs:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            with torch.cuda.graph(graph, stream=stream):  # the replays': both set the random state
                graphs[update_actor] = graph, advance(update_actor)
        graphs[update_actor][0].replay()
        return graphs[update_actor][1]
    return replay

def train(args: argparse.Namespace) -> Path:
    """Runs a scheme; with --scheme oap, Algorithm 1. Returns the run's folder. Raises BadInput.
    A stopped run goes on to the same end, on a CPU to the bit; if it acts, in a new episode."""
    scheme, device, folder = SCHEMES[args.scheme], torch.device(args.device), run_folder(args)
    updates = args.steps + args.finetune_steps
    rng = torch.cuda if device.type == "cuda" else torch  # where all random numbers come from
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one can't be captured
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    torch.set_float32_matmul_precision(args.matmul_precision)

    # The environments, the black box, D, the learner, and what OAP adds to it.
    envs, about = [make_env(args.env) for _ in range(min(args.eval_episodes, 10))], {}
    if scheme.asks or args.audit:
        black_box, about = load_black_box(args.expert, envs[0], args.budget, args.device)
    data, about_data = load_data(args, envs[0])
    state, action = data.split(data.rows[: data.offline])[:2]  # D's, (N, O) and (N, A)
    if scheme.asks or args.audit:
        black_box.answer(state[:2], action[:2], action[:2])  # a misfit fails now; ties tell nothing
    torch.manual_seed(args.seed)  # here: a black box must not change the learner's random numbers
    agent = ALGORITHMS[args.algo](*envs[0].dims, args)
    learner, optimizers = nn.ModuleDict({"agent": agent}), agent.optimizers
    if scheme.asks:
        ranknet = RankNet(*envs[0].dims).to(device) if args.ranknet else None
        oap = OAP(state, action, black_box, ranknet, args.ranknet_epochs, args.lr)
        learner["oap"], optimizers = oap, optimizers + oap.optimizers
        rounds = {t: int(min(count, len(state))) for t, count in query_rounds(args).items()}
        data.preferred = oap.preferred  # the same memory, which a round changes in place
        print(f"{len(rounds)} rounds will make {sum(rounds.values()):,} queries")
    if scheme.acts:
        env, current = make_env(args.env), None
        random_steps = 0 if scheme.data else min(args.random_steps, args.budget)
        start, stop = (args.steps, updates) if args.timing == "ft" else (0, args.steps)

    @torch.no_grad()
    def act(state: np.ndarray | Tensor, policy: Callable[[Tensor], Tensor] = agent.actor) -> Tensor:
        state = torch.as_tensor(state, dtype=torch.float32, device=device)
        return policy((state - data.mean) / data.std)
    def advance(update_actor: bool) -> dict[str, Tensor]:
        return agent.update(data.sample(args.batch_size), update_actor)  # Eq. 6

    # The run's folder: a new run, one to go on with, or a finished one.
    versions = {m.__name__: m.__version__ for m in (torch, gym, mujoco, np)} | {
        "commit": os.popen(f"git -C {str(HERE)!r} rev-parse HEAD 2>/dev/null").read().strip()}
    config = vars(args) | about | about_data | {"versions": versions}
    config["budget"] = "inf" if math.isinf(args.budget) else args.budget  # JSON has no infinity
    _lock = claim(folder, config)  # held until this returns
    if (folder / "model.pt").is_file():
        print(f"{folder} is finished")
        return folder
    checkpoint = folder / "checkpoint.pt"
    made, rows, log, losses, seconds = 0, [], {}, {}, 0.0
    if checkpoint.is_file():
        saved = load(checkpoint, args.device)
        with blame(f"{checkpoint} is another run's; rm -r {folder} begins anew"):
            made, rows, log, losses, seconds = (
                saved[k] for k in ("step", "rows", "log", "losses", "seconds"))
            learner.load_state_dict(saved["learner"])
            for optimizer, x in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(x)
            if scheme.asks:
                black_box.spent = sum(count for t, count in rounds.items() if t <= made)
            data.append(*data.split(saved["own"]))
            rng.set_rng_state(saved["rng"].cpu())
        print(f"{folder} continues after update {made:,}")
    if args.wandb:
        with blame("--wandb"):
            import wandb
            run = wandb.init(project="oap", name=str(folder), config=config, reinit=True)
    advance = graphed(advance) if args.cuda_graph else advance
    low, high = (about_data.get(k, math.nan) for k in REFERENCES)
    started = time.monotonic() - seconds

    for step in tqdm(range(made + 1, updates + 1), initial=made, total=updates, disable=None):
        if scheme.acts:  # as often as is due by now; without D, first some random actions
            updates_acting = min(max(step - start, 0), stop - start)
            due = random_steps + (args.budget - random_steps) * updates_acting // (stop - start)
            while (n := data.size - data.offline) < due:
                if current is None:  # a new episode, also where a run goes on
                    current, _ = env.reset(seed=env_seed(args.seed, n, 1))  # no evaluation's
                a = act(current, agent.explore) if n >= random_steps else (
                    torch.rand(env.dims[1], device=device) * 2 - 1)
                next_state, reward, terminal, truncated, _ = env.step(a.cpu().numpy())
                data.append(current, a, reward, next_state, terminal)
                current = None if terminal or truncated else next_state

        losses |= advance(step % args.policy_delay == 0)

        asking, evaluating = scheme.asks and step in rounds, step % args.eval_every == 0
        saving = asking or step % args.checkpoint_every == 0
        if saving or evaluating or step == updates:
            values = {name: loss.item() for name, loss in losses.items()}
            check(all(abs(x) < 1e15 for x in values.values()),  # nor NaN
                  f"{folder} diverged by update {step:,}: {values}")
        if evaluating:  # before the round, whose answers are saved as soon as it has ended
            value = float(evaluate(envs, act, args.eval_episodes, env_seed(args.seed, step)).mean())
        if asking:  # Algorithm 1's "if"
            log = oap.round(act, rounds[step]) | (oap.audit() if args.audit else {})
        if evaluating:
            row = {"step": step, "score": 100 * (value - low) / (high - low), "return": value,
                   "interactions": data.size - data.offline,
                   "queries": black_box.spent if scheme.asks else 0,
                   "seconds": time.monotonic() - started} | values | log
            rows.append(row)
            write_csv(folder / "progress.csv", rows)
            left = tqdm.format_interval(row["seconds"] / step * (updates - step))
            shown = ["return" if math.isnan(low) else "score", *(k for k in SHOWN if k in row)]
            tqdm.write(f"seed {args.seed}  step {step:>9,}  left {left:>8}" + "".join(
                f"  {name} {row[name]:8.4g}" for name in shown[:3]))
            if args.wandb:
                run.log(row, step)
            log = {}
        if saving:
            save(checkpoint, {
                "step": step, "rows": rows, "log": log, "losses": losses,
                "learner": learner.state_dict(), "optimizers": [x.state_dict() for x in optimizers],
                "own": data.rows[data.offline : data.size].clone(), "rng": rng.get_rng_state(),
                "seconds": time.monotonic() - started})

    final = {k: float(np.mean([row[k] for row in rows[-10:]])) for k in ("return", "score")}
    if args.audit:  # Figure 6, for samples spread over D
        state, action = (x[:: math.ceil(len(x) / 3_000)] for x in (state, action))
        pi, q = act(state), black_box.value
        np.savez(npz := io.BytesIO(), divergence=divergence(action, pi).cpu(),
                 value_gain=(q(state, pi) - q(state, action)).cpu())
        write(folder / "audit.npz", npz.getvalue())
    save(folder / "model.pt", final | {
        "env": args.env, "algo": args.algo, "rows": rows, "mean": data.mean, "std": data.std,
        "actor": agent.actor.state_dict(), "critic": agent.critic.state_dict()})
    checkpoint.unlink(missing_ok=True)
    print(f"{folder}: {', '.join(f'{k} {x:,.1f}' for k, x in final.items() if not math.isnan(x))},"
          f" the mean of the last {len(rows[-10:])} evaluations")
    return folder

# --------------------------------------------------------------------------------------------- main

def demo() -> None:
    """OAP and the offline scheme with as many updates, on a small dataset that is shipped."""
    print("A demo on Pendulum, two minutes on two CPU cores: the offline scheme, then OAP.")
    at, models = os.path.relpath(HERE), []
    base = [f"--dataset={at}/testdata/pendulum-medium.hdf5", "--env=Pendulum-v1", "--batch-size=64",
            f"--expert={at}/experts/pendulum.pt", "--eval-every=500", "--out=runs/demo"]
    ours = "--scheme=oap --steps=5000 --finetune-steps=1000 --interval=1000 --budget=1000 --audit"
    for flags in ("--scheme=offline --steps=6000", ours):
        print("python oap.py", *base, flags)
        models.append(load(train(parse_args([*base, *flags.split()])) / "model.pt", "cpu"))
    last = [row for row in models[1]["rows"] if "prefers_policy" in row][-1]
    print(f"""
score of offline                                {models[0]["score"]:9.1f}
score of OAP                                    {models[1]["score"]:9.1f}
queries made                                    {last["queries"]:9,}
answers that preferred the policy, last round   {last["prefers_policy"]:9.1%}
RankNet's accuracy on samples never asked       {last["ranknet_accuracy"]:9.1%}
accuracy of always answering "policy"           {last["unasked_prefer_policy"]:9.1%}

Next: python oap.py --scheme oap --env pen-human-v1; README.md has more.""")

def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2, after one line, for what the user can correct."""
    sys.path.append("")  # for black boxes and environments of one's own
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more hardly help
    try:
        argv = sys.argv[1:] if argv is None else argv
        train(parse_args(argv)) if argv else demo()
        return 0
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from the last checkpoint"
    except BadInput as error:
        message = " ".join(str(error).split())
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):  # a black box's or an environment's own
            raise
        message = f"nobody reads the output, or a disk is full: {error}"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's exit fails
    print(f"oap.py: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    sys.exit(main())
