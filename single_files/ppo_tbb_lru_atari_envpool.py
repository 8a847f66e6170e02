# docs: docs/ppo_envpool.md. Parent: single_files/ppo_tbb_lru_minigrid_envpool.py; changed: pixels, and a training loop for
#   several processes. What is repeated from other files says so above it.
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
# envpool: Weng et al. (2022), "EnvPool: A Highly Parallel RL Environment Execution Engine", https://arxiv.org/abs/2206.10558
"""PPO with Linear Recurrent Units (LRU) on Atari through envpool: single frames, which memory puts together, and no stack.

    pip install -e '.[envpool]'                                                             # once
    python single_files/ppo_tbb_lru_atari_envpool.py --cuda                                 # Pong
    python single_files/ppo_tbb_lru_atari_envpool.py --env-id Breakout-v5 --episodic-life
    torchrun --nproc-per-node 2 single_files/ppo_tbb_lru_atari_envpool.py --cuda            # one process per GPU, or on a CPU
    python single_files/ppo_tbb_lru_atari_envpool.py --evaluate runs/RUN                    # greedy episodes, trained model

This file is all there is: copy it into your project and edit it. Only the import of `linear_scan` is shared, and optional.
Shapes: S steps of a rollout, N environments, E of them in a minibatch, T rows of a tape, B of them with a loss; h x w pixels,
D parts of an action, H width, P complex numbers of a layer; time comes first. Does not include: videos, exact resumption.
"""

import ctypes
import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:  # at the speed of memory; without it, this file's own blelloch_scan computes the same
    from cleanrl_memoroid.scan import linear_scan
except ImportError:
    linear_scan = None


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment; on a CPU, equal seeds give equal runs, until one is resumed"""
    torch_deterministic: bool = True
    """if toggled, cuDNN uses deterministic algorithms"""
    cuda: bool = False
    """if toggled, train on CUDA devices, one for each process of torchrun"""
    torch_threads: int = 1
    """CPU threads of PyTorch; more pay for large networks on idle cores, and cost dearly on shared ones"""
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
    eval_episodes: int = 16
    """number of greedy episodes after training and with --evaluate (episodes)"""
    checkpoint_interval: int = 100_000
    """environment steps between checkpoints, from which --resume continues; 0 writes none (steps)"""
    resume: str | None = None
    """run directory, `runs/...`: continue that run under its own flags, with new episodes"""
    evaluate: str | None = None
    """run directory or model file: run greedy episodes and exit"""

    # Algorithm specific arguments
    env_id: str = "Pong-v5"
    """the id of the game in envpool: NAME-v5, such as Breakout-v5"""
    env_kwargs: str = "{}"
    """options of envpool, as JSON, such as '{"repeat_action_probability": 0.25, "img_height": 52, "img_width": 52}'"""
    episodic_life: bool = False
    """if toggled, a lost life ends the episode: memory and values begin anew; logs are of whole games either way"""
    clip_reward: bool = True
    """if toggled, learn from the rewards' signs alone; logs are in the game's units"""
    total_timesteps: int = 10_000_000
    """total timesteps of the experiment, over all environments and processes; one is four frames of the game (steps)"""
    learning_rate: float = 5e-4
    """the learning rate of the optimizer at the start"""
    num_envs: int = 8
    """the number of parallel environments, over all processes"""
    num_steps: int = 128
    """the number of steps S to run in each environment per policy rollout (steps)"""
    anneal_lr: bool = True
    """if toggled, the learning rate falls linearly to zero"""
    gamma: float = 0.99
    """the discount factor gamma"""
    gae_lambda: float = 0.95
    """the lambda for the general advantage estimation"""
    num_minibatches: int = 4
    """the number of minibatches; TBB: each of whole environments, whose steps stay in order"""
    update_epochs: int = 4
    """the K epochs to update the policy"""
    norm_adv: bool = True
    """if toggled, advantages are normalised over each minibatch, that is over its parts in all processes together"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = True
    """if toggled, the value's loss is clipped, too, as in the paper"""
    ent_coef: float = 0.01
    """coefficient of the entropy"""
    vf_coef: float = 0.5
    """coefficient of the value function"""
    max_grad_norm: float = 0.5
    """the maximum norm of the gradient"""
    target_kl: float | None = None
    """once an epoch ends with a larger KL divergence from the rollout's policy, the remaining epochs are left out"""
    truncation_is_terminal: bool = False
    """if toggled, a time limit ends the return as termination does"""

    # Memory specific arguments
    max_prefix: int = 128
    """TBB: earlier rows of a running episode that are on the tape, at most; each costs what a row with a loss does (rows)"""
    hidden_size: int = 512
    """width H of every layer (units)"""
    state_size: int = 256
    """complex numbers P in the memory of each layer (channels)"""
    num_layers: int = 1
    """layers of the memory, one above the other"""
    r_min: float = 0.9
    """the sizes of lambda begin between this and r_max: close to one, memory lasts long"""
    r_max: float = 0.999
    """see r_min"""

    # to be filled in runtime
    world_size: int = 1
    """the processes that torchrun has started (computed in runtime)"""
    local_num_envs: int = 0
    """the environments of this process, num_envs / world_size (computed in runtime)"""
    batch_size: int = 0
    """the transitions of a rollout of all processes, num_envs * num_steps (computed in runtime)"""
    minibatch_size: int = 0
    """the transitions with a loss in a minibatch, over all processes, batch_size / num_minibatches (computed in runtime)"""
    num_iterations: int = 0
    """the number of rollouts (computed in runtime)"""


def make_env(env_id, env_kwargs, episodic_life=False):
    """A function that makes games of one kind, as many as it is told: envpool makes, steps and resets all of them together.

    One frame per step (grey, the larger of the last two, so that nothing flickers away), every fourth frame of the game.
    """
    if env_kwargs.get("noop_max", 1) < 1:
        raise ValueError(
            f"--env-kwargs: expected noop_max of at least 1, got {env_kwargs['noop_max']}: envpool crashes; raise it"
        )

    def thunk(num_envs):
        options = {"stack_num": 1, "episodic_life": episodic_life, "num_threads": 1} | env_kwargs
        return EnvPool(env_id, num_envs, last_frame, **options)

    return thunk


# Copied from single_files/ppo_tbb_lru_minigrid_envpool.py:vector_env
def vector_env(env_fns):
    """TBB: in the step that ends an episode, next_obs is the first one of the next episode already; infos has the final."""
    return env_fns[0](len(env_fns))


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


def last_frame(obs):
    """[N, frames, h, w] -> [N, h, w] uint8"""
    return obs[:, -1]


# Copied from single_files/dqn_tbb_ffm.py:parse_env_kwargs
def parse_env_kwargs(text):
    try:
        return dict(**json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"--env-kwargs: expected a JSON object such as '{{\"k\": 10}}', got {text!r}; mind quotes") from None


def check_spaces(env_id, observation_space, action_space):
    """Raises ValueError where this file cannot train, with what can."""
    if len(observation_space.shape) != 2 or min(observation_space.shape) < 44:  # a LayerNorm over one pixel would be zero
        remedy = "use a game of Atari, and img_height, img_width of 44 or more and gray_scale among --env-kwargs"
        raise ValueError(f"--env-id {env_id}: expected grey frames of 44 x 44 pixels, got {observation_space.shape}; {remedy}")


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


# Copied from single_files/ppo_tbb_ffm.py:layer_init
def layer_init(layer, std=2**0.5, bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


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


# Copied from single_files/ppo_tbb_ffm.py:Sections
class Sections(NamedTuple):
    """TBB: the last rollout of some environments, one section after the other, each from its running episode's first row on.

    section        environment 0                            | environment 3
    row            0     1     2     3     4     5     6    | 7     8     9     10
    obs            o0    o1    o2    o3    o0'   o1'   o2'  | o5    o6    o7    o8
    begins         1     0     0     0     1     0     0    | 0     0     0     0        `state` is what the memory held
    loss           -     -     -     x     x     x     x    | x     x     x     x        before row 7: --max-prefix cut there
                   prefix            rollout                  rollout

    A prefix carries no loss. It is there so that every recurrent state is computed under the weights of now, and that the
    gradient of a loss reaches the first observation of its episode.
    """

    obs: torch.Tensor  # [T, O]
    begins: torch.Tensor  # [T] bool
    starts: torch.Tensor  # [E] the first row of each section; rows before starts[0] are padding
    state: torch.Tensor  # [E, ...] the recurrent state before that row, which counts where the row begins no episode
    transitions: torch.Tensor  # [B] the rows with a loss, section by section, in order


# Copied from single_files/ppo_tbb_ffm.py:CarriedTape
class CarriedTape:
    """TBB: the rows of every environment's running episode; they grow from rollout to rollout until the episode ends."""

    def __init__(self, obs, recurrent_state):
        self.obs = [obs[:0, i] for i in range(obs.shape[1])]  # [rows, O] each, of the dtype in which rollouts are stored
        self.begins = [np.zeros(0, bool)] * obs.shape[1]  # [rows] each
        self.state = recurrent_state  # [N, ...] before the first of these rows, where that begins no episode

    def add(self, obs, begins):
        """Appends a rollout: obs [S, N, O], begins [S, N]."""
        self.obs = [np.concatenate([rows, obs[:, i]]) for i, rows in enumerate(self.obs)]
        self.begins = [np.concatenate([rows, begins[:, i]]) for i, rows in enumerate(self.begins)]

    def sections(self, envs, num_steps, upto=None):
        """The tape of environments `envs` [E], whose last `num_steps` rows carry a loss; on request of their rows [:upto]."""
        all_obs, all_begins = [self.obs[i][:upto] for i in envs], [self.begins[i][:upto] for i in envs]
        rows = np.array([len(begins) for begins in all_begins])
        # lone rows, episodes of one step, round the length up: oneDNN takes 10 ms to get ready for a new length
        pad = -rows.sum() % 64
        ends = pad + np.cumsum(rows)
        obs = np.concatenate([np.zeros((pad, *self.obs[0].shape[1:]), self.obs[0].dtype), *all_obs])
        begins = np.concatenate([np.ones(pad, bool), *all_begins])
        transitions = (ends[:, None] + np.arange(-num_steps, 0)).flatten()
        arrays = obs, begins, ends - rows, np.asarray(envs), transitions
        obs, begins, starts, envs, transitions = (torch.from_numpy(v).to(self.state.device) for v in arrays)
        return Sections(obs, begins, starts, self.state[envs], transitions)

    @torch.no_grad()
    def carry(self, next_begins, recurrent_state, max_prefix, agent):
        """Forgets all but the running episodes, cuts them down to `max_prefix` rows, and says where their memory stands.

        next_begins [N], recurrent_state [N, ...]: before the next observation, as the rollout left it. With no prefix at all,
        it is carried as it is, stale as under stored-state training. Returns: recurrent_state under the agent's weights now.
        """
        for i, begins in enumerate(self.begins):
            first = len(begins) if next_begins[i] or max_prefix == 0 else np.append(0, np.flatnonzero(begins))[-1]
            self.obs[i], self.begins[i] = self.obs[i][first:], begins[first:]
        if max_prefix == 0:
            self.state = recurrent_state
            return recurrent_state
        long = [i for i, begins in enumerate(self.begins) if len(begins) > max_prefix]
        if long:  # the state at the cut comes from the rows before it
            self.state[long] = agent(self.sections(long, 0, upto=-max_prefix))[2]
        for i in long:
            self.obs[i], self.begins[i] = self.obs[i][-max_prefix:], self.begins[i][-max_prefix:]
        running = [i for i, begins in enumerate(self.begins) if len(begins)]
        if running:
            recurrent_state = recurrent_state.clone()
            recurrent_state[running] = agent(self.sections(running, 0))[2]
        return recurrent_state


# Copied from single_files/ppo_tbb_ffm.py:enter
def enter(x, decay, begins, starts, state):
    """TBB: sections go on from their `state`: the first row adds it, faded by a step, to what it adds to the memory itself.

    x [T, ...], begins [T], starts [E], state [E, ...] -> x [T, ...], begins [T] for one scan of all sections; decay() is [...]
    """
    fresh = begins[starts]
    if not fresh.all():
        state = torch.where(fresh.view(-1, *[1] * (x.dim() - 1)), 0, state) * decay().to(x.dtype)
        x = x.expand(-1, *state.shape[1:]).index_add(0, starts, state)
    return x, begins.index_fill(0, starts, True)


class LRU(nn.Module):
    """TBB: one layer, a Linear Recurrent Unit as a memoroid: P complex numbers that each fade and turn at a rate of their own.

    An element of the monoid is (A, x): the factor [P] that its steps multiply earlier memory by, and the memory [P] they add.
    Source: Orvieto et al. (2023), sections 3.3 and 3.4, with the block of their figure 1: LayerNorm, LRU, GELU, GLU, skip.
    """

    # Copied from single_files/dqn_tbb_lru.py:LRU.__init__
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

    # Copied from single_files/dqn_tbb_lru.py:LRU.operator
    def operator(self, left, right):
        """(A, x) • (A', x') = (A' A, A' x + x'), with the identity (1, 0)."""
        (a, x), (right_a, right_x) = left, right
        return right_a * a, right_a * x + right_x

    # Copied from single_files/dqn_tbb_lru.py:LRU.decay
    def decay(self):
        """lambda = exp(-exp(nu) + i exp(theta)), which a step multiplies the memory by. In double, for its powers. [P] c128"""
        return torch.exp(torch.complex(-self.nu.double().exp(), self.theta.double().exp()))

    # Copied from single_files/dqn_tbb_lru.py:LRU.lift
    def lift(self, obs):
        """What one step adds, exp(gamma) B LN(o), and what the readout needs besides. [T, H] -> [T, P] c64, 2 x [T, H]"""
        normed = self.norm(obs)
        weight = self.gamma.exp().repeat_interleave(2) * self.B
        x = normed @ weight  # a complex matrix product would cost twice this real one
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))), (normed, obs)

    # Copied from single_files/dqn_tbb_lru.py:LRU.readout
    def readout(self, x, gated):
        """The Markov state o + GLU(GELU(Re(C x) + D LN(o))). [T, P] c64, 2 x [T, H] -> [T, H]"""
        normed, skip = gated
        y = torch.addcmul(F.linear(torch.view_as_real(x).flatten(1), self.C), self.D, normed)
        return F.glu(self.gate(F.gelu(y)), dim=-1).add_(skip)

    # Copied from single_files/dqn_tbb_lru.py:LRU.scan
    def scan(self, x, begins):
        """TBB: the memory after every step of a tape. [T, P] c64, [T] -> [T, P] c64"""
        if linear_scan is not None:
            return linear_scan(self.decay(), x, begins)
        identity = tuple(e.to(x.device) for e in self.identity)
        decay = self.decay().to(x.dtype).expand_as(x)
        return blelloch_scan(resettable(self.operator, identity), (decay, x, begins))[1]

    # Copied from single_files/ppo_tbb_ffm.py:FFM.forward
    def forward(self, obs, begins, starts, state, rows):
        """TBB: all sections of a tape at once: what is read at `rows` [B], and the recurrent state after each section.

        [T, H], [T], [E], [E, ...], [B] -> [B, O], [E, ...]
        """
        x, gated = self.lift(obs)
        x = self.scan(*enter(x, self.decay, begins, starts, state))
        after = x[F.pad(starts[1:], (0, 1), value=len(x)) - 1]
        if len(rows) < len(x):
            x, *gated = (v.index_select(0, rows) for v in (x, *gated))
        return self.readout(x, gated), after

    # Copied from single_files/dqn_tbb_lru.py:LRU.step
    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments, each from its own state. [N, H], [N], [N, P] -> [N, H], [N, P]"""
        x, gated = self.lift(obs)
        recurrent_state = torch.where(begins[:, None], 0, recurrent_state) * self.decay().to(x.dtype) + x
        return self.readout(recurrent_state, gated), recurrent_state


class StackedLRU(nn.Module):
    """Layers one above the other: each reads the Markov states of the one below, and keeps a memory of its own."""

    # Copied from single_files/dqn_tbb_lru.py:StackedLRU.__init__
    def __init__(self, width, num_layers, **sizes):
        super().__init__()
        self.layers = nn.ModuleList(LRU(width, **sizes) for _ in range(num_layers))

    # Copied from single_files/ppo_tbb_lru.py:StackedLRU.forward
    def forward(self, obs, begins, starts, state, rows):
        """Only the layer on top can do with fewer rows. [T, H], [T], [E], [E, layers, P], [B] -> [B, H], [E, layers, P]"""
        states, every_row = [], torch.arange(len(obs), device=obs.device)
        for layer, layer_state in zip(self.layers, state.unbind(1)):
            layer_rows = rows if layer is self.layers[-1] else every_row
            obs, layer_state = layer(obs, begins, starts, layer_state, layer_rows)
            states.append(layer_state)
        return obs, torch.stack(states, 1)

    # Copied from single_files/dqn_tbb_lru.py:StackedLRU.step
    def step(self, obs, begins, recurrent_state):
        """[N, H], [N], [N, layers, P] -> [N, H], [N, layers, P]"""
        states = []
        for layer, state in zip(self.layers, recurrent_state.unbind(1)):
            obs, state = layer.step(obs, begins, state)
            states.append(state)
        return obs, torch.stack(states, 1)

    # Copied from single_files/dqn_tbb_lru.py:StackedLRU.initial_state
    def initial_state(self, num_envs):
        state_size, device = len(self.layers[0].decay()), self.layers[0].D.device
        return torch.zeros(num_envs, len(self.layers), state_size, dtype=torch.complex64, device=device)


class AtariCNN(nn.Module):
    """The paper's: three convolutions, each with a LayerNorm over the pixels of every channel, and a linear layer."""

    def __init__(self, frame, output_size):
        super().__init__()
        layers, channels, (height, width) = [], 1, frame
        for filters, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            # 84 x 84 pixels become 20 x 20, 9 x 9, 7 x 7
            layers += [nn.Conv2d(channels, filters, kernel, stride), layer_norm((height, width)), nn.LeakyReLU(inplace=True)]
            channels = filters
        self.layers = nn.Sequential(*layers, nn.Flatten(), Linear(channels * height * width, output_size))

    def forward(self, obs):
        """Frames of 0 to 255. [T, h, w] -> [T, H]"""
        return self.layers(obs[:, None].to(torch.float32) / 255)


# Copied from single_files/ppo_tbb_ffm.py:Categorical
class Categorical:
    """The choices in D parts of an action, independent of each other. torch.distributions takes twice as long.

    logits [B, D, choices], finite
    """

    def __init__(self, logits):
        self.logits = logits - logits.logsumexp(-1, keepdim=True)  # of probabilities: log p

    @property
    def mode(self):
        return self.logits.argmax(-1)  # [B, D]

    def sample(self):
        return torch.multinomial(self.logits.exp().flatten(0, 1), 1).view(self.logits.shape[:-1])  # [B, D]

    def log_prob(self, actions):
        return self.logits.gather(-1, actions[..., None]).squeeze(-1).sum(-1)  # [B]

    def entropy(self):
        return -(self.logits.exp() * self.logits).sum((-2, -1))  # [B]


# ALGO LOGIC: initialize agent here:
class Agent(nn.Module):
    def __init__(self, envs, args):
        super().__init__()
        space = envs.single_action_space
        self.nvec = space.nvec.tolist() if isinstance(space, gym.spaces.MultiDiscrete) else [int(space.n)]
        self.action_size, self.action_dtype = len(self.nvec), torch.int64
        self.encoder = AtariCNN(envs.single_observation_space.shape, args.hidden_size)
        self.memory = StackedLRU(
            args.hidden_size, args.num_layers, state_size=args.state_size, r_min=args.r_min, r_max=args.r_max
        )
        self.norm = layer_norm(args.hidden_size)
        self.outputs = (sum(self.nvec), 1)  # the actor's and the critic's, of one matrix product
        self.actor_critic = layer_init(Linear(args.hidden_size, sum(self.outputs)), std=0.01)
        torch.nn.init.orthogonal_(self.actor_critic.weight[-1:], 1.0)

    # Copied from single_files/ppo_tbb_ffm.py:Agent.policy
    def policy(self, logits):
        """The distribution of an action's D parts. [B, sum of choices] -> over [B, D]"""
        if len(self.nvec) == 1:
            return Categorical(logits[:, None])
        most = max(self.nvec)  # a choice that a part lacks is as good as impossible
        parts = [F.pad(part, (0, most - part.shape[-1]), value=-1e9) for part in logits.split(self.nvec, dim=-1)]
        return Categorical(torch.stack(parts, -2))

    # Copied from single_files/ppo_tbb_ffm.py:Agent.heads
    def heads(self, markov_state):
        logits, value = self.actor_critic(self.norm(markov_state)).split(self.outputs, dim=-1)
        return self.policy(logits), value.squeeze(-1)

    # Copied from single_files/ppo_tbb_ffm.py:Agent.forward
    def forward(self, tape):
        """TBB: policy and value [B] at the rows with a loss, and the recurrent state after each section [E, ...]"""
        obs, begins, starts, state, rows = tape
        markov_state, recurrent_state = self.memory(self.encoder(obs), begins, starts, state, rows)
        return *self.heads(markov_state), recurrent_state

    # Copied from single_files/ppo_tbb_ffm.py:Agent.step
    def step(self, obs, begins, recurrent_state):
        """TBB: policy and value [N] of one step of N environments, and their states. [N, O], [N], [N, ...]"""
        markov_state, recurrent_state = self.memory.step(self.encoder(obs), begins, recurrent_state)
        return *self.heads(markov_state), recurrent_state


# Copied from single_files/ppo_tbb_ffm.py:gae
def gae(rewards, values, next_values, ends, gamma, gae_lambda):
    """Generalised advantage estimation, A[t] = delta[t] + gamma lambda A[t+1], where delta = r + gamma V(s') - V(s).

    TBB: a reverse scan over all episodes at once. rewards, values, next_values [T] -> advantages [T]; ends [T] bool: is row t
    the last one of its episode, or of its environment in this rollout? next_values is 0 where an episode has terminated,
    else the value of the state that followed, the final one of a truncated episode included. Schulman et al. (2016), eq. 16.
    """
    delta = rewards + gamma * next_values - values
    if linear_scan is not None:
        return linear_scan(gamma * gae_lambda, delta, ends, reverse=True)

    def operator(left, right):
        """(a, x) • (a', x') = (a' a, a' x + x'), with the identity (1, 0)."""
        return right[0] * left[0], right[0] * left[1] + right[1]

    elems = torch.full_like(delta, gamma * gae_lambda), delta.flip(0), ends.flip(0)
    return blelloch_scan(resettable(operator, (delta.new_ones(()), delta.new_zeros(()))), elems)[1].flip(0)


def joined(x):
    """Rows [B] of all W processes, one after the other [W * B]; the same in each of them. Alone: the rows themselves."""
    if not dist.is_initialized():
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.contiguous())
    return torch.cat(rows)


def average_gradients(parameters):
    """Leaves the mean of all processes' gradients in each of them: that of the loss of all rows, as all have equally many."""
    if not dist.is_initialized():
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])  # one message instead of one for each parameter
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat / dist.get_world_size()).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


class Batch(NamedTuple):
    """What a rollout has found out about its rows, environment by environment."""

    actions: torch.Tensor  # [B, D]
    logprobs: torch.Tensor  # [B], as of values, advantages and returns
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def ppo_loss(policy, newvalue, batch, args):
    """PPO's loss over rows with a loss, and what is logged of it. Its mean over processes is that of their rows joined."""
    newlogprob, entropy = policy.log_prob(batch.actions), policy.entropy()
    logratio = newlogprob - batch.logprobs
    ratio = logratio.exp()

    advantages = batch.advantages
    if args.norm_adv:
        everywhere = joined(advantages)
        advantages = (advantages - everywhere.mean()) / (everywhere.std() + 1e-8)

    # Policy loss
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()

    # Value loss
    v_loss = (newvalue - batch.returns) ** 2
    if args.clip_vloss:
        v_change = torch.clamp(newvalue - batch.values, -args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (batch.values + v_change - batch.returns) ** 2)
    v_loss = 0.5 * v_loss.mean()

    entropy_loss = entropy.mean()
    stats = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy_loss}
    # calculate approx_kl http://joschu.net/blog/kl-approx.html
    stats |= {"old_approx_kl": (-logratio).mean(), "approx_kl": ((ratio - 1) - logratio).mean()}
    stats |= {"clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(), "logprob_error": logratio.abs().max()}
    loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef
    return loss, {name: value.detach() for name, value in stats.items()}


# Copied from single_files/ppo_tbb_ffm.py:evaluate
def evaluate(agent, env_fns, episodes, seeds, device):
    """Returns of greedy episodes [episodes]. Each environment has its share: short episodes are not counted more often."""
    envs = vector_env(env_fns[:episodes])
    share = [len(range(i, episodes, envs.num_envs)) for i in range(envs.num_envs)]
    returns, running = [], np.zeros(envs.num_envs)
    obs, _ = envs.reset(seed=seeds[: envs.num_envs])
    begins = np.ones(envs.num_envs, bool)
    recurrent_state = agent.memory.initial_state(envs.num_envs)
    while any(share):
        with torch.no_grad():
            inputs = torch.as_tensor(obs, dtype=torch.float32, device=device), torch.as_tensor(begins, device=device)
            policy, _, recurrent_state = agent.step(*inputs, recurrent_state)
        obs, rewards, terminations, truncations, _ = envs.step(env_actions(envs, policy.mode))
        running += rewards
        begins = terminations | truncations
        for i in np.flatnonzero(begins):
            if share[i]:
                returns.append(running[i])
                share[i] -= 1
            running[i] = 0
    envs.close()
    spread = f"{len(returns)} greedy episodes, {min(returns):.4f} to {max(returns):.4f}"
    print(f"evaluation: episodic_return={np.mean(returns):.4f} ({spread})")
    return returns


# Copied from single_files/ppo_tbb_ffm.py:env_actions
def env_actions(envs, actions):
    """Actions [N, D] as the environments take them: one number each if that is all, counted from the space's first."""
    return actions.cpu().numpy().reshape(envs.action_space.shape) + getattr(envs.single_action_space, "start", 0)


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
        own = ("seed", "cuda", "torch_threads", "tune_cpu", "eval_episodes", "evaluate")
        args = Args(**{**trained["args"], **{name: getattr(args, name) for name in own}})
    env_kwargs = parse_env_kwargs(args.env_kwargs)
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps", "torch_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}; raise it")
    if args.max_prefix < 0:
        raise ValueError(f"--max-prefix: expected at least 0, got {args.max_prefix}; 0 carries recurrent states alone")
    args.world_size = int(os.getenv("WORLD_SIZE", "1"))  # torchrun says so
    if args.num_envs % (args.world_size * args.num_minibatches):
        remedy = "a minibatch is made of whole environments, equally many in each process; change one of them"
        parts = f"{args.num_minibatches} minibatches x {args.world_size} processes"
        raise ValueError(f"--num-envs {args.num_envs}: expected a multiple of {parts}; {remedy}")
    args.local_num_envs = args.num_envs // args.world_size
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // args.batch_size
    if args.num_iterations == 0:
        raise ValueError(f"--total-timesteps {args.total_timesteps}: expected one rollout at least, {args.batch_size} steps")
    rank, local_rank = int(os.getenv("RANK", "0")), int(os.getenv("LOCAL_RANK", "0"))
    if args.cuda and torch.cuda.device_count() <= local_rank:
        remedy = "start fewer processes, or drop the flag to train on the CPU"
        raise ValueError(f"--cuda: expected a CUDA device per process, PyTorch finds {torch.cuda.device_count()}; {remedy}")
    writes = rank == 0  # one process logs, saves and evaluates for all
    run_name = checkpoint["run_name"] if checkpoint else f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    torch.set_num_threads(args.torch_threads)
    if args.tune_cpu:
        tune_cpu()

    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda", local_rank) if args.cuda else torch.device("cpu")
    if args.world_size > 1 and not args.evaluate:
        if args.cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if args.cuda else "gloo")

    # env setup
    env_fns = [make_env(args.env_id, env_kwargs, args.episodic_life)] * args.local_num_envs
    eval_fns = [make_env(args.env_id, env_kwargs)] * args.num_envs
    envs = vector_env(env_fns)
    check_spaces(args.env_id, envs.single_observation_space, envs.single_action_space)
    env_seeds, eval_seeds = rng.integers(2**31, size=(2, args.num_envs)).tolist()
    env_seeds = env_seeds[rank * args.local_num_envs : (rank + 1) * args.local_num_envs]

    agent = Agent(envs, args).to(device)  # the same in every process, as of one seed; from here on their draws differ
    seeds = np.random.SeedSequence(args.seed).generate_state(args.world_size).tolist()
    if args.world_size > 1:
        torch.manual_seed(seeds[rank])
        rng = np.random.default_rng(seeds[rank])
    if trained:
        agent.load_state_dict(trained["agent"])
        evaluate(agent, eval_fns, args.eval_episodes, eval_seeds, device)
        sys.exit()
    parameters = list(agent.parameters())  # once: a walk through all modules takes a tenth of a millisecond
    optimizer = optim.Adam(parameters, lr=args.learning_rate, fused=True)

    if args.track and writes:
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
    writer = None
    if writes:
        writer = SummaryWriter(f"runs/{run_name}", purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
        writer.add_text(
            "hyperparameters",
            "|param|value|\n|-|-|\n%s" % ("\n".join([f"|{key}|{value}|" for key, value in vars(args).items()])),
        )

    # TRY NOT TO MODIFY: start the game
    next_obs, _ = envs.reset(seed=None if checkpoint else env_seeds)  # a resumed run does not repeat its games
    next_begins = np.ones(args.local_num_envs, bool)  # is next_obs[i] the first of its episode?
    recurrent_state = agent.memory.initial_state(args.local_num_envs)  # on the device, where it stays
    obs = np.zeros((args.num_steps, *next_obs.shape), np.uint8)  # each frame once
    carried_tape = CarriedTape(obs, recurrent_state)
    returns, lengths = np.zeros(args.local_num_envs), np.zeros(args.local_num_envs, int)  # of the running episodes, so far
    global_step, first_iteration = 0, 1
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        global_step, first_iteration = checkpoint["global_step"], checkpoint["iteration"]
        torch.manual_seed(seeds[rank] + global_step)
        rng = np.random.default_rng(seeds[rank] + global_step)

    # ALGO Logic: Storage setup
    begins, ended = np.zeros((2, args.num_steps, args.local_num_envs), bool)
    rewards = np.zeros((args.num_steps, args.local_num_envs), np.float32)
    actions = torch.zeros(args.num_steps, args.local_num_envs, agent.action_size, dtype=agent.action_dtype, device=device)
    logprobs, values, bootstraps = torch.zeros(3, args.num_steps, args.local_num_envs, device=device)

    start_time, start_step, last_report = time.time(), global_step, 0
    recent_returns = deque(maxlen=100)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    frames = obs.nbytes + args.local_num_envs * args.max_prefix * obs[0, 0].nbytes
    if writes:
        size = f"{args.total_timesteps:,} steps in {args.num_envs} environments"
        print(f"{args.exp_name}: {args.env_id}, {size}, {device}, {scan}")
        print(f"{args.num_iterations} rollouts of {args.num_steps} steps; runs/{run_name}")
        print(f"frames of a rollout and its prefix, in each of {args.world_size} processes: {frames / 2**20:.0f} MiB at most")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=not sys.stderr.isatty() or not writes)
    for iteration in range(first_iteration, args.num_iterations + 1):
        if writes and args.checkpoint_interval and global_step % args.checkpoint_interval < args.batch_size:
            content = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "global_step": global_step}
            content |= {"iteration": iteration, "args": asdict(args), "run_name": run_name}
            writer.flush()  # first: a run that goes on from here logs nothing before
            save(f"runs/{run_name}/checkpoint.pt", content)

        # Annealing the rate if instructed to do so.
        if args.anneal_lr:
            frac = 1.0 - (iteration - 1.0) / args.num_iterations
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        for step in range(args.num_steps):
            global_step += args.num_envs  # of all processes
            obs[step], begins[step] = next_obs, next_begins

            # ALGO LOGIC: action logic
            with torch.no_grad():
                inputs = torch.as_tensor(obs[step], device=device), torch.as_tensor(begins[step], device=device)
                policy, values[step], recurrent_state = agent.step(*inputs, recurrent_state)
                actions[step] = policy.sample()
                logprobs[step] = policy.log_prob(actions[step])

            # TRY NOT TO MODIFY: execute the game and log data.
            next_obs, reward, terminations, truncations, infos = envs.step(env_actions(envs, actions[step]))
            ended[step] = next_begins = terminations | truncations
            rewards[step] = np.sign(reward) if args.clip_reward else reward

            # TBB: an episode cut off by a time limit is worth what its final observation is, remembering all before it
            bootstraps[step] = 0
            cut_off = np.flatnonzero(truncations & ~terminations & (not args.truncation_is_terminal))
            if len(cut_off):
                final_obs = torch.as_tensor(np.stack(infos["final_obs"][cut_off]), dtype=torch.float32, device=device)
                with torch.no_grad():
                    _, bootstraps[step, cut_off], _ = agent.step(
                        final_obs, torch.zeros(len(cut_off), dtype=torch.bool, device=device), recurrent_state[cut_off]
                    )

            returns += reward
            lengths += 1
            for i in np.flatnonzero(infos["game_over"]):
                recent_returns.append(returns[i])
                if writes:
                    writer.add_scalar("charts/episodic_return", returns[i], global_step)
                    writer.add_scalar("charts/episodic_length", lengths[i], global_step)
                returns[i] = lengths[i] = 0

        # TBB: the rollout joins the rows that its running episodes have on the tape already
        carried_tape.add(obs, begins)
        tape_rows = sum(map(len, carried_tape.begins))

        # bootstrap value if not done
        with torch.no_grad():
            inputs = torch.as_tensor(next_obs, dtype=torch.float32, device=device), torch.as_tensor(next_begins, device=device)
            _, next_value, _ = agent.step(*inputs, recurrent_state)
            next_values = torch.cat([values[1:], next_value[None]])
            next_values = torch.where(torch.as_tensor(ended, device=device), bootstraps, next_values)

        # TBB: flatten the batch environment by environment, so that each one's steps stay in order: [S, N] -> [N * S]
        ends = ended.copy()
        ends[-1] = True
        b_ends = torch.as_tensor(ends, device=device).T.flatten()
        b_rewards, b_values = torch.as_tensor(rewards, device=device).T.flatten(), values.T.flatten()
        b_advantages = gae(b_rewards, b_values, next_values.T.flatten(), b_ends, args.gamma, args.gae_lambda)
        b_actions, b_logprobs, b_returns = actions.transpose(0, 1).flatten(0, 1), logprobs.T.flatten(), b_advantages + b_values
        batch = Batch(b_actions, b_logprobs, b_values, b_advantages, b_returns)

        # Optimizing the policy and value network
        clipfracs, logprob_error = [], None
        for _ in range(args.update_epochs):
            for mb_envs in rng.permutation(args.local_num_envs).reshape(args.num_minibatches, -1):
                tape = carried_tape.sections(mb_envs, args.num_steps)
                mb_inds = torch.from_numpy((mb_envs[:, None] * args.num_steps + np.arange(args.num_steps)).flatten())
                mb_inds = mb_inds.to(device)

                policy, newvalue, _ = agent(tape)
                loss, stats = ppo_loss(policy, newvalue, Batch(*(rows[mb_inds] for rows in batch)), args)
                clipfracs.append(stats["clipfrac"])
                if logprob_error is None:  # TBB: no update yet, so the tape and the rollout must be one policy
                    logprob_error = stats["logprob_error"].item()

                optimizer.zero_grad()
                loss.backward()
                average_gradients(parameters)
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=True)
                if not torch.isfinite(loss + grad_norm):
                    remedy = f"runs/{run_name}/checkpoint.pt is from before it; try a smaller --learning-rate or rewards"
                    raise FloatingPointError(
                        f"global_step={global_step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}"
                    )
                optimizer.step()

            if args.target_kl is not None and joined(stats["approx_kl"][None]).mean() > args.target_kl:
                break

        if logprob_error > 1e-3:
            print(f"warning: rollout and tape differ by {logprob_error:.1e} in log-probability: is `step` what `forward` is?")

        # TBB: keep the running episodes, and bring their recurrent states up to the new weights
        recurrent_state = carried_tape.carry(next_begins, recurrent_state, args.max_prefix, agent)

        explained_var = 1 - (b_returns - b_values).var() / b_returns.var() if b_returns.var() > 0 else torch.tensor(torch.nan)

        # TRY NOT TO MODIFY: record rewards for plotting purposes
        sps = int((global_step - start_step) / (time.time() - start_time))
        stats |= {"clipfrac": torch.stack(clipfracs).mean(), "explained_variance": explained_var, "grad_norm": grad_norm}
        if writes:
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("charts/prefix_share", 1 - obs.shape[0] * obs.shape[1] / tape_rows, global_step)
            for name, value in (stats | {"logprob_error": logprob_error}).items():
                writer.add_scalar(f"losses/{name}", float(value), global_step)
            writer.add_scalar("charts/SPS", sps, global_step)

        due = time.time() - last_report > (0.2 if sys.stderr.isatty() else 5) or iteration == args.num_iterations
        if writes and due:
            last_report = time.time()
            mean_return = np.mean(recent_returns or [np.nan])
            status = {"episodic_return": f"{mean_return:.3f}", "entropy": f"{stats['entropy'].item():.3f}", "SPS": sps}
            bar.set_postfix(status, refresh=False)
            bar.update(global_step - bar.n)
            if bar.disable:
                print(f"global_step={global_step}", *(f"{key}={value}" for key, value in status.items()), flush=True)
    bar.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if not writes:
        sys.exit()
    print(f"trained for {global_step:,} steps, {args.num_iterations} rollouts, {time.time() - start_time:.1f} seconds")

    if args.save_model:
        model_path = f"runs/{run_name}/{args.exp_name}.cleanrl_model"
        save(model_path, {"agent": agent.state_dict(), "args": asdict(args)})
        print(f"model saved to {model_path}")
    if args.eval_episodes:
        for idx, episodic_return in enumerate(evaluate(agent, eval_fns, args.eval_episodes, eval_seeds, device)):
            writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume takes it back

    envs.close()
    writer.close()
