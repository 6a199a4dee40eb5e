"""Offline-with-Action-Preferences (OAP, ICML 2023) in one file.

    python oap.py                                        # a demo that needs nothing; minutes
    python oap.py --scheme oap --env pen-human-v1        # asks experts/pen.pt
    python oap.py --scheme o2o --algo iql --env Hopper-v4:medium        # experts/ make the data
    python oap.py --scheme oap --env pen-human-v1 --seeds 0 1 2 3 4     # five at once
    python oap.py --help

OAP improves an offline policy without touching the environment. Now and then it asks a black box
which of two actions is better in a state of the dataset: the recorded one or the policy's own.

    Algorithm 1                                                   here
    let ã_i = a_i; for t = 1 .. N_train:                          load_data, learn
        update the policy by Eq. 6                                TD3BC.update, IQL.update
        if t mod M_inter = 0:                                     learn, then oap_round:
            select K·M_inter/N_train samples by divergence        due, divergence, select_queries
            ask the black box (Eq. 2), add the answers to D_q     BlackBox, QueryDataset
            train RankNet on D_q (Eq. 3)                          train_ranknet, ranknet_loss
            answer for all the others with RankNet (Eq. 4)        pseudo_query
    Eq. 5 is Eq. 6 with ã = a.  Eq. 6: td3bc_actor_loss, iql_actor_loss.  Eq. 7: improvement_bound.

What the paper leaves open, and what is done here:
 1. l_i sums over action dimensions, each in [-1, 1]; π(s) is the deterministic policy (IQL: the
    Gaussian's mean). Q* is the smaller of the black box's two.
 2. Once too few samples were never asked, the most divergent others are asked again, about the
    current policy's action, none twice in a round. What is due beyond D's size is lost: on
    pen-human half of the budget, and OAP is Table 3's OAP(inf), which asks about all of D in
    every round and needs no RankNet.
 3. A tie keeps the data's action, in Eq. 2 and in Eq. 4.
 4. ã is frozen between rounds: the policy's action as it was when it was preferred. Asked samples
    keep the black box's answer; in every round RankNet answers anew for all the others.
 5. RankNet goes on training from round to round: Adam at --lr, batches of 256 of all of D_q, as
    many as 100 epochs of the round's own answers have (Table 5's 100 epochs; Algorithm 1: "until
    convergence"). 100 epochs of all of D_q take 5.5 times as long and are no more accurate
    (results/README.md). It sees states as the policy does.
 6. IQL, for which Eq. 6 is not printed: ã replaces a in the advantage-weighted regression, in the
    weight and in the likelihood; so Q is asked, here alone, about actions that are not in D. V and
    Q learn from the data's action, which has the reward.
 7. λ in Table 5 is TD3+BC's alpha: Eq. 6's λ is alpha / mean|Q|. Its (π(s) - ã)² is the mean over
    dimensions, as in TD3+BC. Eq. 7 is logged over the asked samples, which costs no query.
 8. OAP's last 100k updates ask nothing. IQL's cosine decay of the actor's rate spans all updates
    (OAP's last round comes at 2 % of it), but "ft", which would hardly learn from what comes at
    the end, has none. Networks start as PyTorch's.
 9. Interactions are spread evenly. "interval" for o2o means: over its first phase. Batches are
    uniform over D and own transitions, whose ã is the action itself.
10. Schemes without D begin with 1,000 uniformly random actions, counted in the budget and in the
    even spread. TD3+BC explores with TD3's noise of 0.1, IQL and SAC by sampling.
11. AntMaze's rewards are lowered by 1. IQL's, but for AntMaze and Adroit, are scaled by 1000 /
    (best - worst trajectory), as its authors do on locomotion; its actions are clipped to 1 - 1e-5,
    as in their code. TD3+BC normalises states by D's mean and deviation, where there is D. An
    evaluation has 10 episodes, on AntMaze 100; v0's goal is drawn at every reset, as v2's, and not
    once for a process.
12. Local tasks ID:QUALITY follow D4RL's recipe, but "random" is uniform actions, "a third of the
    final return" is counted from theirs, since returns may be negative, and medium-expert has
    --dataset-size rows, half of each.
13. A black box is SAC's policy and Q at its best evaluation, scored over 100 other episodes: on
    some robots SAC's last policy is a poor one. experts/pen.pt is the mean of two (README).
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------- arguments and schemes

# Table 5's Gym / AntMaze / Adroit columns, then two of the domains' protocols (point 11).
DOMAIN_DEFAULTS = {
    "td3bc_alpha":   {"gym": 2.5, "antmaze": 2.5,  "adroit": 0.1},
    "iql_beta":      {"gym": 3.0, "antmaze": 10.0, "adroit": 0.5},
    "iql_expectile": {"gym": 0.7, "antmaze": 0.9,  "adroit": 0.7},
    "iql_dropout":   {"gym": 0.0, "antmaze": 0.0,  "adroit": 0.1},
    "reward_shift":  {"gym": 0.0, "antmaze": -1.0, "adroit": 0.0},
    "eval_episodes": {"gym": 10,  "antmaze": 100,  "adroit": 10},
}


class Scheme(NamedTuple):
    """A scheme of Table 1, or a black box's training: what it learns from, what its budget buys."""

    data: bool  # learns from D
    spends: str  # what the budget counts: "interactions", "queries" or nothing
    timing: str  # when it is spent: "interval", during the first phase, or "ft", after it
    finetune: bool  # has a second phase, of --finetune-steps updates

    @property
    def asks(self) -> bool:
        return self.spends == "queries"

    @property
    def interacts(self) -> bool:
        return self.spends == "interactions"


SCHEMES = {
    "offline":    Scheme(data=True,  spends="",             timing="interval", finetune=False),
    "online":     Scheme(data=False, spends="interactions", timing="interval", finetune=False),
    "online-mix": Scheme(data=True,  spends="interactions", timing="interval", finetune=False),
    "o2o":        Scheme(data=True,  spends="interactions", timing="ft",       finetune=True),
    "oap":        Scheme(data=True,  spends="queries",      timing="interval", finetune=True),
    "expert":     Scheme(data=False, spends="interactions", timing="interval", finetune=False),
}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")


class BadInput(ValueError):
    """A mistake that the user can fix: `main` prints it in one line and returns 2."""


def number(low: float, high: float = 1e12, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a number in [low, high], where "inf" is one if `high` is infinite."""

    def parse(text: str) -> float:
        value = math.inf if text == "inf" else kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    parse.__name__ = f"{'whole ' * (kind is int)}number from {low:g} to {high:g}"
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message}; see --help")


class Help(argparse.HelpFormatter):
    """Shows an argument's default, or its row of DOMAIN_DEFAULTS."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if row := DOMAIN_DEFAULTS.get(action.dest):
            return f"{action.help} (default: {', '.join(f'{v} {k}' for k, v in row.items())})"
        shown = action.default not in (None, "", argparse.SUPPRESS)
        return action.help + " (default: %(default)s)" * shown


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("oap.py", allow_abbrev=False, description="Without arguments: a demo.",
                    formatter_class=Help)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    count, positive, fraction = number(1, kind=int), number(1e-12), number(0, 1)
    # what runs
    add("--env", help="a D4RL task, or GYMNASIUM_ID:QUALITY, QUALITY one of "
        + ", ".join(QUALITIES))
    add("--scheme", choices=SCHEMES, default="oap", help="Table 2's columns; or train a black box")
    add("--algo", choices=("td3bc", "iql"), help="what learns (default: td3bc)")
    add("--seeds", "--seed", type=number(0, 2**31 - 1, int), nargs="+", default=[0],
        help="of all that is random: one, or several that train together")
    add("--expert", help="the black box: a run's model.pt, a Stable-Baselines3 SAC or TD3 zip, a"
        " TorchScript Q(s, a), or module:function")
    add("--dataset", help="hdf5 file in D4RL's format instead of the task's own")
    add("--out", help="folder of all runs (default: runs), or of the report")
    add("--tag", default="", help="appended to the name of the run's folder")
    add("--overwrite", action="store_true", help="run again what is finished")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--compile", action="store_true", help="torch.compile for updates: faster after a minute")
    add("--cuda-graph", action=switch, help="for updates (default: with CUDA)")
    add("--checkpoint-every", type=count, default=50_000,
        help="updates between checkpoints; Ctrl-C and SIGTERM write one too")
    add("--tensorboard", action="store_true", help="log to the run's folder too")
    add("--wandb", action="store_true", help="log to Weights & Biases' project oap too")
    add("--physics", choices=("exact", "stock"), default="exact", help="D4RL's MuJoCo, or today's")
    add("--benchmark", action="store_true", help="measure this machine instead of a run")
    add("--report", metavar="FOLDER", help="the paper's tables and figures from these runs instead")
    # the scheme
    add("--steps", type=count, help="updates of the first phase, N_train (default: 1000000)")
    add("--finetune-steps", type=count, default=100_000, help="updates of the second (o2o, oap)")
    add("--budget", type=number(1, math.inf, int), help="queries or interactions, K, or inf"
        " (default: 100000)")
    add("--interval", type=count, default=100_000, help="updates between rounds, M_inter")
    add("--timing", choices=("interval", "ft"), help="Figure 7 (default: the scheme's)")
    add("--ranknet", action=switch, default=True, help="Table 3's OAP(w/RN) has none")
    add("--ranknet-epochs", type=count, default=100, help="in every round, over its own answers")
    add("--audit", action="store_true", help="every interval, ask about all of D outside of the"
        " budget: RankNet's accuracy, and Figure 6's data in an npz")
    # the protocol
    add("--eval-every", type=count, default=5_000, help="updates between evaluations")
    add("--eval-episodes", type=count, help="per evaluation")
    add("--normalize", action=switch, help="states to mean 0, deviation 1 (default: for td3bc)")
    add("--reward-shift", type=number(-1e12), help="added to rewards")
    add("--reward-scale", action=switch, help="rewards to returns of 1000 from worst to"
        " best (default: for iql, but for AntMaze and Adroit)")
    add("--expert-steps", type=count, default=3_000_000, help="SAC's steps, for --scheme expert")
    add("--dataset-size", type=number(100, kind=int), default=1_000_000, help="of local tasks")
    # every algorithm
    add("--batch-size", type=count, default=256, help="of an update")
    add("--lr", type=positive, default=3e-4, help="Adam's learning rate for every network")
    add("--discount", type=fraction, default=0.99, help="γ")
    add("--polyak", type=fraction, default=0.005, help="target networks' rate")
    add("--random-steps", type=count, default=1_000, help="random actions first, if without D")
    # TD3+BC
    add("--td3bc-alpha", type=positive, help="weight of Q, Table 5's λ")
    add("--policy-noise", type=number(0), default=0.2, help="deviation of the target's noise")
    add("--noise-clip", type=number(0), default=0.5, help="the noise's bound")
    add("--policy-delay", type=count, default=2, help="critic updates per actor update")
    add("--exploration-noise", type=number(0), default=0.1, help="deviation, when interacting")
    # IQL
    add("--iql-beta", type=number(0), help="inverse temperature")
    add("--iql-expectile", type=fraction, help="Table 5's quantile")
    add("--iql-dropout", type=number(0, 0.99), help="of the actor")
    return parser


# ----------------------------------------------------------------------------------- OAP, section 3


class Batch(NamedTuple):
    """B transitions. `preferred` is ã, what the policy constraint pulls towards."""

    state: Tensor  # (B, O), an observation, in the networks' units
    action: Tensor  # (B, A), in [-1, 1] like every action that a network sees
    reward: Tensor  # (B,)
    next_state: Tensor  # (B, O)
    not_done: Tensor  # (B,) 0 after a terminal state, else, and after a timeout, 1
    preferred: Tensor  # (B, A)


def due(step: int, budget: float, start: int, stop: int) -> float:
    """How much of `budget` is due by `step`, spent evenly over start < t <= stop; rounded down."""
    done = min(max(step - start, 0), stop - start)
    return budget if math.isinf(budget) else budget * done // (stop - start)


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors) without gradients, in pieces of the first axis that fit a CPU's cache."""
    size = 1024 if tensors[0].device.type == "cpu" else 2**17
    for i, piece in enumerate(zip(*(t.split(size) for t in tensors), strict=True)):
        result = function(*piece)
        if i == 0:  # in one place: a list of small results would scatter them over the heap
            whole = result.new_empty(len(tensors[0]), *result.shape[1:])
        whole[i * size : i * size + len(result)] = result
    return whole


def divergence(action: Tensor, policy_action: Tensor) -> Tensor:
    """Section 3.1's ranking criterion l_i = (π(s_i) - a_i)²: (N, A), (N, A) -> (N,)."""
    return ((policy_action - action) ** 2).sum(-1)


def select_queries(divergence: Tensor, asked: Tensor, count: int) -> Tensor:
    """Indices (min(count, N),) of what to ask: never asked first (Table 5), then most divergent.

    divergence (N,), asked (N,) bool. Of equals, the lower index comes first.
    """
    order = divergence.argsort(descending=True, stable=True)
    return order[asked[order].to(torch.uint8).argsort(stable=True)][:count]


class RankNet(nn.Module):
    """f_r(s, a) of section 3.2, "3 MLP layers", with Table 5's widths and dropout."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.net = MLP(state_dim + action_dim, 512, 256, 1, dropout=0.5)

    def forward(self, state: Tensor, action: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.net(state, action, keep=keep).squeeze(-1)  # (B,)


def ranknet_loss(ranknet: nn.Module, state: Tensor, action: Tensor, policy_action: Tensor,
                 prefers_data: Tensor, keep: Sequence[Tensor | None] = (None, None)) -> Tensor:
    """Eq. 3, the cross entropy of P = sigmoid(f(s, a) - f(s, π(s))) to P̄ = prefers_data (B,).

    keep: the hidden units that dropout keeps for either action, as in MLP.
    """
    o = ranknet(state, action, keep[0]) - ranknet(state, policy_action, keep[1])  # (B,)
    return F.binary_cross_entropy_with_logits(o, prefers_data.to(o.dtype))


def train_ranknet(ranknet: RankNet, optimizer: "Adam", pairs: tuple[Tensor, ...], samples: int,
                  generator: torch.Generator, batch_size: int = 256) -> float:
    """Descends Eq. 3 on D_q = (state, action, policy_action, prefers_data) of M rows each.

    Takes ceil(samples / batch_size) steps, through D_q in one random order after another. Returns
    the mean loss of the last M samples, in nats: log 2 is what guessing costs.
    """
    losses, steps = [], math.ceil(samples / batch_size)
    while len(losses) < steps:
        order = torch.randperm(len(pairs[0]), generator=generator, device=generator.device)
        for index in order.split(batch_size)[: steps - len(losses)]:
            keep = ranknet.net.draw([generator], 2, len(index))[0]
            loss = ranknet_loss(ranknet, *(x[index] for x in pairs), keep)
            losses.append(descend(optimizer, loss))
    return torch.stack(losses[-math.ceil(len(order) / batch_size):]).mean().item()


def pseudo_query(ranknet: nn.Module, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
    """Eq. 4: True (B,) where RankNet finds `action` at least as good as `other`."""
    return ranknet(state, action) >= ranknet(state, other)


def improvement_bound(q: Callable, state: Tensor, action: Tensor, preferred: Tensor) -> float:
    """Eq. 7, the estimate behind Eq. 8's bound: mean of Q*(s, ã) - Q*(s, a), in Q*'s units."""
    return (q(state, preferred) - q(state, action)).mean().item()


class QueryDataset:
    """D_q = {(s_k, a_k, π^k(s_k), ã_k)}: rows of D, the policy's actions then, the answers."""

    def __init__(self, size: int, action_dim: int, device: torch.device):
        self.asked = torch.zeros(size, dtype=torch.bool, device=device)  # (N,), over D
        self.index = torch.empty(0, dtype=torch.long, device=device)  # (M,)
        self.policy_action = torch.empty(0, action_dim, device=device)  # (M, A)
        self.prefers_data = torch.empty(0, dtype=torch.bool, device=device)  # (M,)

    def add(self, index: Tensor, policy_action: Tensor, prefers_data: Tensor) -> None:
        self.asked[index] = True
        self.index = torch.cat([self.index, index])
        self.policy_action = torch.cat([self.policy_action, policy_action])
        self.prefers_data = torch.cat([self.prefers_data, prefers_data])


def oap_round(policy: Callable[[Tensor], Tensor], state: Tensor, action: Tensor, preferred: Tensor,
              count: int, queries: QueryDataset, black_box: "BlackBox", ranknet: nn.Module | None,
              optimizer: "Adam | None", epochs: int,
              generator: torch.Generator) -> dict[str, float]:
    """The body of Algorithm 1's `if`: asks `count` samples and sets D's ã = `preferred`, in place.

    state (N, O), action (N, A), preferred (N, A). Without `ranknet`, unasked samples keep their ã.
    Returns what to log: mean divergence, share of answers for the policy, Eq. 7, RankNet's loss.
    """
    pi = in_chunks(policy, state)  # (N, A)
    ranking = divergence(action, pi)  # (N,)
    chosen = select_queries(ranking, queries.asked, count)  # (k,)
    prefers_data = black_box(state[chosen], action[chosen], pi[chosen])  # (k,)
    queries.add(chosen, pi[chosen], prefers_data)
    preferred[chosen] = torch.where(prefers_data[:, None], action[chosen], pi[chosen])
    log = {"divergence": ranking.mean().item(),
           "prefers_policy": 1 - prefers_data.float().mean().item()}
    if black_box.q is not None:
        asked = queries.asked.nonzero().squeeze(1)
        log["bound"] = improvement_bound(
            black_box.value, state[asked], action[asked], preferred[asked])
    rest = (~queries.asked).nonzero().squeeze(1)
    if ranknet is not None and len(rest):
        pairs = (state[queries.index], action[queries.index], queries.policy_action,
                 queries.prefers_data)
        log["ranknet_loss"] = train_ranknet(
            ranknet, optimizer, pairs, epochs * len(chosen), generator)
        prefers_data = in_chunks(lambda i: pseudo_query(ranknet, state[i], action[i], pi[i]), rest)
        preferred[rest] = torch.where(prefers_data[:, None], action[rest], pi[rest])
    return log


# ----------------------------------------------------------------------------------------- networks


class Linear(nn.Linear):
    """nn.Linear, also with weights (S, out, in) for inputs (S, B, in): one layer for each seed."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return super().forward(x)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


class MLP(nn.ModuleList):
    """Linear layers of these widths with ReLU, and dropout if it is asked for, between them."""

    def __init__(self, *sizes: int, dropout: float = 0.0):
        super().__init__(Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.hidden, self.dropout = sizes[1:-1], dropout

    def forward(self, *inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep: bools (B, units in all hidden layers), what `draw` drew; None, no dropout."""
        *hidden, last = self
        x = torch.cat(inputs, -1)
        masks = [None] * len(hidden) if keep is None else keep.split(self.hidden, -1)
        for layer, mask in zip(hidden, masks, strict=True):
            x = layer(x).relu()
            if mask is not None:
                x = x * mask / (1 - self.dropout)
        return last(x)

    def draw(self, generators: list[torch.Generator], *shape: int) -> Tensor | None:
        """The hidden units that dropout keeps: bools (S, *shape, units), None without dropout."""
        if not self.dropout:
            return None  # else 16 random bits decide on each, which a CPU draws faster than floats
        shape = (*shape, sum(self.hidden))
        bits = draw_integers(generators, -(-math.prod(shape) // 4)).view(torch.int16)
        keep = bits[:, : math.prod(shape)] >= round(2**16 * self.dropout) - 2**15
        return keep.view(-1, *shape)


class Critic(nn.Module):
    """Twin Q(s, a)."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.q1 = MLP(state_dim + action_dim, 256, 256, 1)
        self.q2 = MLP(state_dim + action_dim, 256, 256, 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.q1(state, action), self.q2(state, action)], -1)  # (B, 2)


class DeterministicActor(MLP):
    """TD3's π(s)."""

    def __init__(self, state_dim: int, action_dim: int, dropout: float = 0.0):
        super().__init__(state_dim, 256, 256, action_dim, dropout=dropout)

    def forward(self, state: Tensor, keep: Tensor | None = None) -> Tensor:
        return super().forward(state, keep=keep).tanh()  # (B, A)


class GaussianActor(DeterministicActor):
    """IQL's π(a|s) around the same π(s): σ does not depend on s, samples are not squashed."""

    def __init__(self, state_dim: int, action_dim: int, dropout: float):
        super().__init__(state_dim, action_dim, dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def std(self) -> Tensor:
        return self.log_std.clamp(-5, 2).exp().unsqueeze(-2)  # (1, A)

    def log_prob(self, state: Tensor, action: Tensor, keep: Tensor | None = None) -> Tensor:
        std = self.std()
        z = (action - self(state, keep)) / std
        return -(z**2 / 2 + std.log() + math.log(2 * math.pi) / 2).sum(-1)  # (B,)


class SquashedActor(MLP):
    """SAC's π(a|s), the tanh of a Gaussian."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__(state_dim, 256, 256, 2 * action_dim)

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state).chunk(2, -1)[0].tanh()  # (B, A), without noise

    def sample(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise (B, A) -> actions (B, A) and their log-probabilities (B,)."""
        mean, log_std = super().forward(state).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        normal = -(noise**2 / 2 + log_std + math.log(2 * math.pi) / 2)
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh²u), without overflow
        return u.tanh(), (normal - squash).sum(-1)


class Adam:
    """Kingma & Ba's Adam of a module's parameters, in place, as torch.optim.Adam, whose step the
    compiler can't trace. `lr` and the number of steps, `t`, are tensors, for CUDA graphs."""

    def __init__(self, module: nn.Module, lr: float):
        self.parameters = list(module.parameters())
        self.mean, self.square = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.t, self.lr = (self.parameters[0].new_full((), x) for x in (0.0, lr))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        self.t += 1
        if not torch.compiler.is_compiling():
            gradients = [g.contiguous() for g in gradients]  # the CPU's kernel ignores strides
            torch._fused_adam_(
                self.parameters, gradients, self.mean, self.square, [], [self.t] * len(gradients),
                lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False,
                maximize=False)
            return
        rate, scale = self.lr / (1 - 0.9**self.t), (1 - 0.999**self.t).sqrt()
        for p, g, m, v in zip(self.parameters, gradients, self.mean, self.square, strict=True):
            m.lerp_(g, 1 - 0.9)
            v.lerp_(g**2, 1 - 0.999)
            p -= rate * m / (v.sqrt() / scale + 1e-8)


def descend(optimizer: Adam, loss: Tensor) -> Tensor:
    """A step of the optimizer's parameters and of no others; returns the loss, (S,) for S seeds."""
    optimizer.step(torch.autograd.grad(loss.sum(), optimizer.parameters))
    return loss.detach()


def target_of(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def polyak_update(target: nn.Module, net: nn.Module, polyak: float) -> None:
    """target <- (1 - polyak) target + polyak net."""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), polyak)


def stack(nets: Sequence[nn.Module]) -> nn.Module:
    """The networks of S seeds in one, with parameters (S, ...); of one seed, just its network."""
    for parameter, *others in zip(*(net.parameters() for net in nets), strict=True):
        if others:
            parameter.data = torch.stack([parameter.data, *(p.data for p in others)])
    return nets[0]


def unstack(net: nn.Module, seed: int, seeds: int) -> nn.Module:
    """A copy of one of S stacked networks."""
    net = target_of(net)
    for parameter in net.parameters():
        parameter.data = parameter.data[seed].clone() if seeds > 1 else parameter.data
    return net


def normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal numbers (S, *shape), each seed's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def draw_integers(generators: list[torch.Generator], count: int) -> Tensor:
    """64 random bits each, (S, count), each seed's from its own generator."""
    return torch.stack([torch.empty(count, dtype=torch.long, device=g.device).random_(
        -(2**63), None, generator=g) for g in generators])


# ---------------------------------------------------------------------- TD3+BC, IQL, SAC: one shape
#
# networks() of each seed are stacked, and then given to the constructor. Losses are written for one
# seed; means and sums over the last axes let a leading axis of seeds through. actor(state) is the
# deterministic policy: what is evaluated, and compared with the data's actions. explore(state,
# noise) is what acts in an environment. update(batch, noise, delayed) updates everything, of TD3
# some only if `delayed`, and returns losses; all that is random in it is `noise`, what
# draw(generators, batch_size) drew. `args` has the flags' names as attributes; only IQL's decay
# asks how many `updates` will come.


def bellman_loss(critic: nn.Module, batch: Batch, next_value: Tensor, discount: float) -> Tensor:
    """Squared error of both Q to r + γ next_value (B,), which a terminal state cuts off."""
    target = batch.reward + discount * batch.not_done * next_value  # (B,)
    error = critic(batch.state, batch.action) - target.unsqueeze(-1)  # (B, 2)
    return (error**2).mean(-2).sum(-1)


@torch.no_grad()
def td3_next_value(critic_target: nn.Module, actor_target: nn.Module, batch: Batch, noise: Tensor,
                   policy_noise: float, noise_clip: float) -> Tensor:
    """The smaller target Q of a smoothed target action (Fujimoto et al. 2018) -> (B,)."""
    noise = (policy_noise * noise).clamp(-noise_clip, noise_clip)
    action = (actor_target(batch.next_state) + noise).clamp(-1, 1)
    return critic_target(batch.next_state, action).amin(-1)


def td3bc_actor_loss(actor: nn.Module, critic: Critic, batch: Batch, alpha: float) -> Tensor:
    """Eq. 6 as a loss: -λ Q(s, π(s)) + (π(s) - ã)², point 7."""
    action = actor(batch.state)
    q = critic.q1(batch.state, action).squeeze(-1)  # (B,)
    weight = alpha / q.abs().mean(-1).detach()
    return -weight * q.mean(-1) + ((action - batch.preferred) ** 2).mean((-2, -1))


class TD3BC:
    """TD3+BC (Fujimoto & Gu 2021)."""

    @staticmethod
    def networks(state_dim: int, action_dim: int, args: argparse.Namespace) -> nn.ModuleDict:
        return nn.ModuleDict({"actor": DeterministicActor(state_dim, action_dim),
                              "critic": Critic(state_dim, action_dim)})

    def __init__(self, networks: nn.ModuleDict, args: argparse.Namespace, updates: float):
        self.args, self.actor, self.critic = args, networks["actor"], networks["critic"]
        self.actor_target, self.critic_target = target_of(self.actor), target_of(self.critic)
        self.actor_opt, self.critic_opt = Adam(self.actor, args.lr), Adam(self.critic, args.lr)

    def explore(self, state: Tensor, noise: Tensor) -> Tensor:
        return (self.actor(state) + self.args.exploration_noise * noise).clamp(-1, 1)

    def draw(self, generators: list[torch.Generator], batch_size: int) -> Tensor:
        return normal(generators, batch_size, self.actor[-1].out_features)

    def update(self, batch: Batch, noise: Tensor, delayed: bool) -> dict[str, Tensor]:
        a = self.args
        next_value = td3_next_value(
            self.critic_target, self.actor_target, batch, noise, a.policy_noise, a.noise_clip)
        critic_loss = bellman_loss(self.critic, batch, next_value, a.discount)
        losses = {"critic_loss": descend(self.critic_opt, critic_loss)}
        if delayed:
            actor_loss = td3bc_actor_loss(self.actor, self.critic, batch, a.td3bc_alpha)
            losses["actor_loss"] = descend(self.actor_opt, actor_loss)
            polyak_update(self.critic_target, self.critic, a.polyak)
            polyak_update(self.actor_target, self.actor, a.polyak)
        return losses


def iql_value_loss(value: nn.Module, q: Tensor, batch: Batch, expectile: float) -> Tensor:
    """V(s) as an upper expectile of q = Q(s, a) (B,) over the data's actions (IQL's Eq. 5)."""
    error = q - value(batch.state).squeeze(-1)  # (B,)
    return (torch.where(error > 0, expectile, 1 - expectile) * error**2).mean(-1)


def iql_actor_loss(actor: GaussianActor, value: nn.Module, q: Tensor, batch: Batch, beta: float,
                   keep: Tensor | None = None) -> Tensor:
    """Advantage-weighted regression (IQL's Eq. 7) towards ã, with q = Q(s, ã) (B,): point 6."""
    with torch.no_grad():
        weight = (beta * (q - value(batch.state).squeeze(-1))).exp().clamp(max=100)  # (B,)
    return -(weight * actor.log_prob(batch.state, batch.preferred, keep)).mean(-1)


class IQL:
    """Implicit Q-learning (Kostrikov et al. 2022), in its authors' order: V, policy, Q."""

    @staticmethod
    def networks(state_dim: int, action_dim: int, args: argparse.Namespace) -> nn.ModuleDict:
        return nn.ModuleDict({"actor": GaussianActor(state_dim, action_dim, args.iql_dropout),
                              "critic": Critic(state_dim, action_dim),
                              "value": MLP(state_dim, 256, 256, 1)})

    def __init__(self, networks: nn.ModuleDict, args: argparse.Namespace, updates: float):
        self.args, self.updates = args, updates
        self.actor, self.critic, self.value = networks.values()
        self.critic_target, self.value_opt = target_of(self.critic), Adam(self.value, args.lr)
        self.actor_opt, self.critic_opt = Adam(self.actor, args.lr), Adam(self.critic, args.lr)

    def explore(self, state: Tensor, noise: Tensor) -> Tensor:
        return (self.actor(state) + self.actor.std() * noise).clamp(-1, 1)

    def draw(self, generators: list[torch.Generator], batch_size: int) -> Tensor | None:
        return self.actor.draw(generators, batch_size)

    def update(self, batch: Batch, noise: Tensor | None, delayed: bool) -> dict[str, Tensor]:
        a = self.args
        with torch.no_grad():
            q = self.critic_target(batch.state, batch.action).amin(-1)  # (B,)
            q_preferred = q if batch.preferred is batch.action else self.critic_target(
                batch.state, batch.preferred).amin(-1)
        value_loss = descend(
            self.value_opt, iql_value_loss(self.value, q, batch, a.iql_expectile))
        actor_loss = descend(self.actor_opt, iql_actor_loss(
            self.actor, self.value, q_preferred, batch, a.iql_beta, noise))
        cosine = torch.cos(self.actor_opt.t * (math.pi / self.updates))
        self.actor_opt.lr.copy_(a.lr * (1 + cosine) / 2)
        with torch.no_grad():
            next_value = self.value(batch.next_state).squeeze(-1)  # no action at s' is needed
        critic_loss = descend(
            self.critic_opt, bellman_loss(self.critic, batch, next_value, a.discount))
        polyak_update(self.critic_target, self.critic, a.polyak)
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "value_loss": value_loss}


@torch.no_grad()
def sac_next_value(critic_target: nn.Module, actor: SquashedActor, temperature: Tensor,
                   batch: Batch, noise: Tensor) -> Tensor:
    """The smaller target Q of a sampled action, and its entropy bonus -> (B,)."""
    action, log_prob = actor.sample(batch.next_state, noise)
    return critic_target(batch.next_state, action).amin(-1) - temperature.unsqueeze(-1) * log_prob


def sac_actor_loss(actor: SquashedActor, critic: nn.Module, temperature: Tensor, batch: Batch,
                   noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the sampled actions' log-probabilities (B,)."""
    action, log_prob = actor.sample(batch.state, noise)
    q = critic(batch.state, action).amin(-1)  # (B,)
    return (temperature.unsqueeze(-1) * log_prob - q).mean(-1), log_prob


def sac_temperature_loss(log_temperature: Tensor, log_prob: Tensor,
                         target_entropy: float) -> Tensor:
    """Raises the temperature while the policy's entropy is below the target, in nats."""
    return -log_temperature * (log_prob.detach() + target_entropy).mean(-1)


class SAC:
    """Soft actor-critic (Haarnoja et al. 2018) with rlkit's settings: it trains the black boxes."""

    @staticmethod
    def networks(state_dim: int, action_dim: int, args: argparse.Namespace) -> nn.ModuleDict:
        return nn.ModuleDict({"actor": SquashedActor(state_dim, action_dim),
                              "critic": Critic(state_dim, action_dim),
                              "temperature": nn.ParameterDict({"log": torch.zeros(())})})

    def __init__(self, networks: nn.ModuleDict, args: argparse.Namespace, updates: float):
        self.args, self.actor, self.critic = args, networks["actor"], networks["critic"]
        self.temperature, self.critic_target = networks["temperature"], target_of(self.critic)
        self.temperature_opt = Adam(self.temperature, args.lr)
        self.actor_opt, self.critic_opt = Adam(self.actor, args.lr), Adam(self.critic, args.lr)

    def explore(self, state: Tensor, noise: Tensor) -> Tensor:
        return self.actor.sample(state, noise)[0]

    def draw(self, generators: list[torch.Generator], batch_size: int) -> Tensor:
        return normal(generators, 2, batch_size, self.actor[-1].out_features // 2)

    def update(self, batch: Batch, noise: Tensor, delayed: bool) -> dict[str, Tensor]:
        a, temperature = self.args, self.temperature["log"].detach().exp()
        next_noise, noise = noise.unbind(-3)
        next_value = sac_next_value(
            self.critic_target, self.actor, temperature, batch, next_noise)
        critic_loss = descend(
            self.critic_opt, bellman_loss(self.critic, batch, next_value, a.discount))
        actor_loss, log_prob = sac_actor_loss(self.actor, self.critic, temperature, batch, noise)
        actor_loss = descend(self.actor_opt, actor_loss)
        descend(self.temperature_opt, sac_temperature_loss(
            self.temperature["log"], log_prob, -noise.shape[-1]))
        polyak_update(self.critic_target, self.critic, a.polyak)
        return {"critic_loss": critic_loss, "actor_loss": actor_loss}


ALGORITHMS = {"td3bc": TD3BC, "iql": IQL, "sac": SAC}


# -------------------------------------------------------------------------------------- black boxes


class Units(NamedTuple):
    """How learners see a task: (s - mean) / std, actions from [low, high] mapped to [-1, 1], and
    rewards scaled and shifted."""

    mean: Tensor  # (O,)
    std: Tensor  # (O,)
    low: Tensor  # (A,)
    high: Tensor  # (A,)
    reward_scale: float = 1.0
    reward_shift: float = 0.0

    def state(self, raw: Tensor | np.ndarray) -> Tensor:
        raw = torch.as_tensor(raw, dtype=torch.float32, device=self.mean.device)
        return (raw - self.mean) / self.std

    def raw_state(self, state: Tensor) -> Tensor:
        return state * self.std + self.mean

    def action(self, raw: Tensor) -> Tensor:
        return (raw - (self.high + self.low) / 2) / ((self.high - self.low) / 2)

    def raw_action(self, action: Tensor) -> Tensor:
        return action * ((self.high - self.low) / 2) + (self.high + self.low) / 2

    def reward(self, raw):
        return raw * self.reward_scale + self.reward_shift


class BlackBox:
    """Answers "is a at least as good as b in s?" at most `budget` times: all that OAP learns of it.

    Behind it is q(s, a) -> (B,) of tensors, or prefer(s, a, b) -> (B,) bools of NumPy arrays. Both
    get the environment's numbers, as `units` says. Raises BadInput for other shapes and for NaN.
    """

    def __init__(self, units: Units, budget: float, q: Callable | None = None,
                 prefer: Callable | None = None, returns: float = math.nan):
        self.units, self.budget, self.q, self.prefer = units, budget, q, prefer
        self.returns = returns  # what its file says is its policy's mean return, for the log
        self.asked = self.audited = 0

    def __call__(self, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
        """Eq. 2: True (B,) where the black box finds `action` at least as good as `other`."""
        if self.asked + len(state) > self.budget:
            raise RuntimeError(f"{self.asked:,} + {len(state):,} queries are over {self.budget:,}")
        self.asked += len(state)
        return in_chunks(self._answer, state, action, other)

    def audit(self, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
        """The same outside of the budget and counted apart: nothing that learns may hear it."""
        self.audited += len(state)
        return in_chunks(self._answer, state, action, other)

    def value(self, state: Tensor, action: Tensor) -> Tensor:
        """Q*(s, a) (B,), for Eq. 7 and audits, if there is a `q`."""
        return in_chunks(self._value, state, action)

    def _ask(self, function: Callable, *arguments) -> Tensor | np.ndarray:
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 whatever a user's file or function raises
            raise BadInput(f"black box: {last_line(error)}") from error

    def _value(self, state: Tensor, action: Tensor) -> Tensor:
        value = self._ask(self.q, self.units.raw_state(state), self.units.raw_action(action))
        if value.shape != state.shape[:1] or not value.isfinite().all():
            raise BadInput(f"Q(s, a) of {len(state)} rows must be as many finite numbers")
        return value

    def _answer(self, state: Tensor, action: Tensor, other: Tensor) -> Tensor:
        if self.q is not None:
            return self._value(state, action) >= self._value(state, other)
        raw = (self.units.raw_state(state), *map(self.units.raw_action, (action, other)))
        answer = np.asarray(self._ask(self.prefer, *(x.cpu().numpy() for x in raw)))
        if answer.shape != state.shape[:1] or not np.isin(answer, (0, 1)).all():
            raise BadInput(f"the answer to {len(state)} rows must be as many bools")
        return torch.as_tensor(answer.astype(bool), device=state.device)


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def load_black_box(spec: str, units: Units, budget: float) -> BlackBox:
    """A black box from a file, no pickled code of which is run, or from "module:function".

    Raises BadInput if it can't be read or does not fit the task.
    """
    try:
        if ":" in spec and not Path(spec).is_file():
            module, _, name = spec.rpartition(":")
            sys.path.insert(0, os.getcwd())
            box = BlackBox(units, budget, prefer=getattr(importlib.import_module(module), name))
        else:
            q, returns = load_q(spec, units)
            box = BlackBox(units, budget, q, returns=returns)
        state, action = (x.new_zeros(2, len(x)) for x in (units.mean, units.low))
        box._answer(state, action, action)  # on zeros and not counted: does it fit?
    except Exception as error:  # noqa: BLE001 as above
        text = last_line(error).removeprefix("black box: ")
        raise BadInput(f"black box {spec}, for {len(units.mean)}-dimensional states and"
                       f" {len(units.low)}-dimensional actions: {text}") from error
    return box


def load_q(path: str, units: Units) -> tuple[Callable[[Tensor, Tensor], Tensor], float]:
    """Q*(s, a) of raw states and actions from a file, and its policy's mean return or NaN."""
    load = functools.partial(torch.load, map_location=units.low.device, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any("/code/" in name for name in names):
            script = torch.jit.load(path, map_location=units.low.device).eval()
            return (lambda s, a: script(s, a).reshape(len(s), -1).squeeze(1)), math.nan
        if "policy.pth" in names:  # Stable-Baselines3's, which sees raw states
            if "activation_fn" in str(json.loads(archive.read("data")).get("policy_kwargs")):
                raise BadInput("only Stable-Baselines3's default activation, ReLU, is read")
            saved, returns = load(io.BytesIO(archive.read("policy.pth"))), math.nan
            units = units._replace(mean=units.mean * 0, std=units.std * 0 + 1)
        else:
            saved = load(path)
            units, returns = Units(*saved["units"]), saved["return"]
            saved = {f"critic.{k}": v for k, v in saved["critic"].items()}
    critics = []
    for name in sorted({key[:key.index(".", 7) + 1] for key in saved if key.startswith("critic.")}):
        layers = {k.removeprefix(name): v for k, v in saved.items() if k.startswith(name)}
        widths = [v.shape for k, v in layers.items() if k.endswith("weight")]
        net = MLP(widths[0][1], *(w[0] for w in widths)).to(units.low.device)
        net.load_state_dict(dict(zip(net.state_dict(), layers.values(), strict=True)))
        critics.append(net)
    return (lambda s, a: torch.cat(
        [critic(units.state(s), units.action(a)) for critic in critics], -1).amin(-1)), returns


# --------------------------------------------------------------------------------------------- data

MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
# The first digits of the files' checksums.
SHA256 = {
    "halfcheetah-random-v2": "25407aef85b5", "hopper-random-v2": "63103ef7059d",
    "walker2d-random-v2": "4e863bb6090c", "halfcheetah-medium-v2": "41324e8487a9",
    "hopper-medium-v2": "5bdf1bc4a713", "walker2d-medium-v2": "cf00f43add04",
    "halfcheetah-medium-replay-v2": "48d494a4770c", "hopper-medium-replay-v2": "e121c5f7c985",
    "walker2d-medium-replay-v2": "e75de96a4f77", "halfcheetah-medium-expert-v2": "015db75dae5b",
    "hopper-medium-expert-v2": "9d51ad87f8c9", "walker2d-medium-expert-v2": "6b8d7f868c45",
    "antmaze-umaze-v0": "188838316eab", "antmaze-umaze-diverse-v0": "4aff7f77b97a",
    "antmaze-medium-play-v0": "527385c14b87", "antmaze-medium-diverse-v0": "b77764cac90c",
    "antmaze-large-play-v0": "e37afef5b80b", "antmaze-large-diverse-v0": "dda7acbdde1a",
    "pen-human-v1": "209e345b2150", "pen-cloned-v1": "6d1a982cee19",
    "antmaze-umaze-v2": "5ef15257771c", "antmaze-umaze-diverse-v2": "c771dd63963c",
    "antmaze-medium-play-v2": "c9fec1c1daad", "antmaze-medium-diverse-v2": "ad9dcbac05d1",
    "antmaze-large-play-v2": "6d353df24578", "antmaze-large-diverse-v2": "84f775eb7956",
    "pen-expert-v1": "3791b8ca6a80", "door-human-v1": "f9691288c3dd",
    "door-cloned-v1": "1f6a60ecc4d2", "door-expert-v1": "66df4cd4e0a1",
}


REPLAY = 1_000_000  # own transitions that are sampled where there is no D, the newest (rlkit)
ARRAYS = ("observations", "actions", "rewards", "terminals", "timeouts")  # of a D4RL file


class Data:
    """Transitions in packed rows on the device: D, which all seeds share, then each seed's own.

    To a seed, index i < N is D's row i, and N <= i < size its own (i - N)th.
    """

    def __init__(self, offline: int, room: int, seeds: int, state_dim: int, action_dim: int,
                 device: torch.device):
        self.widths = [state_dim, action_dim, 1, state_dim, 1]
        self.rows = torch.zeros(offline + seeds * room, sum(self.widths), device=device)
        self.state, self.action, self.reward, self.next_state, self.not_done = self.rows.split(
            self.widths, 1)  # views
        self.preferred: Tensor | None = None  # (S, N, A) ã, where it is not always a
        self.offline = self.size = offline  # N
        self.room = room
        self.seed = torch.arange(seeds, device=device)[:, None]  # (S, 1)
        self.window = torch.tensor([0, offline], device=device)  # what is sampled, on the device

    def write(self, row: Tensor | slice, state: Tensor, action: Tensor, reward: Tensor,
              next_state: Tensor, done: Tensor) -> None:
        """Sets n rows to (n, O), (n, A), (n,), (n, O), (n,) bool."""
        self.rows[row] = torch.cat(
            [state, action, reward[:, None], next_state, 1 - done[:, None].float()], 1)

    def append(self, *transition: Tensor) -> None:
        """An own transition of each seed, as in `write`."""
        self.write(self.seed[:, 0] * self.room + self.size, *transition)
        self.size += 1
        self.window[1] = self.size
        if not self.offline:
            self.window[0] = max(0, self.size - REPLAY)

    @property
    def interactions(self) -> int:  # of each seed
        return self.size - self.offline

    def own(self) -> Tensor:
        """The rows (S, n, ...) of all seeds' own transitions, a view."""
        shape = (len(self.seed), self.room, sum(self.widths))
        return self.rows[self.offline :].view(shape)[:, : self.interactions]

    def sample(self, generators: list[torch.Generator], batch_size: int) -> Batch:
        """A batch (S, B, ...) for every seed, uniform over what is its own and D."""
        oldest, size = self.window
        index = oldest + draw_integers(generators, batch_size) % (size - oldest)  # (S, B)
        rows = self.rows[index + self.seed * self.room * (index >= self.offline)]
        state, action, reward, next_state, not_done = rows.split(self.widths, -1)
        preferred = action if self.preferred is None else self.preferred[self.seed, index]
        return Batch(state, action, reward.squeeze(-1), next_state, not_done.squeeze(-1), preferred)


@contextlib.contextmanager
def atomically(path: Path):
    """A temporary name to write to, then renamed: half a file never has the final name."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk's names no file
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def save(path: Path, state: dict) -> None:
    """torch.save, atomically. Raises OSError alone, which torch.save itself does not."""
    torch.save(state, buffer := io.BytesIO())
    with atomically(path) as part:
        part.write_bytes(buffer.getbuffer())


def write_text(path: Path, text: str) -> None:
    with atomically(path) as part:
        part.write_text(text)


def write_dataset(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """D4RL's hdf5: terminals and timeouts are bools, the other ARRAYS float32."""
    import h5py

    with atomically(path) as part, h5py.File(part, "w") as file:
        for key, value in arrays.items():
            value = value.astype(bool if key in ("terminals", "timeouts") else np.float32)
            file.create_dataset(key, data=value, compression="gzip")


def qlearning_dataset(source: str, raw: dict[str, np.ndarray], box, state_dim: int, horizon: int,
                      jump: float = math.inf) -> dict[str, np.ndarray]:
    """What d4rl.qlearning_dataset makes of D4RL's arrays, and its trajectories' returns.

    Timeout rows and the last row are dropped, as nothing follows them. A terminal row has the next
    episode's first observation, which its target masks. Without timeouts, there is one where an
    episode reaches `horizon`. For `returns` alone, a move by more than `jump` metres is an end:
    AntMaze v0's timeouts are not where its episodes end. Raises BadInput unless all arrays fit each
    other and the environment, whose actions are in `box`.
    """
    n = np.size(raw["rewards"])
    shapes = {"observations": (n, state_dim), "actions": (n, *box.shape)}
    for key, value in raw.items():
        expected = shapes.get(key, (n,))
        if value.shape != expected or n < 2:
            raise BadInput(f"dataset {source}: {key} are {value.shape}, not {expected}")
        if value.dtype.kind not in "fiub" or not np.isfinite(value).all():
            raise BadInput(f"dataset {source}: some {key} are not finite numbers")
    if (raw["actions"] < box.low - 1e-5).any() or (raw["actions"] > box.high + 1e-5).any():
        raise BadInput(f"dataset {source}: some actions are outside of the environment's box")
    done = raw["terminals"].astype(bool)
    if "timeouts" in raw:
        timeout = raw["timeouts"].astype(bool)
    else:
        timeout, start, age = np.zeros(n, bool), 0, 0
        for end in (*np.flatnonzero(done), n - 1):
            ages = np.arange(end + 1 - start) + age
            timeout[start : end + 1] = ages % horizon == horizon - 1
            start, age = end + 1, int(not timeout[end])  # d4rl counts from 1 after a terminal
    keep, end = np.flatnonzero(~timeout[:-1]), (done | timeout)[:-1]
    if math.isfinite(jump):
        end |= np.linalg.norm(np.diff(raw["observations"][:, :2], axis=0), axis=1) > jump
    trajectory = np.searchsorted(np.append(np.flatnonzero(end), n - 1), keep)
    returns = np.bincount(trajectory, raw["rewards"][keep])[np.unique(trajectory)]
    return {"state": raw["observations"][keep], "action": raw["actions"][keep],
            "reward": raw["rewards"][keep], "next_state": raw["observations"][keep + 1],
            "done": done[keep], "returns": returns}


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """D4RL's arrays from a file. Raises BadInput if it is missing, broken, or lacks one."""
    import h5py

    try:
        with h5py.File(path) as file:
            if missing := set(ARRAYS) - {"timeouts"} - set(file):
                raise BadInput(f"dataset {path} has no {', '.join(sorted(missing))}")
            return {key: file[key][()] for key in ARRAYS if key in file}
    except (OSError, TypeError) as error:  # TypeError: one is a group
        reason = f"can't be read: {error}" if path.exists() else "does not exist"
        raise BadInput(f"dataset {path} {reason}") from error


def minari_dataset(name: str):
    """The minari.MinariDataset of "minari:ID", downloaded if it is not there."""
    try:
        import minari

        return minari.load_dataset(name.removeprefix("minari:"), download=True)
    except Exception as error:  # noqa: BLE001 whatever its storage and the network raise
        hint = " (pip install 'minari[hdf5,hf]')" * isinstance(error, ImportError)
        raise BadInput(f"{name}: {str(error).strip() or type(error).__name__}{hint}") from error


def read_minari(name: str) -> dict[str, np.ndarray]:
    """D4RL's arrays from Minari: each episode's last observation becomes a timeout row."""
    pad, arrays = {"observations": 0, "actions": 1, "rewards": 1, "terminations": 1}, {}
    episodes = list(minari_dataset(name).iterate_episodes())
    if not isinstance(episodes[0].observations, np.ndarray):
        raise BadInput(f"{name}: its observations are no vectors")
    for key, rows in pad.items():
        padded = [np.pad(x := getattr(e, key), [(0, rows)] + [(0, 0)] * (x.ndim - 1))
                  for e in episodes]
        arrays[key.replace("terminations", "terminals")] = np.concatenate(padded)
    ends = np.cumsum([len(e.observations) for e in episodes]) - 1
    return arrays | {"timeouts": np.isin(np.arange(ends[-1] + 1), ends)}


def load_dataset(task: str, path: Path | None = None) -> dict[str, np.ndarray]:
    """D4RL's arrays of one of its tasks, from `path`, or its folder, or the network.

    The folder is D4RL_DATASET_DIR, or else ~/.d4rl/datasets. A download comes from D4RL's server or
    a mirror (first D4RL_MIRROR, a URL, if set) and gets its name after its checksum was verified. A
    file that is there already is used in any case, with a warning if it is not D4RL's.
    """
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    url, sha256 = d4rl_infos().DATASET_URLS[task], SHA256.get(task, "")
    name = url.rpartition("/")[2]
    path = path or next((p for p in (folder / name, folder / f"{task}.hdf5") if p.is_file()), None)
    if path is None:
        mirrors = (os.environ.get("D4RL_MIRROR"), url.rpartition("/")[0], MIRROR)
        path = download([f"{mirror}/{name}" for mirror in mirrors if mirror], folder / name, sha256)
    arrays = read_hdf5(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if not digest.hexdigest().startswith(sha256):
        print(f"warning: {path} is used, but is not D4RL's file of {task}", file=sys.stderr)
    return arrays


def download(sources: list[str], path: Path, sha256: str) -> Path:
    """Fetches the first source that works; nothing unchecked or half-written is left behind."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    timeout, failures = socket.getdefaulttimeout(), []
    socket.setdefaulttimeout(30)  # of silence; torch.hub would wait forever
    try:
        for source in sources:
            print(f"downloading {source} to {path}")
            try:
                with atomically(path) as part:
                    torch.hub.download_url_to_file(source, str(part), sha256 or None)
                    h5py.File(part).close()  # it can be opened
                return path
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                failures.append(f"{source}: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise BadInput(f"no dataset: {'; '.join(failures)}. Put the file at {path}, or name it with"
                   " --dataset")


# ------------------------------------------------------------------------------------- environments


class Robot(NamedTuple):
    domain: str  # a column of DOMAIN_DEFAULTS
    gym_id: str
    horizon: int  # D4RL's
    maze: str = ""  # 1 wall, r start, g goal, / next row; `play` and `diverse` differ in data alone


# Locomotion is -v4: -v5 changed the rewards. Ant-v5 can be told AntMaze's observation, -v4 can't.
ROBOTS = {
    "hopper": Robot("gym", "Hopper-v4", 1000),
    "walker2d": Robot("gym", "Walker2d-v4", 1000),
    "halfcheetah": Robot("gym", "HalfCheetah-v4", 1000),
    "antmaze-umaze": Robot("antmaze", "Ant-v5", 700, "11111/1r001/11101/1g001/11111"),
    "antmaze-medium": Robot("antmaze", "Ant-v5", 1000,
        "11111111/1r011001/10010001/11000111/10010001/10100101/100010g1/11111111"),
    "antmaze-large": Robot("antmaze", "Ant-v5", 1000, "111111111111/1r0001000001/101101010101"
        "/100000010001/101111011101/100101000001/110101010111/100100010g01/111111111111"),
    "pen": Robot("adroit", "AdroitHandPen-v1", 100),
    "door": Robot("adroit", "AdroitHandDoor-v1", 200),
}
VERSIONS = {"gym": "-v2", "antmaze": ("-v0", "-v2"), "adroit": "-v1"}  # of D4RL's tasks


def d4rl_robot(robot: str) -> str:
    """ROBOTS' name of a Gymnasium id, or the id itself."""
    return next((k for k, r in ROBOTS.items() if r.gym_id == robot and not r.maze), robot)


class Task(NamedTuple):
    name: str  # hopper-medium-v2, Hopper-v4:medium
    domain: str
    robot: str  # hopper, Hopper-v4: whose black box fits
    quality: str  # of a local task; "" for D4RL's
    scored_as: str  # the task of D4RL with the same reference returns, if there is one


def parse_task(name: str) -> Task:
    """Raises BadInput for all but D4RL's locomotion, AntMaze, pen and door, local, and Minari's."""
    if name.startswith("minari:"):
        robot = next((r for r in ("pen", "door") if name.startswith(f"minari:D4RL/{r}/")), name)
        return Task(name, "gym" if robot == name else "adroit", robot, "", f"{robot}-human-v1")
    gym_id, colon, quality = name.rpartition(":")
    if colon and quality not in QUALITIES:
        raise BadInput(f"{name}: the quality {quality!r} is none of {', '.join(QUALITIES)}")
    if colon:
        domain, data = (
            ("adroit", "human-v1") if gym_id.startswith("AdroitHand") else ("gym", "medium-v2"))
        return Task(name, domain, gym_id, quality, f"{d4rl_robot(gym_id)}-{data}")
    for robot, r in ROBOTS.items():
        if (name.startswith(f"{robot}-") and name.endswith(VERSIONS[r.domain])
                and name in d4rl_infos().DATASET_URLS):
            return Task(name, r.domain, robot, "", name)
    raise BadInput(f"unknown task {name!r}: neither D4RL's (hopper-medium-v2, antmaze-umaze-v0,"
                   " pen-human-v1, ...) nor GYMNASIUM_ID:QUALITY (Hopper-v4:medium-replay) nor"
                   " minari:ID (minari:D4RL/pen/human-v2)")


def d4rl_infos():
    """d4rl's module of URLs and scores, without d4rl's __init__, which needs mujoco-py."""
    package = importlib.util.find_spec("d4rl")
    if package is None:
        raise BadInput("d4rl is not installed: pip install --no-deps d4rl==1.1")
    path = Path(package.submodule_search_locations[0], "infos.py")
    return argparse.Namespace(**runpy.run_path(str(path)))


def restore_capsules(model, xml_path: str) -> None:
    """Gives a mujoco.MjModel, compiled from `xml_path`, the inertias of MuJoCo 2.1.0.

    There, a capsule of radius r and cylinder length h has the mass and inertia of a solid cylinder
    of length h + r. A compiled model has forgotten densities, `settotalmass` and explicit inertias,
    so the compiler is asked again, with such cylinders in the file. Contacts stay capsules'.
    """
    import mujoco

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


@functools.cache  # `warnings` itself forgets what it said when make_env changes its filters
def warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def restore_physics(env) -> None:
    """Undoes what MuJoCo changed after 2.1.0 for one of D4RL's robots."""
    import mujoco

    robot = env.spec.name
    model, version = env.unwrapped.model, tuple(map(int, mujoco.__version__.split(".")[:2]))
    if not robot.startswith("Adroit"):  # whose capsules are all in bodies with explicit inertias
        restore_capsules(model, env.unwrapped.fullpath)
    for flag in ("mjDSBL_NATIVECCD", "mjDSBL_MULTICCD"):  # unknown to, and off in, old releases
        model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, flag, 0))
    # The last releases that replayed recordings of the original simulator exactly: in 3.5, a
    # contact's margin changed.
    if version > ((3, 1) if robot == "AdroitHandDoor" else (3, 4)):
        warn_once(f"MuJoCo {mujoco.__version__} is not known to be D4RL's for {robot}, 3.1.6 is")


def maze_cells(maze: str, kind: str) -> np.ndarray:
    """Centres (n, 2) in metres of one kind of a maze's cells, 4 m wide; the start is the origin."""
    grid = np.array([list(row) for row in maze.split("/")])
    return 4.0 * (np.argwhere(grid == kind) - np.argwhere(grid == "r"))[:, ::-1]


def write_ant_maze(maze: str, path: str) -> None:
    """D4RL's ant in a maze: Gymnasium's ant differs in the three values set here."""
    import gymnasium.envs.mujoco

    assets = Path(gymnasium.envs.mujoco.__file__).parent / "assets"
    root = ElementTree.parse(assets / "ant.xml").getroot()
    root.find("option").set("timestep", "0.02")
    root.find("default/geom").set("solimp", ".8 .8 .01")
    for motor in root.iter("motor"):
        motor.set("gear", "30")  # D4RL: gear 1, and actions in [-1, 1] scaled to controls of +-30
    for x, y in maze_cells(maze, "1"):
        block = {"type": "box", "size": "2 2 1", "pos": f"{x} {y} 1", "conaffinity": "1"}
        ElementTree.SubElement(root.find("worldbody"), "geom", block)
    ElementTree.ElementTree(root).write(path)


def make_env(task: str, physics: str = "exact"):
    """The gymnasium.Env of --env, with Box spaces.

    A D4RL task has D4RL's observation, actions, reward, termination, horizon, start and goal, and
    so has a local one of its robots (AdroitHandPen-v1:medium), but for AntMaze's.
    `physics` is "exact" for the robots that D4RL's data came from, "stock" for today's.
    """
    import gymnasium as gym

    robot = d4rl_robot(parse_task(task).robot)
    _, gym_id, horizon, maze = ROBOTS.get(robot, Robot("gym", robot, 0))

    class D4RLRules(gym.Wrapper):  # here because gymnasium is only imported here
        """What D4RL's task has and Gymnasium's has not."""

        def reset(self, **kwargs):
            state, info = self.env.reset(**kwargs)
            if maze:
                # MuJoCo 2.1 to 3.1 normalise the noisy start's quaternion in place, 3.3 does not.
                quaternion = self.unwrapped.data.qpos[3:7]
                quaternion /= np.linalg.norm(quaternion)
                state[3:7] = quaternion
                # As D4RL's v2, also for v0, which drew one goal for a whole process.
                random = self.unwrapped.np_random
                self.goal = (maze_cells(maze, "g")[0] + random.uniform(0, 1, 2)
                             + random.uniform(0, 0.5, 2))
            return state, info

        def step(self, action):
            state, reward, terminal, truncated, info = self.env.step(action)
            if maze:
                terminal = bool(np.linalg.norm(state[:2] - self.goal) <= 0.5)
                reward = float(terminal)
            elif robot == "pen":  # dropped; its reward of -5 is there already
                terminal = bool(state[26] < 0.075)
            elif robot == "door":  # in full: the distance's sign depends on the release
                hinge, speed = state[28], self.unwrapped.data.qvel
                reward = (-0.1 * np.linalg.norm(state[35:38]) - 0.1 * (hinge - 1.57) ** 2
                          - 1e-5 * np.sum(speed**2) + 2 * (hinge > 0.2) + 8 * (hinge > 1.0)
                          + 10 * (hinge > 1.35))
            return state, float(reward), terminal, truncated, info

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # D4RL's rewards are -v4's
        options = {"max_episode_steps": horizon} if horizon else {}
        if maze:
            write_ant_maze(maze, f"{folder}/ant_maze.xml")
            options |= {"xml_file": f"{folder}/ant_maze.xml",
                        "include_cfrc_ext_in_observation": False,
                        "exclude_current_positions_from_observation": False}
        try:
            if gym_id.startswith("AdroitHand"):
                import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
            if robot == task:  # a Minari dataset of other robots
                env = minari_dataset(task).recover_environment()
            else:
                env = gym.make(gym_id, disable_env_checker=True, **options)
        except (gym.error.Error, ImportError) as error:
            raise BadInput(f"environment {gym_id}: {error}") from error
        for name, space in (("actions", env.action_space), ("observations", env.observation_space)):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise BadInput(f"environment {gym_id}: its {name} are {space}, not a vector (Box)")
        if not env.action_space.is_bounded():
            raise BadInput(f"environment {gym_id}: its actions have no bounds")
        if env.spec.max_episode_steps is None:
            raise BadInput(f"environment {gym_id}: its episodes have no time limit")
        if physics == "exact" and robot in ROBOTS:
            restore_physics(env)
    return D4RLRules(env) if robot in ROBOTS else env


def make_envs(task: Task, args: argparse.Namespace) -> list:
    """For evaluation, at most 10 copies of the task's environment for each seed."""
    return [make_env(task.name, args.physics)
            for _ in range(len(args.seeds) * min(args.eval_episodes, 10))]


def reference_returns(args: argparse.Namespace, task: Task) -> tuple[float, float]:
    """The returns that score 0 and 100: d4rl's, Minari's, or a random and the expert policy's.

    NaN, and so are all scores, where there are none, and for a local task without its expert yet.
    """
    infos, path = d4rl_infos(), expert_folder(args, task) / "scores.json"
    if task.scored_as in infos.REF_MIN_SCORE:
        return infos.REF_MIN_SCORE[task.scored_as], infos.REF_MAX_SCORE[task.scored_as]
    known, names = {}, ("random", "expert")
    if task.name.startswith("minari:"):
        known = minari_dataset(task.name).storage.metadata
        names = ("ref_min_score", "ref_max_score")
    elif args.scheme != "expert" and path.is_file():
        known = json.loads(path.read_text())
    return tuple(float(known.get(name, "nan")) for name in names)


# --------------------------------------------------------------------------------------- evaluation

Policy = Callable[[np.ndarray], np.ndarray]  # raw states (E, O) -> raw actions (E, A)


def raw_policy(act: Callable[[Tensor], Tensor], units: Units) -> Policy:
    """`act`, which speaks the networks' units, for an environment."""

    @torch.no_grad()
    def policy(state: np.ndarray) -> np.ndarray:
        return units.raw_action(act(units.state(state))).cpu().numpy()

    return policy


def rollout(envs: list, policy: Policy, seeds: Iterable[int]) -> dict[str, np.ndarray]:
    """An episode in each of the E environments: D4RL's arrays, one episode after the other.

    Also "returns" (E,), undiscounted. The policy is asked for all environments at once; only those
    whose episode goes on are stepped.
    """
    state = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    episodes, alive = [[] for _ in envs], np.ones(len(envs), bool)
    while alive.any():
        action = policy(state)
        for i in np.flatnonzero(alive):
            next_state, reward, terminal, truncated, _ = envs[i].step(action[i])
            episodes[i].append(
                (state[i].copy(), action[i], reward, terminal, truncated and not terminal))
            state[i], alive[i] = next_state, not (terminal or truncated)
    columns = zip(*itertools.chain.from_iterable(episodes), strict=True)
    arrays = {name: np.array(column) for name, column in zip(ARRAYS, columns, strict=True)}
    return arrays | {"returns": np.array([sum(row[2] for row in rows) for rows in episodes])}


def evaluate(envs: list, policy: Policy, episodes: int, seeds: Sequence[int]) -> np.ndarray:
    """Returns (S, episodes) of S policies, which have as many environments each, in their order."""
    each = len(envs) // len(seeds)
    waves = [rollout(envs, policy, (seed + first + i for seed in seeds for i in range(each)))
             for first in range(0, episodes, each)]
    return np.hstack([wave["returns"].reshape(len(seeds), each) for wave in waves])[:, :episodes]


def audit(policy: Callable[[Tensor], Tensor], state: Tensor, action: Tensor, asked: Tensor,
          black_box: BlackBox, ranknet: nn.Module | None, path: Path) -> dict[str, float]:
    """Figure 6, as an npz: divergence and value gain Q*(s, π(s)) - Q*(s, a), (N,), of all of D.

    Returns RankNet's accuracy on samples that were never asked, and what always answering "the
    policy" would have there.
    """
    pi = in_chunks(policy, state)
    prefers_data = black_box.audit(state, action, pi)
    arrays = {"divergence": divergence(action, pi), "asked": asked, "prefers_data": prefers_data}
    if black_box.q is not None:
        arrays["value_gain"] = black_box.value(state, pi) - black_box.value(state, action)
    np.savez_compressed(npz := io.BytesIO(), **{k: v.cpu().numpy() for k, v in arrays.items()})
    with atomically(path) as part:
        part.write_bytes(npz.getvalue())
    log = {"unasked_prefer_policy": 1 - prefers_data[~asked].float().mean().item()}
    if ranknet is not None:
        guess = in_chunks(lambda *x: pseudo_query(ranknet, *x), state, action, pi)
        log["ranknet_accuracy"] = (guess == prefers_data)[~asked].float().mean().item()
    return log


# ----------------------------------------------------------------------------------------- training

COLUMNS = (
    "step", "score", "return", "interactions", "queries", "prefers_policy", "divergence", "bound",
    "ranknet_loss", "ranknet_accuracy", "unasked_prefer_policy", "audited", "critic_loss",
    "actor_loss", "value_loss", "updates_per_second", "evaluation_share", "oap_share", "seconds",
)


def load_data(args: argparse.Namespace, task: Task, box, state_dim: int,
              horizon: int) -> tuple[Data, Units, float]:
    """D, with room for interactions, in the learners' units; these; and D's mean raw return."""
    scheme, n, behaviour, scale = SCHEMES[args.scheme], 0, math.nan, 1.0
    mean, std = np.zeros(state_dim), np.ones(state_dim)
    if scheme.data:
        file = Path(args.dataset) if args.dataset else None
        if task.quality:
            arrays = read_hdf5(file or expert_folder(args, task) / f"{task.quality}.hdf5")
        elif task.name.startswith("minari:"):
            arrays = read_hdf5(file) if file else read_minari(task.name)
        else:
            arrays = load_dataset(task.name, file)
        jump = 1.0 if task.domain == "antmaze" else math.inf
        raw = qlearning_dataset(file or task.name, arrays, box, state_dim, horizon, jump)
        n, behaviour = len(raw["reward"]), float(raw["returns"].mean())
        if args.normalize:
            mean, std = raw["state"].mean(0), raw["state"].std(0) + 1e-3
        if args.reward_scale:
            scale = 1000 / (np.ptp(raw["returns"]) or 1000)
    units = Units(*(torch.as_tensor(x, dtype=torch.float32, device=args.device)
                    for x in (mean, std, box.low, box.high)), float(scale), args.reward_shift)
    room, seeds = args.budget if scheme.interacts else 0, len(args.seeds)
    data = Data(n, room, seeds, state_dim, len(box.low), torch.device(args.device))
    if scheme.data:
        action, reward, done = (torch.as_tensor(raw[k], device=args.device)
                                for k in ("action", "reward", "done"))
        limit = 1 - 1e-5 if args.algo == "iql" else 1.0
        data.write(slice(n), units.state(raw["state"]), units.action(action).clamp(-limit, limit),
                   units.reward(reward), units.state(raw["next_state"]), done)
    if scheme.asks:
        data.preferred = data.action.repeat(seeds, 1, 1)  # Algorithm 1: ã_i = a_i
    return data, units, behaviour


class Interaction:
    """The training environments, one for each seed, which only schemes that interact have."""

    def __init__(self, envs: list, units: Units, data: Data, seeds: Sequence[int]):
        self.envs, self.units, self.data = envs, units, data
        states = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
        self.state = np.stack(states)  # (S, O), raw

    @torch.no_grad()
    def step(self, explore: Callable | None, generators: list[torch.Generator]) -> None:
        """A step of each, with explore(state, noise), or uniformly random if that is None."""
        low, device = self.units.low, self.units.low.device
        if explore is None:
            action = torch.stack([torch.rand(len(low), generator=g, device=device) * 2 - 1
                                  for g in generators])  # (S, A)
        else:
            state = self.units.state(self.state).unsqueeze(1)  # (S, 1, O)
            action = explore(state, normal(generators, 1, len(low))).squeeze(1)
        raw = self.units.raw_action(action).cpu().numpy()
        steps = [env.step(a) for env, a in zip(self.envs, raw, strict=True)]
        next_state, reward, terminal, truncated, _ = map(np.array, zip(*steps, strict=True))
        reward = self.units.reward(torch.as_tensor(reward, dtype=torch.float32, device=device))
        self.data.append(self.units.state(self.state), action, reward,
                         self.units.state(next_state), torch.as_tensor(terminal, device=device))
        self.state = next_state
        for i in np.flatnonzero(terminal | truncated):
            self.state[i] = self.envs[i].reset()[0]


class Log:
    """A run's config.json, progress.csv with a row for each evaluation, and lines on the screen."""

    def __init__(self, folder: Path, zero: float, hundred: float):
        self.folder, self.zero, self.hundred = folder, zero, hundred
        self.rows: list[dict[str, float]] = []
        self.row: dict[str, float] = {}
        self.trackers: list[Callable[[dict, int], None]] = []

    def begin(self, args: argparse.Namespace, protocol: dict) -> None:
        """Clears what an earlier run left, and writes config.json."""
        packages = ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics")
        versions = {d.name: d.version for d in importlib.metadata.distributions()
                    if d.name in packages} | {"commit": commit()}
        for name in ("model*.pt", "checkpoint.pt", "progress.csv", "audit-*.npz", "scores.json",
                     "*.hdf5"):
            for old in self.folder.glob(name):
                old.unlink()
        config = {"args": vars(args), "protocol": protocol, "versions": versions}
        write_text(self.folder / "config.json", json.dumps(finite(config), indent=2))

    def score(self, value: float) -> float:
        """D4RL's normalised score of a return."""
        return 100 * (value - self.zero) / (self.hundred - self.zero)

    def write(self, step: int, updates: int, value: float, times: dict[str, float]) -> None:
        """Completes `row` with the mean return `value` and `times`, and writes and prints it."""
        from tqdm import tqdm

        self.row |= {"step": step, "return": value, "score": self.score(value), **times}
        self.rows.append(self.row)
        self.write_rows()
        for track in self.trackers:
            track(self.row, step)
        left = tqdm.format_interval(self.row["seconds"] / step * (updates - step))
        known = finite(self.row)
        shown = [f"{k} {known[k]:,.5g}" for k in COLUMNS[1:-1] if known.get(k) is not None]
        tqdm.write("  ".join(
            [f"seed {self.folder.name}", f"step {step:,}", f"left {left}", *shown]))
        self.row = {}

    def write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(finite, self.rows))
        write_text(self.folder / "progress.csv", text.getvalue())


def trackers(args: argparse.Namespace, folder: Path, step: int) -> list[Callable]:
    """track(row, step) of TensorBoard and W&B, if asked for; a run continues after `step`."""
    found = []
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder), purge_step=step + 1)

        def write(row: dict[str, float], step: int) -> None:
            for name, value in row.items():
                board.add_scalar(name, value, step)
            board.flush()

        found.append(write)
    if args.wandb:
        import wandb

        try:
            run = wandb.init(project="oap", name=str(folder), id=re.sub(r"\W", "-", str(folder)),
                             resume="allow", config=vars(args), dir=folder, reinit="create_new")
        except wandb.Error as error:  # no login, no network
            raise BadInput(f"--wandb: {last_line(error)}") from error
        found.append(lambda row, step: run.log(row, step))
    return found


class Clock:
    """A run's seconds, and how many of them evaluation and OAP took; the rest went to updates."""

    def __init__(self, step: int = 0, seconds: float = 0.0, evaluation: float = 0.0,
                 oap: float = 0.0):
        self.started = time.time() - seconds
        self.spent = {"evaluation": evaluation, "oap": oap}
        self.last = step, seconds - evaluation - oap

    @contextlib.contextmanager
    def measure(self, what: str):
        started = time.time()
        yield
        self.spent[what] += time.time() - started

    def row(self, step: int) -> dict[str, float]:
        """What to log. Updates per second are each seed's, since the last row."""
        seconds = time.time() - self.started
        (last_step, last), self.last = self.last, (step, seconds - sum(self.spent.values()))
        speed = (step - last_step) / max(self.last[1] - last, 1e-9)
        return {"updates_per_second": round(speed, 1), "seconds": round(seconds, 2)} | {
            f"{what}_share": round(x / seconds, 4) for what, x in self.spent.items()}


def finite(x):
    """x with None for every number that is not finite, for JSON and CSV know no NaN."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def commit() -> str:
    """This file's git commit, if it is in a repository."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def read_progress(path: Path) -> list[dict[str, float]]:
    """A progress.csv's rows. Raises BadInput if it is not whole."""
    text = path.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not text.endswith("\n") or None in rows[-1].values():
        raise BadInput(f"{path} has no row yet, or half a row; --overwrite runs anew")
    return [{k: float(v or "nan") for k, v in row.items()} for row in rows]


def read_config(folder: Path) -> dict:
    """The arguments of a folder's run, {} if it has none. Raises BadInput if they can't be read."""
    try:
        if not any((folder / name).is_file() for name in (
                "config.json", "progress.csv", "checkpoint.pt", "model.pt")):
            return {}
        args = json.loads((folder / "config.json").read_text())["args"]
        return args | {"seeds": list(args["seeds"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{folder}/config.json can't be read, so nothing tells what its run is:"
                       " --overwrite runs anew") from error


def default_expert(args: argparse.Namespace, task: Task) -> str:
    """The black box of the task's robot: what --scheme expert made here, of seed 0 and without a
    tag, or else the shipped one."""
    trained, shipped = expert_folder(args, task) / "model.pt", shipped_expert(task.robot)
    return os.path.relpath(shipped if shipped.is_file() and not trained.is_file() else trained)


def column(args: argparse.Namespace) -> str:
    """A run's column in the paper's tables: its scheme, and where it departs from that scheme."""
    scheme = SCHEMES[args.scheme]
    variant = {args.timing: args.timing != scheme.timing,
               "inf": scheme.asks and math.isinf(args.budget),
               "no-ranknet": scheme.asks and not args.ranknet}
    return "-".join([args.scheme, *(name for name, differs in variant.items() if differs)])


def run_folder(args: argparse.Namespace, task: Task, seed: int) -> Path:
    """<out>/<env>/<algo>-<column>[-tag]/<seed>."""
    name = f"{args.algo}-{column(args)}" + (f"-{args.tag}" if args.tag else "")
    env = task.robot if args.scheme == "expert" else task.name
    return Path(args.out, re.sub(r"[^\w.-]", "-", env), name, str(seed))


def shipped_expert(robot: str, which: str = "") -> Path:
    """This project's own black box of a robot, or a weaker one; there may be none."""
    return Path(__file__).parent / "experts" / f"{d4rl_robot(robot)}{which}.pt"


def expert_folder(args: argparse.Namespace, task: Task) -> Path:
    """Where a local task's data is: with the SAC run that trained its black box, or, if there is
    none and shipped ones exist, with what these made, which can't be medium-replay."""
    robot = Path(args.out, re.sub(r"[^\w.-]", "-", task.robot))
    trained, shipped = robot / "sac-expert" / "0", shipped_expert(task.robot, "-medium").is_file()
    if shipped and not trained.exists() and task.quality != "medium-replay":
        return robot / f"shipped-{args.physics}-{args.dataset_size}" / "0"
    return trained


# Arguments that leave a seed's numbers alone.
FREE = {"overwrite", "device", "out", "seeds", "compile", "cuda_graph", "checkpoint_every",
        "tensorboard", "wandb", "benchmark", "report"}


def decisive(args: argparse.Namespace) -> dict:
    """The arguments that change a run's numbers."""
    same = FREE | {"env"} if args.scheme == "expert" else FREE  # a robot's tasks share an expert
    return {k: v for k, v in finite(vars(args)).items() if k not in same}


def refuse_others(path: Path, old: dict, new: dict, how: str) -> None:
    """Raises BadInput if what made the run at `path` is not the same, naming what is another."""
    for name, value in new.items():
        if old.get(name) != value:
            flag = name if " " in name else f"--{name.replace('_', '-')}"
            raise BadInput(f"{path} has a run with {flag} {old.get(name)}, not {value}: {how}")


def unfinished(args: argparse.Namespace, task: Task) -> list[int]:
    """Which of --seeds are left to train. Raises BadInput if another run is in their folders."""
    if args.overwrite:
        return args.seeds
    left, begun = [], set()
    for seed in args.seeds:
        folder = run_folder(args, task, seed)
        if old := read_config(folder):
            refuse_others(folder, old, decisive(args), "use --tag for another, or --overwrite")
            if (folder / "model.pt").is_file():
                print(f"{folder} is finished")
                continue
            begun.add(tuple(old["seeds"]))
        left.append(seed)
    if not begun:
        return left
    together = begun.pop()
    if begun or not set(left) <= set(together) <= set(args.seeds):
        raise BadInput(f"{folder.parent} has a run begun with --seeds"
                       f" {' '.join(map(str, together))}: continue that one, or --overwrite")
    return list(together)  # all of them, also if it was stopped while it wrote its results


@contextlib.contextmanager
def locked(folders: list[Path], wait: bool):
    """Makes the folders, and keeps other processes that do the same out of them meanwhile."""
    import fcntl

    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait:
                    raise BadInput(f"another process trains in {folder}") from error
                print(f"waits for the process that trains in {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def stop_signals():
    """A list that Ctrl-C and SIGTERM append to, to be heeded between updates.

    One that comes over two seconds after the first is heeded at once: run_all.sh and a terminal
    may both send the first.
    """
    received: list[float] = []

    def handle(number: int, frame) -> None:
        received.append(time.time())
        if received[-1] > received[0] + 2:
            raise KeyboardInterrupt

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def prepare_local_task(args: argparse.Namespace, task: Task, envs: list) -> None:
    """Makes ID's black box and datasets, if this run needs any of that and lacks it."""
    scheme, folder = SCHEMES[args.scheme], expert_folder(args, task)
    needed = (scheme.data and not args.dataset
              or (scheme.asks or args.audit) and not args.expert
              and not Path(default_expert(args, task)).is_file()
              or math.isnan(reference_returns(args, task)[0]))
    if not task.quality or args.scheme == "expert" or not needed:
        return
    trained, there = folder.parent.name == "sac-expert", (folder / "scores.json").is_file()
    if trained and there:  # scores.json, after the datasets
        made = {name: getattr(args, name) for name in ("expert_steps", "dataset_size", "physics")}
        refuse_others(folder, read_config(folder), made, "give that, or another --out")
    elif trained:
        print(f"{folder} has no black box and no data yet: first, SAC trains for"
              f" {args.expert_steps:,} steps (each line says how long is left)")
        same = ("out", "device", "physics", "expert_steps", "dataset_size", "eval_every",
                "checkpoint_every")
        train(parse_args(["--scheme=expert", f"--env={task.name}"] + [
            f"--{name.replace('_', '-')}={getattr(args, name)}" for name in same]), wait=True)
    else:
        with locked([folder], wait=True):
            if not (folder / "scores.json").is_file():
                print(f"{folder} has no data yet: first, the shipped black boxes make it")
                records = [load_sac(shipped_expert(task.robot, which), args.device)
                           for which in ("-medium", "")]
                make_datasets(args, folder, envs[:10], records, {})


def load_sac(path: Path, device: str) -> tuple[SquashedActor, dict]:
    """The policy of a model's file that SAC wrote, and all that is in the file."""
    saved = torch.load(path, device, weights_only=True)
    actor = SquashedActor(len(saved["units"][0]), len(saved["units"][2])).to(device)
    actor.load_state_dict(saved["actor"])
    return actor, saved


def make_datasets(args: argparse.Namespace, folder: Path, envs: list,
                  records: list[tuple[SquashedActor, dict]],
                  history: dict[str, np.ndarray]) -> None:
    """D4RL's recipe: the datasets of all QUALITIES, and scores.json, from the history of a SAC run.

    records: `load_sac` of the evaluations that were the best so far; the last one is the expert.
    history: D4RL's arrays of the run's own transitions, or nothing, which makes no medium-replay.
    "medium" is the first record a third of the way from a random policy's to the expert's return.
    """
    best, size = records[-1][1], args.dataset_size
    units, final = Units(*best["units"]), best["return"]
    generator = torch.Generator(units.low.device).manual_seed(int(folder.name))
    noise = torch.empty(len(envs), len(units.low), device=units.low.device)

    def collect(act: Callable[[Tensor], Tensor], seed: int) -> tuple[dict[str, np.ndarray], float]:
        """`size` rows of D4RL's arrays, and the episodes' mean return."""
        waves, rows = [], 0
        while rows < size:
            waves.append(rollout(envs, raw_policy(act, units), range(seed, seed + len(envs))))
            rows, seed = rows + len(waves[-1]["rewards"]), seed + len(envs)
        whole = {k: np.concatenate([w[k] for w in waves]) for k in waves[0]}
        return {k: whole[k][:size] for k in ARRAYS}, whole["returns"].mean()

    def sampling(actor: SquashedActor) -> Callable[[Tensor], Tensor]:
        return lambda state: actor.sample(state, noise.normal_(generator=generator))[0]

    random, zero = collect(lambda state: noise.uniform_(-1, 1, generator=generator), 2 * 10**6)
    if final <= zero:
        raise BadInput(f"SAC's return is {final:.1f} after {args.steps:,} steps, a random policy's"
                       f" {zero:.1f}: it has not learned; raise --expert-steps")
    third = zero + (final - zero) / 3
    actor, saved = next(record for record in records if record[1]["return"] >= third)
    medium, middle = collect(sampling(actor), 3 * 10**6)
    expert, _ = collect(sampling(records[-1][0]), 4 * 10**6)
    scores = {"random": zero, "medium": middle, "expert": final, "medium_steps": saved["step"]}
    both = {k: np.concatenate([medium[k][: size // 2], expert[k][: size // 2]]) for k in medium}
    both["timeouts"][size // 2 - 1] = True  # nothing follows the first half's last row
    replay = {k: v[: saved["step"]] for k, v in history.items()}
    for quality, arrays in zip(QUALITIES, (random, medium, replay, both, expert), strict=True):
        if arrays:
            write_dataset(folder / f"{quality}.hdf5", arrays)
    write_text(folder / "scores.json", json.dumps(scores, indent=2))


def history(data: Data, units: Units, seed: int) -> dict[str, np.ndarray]:
    """D4RL's arrays of a seed's own transitions. A timeout is where another episode follows."""
    state, action, reward, next_state, not_done = data.own()[seed].split(data.widths, 1)
    done, timeout = not_done[:, 0] == 0, (next_state != state.roll(-1, 0)).any(1)
    tensors = (units.raw_state(state), units.raw_action(action), reward[:, 0] - units.reward_shift,
               done, timeout & ~done)
    return {name: x.cpu().numpy() for name, x in zip(ARRAYS, tensors, strict=True)}


def build(args: argparse.Namespace, seeds: Sequence[int], state_dim: int, action_dim: int,
          updates: float) -> tuple:
    """The agent of all seeds, each seed's RankNet with its optimizer if any, and its generator."""
    networks, ranknets, device = [], [], torch.device(args.device)
    asks = SCHEMES[args.scheme].asks and args.ranknet
    for seed in seeds:
        torch.manual_seed(seed)
        with device:
            networks.append(ALGORITHMS[args.algo].networks(state_dim, action_dim, args))
            ranknet = RankNet(state_dim, action_dim) if asks else None
        ranknets.append((ranknet, Adam(ranknet, args.lr)) if ranknet else (None, None))
    return (ALGORITHMS[args.algo](stack(networks), args, updates), ranknets,
            [torch.Generator(device).manual_seed(seed) for seed in seeds])


def make_advance(agent, data: Data, generators: list[torch.Generator],
                 args: argparse.Namespace) -> Callable[[bool], dict[str, Tensor]]:
    """advance(delayed) samples and updates: eager, compiled, or from CUDA graphs."""
    # Freed at once: from now on glibc keeps up to 64 MB of free memory. Giving it back to the
    # kernel after every update cost more, in page faults, than five seeds together gain.
    torch.empty(8_000_000)
    update = agent.update
    if args.compile:
        torch._dynamo.reset()  # forgets other agents: no guard will tell this one from them
        torch._dynamo.config.trace_autograd_ops = True
        guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        update = torch.compile(update, fullgraph=True, dynamic=False, options=guards)

    def advance(delayed: bool) -> dict[str, Tensor]:
        batch = data.sample(generators, args.batch_size)
        return update(batch, agent.draw(generators, args.batch_size), delayed)

    return graphed(advance, generators) if args.cuda_graph else advance


def graphed(advance: Callable[[bool], dict], generators: list[torch.Generator]) -> Callable:
    """`advance`, replayed from a CUDA graph for each argument: a launch instead of a hundred.

    An argument's first three calls run as they are, on a side stream, as capture asks for. Whatever
    `advance` reads must stay where it is in memory, and be changed in place.
    """
    graphs, warm_up, side = {}, {False: 3, True: 3}, torch.cuda.Stream()

    def replay(delayed: bool) -> dict[str, Tensor]:
        if warm_up[delayed]:
            warm_up[delayed] -= 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                losses = advance(delayed)
            torch.cuda.current_stream().wait_stream(side)
            return losses
        if delayed not in graphs:
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):  # records, and does not run
                graphs[delayed] = graph, advance(delayed)
        graph, losses = graphs[delayed]
        graph.replay()
        return losses

    return replay


class Run:
    """All that a run of one or several seeds needs, and all of it that changes: its checkpoint.

    Raises BadInput if arguments, files and environment don't fit. Writes nothing, but what a local
    task needs.
    """

    def __init__(self, args: argparse.Namespace, task: Task):
        self.args, self.task, scheme, seeds = args, task, SCHEMES[args.scheme], args.seeds
        self.envs = make_envs(task, args)
        spec, box = self.envs[0].spec, self.envs[0].action_space
        dims = self.envs[0].observation_space.shape[0], box.shape[0]
        prepare_local_task(args, task, self.envs)
        expert = args.expert or default_expert(args, task)
        if (scheme.asks or args.audit) and ":" not in expert and not Path(expert).is_file():
            raise BadInput(f"no black box {expert}: --expert names one; README says who trains it")
        self.data, self.units, behaviour = load_data(
            args, task, box, dims[0], spec.max_episode_steps)
        self.updates = args.steps + args.finetune_steps * scheme.finetune
        self.agent, self.ranknets, self.generators = build(
            args, seeds, *dims, math.inf if args.timing == "ft" else self.updates)
        self.queries = [
            QueryDataset(self.data.offline, dims[1], self.data.rows.device) for _ in seeds]
        self.black_boxes, self.interaction = [], None
        if scheme.asks or args.audit:
            budget = args.budget if scheme.asks else 0
            self.black_boxes = [load_black_box(expert, self.units, budget) for _ in seeds]
        if scheme.interacts:
            envs = [make_env(task.name, args.physics) for _ in seeds]
            self.interaction = Interaction(envs, self.units, self.data, seeds)
        zero, hundred = reference_returns(args, task)
        self.logs = [Log(run_folder(args, task, seed), zero, hundred) for seed in seeds]
        score = self.logs[0].score
        self.protocol = finite({
            "environment": spec.id, "horizon": spec.max_episode_steps, "physics": args.physics,
            "episodes": args.eval_episodes, "return_0": zero, "return_100": hundred,
            "behaviour_score": score(behaviour), "black_box": expert if self.black_boxes else None,
            "black_box_score": score(self.black_boxes[0].returns) if self.black_boxes else None})
        self.made_of = decisive(args) | {  # what a checkpoint is for
            "seeds": seeds, "a dataset whose sum is":
            f"{self.data.rows.sum(dtype=torch.float64).item():.9g}"}
        if self.black_boxes and Path(expert).is_file():
            digest = hashlib.sha256(Path(expert).read_bytes()).hexdigest()
            self.made_of["a black box whose sha256 is"] = digest[:12]
        self.step, self.losses, self.clock = 0, {}, Clock()
        self.records: list[list[int]] = [[] for _ in seeds]  # an expert's best evaluations' steps
        self.checkpoint = self.logs[0].folder / "checkpoint.pt"  # of all seeds

    def tensors(self) -> list[Tensor]:
        """What changes in place."""
        found = [self.data.window]
        if self.data.preferred is not None:
            found.append(self.data.preferred)
        for part in (*vars(self.agent).values(), *itertools.chain.from_iterable(self.ranknets)):
            if isinstance(part, nn.Module):
                found += part.parameters()
            elif isinstance(part, Adam):
                found += [*part.mean, *part.square, part.t, part.lr]
        return found

    def refuse_divergence(self, losses: dict[str, float]) -> None:
        """Raises BadInput if one is not finite, or beyond what any task's returns explain."""
        for name, value in losses.items():
            if not abs(value) < 1e15:
                left = (f"{self.checkpoint} is from before" if self.checkpoint.is_file()
                        else "there is no checkpoint yet")
                raise BadInput(f"{self.checkpoint.parent} diverged: {name} is {value:.3g} by update"
                               f" {self.step:,}; {left}")

    def save(self) -> None:
        state = {
            "version": 2, "step": self.step, "made_of": self.made_of, "losses": self.losses,
            "tensors": self.tensors(), "generators": [g.get_state() for g in self.generators],
            "queries": [vars(queries) for queries in self.queries],
            "asked": [(box.asked, box.audited) for box in self.black_boxes],
            "own": self.data.own().clone(), "records": self.records,
            "rows": [log.rows for log in self.logs],
            "clock": (time.time() - self.clock.started, *self.clock.spent.values())}
        save(self.checkpoint, state)

    def save_model(self, k: int, file: str, returns: float) -> None:
        """Writes what a black box and a policy of seed number k are made of."""
        actor, critic = (unstack(net, k, len(self.logs)).state_dict()
                         for net in (self.agent.actor, self.agent.critic))
        save(self.logs[k].folder / file, {
            "algo": self.args.algo, "env": self.args.env, "step": self.step, "return": returns,
            "units": list(self.units), "actor": actor, "critic": critic})

    def load(self) -> None:
        """Continues from the checkpoint. Raises BadInput if it does not fit."""
        anew = "--overwrite runs anew"
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:
                if archive.testzip():  # torch.load would not mind
                    raise zipfile.BadZipFile
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if state["version"] != 2:
                raise BadInput(f"{self.checkpoint} is another version's; {anew}")
            refuse_others(self.checkpoint, state["made_of"], self.made_of, anew)
            self.restore(state)
        except BadInput:
            raise
        except Exception as error:  # noqa: BLE001 whatever a broken file makes torch raise
            raise BadInput(f"{self.checkpoint} can't be read; {anew}") from error
        for log in self.logs:
            log.write_rows()
        note = ""
        if self.interaction:
            seeds = [evaluation_seed(seed, self.step) for seed in self.args.seeds]
            self.interaction = Interaction(self.interaction.envs, self.units, self.data, seeds)
            note = " with new episodes, so it is not quite the same as an uninterrupted run"
        print(f"{self.checkpoint.parent}: continues after update {self.step:,}{note}")

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        for tensor, saved in zip(self.tensors(), state["tensors"], strict=True):
            tensor.copy_(saved)
        device = self.data.rows.device
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        for queries, saved in zip(self.queries, state["queries"], strict=True):
            vars(queries).update({name: tensor.to(device) for name, tensor in saved.items()})
        for box, (asked, audited) in zip(self.black_boxes, state["asked"], strict=True):
            box.asked, box.audited = asked, audited
        for log, rows in zip(self.logs, state["rows"], strict=True):
            log.rows = rows
        self.step, self.records = state["step"], state["records"]
        self.losses = {name: loss.to(device) for name, loss in state["losses"].items()}
        self.clock = Clock(self.step, *state["clock"])
        self.data.size += state["own"].shape[1]
        self.data.own().copy_(state["own"])


def evaluation_seed(seed: int, step: int) -> int:
    """For environments that are reset after that update, of a run's seed."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def learn(run: Run, stop: list) -> None:
    """Algorithm 1 with `--scheme oap`; until the end, or until there is something in `stop`."""
    from tqdm import tqdm

    args, scheme, data, agent, clock = (
        run.args, SCHEMES[run.args.scheme], run.data, run.agent, run.clock)
    ft, count = args.timing == "ft", len(args.seeds)
    policy = raw_policy(lambda s: agent.actor(s.unflatten(0, (count, -1))).flatten(0, 1), run.units)
    d = (data.state[: data.offline], data.action[: data.offline])  # (N, O), (N, A)
    start, end = (args.steps, run.updates) if ft else (0, args.steps)  # interactions: spent here
    rounds = range(args.steps if ft else args.interval, args.steps + 1, args.interval)
    random_steps = 0 if scheme.data else min(args.random_steps, args.budget)
    advance = make_advance(agent, data, run.generators, args)

    for step in tqdm(range(run.step + 1, run.updates + 1), initial=run.step, total=run.updates,
                     disable=None, unit=" updates", smoothing=0.05):
        while run.interaction and data.interactions < max(
                due(step, args.budget, start, end), random_steps):
            warm = data.interactions >= random_steps
            run.interaction.step(agent.explore if warm else None, run.generators)
        run.losses |= advance(step % args.policy_delay == 0)
        run.step, last = step, step == run.updates

        asking = scheme.asks and step in rounds
        auditing = args.audit and (asking or step % args.interval == 0 or last)
        evaluating = asking or auditing or step % args.eval_every == 0 or last
        if not (evaluating or step % args.checkpoint_every == 0 or stop):
            continue
        for k, log in enumerate(run.logs):
            values = {name: loss[k].item() for name, loss in run.losses.items()}
            run.refuse_divergence(values)
            log.row |= values
        if asking or auditing:
            with clock.measure("oap"):
                for k, (log, box) in enumerate(zip(run.logs, run.black_boxes, strict=True)):
                    actor, queries = unstack(agent.actor, k, count), run.queries[k]
                    owed = due(step, args.budget, 0, args.steps) - box.asked if asking else 0
                    if asked := min(owed, data.offline):
                        log.row |= oap_round(actor, *d, data.preferred[k], asked, queries, box,
                                             *run.ranknets[k], args.ranknet_epochs,
                                             run.generators[k])
                        run.refuse_divergence({"ranknet_loss": log.row.get("ranknet_loss", 0.0)})
                    if auditing:
                        trained = run.ranknets[k][0] if len(queries.index) else None
                        log.row |= audit(actor, *d, queries.asked, box, trained,
                                         log.folder / f"audit-{step}.npz")
                        log.row["audited"] = box.audited
        if evaluating:
            with clock.measure("evaluation"):
                seeds = [evaluation_seed(seed, step) for seed in args.seeds]
                returns = evaluate(run.envs, policy, args.eval_episodes, seeds).mean(1)  # (S,)
            times = clock.row(step)
            for k, log in enumerate(run.logs):
                if run.interaction:
                    log.row["interactions"] = data.interactions
                if run.black_boxes:
                    log.row["queries"] = run.black_boxes[k].asked
                log.write(step, run.updates, float(returns[k]), times)
                if args.scheme == "expert" and returns[k] > max(
                        (row["return"] for row in log.rows[:-1]), default=-math.inf):
                    run.records[k].append(step)
                    run.save_model(k, f"model-{step}.pt", float(returns[k]))
        if step % args.checkpoint_every == 0 or last or stop:
            total = sum(t.sum() for t in run.tensors()).item()  # with Adam's squares: may be large
            if not math.isfinite(total):
                run.refuse_divergence({"a parameter": total})
            run.save()
        if stop and not last:
            raise KeyboardInterrupt(f"stopped after update {step:,}; the same command" + (
                " without --overwrite" if args.overwrite else "") + " continues")


def finish(run: Run) -> None:
    """Writes model.pt, which marks a finished run, and before it what a black box leaves behind."""
    for k, log in enumerate(run.logs):
        value, what = final_score(log.rows, "return"), "the mean of the last 10 evaluations"
        if run.args.scheme == "expert":
            value, what = finish_expert(run, k), "the best evaluation's policy over 100 episodes"
        else:
            run.save_model(k, "model.pt", value)
        score = f" score {log.score(value):.1f}," if math.isfinite(log.zero) else ""
        print(f"{log.folder}: return {value:,.1f},{score} {what}")
    run.checkpoint.unlink(missing_ok=True)


def finish_expert(run: Run, k: int) -> float:
    """Writes the datasets of a local task, scores.json, and the best policy (point 13) as model.pt.

    Returns its mean return over 100 episodes that no choice was made by.
    """
    log, envs = run.logs[k], run.envs[: len(run.envs) // len(run.logs)]
    records = [
        load_sac(log.folder / f"model-{step}.pt", run.args.device) for step in run.records[k]]
    actor, best = records[-1]
    best["return"] = evaluate(envs, raw_policy(actor, run.units), 100, [10**6]).mean().item()
    if run.task.quality:
        make_datasets(run.args, log.folder, envs, records, history(run.data, run.units, k))
    else:
        write_text(log.folder / "scores.json", json.dumps({"expert": best["return"]}))
    save(log.folder / "model.pt", best)
    return best["return"]


def train(args: argparse.Namespace, wait: bool = False) -> list[list[dict[str, float]]]:
    """Trains those of --seeds that are not finished. Returns the rows of each progress.csv.

    Raises BadInput if arguments, files and environment don't fit, or if another process does the
    same, unless it is to `wait` for it, before this run writes anything; and if losses diverge.
    """
    task = parse_task(args.env)
    folders = [run_folder(args, task, seed) for seed in args.seeds]
    if seeds := unfinished(args, task):
        args.seeds = seeds
        run = Run(args, task)
        with locked([log.folder for log in run.logs], wait), stop_signals() as stop:
            if unfinished(args, task) == seeds:  # and no other process was faster
                if run.checkpoint.is_file() and not args.overwrite:
                    run.load()
                else:
                    for log in run.logs:
                        log.begin(args, run.protocol)
                    print(f"{run.checkpoint.parent}: " + ", ".join(
                        f"{k} {v:,.5g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in run.protocol.items() if v is not None))
                for log in run.logs:
                    log.trackers = trackers(args, log.folder, run.step)
                learn(run, stop)
                finish(run)
    return [read_progress(folder / "progress.csv") for folder in folders]


def final_score(rows: list[dict[str, float]], name: str = "score") -> float:
    """The paper's number: the mean of the final 10 evaluations."""
    return float(np.mean([row[name] for row in rows[-10:]]))


# ---------------------------------------------------------------------------------------- benchmark


def benchmark(argv: list[str]) -> None:
    """Prints this machine's updates per second, and evaluation's and OAP's share of a run.

    On random data of HalfCheetah's shapes, 1M rows, with the defaults and what `argv` changes.
    """
    rows, dims, start = 1_000_000, (17, 6), ["--env=halfcheetah-medium-v2", *argv]
    args = parse_args(start)
    cuda, device = args.device.startswith("cuda"), torch.device(args.device)

    def seconds(work: Callable, least: float = 0.0) -> float:
        """A call's mean time, over at least that many seconds and one call."""
        calls, started = 0, time.time()
        while calls == 0 or time.time() - started < least:
            work()
            if cuda:
                torch.cuda.synchronize()
            calls += 1
        return (time.time() - started) / calls

    def speed(mode: str, algo: str, count: int) -> float:
        """Updates per second of each of `count` seeds."""
        flags = {"eager": ["--no-cuda-graph"], "CUDA graph": [], "compiled": ["--compile"]}[mode]
        args = parse_args([*start, *flags, "--seeds", *map(str, range(count))])
        args.algo = algo
        agent, _, generators = build(args, args.seeds, *dims, 1e6)
        data = Data(rows, 0, count, *dims, device)
        data.rows.normal_()
        data.preferred = None if algo == "sac" else data.action.repeat(count, 1, 1)
        advance, steps = make_advance(agent, data, generators, args), 10 * args.policy_delay

        def updates() -> None:
            for step in range(steps):
                advance(step % args.policy_delay == 0)

        seconds(updates)  # compiles, captures
        return steps / seconds(updates, 3)

    modes = ("eager", "CUDA graph", "compiled") if cuda else ("eager",)
    counts = (1, 5, 10) if cuda else (1, 5)
    runs = [(m, a, c) for a in ("sac", "iql", "td3bc") for m in modes for c in counts]
    runs += [("compiled", algo, 1) for algo in ("iql", "td3bc") if not cuda]
    print(f"{device}, {torch.get_num_threads()} threads: updates per second\n\n"
          f"{'':24}each seed   all seeds")
    rates = {}
    for mode, algo, count in runs:
        rate = rates[mode, algo, count] = speed(mode, algo, count)
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        print(f"{algo:6}{seeds:9}{mode:11}{rate:9,.1f}{rate * count:12,.1f}", flush=True)

    total, mode = args.steps + args.finetune_steps, modes[-1]
    print(f"\nin seconds, and as a share of {total:,} updates by TD3+BC, one seed, {mode}:")
    agent, [(ranknet, optimizer)], [generator] = build(args, [0], *dims, 1e6)
    state, action = (torch.randn(rows, n, device=device) for n in dims)
    units = Units(torch.zeros_like(state[0]), torch.ones_like(state[0]),
                  -torch.ones_like(action[0]), torch.ones_like(action[0]))
    box = BlackBox(units, math.inf, q=lambda s, a: agent.critic(s, a).amin(-1))
    queries = QueryDataset(rows, dims[1], device)
    count = min(due(args.interval, args.budget, 0, args.steps), rows)
    policy, envs = raw_policy(agent.actor, units), make_envs(parse_task(args.env), args)
    for name, times, work in (
            ("an evaluation", total // args.eval_every,
             lambda: evaluate(envs, policy, args.eval_episodes, range(1))),
            ("a round of OAP", args.steps // args.interval,
             lambda: oap_round(agent.actor, state, action, action.clone(), count, queries, box,
                               ranknet, optimizer, args.ranknet_epochs, generator))):
        each = seconds(work)
        share = each * times / (each * times + total / rates[mode, "td3bc", 1])
        print(f"{name:16}{each:9.2f}  x {times:4}  {share:6.1%}")


# ------------------------------------------------------------------------------------------- report

DOMAINS = ("gym", "antmaze", "adroit")
TABLES = {
    "Table 2: training schemes": ("offline", "online", "online-mix", "o2o", "oap"),
    "Table 3: RankNet": ("oap", "oap-inf", "oap-no-ranknet"),
    "Figure 7: timing": ("o2o", "o2o-interval", "oap-ft", "oap"),
    "Table 4: black boxes": ("expert",),
}
COLORS = {  # Okabe and Ito's, which colour-blind readers can tell apart
    "offline": "#000000", "online": "#CC79A7", "online-mix": "#009E73", "o2o": "#E69F00",
    "o2o-interval": "#CC79A7", "oap-ft": "#009E73", "oap-no-ranknet": "#D55E00",
    "oap-inf": "#56B4E9", "oap": "#0072B2", "expert": "#000000",
}


def changed_flags(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """What differs from the task's defaults: in flags that every scheme reads, as one string, which
    is the protocol, and in flags that only some do, by name. Flags that this scheme does not read,
    or that leave its result alone, are in neither."""
    scheme, expert = SCHEMES[args.scheme], args.scheme == "expert"
    learner = [] if expert else [f"--algo={args.algo}"]
    usual = vars(parse_args([f"--env={args.env}", f"--scheme={args.scheme}", *learner]))
    read = {"steps": not expert, "finetune_steps": scheme.finetune, "interval": scheme.asks,
            "budget": bool(scheme.spends) and not expert and args.budget < math.inf,
            "ranknet_epochs": scheme.asks, "random_steps": not scheme.data, "expert": scheme.asks,
            "exploration_noise": scheme.interacts, "expert_steps": True}
    said = FREE | {"env", "scheme", "algo", "timing", "ranknet", "audit", "tag"} | (
        {"dataset_size"} if expert else set())

    def written(name: str, value) -> str:
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            return f"--{flag}" if value else f"--no-{flag}"
        return f"--{flag} {value}"

    text = {k: written(k, v) for k, v in vars(args).items() if k not in said and v != usual.get(k)}
    return (" ".join(text[k] for k in text if k not in read),
            {k: text.get(k, "") for k in read if read[k]})


def read_runs(root: Path) -> tuple:
    """A pandas.DataFrame with a row for each run under `root`, and a line for each broken one.

    Runs with the same algo, protocol, label and task are the seeds of one cell of a table. `label`
    is the scheme's variant and the tag, with those flags in which runs of that name differ.
    """
    import pandas as pd

    runs, broken = [], []
    for path in sorted(root.rglob("config.json")):
        try:
            config = json.loads(path.read_text())
            args, known = argparse.Namespace(**config["args"]), config["protocol"]
            args.budget = math.inf if args.budget is None else args.budget
            args.expert = known.get("black_box")  # also if it was the default
            task, rows = parse_task(args.env), read_progress(path.parent / "progress.csv")
            updates = args.steps + args.finetune_steps * SCHEMES[args.scheme].finetune
            protocol, own = changed_flags(args)
            name, score, scores = column(args), final_score(rows), path.parent / "scores.json"
            if scores.is_file():  # a black box's, which for Table 4 has 100 episodes
                made, zero, hundred = (
                    json.loads(scores.read_text()), known["return_0"], known["return_100"])
                if zero is None:
                    zero, hundred = made["random"], made["expert"]
                score = 100 * (made["expert"] - zero) / (hundred - zero)
                for row in rows:
                    row["score"] = 100 * (row["return"] - zero) / (hundred - zero)
            if math.isnan(score):
                raise ValueError("has no normalised score yet")
            if (task.domain, args.algo, name) == ("antmaze", "iql", "o2o") and (
                    args.finetune_steps >= args.steps):
                name = "expert"  # Table 4's, where SAC fails
            runs.append({
                "algo": args.algo, "protocol": protocol, "column": name, "own": own,
                "label": f"{name}-{args.tag}" if args.tag else name, "tag": args.tag,
                "task": d4rl_robot(task.robot) if args.scheme == "expert" else task.name,
                "seed": int(path.parent.name), "score": score,
                "step": int(rows[-1]["step"]), "updates": updates,
                "done": rows[-1]["step"] >= updates, "rows": pd.DataFrame(rows),
                "box": known.get("black_box_score"), "folder": path.parent,
                "audit": last_audit(path.parent),
                "note": f"{known['physics']} physics, {known['episodes']} episodes an evaluation"})
        except (BadInput, OSError, LookupError, ValueError, AttributeError, TypeError,
                zipfile.BadZipFile, EOFError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else error
            broken.append(f"{path.parent}: {what}")
    if not runs:
        return pd.DataFrame(), broken
    runs, same = pd.DataFrame(runs), ["algo", "protocol", "label", "task", "seed"]
    twice = runs.assign(own=runs.own.map(str)).duplicated([*same, "own"])
    broken += [f"{folder}: this seed's run is there twice" for folder in runs.folder[twice]]
    runs = runs[~twice].reset_index(drop=True)
    for _, alike in runs.groupby(["algo", "protocol", "label"]):
        for flag in alike.own.iloc[0]:
            of_task = flag.startswith("expert")  # a black box, and how long it was trained
            given, rivals = alike.own.str[flag], alike.task if of_task else alike.algo
            given = given[given.groupby(rivals).transform("nunique") > 1]
            runs.loc[given.index, "label"] += (" " + given).str.rstrip()
    return runs, broken


def last_audit(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Figure 6: divergence and value gain of 3,000 samples, from the last of a run's audits."""
    files = sorted(folder.glob("audit-*.npz"), key=lambda path: int(path.stem[6:]))
    if not files or "value_gain" not in (arrays := np.load(files[-1])):
        return None
    some = np.random.default_rng(0).permutation(len(arrays["divergence"]))[:3000]
    return arrays["divergence"][some], arrays["value_gain"][some]


def averages(runs, paper) -> list[dict]:
    """A run over each of the paper's domains, and over all, of whose tasks a seed finished all."""
    tasks = [t for t in paper[paper.table == 2].task.unique() if "average" not in t]
    domains = {d: [t for t in tasks if parse_task(t).domain == d] for d in DOMAINS} | {"": tasks}
    same = ["algo", "protocol", "column", "label", "seed"]
    return [dict(zip(same, key, strict=True)) | {
        "task": f"{domain} average".strip(), "score": group.score.mean(), "step": group.step.min(),
        "done": True} for domain, members in domains.items() for key, group in
        runs[runs.done & runs.task.isin(members)].groupby(same) if len(group) == len(members)]


def by_label(runs) -> list[tuple]:
    """(label, column, its runs), in the order of COLORS."""
    groups = [(label, name, group) for (name, label), group in runs.groupby(["column", "label"])]
    order = {name: i for i, name in enumerate(COLORS)}
    return sorted(groups, key=lambda group: (order.get(group[1], len(order)), group[0]))


def cell(runs) -> str:
    """"mean ± deviation (seeds x updates)" of the finished runs, or else of the others, marked."""
    shown, mark = (runs[runs.done], "") if runs.done.any() else (runs, " \\*")
    return (f"{shown.score.mean():.1f}" + f" ± {shown.score.std(ddof=0):.1f}" * (len(shown) > 1)
            + f" ({len(shown)} × {shown.step.min() / 1000:,g}k{mark})")


def table(runs, columns: Sequence[str], paper, tasks: list[str]) -> str:
    """Tasks x labels in Markdown, the paper's figures in brackets. `tasks` are always there."""
    labels = runs.groupby("column").label.unique()
    names = {label: name for name in columns for label in sorted(labels.get(name, [name]))}
    ours = {key: cell(group) for key, group in runs.groupby(["task", "label"])}
    theirs = {(r.task, r.column): f" [{r.mean:g}]" if math.isnan(r.std) else
              f" [{r.mean:g} ± {r.std:g}]" for r in paper.itertuples(index=False)}
    firsts = {name: label for label, name in reversed(names.items())}  # the paper's is said once
    tasks = tasks + [task for task in runs.task.unique() if task not in tasks]
    rows = [["task", *names], ["---"] * (len(names) + 1)] + [
        [task] + [(ours.get((task, label), "") + theirs.get(
            (task, name) if firsts[name] == label else None, "")).strip()
                  for label, name in names.items()] for task in tasks]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figure_3(runs) -> tuple | None:
    """Four aggregates of the tasks that every scheme has finished, with rliable's intervals."""
    from rliable import library, metrics, plot_utils

    groups = [(label, name, group.pivot_table("score", "seed", "task")) for label, name, group
              in by_label(runs[runs.done & runs.column.isin(TABLES["Table 2: training schemes"])])]
    most = set(max((scores for _, _, scores in groups), key=len, default=()))
    groups = [group for group in groups if most & set(group[2])]  # a stray one hides no figure
    tasks = sorted(most.intersection(*(scores for _, _, scores in groups)))
    scores = {label: scores[tasks].dropna().to_numpy() / 100 for label, _, scores in groups}
    if len(scores) < 2 or not tasks or not all(map(len, scores.values())):
        return None
    names = {"median": metrics.aggregate_median, "IQM": metrics.aggregate_iqm,
             "mean": metrics.aggregate_mean, "optimality gap": metrics.aggregate_optimality_gap}
    estimates = library.get_interval_estimates(
        scores, lambda x: np.array([f(x) for f in names.values()]), reps=2000)
    figure, _ = plot_utils.plot_interval_estimates(
        *estimates, list(names), list(scores), {label: COLORS[name] for label, name, _ in groups},
        max_ticks=3, xlabel="normalised score / 100", xlabel_y_coordinate=-1 / len(scores),
        row_height=0.5, wspace=0.2)
    return figure, f"Figure 3: 95 % stratified bootstrap intervals; {', '.join(tasks)}; seeds: " + (
        ", ".join(f"{label} {len(x)}" for label, x in scores.items()))


def panels(widths: list[float]) -> tuple:
    """A figure, and its axes in a row, that many inches wide."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(widths), figsize=(sum(widths), 3.5), squeeze=False, width_ratios=widths)
    return figure, axes[0]


def figure_4(runs, published) -> tuple | None:
    """Each domain's best algorithm, offline, o2o and OAP, beside other papers' figures."""
    runs, bars, notes = runs[runs.done & runs.label.isin(["offline", "o2o", "oap"])], {}, []
    for domain in DOMAINS:
        theirs = published[published.domain == domain].pivot_table("score", "task", "algo")
        ours = runs[runs.task.isin(theirs.index)].pivot_table("score", "task", ["algo", "label"])
        ours = ours.dropna()
        if ours.empty or "offline" not in ours.columns.get_level_values("label"):
            continue
        best = ours.xs("offline", axis=1, level="label").mean().idxmax()
        bars[domain] = [(name, "", mean, math.nan) for name, mean in theirs.loc[ours.index].mean(
            ).items()]
        for label in ("offline", "o2o", "oap"):
            same = runs[(runs.algo == best) & (runs.label == label) & runs.task.isin(ours.index)]
            if len(same):
                seeds = same.groupby("seed").score.mean()
                bars[domain].append((f"{best} {label} (n={len(seeds)})", label,
                                     ours[best, label].mean(), seeds.std(ddof=0) or math.nan))
        notes.append(", ".join(ours.index))
    if not bars:
        return None
    figure, axes = panels([4.5] * len(bars))
    for ax, (domain, rows) in zip(axes, bars.items(), strict=True):
        names, labels, means, deviations = zip(*rows, strict=True)
        ax.bar(names, means, yerr=deviations, capsize=3,
               color=[COLORS.get(label, "#999999") for label in labels])
        ax.set(title=domain, ylabel="normalised score")
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    sources = ", ".join(published.source.unique())
    return figure, (f"Figure 4: means over {'; '.join(notes)}, and deviation over seeds. Grey:"
                    f" {sources}")


def figure_5(runs) -> tuple | None:
    """OAP's score against its black box's, a panel a task, beside schemes without a black box."""
    asking = runs[runs.done & (runs.column == "oap")].dropna(subset="box")
    asking = asking.assign(flags=asking.own.map(
        lambda own: " ".join(v for k, v in own.items() if v and k != "expert")))
    lines = {task: [(flags, g.groupby("box").score) for flags, g in group.groupby("flags")
                    if g.box.nunique() > 1] for task, group in asking.groupby("task")}
    lines = {task: found for task, found in lines.items() if found}
    if not lines:
        return None
    figure, axes = panels([4.5] * len(lines))
    for ax, (task, found) in zip(axes, lines.items(), strict=True):
        for flags, scores in found:
            deviation = scores.std(ddof=0).replace(0, math.nan)  # of one seed, none
            ax.errorbar(deviation.index, scores.mean(), deviation, marker="o", capsize=3,
                        color=COLORS["oap"], label=f"oap{f' {flags}' * (len(found) > 1)} (n="
                        f"{scores.count().min()})")
        for label, name, group in by_label(runs[runs.done & (runs.task == task)]):
            if name in ("offline", "o2o"):
                mean, std = group.score.mean(), group.score.std(ddof=0)
                ax.axhline(mean, color=COLORS[name], linestyle={"offline": "--", "o2o": ":"}[name],
                           label=f"{label} (n={len(group)})")
                ax.axhspan(mean - std, mean + std, color=COLORS[name], alpha=0.1, linewidth=0)
        ax.set(title=task, xlabel="normalised score of the black box", ylabel="normalised score")
        ax.legend(fontsize="small")
    return figure, "Figure 5: mean and deviation over seeds"


def figure_6(runs) -> tuple:
    """A task's learning curves, and, of runs with --audit, divergence against value gain."""
    import pandas as pd

    task, first = runs.task.iloc[0], runs.column.isin(TABLES["Table 2: training schemes"])
    audits = [(label, name, group.audit.iloc[0]) for label, name, group in by_label(runs)
              if group.audit.iloc[0] is not None]
    curves = [part for part in (runs[first], runs[~first]) if len(part)]
    figure, axes = panels([4.5] * len(curves) + [3] * len(audits))
    for ax, part in zip(axes, curves, strict=False):
        for i, (label, name, group) in enumerate(by_label(part)):
            mark, color = "" if group.done.any() else " *", COLORS.get(name, "#999999")
            group = group if mark else group[group.done]
            seeds = pd.concat([x.set_index("step").score for x in group.rows], axis=1).dropna()
            mean, std, step = seeds.mean(axis=1), seeds.std(axis=1, ddof=0), seeds.index / 1000
            ax.plot(step, mean, ("-", "--", "-.", ":")[i % 4], color=color,
                    marker="o" if len(step) == 1 else "", label=f"{label} (n={len(group)}{mark})")
            ax.fill_between(step, mean - std, mean + std, color=color, alpha=0.15, lw=0)
        ax.sharey(axes[0])
        ax.set(title=task, xlabel="updates (thousands)", ylabel="normalised score")
        ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    below = axes[len(curves):]
    for ax, (label, name, (divergences, gains)) in zip(below, audits, strict=True):
        ax.sharex(below[0])
        ax.sharey(below[0])
        ax.scatter(divergences, gains, s=4, alpha=0.3, color=COLORS.get(name, "#999999"),
                   edgecolors="none")
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(title=f"Figure 6: {label}", xlabel="divergence (π(s) - a)²",
               ylabel="value gain (return)")
    figure.subplots_adjust(wspace=0.35)
    return figure, f"{task}: mean and deviation over seeds; * not finished" + (
        "; Figure 6: Q*(s, π(s)) - Q*(s, a) of 3,000 samples in a first seed's last audit"
        if audits else "")


def figure_7(runs) -> tuple | None:
    """The four ways to time interactions and queries."""
    names = TABLES["Figure 7: timing"]
    variants = runs[runs.done & runs.label.isin(set(names) - {"o2o", "oap"})]
    if variants.empty:
        return None
    same = runs[runs.done & runs.label.isin(names) & runs.task.isin(variants.task)]
    scores = same.groupby(["task", "label"]).score
    mean, deviation, seeds = (
        x.unstack().reindex(columns=[name for name in names if name in set(same.label)])
        for x in (scores.mean(), scores.std(ddof=0).replace(0, math.nan), scores.count()))
    figure, (ax,) = panels([2.5 + 1.5 * len(mean)])
    mean.plot.bar(ax=ax, yerr=deviation, color=COLORS, capsize=3, width=0.8, xlabel="",
                  ylabel="normalised score")
    ax.set_xticklabels(mean.index, rotation=20, ha="right")
    ax.legend([f"{name} (n={seeds[name].min():.0f})" for name in mean], fontsize="small",
              loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure, "Figure 7: mean and deviation over seeds"


def report(root: Path, out: Path) -> None:
    """Writes report.md and its pictures to `out`. Raises BadInput if there is nothing to report."""
    try:
        import matplotlib
        import pandas as pd
        import rliable  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--report: {error}; pip install rliable 'pandas<3'") from error
    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", category=FutureWarning)  # rliable's calls of arch
    import matplotlib.pyplot as plt

    runs, broken = read_runs(root)
    if runs.empty:
        raise BadInput(f"--report: no runs in {root}" + "".join(f"; {line}" for line in broken))
    results = Path(__file__).parent / "results"
    paper, published = (pd.read_csv(results / f"{name}.csv") for name in ("paper", "baselines"))
    out.mkdir(parents=True, exist_ok=True)
    text = [f"# {root}", "A score is the mean of a run's last 10 evaluations, of a black box's"
            " 100 other episodes; then mean ± standard deviation over seeds (seeds × updates; \\*"
            " not finished) [the paper's]."]

    def picture(name: str, shown, drawn: tuple | None) -> None:
        if drawn is None:
            return
        figure, caption = drawn
        caption = "; ".join([caption, *shown.note.unique(), *filter(None, shown.protocol.unique())])
        name = re.sub(r"[^\w.-]+", "-", name) + ".png"
        with atomically(out / name) as part:
            figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        text.append(f"![{name}]({name})\n\n*{caption}*")

    for number, (protocol, section) in enumerate(runs.groupby("protocol"), 1):
        for algo, group in section.groupby("algo"):
            theirs, name = paper[paper.algo == algo], f"{number}-{algo}"
            text.append(f"## {algo}" + f", `{protocol}`" * bool(protocol))
            plain = group[group.tag == ""] if (group.tag == "").any() else group
            whole = pd.DataFrame(group.to_dict("records") + averages(group, paper))
            known = theirs[theirs.table == 2].task.unique().tolist()
            for title, columns in TABLES.items():
                first = title.startswith("Table 2")
                shown = whole if first else whole[whole.label.isin(plain.label)]
                chosen = shown[shown.column.isin(columns)]
                if not first:  # tasks with a variant, not all that have the schemes themselves
                    variants = chosen[~chosen.column.isin(["o2o", "oap"])]
                    chosen = chosen[chosen.task.isin(variants.task)]
                if len(chosen):
                    every = first and not protocol and bool(set(known) & set(group.task))
                    text += [f"### {title}", table(chosen, columns, theirs, known if every else [])]
            flags = group.own.map(lambda own: " ".join(filter(None, own.values())))
            text.append("\n".join(f"- `{given}`: {', '.join(labels.unique())}"
                                  for given, labels in group.label.groupby(flags) if given))
            picture(f"{name}-figure-3", plain, figure_3(plain))
            picture(f"{name}-figure-5", group, figure_5(group))
            picture(f"{name}-figure-7", plain, figure_7(plain))
            for task, same in plain.groupby("task"):
                picture(f"{name}-{task}", same, figure_6(same))
        picture(f"{number}-figure-4", section, figure_4(section, published))
    left = runs[~runs.done]
    lines = [f"{r.folder}: {r.step:,} of {r.updates:,} updates" for r in left.itertuples()]
    for title, items in (("Not finished", lines), ("Left out, because they can't be read", broken)):
        text += [f"## {title}", "\n".join(f"- {item}" for item in items)] if items else []
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    print("\n".join([f"{out / 'report.md'}: {len(runs)} runs, {len(left)} not finished",
                     *(f"left out: {line}" for line in broken)]))


# --------------------------------------------------------------------------------------------- main

DEMO = ("--env Pendulum-v1:medium --expert-steps 4000 --dataset-size 5000 --eval-every 500 --audit"
        " --batch-size 64 --budget 1000 --interval 1000 --finetune-steps 1000"
        " --out runs/demo")


def demo() -> None:
    """OAP against the offline scheme, for as many updates, and a black box trained for it."""
    oap = [*DEMO.split(), "--scheme=oap", "--steps=5000"]
    offline = [*DEMO.split(), "--scheme=offline", "--steps=6000"]
    for argv in (oap, offline):
        print(f"python oap.py {' '.join(argv)}")
    runs = {"offline": train(parse_args(offline))[0], "OAP": train(parse_args(oap))[0]}
    last = [row for row in runs["OAP"] if not math.isnan(row["prefers_policy"])][-1]
    folder = run_folder(parse_args(oap), parse_task(oap[1]), 0)
    config = json.loads((folder / "config.json").read_text())
    table = {
        "score of the behaviour data": config["protocol"]["behaviour_score"],
        **{f"score of {name}": final_score(rows) for name, rows in runs.items()},
        "queries used": last["queries"],
        "answers that preferred the policy, last round": last["prefers_policy"],
        "RankNet's accuracy on samples never asked": last["ranknet_accuracy"],
        "accuracy of always answering \"policy\"": last["unasked_prefer_policy"],
    }
    print("\n".join(f"{name:<50}{value:>9,.4g}" for name, value in table.items()))


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Arguments with all defaults in place. Raises BadInput."""
    args = build_parser().parse_args(argv)
    if args.env is None:
        raise BadInput("--env is missing: pen-human-v1, Hopper-v4:medium, ...; see --help")
    task, scheme = parse_task(args.env), SCHEMES[args.scheme]
    expert = args.scheme == "expert"
    if expert and (args.algo or args.steps or args.budget):
        raise BadInput("--scheme expert is SAC for --expert-steps: no --algo, --steps, --budget")
    if not scheme.data and (args.normalize or args.reward_scale):
        raise BadInput(f"--normalize and --reward-scale need D, and {args.scheme} has none")
    algo = "sac" if expert else args.algo or "td3bc"
    defaults = {name: column[task.domain] for name, column in DOMAIN_DEFAULTS.items()} | {
        "out": "runs", "algo": algo, "steps": args.expert_steps if expert else 1_000_000,
        "budget": args.expert_steps if expert else 100_000, "timing": scheme.timing,
        "normalize": algo == "td3bc" and scheme.data,
        "reward_scale": (algo == "iql" and scheme.data and task.domain == "gym"
                         and not task.name.startswith("minari:D4RL/"))}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if scheme.interacts and math.isinf(args.budget):
        raise BadInput("--budget inf: interactions need a number")
    if scheme.asks and args.timing == "interval" and args.interval > args.steps:
        raise BadInput(f"--interval {args.interval} > --steps {args.steps}: nothing would be asked")
    if args.timing == "ft" and not scheme.finetune:
        raise BadInput(f"--timing ft: {args.scheme} has no second phase")
    if args.audit and not scheme.data:
        raise BadInput(f"--audit compares with D, and {args.scheme} has none")
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if args.device == "auto" else args.device)
        args.device = str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if cuda := args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    args.cuda_graph = cuda if args.cuda_graph is None else args.cuda_graph
    if args.cuda_graph and not cuda:
        raise BadInput(f"--cuda-graph needs a GPU, and the device is {args.device}")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and not importlib.util.find_spec(package):
            raise BadInput(f"--{package}: not installed; pip install {package}")
    if re.search(r"[^\w.-]", args.tag):
        raise BadInput(f"--tag {args.tag}: letters, digits, '.', '_' and '-' alone")
    if len(set(args.seeds)) < len(args.seeds):
        raise BadInput("--seeds: one is named twice")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2, after one line, for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv:
            demo()
        elif "--benchmark" in argv:
            benchmark([word for word in argv if word != "--benchmark"])
        elif (args := build_parser().parse_args(argv)).report:
            usual = build_parser().parse_args(["--report", args.report, "--out", args.out or ""])
            if vars(args) | {"out": usual.out} != vars(usual):
                raise BadInput("--report takes only --out beside it")
            report(Path(args.report), Path(args.out or f"{args.report}/report"))
        else:
            train(parse_args(argv))
        return 0
    except KeyboardInterrupt as error:
        message = str(error) or "interrupted; the same command continues a run from its checkpoint"
    except (BadInput, OSError, ImportError) as error:
        message = f"error: {error}"
    except (RuntimeError, MemoryError) as error:  # torch tells these by words alone
        if "memory" in repr(error).lower():
            message = f"error: {last_line(error)}: fewer --seeds, smaller --budget or --batch-size"
        elif "CxxCompiler" in repr(error):
            message = "error: --compile needs a C++ compiler: install g++, or leave --compile out"
        else:
            raise
    print(f"oap.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
