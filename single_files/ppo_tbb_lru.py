# docs: docs/ppo.md
# Variant of single_files/ppo_tbb_ffm.py. Changed: Args, Args.total_timesteps, LRU, StackedLRU (were FFM), Agent.__init__
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
"""PPO with Linear Recurrent Units (LRU), trained on a tape that carries running episodes from rollout to rollout.

    python single_files/ppo_tbb_lru.py                               # a memory task, on a CPU
    python single_files/ppo_tbb_lru.py --env-id CartPole-v1          # any vector observation with finite actions
    python single_files/ppo_tbb_lru.py --resume runs/RUN             # continue a killed run exactly
    python single_files/ppo_tbb_lru.py --evaluate runs/RUN           # greedy episodes with the trained model

This file is all there is: copy it into your project and edit it. Only the import of `linear_scan` is shared, and optional.
Shapes: S steps of a rollout, N environments, E of them in a minibatch, T rows of a tape, B of them with a loss; O observation,
D parts of an action, H width, P complex numbers of a layer; time comes first. Does not include: continuous actions, images.
"""

import ctypes
import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
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
    # region arguments -- Copied from single_files/ppo_tbb_ffm.py#arguments with 150_000->300_000
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment; on a CPU, equal seeds give equal runs"""
    torch_deterministic: bool = True
    """if toggled, cuDNN uses deterministic algorithms"""
    cuda: bool = False
    """if toggled, train on the CUDA device (networks this small are as fast on a CPU)"""
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
    capture_video: bool = False
    """if toggled, record the greedy episodes of an evaluation in `videos/{run_name}`, where the environment renders"""
    save_model: bool = True
    """if toggled, save the trained model in `runs/{run_name}`, and evaluate it"""
    eval_episodes: int = 100
    """number of greedy episodes after training and with --evaluate (episodes)"""
    checkpoint_interval: int = 50_000
    """environment steps between checkpoints, from which --resume continues; 0 writes none (steps)"""
    resume: str | None = None
    """run directory, `runs/...`: continue that run exactly, under its own flags"""
    evaluate: str | None = None
    """run directory or model file: run greedy episodes and exit"""

    # Algorithm specific arguments
    env_id: str = "popgym-RepeatFirstEasy-v0"
    """the id of the environment: popgym-* with finite actions, or any with vector observations and finite actions"""
    env_kwargs: str = "{}"
    """arguments for the environment's constructor, as JSON, such as '{"k": 10, "num_decks": 2}'"""
    prev_action: bool = True
    """if toggled, POPGym observations include the previous action"""
    total_timesteps: int = 300_000
    """total timesteps of the experiment, over all environments (steps)"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer at the start"""
    num_envs: int = 64
    """the number of parallel environments"""
    num_steps: int = 52
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
    norm_reward: bool = True
    """if toggled, learn from rewards in units of the discounted return's standard deviation so far; logs are in theirs"""
    norm_adv: bool = True
    """if toggled, advantages are normalised over each minibatch"""
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
    """if toggled, a time limit ends the return as termination does; published POPGym numbers are under this reading"""
    # endregion

    # Memory specific arguments
    max_prefix: int = 4096
    """TBB: earlier rows of a running episode that are on the tape, at most; of what lies before, only its state is (rows)"""
    hidden_size: int = 128
    """width H of every layer (units)"""
    state_size: int = 64
    """complex numbers P in the memory of each layer (channels)"""
    num_layers: int = 2
    """layers of the memory, one above the other"""
    r_min: float = 0.9
    """the sizes of lambda begin between this and r_max: close to one, memory lasts long"""
    r_max: float = 0.999
    """see r_min"""

    # to be filled in runtime
    batch_size: int = 0
    """the transitions of a rollout, num_envs * num_steps (computed in runtime)"""
    minibatch_size: int = 0
    """the transitions with a loss in a minibatch, batch_size / num_minibatches (computed in runtime)"""
    num_iterations: int = 0
    """the number of rollouts (computed in runtime)"""


# Copied from single_files/ppo_tbb_ffm.py:make_env
def make_env(env_id, env_kwargs, prev_action=True, video_folder=None):
    """A function that makes one environment. No wrapper resets by itself: the vector environment does, in the same step."""

    def thunk():
        if env_id.startswith("popgym-"):
            from popgym.wrappers import Antialias, Flatten, PreviousAction

            # POPGym's wrappers take POPGym environments only, without the ones that gym.make puts around them
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs).unwrapped
            env = PreviousAction(env) if prev_action else env
            env = Flatten(Antialias(env))  # adds the flag "this is the first step", then concatenates everything one-hot
        else:
            env = gym.make(env_id, render_mode="rgb_array" if video_folder else None, **env_kwargs)
            if not isinstance(env.observation_space, gym.spaces.Box):
                env = gym.wrappers.FlattenObservation(env)
        if video_folder:
            env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True, disable_logger=True)
        return env

    return thunk


# Copied from single_files/ppo_tbb_ffm.py:vector_env
def vector_env(env_fns):
    """TBB: in the step that ends an episode, next_obs is the first one of the next episode already; infos has the final."""
    return gym.vector.SyncVectorEnv(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


# Copied from single_files/dqn_tbb_ffm.py:parse_env_kwargs
def parse_env_kwargs(text):
    try:
        return dict(**json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"--env-kwargs: expected a JSON object such as '{{\"k\": 10}}', got {text!r}; mind quotes") from None


# Copied from single_files/ppo_tbb_ffm.py:check_spaces
def check_spaces(env_id, observation_space, action_space):
    """Raises ValueError where this file cannot train, with what can."""
    if not isinstance(action_space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        remedy = "use ppo_tbb_lru_continuous_action.py for continuous actions, or a gymnasium.ActionWrapper"
        raise ValueError(f"--env-id {env_id}: expected Discrete or MultiDiscrete actions, got {action_space}; {remedy}")
    if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
        remedy = "use gymnasium.wrappers.FlattenObservation in make_env, or a convolution as Agent's encoder"
        raise ValueError(f"--env-id {env_id}: expected vector observations, got {observation_space}; {remedy}")


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
        self.encoder = self.block(np.array(envs.single_observation_space.shape).prod(), args.hidden_size)
        self.memory = StackedLRU(
            args.hidden_size, args.num_layers, state_size=args.state_size, r_min=args.r_min, r_max=args.r_max
        )
        self.norm = layer_norm(args.hidden_size)
        self.outputs = (sum(self.nvec), 1)  # the actor's and the critic's, of one matrix product
        self.actor_critic = layer_init(Linear(args.hidden_size, sum(self.outputs)), std=0.01)
        torch.nn.init.orthogonal_(self.actor_critic.weight[-1:], 1.0)

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.block
    @staticmethod
    def block(input_size, output_size):
        return nn.Sequential(Linear(input_size, output_size), layer_norm(output_size), nn.LeakyReLU(inplace=True))

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
    # region training -- Copied from single_files/ppo_tbb_ffm.py#training
    args = tyro.cli(Args, description=__doc__)
    checkpoint = trained = None
    if args.resume:
        changed = [f.name for f in fields(Args) if f.name != "resume" and getattr(args, f.name) != f.default]
        if changed:
            raise ValueError(f"--resume: a run continues under its own flags, got also {', '.join(changed)}; drop them")
        checkpoint = load(args.resume, "checkpoint.pt", weights_only=False)  # holds pickled environments: load only your own
        args = Args(**checkpoint["args"])
    elif args.evaluate:
        trained = load(args.evaluate, f"{args.exp_name}.cleanrl_model", weights_only=True)
        own = ("seed", "cuda", "torch_threads", "tune_cpu", "eval_episodes", "capture_video", "evaluate")
        args = Args(**{**trained["args"], **{name: getattr(args, name) for name in own}})
    env_kwargs = parse_env_kwargs(args.env_kwargs)
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps", "torch_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}; raise it")
    if args.max_prefix < 0:
        raise ValueError(f"--max-prefix: expected at least 0, got {args.max_prefix}; 0 carries recurrent states alone")
    if args.num_envs % args.num_minibatches:
        remedy = "a minibatch is made of whole environments; change one of them"
        raise ValueError(f"--num-minibatches {args.num_minibatches}: expected a divisor of {args.num_envs} envs; {remedy}")
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // args.batch_size
    if args.num_iterations == 0:
        raise ValueError(f"--total-timesteps {args.total_timesteps}: expected one rollout at least, {args.batch_size} steps")
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

    # env setup
    env_fns = [make_env(args.env_id, env_kwargs, args.prev_action)] * args.num_envs
    videos = f"videos/{run_name}" if args.capture_video else None
    eval_fns = [make_env(args.env_id, env_kwargs, args.prev_action, videos), *env_fns[1:]]
    envs = vector_env(env_fns)
    if args.capture_video:
        if "rgb_array" not in envs.metadata.get("render_modes", ()):
            raise ValueError(f"--capture-video: expected an environment that renders, {args.env_id} does not; drop the flag")
        import moviepy  # noqa: F401  RecordVideo needs it: better to fail here than after training
    check_spaces(args.env_id, envs.single_observation_space, envs.single_action_space)
    env_seeds, eval_seeds = rng.integers(2**31, size=(2, args.num_envs)).tolist()

    agent = Agent(envs, args).to(device)
    if trained:
        agent.load_state_dict(trained["agent"])
        evaluate(agent, eval_fns, args.eval_episodes, eval_seeds, device)
        sys.exit()
    parameters = list(agent.parameters())  # once: a walk through all modules takes a tenth of a millisecond
    optimizer = optim.Adam(parameters, lr=args.learning_rate, fused=True)

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
    next_obs, _ = envs.reset(seed=env_seeds)
    next_begins = np.ones(args.num_envs, bool)  # is next_obs[i] the first of its episode?
    recurrent_state = agent.memory.initial_state(args.num_envs)
    obs = np.zeros((args.num_steps, *next_obs.shape), np.float32)
    carried_tape = CarriedTape(obs, recurrent_state)
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)  # of the running episodes, so far
    discounted, return_rms = np.zeros(args.num_envs), gym.wrappers.utils.RunningMeanStd()
    global_step, first_iteration = 0, 1
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        global_step, first_iteration, next_obs, next_begins, recurrent_state, *episodes = checkpoint["loop"]
        returns, lengths, discounted, return_rms = episodes
        recurrent_state = recurrent_state.to(device)
        vars(carried_tape).update(checkpoint["carried_tape"], state=checkpoint["carried_tape"]["state"].to(device))
        rng.bit_generator.state = checkpoint["rng"]
        torch.set_rng_state(checkpoint["torch_rng"])
        if args.cuda:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        if checkpoint["envs"]:
            envs.envs = cloudpickle.loads(checkpoint["envs"])
        else:
            next_obs, next_begins = envs.reset()[0], np.ones(args.num_envs, bool)
            returns, lengths, discounted = np.zeros(args.num_envs), np.zeros(args.num_envs, int), np.zeros(args.num_envs)
            carried_tape.carry(next_begins, recurrent_state, args.max_prefix, agent)

    # ALGO Logic: Storage setup
    begins, ended = np.zeros((2, args.num_steps, args.num_envs), bool)
    actions = torch.zeros(args.num_steps, args.num_envs, agent.action_size, dtype=agent.action_dtype, device=device)
    logprobs, rewards, values, bootstraps = torch.zeros(4, args.num_steps, args.num_envs, device=device)

    start_time, start_step, last_report = time.time(), global_step, 0
    recent_returns, loss = deque(maxlen=100), torch.tensor(torch.nan)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    print(f"{args.num_iterations} rollouts of {args.num_steps} steps; runs/{run_name}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=not sys.stderr.isatty())
    for iteration in range(first_iteration, args.num_iterations + 1):
        if args.checkpoint_interval and global_step % args.checkpoint_interval < args.batch_size:
            content = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "carried_tape": vars(carried_tape)}
            content["loop"] = global_step, iteration, next_obs, next_begins, recurrent_state
            content["loop"] += returns, lengths, discounted, return_rms
            content |= {"args": asdict(args), "run_name": run_name, "global_step": global_step, "rng": rng.bit_generator.state}
            content |= {"torch_rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if args.cuda else None}
            try:
                content["envs"] = cloudpickle.dumps(envs.envs)
            except Exception as error:  # whatever an environment raises
                content["envs"] = None
                if global_step == 0:
                    print(f"{args.env_id} cannot be saved ({error}): --resume will begin new episodes, the run will differ")
            writer.flush()  # first: a run that goes on from here logs nothing before
            save(f"runs/{run_name}/checkpoint.pt", content)

        # Annealing the rate if instructed to do so.
        if args.anneal_lr:
            frac = 1.0 - (iteration - 1.0) / args.num_iterations
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        for step in range(args.num_steps):
            global_step += args.num_envs
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
            discounted = discounted * args.gamma + reward
            return_rms.update(discounted)
            scale = 1 / np.sqrt(return_rms.var + 1e-8) if args.norm_reward else 1.0
            rewards[step] = torch.as_tensor(reward * scale, device=device)

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
            for i in np.flatnonzero(next_begins):
                recent_returns.append(returns[i])
                writer.add_scalar("charts/episodic_return", returns[i], global_step)
                writer.add_scalar("charts/episodic_length", lengths[i], global_step)
                returns[i] = lengths[i] = discounted[i] = 0

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
        b_actions, b_logprobs, b_values = actions.transpose(0, 1).flatten(0, 1), logprobs.T.flatten(), values.T.flatten()
        b_advantages = gae(rewards.T.flatten(), b_values, next_values.T.flatten(), b_ends, args.gamma, args.gae_lambda)
        b_returns = b_advantages + b_values

        # Optimizing the policy and value network
        clipfracs, logprob_error = [], None
        for _ in range(args.update_epochs):
            for mb_envs in rng.permutation(args.num_envs).reshape(args.num_minibatches, -1):
                tape = carried_tape.sections(mb_envs, args.num_steps)
                mb_inds = torch.from_numpy((mb_envs[:, None] * args.num_steps + np.arange(args.num_steps)).flatten())
                mb_inds = mb_inds.to(device)

                policy, newvalue, _ = agent(tape)
                newlogprob, entropy = policy.log_prob(b_actions[mb_inds]), policy.entropy()
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()

                with torch.no_grad():
                    # calculate approx_kl http://joschu.net/blog/kl-approx.html
                    old_approx_kl = (-logratio).mean()
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfracs += [((ratio - 1.0).abs() > args.clip_coef).float().mean().item()]
                    if logprob_error is None:  # TBB: no update yet, so the tape and the rollout must be one policy
                        logprob_error = logratio.abs().max().item()

                mb_advantages = b_advantages[mb_inds]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)

                # Policy loss
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                # Value loss
                v_loss = (newvalue - b_returns[mb_inds]) ** 2
                if args.clip_vloss:
                    v_change = torch.clamp(newvalue - b_values[mb_inds], -args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (b_values[mb_inds] + v_change - b_returns[mb_inds]) ** 2)
                v_loss = 0.5 * v_loss.mean()

                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=True)
                if not torch.isfinite(loss + grad_norm):
                    remedy = f"runs/{run_name}/checkpoint.pt is from before it; try a smaller --learning-rate or rewards"
                    raise FloatingPointError(
                        f"global_step={global_step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}"
                    )
                optimizer.step()

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        if logprob_error > 1e-3:
            print(f"warning: rollout and tape differ by {logprob_error:.1e} in log-probability: is `step` what `forward` is?")

        # TBB: keep the running episodes, and bring their recurrent states up to the new weights
        recurrent_state = carried_tape.carry(next_begins, recurrent_state, args.max_prefix, agent)

        explained_var = 1 - (b_returns - b_values).var() / b_returns.var() if b_returns.var() > 0 else torch.tensor(torch.nan)

        # TRY NOT TO MODIFY: record rewards for plotting purposes
        sps = int((global_step - start_step) / (time.time() - start_time))
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/prefix_share", 1 - args.batch_size / tape_rows, global_step)
        writer.add_scalar("losses/value_loss", v_loss.item(), global_step)
        writer.add_scalar("losses/policy_loss", pg_loss.item(), global_step)
        writer.add_scalar("losses/entropy", entropy_loss.item(), global_step)
        writer.add_scalar("losses/old_approx_kl", old_approx_kl.item(), global_step)
        writer.add_scalar("losses/approx_kl", approx_kl.item(), global_step)
        writer.add_scalar("losses/clipfrac", np.mean(clipfracs), global_step)
        writer.add_scalar("losses/explained_variance", explained_var.item(), global_step)
        writer.add_scalar("losses/grad_norm", grad_norm.item(), global_step)
        writer.add_scalar("losses/logprob_error", logprob_error, global_step)
        writer.add_scalar("charts/SPS", sps, global_step)

        if time.time() - last_report > (0.2 if sys.stderr.isatty() else 5) or iteration == args.num_iterations:
            last_report = time.time()
            mean_return = np.mean(recent_returns or [np.nan])
            status = {"episodic_return": f"{mean_return:.3f}", "entropy": f"{entropy_loss.item():.3f}", "SPS": sps}
            bar.set_postfix(status, refresh=False)
            bar.update(global_step - bar.n)
            if bar.disable:
                print(f"global_step={global_step}", *(f"{key}={value}" for key, value in status.items()), flush=True)
    bar.close()
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
    # endregion
