# docs: docs/ppo_envpool.md
# Variant of single_files/ppo_tbb_lru_minigrid_envpool.py. Changed: GatedLRU, StackedGatedLRU (were LRU, StackedLRU),
#   Agent.__init__
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
# Gates: De et al. (2024), "Griffin: Mixing Gated Linear Recurrences with Local Attention", https://arxiv.org/abs/2402.19427
# envpool: Weng et al. (2022), "EnvPool: A Highly Parallel RL Environment Execution Engine", https://arxiv.org/abs/2206.10558
"""PPO with gated Linear Recurrent Units (LRU) on MiniGrid's memory tasks through envpool: all games run in one call.

    python single_files/ppo_tbb_glru_minigrid_envpool.py                                # solves MemoryS7 on a CPU
    python single_files/ppo_tbb_glru_minigrid_envpool.py --env-id MiniGrid-MemoryS9-v0  # any MiniGrid-* that envpool has
    python single_files/ppo_tbb_glru_minigrid_envpool.py --resume runs/RUN              # continue a run, with new games
    python single_files/ppo_tbb_glru_minigrid_envpool.py --evaluate runs/RUN            # greedy games with the trained model

Needs `pip install 'cleanrl-memoroid[envpool]'`. --resume restores weights, optimiser, random numbers; games begin anew.
Copy this file into your project and edit it: the import from cleanrl_memoroid is optional and only makes it faster.
Shapes: S steps of a rollout, N environments, E of them in a minibatch, T rows of a tape, B of them with a loss; O observation,
A actions, H width, P complex numbers of a layer; time comes first. Does not include: missions, videos, pixels.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6,<2.14","gymnasium>=1.1","tyro>=0.9","numpy","tensorboard","tqdm","envpool>=1.2"]
# ///
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
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
except ImportError:  # without the package: the same results, more slowly, and no checks of flags, files, disks
    linear_scan, tune_cpu, catch_stop_signals, check_flags = None, lambda: None, lambda on=True: [], lambda *_: None
    load, new_run_dir = lambda path, *_: torch.load(path, "cpu", weights_only="model.pt" in path), "runs/{}".format

    def save(path, content):  # writes the whole file or nothing, even if the process is killed meanwhile
        torch.save(content, f"{path}.partial")
        os.replace(f"{path}.partial", path)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment; on a CPU, equal seeds give equal runs, until one is resumed
    cuda: bool = False  # if toggled, train on the CUDA device (networks this small are as fast on a CPU)
    track: bool = False  # if toggled, also log to Weights and Biases (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "cleanrl-memoroid"  # the project name in Weights and Biases (the team: WANDB_ENTITY)
    eval_episodes: int = 100  # number of greedy games after training and with --evaluate; 0: none (games)
    checkpoint_interval: int = 50_000  # environment steps between checkpoints, for --resume; 0: at Ctrl-C only (steps)
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory: play greedy games with its trained model, and exit

    # Algorithm specific arguments
    env_id: str = "MiniGrid-MemoryS7-v0"  # MiniGrid-* of envpool; missions are not read, as the memory tasks have but one
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # of envpool.make: max_episode_steps 100
    total_timesteps: int = 500_000  # total timesteps of the experiment, over all environments (steps)
    learning_rate: float = 1e-3  # the learning rate of the optimizer at the start
    num_envs: int = 64  # the number of parallel environments
    num_steps: int = 64  # the number of steps S to run in each environment per policy rollout (steps)
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to zero
    gamma: float = 0.99  # the discount factor gamma
    gae_lambda: float = 0.99  # the lambda for the general advantage estimation
    num_minibatches: int = 4  # the number of minibatches; TBB: each has whole environments, whose steps stay in order
    update_epochs: int = 4  # the K epochs to update the policy
    norm_reward: bool = False  # if toggled, divide rewards by the standard deviation of the discounted return so far
    norm_adv: bool = True  # if toggled, advantages are normalised over each minibatch
    clip_coef: float = 0.2  # the surrogate clipping coefficient
    clip_vloss: bool = True  # if toggled, the value's loss is clipped, too, as in the paper
    ent_coef: float = 0.03  # coefficient of the entropy
    vf_coef: float = 0.5  # coefficient of the value function
    max_grad_norm: float = 0.5  # the maximum norm of the gradient
    target_kl: float | None = None  # stop updating after an epoch with a larger KL divergence from the rollout's policy
    truncation_is_terminal: bool = False  # if toggled, a time limit ends the return as termination does

    # Memory specific arguments
    max_prefix: int = 4096  # TBB: a running episode keeps so many of its last rows on the tape; 0: its state only (rows)
    hidden_size: int = 128  # width H of every layer (units)
    state_size: int = 64  # complex numbers P in the memory of each layer (channels)
    num_layers: int = 2  # layers of the memory, one above the other
    r_min: float = 0.9  # the sizes of lambda begin between this and r_max: close to one, memory lasts long
    r_max: float = 0.999  # see r_min


class EnvPool:
    """Games of envpool behind the interface of Gymnasium's vector environments, which reset in the same step.

    envpool itself resets one step late: it answers the action that follows an episode's end, whatever it is, with the next
    episode's first observation. On a tape that row would be a transition that never was. So the games that have ended take
    that step at once, by themselves. `view` turns envpool's observations into one array [N, ...], which the network sees.
    """

    def __init__(self, env_id, num_envs, view, options):
        try:
            import envpool

            spec = envpool.make_spec(env_id, **options)
        except (ImportError, KeyError, TypeError) as error:
            remedy = "pip install 'envpool>=1.2', or see its list_all_envs() and make_spec(NAME).config"
            raise ValueError(f"--env-id {env_id}, --env-kwargs {options}: envpool raised {error!r}; {remedy}") from error
        self.make = lambda seeds: envpool.make_gymnasium(env_id, num_envs=num_envs, seed=seeds, **options)
        obs = view(gym.vector.utils.batch_space(spec.gymnasium_observation_space, 1).sample())
        self.num_envs, self.view = num_envs, view
        self.single_observation_space = gym.spaces.Box(0, 255, obs.shape[1:], obs.dtype)
        self.single_action_space = spec.gymnasium_action_space

    def reset(self, seed):
        """First observations [N, ...] of new games, which envpool makes for it, as it takes seeds only then."""
        self.games = self.make([seed + i for i in range(self.num_envs)])
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return self.view(self.games.reset()[0]), {}

    def step(self, actions):
        """As of Gymnasium. Under episodic_life a lost life is a termination; infos["game_over"] [N] is the end of a game."""
        obs, rewards, terminations, truncations, infos = self.games.step(actions)
        # Atari says in infos that a game is over, also when that is in the very step of its time limit
        over = infos.get("terminated", terminations).astype(bool)
        terminations, over = terminations | truncations & over, truncations | over
        self.returns, self.lengths = self.returns + rewards, self.lengths + 1
        infos |= {"game_over": over, "final_info": {"episode": {"r": self.returns, "l": self.lengths}}}
        self.returns, self.lengths = np.where(over, 0, self.returns), np.where(over, 0, self.lengths)
        obs, ended = self.view(obs), np.flatnonzero(terminations | truncations)
        if len(ended):
            infos["final_obs"] = obs.copy()
            obs[ended] = self.view(self.games.step(actions[ended], ended)[0])  # these actions are ignored
        return obs, rewards, terminations, truncations, infos

    def close(self):
        self.games.close()


def minigrid_view(obs):
    """The 7 x 7 cells ahead, three symbols each, and the direction that the agent faces. {name: [N, ...]} -> [N, 148] uint8"""
    return np.concatenate([obs["image"].reshape(len(obs["image"]), -1), obs["direction"][:, None]], 1).astype(np.uint8)


def make_env(env_id, num_envs, options):
    """Of seven actions turning and walking, which are all that the memory tasks need; --env-kwargs action_max 6: all."""
    if not env_id.startswith("MiniGrid-") or "agent_view_size" in options:
        raise ValueError(f"--env-id {env_id}, --env-kwargs {options}: expected MiniGrid-* of 7 x 7 cells; or adapt OneHot")
    return EnvPool(env_id, num_envs, minigrid_view, {"action_max": 2, "num_threads": 1} | options)


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


class Sections(NamedTuple):
    """TBB: the last rollout of some environments, a section for each, which begins with the rows of its running episode.

    section        environment 0                            | environment 3
    row            0     1     2     3     4     5     6    | 7     8     9     10
    obs            o0    o1    o2    o3    o0'   o1'   o2'  | o5    o6    o7    o8
    begins         1     0     0     0     1     0     0    | 0     0     0     0        `state` is what the memory held
    loss           -     -     -     x     x     x     x    | x     x     x     x        before row 7: --max-prefix cut there
                   prefix            rollout                  rollout

    A prefix carries no loss. With it, the current weights compute every recurrent state, and the gradient of a loss reaches
    the first observation of its episode.
    """

    obs: torch.Tensor  # [T, O]
    begins: torch.Tensor  # [T] bool
    starts: torch.Tensor  # [E] the first row of each section; rows before starts[0] are padding
    loss_rows: torch.Tensor  # [B] the rows with a loss, section by section, in order
    state: torch.Tensor  # [E, ...] the recurrent state before each section; unused if an episode begins there


class CarriedTape:
    """TBB: keeps the rows of each environment's running episode from rollout to rollout, until the episode ends."""

    def __init__(self, obs, recurrent_state):
        self.obs = [obs[:0, i] for i in range(obs.shape[1])]  # [rows, O] each
        self.begins = [np.zeros(0, bool)] * obs.shape[1]  # [rows] each
        self.state = recurrent_state  # [N, ...] the memory before the first of these rows, if that begins no episode

    def add(self, obs, begins):
        """Appends a rollout: obs [S, N, O], begins [S, N]."""
        self.obs = [np.concatenate([rows, obs[:, i]]) for i, rows in enumerate(self.obs)]
        self.begins = [np.concatenate([rows, begins[:, i]]) for i, rows in enumerate(self.begins)]

    def sections(self, envs, num_steps, upto=None):
        """The tape of the environments `envs` [E]: their rows [:upto], or all. The last `num_steps` of each carry a loss."""
        all_obs, all_begins = [self.obs[i][:upto] for i in envs], [self.begins[i][:upto] for i in envs]
        rows = np.array([len(begins) for begins in all_begins])
        pad = -rows.sum() % 64  # rows of zeros round the length up: oneDNN takes 10 ms to prepare for every new length
        ends = pad + np.cumsum(rows)
        obs = np.concatenate([np.zeros((pad, *self.obs[0].shape[1:]), self.obs[0].dtype), *all_obs])
        begins, loss_rows = np.concatenate([np.ones(pad, bool), *all_begins]), ends[:, None] + np.arange(-num_steps, 0)
        arrays = obs, begins, ends - rows, loss_rows.flatten()
        return Sections(*(torch.from_numpy(v).to(self.state.device) for v in arrays), self.state[envs])

    @torch.no_grad()
    def carry(self, next_begins, recurrent_state, max_prefix, agent):
        """Keeps the last `max_prefix` rows of each running episode, and returns what its memory now holds.

        next_begins [N], recurrent_state [N, ...]: as the rollout left them, before the next observation. If max_prefix is 0,
        the state stays as it is, and is stale. Returns: recurrent_state, computed anew under the agent's current weights.
        """
        for i, begins in enumerate(self.begins):
            first = len(begins) if next_begins[i] or max_prefix == 0 else np.append(0, np.flatnonzero(begins))[-1]
            self.obs[i], self.begins[i] = self.obs[i][first:], begins[first:]
        if max_prefix == 0:
            self.state = recurrent_state
            return recurrent_state
        if long := [i for i, begins in enumerate(self.begins) if len(begins) > max_prefix]:
            self.state[long] = agent(self.sections(long, 0, upto=-max_prefix))[2]  # of the rows before the cut
        for i in long:
            self.obs[i], self.begins[i] = self.obs[i][-max_prefix:], self.begins[i][-max_prefix:]
        recurrent_state = recurrent_state.clone()
        if running := [i for i, begins in enumerate(self.begins) if len(begins)]:
            recurrent_state[running] = agent(self.sections(running, 0))[2]
        return recurrent_state


class GatedLRU(nn.Module):
    """TBB: one layer, a Linear Recurrent Unit whose steps say, by their input, how much they forget (r) and take in (i).

    An element of the monoid is (A, x): the factor [P] that its steps multiply earlier memory by, and the memory [P] they add.
    Kin: the RG-LRU of De et al. (2024), section 2.4, which is real, takes lambda ** (8 r), and gates its input without a B.
    """

    def __init__(self, width, state_size, r_min, r_max):
        super().__init__()
        radius = torch.empty(state_size).uniform_(r_min**2, r_max**2).clamp(1e-6, 1 - 1e-6) ** 0.5  # uniform on the ring
        self.norm = nn.LayerNorm(width)
        self.nu = nn.Parameter(torch.log(-torch.log(radius)))
        self.theta = nn.Parameter(torch.log(2 * torch.pi * torch.rand(state_size)))
        self.B = nn.Parameter(torch.randn(width, 2 * state_size) / (2 * width) ** 0.5)  # columns Re B, Im B, Re B, ...
        self.C = nn.Parameter(torch.randn(width, 2 * state_size) / state_size**0.5)  # columns Re C, -Im C, Re C, ...
        self.D = nn.Parameter(torch.randn(width))
        self.gates = nn.Linear(width, 2 * state_size)  # W_r, W_i in one matrix product
        nn.init.constant_(self.gates.bias, 2.0)  # r and i begin near 0.9: close to LRU
        self.gate = nn.Linear(width, 2 * width)

    def operator(self, left, right):
        """(A, x) • (A', x') = (A' A, A' x + x'), with the identity (1, 0)."""
        (a, x), (right_a, right_x) = left, right
        return right_a * a, right_a * x + right_x

    def lift(self, obs):
        """What a step multiplies the memory by, what it adds, what the readout needs. [T, H] -> 2 x [T, P] c64, 2 x [T, H]

        |a| = |lambda| ** r, where |lambda| = exp(-exp(nu)), and the angle is exp(theta) whatever r is. The step adds
        sqrt(1 - |a|^2) i (B LN(o)): the factor keeps the memory's variance at one.
        """
        normed = self.norm(obs)
        r, i = torch.sigmoid(self.gates(normed)).chunk(2, dim=-1)
        fade = torch.expm1(-self.nu.exp() * r)  # |a| - 1, exact where |a| is close to one
        a = (1 + fade) * torch.exp(1j * self.theta.exp())
        x = torch.view_as_complex((normed @ self.B).unflatten(-1, (-1, 2)))
        scale = torch.sqrt(1e-8 - fade * (2 + fade))  # 1 - |a|^2; not zero, where the slope of the root is infinite
        return a, x * (scale * i), (normed, obs)

    def readout(self, x, lifted):
        """The Markov state o + GLU(GELU(Re(C x) + D LN(o))). [T, P] c64, 2 x [T, H] -> [T, H]"""
        normed, skip = lifted
        y = torch.addcmul(F.linear(torch.view_as_real(x).flatten(1), self.C), self.D, normed)
        return F.glu(self.gate(F.gelu(y)), dim=-1).add_(skip)

    def scan(self, a, x, begins):
        """TBB: the memory after every step of a tape. [T, P] c64, [T, P] c64, [T] -> [T, P] c64"""
        if linear_scan:
            return linear_scan(a, x, begins)
        return associative_scan(resettable(self.operator, identity=(1, 0)), (a, x, begins))[1]

    def forward(self, tape, obs):
        """TBB: runs all sections at once. Returns the Markov states of rows with a loss, and the memory after each section.

        A section continues from its `state`, which fades by a step, unless an episode begins there. [T, H] -> [B, H], [E, ...]
        """
        a, x, lifted = self.lift(obs)
        fresh = tape.begins[tape.starts]
        if not fresh.all():
            state = torch.where(fresh[:, None], 0, tape.state) * a[tape.starts]
            x = x.index_add(0, tape.starts, state)
        x = self.scan(a, x, tape.begins.index_fill(0, tape.starts, True))
        after = x[F.pad(tape.starts[1:], (0, 1), value=len(x)) - 1]
        if len(tape.loss_rows) < len(x):
            x, *lifted = (v.index_select(0, tape.loss_rows) for v in (x, *lifted))
        return self.readout(x, lifted), after

    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments, each from its own state. [N, H], [N], [N, P] -> [N, H], [N, P]"""
        a, x, lifted = self.lift(obs)
        recurrent_state = torch.where(begins[:, None], 0, recurrent_state) * a + x
        return self.readout(recurrent_state, lifted), recurrent_state


class StackedGatedLRU(nn.Module):
    """Layers one above the other: each reads the Markov states of the one below, and keeps a memory of its own."""

    def __init__(self, width, num_layers, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(GatedLRU(width, *sizes) for _ in range(num_layers))

    def forward(self, tape, obs):
        """Only the layer on top can do with the rows that have a loss. [T, H] -> [B, H], [E, layers, P]"""
        states, every_row = [], torch.arange(len(obs), device=obs.device)
        for layer, state in zip(self.layers, tape.state.unbind(1)):
            loss_rows = tape.loss_rows if layer is self.layers[-1] else every_row
            obs, state = layer(tape._replace(state=state, loss_rows=loss_rows), obs)
            states.append(state)
        return obs, torch.stack(states, 1)

    def step(self, obs, begins, recurrent_state):
        """[N, H], [N], [N, layers, P] -> [N, H], [N, layers, P]"""
        states = []
        for layer, state in zip(self.layers, recurrent_state.unbind(1)):
            obs, state = layer.step(obs, begins, state)
            states.append(state)
        return obs, torch.stack(states, 1)

    def initial_state(self, num_envs):
        state_size, device = len(self.layers[0].nu), self.layers[0].nu.device
        return torch.zeros(num_envs, len(self.layers), state_size, dtype=torch.complex64, device=device)


class OneHot(nn.Module):
    """MiniGrid's symbols as ones and zeros: object 5 is a key and 6 a ball, which is no more and no larger than a key."""

    def __init__(self):
        super().__init__()
        sizes = torch.tensor([11, 6, 3] * 49 + [4])  # objects, colours, states of a cell; directions
        self.size = int(sizes.sum())
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)

    def forward(self, obs):
        """[T, 148] -> [T, 984]"""
        return torch.zeros(len(obs), self.size, device=obs.device).scatter_(1, obs.long() + self.offsets, 1.0)


# ALGO LOGIC: initialize agent here:
class Agent(nn.Module):
    def __init__(self, envs, args):
        super().__init__()
        symbols, hidden = OneHot(), args.hidden_size
        norm = nn.LayerNorm(hidden).requires_grad_(False)  # without parameters, as in the paper
        self.encoder = nn.Sequential(symbols, nn.Linear(symbols.size, hidden), norm, nn.LeakyReLU(inplace=True))
        self.memory = StackedGatedLRU(hidden, args.num_layers, args.state_size, args.r_min, args.r_max)
        self.norm = nn.LayerNorm(hidden).requires_grad_(False)
        self.actor, self.critic = (nn.Linear(hidden, outputs) for outputs in (envs.single_action_space.n, 1))
        for layer, std in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, std)
            nn.init.zeros_(layer.bias)

    def heads(self, markov_state):
        """Log-probabilities of the actions [B, A], and values [B]."""
        markov_state = self.norm(markov_state)
        return self.actor(markov_state).log_softmax(-1), self.critic(markov_state).squeeze(-1)

    def forward(self, tape):
        """TBB: policy and values [B] at the rows with a loss, and the recurrent state after each section [E, ...]"""
        markov_state, recurrent_state = self.memory(tape, self.encoder(tape.obs))
        return *self.heads(markov_state), recurrent_state

    @torch.no_grad()
    def step(self, obs, begins, recurrent_state):
        """TBB: policy and values of one step of N environments, and their states. NumPy [N, O], [N]; state [N, ...]"""
        obs, begins = (torch.as_tensor(v).to(recurrent_state.device) for v in (np.asarray(obs, np.float32), begins))
        markov_state, recurrent_state = self.memory.step(self.encoder(obs), begins, recurrent_state)
        return *self.heads(markov_state), recurrent_state


def gae(rewards, values, next_values, ended, gamma, gae_lambda):
    """A[t] = delta[t] + gamma lambda A[t+1], where delta = r + gamma V(s') - V(s): Schulman et al. (2016), eq. 16. [S, N]

    TBB: this recurrence is a memoroid, too: a scan from the last step to the first, which starts anew at an episode's end.
    next_values: 0 if the episode terminated, else the value of the next observation, or of the final one if it was cut off.
    """
    delta = rewards + gamma * next_values - values
    if linear_scan:
        return linear_scan(gamma * gae_lambda, delta, ended, reverse=True)
    # (a, x) • (a', x') = (a' a, a' x + x'), with the identity (1, 0)
    operator = resettable(lambda left, right: (right[0] * left[0], right[0] * left[1] + right[1]), identity=(1, 0))
    elems = torch.full_like(delta, gamma * gae_lambda), delta.flip(0), ended.flip(0)
    return associative_scan(operator, elems)[1].flip(0)


def evaluate(agent, envs, args):
    """Returns of greedy games, one in each environment: short games do not count more often than long ones. [E]"""
    (obs, _), recurrent_state = envs.reset(seed=args.seed + 10**6), agent.memory.initial_state(envs.num_envs)
    returns, begins, running = np.zeros(envs.num_envs), *np.ones((2, envs.num_envs), bool)
    while running.any():
        policy, _, recurrent_state = agent.step(obs, begins, recurrent_state)
        obs, rewards, terminations, truncations, infos = envs.step(policy.argmax(-1).cpu().numpy())
        returns += rewards * running
        begins, running = terminations | truncations, running & ~infos["game_over"]
    envs.close()
    print(f"evaluation: episodic_return={returns.mean():.4f}, the mean of {len(returns)} greedy games of {args.env_id}")
    return returns


if __name__ == "__main__":
    args, script = tyro.cli(Args, description=__doc__), os.path.basename(__file__)
    run_dir, saved = args.resume or args.evaluate, None
    if run_dir:
        path = os.path.join(run_dir, "checkpoint.pt" if args.resume else "model.pt")
        saved = load(path, script, args)
        args = tyro.cli(Args, default=Args(**{**saved["args"], "env_kwargs": {}}))  # the run's own flags, unless given again
        args.env_kwargs = args.env_kwargs or saved["args"]["env_kwargs"]
    check_flags(args, ["eval_episodes"] * (not args.evaluate), {}, {"seed": saved["args"]["seed"]} if args.resume else {})
    if args.num_envs % args.num_minibatches:  # a minibatch is made of whole environments
        raise ValueError(f"--num-minibatches {args.num_minibatches}: expected a divisor of --num-envs {args.num_envs}")
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))  # more are slower, unless networks are large and cores idle
    tune_cpu()
    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)  # of all draws after the initial weights
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    # env setup
    # TBB: in the step that ends an episode, next_obs is already the first one of the next episode; infos has the final one
    options = {"num_threads": 0 if args.cuda else 1} | args.env_kwargs  # 0: as many as there are environments or cores
    envs, eval_envs = (make_env(args.env_id, number, options) for number in (args.num_envs, args.eval_episodes))
    agent = Agent(envs, args).to(device)
    if saved:
        saved = torch.load(path, map_location=device, weights_only=not args.resume) if args.cuda else saved
        weights = saved["agent"] if args.evaluate else saved["state"]["agent"].state_dict()
        if [v.shape for v in weights.values()] != [v.shape for v in agent.state_dict().values()]:
            raise ValueError(f"--env-id {args.env_id}, or sizes of layers: not those of the network in {path}; leave them out")
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-"))
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    if args.evaluate:
        agent.load_state_dict(weights)
        evaluate(agent, eval_envs, args)
        sys.exit()
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
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
    global_step, return_rms = 0, gym.wrappers.utils.RunningMeanStd()  # of discounted returns, for --norm-reward
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the agent's weights
    state = "agent optimizer rng global_step return_rms".split()
    if saved:
        globals().update(saved["state"])
    print(f"games run in C++ and cannot be saved: {'new ones begin' if saved else '--resume will begin new ones'}")
    next_obs, _ = envs.reset(seed=int(rng.integers(2**31)) if saved else args.seed)  # a resumed run does not repeat its games
    next_begins = np.ones(args.num_envs, bool)  # is next_obs[i] the first of its episode?
    discounted, recurrent_state = np.zeros(args.num_envs), agent.memory.initial_state(args.num_envs)
    obs, begins = np.zeros((args.num_steps, *next_obs.shape), np.uint8), np.zeros((args.num_steps, args.num_envs), bool)
    carried_tape = CarriedTape(obs, recurrent_state)
    # ALGO Logic: Storage setup
    logprobs, values, bootstraps = torch.zeros(3, args.num_steps, args.num_envs, device=device)
    actions = torch.zeros(args.num_steps, args.num_envs, dtype=torch.int64, device=device)
    gains, ends = np.zeros(begins.shape, np.float32), np.zeros(begins.shape, bool)  # rewards, ends; moved once a rollout
    start_time, start_step, recent_returns = time.time(), global_step, deque(maxlen=100)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    print(f"{num_iterations} rollouts of {args.num_steps} steps; {run_dir}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=0.2 if sys.stderr.isatty() else 5)
    for iteration in range(global_step // batch_size + 1, num_iterations + 1):
        if stop or args.checkpoint_interval and global_step % args.checkpoint_interval < batch_size:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            save(f"{run_dir}/checkpoint.pt", content)
        if stop:
            print(f"stopped; --resume {run_dir} goes on from step {global_step:,}")
            sys.exit(128 + stop[0])
        anneal = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = anneal * args.learning_rate
        noise = rng.gumbel(size=(*begins.shape, envs.single_action_space.n)).astype(np.float32)
        noise = torch.from_numpy(noise).to(device)  # of all steps at once: every transfer to a device waits for it
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step], begins[step] = next_obs, next_begins
            # ALGO LOGIC: action logic
            policy, values[step], recurrent_state = agent.step(next_obs, next_begins, recurrent_state)
            actions[step] = (policy + noise[step]).argmax(-1)  # a draw from the policy, by the Gumbel-max trick
            logprobs[step] = policy.gather(-1, actions[step, :, None]).squeeze(-1)
            # TRY NOT TO MODIFY: execute the game and log data.
            next_obs, reward, terminations, truncations, infos = envs.step(actions[step].cpu().numpy())
            next_begins = terminations | truncations
            discounted = discounted * args.gamma + reward
            return_rms.update(discounted)
            discounted[next_begins] = 0
            scale = np.sqrt(return_rms.var + 1e-8) if args.norm_reward else 1.0
            gains[step], ends[step] = reward / scale, next_begins
            # TBB: an episode cut off by a time limit is worth what its final observation is, remembering all before it
            bootstraps[step] = 0
            if (cut_off := truncations & ~terminations & (not args.truncation_is_terminal)).any():
                final = np.stack(infos["final_obs"][cut_off]), np.zeros(cut_off.sum(), bool), recurrent_state[cut_off]
                _, bootstraps[step, cut_off], _ = agent.step(*final)
            for i in np.flatnonzero(next_begins):
                recent_returns.append(infos["final_info"]["episode"]["r"][i])
                writer.add_scalar("charts/episodic_return", recent_returns[-1], global_step)
                writer.add_scalar("charts/episodic_length", infos["final_info"]["episode"]["l"][i], global_step)
        # TBB: append the rollout to the rows of its running episodes, which are on the tape already
        carried_tape.add(obs, begins)
        tape_rows = sum(map(len, carried_tape.begins))
        # bootstrap value if not done
        _, next_value, _ = agent.step(next_obs, next_begins, recurrent_state)
        rewards, ended = (torch.from_numpy(v).to(device) for v in (gains, ends))
        next_values = torch.where(ended, bootstraps, torch.cat([values[1:], next_value[None]]))
        advantages = gae(rewards, values, next_values, ended, args.gamma, args.gae_lambda)
        # TBB: order the batch by environment, [S, N] -> [N, S], so that the steps of each stay in order
        batch = [v.transpose(0, 1) for v in (actions, logprobs, values, advantages, advantages + values)]
        explained_var = 1 - advantages.var() / (advantages + values).var()
        # Optimizing the policy and value network
        clipfracs, logprob_error = [], None
        for _ in range(args.update_epochs):
            for mb_envs in rng.permutation(args.num_envs).reshape(args.num_minibatches, -1):
                mb_actions, mb_logprobs, mb_values, mb_advantages, mb_returns = (v[mb_envs].flatten(0, 1) for v in batch)
                policy, newvalue, _ = agent(carried_tape.sections(mb_envs, args.num_steps))
                logratio = policy.gather(-1, mb_actions[:, None]).squeeze(-1) - mb_logprobs
                ratio = logratio.exp()
                with torch.no_grad():  # calculate approx_kl http://joschu.net/blog/kl-approx.html
                    old_approx_kl = (-logratio).mean()
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfracs += [((ratio - 1.0).abs() > args.clip_coef).float().mean()]
                    if logprob_error is None:  # TBB: before the first update, tape and rollout must be the same policy
                        logprob_error = logratio.abs().max()
                if args.norm_adv and len(mb_advantages) > 1:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)

                # Policy loss
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                # Value loss
                v_loss = (newvalue - mb_returns) ** 2
                if args.clip_vloss:
                    v_clipped = mb_values + torch.clamp(newvalue - mb_values, -args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - mb_returns) ** 2)
                v_loss = 0.5 * v_loss.mean()

                entropy_loss = -(policy.exp() * policy).sum(-1).mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
                if not torch.isfinite(loss + grad_norm):
                    large = mb_returns.norm() > 1e6  # then a smaller learning rate would not help
                    remedy = "scale rewards" if large else f"--resume {run_dir} with a smaller --learning-rate"
                    raise FloatingPointError(f"step {global_step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}")
                optimizer.step()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        if logprob_error > 1e-3:
            print(f"warning: rollout and tape differ by {logprob_error:.1e} in log-probability: is `step` what `forward` is?")
        # TBB: keep the running episodes, and compute their recurrent states with the new weights
        recurrent_state = carried_tape.carry(next_begins, recurrent_state, args.max_prefix, agent)
        # TRY NOT TO MODIFY: record rewards for plotting purposes
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/prefix_share", 1 - batch_size / tape_rows, global_step)
        losses = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy_loss, "old_approx_kl": old_approx_kl}
        clipfracs = torch.stack(clipfracs).tolist()  # one wait for the device, not one in each minibatch
        losses |= {"approx_kl": approx_kl, "clipfrac": np.mean(clipfracs), "explained_variance": explained_var}
        for name, value in {**losses, "grad_norm": grad_norm, "logprob_error": logprob_error}.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        writer.add_scalar("charts/SPS", int((global_step - start_step) / (time.time() - start_time)), global_step)
        bar.set_postfix(episodic_return=np.mean(recent_returns or [np.nan]), entropy=entropy_loss.item(), refresh=False)
        bar.update(global_step - bar.n)
    bar.close()
    catch_stop_signals(on=False)
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "agent": agent.state_dict()})
    print(f"trained for {global_step:,} steps, {time.time() - start_time:.1f} seconds; the model is {run_dir}/model.pt")
    for idx, episodic_return in enumerate(evaluate(agent, eval_envs, args) if args.eval_episodes else ()):
        writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume deletes it
    envs.close()
    writer.close()
