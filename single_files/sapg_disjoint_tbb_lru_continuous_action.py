# docs: docs/sapg.md
# Variant of single_files/sapg_tbb_lru_continuous_action.py. Changed: Network (was Args.latent_at, Args.latent_size), Agent
# SAPG: Singla, Agarwal, Pathak (2024), "SAPG: Split and Aggregate Policy Gradients", https://arxiv.org/abs/2407.20230
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
"""SAPG for continuous actions, in which each policy has a network of its own: what a shared network is worth.

    python single_files/sapg_disjoint_tbb_lru_continuous_action.py                     # a hill too high for PPO, on a CPU
    python single_files/sapg_disjoint_tbb_lru_continuous_action.py --aggregation none  # nobody borrows: independent learners
    python single_files/sapg_disjoint_tbb_lru_continuous_action.py --resume runs/RUN   # continue a killed run exactly
    python single_files/sapg_disjoint_tbb_lru_continuous_action.py --evaluate runs/RUN # the leader's greedy episodes

Copy this file into your project and edit it: the import from cleanrl_memoroid is optional and only makes it faster.
Shapes: S steps of a rollout, N environments, M policies, T rows of E columns (environments) of a batch; O observation, D
numbers of an action, H width, P complex numbers of memory; time comes first. Does not include: images.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14","gymnasium>=1.1","popgym>=1.0.7","tyro>=0.9","numpy","cloudpickle","tensorboard","tqdm"]
# ///
import contextlib
import os
import random
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    from cleanrl_memoroid.runs import Checked, catch_stop_signals, check_flags, checkpoint, env_errors, load, new_run_dir, save
    from cleanrl_memoroid.scan import linear_scan, tune_cpu
except ImportError:  # without the package: the same results, more slowly, and no checks of flags, files, environments
    linear_scan, tune_cpu, catch_stop_signals, check_flags = None, lambda: None, lambda on=True: [], lambda *_: None
    Checked, load = lambda env, idx: env, lambda path, *_: torch.load(path, "cpu", weights_only="model.pt" in path)
    env_errors, new_run_dir = contextlib.nullcontext, "runs/{}".format

    def save(path, content):  # writes the whole file or nothing, even if the process is killed meanwhile
        torch.save(content, f"{path}.partial")
        os.replace(f"{path}.partial", path)

    def checkpoint(path, content, envs, stop):
        try:
            content["envs"] = cloudpickle.dumps((envs.envs, random.getstate(), np.random.get_state(), torch.get_rng_state()))
        except Exception as error:  # whatever an environment raises
            print(f"the environment cannot be saved ({error}): --resume will begin new episodes")
        save(path, content)
        return lambda actions, outcome: None


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment; on a CPU, equal seeds give equal runs
    cuda: bool = False  # if toggled, train on the CUDA device (networks this small are as fast on a CPU)
    track: bool = False  # if toggled, also log to Weights and Biases (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "cleanrl-memoroid"  # the project name in Weights and Biases (the team: WANDB_ENTITY)
    capture_video: bool = False  # if toggled, record an episode of the evaluation in `videos/`
    eval_episodes: int = 100  # number of greedy episodes after training and with --evaluate; 0: none (episodes)
    eval_max_steps: int = 10_000  # an evaluation stops here; running episodes count with their return so far (steps)
    checkpoint_interval: int = 50_000  # environment steps between checkpoints, for --resume; 0: at Ctrl-C only (steps)
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory whose trained model plays greedy episodes; then exit

    # Algorithm specific arguments
    env_id: str = "HillCar-v0"  # HillCar-v0, HillCarCue-v0, or any environment with vector observations and Box actions
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # for its constructor: k 10 num_decks 2
    prev_action: bool = True  # if toggled, POPGym observations include the previous action
    total_timesteps: int = 1_966_080  # total timesteps of the experiment, over all environments (steps)
    learning_rate: float = 2e-3  # the learning rate of the optimizer; that of log_std is three times as large
    num_envs: int = 1024  # the number of parallel environments, a multiple of --num-policies
    num_steps: int = 32  # the number of steps S to run in each environment per policy rollout (steps)
    anneal_lr: bool = False  # if toggled, the learning rate falls linearly to zero
    gamma: float = 0.99  # the discount factor gamma
    gae_lambda: float = 0.95  # the lambda for the general advantage estimation
    num_minibatches: int = 4  # the number of minibatches; TBB: each has whole environments, whose steps stay in order
    update_epochs: int = 4  # the K epochs to update the policy
    norm_reward: bool = False  # if toggled, divide rewards by the standard deviation of the discounted return so far
    norm_adv: bool = True  # if toggled, advantages are normalised over the whole batch, borrowed rows included
    clip_coef: float = 0.2  # the surrogate clipping coefficient
    ent_coef: float = 0.0  # coefficient of the entropy, of every policy; followers get --entropy-scale on top
    vf_coef: float = 0.5  # coefficient of the value function
    max_grad_norm: float = 0.5  # the maximum norm of the gradient
    target_kl: float | None = None  # stop updating after an epoch with a larger KL divergence from the rollout's policy
    truncation_is_terminal: bool = False  # if toggled, a time limit ends the return as termination does (POPGym's reading)

    # Memory specific arguments
    max_prefix: int = 4096  # TBB: at most so many rows of a running episode are read again before a rollout (rows)
    hidden_size: int = 32  # width H (units)
    state_size: int = 16  # complex numbers P in the memory (channels)
    r_min: float = 0.5  # the sizes of lambda begin between this and r_max: close to one, memory lasts long
    r_max: float = 0.99  # see r_min

    # SAPG specific arguments
    num_policies: int = 4  # the number of policies M; 1: PPO
    entropy_scale: float = 0.3  # sigma: policy i has this times i as coefficient of its entropy; 0: no ladder
    aggregation: Literal["leader", "symmetric", "none"] = "leader"  # who borrows rows: the leader, every policy, nobody
    importance: Literal["mu", "one", "naive"] = "mu"  # clip around mu (paper), around 1 (authors' code), no weight at all
    off_policy_ratio: int = 1  # the leader borrows so many blocks' worth of environments
    borrow: Literal["union", "block"] = "union"  # the leader borrows from all followers, or from one at a time (their code)
    borrowed_state: Literal["rescan", "stored"] = "rescan"  # memory before a borrowed rollout: the borrower's, the actor's
    borrowed_lambda: float = 0.0  # lambda of a borrowed row's advantage, by Retrace; 0: a target of one step, as in the paper
    follower_kl: float = 0.0  # coefficient of KL(follower, leader), which keeps followers near (arXiv 2603.01741)
    std_init: float = 0.5  # standard deviation of every policy's actions at the start
    std_min: float = 0.3  # standard deviations are kept between this and --std-max
    std_max: float = 1.0  # see --std-min


class HillCar(gym.vector.VectorEnv):
    """Cars in a valley between two hills, all stepped at once; they see where they are, not how fast.

    Position x, speed v, tops at x = -1 and x = 1; the left hill is twice as high. The force is a third of the right slope's
    steepest pull: a car must swing itself up, by pushing the way it moves. To cross the right top is worth 2, a push `a` costs
    0.01 a^2, so to do nothing is a local optimum. The time limit is 64 steps.

    With `cue`, both hills are low and the car is strong, but the brake holds it for 16 steps. A second number, shown in the
    first step of an episode only, says which top is worth 2 (-1: left, 1: right); the other one costs 1.
    """

    envs = property(lambda self: self, lambda self, saved: vars(self).update(vars(saved)))  # what a checkpoint holds

    def __init__(self, num_envs, cue=False):
        self.num_envs, self.cue, self.spread, self.steps = num_envs, cue, False, 0
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        spaces = [gym.spaces.Box(-np.inf, np.inf, (size,)) for size in (1 + cue, 1)]
        self.single_observation_space, self.single_action_space = spaces
        self.observation_space, self.action_space = (gym.vector.utils.batch_space(space, num_envs) for space in spaces)

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.x, self.v, self.side, self.returns, self.lengths = np.zeros((5, self.num_envs))
        self.t = np.zeros(self.num_envs, int)
        self.visited = np.zeros((40, 40), bool)  # of [-1.2, 1.2] x [-2.4, 2.4], position and speed
        self.begin(np.ones(self.num_envs, bool))
        if self.spread:  # else all first episodes would end in the same step
            self.t = self.rng.integers(64, size=self.num_envs)
        return self.observe(np.ones(self.num_envs, bool)), {}

    def begin(self, which):
        count = which.sum()
        self.x[which], self.v[which], self.t[which] = self.rng.uniform(-0.1, 0.1, count), 0, 0
        self.returns[which], self.lengths[which] = 0, 0
        self.side[which] = self.rng.choice([-1, 1], count) if self.cue else 1

    def observe(self, begins):
        return np.stack([self.x, self.side * begins][: 1 + self.cue], -1).astype(np.float32)

    def step(self, actions):
        push = actions[:, 0].astype(np.float64)
        height = np.where((self.x < 0) & (not self.cue), 2, 1)
        force = (2 if self.cue else 0.5) * push.clip(-1, 1)
        self.v = self.v + 0.25 * (force - np.pi / 2 * height * np.sin(np.pi * self.x))
        self.v = np.where(self.t < 16 * self.cue, 0, self.v)
        self.x = self.x + 0.25 * self.v
        self.t, self.steps = self.t + 1, self.steps + 1
        if self.steps % 4 == 0:
            where = ((self.x / 1.2 + 1) * 20).astype(int), ((self.v / 2.4 + 1) * 20).astype(int)
            self.visited[tuple(i.clip(0, 39) for i in where)] = True
        terminations = np.abs(self.x) > 1
        prize = np.where(self.x * self.side > 1, 2, -1 if self.cue else 0)
        rewards = np.where(terminations, prize, 0) - 0.01 * push**2
        truncations = ~terminations & (self.t >= 64)
        self.returns, self.lengths, ended = self.returns + rewards, self.lengths + 1, terminations | truncations
        infos = {"final_obs": self.observe(np.zeros(self.num_envs, bool))}
        infos["final_info"] = {"episode": {"r": self.returns.copy(), "l": self.lengths.copy()}}
        self.begin(ended)
        return self.observe(ended), rewards, terminations, truncations, infos

    def coverage(self):
        """The share of positions and speeds that any car has been at since this was last asked."""
        share, self.visited[:] = self.visited.mean(), False
        return share


def make_env(env_id, env_kwargs, prev_action=True, idx=0, video_folder=None):
    def thunk():
        if env_id.startswith("popgym-"):
            from popgym.wrappers import Antialias, Flatten, PreviousAction

            # POPGym's wrappers take bare POPGym environments only, without the wrappers of gym.make
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs).unwrapped
            env = PreviousAction(env) if prev_action else env
            env = Flatten(Antialias(env))  # adds the flag "this is the first step", then concatenates everything
        else:
            env = gym.make(env_id, **(env_kwargs | ({"render_mode": "rgb_array"} if video_folder else {})))
            env = env if isinstance(env.observation_space, gym.spaces.Box) else gym.wrappers.FlattenObservation(env)
        space = env.action_space
        if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
            # a Gaussian has no bounds: those of the environment become two of its first standard deviations, if they are any
            bounded = (space.low > -1e6) & (space.high < 1e6) & (space.low < space.high)
            bounds = (np.where(bounded, two, bound) for two, bound in ((-2, space.low), (2, space.high)))
            env = gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, *bounds))
        env = Checked(env, idx)  # copies observations, checks that all numbers are finite, drops infos
        env = gym.wrappers.RecordVideo(env, video_folder) if video_folder else env
        return gym.wrappers.RecordEpisodeStatistics(env)

    return thunk


def resettable(operator, identity):
    """TBB: makes an operator start anew when an episode begins: (h, b) ∘ (h', b') = ((e if b' else h) • h', b or b').

    Source: Morad et al. (2024), eq. 12. It selects instead of multiplying by a mask, because 0 * nan is nan.
    """

    def wrapped(left, right):
        (*left, earlier_begins), (*right, begins) = left, right
        reset = (torch.where(begins[(...,) + (None,) * (h.dim() - begins.dim())], e, h) for e, h in zip(identity, left))
        return *operator(tuple(reset), tuple(right)), earlier_begins | begins

    return wrapped


def associative_scan(operator, elems):
    """TBB: out[t] = elems[0] • elems[1] • ... • elems[t] along time, for a tuple of tensors [T, ...].

    It combines neighbours, scans the result, which is half as long, and fills in the rows between. That takes O(T)
    applications of the operator, O(log T) deep; gradients flow through the operator (Blelloch, 1993, section 1.4).
    """
    steps = len(elems[0])
    if steps == 1:
        return elems
    odd = associative_scan(operator, operator(tuple(e[:-1:2] for e in elems), tuple(e[1::2] for e in elems)))
    rest = operator(tuple(o[: (steps - 1) // 2] for o in odd), tuple(e[2::2] for e in elems))
    even = tuple(torch.cat([e[:1], r]) for e, r in zip(elems, rest))  # out[0], then out[2] = out[1] • elems[2], ...
    if steps % 2:  # an extra row completes the last pair, and is cut off below
        odd = tuple(torch.cat([o, o[-1:]]) for o in odd)
    return tuple(torch.stack(rows, 1).flatten(0, 1)[:steps] for rows in zip(even, odd))


class CarriedColumns:
    """TBB: the rows of every environment's running episode, a column each, which are read again before the next rollout.

    environment    0     1     2
    row            o3    -     o7      A column may still hold rows of an earlier episode: `begins` shuts them off. There are
                   o4'   o0    o8      as many rows as the longest running episode has, but at most --max-prefix. `state` is
                   o5    o1    o9      what the memory held before the first row; of no account where an episode begins there.

    So the memory before a rollout is what the weights of now make of the episode, for whichever policy reads it.
    """

    def __init__(self, obs, begins, state):
        self.obs, self.begins, self.state = obs[:0], begins[:0], state  # [R, N, O], [R, N], [N, P]

    @torch.no_grad()
    def read(self, agent, columns, ids):
        """The memory before the next row of some environments, if policies `ids` read their rows. [E], [E] -> [E, P]"""
        if not len(self.begins):
            return self.state[columns]
        return agent.remember(self.obs[:, columns], self.begins[:, columns], self.state[columns], ids)[0][-1]

    @torch.no_grad()
    def reread(self, agent, rollout, columns, ids, before=None):
        """What policies `ids` make of a rollout (obs, begins) of some environments: as Agent.forward. [E], [E]"""
        before = self.read(agent, columns, ids) if before is None else before
        return agent(*(rows[:, columns] for rows in rollout), before, ids)

    def add(self, obs, begins, next_begins, max_prefix, agent, ids):
        """Appends a rollout, obs [S, N, O] and begins [S, N], and forgets the rows that no running episode needs."""
        obs, begins = torch.cat([self.obs, obs]), torch.cat([self.begins, begins])
        rows = torch.arange(len(begins), 0, -1, device=begins.device)  # from here to the end
        running = torch.where(begins, rows[:, None], len(begins)).amin(0).where(~next_begins, 0)  # of each running episode
        drop = len(begins) - min(int(running.max()), max_prefix)
        self.obs, self.begins = obs[:drop], begins[:drop]
        if (older := (running > len(begins) - drop).nonzero()[:, 0]).numel():  # episodes that --max-prefix cuts
            self.state[older] = self.read(agent, older, ids[older])
        self.obs, self.begins = obs[drop:], begins[drop:]


class ColumnLRU(nn.Module):
    """TBB: one layer, a Linear Recurrent Unit as a memoroid: P complex numbers that each fade and turn at a rate of their own.

    An element of the monoid is (A, x): the factor [P] that its steps multiply earlier memory by, and the memory [P] they add.
    Source: Orvieto et al. (2023), sections 3.3 and 3.4, with the block of their figure 1: LayerNorm, LRU, GELU, GLU, skip.
    """

    def __init__(self, width, state_size, r_min, r_max):
        super().__init__()
        radius = torch.empty(state_size).uniform_(r_min**2, r_max**2).clamp(1e-6, 1 - 1e-6) ** 0.5  # uniform on the ring
        self.norm = nn.LayerNorm(width)
        self.nu = nn.Parameter(torch.log(-torch.log(radius)))
        self.theta = nn.Parameter(torch.log(2 * torch.pi * torch.rand(state_size)))
        self.gamma = nn.Parameter(0.5 * torch.log(1 - radius**2))  # log of the factor that keeps the memory's variance at one
        self.B = nn.Parameter(torch.randn(width, 2 * state_size) / (2 * width) ** 0.5)  # columns Re B, Im B, Re B, ...
        self.C = nn.Parameter(torch.randn(width, 2 * state_size) / state_size**0.5)  # columns Re C, -Im C, Re C, ...
        self.D = nn.Parameter(torch.randn(width))
        self.gate = nn.Linear(width, 2 * width)

    def operator(self, left, right):
        """(A, x) • (A', x') = (A' A, A' x + x'), with the identity (1, 0)."""
        (a, x), (right_a, right_x) = left, right
        return right_a * a, right_a * x + right_x

    def decay(self):
        """lambda = exp(-exp(nu) + i exp(theta)), which a step multiplies the memory by. In double, for its powers. [P] c128"""
        return torch.exp(torch.complex(-self.nu.double().exp(), self.theta.double().exp()))

    def lift(self, obs):
        """What one step adds, exp(gamma) B LN(o), and what the readout needs besides. [.., H] -> [.., P] c64, 2 x [.., H]"""
        normed = self.norm(obs)
        weight = self.gamma.exp().repeat_interleave(2) * self.B
        x = normed @ weight  # a complex matrix product would cost twice this real one
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))), (normed, obs)

    def readout(self, x, lifted):
        """The Markov state o + GLU(GELU(Re(C x) + D LN(o))). [.., P] c64, 2 x [.., H] -> [.., H]"""
        normed, skip = lifted
        y = torch.addcmul(F.linear(torch.view_as_real(x).flatten(-2), self.C), self.D, normed)
        return F.glu(self.gate(F.gelu(y)), dim=-1).add_(skip)

    def scan(self, x, begins, state):
        """TBB: the memory after every step. [T, E, P] c64, [T, E], [E, P] before the first -> [T, E, P] c64"""
        if linear_scan:
            return linear_scan(self.decay(), x, begins, state)
        decay = self.decay().to(x.dtype)
        first = x[:1] + decay * torch.where(begins[:1, :, None], 0, state)  # as if an episode began there
        elems = decay.expand_as(x), torch.cat([first, x[1:]]), begins
        return associative_scan(resettable(self.operator, identity=(1, 0)), elems)[1]


class Network(nn.Module):
    """Encoder, memory and heads of one policy."""

    def __init__(self, obs_size, num_actions, args):
        super().__init__()
        hidden = args.hidden_size
        self.encoder = nn.Linear(obs_size, hidden)
        self.memory = ColumnLRU(hidden, args.state_size, args.r_min, args.r_max)
        self.norm = nn.LayerNorm(hidden)
        self.actor, self.critic = nn.Linear(hidden, num_actions), nn.Linear(hidden, 1)
        self.encoder_norm = nn.LayerNorm(hidden)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.zeros_(self.actor.bias)

    def remember(self, obs, begins, state):
        """The memory after every row [T, E, P], and what the readout needs besides. [T, E, O], [T, E], [E, P]"""
        x, lifted = self.memory.lift(F.leaky_relu(self.encoder_norm(self.encoder(obs))))
        return self.memory.scan(x, begins, state), lifted

    def forward(self, obs, begins, state):
        """Mean actions [T, E, D], values [T, E], and the memory after every row [T, E, P]"""
        states, lifted = self.remember(obs, begins, state)
        markov_state = self.norm(self.memory.readout(states, lifted))
        return self.actor(markov_state), self.critic(markov_state).squeeze(-1), states


# ALGO LOGIC: initialize agent here:
class Agent(nn.Module):
    """All policies, each with a network of its own: column e of a batch is read by policy ids[e]."""

    def __init__(self, envs, args):
        super().__init__()
        obs_space, space = envs.single_observation_space, envs.single_action_space
        if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise ValueError(f"--env-id: expected Box actions of floats, got {space}; no script has SAPG for finite choices")
        if len(obs_space.shape or ()) != 1:
            raise ValueError(f"--env-id: expected vector observations, got {obs_space}; flatten them, or edit this encoder")
        actions = int(np.prod(space.shape))
        self.networks = nn.ModuleList(Network(obs_space.shape[0], actions, args) for _ in range(args.num_policies))
        self.log_std = nn.Parameter(torch.full((args.num_policies, actions), args.std_init).log())

    def by_network(self, method, obs, begins, state, ids):
        """Calls a method of each network on its columns, and puts the columns of what that returns in order again."""
        columns = [(ids == i).nonzero()[:, 0] for i in range(len(self.networks))]
        used = [(network, own) for network, own in zip(self.networks, columns) if len(own)]
        parts = [method(network)(obs[:, own], begins[:, own], state[own]) for network, own in used]
        order = torch.cat(columns).argsort()
        return [torch.cat(part, 1)[:, order] for part in zip(*parts)]

    def remember(self, obs, begins, state, ids):
        """TBB: (the memory after every row [T, E, P],). [T, E, O], [T, E], [E, P], [E]"""
        return self.by_network(lambda network: lambda *rows: network.remember(*rows)[:1], obs, begins, state, ids)

    def forward(self, obs, begins, state, ids):
        """TBB: (means [T, E, D], log_std [E, D]), values [T, E], memory after every row [T, E, P], of T rows of E columns."""
        mean, values, states = self.by_network(lambda network: network, obs, begins, state, ids)
        return (mean, self.log_std[ids]), values, states

    @torch.no_grad()
    def step(self, obs, begins, state, ids):
        """TBB: the same of one step of N environments, without time. [N, O], [N], [N, P], [N] -> [N, D], [N], [N, P]"""
        obs, begins = torch.as_tensor(obs).to(ids.device, torch.float32), torch.as_tensor(begins).to(ids.device)
        (mean, log_std), values, states = self(obs[None], begins[None], state, ids)
        return (mean[0], log_std), values[0], states[0]


def log_prob(policy, actions):
    mean, log_std = policy  # [T, E, D], [E, D]
    return (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)  # -> [T, E]


def kl_divergence(one, other):
    """KL(one, other) of Gaussian policies (mean, log_std), summed over the numbers of an action. -> [T, E]"""
    (mean, log_std), (other_mean, other_log_std) = one, other
    quotient = ((2 * log_std).exp() + (mean - other_mean) ** 2) / (2 * other_log_std).exp()
    return (other_log_std - log_std + 0.5 * quotient - 0.5).sum(-1)


def policy_loss(logprobs, old_logprobs, acted_logprobs, advantages, clip_coef, importance):
    """PPO's loss at each row, whoever acted there, in the form mu min(rho A, clip(rho, 1 - eps, 1 + eps) A), times -1.

    rho = pi / pi_old of the policy that learns; mu = pi_old / pi_acted weighs a borrowed row, and is 1 on an own one. With
    r = pi / pi_acted, this is min(r A, clip(r, mu (1 - eps), mu (1 + eps)) A), the loss of Singla et al. (2024), as mu > 0.
    """
    if importance == "one":  # the authors' code: rho = pi / pi_acted, clipped around 1
        old_logprobs = acted_logprobs
    ratio = (logprobs - old_logprobs).exp()
    weight = (old_logprobs - acted_logprobs).exp() if importance == "mu" else 1
    return weight * torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef))


def borrowed_columns(rng, num_envs, args):
    """Which environments are read by another policy than the one that acted there, and by which: two arrays [B]."""
    block = num_envs // args.num_policies
    if args.aggregation == "none" or args.num_policies == 1:
        return np.zeros((2, 0), int)
    if args.aggregation == "symmetric":  # all policies read the block of the policy so many places on
        shift, columns = rng.integers(1, args.num_policies), np.arange(num_envs)
        return columns, (columns // block - shift) % args.num_policies
    if args.borrow == "union":
        columns = block + rng.permutation(num_envs - block)[: args.off_policy_ratio * block]
    else:
        lenders = 1 + rng.permutation(args.num_policies - 1)[: args.off_policy_ratio]
        columns = (lenders[:, None] * block + np.arange(block)).flatten()
    return columns, np.zeros_like(columns)


def retrace(mu, borrowed_lambda):
    """lambda min(1, mu[t+1]) at row t: what counts of the rows behind it. Source: Munos et al. (2016), Retrace. [S, E]"""
    return borrowed_lambda * F.pad(mu[1:].clamp(max=1), (0, 0, 0, 1))


def traced_gae(rewards, values, next_values, ended, gamma, gae_lambda):
    """A[t] = delta[t] + gamma lambda A[t+1], where delta = r + gamma V(s') - V(s): Schulman et al. (2016), eq. 16. [S, N]

    TBB: this recurrence is a memoroid, too: a scan from the last step to the first, which starts anew at an episode's end.
    next_values: 0 if the episode terminated, else the value of the next observation, or of the final one if it was cut off.
    gae_lambda: a number, or one for each row [S, N].
    """
    delta = rewards + gamma * next_values - values
    if linear_scan:
        return linear_scan(gamma * gae_lambda, delta, ended, reverse=True)
    # (a, x) • (a', x') = (a' a, a' x + x'), with the identity (1, 0)
    operator = resettable(lambda left, right: (right[0] * left[0], right[0] * left[1] + right[1]), identity=(1, 0))
    elems = (gamma * gae_lambda + torch.zeros_like(delta)).flip(0), delta.flip(0), ended.flip(0)
    return associative_scan(operator, elems)[1].flip(0)


@torch.no_grad()
def values_of_next(agent, rollout, values, states, columns, ids):
    """V(s') of what follows each row, for the policies that read the columns. [S, E], [S, E, P] -> [S, E]

    That is the value of the next row; after a termination 0; after a truncation the value of the episode's final observation.
    """
    next_obs, next_begins, ended, cut_off, final_obs = rollout
    last = agent.step(next_obs[columns], next_begins[columns], states[-1], ids)[1]
    step, column = cut_off[:, columns].nonzero(as_tuple=True)
    final = torch.zeros_like(values)
    if len(step):
        rows = final_obs[step, columns[column]], torch.zeros_like(step, dtype=torch.bool)
        final[step, column] = agent.step(*rows, states[step, column], ids[column])[1]
    return torch.where(ended[:, columns], final, torch.cat([values[1:], last[None]]))


def env_actions(envs, actions):
    """Actions [N, D] in the shape in which the environments take them."""
    return actions.cpu().numpy().reshape(envs.action_space.shape)


def make_envs(args, num_envs, video_folder=None):
    """A vector environment that resets in the step that ends an episode: infos["final_obs"] has the final observation."""
    if args.env_id in ("HillCar-v0", "HillCarCue-v0"):
        return HillCar(num_envs, cue="Cue" in args.env_id)
    make = [args.env_id, args.env_kwargs, args.prev_action]
    fns = [make_env(*make, i, video_folder if i == 0 else None) for i in range(num_envs)]
    return gym.vector.SyncVectorEnv(fns, autoreset_mode="SameStep")


def evaluate(agent, envs, args):
    """Returns of the leader's greedy episodes, one in each environment: short ones do not count more often. [E]"""
    seed, leader = args.seed + 10**6, torch.zeros(envs.num_envs, dtype=torch.long, device=agent.log_std.device)
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):  # environments may draw from each
        seed_one(seed)
    obs, _ = envs.reset(seed=seed)
    recurrent_state = torch.zeros(len(obs), args.state_size, dtype=torch.complex64, device=leader.device)
    steps, returns, begins, running = 0, np.zeros(len(obs)), *np.ones((2, len(obs)), bool)
    while running.any() and steps < args.eval_max_steps:
        policy, _, recurrent_state = agent.step(obs, begins, recurrent_state, leader)
        obs, rewards, terminations, truncations, _ = envs.step(env_actions(envs, policy[0]))
        returns += rewards * running
        begins, running, steps = np.zeros_like(running), running & ~(terminations | truncations), steps + 1
    envs.close()
    cut = f"; {running.sum()} cut off by --eval-max-steps" if running.any() else ""
    print(f"evaluation: episodic_return={returns.mean():.4f}, the mean of {len(obs)} greedy episodes of {args.env_id}{cut}")
    return returns


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where `--env-id my_module:My-v0` may lie
    args, script = tyro.cli(Args, description=__doc__), os.path.basename(__file__)
    run_dir, saved = args.resume or args.evaluate, None
    if run_dir:
        path = os.path.join(run_dir, "checkpoint.pt" if args.resume else "model.pt")
        saved = load(path, script, args)
        args = tyro.cli(Args, default=Args(**{**saved["args"], "env_kwargs": {}}))  # the run's own flags, unless given again
        args.env_kwargs = args.env_kwargs or saved["args"]["env_kwargs"]
    check_flags(args, ["eval_episodes"] * (not args.evaluate), {}, saved["args"] if args.resume else {})
    if args.num_envs % args.num_policies:
        raise ValueError(f"--num-envs {args.num_envs}: expected a multiple of --num-policies {args.num_policies}; change one")
    if 1 < args.num_policies <= args.off_policy_ratio:
        most = f"{args.num_policies - 1} (--num-policies less the leader)"
        raise ValueError(f"--off-policy-ratio: expected at most {most}, got {args.off_policy_ratio}; lower it")
    if args.num_minibatches > (most := args.num_envs):
        raise ValueError(f"--num-minibatches: expected at most --num-envs {most}, got {args.num_minibatches}; lower it")
    if not 0 < args.std_min <= args.std_init <= args.std_max:
        got = f"{args.std_min}, {args.std_init} and {args.std_max}"
        raise ValueError(f"--std-min, --std-init, --std-max: expected 0 < min <= init <= max, got {got}; change them")
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))  # more are slower, unless networks are large and cores idle
    tune_cpu()
    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)  # of all draws after the initial weights
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    # env setup
    with env_errors(args.env_id):  # they name the flags
        envs = make_envs(args, args.num_envs)
        if args.capture_video:  # if it cannot be recorded, say so before training
            make_env(args.env_id, args.env_kwargs, args.prev_action, 0, "videos")().close()
    agent = Agent(envs, args).to(device)
    if saved:
        saved = torch.load(path, map_location=device, weights_only=not args.resume) if args.cuda else saved
        weights = saved["agent"] if args.evaluate else saved["state"]["agent"].state_dict()
        if [v.shape for v in weights.values()] != [v.shape for v in agent.state_dict().values()]:
            raise ValueError(f"--env-id {args.env_id}, or sizes of layers: not those of the network in {path}; leave them out")
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-"))
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    video_folder = f"videos/{run_name}" if args.capture_video else None
    if args.evaluate:
        agent.load_state_dict(weights)
        evaluate(agent, make_envs(args, args.eval_episodes, video_folder), args)
        sys.exit()
    others = [p for p in agent.parameters() if p is not agent.log_std]
    optimizer = torch.optim.Adam([{"params": others}, {"params": [agent.log_std]}], lr=args.learning_rate, fused=True)
    if args.track:
        import wandb

        run = {"name": run_name, "id": run_name, "resume": "allow", "config": vars(args)}
        wandb.init(project=args.wandb_project_name, sync_tensorboard=True, save_code=True, **run)
    writer = SummaryWriter(run_dir, purge_step=saved["state"]["global_step"] + 1 if saved else None)
    writer.add_text("hyperparameters", "\n".join(["|param|value|\n|-|-|", *(f"|{k}|{v}|" for k, v in vars(args).items())]))
    source = Path(__file__).read_text("utf-8")  # the text that made this run stays in its folder
    writer.add_text("source", f"```python\n{source}```")
    if not saved:
        Path(run_dir, script).write_text(source, "utf-8")
    stop = catch_stop_signals()  # empty until Ctrl-C or SIGTERM asks for an end
    # TRY NOT TO MODIFY: start the game
    envs.spread = True  # HillCar: not all first episodes end in the same step
    obs = torch.zeros(args.num_steps, *envs.observation_space.shape, device=device)
    begins = torch.zeros(args.num_steps, args.num_envs, dtype=torch.bool, device=device)
    return_rms, global_step = gym.wrappers.utils.RunningMeanStd(), 0  # the former of discounted returns, for --norm-reward
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the agent's weights
    state = "agent optimizer carried_tape rng global_step next_obs next_begins discounted return_rms".split()
    if saved:
        globals().update(saved["state"])
        where = [saved["args"][name] == getattr(args, name) for name in ("env_id", "env_kwargs", "prev_action", "num_envs")]
    if saved and saved.get("envs") and all(where):
        envs.envs, *random_states = cloudpickle.loads(saved["envs"])
        for set_state, value in zip((random.setstate, np.random.set_state, torch.set_rng_state), random_states):
            set_state(value)
    else:
        if saved:
            print("the environments are new or could not be saved: new episodes begin, the run differs from one never stopped")
        next_obs, _ = envs.reset(seed=int(rng.integers(2**31)) if saved else args.seed)
        next_begins, discounted = np.ones(args.num_envs, bool), np.zeros(args.num_envs)  # is next_obs[i] its episode's first?
        nothing = torch.zeros(args.num_envs, args.state_size, dtype=torch.complex64, device=device)
        carried_tape = CarriedColumns(obs, begins, nothing)
    # ALGO Logic: Storage setup
    final_obs, gains = torch.zeros_like(obs), np.zeros(begins.shape, np.float32)  # gains: rewards, moved once a rollout
    ends, cuts = np.zeros((2, *begins.shape), bool)
    block, all_columns = args.num_envs // args.num_policies, torch.arange(args.num_envs, device=device)
    ids = all_columns // block  # the policy that acts in each environment
    ent_coefs = args.ent_coef + args.entropy_scale * torch.arange(args.num_policies, device=device)  # SAPG: the ladder
    start_time, start_step, recent_returns = time.time(), global_step, deque(maxlen=100)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    size = f"{4e-9 * obs[0].numel() * (args.num_steps + args.max_prefix):.2f} GB of observations at most"
    print(f"{num_iterations} rollouts of {args.num_steps} steps; {size}; {run_dir}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=0.2 if sys.stderr.isatty() else 5)
    for iteration in range(global_step // batch_size + 1, num_iterations + 1):
        due = stop or args.checkpoint_interval and global_step % args.checkpoint_interval < batch_size
        if due:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            finish = checkpoint(f"{run_dir}/checkpoint.pt", content, envs, stop)
        anneal = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1
        for group, factor in zip(optimizer.param_groups, (1, 3)):
            group["lr"] = factor * anneal * args.learning_rate
        state_before = recurrent_state = carried_tape.read(agent, all_columns, ids)
        acted, returns_of = [], [[] for _ in range(args.num_policies)]  # [S] of tuples; returns of each block's episodes
        noise = rng.standard_normal((*begins.shape, agent.log_std.shape[-1]), np.float32)
        noise = torch.from_numpy(noise).to(device)  # of all steps at once: every transfer to a device waits for it
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step], begins[step] = torch.as_tensor(next_obs), torch.as_tensor(next_begins)
            # ALGO LOGIC: action logic
            policy, value, recurrent_state = agent.step(next_obs, next_begins, recurrent_state, ids)
            action = policy[0] + policy[1].exp() * noise[step]
            acted.append((action, log_prob(policy, action), value, recurrent_state))
            # TRY NOT TO MODIFY: execute the game and log data.
            taken = env_actions(envs, action)
            outcome = next_obs, reward, terminations, truncations, infos = envs.step(taken)
            if due and step == 0:
                finish(taken, outcome)  # this step shows whether a copy of the environments does the same
            next_begins = terminations | truncations
            discounted = discounted * args.gamma + reward
            return_rms.update(discounted)
            discounted[next_begins] = 0
            scale = np.sqrt(return_rms.var + 1e-8) if args.norm_reward else 1.0
            gains[step], ends[step] = reward / scale, next_begins
            # TBB: an episode cut off by a time limit is worth what its final observation is, remembering all before it
            over = cuts[step] = truncations & ~terminations & (not args.truncation_is_terminal)
            if over.any():
                final_obs[step, over] = torch.as_tensor(np.stack(infos["final_obs"][over])).to(obs)
            for i in np.flatnonzero(next_begins):
                returns_of[i // block].append(infos["final_info"]["episode"]["r"][i])
                if i < block:  # the leader's are what counts
                    recent_returns.append(returns_of[0][-1])
                    writer.add_scalar("charts/episodic_return", recent_returns[-1], global_step)
                    writer.add_scalar("charts/episodic_length", infos["final_info"]["episode"]["l"][i], global_step)
        actions, logprobs, values, states = (torch.stack(v) for v in zip(*acted))
        # bootstrap value if not done
        rewards, ended, cut_off = (torch.from_numpy(v).to(device) for v in (gains, ends, cuts))
        rollout = torch.as_tensor(next_obs).to(obs), torch.as_tensor(next_begins).to(begins), ended, cut_off, final_obs
        next_values = values_of_next(agent, rollout, values, states, all_columns, ids)
        advantages = traced_gae(rewards, values, next_values, ended, args.gamma, args.gae_lambda)
        explained_var = 1 - advantages.var() / (advantages + values).var()
        # [S, E, ...]; the fourth is of the policy that reads, the fifth of the one that acted: the same on own rows
        batch = [obs, begins, actions, logprobs, logprobs, advantages, advantages + values]
        readers, front = ids, state_before
        # SAPG: borrowed columns, which another policy than the one that acted reads; targets are of one step
        columns, borrowers = (torch.as_tensor(v).to(device) for v in borrowed_columns(rng, args.num_envs, args))
        if len(columns):
            stored = args.borrowed_state == "stored"
            before = state_before[columns] if stored else carried_tape.read(agent, columns, borrowers)
            policy, value, states = carried_tape.reread(agent, (obs, begins), columns, borrowers, before)
            old_logprobs, acted_logprobs = log_prob(policy, actions[:, columns]), logprobs[:, columns]
            mu = (old_logprobs - acted_logprobs).exp()
            next_value = values_of_next(agent, rollout, value, states, columns, borrowers)
            traces = retrace(mu, args.borrowed_lambda)
            advantage = traced_gae(rewards[:, columns], value, next_value, ended[:, columns], args.gamma, traces)
            borrowed = *(v[:, columns] for v in batch[:3]), old_logprobs, acted_logprobs, advantage, advantage + value
            batch = [torch.cat(pair, 1) for pair in zip(batch, borrowed)]
            readers, front = torch.cat([ids, borrowers]), torch.cat([front, before])
            writer.add_scalar("sapg/effective_sample_size", mu.sum() ** 2 / (mu**2).sum() / mu.numel(), global_step)
            writer.add_scalar("sapg/largest_weight", mu.max(), global_step)
        if args.norm_adv:
            batch[5] = (batch[5] - batch[5].mean()) / (batch[5].std() + 1e-8)
        if args.follower_kl:  # what the leader would do on all rows
            everything = torch.cat([all_columns, columns])
            leads, _, _ = carried_tape.reread(agent, (obs, begins), everything, torch.zeros_like(readers))
        # Optimizing the policy and value network
        clipped, logprob_error = [], None
        for _ in range(args.update_epochs):
            for mb in np.array_split(rng.permutation(len(readers)), args.num_minibatches):
                mb = torch.as_tensor(mb).to(device)
                own = mb < args.num_envs  # the columns behind them are borrowed
                mb_obs, mb_begins, mb_actions, mb_old, mb_acted, mb_advantages, mb_returns = (v[:, mb] for v in batch)
                policy, newvalue, _ = agent(mb_obs, mb_begins, front[mb], readers[mb])
                newlogprob = log_prob(policy, mb_actions)
                with torch.no_grad():  # calculate approx_kl http://joschu.net/blog/kl-approx.html
                    logratio = newlogprob - mb_old
                    approx_kl = ((logratio.exp() - 1) - logratio).mean()
                    outside = ((logratio.exp() - 1.0).abs() > args.clip_coef).float()
                    clipped.append((outside[:, own].mean(), outside[:, ~own].mean()))
                    if logprob_error is None:  # TBB: before the first update, tape and rollout must be the same policy
                        logprob_error = logratio.abs().max()
                pg_loss = policy_loss(newlogprob, mb_old, mb_acted, mb_advantages, args.clip_coef, args.importance).mean()
                v_loss = 0.5 * ((newvalue - mb_returns) ** 2).mean()
                entropy = (0.5 + 0.5 * np.log(2 * np.pi) + policy[1]).sum(-1)  # [E], the same at every step
                loss = pg_loss - (ent_coefs[readers[mb]] * entropy).mean() + v_loss * args.vf_coef
                if args.follower_kl:
                    apart = kl_divergence(policy, (leads[0][:, mb], leads[1][mb]))
                    loss = loss + args.follower_kl * (apart * (own & (readers[mb] > 0))).mean()
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
                if not torch.isfinite(loss + grad_norm):
                    large = mb_returns.norm() > 1e6  # then a smaller learning rate would not help
                    remedy = "scale rewards" if large else f"--resume {run_dir} with a smaller --learning-rate"
                    raise FloatingPointError(f"step {global_step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}")
                optimizer.step()
                agent.log_std.data.clamp_(np.log(args.std_min), np.log(args.std_max))
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        if logprob_error > 1e-3:
            print(f"warning: rollout and tape differ by {logprob_error:.1e} in log-probability: is `step` what `forward` is?")
        if args.num_policies > 1:  # how far apart the policies are, on some of the rows
            some = all_columns[:: max(1, args.num_envs // 128)]
            whose = [torch.full_like(some, i) for i in range(args.num_policies)]
            readings = [carried_tape.reread(agent, (obs, begins), some, reader)[0] for reader in whose]
            apart = [kl_divergence(one, other).mean() for one in readings for other in readings if one is not other]
            writer.add_scalar("sapg/kl_between_policies", torch.stack(apart).mean(), global_step)
        # TBB: the rollout joins the rows of the running episodes
        carried_tape.add(obs, begins, torch.as_tensor(next_begins).to(device), args.max_prefix, agent, ids)
        # TRY NOT TO MODIFY: record rewards for plotting purposes
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        losses = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy.mean(), "approx_kl": approx_kl}
        losses |= {"clipfrac": np.mean([float(c) for c, _ in clipped]), "explained_variance": explained_var}
        for name, value in {**losses, "grad_norm": grad_norm, "logprob_error": logprob_error}.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        for i, finished in enumerate(returns_of):
            writer.add_scalar(f"sapg/std_{i}", agent.log_std[i].exp().mean(), global_step)
            if finished:
                writer.add_scalar(f"sapg/return_{i}", np.mean(finished), global_step)
        if len(columns):
            writer.add_scalar("sapg/clipfrac_borrowed", np.nanmean([float(c) for _, c in clipped]), global_step)
        if isinstance(envs, HillCar):
            writer.add_scalar("sapg/coverage", envs.coverage(), global_step)
        writer.add_scalar("charts/SPS", int((global_step - start_step) / (time.time() - start_time)), global_step)
        bar.set_postfix(episodic_return=np.mean(recent_returns or [np.nan]), entropy=entropy.mean().item(), refresh=False)
        bar.update(global_step - bar.n)
    bar.close()
    catch_stop_signals(on=False)
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "agent": agent.state_dict()})
    print(f"trained for {global_step:,} steps, {time.time() - start_time:.1f} seconds; the model is {run_dir}/model.pt")
    if args.eval_episodes:
        for idx, episode in enumerate(evaluate(agent, make_envs(args, args.eval_episodes, video_folder), args)):
            writer.add_scalar("eval/episodic_return", episode, global_step + idx)  # --resume deletes it
    envs.close()
    writer.close()
