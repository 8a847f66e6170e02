# docs: docs/envpool.md
# Parent: single_files/dqn_tbb_lru.py. Changed: Args, EnvPool (was make_env), check_spaces, memory_needs, FrameTape (was
#   TapeBuffer), QNetwork with a convolution, evaluate_games (was evaluate); in the loop: frames go to the tape as they arrive,
#   rewards are clipped, no option for truncation or for the loss
# Memory, tape and convolution: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", arXiv 2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
# Games: Weng et al. (2022), "EnvPool: A Highly Parallel Reinforcement Learning Environment Execution Engine"
"""Double dueling DQN with Linear Recurrent Units (LRU) on Atari games: single frames, trained on a tape of whole games.

    python single_files/dqn_tbb_lru_atari_envpool.py                             # Pong, on a CPU: hours
    python single_files/dqn_tbb_lru_atari_envpool.py --env-id Breakout-v5 --episodic-life
    python single_files/dqn_tbb_lru_atari_envpool.py --resume runs/RUN           # continue a killed run, with new games
    python single_files/dqn_tbb_lru_atari_envpool.py --evaluate runs/RUN         # greedy games with the trained model

Needs `pip install 'cleanrl-memoroid[envpool]'`. --resume restores weights, optimiser, target network, tape and random
generator; games run in C++ and cannot be saved, so new ones begin, and the run differs from one that was never killed.
This file is all there is: copy it into your project and edit it. Only the import of `linear_scan` is shared, and optional.
Shapes: T rows of a tape, B transitions on it, N environments, A actions, H width, P complex numbers of a layer; time comes
first. Does not include: frame stacking, n-step returns, prioritised replay, other observations than frames, video.
"""

import ctypes
import json
import os
import sys
import time
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:  # at the speed of memory; without it, this file's own blelloch_scan computes the same
    from cleanrl_memoroid.scan import linear_scan
except ImportError:
    linear_scan = None

PIECE = 256  # frames that the convolution takes at once (rows): its intermediate results stay near the processor


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment; on a CPU, equal seeds give equal runs"""
    torch_deterministic: bool = True
    """if toggled, cuDNN uses deterministic algorithms"""
    cuda: bool = False
    """if toggled, train on the CUDA device"""
    torch_threads: int = 1
    """CPU threads of PyTorch; more pay where cores are idle, and cost dearly where they are shared"""
    tune_cpu: bool = True
    """if toggled, set the two process-wide switches explained at `tune_cpu` below"""
    track: bool = False
    """if toggled, this experiment is also logged to Weights and Biases (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "cleanrl-memoroid"
    """the project name in Weights and Biases"""
    wandb_entity: str | None = None
    """the entity (team) in Weights and Biases"""
    save_model: bool = True
    """if toggled, save the trained model in `runs/{run_name}`, and evaluate it"""
    eval_episodes: int = 10
    """number of greedy games after training and with --evaluate (games)"""
    checkpoint_interval: int = 100_000
    """environment steps between checkpoints, to --resume from, each as large as the tape; 0 writes none (steps)"""
    resume: str | None = None
    """run directory, `runs/...`: continue that run under its own flags, with new games"""
    evaluate: str | None = None
    """run directory or model file: play greedy games and exit"""

    # Algorithm specific arguments
    env_id: str = "Pong-v5"
    """the id of an Atari game as envpool has it"""
    env_kwargs: str = "{}"
    """arguments for envpool.make as JSON, such as '{"repeat_action_probability": 0.25, "use_fire_reset": false}'"""
    env_threads: int = 1
    """CPU threads of envpool"""
    max_episode_steps: int = 27_000
    """time limit of a game; reaching it is truncation, not termination (steps, of four frames each)"""
    episodic_life: bool = False
    """if toggled, a lost life ends the episode on the tape as termination; the game goes on"""
    clip_reward: bool = True
    """if toggled, the tape holds the sign of rewards; logged returns are the game's own"""
    total_timesteps: int = 2_000_000
    """total timesteps of the experiment, over all environments (steps)"""
    learning_rate: float = 5e-4
    """the learning rate of the optimizer at the start"""
    anneal_lr: bool = True
    """if toggled, the learning rate falls linearly to zero"""
    num_envs: int = 8
    """the number of parallel environments"""
    buffer_size: int = 250_000
    """the capacity of the tape: one frame per row; a game of L transitions takes L + 1 rows (rows)"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.01
    """the target network moves this share of the way to the Q network at each update"""
    batch_size: int = 500
    """a tape is filled with whole episodes until it holds this many transitions (transitions)"""
    start_e: float = 1.0
    """the starting epsilon for exploration"""
    end_e: float = 0.02
    """the ending epsilon for exploration"""
    exploration_fraction: float = 0.1
    """the fraction of `total_timesteps` it takes from start_e to end_e, once learning has started"""
    learning_starts: int = 10_000
    """timestep to start learning; until then actions are random (steps)"""
    train_frequency: int = 32
    """environment steps per update (steps)"""
    max_grad_norm: float = 1.0
    """the maximum norm of the gradient"""

    # Memory specific arguments
    cnn_channels: int = 32
    """channels of the first convolution; the other two have twice as many (channels)"""
    kept_rows: int = 4_000
    """up to this length of a tape the results within the convolution are kept for its gradient, beyond it they are computed
    twice: whole games can be longer than memory (rows)"""
    hidden_size: int = 256
    """width H of every layer (units)"""
    state_size: int = 128
    """complex numbers P in the memory of each layer (channels)"""
    num_layers: int = 1
    """layers of the memory, one above the other"""
    r_min: float = 0.0
    """the sizes of lambda begin between this and r_max: near 0, it tells the last frames apart, near 1, it lasts"""
    r_max: float = 0.999
    """see r_min"""


# Copied from single_files/ppo_tbb_lru_minigrid_envpool.py:EnvPool
class EnvPool:
    """Games of envpool behind the interface of Gymnasium's vector environments, which reset in the same step.

    envpool itself resets one step late: it answers the action that follows an episode's end, whatever it is, with the next
    episode's first observation. On a tape that row would be a transition that never was. Here the games that have ended are
    sent on at once, by themselves, so that no such row comes about.

    Args:
        env_id, options: as for envpool.make.
        num_envs: the number of games N.
        view: what the network sees of envpool's observations, as one array [N, ...].
    """

    metadata = {"render_modes": ()}

    def __init__(self, env_id, num_envs, view, **options):
        try:
            import envpool
        except ImportError:
            raise ImportError("expected envpool, which is not installed; pip install 'envpool>=1.2'") from None
        if env_id not in (games := envpool.list_all_envs()):
            near = ", ".join(sorted(games, key=lambda game: -len(os.path.commonprefix([game, env_id])))[:5])
            raise ValueError(f"--env-id: expected a game of envpool, got {env_id!r}; the nearest are {near}")
        if unknown := options.keys() - set(envpool.make_spec(env_id).config._fields):
            names = ", ".join(sorted(unknown))
            remedy = f"its own: envpool.make_spec('{env_id}').config"
            raise ValueError(f"--env-id {env_id}, --env-kwargs: expected options that this game has, got {names}; {remedy}")
        self.make = lambda seeds: envpool.make_gymnasium(env_id, num_envs=num_envs, seed=seeds, **options)
        spec, batch_space = envpool.make_spec(env_id, **options), gym.vector.utils.batch_space
        obs = view(batch_space(spec.gymnasium_observation_space, 1).sample())
        self.num_envs, self.view, self.games = num_envs, view, None
        self.single_observation_space = gym.spaces.Box(0, 255, obs.shape[1:], obs.dtype)
        self.single_action_space = spec.gymnasium_action_space
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    def envs(self):
        raise TypeError("games of envpool live in C++ and cannot be pickled")

    def reset(self, seed=None):
        """First observations [N, ...] of new games; envpool takes seeds [N] only when it makes them. Left out: any."""
        if seed is None:
            seed = np.random.default_rng().integers(2**31, size=self.num_envs).tolist()
        self.games = self.make(seed)
        return self.view(self.games.reset()[0]), {}

    def step(self, actions):
        """As of Gymnasium: obs [N, ...], rewards, terminations, truncations [N], infos, with "final_obs" where one ended, and
        with "game_over" [N]: under episodic_life, a lost life is a termination and no end of the game.
        """
        obs, rewards, terminations, truncations, infos = self.games.step(actions)
        # Atari says in infos that a game is over, also when that is in the very step of its time limit
        over = infos.get("terminated", terminations).astype(bool)
        terminations, infos["game_over"] = terminations | truncations & over, truncations | over
        obs, ended = self.view(obs), np.flatnonzero(terminations | truncations)
        if len(ended):
            infos["final_obs"] = obs.copy()
            obs[ended] = self.view(self.games.step(actions[ended], ended)[0])  # these actions are ignored
        return obs, rewards, terminations, truncations, infos

    def close(self):
        if self.games is not None:
            self.games.close()


# Copied from single_files/dqn_tbb_ffm.py:parse_env_kwargs
def parse_env_kwargs(text):
    try:
        return dict(**json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"--env-kwargs: expected a JSON object such as '{{\"k\": 10}}', got {text!r}; mind quotes") from None


def check_spaces(env_id, observation_space, action_space):
    """Raises ValueError where this file cannot train, with what can."""
    if not isinstance(action_space, gym.spaces.Discrete):
        raise ValueError(f"--env-id {env_id}: expected a Discrete action space, got {action_space}; choose an Atari game")
    if observation_space.shape != (1, 84, 84) or observation_space.dtype != np.uint8:
        remedy = "choose an Atari game, and leave img_height, img_width and gray_scale as they are"
        raise ValueError(f"--env-id {env_id}: expected frames [1, 84, 84] of bytes, got {observation_space}; {remedy}")


# Copied from cleanrl_memoroid/scan.py:tune_cpu
def tune_cpu():
    """Two settings for the whole process that make training on a CPU up to twice as fast. Call it before the first tensor.

    1. glibc hands large blocks back to the system when they are freed, and every new tensor pays a page fault per 4 KB:
       cloning 32 MB runs at an eighth of the memory's speed. With raised thresholds freed memory stays with the process,
       which then holds on to its peak. On Linux with glibc only.
    2. MKL runs single-precision matrix products at half speed on AMD processors with AVX-512, oneDNN at full speed. PyTorch
       hands them to oneDNN if lower precision is *permitted*; a processor without matrix units for it still computes in full
       single precision. Kept only if a trial product is that exact; elsewhere, and before PyTorch 2.9, nothing changes.

    Returns: the settings that took effect, ("malloc", "onednn") at most. Harmless to call twice.
    """
    effective = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
            if libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, -1):
                effective.append("malloc")
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    able = torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    if able and hasattr(switch, "fp32_precision"):
        before, switch.fp32_precision = switch.fp32_precision, "bf16"
        a = torch.sin(torch.arange(256.0 * 256)).reshape(256, 256)
        error = (a @ a - (a.double() @ a.double()).float()).abs().max()
        if error < 1e-4:  # single precision: 1e-5; bfloat16: 1e-1
            effective.append("onednn")
        else:
            switch.fp32_precision = before
    return tuple(effective)


# Copied from single_files/dqn_tbb_ffm.py:linear_schedule
def linear_schedule(start_e: float, end_e: float, duration: float, t: int):
    return max((end_e - start_e) / duration * t + start_e, end_e)


# Copied from single_files/dqn_tbb_ffm.py:Linear
class Linear(nn.Linear):
    """nn.Linear, faster on a CPU: there PyTorch first fills the result with the bias, and the product then reads it back.

    And a weight's gradient is laid out as the product read the weight. Of few inputs that is a product with few columns,
    seven times slower in MKL than one with as few rows, which a small copy of the weight gives.
    """

    def forward(self, x):
        if x.is_cuda:
            return F.linear(x, self.weight, self.bias)
        if self.in_features < 16 and torch.is_grad_enabled():
            return (x @ self.weight.t().contiguous()).add_(self.bias)
        return F.linear(x, self.weight).add_(self.bias)


# Copied from single_files/dqn_tbb_ffm.py:layer_norm
def layer_norm(size):
    """Without affine parameters, as in the paper: PyTorch is twice as fast with constant ones and zeros as with none."""
    return nn.LayerNorm(size).requires_grad_(False)


# Copied from single_files/dqn_tbb_ffm.py:resettable
def resettable(operator, identity):
    """TBB: the operator that starts anew where an episode begins, (h, b) ∘ (h', b') = ((e if b' else h) • h', b or b').

    Source: Morad et al. (2024), eq. 12. It selects instead of multiplying by a mask, because 0 * nan is nan.
    """

    def wrapped(left, right):
        *left, left_begins = left
        *right, right_begins = right
        masks = (right_begins.view(-1, *[1] * (h.dim() - 1)) for h in left)
        left = tuple(torch.where(mask, e, h) for mask, e, h in zip(masks, identity, left))
        return *operator(left, tuple(right)), left_begins | right_begins

    return wrapped


# Copied from cleanrl_memoroid/scan_torch.py:blelloch_scan
def blelloch_scan(operator, elems):
    """Inclusive scan of a tuple of tensors [T, ...] along time: out[t] = elems[0] • elems[1] • ... • elems[t].

    Combine neighbours, scan the result, which is half as long, and fill in the rows between: O(T) operator applications,
    O(log T) deep, differentiable through the operator (Blelloch, 1993, section 1.4).
    """
    steps = len(elems[0])
    if steps == 1:
        return elems
    pairs = operator(tuple(e[:-1:2] for e in elems), tuple(e[1::2] for e in elems))
    odd = blelloch_scan(operator, pairs)  # out[1], out[3], ...
    even = tuple(e[:1] for e in elems)  # out[0], then out[2] = out[1] • elems[2], ...
    if steps > 2:
        rest = operator(tuple(o[: (steps - 1) // 2] for o in odd), tuple(e[2::2] for e in elems))
        even = tuple(torch.cat(rows) for rows in zip(even, rest))
    if steps % 2:  # one row more, to make the last pair whole, and off again
        odd = tuple(torch.cat([o, o[-1:]]) for o in odd)
    return tuple(torch.stack(rows, 1).flatten(0, 1)[:steps] for rows in zip(even, odd))


# Copied from single_files/dqn_tbb_lru.py:LRU
class LRU(nn.Module):
    """TBB: one layer, a Linear Recurrent Unit as a memoroid: P complex numbers that each fade and turn at a rate of their own.

    An element of the monoid is (A, x): the factor [P] that its steps multiply earlier memory by, and the memory [P] they add.
    Source: Orvieto et al. (2023), sections 3.3 and 3.4, with the block of their figure 1: LayerNorm, LRU, GELU, GLU, skip.
    """

    def __init__(self, width, state_size, r_min, r_max):
        super().__init__()
        if not 0 <= r_min <= r_max <= 1:
            raise ValueError(f"--r-min, --r-max: expected 0 <= r_min <= r_max <= 1, got {r_min} and {r_max}; change them")
        radius = torch.empty(state_size).uniform_(r_min**2, r_max**2).clamp(1e-6, 1 - 1e-6) ** 0.5  # uniform on the ring
        self.norm = nn.LayerNorm(width)
        self.nu = nn.Parameter(torch.log(-torch.log(radius)))
        self.theta = nn.Parameter(torch.log(2 * torch.pi * torch.rand(state_size)))
        self.gamma = nn.Parameter(0.5 * torch.log(1 - radius**2))  # log of the factor that keeps the memory's variance at one
        self.B = nn.Parameter(torch.randn(width, 2 * state_size) / (2 * width) ** 0.5)  # columns Re B, Im B, Re B, ...
        self.C = nn.Parameter(torch.randn(width, 2 * state_size) / state_size**0.5)  # columns Re C, -Im C, Re C, ...
        self.D = nn.Parameter(torch.randn(width))
        self.gate = Linear(width, 2 * width)
        self.identity = (torch.ones((), dtype=torch.complex64), torch.zeros((), dtype=torch.complex64))

    def operator(self, left, right):
        """(A, x) • (A', x') = (A' A, A' x + x'), with the identity (1, 0)."""
        (a, x), (right_a, right_x) = left, right
        return right_a * a, right_a * x + right_x

    def decay(self):
        """lambda = exp(-exp(nu) + i exp(theta)), which a step multiplies the memory by. In double, for its powers. [P] c128"""
        return torch.exp(torch.complex(-self.nu.double().exp(), self.theta.double().exp()))

    def lift(self, obs):
        """What one step adds, exp(gamma) B LN(o), and what the readout needs besides. [T, H] -> [T, P] c64, 2 x [T, H]"""
        normed = self.norm(obs)
        weight = self.gamma.exp().repeat_interleave(2) * self.B
        x = normed @ weight  # a complex matrix product would cost twice this real one
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))), (normed, obs)

    def readout(self, x, gated):
        """The Markov state o + GLU(GELU(Re(C x) + D LN(o))). [T, P] c64, 2 x [T, H] -> [T, H]"""
        normed, skip = gated
        y = torch.addcmul(F.linear(torch.view_as_real(x).flatten(1), self.C), self.D, normed)
        return F.glu(self.gate(F.gelu(y)), dim=-1).add_(skip)

    def scan(self, x, begins):
        """TBB: the memory after every step of a tape. [T, P] c64, [T] -> [T, P] c64"""
        if linear_scan is not None:
            return linear_scan(self.decay(), x, begins)
        identity = tuple(e.to(x.device) for e in self.identity)
        decay = self.decay().to(x.dtype).expand_as(x)
        return blelloch_scan(resettable(self.operator, identity), (decay, x, begins))[1]

    def forward(self, obs, begins):
        """TBB: a whole tape at once. [T, H], [T] -> [T, H]"""
        x, gated = self.lift(obs)
        return self.readout(self.scan(x, begins), gated)

    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments, each from its own state. [N, H], [N], [N, P] -> [N, H], [N, P]"""
        x, gated = self.lift(obs)
        recurrent_state = torch.where(begins[:, None], 0, recurrent_state) * self.decay().to(x.dtype) + x
        return self.readout(recurrent_state, gated), recurrent_state


# Copied from single_files/dqn_tbb_lru.py:StackedLRU
class StackedLRU(nn.Module):
    """Layers one above the other: each reads the Markov states of the one below, and keeps a memory of its own."""

    def __init__(self, width, num_layers, **sizes):
        super().__init__()
        self.layers = nn.ModuleList(LRU(width, **sizes) for _ in range(num_layers))

    def forward(self, obs, begins):
        """[T, H], [T] -> [T, H]"""
        for layer in self.layers:
            obs = layer(obs, begins)
        return obs

    def step(self, obs, begins, recurrent_state):
        """[N, H], [N], [N, layers, P] -> [N, H], [N, layers, P]"""
        states = []
        for layer, state in zip(self.layers, recurrent_state.unbind(1)):
            obs, state = layer.step(obs, begins, state)
            states.append(state)
        return obs, torch.stack(states, 1)

    def initial_state(self, num_envs):
        state_size, device = len(self.layers[0].decay()), self.layers[0].D.device
        return torch.zeros(num_envs, len(self.layers), state_size, dtype=torch.complex64, device=device)


# Copied from single_files/dqn_tbb_ffm.py:Tape
class Tape(NamedTuple):
    """TBB: whole episodes end to end on one time axis; no padding, and the gradient reaches every first observation.

    row            0     1     2     3(final) | 4     5(final) |
    obs            o0    o1    o2    o3       | o0'   o1'      |     the final observation has a row of its own,
    begins         1     0     0     0        | 1     0        |     so the successor of every step is the next row:
    actions        a0    a1    a2    -        | a0'   -        |     one pass over the tape serves Q(s) and Q(s')
    rewards        r1    r2    r3    -        | r1'   -        |
    terminations   0     0     1     -        | 0     -        |     of actions[t]; a truncated episode has none
    """

    obs: torch.Tensor  # [T, O]
    begins: torch.Tensor  # [T] bool
    actions: torch.Tensor  # [T]
    rewards: torch.Tensor  # [T]
    terminations: torch.Tensor  # [T] bool
    transitions: torch.Tensor  # [B] the rows that are not final, where action, reward and termination mean something


class FrameTape:
    """TBB: a ring of `buffer_size` rows that holds every frame once, written when it arrives; the oldest are overwritten.

    N games run side by side, so the rows of one are not neighbours: an episode is the list of its rows. Rows are numbered
    without end: row r stands at r % buffer_size, until row r + buffer_size takes its place.
    """

    def __init__(self, buffer_size, obs_shape, num_envs):
        self.obs = np.zeros((buffer_size, *obs_shape), np.uint8)
        self.actions = np.zeros(buffer_size, np.int64)
        self.rewards = np.zeros(buffer_size, np.float32)
        self.terminations = np.zeros(buffer_size, bool)
        self.episodes = OrderedDict()  # first row -> rows, oldest first; a list while the episode runs, then an array
        self.running = [None] * num_envs  # the first row of each environment's running episode
        self.next_row = 0

    def write(self, obs):
        """Rows for these frames [n, 1, 84, 84]; episodes whose rows they take are forgotten. -> their numbers [n]"""
        rows = np.arange(self.next_row, self.next_row + len(obs))
        while self.episodes and next(iter(self.episodes)) <= rows[-1] - len(self.obs):
            first, episode = self.episodes.popitem(last=False)
            if isinstance(episode, list):
                remedy = "use a larger one, fewer environments, or a lower --max-episode-steps"
                length = f"an episode still runs after {len(episode)} steps in each of {len(self.running)} environments"
                raise ValueError(f"--buffer-size {len(self.obs)}: {length}; {remedy}")
        self.obs[rows % len(self.obs)] = obs
        self.terminations[rows % len(self.obs)] = False
        self.next_row += len(obs)
        return rows

    def add(self, obs, actions, rewards):
        """One step of all environments: what they showed [N, 1, 84, 84], actions [N], what those earned [N]."""
        rows = self.write(obs)
        self.actions[rows % len(self.obs)], self.rewards[rows % len(self.obs)] = actions, rewards
        for i, row in enumerate(rows.tolist()):
            if self.running[i] is None:
                self.running[i], self.episodes[row] = row, []
            self.episodes[self.running[i]].append(row)

    def finish(self, i, final_obs, terminated):
        """Environment i's episode has ended: its final frame [1, 84, 84] takes a row; was it by termination?"""
        if self.running[i] is None:
            raise ValueError(f"FrameTape.finish: expected a running episode in environment {i}, got none; add a step first")
        self.terminations[self.episodes[self.running[i]][-1] % len(self.obs)] = terminated
        (row,) = self.write(final_obs[None])
        self.episodes[self.running[i]] = np.array([*self.episodes[self.running[i]], row])
        self.running[i] = None

    def complete(self):
        """The rows of every episode that has ended, oldest begin first: what can be sampled."""
        return [rows for rows in self.episodes.values() if isinstance(rows, np.ndarray)]

    def sample(self, batch_size, rng, device="cpu"):
        """A tape of whole episodes, uniform with replacement, until it holds at least `batch_size` transitions."""
        if not (episodes := self.complete()):
            raise ValueError("FrameTape.sample: expected an episode that has ended, got none; finish one first")
        drawn, length = [], 0
        while length < batch_size:
            drawn.append(episodes[rng.integers(len(episodes))])
            length += len(drawn[-1]) - 1
        # lone rows, episodes without a step, round the length up to 32: oneDNN takes 10 ms to get ready for a new length
        lone = np.zeros(-sum(len(rows) for rows in drawn) % 32, np.int64)
        ends = np.cumsum([len(rows) for rows in drawn] + [1] * len(lone))
        at = np.concatenate([*drawn, lone]) % len(self.obs)
        begins, final = np.zeros(len(at), bool), np.zeros(len(at), bool)
        begins[np.append(0, ends[:-1])], final[ends - 1] = True, True
        tape = self.obs[at], begins, self.actions[at], self.rewards[at], self.terminations[at], np.flatnonzero(~final)
        return Tape(*(torch.from_numpy(v).to(device) for v in tape))

    def state_dict(self):
        """Without running episodes, as --resume begins new games. As tensors: torch.save would copy an array twice."""
        arrays = {name: v for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        state = {name: torch.from_numpy(v[: self.next_row]) for name, v in arrays.items()}
        return state | {"episodes": [torch.from_numpy(rows) for rows in self.complete()], "next_row": self.next_row}

    def load_state_dict(self, state):
        for name, v in state.items():
            if isinstance(v, torch.Tensor):
                getattr(self, name)[: len(v)] = v.numpy()
        self.episodes = OrderedDict((int(rows[0]), rows.numpy()) for rows in state["episodes"])
        self.next_row, self.running = state["next_row"], [None] * len(self.running)


# ALGO LOGIC: initialize agent here:
class QNetwork(nn.Module):
    def __init__(self, env, args):
        super().__init__()
        channels, self.kept_rows = args.cnn_channels, args.kept_rows
        self.encoder = nn.Sequential(  # the paper's: each channel's map is normalised by itself
            *self.convolution(1, channels, 8, 4, 20),
            *self.convolution(channels, 2 * channels, 4, 2, 9),
            *self.convolution(2 * channels, 2 * channels, 3, 1, 7),
            nn.Flatten(),
            Linear(2 * channels * 7 * 7, args.hidden_size),
        )
        self.memory = StackedLRU(
            args.hidden_size, args.num_layers, state_size=args.state_size, r_min=args.r_min, r_max=args.r_max
        )
        self.network = nn.Sequential(*(self.block(args.hidden_size, args.hidden_size) for _ in range(2)))
        self.head = Linear(args.hidden_size, 1 + env.single_action_space.n)  # the value, and each action's advantage
        nn.init.uniform_(self.head.weight, -((0.01 / args.hidden_size) ** 0.5), (0.01 / args.hidden_size) ** 0.5)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def convolution(inputs, outputs, kernel, stride, size):
        return nn.Conv2d(inputs, outputs, kernel, stride), layer_norm((size, size)), nn.LeakyReLU(inplace=True)

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.block
    @staticmethod
    def block(input_size, output_size):
        return nn.Sequential(Linear(input_size, output_size), layer_norm(output_size), nn.LeakyReLU(inplace=True))

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.q_values
    def q_values(self, markov_state):
        value, advantage = self.head(self.network(markov_state)).split((1, self.head.out_features - 1), dim=-1)
        return value + advantage - advantage.mean(-1, keepdim=True)

    def features(self, frames):
        """[T, 1, 84, 84] bytes -> [T, H]"""
        return self.encoder(frames.float() / 255)

    def encode(self, frames):
        """The same piece by piece; of a tape beyond `kept_rows`, a piece's results are computed again for its gradient."""
        if torch.is_grad_enabled() and len(frames) > self.kept_rows:
            pieces = (recompute(self.features, piece, use_reentrant=False) for piece in frames.split(PIECE))
        else:
            pieces = map(self.features, frames.split(PIECE))
        return torch.cat(list(pieces))

    def forward(self, obs, begins):
        """TBB: Q values along a tape. [T, 1, 84, 84] bytes, [T] -> [T, A]"""
        return self.q_values(self.memory(self.encode(obs), begins))

    def step(self, obs, begins, recurrent_state):
        """TBB: Q values of one step of N environments. [N, 1, 84, 84] bytes, [N], state -> [N, A], state"""
        markov_state, recurrent_state = self.memory.step(self.features(obs), begins, recurrent_state)
        return self.q_values(markov_state), recurrent_state


def memory_needs(args, q_network):
    """{what: bytes} that training comes to hold at most. An update's share is that of its longest possible tape."""
    row = 84 * 84 + 21  # the frame; action (8), reward (4), termination (1), and the row's number in its episode (8)
    rows = args.batch_size + args.max_episode_steps + 32
    maps = 4 * args.cnn_channels * (20 * 20 + 2 * 9 * 9 + 2 * 7 * 7)  # bytes of the three convolutions' outputs, per row
    kept = min(rows, max(args.kept_rows, PIECE)) * (4 * 84 * 84 + 2 * maps)  # frames as floats; each output, and normalised
    others = rows * (84 * 84 + 4 * (24 * args.hidden_size + 24 * args.num_layers * (args.hidden_size + args.state_size)))
    weights = 5 * sum(4 * p.numel() for p in q_network.parameters())  # two networks, the gradient, Adam's two moments
    return {"tape": args.buffer_size * row, "an update": kept + others, "weights": weights}


def available_memory():
    """Bytes that the machine and this process's control group still have, None where the system does not say."""
    limits = []
    try:
        with open("/proc/meminfo") as file:
            limits += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            limits.append(int(most.read()) - int(now.read()))
    except (OSError, ValueError):  # not Linux; no control group, or one without a limit ("max")
        pass
    return min(limits, default=None)


def check_memory(needs, available):
    """Prints the budget; ValueError if it is more than there is. On a GPU the update's and the weights' share is there."""
    gigabytes = ", ".join(f"{what} {n / 1e9:.2f}" for what, n in needs.items())
    has = "unknown" if available is None else f"{available / 1e9:.2f}"
    print(f"memory (GB): {gigabytes}, together at most {sum(needs.values()) / 1e9:.2f}; available {has}")
    if available is not None and sum(needs.values()) > available:
        remedy = "lower --buffer-size for the tape, --kept-rows and --max-episode-steps for an update"
        raise ValueError(f"memory: expected at most the {has} GB available, got {gigabytes}; {remedy}")


# Copied from single_files/dqn_tbb_ffm.py:td_target
def td_target(q, next_q, tape, gamma):
    """r[t] + gamma (1 - termination[t]) Q_target(s[t+1], argmax_a Q(s[t+1], a)) for every transition of the tape. [B]

    TBB: row t + 1 is the successor of transition t, with the same history, its first observation included.
    Double DQN, van Hasselt et al. (2016): q [T, A] of the online network chooses, next_q [T, A] of the target network rates.
    """
    successors = tape.transitions + 1
    best = q[successors].argmax(dim=1, keepdim=True)
    bootstrap = next_q[successors].gather(1, best).squeeze(1)
    return tape.rewards[tape.transitions] + gamma * torch.where(tape.terminations[tape.transitions], 0, bootstrap)


def evaluate_games(q_network, envs, episodes, seeds, device):
    """Returns of greedy games [episodes], whole ones also where a lost life ends an episode.

    Each environment has its share: short games are not counted more often.
    """
    share = [len(range(i, episodes, envs.num_envs)) for i in range(envs.num_envs)]
    returns, running = [], np.zeros(envs.num_envs)
    obs, _ = envs.reset(seed=seeds[: envs.num_envs])
    begins = np.ones(envs.num_envs, bool)
    recurrent_state = q_network.memory.initial_state(envs.num_envs)
    while any(share):
        with torch.no_grad():
            inputs = torch.as_tensor(obs, device=device), torch.as_tensor(begins, device=device)
            q_values, recurrent_state = q_network.step(*inputs, recurrent_state)
        obs, rewards, terminations, truncations, infos = envs.step(q_values.argmax(dim=1).cpu().numpy())
        running += rewards
        begins = terminations | truncations
        for i in np.flatnonzero(infos["game_over"]):
            if share[i]:
                returns.append(running[i])
                share[i] -= 1
            running[i] = 0
    envs.close()
    spread = f"{len(returns)} greedy games, {min(returns):.4f} to {max(returns):.4f}"
    print(f"evaluation: episodic_return={np.mean(returns):.4f} ({spread})")
    return returns


# Copied from single_files/dqn_tbb_ffm.py:save
def save(path, content):
    """Leaves a whole file or none under this name, also when the process is killed on the way."""
    torch.save(content, f"{path}.partial")
    os.replace(f"{path}.partial", path)


# Copied from single_files/dqn_tbb_ffm.py:load
def load(path, name, weights_only):
    """Reads a file of a run: `path` is the run's directory or the file itself."""
    path = os.path.join(path, name) if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise ValueError(f"expected a run's directory with a file {name}, or such a file, got {path!r}; see `ls runs`")
    return torch.load(path, map_location="cpu", weights_only=weights_only)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    checkpoint = trained = None
    if args.resume:
        changed = [f.name for f in fields(Args) if f.name != "resume" and getattr(args, f.name) != f.default]
        if changed:
            raise ValueError(f"--resume: a run continues under its own flags, got also {', '.join(changed)}; drop them")
        checkpoint = load(args.resume, "checkpoint.pt", weights_only=True)
        args = Args(**checkpoint["args"])
    elif args.evaluate:
        trained = load(args.evaluate, f"{args.exp_name}.cleanrl_model", weights_only=True)
        own = ("seed", "cuda", "torch_threads", "tune_cpu", "eval_episodes", "env_threads", "evaluate")
        args = Args(**{**trained["args"], **{name: getattr(args, name) for name in own}})
    env_kwargs = parse_env_kwargs(args.env_kwargs)
    options = {name: getattr(args, name) for name in ("max_episode_steps", "episodic_life")}
    options |= {"num_threads": args.env_threads, "stack_num": 1}  # TBB: memory instead of stacked frames
    if taken := sorted(options.keys() & env_kwargs.keys()):
        remedy = "this file sets them, by flags of its own where it has them"
        raise ValueError(f"--env-kwargs: expected none of {', '.join(options)}, got {', '.join(taken)}; {remedy}")
    if env_kwargs.get("noop_max", 1) < 1:
        raise ValueError(f"--env-kwargs: expected noop_max of at least 1, got {env_kwargs['noop_max']}; envpool crashes")
    least = dict.fromkeys(("num_envs", "batch_size", "train_frequency", "total_timesteps", "torch_threads", "env_threads"), 1)
    least |= {"max_episode_steps": 1, "cnn_channels": 1, "kept_rows": 1, "eval_episodes": 1 if args.evaluate else 0}
    least["buffer_size"] = args.num_envs * (args.max_episode_steps + 1)  # games that all last to the limit fit on the tape
    for name, bound in least.items():
        if getattr(args, name) < bound:
            remedy = "raise it" + (", or lower --max-episode-steps or --num-envs" if name == "buffer_size" else "")
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {bound}, got {getattr(args, name)}; {remedy}")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda: expected a CUDA device, PyTorch finds none; drop the flag to train on the CPU")
    run_name = checkpoint["run_name"] if checkpoint else f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    torch.set_num_threads(args.torch_threads)
    if args.tune_cpu:
        tune_cpu()

    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda else "cpu")
    env_seeds, eval_seeds = rng.integers(2**31, size=(2, args.num_envs)).tolist()
    if checkpoint:
        rng.bit_generator.state = checkpoint["rng"]
        env_seeds = rng.integers(2**31, size=args.num_envs).tolist()  # other games than at the start

    # env setup
    envs = EnvPool(args.env_id, args.num_envs, np.asarray, **options, **env_kwargs)
    check_spaces(args.env_id, envs.single_observation_space, envs.single_action_space)
    eval_envs = EnvPool(args.env_id, min(args.num_envs, args.eval_episodes or 1), np.asarray, **options, **env_kwargs)

    q_network = QNetwork(envs, args).to(device)
    if trained:
        q_network.load_state_dict(trained["q_network"])
        evaluate_games(q_network, eval_envs, args.eval_episodes, eval_seeds, device)
        sys.exit()
    optimizer = optim.AdamW(q_network.parameters(), lr=args.learning_rate, weight_decay=0, fused=True)
    target_network = QNetwork(envs, args).to(device)
    target_network.load_state_dict(q_network.state_dict())
    check_memory(memory_needs(args, q_network), available_memory())
    tape_buffer = FrameTape(args.buffer_size, envs.single_observation_space.shape, args.num_envs)

    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            sync_tensorboard=True,
            config=vars(args),
            name=run_name,
            id=run_name.replace("/", "-").replace(":", "-"),  # of names such as ALE/Pong-v5
            resume="allow",
            save_code=True,
        )
    writer = SummaryWriter(f"runs/{run_name}", purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
    writer.add_text(
        "hyperparameters",
        "|param|value|\n|-|-|\n%s" % ("\n".join([f"|{key}|{value}|" for key, value in vars(args).items()])),
    )

    # TRY NOT TO MODIFY: start the game
    obs, _ = envs.reset(seed=env_seeds)
    begins = np.ones(args.num_envs, bool)  # is obs[i] the first of its episode?
    recurrent_state = q_network.memory.initial_state(args.num_envs)  # TBB: stays on the device
    game_returns, game_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    global_step = update = 0
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "tape_buffer": tape_buffer}
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint.pop(name))  # the tape is there once, not twice
        global_step, update = checkpoint["global_step"], checkpoint["update"]

    start_time, start_step, last_report = time.time(), global_step, 0
    recent_returns, loss = deque(maxlen=20), torch.tensor(torch.nan)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    print(f"random actions for {args.learning_starts:,} steps, then an update every {args.train_frequency}; runs/{run_name}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps:
        if args.checkpoint_interval and global_step % args.checkpoint_interval < args.num_envs:
            content = {name: part.state_dict() for name, part in parts.items()}
            content |= {"args": asdict(args), "run_name": run_name, "rng": rng.bit_generator.state}
            writer.flush()  # first: a run that goes on from here logs nothing before
            save(f"runs/{run_name}/checkpoint.pt", content | {"global_step": global_step, "update": update})

        # ALGO LOGIC: put action logic here
        duration = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, duration, global_step - args.learning_starts)
        epsilon = 1.0 if global_step < args.learning_starts else epsilon
        with torch.no_grad():
            inputs = torch.as_tensor(obs, device=device), torch.as_tensor(begins, device=device)
            q_values, recurrent_state = q_network.step(*inputs, recurrent_state)
        random_actions = rng.integers(envs.single_action_space.n, size=args.num_envs)
        actions = np.where(rng.random(args.num_envs) < epsilon, random_actions, q_values.argmax(dim=1).cpu().numpy())

        # TRY NOT TO MODIFY: execute the game and log data.
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        global_step += args.num_envs
        begins = terminations | truncations

        # TBB: save data to the tape, each frame as it arrives; a final one has no action and a row of its own
        tape_buffer.add(obs, actions, np.sign(rewards) if args.clip_reward else rewards)
        for i in np.flatnonzero(begins):
            tape_buffer.finish(i, infos["final_obs"][i], terminations[i])
        game_returns += rewards
        game_lengths += 1
        for i in np.flatnonzero(infos["game_over"]):
            recent_returns.append(game_returns[i])
            writer.add_scalar("charts/episodic_return", game_returns[i], global_step)
            writer.add_scalar("charts/episodic_length", game_lengths[i], global_step)
            game_returns[i] = game_lengths[i] = 0

        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs

        # ALGO LOGIC: training.
        updates_due = global_step // args.train_frequency - (global_step - args.num_envs) // args.train_frequency
        for _ in range(updates_due if global_step > args.learning_starts and tape_buffer.complete() else 0):
            tape = tape_buffer.sample(args.batch_size, rng, device)
            q_values = q_network(tape.obs, tape.begins)
            with torch.no_grad():
                target = td_target(q_values, target_network(tape.obs, tape.begins), tape, args.gamma)
            old_val = q_values[tape.transitions, tape.actions[tape.transitions]]
            loss = F.smooth_l1_loss(old_val, target)

            # optimize the model
            anneal = max(0, 1 - global_step / args.total_timesteps) if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * anneal
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)
            if not torch.isfinite(loss + grad_norm):
                remedy = f"runs/{run_name}/checkpoint.pt is from before it; try a smaller --learning-rate or smaller rewards"
                raise FloatingPointError(
                    f"global_step={global_step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}"
                )
            optimizer.step()

            # update target network
            for target_network_param, q_network_param in zip(target_network.parameters(), q_network.parameters()):
                target_network_param.data.lerp_(q_network_param.data, args.tau)

            if update % 50 == 0:
                sps = int((global_step - start_step) / (time.time() - start_time))
                writer.add_scalar("losses/td_loss", loss.item(), global_step)
                writer.add_scalar("losses/q_values", old_val.mean().item(), global_step)
                writer.add_scalar("losses/grad_norm", grad_norm.item(), global_step)
                writer.add_scalar("losses/transitions", len(tape.transitions), global_step)
                writer.add_scalar("charts/epsilon", epsilon, global_step)
                writer.add_scalar("charts/buffer_fill", min(1, tape_buffer.next_row / args.buffer_size), global_step)
                writer.add_scalar("charts/SPS", sps, global_step)
            update += 1

        if time.time() - last_report > (0.2 if sys.stderr.isatty() else 5):
            last_report = time.time()
            status = {
                "episodic_return": f"{np.mean(recent_returns or [np.nan]):.3f}",
                "loss": f"{loss.item():.2e}",
                "epsilon": f"{epsilon:.2f}",
                "SPS": int((global_step - start_step) / (time.time() - start_time)),
            }
            bar.set_postfix(status, refresh=False)
            bar.update(global_step - bar.n)
            if bar.disable:
                print(f"global_step={global_step}", *(f"{key}={value}" for key, value in status.items()), flush=True)
    bar.close()
    print(f"trained for {global_step:,} steps, {update:,} updates, {time.time() - start_time:.1f} seconds")

    if args.save_model:
        model_path = f"runs/{run_name}/{args.exp_name}.cleanrl_model"
        save(model_path, {"q_network": q_network.state_dict(), "args": asdict(args)})
        print(f"model saved to {model_path}")
    if args.eval_episodes:
        for idx, episodic_return in enumerate(evaluate_games(q_network, eval_envs, args.eval_episodes, eval_seeds, device)):
            writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume takes it back

    envs.close()
    writer.close()
