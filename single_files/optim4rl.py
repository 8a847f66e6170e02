# docs: docs/optim4rl.md
# Optim4RL: Lan, Mahmood, Yan, Xu (2023, 2024), "Learning to Optimize for Reinforcement Learning", https://arxiv.org/abs/2302.01470
# L2L: Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent", https://arxiv.org/abs/1606.04474
"""Optim4RL: an optimiser that is learned on reinforcement learning itself, a small GRU that turns gradients into updates.

    python single_files/optim4rl.py                           # meta-trains on Catch, tests on fresh agents beside Adam
    python single_files/optim4rl.py --env-id grid             # another task: catch, grid or cartpole
    python single_files/optim4rl.py --identity                # can a network with this gradient processing copy its input?
    python single_files/optim4rl.py --resume runs/RUN         # continue a killed run exactly
    python single_files/optim4rl.py --evaluate runs/RUN --env-id grid    # test the learned optimiser, on another task, too

Many small agents learn side by side by A2C. After each window of N updates, the optimiser itself is updated, such that the
agents' next gradients agree with what it did. Gradients are recorded on a tape and never differentiated through.

Copy this file into your project and edit it: the import from cleanrl_memoroid is optional. `LearnedOptimizer` is used as those
of torch.optim are. Shapes: K agents, E environments each, P weights of an agent, N updates of a window, S sampled coordinates.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14","tyro>=0.9","numpy","tensorboard","tqdm"]
# ///
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    from cleanrl_memoroid.runs import catch_stop_signals, check_flags, load, new_run_dir, save
    from cleanrl_memoroid.scan import linear_scan, tune_cpu
except ImportError:  # without the package: the same results, more slowly, and no checks of flags and files
    linear_scan, tune_cpu, catch_stop_signals, check_flags = None, lambda: None, lambda on=True: [], lambda *_: None
    new_run_dir, load = "runs/{}".format, lambda path, *_: torch.load(path, "cpu", weights_only="model.pt" in path)

    def save(path, content):  # writes the whole file or nothing, even if the process is killed meanwhile
        torch.save(content, f"{path}.partial")
        os.replace(f"{path}.partial", path)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment; on a CPU, equal seeds give equal runs
    track: bool = False  # if toggled, also log to Weights and Biases (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "cleanrl-memoroid"  # the project name in Weights and Biases (the team: WANDB_ENTITY)
    checkpoint_interval: int = 20  # windows between checkpoints, for --resume; 0: at Ctrl-C only (windows)
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory: test its learned optimiser on fresh agents, and exit
    identity: bool = False  # if toggled, measure how well networks copy gradients under each --grad-proc, and exit

    # Agents: A2C
    env_id: Literal["catch", "grid", "cartpole"] = "catch"  # the task, of this file
    num_agents: int = 8  # the number of agents K that meta-training trains side by side
    num_envs: int = 16  # the number of environments E of each agent
    num_steps: int = 20  # the number of steps of a rollout, after which an agent is updated (steps)
    gamma: float = 0.995  # the discount factor gamma
    gae_lambda: float = 0.95  # the lambda of TD(lambda)
    ent_coef: float = 0.01  # coefficient of the entropy
    alpha: float = 1e-3  # step size that the optimiser's output is multiplied by

    # Meta-training
    num_windows: int = 180  # windows, after each of which the optimiser is updated
    num_updates: int = 4  # updates N of each agent in a window (updates)
    life: int = 64  # windows until an agent begins anew; agents take turns (windows)
    pipeline: bool = True  # if toggled, agents begin anew one after another; else all at once
    credit: Literal["final", "every"] = "final"  # an update is judged by the gradient after the window, or by all later ones
    sample: int = 2048  # coordinates S of all agents' weights that an update of the optimiser is computed from
    meta_lr: float = 1e-2  # the learning rate of Adam, which trains the optimiser
    max_grad_norm: float = 0.5  # the maximum norm of the optimiser's gradient
    num_validations: int = 2  # how often fresh agents rate the optimiser, over the last half; the best is kept; 0: the last is
    valid_agents: int = 8  # the number of those agents
    test_agents: int = 32  # fresh agents that each optimiser is tested on; 0: no test
    test_updates: int = 200  # updates of each of them (updates)
    baselines: bool = True  # if toggled, known optimisers are tested beside it, each at five rates

    # Memory specific arguments
    structure: Literal["adaptive", "linear", "momentum", "raw"] = "adaptive"  # what the network's outputs mean
    grad_proc: Literal["none", "signlog", "l2l", "asinh"] = "signlog"  # what of the gradient the network sees
    hidden_size: int = 8  # units of each GRU


class Catch:
    """A ball falls from a random column of 5 through 10 rows; the paddle below has to be there: 1, else -1. [K, E] of them."""

    num_obs, num_actions = 50, 3

    def __init__(self, agents, envs):
        self.shape = agents, envs
        self.ball, self.paddle = torch.zeros(2, agents, envs, dtype=torch.long)  # the ball's cell of 50, the paddle's column
        cells = torch.eye(50)
        self.pictures = cells[:, None] + cells[45:]  # of each cell of the ball and column of the paddle, [50, 5, 50]
        self.begin(torch.ones(agents, envs, dtype=torch.bool))

    def begin(self, which):
        self.ball = torch.where(which, torch.randint(5, self.shape), self.ball)
        self.paddle = self.paddle.masked_fill(which, 2)

    def observe(self):
        """Two cells of 50 are one: the ball's and the paddle's. [K, E, 50]"""
        return self.pictures[self.ball, self.paddle]

    def step(self, actions):
        """Actions 0, 1, 2: left, stay, right. -> rewards and whether an episode has ended, [K, E]; ended ones begin anew."""
        self.paddle = (self.paddle + actions - 1).clamp(0, 4)
        self.ball = self.ball + 5
        ended = self.ball >= 45
        reward = torch.where(self.ball == self.paddle + 45, 1.0, -1.0) * ended
        self.begin(ended)
        return reward, ended


class Grid:
    """A room of 4 x 6 cells with a good object (1) and a bad one (-1, which ends the episode half of the time); 50 steps.

    An object that was taken is away, and comes back somewhere with probability 0.5 a step. Nine moves: to a neighbour or none.
    """

    num_obs, num_actions = 72, 9

    def __init__(self, agents, envs):
        self.shape = agents, envs
        self.at, self.t = torch.zeros(2, agents, envs, dtype=torch.long)
        self.objects = torch.zeros(2, agents, envs, dtype=torch.long)  # cells of the good and the bad one; 24: away
        self.begin(torch.ones(agents, envs, dtype=torch.bool))

    def begin(self, which):
        self.at = torch.where(which, torch.randint(24, self.shape), self.at)
        self.objects = torch.where(which, torch.randint(24, (2, *self.shape)), self.objects)
        self.t = torch.where(which, 0, self.t)

    def observe(self):
        """Three maps of 24 cells: the agent, the good object, the bad one. [K, E, 72]"""
        maps = [F.one_hot(cells, 25)[..., :24] for cells in (self.at, *self.objects)]
        return torch.cat(maps, -1).float()

    def step(self, actions):
        row = (self.at // 6 + actions // 3 - 1).clamp(0, 3)
        column = (self.at % 6 + actions % 3 - 1).clamp(0, 5)
        self.at, self.t = 6 * row + column, self.t + 1
        taken = self.objects == self.at
        reward = taken[0].float() - taken[1].float()
        back = (self.objects == 24) & (torch.rand(self.objects.shape) < 0.5)
        self.objects = torch.where(taken, 24, torch.where(back, torch.randint(24, self.objects.shape), self.objects))
        ended = (taken[1] & (torch.rand(self.shape) < 0.5)) | (self.t == 50)
        self.begin(ended)
        return reward, ended


class CartPole:
    """As Gymnasium's CartPole-v1: a reward of 1 per step until the pole or the cart is out of bounds, 500 at most."""

    num_obs, num_actions = 4, 2

    def __init__(self, agents, envs):
        self.shape = agents, envs
        self.state, self.t = torch.zeros(agents, envs, 4), torch.zeros(agents, envs, dtype=torch.long)
        self.begin(torch.ones(agents, envs, dtype=torch.bool))

    def begin(self, which):
        self.state = torch.where(which[..., None], torch.rand(*self.shape, 4) * 0.1 - 0.05, self.state)
        self.t = torch.where(which, 0, self.t)

    def observe(self):
        return self.state

    def step(self, actions):
        x, v, angle, spin = self.state.unbind(-1)
        force, sin, cos = 20.0 * actions - 10.0, angle.sin(), angle.cos()
        push = (force + 0.05 * spin**2 * sin) / 1.1  # pole: mass 0.1, half length 0.5; cart: mass 1
        spin_up = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        speed_up = push - 0.05 * spin_up * cos / 1.1
        self.state = torch.stack([x + 0.02 * v, v + 0.02 * speed_up, angle + 0.02 * spin, spin + 0.02 * spin_up], -1)
        self.t = self.t + 1
        out = (self.state[..., 0].abs() > 2.4) | (self.state[..., 2].abs() > 12 * 2 * np.pi / 360)
        ended = out | (self.t == 500)
        self.begin(ended)
        return torch.ones(self.shape), ended


ENVS = {"catch": Catch, "grid": Grid, "cartpole": CartPole}


def discounted_sum(x, decay, ends):
    """y[t] = x[t] + decay y[t+1], which begins anew before an end: a memoroid, scanned from the last step on. [T, ...]"""
    if linear_scan:
        return linear_scan(decay, x.flatten(1), ends.flatten(1), reverse=True).view_as(x)
    rows = list(x)
    for t in range(len(rows) - 2, -1, -1):
        rows[t] = rows[t] + decay * torch.where(ends[t], 0, rows[t + 1])
    return torch.stack(rows)


class Agents:
    """K agents, each with a network of one hidden layer, whose weights are a row of `theta` [K, P], and environments."""

    def __init__(self, env_id, num_agents, args):
        self.args, self.envs = args, ENVS[env_id](num_agents, args.num_envs)
        sizes = (self.envs.num_obs, 32), (32, self.envs.num_actions + 1)
        self.shapes = [shape for fan_in, fan_out in sizes for shape in ((fan_in, fan_out), (1, fan_out))]
        self.theta = self.new_theta(num_agents)
        self.running, self.recent = torch.zeros(num_agents, args.num_envs), torch.full((num_agents,), torch.nan)

    def new_theta(self, num_agents):
        """Weights N(0, 1 / fan_in), biases 0. [K, P]"""
        weights = [torch.randn(num_agents, a * b) / a**0.5 if a > 1 else torch.zeros(num_agents, b) for a, b in self.shapes]
        return torch.cat(weights, 1)

    def begin(self, which):
        """Agents [K] begin anew: weights and environments."""
        self.theta = torch.where(which[:, None], self.new_theta(len(which)), self.theta)
        self.envs.begin(which[:, None].expand(self.envs.shape))
        self.running, self.recent = self.running * ~which[:, None], self.recent.masked_fill(which, torch.nan)

    def layers(self, theta):
        """Two layers' weights and biases, of all agents: theta in pieces."""
        parts = theta.split([a * b for a, b in self.shapes], dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes)]

    def network(self, layers, obs):
        """Logits [K, B, A] and values [K, B] of observations [K, B, O]."""
        w1, b1, w2, b2 = layers
        out = torch.baddbmm(b2, F.relu(torch.baddbmm(b1, obs, w1)), w2)
        return out[..., :-1], out[..., -1]

    def gradient(self):
        """A rollout of each agent, and the gradient of its A2C loss, each coordinate clipped to [-1, 1]. -> [K, P]

        The loss is -log pi(a) err + err^2 / 2 - ent_coef entropy, err the TD(lambda) error, a constant in the first term.
        """
        seen, taken, rewards, ends, sums = [], [], [], [], []
        gumbel = -torch.empty(self.args.num_steps, *self.envs.shape, self.envs.num_actions).exponential_().log()
        layers = self.layers(self.theta)
        for noise in gumbel:
            obs = self.envs.observe()
            logits, _ = self.network(layers, obs)
            action = (logits + noise).argmax(-1)  # a draw from the policy, by the Gumbel-max trick
            reward, ended = self.envs.step(action)
            total = self.running + reward  # of the episode so far
            self.running = total.masked_fill(ended, 0)
            for tape, row in ((seen, obs), (taken, action), (rewards, reward), (ends, ended), (sums, total)):
                tape.append(row)
        seen, rewards, ends = torch.stack([*seen, self.envs.observe()], 1), torch.stack(rewards), torch.stack(ends)
        returns = torch.where(ends, torch.stack(sums), torch.nan).transpose(0, 1).flatten(1).nanmean(1)  # [K]
        self.recent = torch.where(returns.isnan(), self.recent, returns)
        theta = self.theta.requires_grad_()
        logits, values = self.network(self.layers(theta), seen.flatten(1, 2))  # [K, (T + 1) E, ...]
        values = values.unflatten(1, (-1, self.args.num_envs)).transpose(0, 1)  # [T + 1, K, E]
        logprobs = logits.unflatten(1, (-1, self.args.num_envs)).transpose(0, 1)[:-1].log_softmax(-1)
        value = values.detach()
        delta = rewards + self.args.gamma * torch.where(ends, 0, value[1:]) - value[:-1]
        err = discounted_sum(delta, self.args.gamma * self.args.gae_lambda, ends)
        chosen = logprobs.gather(-1, torch.stack(taken)[..., None]).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        v_loss = 0.5 * (err + value[:-1] - values[:-1]) ** 2
        loss = (v_loss - chosen * err - self.args.ent_coef * entropy).mean((0, 2)).sum()  # agents do not share weights
        (grad,) = torch.autograd.grad(loss, theta)
        self.theta = theta.detach()
        return grad.clamp(-1, 1)


def process(g, kind):
    """What the network sees of a gradient: inputs of branch 1, and of branch 2, about its size. [...] -> 2 x [..., d]"""
    size = g.abs()
    if kind == "none":
        return g[..., None], (g**2)[..., None]
    if kind == "signlog":  # the paper's first version
        log = torch.log(size + 1e-18)
        return torch.stack([g.sign(), log], -1), 2 * log[..., None]
    if kind == "l2l":  # Andrychowicz et al. (2016), appendix A, with p = 10
        log = torch.log(size.clamp(min=1e-38)) / 10
        small = log < -1
        first = torch.stack([log.clamp(min=-1), torch.where(small, np.exp(10) * g, g.sign())], -1)
        return first, 2 * log.clamp(min=-1)[..., None]
    y = torch.log1p(size / 1e-8) / np.log(1e8)  # asinh
    return (g.sign() * y)[..., None], 2 * y[..., None]


class GRUCell(nn.Module):
    """Each coordinate of a gradient has a GRU of its own, all with the same weights: gradients in, updates out.

    structure   update of a coordinate (times alpha)                       o: linear in the GRU's state; exponents within +-20
    adaptive    -sgn(g) exp(o1) / sqrt(exp(o2) + 1e-8)                     two GRUs; untrained, it is signSGD
    linear      -(exp(a) g + exp(b) c)                                     one GRU, o = (a, b, c)
    momentum    -sgn(g) exp(o1)
    raw         -o1
    Source: Lan et al. (2024), section 4. Deviates: exponents are clamped.
    """

    def __init__(self, args):
        super().__init__()
        self.structure, self.grad_proc = args.structure, args.grad_proc
        inputs = [x.shape[-1] for x in process(torch.zeros(1), args.grad_proc)][: 1 + (args.structure == "adaptive")]
        self.grus = nn.ModuleList(nn.GRUCell(size, args.hidden_size) for size in inputs)
        outputs = 3 if args.structure == "linear" else 1
        self.heads = nn.ModuleList(nn.Linear(args.hidden_size, outputs) for _ in inputs)
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def initial_state(self, coordinates):
        return torch.zeros(coordinates, len(self.grus) * self.grus[0].hidden_size)

    def step(self, g, state, begins):
        """One update of some coordinates, where `begins` from an empty memory. [S], [S, state], [S] -> [S], [S, state]"""
        states = torch.where(begins[:, None], 0, state).chunk(len(self.grus), -1)
        states = [gru(x, s) for gru, x, s in zip(self.grus, process(g, self.grad_proc), states)]
        o = [head(s) for head, s in zip(self.heads, states)]
        first = o[0].clamp(-20, 20)
        if self.structure == "adaptive":
            update = -g.sign() * first[:, 0].exp() / (o[1][:, 0].clamp(-20, 20).exp() + 1e-8).sqrt()
        elif self.structure == "linear":
            update = -(first[:, 0].exp() * g + first[:, 1].exp() * o[0][:, 2])
        elif self.structure == "momentum":
            update = -g.sign() * first[:, 0].exp()
        else:
            update = -o[0][:, 0]
        return update, torch.cat(states, -1)

    def unroll(self, tape, begins, state):
        """The same for the N gradients of a window. [N, S], [N, S], [S, state] -> [N, S]"""
        updates = []
        for g, begin in zip(tape, begins):
            update, state = self.step(g, state, begin)
            updates.append(update)
        return torch.stack(updates)


class LearnedOptimizer(torch.optim.Optimizer):
    """A trained cell with the interface of torch.optim: `LearnedOptimizer(net.parameters(), "runs/RUN/model.pt", lr=1e-3)`.

    Args:
        params: parameters, or groups of them as dicts, each with an `lr` of its own if it likes.
        path: model.pt of a run of this script.
        lr: the step size alpha. It has to be searched for, as Adam's has.
    """

    def __init__(self, params, path, lr=1e-3):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.cell = make_cell(Args(**saved["args"]))
        self.cell.load_state_dict(saved["cell"])
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.cell.to(p.device)
                begins = torch.full((p.numel(),), not self.state[p], device=p.device)
                memory = self.state[p].get("memory", self.cell.initial_state(p.numel()).to(p.device))
                update, memory = self.cell.step(p.grad.flatten().clamp(-1, 1), memory, begins)
                self.state[p]["memory"] = memory
                p.add_(update.view_as(p), alpha=group["lr"])
        return loss


def make_cell(args):
    return GRUCell(args)


def credit_of(tape, following, begins, how):
    """What each update of a window is judged by: the sum of gradients that came later in the same life. [N, ...] -> [N, ...]

    following: the gradient after the window. final: it alone, for every update. every: all later ones, divided by N.
    """
    if how == "final":
        ends = torch.cat([begins[1:], torch.zeros_like(begins[:1])])
        return discounted_sum(torch.cat([torch.zeros_like(tape[1:]), following[None]]), 1.0, ends)
    later = torch.cat([tape[1:], following[None]])
    ends = torch.cat([begins[1:], torch.zeros_like(begins[:1])])
    return discounted_sum(torch.where(ends, 0, later), 1.0, ends) / len(tape)


def meta_loss(cell, tape, begins, state, credit, idx, alpha):
    """<credit, update> over sampled coordinates: its gradient is that of the agents' next losses by the cell's weights.

    As gradients are constants, d theta[n + 1] / d theta[n] is the identity, and this is exact. tape, credit [N, K P],
    begins [N, K P], state [K P, ...] before the window; idx [S] of the K P coordinates.
    """
    updates = alpha * cell.unroll(tape[:, idx], begins[:, idx], state[idx])
    return (credit[:, idx] * updates).sum() * tape.shape[1] / len(idx)


def test(update_of, env_id, num_agents, args, seed):
    """Mean return of fresh agents after each update, [updates, K]. update_of(g, n): the update of all weights [K, P]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        agents, returns = Agents(env_id, num_agents, args), []
        for n in range(args.test_updates):
            g = agents.gradient()
            agents.theta = (agents.theta + update_of(g, n)).nan_to_num(0, 0, 0)
            returns.append(agents.recent)
    return torch.stack(returns).nan_to_num()


def test_cell(cell, env_id, num_agents, args, seed, alpha=None):
    """The same with a learned optimiser, whose weights stay as they are."""
    memory = []

    @torch.no_grad()
    def update_of(g, n):
        flat = g.flatten()
        state = memory.pop() if memory else cell.initial_state(len(flat))
        update, state = cell.step(flat, state, torch.full((len(flat),), n == 0))
        memory.append(state)
        return (alpha or args.alpha) * update.view_as(g)

    return test(update_of, env_id, num_agents, args, seed)


BASELINES = {  # betas of Adam's moments; None: not kept
    "Adam": (0.9, 0.999),
    "RMSProp": (None, 0.99),
    "Adam, beta1 = 0": (0.0, 0.999),
    "signSGD": (None, None),
}
RATES = 3e-3, 1e-2, 3e-2, 5e-2, 1e-1


def test_baseline(name, env_id, num_agents, args, seed):
    """Returns [updates, rates, agents] of a known optimiser at each of RATES; the agents of all rates side by side."""
    beta1, beta2 = BASELINES[name]
    rates = torch.tensor(RATES).repeat_interleave(num_agents)[:, None]
    moments = [0.0, 0.0]

    def update_of(g, n):
        if beta2 is None:
            return -rates * g.sign()
        moments[0] = g if beta1 is None else beta1 * moments[0] + (1 - beta1) * g
        moments[1] = beta2 * moments[1] + (1 - beta2) * g**2
        correct1, correct2 = (1.0, 1.0) if beta1 is None else (1 - beta1 ** (n + 1), 1 - beta2 ** (n + 1))
        return -rates * (moments[0] / correct1) / ((moments[1] / correct2).sqrt() + 1e-8)

    return test(update_of, env_id, len(RATES) * num_agents, args, seed).unflatten(1, (len(RATES), num_agents))


def summary(returns):
    """Return at the end (mean of the last 20 updates), area under the curve (mean of all), that of the worst agent."""
    auc = returns.mean(0)
    return {"return": returns[-20:].mean().item(), "auc": auc.mean().item(), "worst": auc.min().item()}


def identity(args, kind, seed):
    """Share of a gradient's coordinates, zeros left out, that a network predicts within 10 % if it sees them processed.

    The tape is that of one grid agent under Adam at 1e-2: 200 gradients, every 28th coordinate. An LSTM of 8 units and two
    layers of 16 learn to copy it, in pieces of 5 with the state carried on. kind "scaled": the gradient over its deviation.
    """
    torch.manual_seed(seed)
    agents, moments, tape = Agents("grid", 1, args), [0.0, 0.0], []
    for n in range(200):
        g = agents.gradient()
        moments = [0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g**2]
        agents.theta = agents.theta - 1e-2 * moments[0] / (1 - 0.9 ** (n + 1)) / (
            (moments[1] / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8
        )
        tape.append(g[0, ::28])
    tape = torch.stack(tape)  # [200, P / 28]
    seen = (tape / tape.std())[..., None] if kind == "scaled" else process(tape, kind)[0]
    signed = kind not in ("none", "scaled")  # the output is a size's logarithm, its sign that of the gradient
    scale = tape.std() if kind == "scaled" else 1.0
    lstm = nn.LSTM(seen.shape[-1], 8)
    head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    if signed:
        nn.init.constant_(head[-1].bias, -7.0)
    optimizer, updates = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=3e-3), 2400

    def predict(x, g, state):
        hidden, state = lstm(x, state)
        out = head(hidden)[..., 0]
        return (g.sign() * out.clamp(max=20).exp() if signed else scale * out), state

    state = None
    for n in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - n / updates)
        at = 5 * n % 200
        state = None if at == 0 else tuple(s.detach() for s in state)
        out, state = predict(seen[at : at + 5], tape[at : at + 5], state)
        loss = ((out - tape[at : at + 5]) ** 2).mean() / tape.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        out, _ = predict(seen, tape, None)
    return ((out - tape).abs() <= 0.1 * tape.abs())[tape != 0].float().mean().item()


def meta_test(cell, args, writer=None):
    """Tests the cell, untrained ones and the known optimisers at their rates on the same fresh agents; prints all."""
    seed, lines = args.seed + 10**6, {}
    torch.manual_seed(seed)
    lines[args.exp_name] = test_cell(cell, args.env_id, args.test_agents, args, seed)
    lines["untrained"] = test_cell(make_cell(args), args.env_id, args.test_agents, args, seed)
    for name in BASELINES if args.baselines else ():
        for rate, returns in zip(RATES, test_baseline(name, args.env_id, args.test_agents, args, seed).unbind(1)):
            lines[f"{name} {rate:g}"] = returns
    for name, returns in lines.items():
        print(
            "evaluation: {:<24} return={return:.3f}, auc={auc:.3f}, worst agent {worst:.3f}".format(name, **summary(returns))
        )
        for n, value in enumerate(returns.mean(1).tolist() if writer else ()):
            writer.add_scalar(f"test/{name}", value, n)
            if name == args.exp_name:
                writer.add_scalar("eval/episodic_return", value, n)
        for what, value in summary(returns).items() if writer else ():
            writer.add_scalar(f"test_{what}/{name}", value, args.num_windows)
    return lines


if __name__ == "__main__":
    args, script = tyro.cli(Args, description=__doc__), os.path.basename(__file__)
    run_dir, saved = args.resume or args.evaluate, None
    if run_dir:
        path = os.path.join(run_dir, "checkpoint.pt" if args.resume else "model.pt")
        saved = load(path, script, args)
        args = tyro.cli(Args, default=Args(**saved["args"]))  # the run's own flags, unless given again
    most = {"gamma": 1, "gae_lambda": 1, "meta_lr": 1, "seed": 10**9}
    check_flags(
        args, "seed checkpoint_interval num_validations test_agents".split(), most, saved["args"] if args.resume else {}
    )
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))
    tune_cpu()
    # TRY NOT TO MODIFY: seeding
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(args.seed)
    if args.identity:
        for kind in ("none", "scaled", "signlog", "l2l", "asinh"):
            print(f"identity: {kind:<8} {identity(args, kind, args.seed):.3f} of the coordinates within 10 %")
        sys.exit()
    cell = make_cell(args)
    if args.evaluate:
        cell.load_state_dict(saved["cell"])
        meta_test(cell, args)
        sys.exit()
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    optimizer = torch.optim.Adam(cell.parameters(), lr=args.meta_lr)

    if args.track:
        import wandb

        name = os.path.basename(os.path.abspath(run_dir))
        run = {"name": name, "id": name, "resume": "allow", "config": vars(args)}
        wandb.init(project=args.wandb_project_name, sync_tensorboard=True, save_code=True, **run)
    writer = SummaryWriter(run_dir, purge_step=saved["state"]["window"] + 1 if saved else None)
    writer.add_text("hyperparameters", "\n".join(["|param|value|\n|-|-|", *(f"|{k}|{v}|" for k, v in vars(args).items())]))
    source = Path(__file__).read_text("utf-8")  # the text that made this run stays in its folder
    writer.add_text("source", f"```python\n{source}```")
    if not saved:
        Path(run_dir, script).write_text(source, "utf-8")
    stop = catch_stop_signals()  # empty until Ctrl-C or SIGTERM asks for an end
    # TRY NOT TO MODIFY: start
    start_time = time.process_time()
    agents, window, skipped, renewed = Agents(args.env_id, args.num_agents, args), 0, 0, 0
    coordinates = agents.theta.numel()
    memory, tape = cell.initial_state(coordinates), torch.zeros(args.num_updates, *agents.theta.shape)
    g, best, best_auc = agents.gradient(), None, -np.inf
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the cell's weights
    state = "cell optimizer agents window skipped renewed memory g best best_auc".split()
    if saved:
        globals().update(saved["state"])
        torch.set_rng_state(saved["rng"])
        agents.args = args
    turns = torch.arange(args.num_agents) * args.life // args.num_agents if args.pipeline else torch.zeros(args.num_agents)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    rated = [args.num_windows - n * (args.num_windows // (2 * args.num_validations) or 1) for n in range(args.num_validations)]
    size = f"{args.num_windows} windows of {args.num_updates} updates, {args.num_agents} agents"
    print(f"{args.exp_name}: {args.env_id}, {size}, {scan}")
    weights = sum(p.numel() for p in cell.parameters())
    print(f"{weights} weights learn to train {coordinates // args.num_agents} of each agent; {run_dir}")
    bar = tqdm(total=args.num_windows, initial=window, unit="window", mininterval=0.2 if sys.stderr.isatty() else 5)
    while window < args.num_windows:
        if stop or args.checkpoint_interval and window % args.checkpoint_interval == 0:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            save(f"{run_dir}/checkpoint.pt", content | {"rng": torch.get_rng_state()})
            if stop:
                print(f"stopped; --resume {run_dir} goes on from window {window}")
                sys.exit(128 + stop[0])
        # lives that begin now; weights that are not finite begin anew, too
        broken = ~agents.theta.isfinite().all(1)
        new = ((window + turns) % args.life == 0) & (window > 0) | broken
        renewed += broken.sum().item()
        begins = torch.zeros(args.num_updates, *agents.theta.shape, dtype=torch.bool)
        if new.any():
            agents.begin(new)
            g = agents.gradient()
        begins[0] = (new | (window == 0))[:, None]
        before, begins = memory, begins.flatten(1)
        # a window of the agents' updates, without a graph
        for n in range(args.num_updates):
            tape[n] = g
            with torch.no_grad():
                update, memory = cell.step(g.flatten(), memory, begins[n])
            agents.theta = agents.theta + args.alpha * update.view_as(g)
            g = agents.gradient()
        window += 1
        # the optimiser's own update, by the gradients that came after its updates
        credit = credit_of(tape.flatten(1), g.flatten(), begins, args.credit)
        idx = torch.randint(coordinates, (args.sample,))
        loss = meta_loss(cell, tape.flatten(1), begins, before, credit, idx, args.alpha) / args.num_agents
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(cell.parameters(), args.max_grad_norm)
        if torch.isfinite(loss + grad_norm):
            optimizer.step()
        else:
            skipped += 1
            memory = torch.where(memory.isfinite().all(1, keepdim=True), memory, 0)
        # fresh agents rate it; the best is kept
        if window in rated:
            auc = summary(test_cell(cell, args.env_id, args.valid_agents, args, args.seed + 10**7))["auc"]
            writer.add_scalar("meta/validation_auc", auc, window)
            if auc > best_auc:
                best, best_auc = {name: v.clone() for name, v in cell.state_dict().items()}, auc
        # TRY NOT TO MODIFY: record what happens
        logs = {"meta_loss": loss, "grad_norm": grad_norm, "skipped": skipped, "renewed": renewed}
        for name, value in {**logs, "gradient_size": g.abs().mean()}.items():
            writer.add_scalar(f"meta/{name}", value, window)
        writer.add_scalar("charts/episodic_return", agents.recent.nanmean(), window)  # of the agents in training
        bar.set_postfix(episodic_return=agents.recent.nanmean().item(), refresh=False)
        bar.update(window - bar.n)
    bar.close()
    catch_stop_signals(on=False)
    cell.load_state_dict(best or cell.state_dict())
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "cell": cell.state_dict()})
    seconds = f"{time.process_time() - start_time:.1f} seconds of CPU; {skipped} skipped, {renewed} agents renewed"
    print(f"meta-trained for {window} windows, {seconds}; the optimiser is {run_dir}/model.pt")
    if args.test_agents:
        meta_test(cell, args, writer)
    writer.close()
