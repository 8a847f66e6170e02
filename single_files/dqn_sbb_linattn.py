# docs: docs/sbb.md
# Variant of single_files/dqn_tbb_linattn.py. Changed: Args, SegmentBuffer (was TapeBuffer), tape_buffer in __main__
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# Linear attention: Katharopoulos et al. (2020), "Transformers are RNNs", https://arxiv.org/abs/2006.16236
# Burn-in: Kapturowski et al. (2019), "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2)
"""Double dueling DQN with a linear transformer, trained on zero-padded segments: the baseline of the tape.

    python single_files/dqn_sbb_linattn.py                               # a memory task, on a CPU
    python single_files/dqn_sbb_linattn.py --env-id CartPole-v1          # any vector observation with discrete actions
    python single_files/dqn_sbb_linattn.py --resume runs/RUN             # continue a killed run exactly
    python single_files/dqn_sbb_linattn.py --evaluate runs/RUN           # greedy episodes with the trained model

This file is all there is: copy it into your project and edit it. Only the import of `linear_scan` is shared, and optional.
Shapes: T rows of a tape, B transitions on it, N environments, O observation, A actions, H width, K keys, V values;
time comes first. Does not include: n-step returns, prioritised replay, continuous actions, images, frame stacking.
"""

import ctypes
import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple

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
    # region arguments -- Copied from single_files/dqn_tbb_ffm.py#arguments
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
    checkpoint_interval: int = 10_000
    """environment steps between checkpoints, from which --resume continues; 0 writes none (steps)"""
    resume: str | None = None
    """run directory, `runs/...`: continue that run exactly, under its own flags"""
    evaluate: str | None = None
    """run directory or model file: run greedy episodes and exit"""

    # Algorithm specific arguments
    env_id: str = "popgym-RepeatFirstEasy-v0"
    """the id of the environment: popgym-* with finite actions, or any with vector observations and discrete actions"""
    env_kwargs: str = "{}"
    """arguments for the environment's constructor, as JSON, such as '{"k": 10, "num_decks": 2}'"""
    prev_action: bool = True
    """if toggled, POPGym observations include the previous action"""
    total_timesteps: int = 75_000
    """total timesteps of the experiment, over all environments (steps)"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer at the start"""
    anneal_lr: bool = True
    """if toggled, the learning rate falls linearly to zero"""
    lr_warmup: int = 0
    """the learning rate first rises linearly from zero for this long (updates)"""
    num_envs: int = 16
    """the number of parallel environments"""
    buffer_size: int = 100_000
    """the capacity of the tape buffer; an episode of L transitions takes L + 1 rows (rows)"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.01
    """the target network moves this share of the way to the Q network at each update"""
    batch_size: int = 500
    """a tape is filled with whole episodes until it holds this many transitions (transitions)"""
    start_e: float = 1.0
    """the starting epsilon for exploration"""
    end_e: float = 0.05
    """the ending epsilon for exploration"""
    exploration_fraction: float = 0.25
    """the fraction of `total_timesteps` it takes from start_e to end_e, once learning has started"""
    learning_starts: int = 5_000
    """timestep to start learning; until then actions are random (steps)"""
    train_frequency: int = 32
    """environment steps per update (steps)"""
    max_grad_norm: float = 1.0
    """the maximum norm of the gradient"""
    loss_reduction: Literal["mean_of_huber", "huber_of_mean"] = "mean_of_huber"
    """for ablations: the Huber loss of the mean absolute error is what the paper's released code trains on segments with"""
    truncation_is_terminal: bool = False
    """if toggled, a time limit ends the return as termination does; published POPGym numbers are under this reading"""
    # endregion

    # Memory specific arguments
    hidden_size: int = 128
    """width H of every layer (units)"""
    key_size: int = 16
    """size K of queries and keys (channels)"""
    value_size: int = 16
    """size V of values; the memory is K x (V + 1) (channels)"""
    segment_length: int = 50
    """transitions per segment; as many segments are drawn as fill `batch_size`, padding included (transitions)"""
    burn_in: int = 0
    """rows before a segment that only warm its memory, as in R2D2; they come on top of `batch_size` (transitions)"""


# Copied from single_files/dqn_tbb_ffm.py:make_env
def make_env(env_id, env_kwargs, prev_action=True, video_folder=None):
    """A function that makes one environment. No wrapper resets by itself: the vector environment does, in the same step."""

    def thunk():
        if env_id.startswith("popgym-"):
            from popgym.wrappers import Antialias, DiscreteAction, Flatten, PreviousAction

            # POPGym's wrappers take POPGym environments only, without the ones that gym.make puts around them
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs).unwrapped
            env = PreviousAction(env) if prev_action else env
            env = Flatten(Antialias(env))  # adds the flag "this is the first step", then concatenates everything one-hot
            if isinstance(env.action_space, gym.spaces.MultiDiscrete):
                env = DiscreteAction(env)
        else:
            env = gym.make(env_id, render_mode="rgb_array" if video_folder else None, **env_kwargs)
            if not isinstance(env.observation_space, gym.spaces.Box):
                env = gym.wrappers.FlattenObservation(env)
        if video_folder:
            env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True, disable_logger=True)
        return env

    return thunk


# Copied from single_files/dqn_tbb_ffm.py:parse_env_kwargs
def parse_env_kwargs(text):
    try:
        return dict(**json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"--env-kwargs: expected a JSON object such as '{{\"k\": 10}}', got {text!r}; mind quotes") from None


# Copied from single_files/dqn_tbb_ffm.py:check_spaces
def check_spaces(env_id, observation_space, action_space):
    """Raises ValueError where this file cannot train, with what can."""
    if not isinstance(action_space, gym.spaces.Discrete):
        remedy = "use a PPO script for continuous actions, or offer a finite choice with a gymnasium.ActionWrapper"
        raise ValueError(f"--env-id {env_id}: expected a Discrete action space, got {action_space}; {remedy}")
    if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
        remedy = "use gymnasium.wrappers.FlattenObservation in make_env, or a convolution as QNetwork's encoder"
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


# Copied from single_files/dqn_tbb_linattn.py:Chunks
class Chunks(torch.autograd.Function):
    """X^T phi(q) on a tape that is cut into N chunks of C rows. All [N, C, ...]; `episode` [N, C, 1] counts the begins so far.

    The gradient is written out, as it can reuse the masks and add in place: the same products transposed, the scan in reverse.
    """

    @staticmethod
    def forward(ctx, query, key, value, episode, scan):
        end = episode[:, -1:]
        start = F.pad(end[:-1], (0, 0, 0, 0, 1, 0), value=-1)  # the episode that runs when the chunk starts: none in the first
        # Episodes count upwards: 1 + earlier - later is 1 if the two are the same, else 0 or less. Such a mask costs a third
        # of a comparison, and a product with it less than a selection
        at_end = (1 + episode - end).relu_()  # of the rows whose episode is still there at the chunk's end
        at_start = (1 + start - episode).relu_()  # of the rows whose episode began in an earlier chunk
        seen = (1 + episode.mT - episode).relu_().tril_()  # [N, C, C]: by this row, that earlier one
        begins = (start < end).flatten()
        x = scan((key * at_end).mT @ value, begins).roll(1, 0)  # the memory before each chunk; no row of the first looks at it
        scores = (query @ key.mT).mul_(seen)
        ctx.save_for_backward(query, key, value, at_end, at_start, seen, begins, x, scores)
        ctx.scan = scan
        return ((query * at_start) @ x).baddbmm_(scores, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, at_end, at_start, seen, begins, x, scores = ctx.saved_tensors
        grad_scores = (grad @ value.mT).mul_(seen)
        grad_x = ctx.scan(((query * at_start).mT @ grad).roll(-1, 0), begins.roll(-1), reverse=True)
        grad_query = (grad @ x.mT).mul_(at_start).baddbmm_(grad_scores, key)
        grad_key = (value @ grad_x.mT).mul_(at_end).baddbmm_(grad_scores.mT, query)
        grad_value = ((key * at_end) @ grad_x).baddbmm_(scores.mT, grad)
        return grad_query, grad_key, grad_value, None, None


# Copied from single_files/dqn_tbb_linattn.py:LinearAttention
class LinearAttention(nn.Module):
    """TBB: a linear transformer as a memoroid: a sum of outer products of keys and values, which a query reads.

    An element of the monoid is X, real [K, V + 1]: the sum of phi(k) (v, 1)^T; its last column z normalises.
    Source: Katharopoulos et al. (2020), section 3.2 and eq. 18-20; the block (MLP, skip, LayerNorm): Morad et al. (2024).
    """

    def __init__(self, input_size, output_size, key_size, value_size, chunk=32):
        super().__init__()
        self.sizes = (key_size, key_size, value_size, output_size)
        self.chunk = chunk  # rows that see each other in one matrix product
        self.inputs = Linear(input_size, sum(self.sizes))  # query, key, value, skip in one matrix product
        sizes = (value_size, output_size, output_size, output_size)
        layers = [m for n, k in zip(sizes, sizes[1:]) for m in (Linear(n, k), nn.LeakyReLU(inplace=True))]
        self.mlp = nn.Sequential(*layers[:-1])
        self.norm = layer_norm(output_size)
        self.identity = (torch.zeros(()),)

    def operator(self, left, right):
        """X • X' = X + X', with the identity 0."""
        return (left[0] + right[0],)

    def lift(self, obs):
        """phi(q), phi(k), (v, 1), skip, where phi = 1 + elu; the element of a step is phi(k) (v, 1)^T.

        [T, H] -> [T, K], [T, K], [T, V + 1], [T, O]
        """
        key_size, _, value_size, output_size = self.sizes
        query_key, value, skip = self.inputs(obs).split((2 * key_size, value_size, output_size), dim=-1)
        query_key = 1 + F.elu(query_key.contiguous())  # elu of a few columns of a wide matrix takes seven times as long
        query, key = query_key.split(key_size, dim=-1)
        return query, key, F.pad(value, (0, 1), value=1.0), skip

    def readout(self, read, skip):
        """The Markov state LN(MLP(X^T phi(q) / z . phi(q)) + skip), of X^T phi(q). [T, V + 1], [T, O] -> [T, O]"""
        weighted, weight = read.split((self.sizes[2], 1), dim=-1)
        # 1e-6 as in the authors' code: phi can be 0
        return self.norm(self.mlp(weighted * (weight + 1e-6).reciprocal()).add_(skip))

    def scan(self, x, begins, reverse=False):
        """TBB: the sum X after every step, since a begin; with `reverse` from the last step back. [T, K, V + 1], [T]"""
        if linear_scan is not None:
            return linear_scan(1.0, x, begins, reverse=reverse)
        identity, (x, begins) = (
            tuple(e.to(x.device) for e in self.identity),
            (v.flip(0) if reverse else v for v in (x, begins)),
        )
        x = blelloch_scan(resettable(self.operator, identity), (x, begins))[0]
        return x.flip(0) if reverse else x

    def attend(self, query, key, value, begins):
        """X^T phi(q) at every row, exactly, though X itself is computed between chunks only.

        A row sees the rows of its episode in its own chunk by a masked matrix product, and all earlier ones through X: no
        state is stored for every row. 2 x [T, K], [T, V + 1], [T] -> [T, V + 1]
        """
        steps, spoilt = len(query), None
        episode = begins.cumsum(0, dtype=torch.float32)  # a number for each row's episode, exact up to 16 million
        found = [e.detach() for e in (query, key, value)]
        if not nn.utils.get_total_norm(found, foreach=True) < 1e12:  # as a norm of nan is not, either
            # a matrix product would spread nan, inf and overflow to other episodes, as 0 * nan is nan
            broken = ~(sum(e.abs().sum(1) for e in found) < 1e12)
            count, first = broken.cumsum(0), torch.searchsorted(episode, episode)  # the row where each row's episode begins
            spoilt = count > (count - broken.long())[first]  # there was one in this episode: nan from there on
            query, key, value = (torch.where(broken[:, None], 0, e) for e in (query, key, value))
        if pad := -steps % self.chunk:
            query, key, value = (F.pad(e, (0, 0, 0, pad)) for e in (query, key, value))
            episode = F.pad(episode, (0, pad), value=steps + 1)
        chunks = (e.unflatten(0, (-1, self.chunk)) for e in (query, key, value, episode[:, None]))
        read = Chunks.apply(*chunks, self.scan).flatten(0, 1)[:steps]
        return read if spoilt is None else torch.where(spoilt[:, None], torch.nan, read)

    def forward(self, obs, begins):
        """TBB: a whole tape at once. [T, H], [T] -> [T, O]"""
        query, key, value, skip = self.lift(obs)
        return self.readout(self.attend(query, key, value, begins), skip)

    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments, each from its own state. [N, H], [N], [N, K, V + 1] -> [N, O], [N, K, V + 1]"""
        query, key, value, skip = self.lift(obs)
        recurrent_state = torch.where(begins[:, None, None], 0, recurrent_state) + key[:, :, None] * value[:, None, :]
        return self.readout((query[:, None] @ recurrent_state)[:, 0], skip), recurrent_state

    def initial_state(self, num_envs):
        key_size, _, value_size, _ = self.sizes
        return torch.zeros(num_envs, key_size, value_size + 1, device=self.inputs.weight.device)


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


class SegmentBuffer:
    """SBB: the same ring of whole episodes, handed out as segments of `segment_length` transitions, on a tape of their own.

    row            0    1    2    | 3    4    5    | 6    7    8    |     an episode of five steps in segments of two:
    obs            o0   o1   o2   | o2   o3   o4   | o4   o5   0    |     each ends in a row for the successor of its last
    begins         1    0    0    | 1    0    0    | 1    0    0    |     step, zeros pad the episode's last one, and memory
    in the loss    yes  yes  -    | yes  yes  -    | yes  -    -    |     starts from nothing at the first row of every one

    With `burn_in`, up to that many earlier rows stand before a segment and warm its memory, outside the loss (R2D2).
    """

    # Copied from single_files/dqn_sbb_ffm.py:SegmentBuffer.__init__
    def __init__(self, buffer_size, obs_size, segment_length, burn_in):
        if segment_length < 1:
            raise ValueError(f"--segment-length: expected at least 1, got {segment_length}; raise it")
        if burn_in < 0:
            raise ValueError(f"--burn-in: expected at least 0, got {burn_in}; raise it")
        self.segment_length, self.burn_in = segment_length, burn_in
        self.obs = np.zeros((buffer_size, obs_size), np.float32)
        self.actions = np.zeros(buffer_size, np.int64)
        self.rewards = np.zeros(buffer_size, np.float32)
        self.terminations = np.zeros(buffer_size, bool)
        self.episode_begins = np.zeros(buffer_size // 2, np.int64)  # an episode has two rows at least
        self.episode_rows = np.zeros(buffer_size // 2, np.int64)
        self.oldest = self.newest = self.rows = self.end = self.touched = 0

    # Copied from single_files/dqn_tbb_ffm.py:TapeBuffer.add
    def add(self, obs, actions, rewards, terminated):
        """Adds one episode: obs [L+1, O] with the final observation, actions [L], rewards [L]; did it end by termination?"""
        length, capacity = len(actions), len(self.obs)
        if length == 0 or len(obs) != length + 1:
            raise ValueError(f"obs: expected the {length} observations of the actions and the final one, got {len(obs)}")
        if length + 1 > capacity:
            raise ValueError(
                f"--buffer-size {capacity}: an episode of {length} steps takes {length + 1} rows; use a larger one"
            )
        while self.rows + length + 1 > capacity:
            self.rows -= self.episode_rows[self.oldest % len(self.episode_rows)]
            self.oldest += 1
        at = (self.end + np.arange(length + 1)) % capacity  # an episode may run across the end of the ring
        self.obs[at] = obs
        self.actions[at[:-1]], self.rewards[at[:-1]], self.terminations[at] = actions, rewards, False
        self.terminations[at[-2]] = terminated
        slot = self.newest % len(self.episode_begins)
        self.episode_begins[slot], self.episode_rows[slot] = self.end, length + 1
        self.end = (self.end + length + 1) % capacity
        self.rows += length + 1
        self.touched = max(self.touched, at.max() + 1)
        self.newest += 1

    # Copied from single_files/dqn_sbb_ffm.py:SegmentBuffer.sample
    def sample(self, batch_size, rng, device="cpu"):
        """batch_size / segment_length segments, uniform over all segments with replacement: as many rows as on a tape."""
        if self.newest == self.oldest:
            raise ValueError("SegmentBuffer.sample: expected a stored episode, got none; add one first")
        stored = np.arange(self.oldest, self.newest) % len(self.episode_begins)
        segments = -(-(self.episode_rows[stored] - 1) // self.segment_length)  # of each episode, rounded up
        ends = np.cumsum(segments)
        drawn = rng.integers(ends[-1], size=max(1, round(batch_size / self.segment_length)))
        episode = np.searchsorted(ends, drawn, side="right")
        first = (drawn - (ends - segments)[episode]) * self.segment_length  # the row of its episode where a segment begins
        last = np.minimum(first + self.segment_length, self.episode_rows[stored[episode]] - 1)  # its last step's successor
        row = np.arange(self.burn_in + self.segment_length + 1) + np.maximum(first - self.burn_in, 0)[:, None]  # [B, rows]
        in_loss = (row >= first[:, None]) & (row < last[:, None])
        at = np.where(row <= last[:, None], self.episode_begins[stored[episode]][:, None] + row, -1) % len(self.obs)
        begins = np.zeros(row.shape, bool)
        begins[:, 0] = True
        obs = np.where((row <= last[:, None])[:, :, None], self.obs[at], 0)
        tape = obs, begins, self.actions[at], self.rewards[at], self.terminations[at]
        tape = *(v.reshape(row.size, *v.shape[2:]) for v in tape), np.flatnonzero(in_loss)
        return Tape(*(torch.from_numpy(v).to(device) for v in tape))

    # Copied from single_files/dqn_tbb_ffm.py:TapeBuffer.state_dict
    def state_dict(self):
        return {name: v[: self.touched] if isinstance(v, np.ndarray) else v for name, v in vars(self).items()}

    # Copied from single_files/dqn_tbb_ffm.py:TapeBuffer.load_state_dict
    def load_state_dict(self, state):
        for name, v in state.items():
            if isinstance(v, np.ndarray):
                getattr(self, name)[: len(v)] = v
            else:
                setattr(self, name, v)


# ALGO LOGIC: initialize agent here:
class QNetwork(nn.Module):
    # Copied from single_files/dqn_tbb_linattn.py:QNetwork.__init__
    def __init__(self, env, args):
        super().__init__()
        self.encoder = self.block(np.array(env.single_observation_space.shape).prod(), args.hidden_size)
        self.memory = LinearAttention(args.hidden_size, args.hidden_size, args.key_size, args.value_size)
        self.network = nn.Sequential(*(self.block(args.hidden_size, args.hidden_size) for _ in range(2)))
        self.head = Linear(args.hidden_size, 1 + env.single_action_space.n)  # the value, and each action's advantage
        nn.init.uniform_(self.head.weight, -((0.01 / args.hidden_size) ** 0.5), (0.01 / args.hidden_size) ** 0.5)
        nn.init.zeros_(self.head.bias)

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.block
    @staticmethod
    def block(input_size, output_size):
        return nn.Sequential(Linear(input_size, output_size), layer_norm(output_size), nn.LeakyReLU(inplace=True))

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.q_values
    def q_values(self, markov_state):
        value, advantage = self.head(self.network(markov_state)).split((1, self.head.out_features - 1), dim=-1)
        return value + advantage - advantage.mean(-1, keepdim=True)

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.forward
    def forward(self, obs, begins):
        """TBB: Q values along a tape. [T, O], [T] -> [T, A]"""
        return self.q_values(self.memory(self.encoder(obs), begins))

    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.step
    def step(self, obs, begins, recurrent_state):
        """TBB: Q values of one step of N environments. [N, O], [N], state -> [N, A], state"""
        markov_state, recurrent_state = self.memory.step(self.encoder(obs), begins, recurrent_state)
        return self.q_values(markov_state), recurrent_state


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


# Copied from single_files/dqn_tbb_ffm.py:evaluate
def evaluate(q_network, env_fns, episodes, seeds, device):
    """Returns of greedy episodes [episodes]. Each environment has its share: short episodes are not counted more often."""
    envs = gym.vector.SyncVectorEnv(env_fns[:episodes], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    share = [len(range(i, episodes, envs.num_envs)) for i in range(envs.num_envs)]
    returns, running = [], np.zeros(envs.num_envs)
    obs, _ = envs.reset(seed=seeds[: envs.num_envs])
    begins = np.ones(envs.num_envs, bool)
    recurrent_state = q_network.memory.initial_state(envs.num_envs)
    while any(share):
        with torch.no_grad():
            inputs = torch.as_tensor(obs, dtype=torch.float32, device=device), torch.as_tensor(begins, device=device)
            q_values, recurrent_state = q_network.step(*inputs, recurrent_state)
        actions = q_values.argmax(dim=1).cpu().numpy() + envs.single_action_space.start
        obs, rewards, terminations, truncations, _ = envs.step(actions)
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
    # region setup -- Copied from single_files/dqn_tbb_ffm.py#setup
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
    for name in ("num_envs", "batch_size", "train_frequency", "total_timesteps", "torch_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}; raise it")
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
    # TBB: in the step that ends an episode, next_obs is already the first one of the next episode; infos has the final one
    envs = gym.vector.SyncVectorEnv(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    if args.capture_video:
        if "rgb_array" not in envs.metadata.get("render_modes", ()):
            raise ValueError(f"--capture-video: expected an environment that renders, {args.env_id} does not; drop the flag")
        import moviepy  # noqa: F401  RecordVideo needs it: better to fail here than after training
    check_spaces(args.env_id, envs.single_observation_space, envs.single_action_space)
    env_seeds, eval_seeds = rng.integers(2**31, size=(2, args.num_envs)).tolist()

    q_network = QNetwork(envs, args).to(device)
    if trained:
        q_network.load_state_dict(trained["q_network"])
        evaluate(q_network, eval_fns, args.eval_episodes, eval_seeds, device)
        sys.exit()
    optimizer = optim.AdamW(q_network.parameters(), lr=args.learning_rate, weight_decay=0, fused=True)
    target_network = QNetwork(envs, args).to(device)
    target_network.load_state_dict(q_network.state_dict())
    # endregion
    tape_buffer = SegmentBuffer(args.buffer_size, envs.single_observation_space.shape[0], args.segment_length, args.burn_in)
    # region training -- Copied from single_files/dqn_tbb_ffm.py#training

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
    recurrent_state = q_network.memory.initial_state(args.num_envs)
    episodes = [[] for _ in range(args.num_envs)]  # TBB: each environment's running episode, rows of (obs, action, reward)
    global_step = update = 0
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "tape_buffer": tape_buffer}
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        global_step, update, obs, begins, recurrent_state, episodes = checkpoint["loop"]
        recurrent_state = recurrent_state.to(device)
        rng.bit_generator.state = checkpoint["rng"]
        if checkpoint["envs"]:
            envs.envs = cloudpickle.loads(checkpoint["envs"])
        else:
            obs, begins, episodes = envs.reset()[0], np.ones(args.num_envs, bool), [[] for _ in range(args.num_envs)]

    start_time, start_step, last_report = time.time(), global_step, 0
    recent_returns, loss = deque(maxlen=20), torch.tensor(torch.nan)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    print(f"random actions for {args.learning_starts:,} steps, then an update every {args.train_frequency}; runs/{run_name}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps:
        if args.checkpoint_interval and global_step % args.checkpoint_interval < args.num_envs:
            content = {name: part.state_dict() for name, part in parts.items()}
            content["loop"] = global_step, update, obs, begins, recurrent_state, episodes
            content |= {"args": asdict(args), "run_name": run_name, "global_step": global_step, "rng": rng.bit_generator.state}
            try:
                content["envs"] = cloudpickle.dumps(envs.envs)
            except Exception as error:  # whatever an environment raises
                content["envs"] = None
                if global_step == 0:
                    print(f"{args.env_id} cannot be saved ({error}): --resume will begin new episodes, the run will differ")
            writer.flush()  # first: a run that goes on from here logs nothing before
            save(f"runs/{run_name}/checkpoint.pt", content)

        # ALGO LOGIC: put action logic here
        duration = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, duration, global_step - args.learning_starts)
        epsilon = 1.0 if global_step < args.learning_starts else epsilon
        with torch.no_grad():
            inputs = torch.as_tensor(obs, dtype=torch.float32, device=device), torch.as_tensor(begins, device=device)
            q_values, recurrent_state = q_network.step(*inputs, recurrent_state)
        random_actions = rng.integers(envs.single_action_space.n, size=args.num_envs)
        actions = np.where(rng.random(args.num_envs) < epsilon, random_actions, q_values.argmax(dim=1).cpu().numpy())

        # TRY NOT TO MODIFY: execute the game and log data.
        next_obs, rewards, terminations, truncations, infos = envs.step(actions + envs.single_action_space.start)
        global_step += args.num_envs
        begins = terminations | truncations

        # TBB: save data to the tape buffer, one whole episode at a time, with its final observation
        for i, row in enumerate(zip(obs, actions, rewards)):
            episodes[i].append(row)
            if begins[i]:
                episode_obs, episode_actions, episode_rewards = zip(*episodes[i])
                terminated = terminations[i] or args.truncation_is_terminal
                tape_buffer.add(np.stack([*episode_obs, infos["final_obs"][i]]), episode_actions, episode_rewards, terminated)
                episodes[i] = []
                recent_returns.append(sum(episode_rewards))
                writer.add_scalar("charts/episodic_return", recent_returns[-1], global_step)
                writer.add_scalar("charts/episodic_length", len(episode_rewards), global_step)

        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs

        # ALGO LOGIC: training.
        updates_due = global_step // args.train_frequency - (global_step - args.num_envs) // args.train_frequency
        for _ in range(updates_due if global_step > args.learning_starts and tape_buffer.newest else 0):
            tape = tape_buffer.sample(args.batch_size, rng, device)
            q_values = q_network(tape.obs, tape.begins)
            with torch.no_grad():
                target = td_target(q_values, target_network(tape.obs, tape.begins), tape, args.gamma)
            old_val = q_values[tape.transitions, tape.actions[tape.transitions]]
            loss = F.smooth_l1_loss(old_val, target)
            if args.loss_reduction == "huber_of_mean":
                loss = F.smooth_l1_loss((old_val - target).abs().mean(), loss.new_zeros(()))

            # optimize the model
            warm = min(1, (update + 1) / args.lr_warmup) if args.lr_warmup else 1
            anneal = max(0, 1 - global_step / args.total_timesteps) if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * warm * anneal
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
                writer.add_scalar("charts/buffer_fill", tape_buffer.rows / args.buffer_size, global_step)
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
        for idx, episodic_return in enumerate(evaluate(q_network, eval_fns, args.eval_episodes, eval_seeds, device)):
            writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume takes it back

    envs.close()
    writer.close()
    # endregion
