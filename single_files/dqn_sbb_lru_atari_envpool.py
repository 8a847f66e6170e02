# docs: docs/envpool.md
# Variant of single_files/dqn_tbb_lru_atari_envpool.py. Changed: Args, FrameSegments (was FrameTape),
#   tape_buffer in __main__
# Memory, tape and convolution: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", arXiv 2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
# envpool: Weng et al. (2022), "EnvPool: A Highly Parallel RL Environment Execution Engine", https://arxiv.org/abs/2206.10558
# Burn-in: Kapturowski et al. (2019), "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2)
"""Double dueling DQN with Linear Recurrent Units (LRU) on Atari games: single frames, trained on zero-padded segments.

This is the baseline of the tape of whole games.

    python single_files/dqn_sbb_lru_atari_envpool.py                             # Pong, on a CPU: hours
    python single_files/dqn_sbb_lru_atari_envpool.py --env-id Breakout-v5 --episodic-life
    python single_files/dqn_sbb_lru_atari_envpool.py --resume runs/RUN           # continue a killed run, with new games
    python single_files/dqn_sbb_lru_atari_envpool.py --evaluate runs/RUN         # greedy games with the trained model

Needs `pip install 'cleanrl-memoroid[envpool]'`. Games run in C++ and cannot be saved: --resume restores weights, optimiser,
target network, tape, random numbers and step, and begins new games, so the run differs from one that was never killed.
Copy this file into your project and edit it: the import from cleanrl_memoroid is optional and only makes it faster.
Shapes: T rows of a tape, B transitions on it, N environments, h x w pixels, A actions, H width, P complex numbers of the
memory; time comes first. Does not include: frame stacking, n-step returns, prioritised replay, video.
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
from torch.utils.checkpoint import checkpoint as recompute
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


PIECE = 256  # frames that the convolution takes at once: its intermediate results stay near the processor
KEPT_ROWS = 4_000  # of a longer tape they are computed twice, not kept for the gradient: a game can be larger than memory


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment; on a CPU, equal seeds give equal runs, until one is resumed
    cuda: bool = False  # if toggled, train on the CUDA device
    track: bool = False  # if toggled, also log to Weights and Biases (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "cleanrl-memoroid"  # the project name in Weights and Biases (the team: WANDB_ENTITY)
    eval_episodes: int = 10  # number of greedy games after training and with --evaluate; 0: none (games)
    checkpoint_interval: int = (
        100_000  # environment steps between checkpoints, each as large as the tape; 0: at Ctrl-C only (steps)
    )
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory: play greedy games with its trained model, and exit

    # Algorithm specific arguments
    env_id: str = "Pong-v5"  # the id of the game in envpool: NAME-v5, such as Breakout-v5
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # of envpool.make: img_height 52
    max_episode_steps: int = 27_000  # time limit of a game; reaching it is truncation, not termination (steps of four frames)
    episodic_life: bool = False  # if toggled, a lost life ends the episode; logs are of whole games
    clip_reward: bool = True  # if toggled, the tape holds the sign of rewards; logged returns are the game's own
    total_timesteps: int = 2_000_000  # total timesteps of the experiment, over all environments (steps)
    learning_rate: float = 5e-4  # the learning rate of the optimizer at the start
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to zero
    num_envs: int = 8  # the number of parallel environments
    buffer_size: int = 250_000  # the capacity of the tape; a game of L transitions takes L + 1 rows, its frames (rows)
    tape_device: str | None = None  # where the tape of whole games lies: cpu or cuda; without the flag, with the network
    gamma: float = 0.99  # the discount factor gamma
    tau: float = 0.01  # the target network moves this share of the way to the Q network at each update
    batch_size: int = 500  # a tape is filled with whole episodes until it holds this many transitions (transitions)
    start_e: float = 1.0  # the starting epsilon for exploration
    end_e: float = 0.02  # the ending epsilon for exploration
    exploration_fraction: float = 0.1  # the fraction of `total_timesteps` from start_e to end_e, once learning has started
    learning_starts: int = 10_000  # timestep to start learning; until then actions are random (steps)
    train_frequency: int = 32  # environment steps per update (steps)
    max_grad_norm: float = 1.0  # the maximum norm of the gradient

    # Memory specific arguments
    cnn_channels: int = 32  # channels of the first convolution; the other two have twice as many (channels)
    hidden_size: int = 256  # width H of every layer (units)
    state_size: int = 128  # complex numbers P in the memory (channels)
    r_min: float = 0.0  # the sizes of lambda begin between this and r_max: near 0, it tells the last frames apart
    r_max: float = 0.999  # see r_min
    segment_length: int = 80  # transitions per segment; as many are drawn as fill `batch_size`, padding included (transitions)
    burn_in: int = 0  # rows before a segment that only warm its memory, as in R2D2; on top of `batch_size` (transitions)


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


def make_env(env_id, num_envs, options):
    """One frame per step, every fourth of the game: grey, and the larger of the last two, so that nothing flickers away."""
    # without a no-op envpool crashes; below 44 pixels the last convolution leaves one, and a LayerNorm over one is zero
    for name, least in {"noop_max": 1, "gray_scale": 1, "img_height": 44, "img_width": 44}.items():
        if options.get(name, least) < least:
            raise ValueError(f"--env-kwargs {name}: expected at least {least}, got {options[name]}; raise it or leave it out")
    return EnvPool(env_id, num_envs, lambda obs: obs[:, -1], {"stack_num": 1, "num_threads": 1} | options)


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


class LRU(nn.Module):
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
        """What one step adds, exp(gamma) B LN(o), and what the readout needs besides. [T, H] -> [T, P] c64, 2 x [T, H]"""
        normed = self.norm(obs)
        weight = self.gamma.exp().repeat_interleave(2) * self.B
        x = normed @ weight  # a complex matrix product would cost twice this real one
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))), (normed, obs)

    def readout(self, x, lifted):
        """The Markov state o + GLU(GELU(Re(C x) + D LN(o))). [T, P] c64, 2 x [T, H] -> [T, H]"""
        normed, skip = lifted
        y = torch.addcmul(F.linear(torch.view_as_real(x).flatten(1), self.C), self.D, normed)
        return F.glu(self.gate(F.gelu(y)), dim=-1).add_(skip)

    def scan(self, x, begins):
        """TBB: the memory after every step of a tape. [T, P] c64, [T] -> [T, P] c64"""
        if linear_scan:
            return linear_scan(self.decay(), x, begins)
        decay = self.decay().to(x.dtype).expand_as(x)
        return associative_scan(resettable(self.operator, identity=(1, 0)), (decay, x, begins))[1]

    def forward(self, obs, begins):
        """TBB: a whole tape at once. [T, H], [T] -> [T, H]"""
        x, lifted = self.lift(obs)
        return self.readout(self.scan(x, begins), lifted)

    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments, each from its own state. [N, H], [N], [N, P] -> [N, H], [N, P]"""
        x, lifted = self.lift(obs)
        recurrent_state = torch.where(begins[:, None], 0, recurrent_state) * self.decay().to(x.dtype) + x
        return self.readout(recurrent_state, lifted), recurrent_state


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
    final: torch.Tensor  # [T] bool: such rows carry no loss


class FrameSegments:
    """SBB: whole episodes, each a Tape of its own, handed out as segments, and the frames of the running ones.

    row            0    1    2    | 3    4    5    | 6    7    8    |     an episode of five steps in segments of two:
    obs            o0   o1   o2   | o2   o3   o4   | o4   o5   0    |     each ends in a row for the successor of its last
    begins         1    0    0    | 1    0    0    | 1    0    0    |     step, zeros pad the episode's last one, and memory
    in the loss    yes  yes  -    | yes  yes  -    | yes  -    -    |     starts from nothing at the first row of every one

    With `burn_in`, up to that many earlier rows stand before a segment and warm its memory, outside the loss (R2D2).
    Frames are stored once, in bytes: a segment is copied out of its episode when it is drawn. If there is no room for up to
    `buffer_size` rows in all, the oldest whole episodes are forgotten.
    """

    def __init__(self, buffer_size, num_envs, episodes, segment_length, burn_in, device="cpu"):
        if segment_length < 1:
            raise ValueError(f"--segment-length: expected at least 1, got {segment_length}; raise it")
        if burn_in < 0:
            raise ValueError(f"--burn-in: expected at least 0, got {burn_in}; raise it")
        self.buffer_size, self.episodes, self.device = buffer_size, episodes, device  # whole ones, oldest first
        episodes[:] = (Tape(*(column.to(device) for column in episode)) for episode in episodes)  # a checkpoint's, elsewhere
        self.running = [[] for _ in range(num_envs)]  # rows of (obs, action, reward)
        self.rows = sum(len(episode.obs) for episode in episodes)
        self.segment_length, self.burn_in = segment_length, burn_in
        self.segments = [segment for episode in episodes for segment in self.cut(episode)]  # oldest first

    def cut(self, episode):
        """The segments of an episode, each as (the episode, its first row there)."""
        return [(episode, first) for first in range(0, len(episode.obs) - 1, self.segment_length)]

    def make_room(self, rows):
        self.rows += rows
        while self.rows > self.buffer_size and self.episodes:
            oldest = self.episodes.pop(0)
            self.rows -= len(oldest.obs)
            del self.segments[: len(self.cut(oldest))]
        if self.rows > self.buffer_size:
            remedy = "use a larger one, fewer environments, or a lower --max-episode-steps"
            raise ValueError(f"--buffer-size {self.buffer_size}: the running episodes have {self.rows} rows; {remedy}")

    def add(self, obs, actions, rewards):
        """Adds one step of all environments: the frames [N, h, w] that they showed, actions [N], and rewards [N] of those."""
        self.make_room(len(obs))
        for episode, frame, action, reward in zip(self.running, obs, actions, rewards):
            episode.append((frame.copy(), action, reward))  # a view would keep the frames of all N

    def finish(self, i, final_obs, terminated):
        """Ends the episode of environment i with its final frame [h, w], which takes a row: was it by termination?"""
        self.make_room(1)
        obs, actions, rewards = zip(*self.running[i])
        row, steps, self.running[i] = np.arange(len(obs) + 1), len(obs), []
        actions, rewards = np.append(actions, 0), np.append(rewards, 0).astype(np.float32)
        columns = np.stack([*obs, final_obs]), row == 0, actions, rewards, (row == steps - 1) & terminated, row == steps
        self.episodes.append(Tape(*(torch.from_numpy(column).to(self.device) for column in columns)))
        self.segments += self.cut(self.episodes[-1])

    def sample(self, batch_size, rng, device="cpu"):
        """batch_size / segment_length segments, uniform over all segments with replacement: as many rows as on a tape."""
        drawn, rows = [], torch.arange(self.burn_in + self.segment_length + 1, device=self.device)
        for i in rng.integers(len(self.segments), size=max(1, round(batch_size / self.segment_length))):
            episode, first = self.segments[i]
            row = rows + max(first - self.burn_in, 0)  # of the episode, for each row of the segment
            last = min(first + self.segment_length, len(episode.obs) - 1)  # the successor of the segment's last step
            segment = Tape(*(column[row.clamp(max=last)] for column in episode))
            segment.obs.masked_fill_((row > last).view(-1, 1, 1), 0)
            drawn.append(segment._replace(begins=rows == 0, final=(row < first) | (row >= last)))
        return Tape(*(torch.cat(column).to(device) for column in zip(*drawn)))


def convolution(frame, channels, outputs):
    """The paper's: three convolutions, each with a LayerNorm over the pixels of every channel. [T, 1, h, w] -> [T, outputs]"""
    layers, inputs, size = [], 1, np.array(frame)
    for filters, kernel, stride in ((channels, 8, 4), (2 * channels, 4, 2), (2 * channels, 3, 1)):
        size = (size - kernel) // stride + 1  # 84 x 84 pixels become 20 x 20, 9 x 9, 7 x 7
        norm = nn.LayerNorm(size.tolist()).requires_grad_(False)  # without parameters, as in the paper
        layers += [nn.Conv2d(inputs, filters, kernel, stride), norm, nn.LeakyReLU(inplace=True)]
        inputs = filters
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * size.prod(), outputs))


# ALGO LOGIC: initialize agent here:
class QNetwork(nn.Module):
    def __init__(self, env, args):
        super().__init__()
        self.encoder = convolution(env.single_observation_space.shape, args.cnn_channels, args.hidden_size)
        self.memory = LRU(args.hidden_size, args.state_size, args.r_min, args.r_max)
        self.network = nn.Sequential(*(self.block(args.hidden_size, args.hidden_size) for _ in range(2)))
        self.head = nn.Linear(args.hidden_size, 1 + env.single_action_space.n)  # the value, and each action's advantage
        nn.init.uniform_(self.head.weight, -((0.01 / args.hidden_size) ** 0.5), (0.01 / args.hidden_size) ** 0.5)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def block(inputs, outputs):
        norm = nn.LayerNorm(outputs).requires_grad_(False)  # without parameters, as in the paper
        return nn.Sequential(nn.Linear(inputs, outputs), norm, nn.LeakyReLU(inplace=True))

    def q_values(self, markov_state):
        value, advantage = self.head(self.network(markov_state)).split((1, self.head.out_features - 1), dim=-1)
        return value + advantage - advantage.mean(-1, keepdim=True)

    def initial_state(self, num_envs):
        return torch.zeros(num_envs, len(self.memory.nu), dtype=torch.complex64, device=self.memory.nu.device)

    def features(self, frames):
        """[T, h, w] bytes -> [T, H]"""
        return self.encoder(frames[:, None].float() / 255)

    def forward(self, obs, begins):
        """TBB: Q values along a tape, whose frames go through the convolution in pieces. [T, h, w] bytes, [T] -> [T, A]"""
        if torch.is_grad_enabled() and len(obs) > KEPT_ROWS:
            pieces = [recompute(self.features, piece, use_reentrant=False) for piece in obs.split(PIECE)]
        else:
            pieces = [self.features(piece) for piece in obs.split(PIECE)]
        return self.q_values(self.memory(torch.cat(pieces), begins))

    @torch.no_grad()
    def step(self, obs, begins, recurrent_state):
        """TBB: Q values of one step of N environments. NumPy [N, h, w] bytes, [N]; state -> [N, A], state"""
        obs, begins = (torch.as_tensor(v).to(recurrent_state.device) for v in (obs, begins))
        markov_state, recurrent_state = self.memory.step(self.features(obs), begins, recurrent_state)
        return self.q_values(markov_state), recurrent_state


def td_target(q, next_q, tape, gamma):
    """r[t] + gamma (1 - termination[t]) Q_target(s[t+1], argmax_a Q(s[t+1], a)) for every transition of the tape. [B]

    TBB: the successor of transition t is row t + 1, whose memory has seen the same episode from its first observation on.
    Double DQN, van Hasselt et al. (2016): q [T, A] of the online network chooses, next_q [T, A] of the target network rates.
    """
    rows = (~tape.final).nonzero().squeeze(1)
    bootstrap = next_q[rows + 1].gather(1, q[rows + 1].argmax(dim=1, keepdim=True)).squeeze(1)
    return tape.rewards[rows] + gamma * torch.where(tape.terminations[rows], 0, bootstrap)


def evaluate(q_network, envs, args):
    """Returns of greedy games, one in each environment: short games do not count more often than long ones. [E]"""
    (obs, _), recurrent_state = envs.reset(seed=args.seed + 10**6), q_network.initial_state(envs.num_envs)
    returns, begins, running = np.zeros(envs.num_envs), *np.ones((2, envs.num_envs), bool)
    while running.any():
        q_values, recurrent_state = q_network.step(obs, begins, recurrent_state)
        obs, rewards, terminations, truncations, infos = envs.step(q_values.argmax(dim=1).cpu().numpy())
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
    if args.buffer_size < (least := args.num_envs * (args.max_episode_steps + 1)):  # games that all last to the limit fit
        remedy = "raise it, or lower --max-episode-steps or --num-envs"
        raise ValueError(f"--buffer-size: expected at least {least}, got {args.buffer_size}; {remedy}")
    if args.tape_device not in (None, "cpu", *["cuda"] * args.cuda):
        raise ValueError(f"--tape-device: expected cpu, or with --cuda cuda, got {args.tape_device}; leave it out")
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))  # more are slower, unless networks are large and cores idle
    tune_cpu()
    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    # env setup
    options = {"max_episode_steps": args.max_episode_steps, "episodic_life": args.episodic_life}
    options |= {"num_threads": 0 if args.cuda else 1} | args.env_kwargs  # 0: as many as there are games or cores
    # TBB: in the step that ends an episode, next_obs is already the first one of the next episode; infos has the final one
    envs, eval_envs = (make_env(args.env_id, number, options) for number in (args.num_envs, args.eval_episodes))

    q_network, target_network = QNetwork(envs, args).to(device), QNetwork(envs, args).to(device)
    target_network.load_state_dict(q_network.state_dict())
    if saved:
        saved = torch.load(path, map_location=device, weights_only=not args.resume) if args.cuda else saved
        weights = saved["q_network"] if args.evaluate else saved["state"]["q_network"].state_dict()
        if [v.shape for v in weights.values()] != [v.shape for v in q_network.state_dict().values()]:
            raise ValueError(f"--env-id {args.env_id}, or sizes of layers: not those of the network in {path}; leave them out")
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-"))
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    if args.evaluate:
        q_network.load_state_dict(weights)
        evaluate(q_network, eval_envs, args)
        sys.exit()
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
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
    global_step, update, episodes = 0, 0, []
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the network's weights
    state = "q_network target_network optimizer episodes rng global_step update".split()
    if saved:
        globals().update(saved["state"])
    tape_buffer = FrameSegments(
        args.buffer_size, args.num_envs, episodes, args.segment_length, args.burn_in, args.tape_device or device
    )
    print(f"games run in C++ and cannot be saved: {'new ones begin' if saved else '--resume will begin new ones'}")
    obs, _ = envs.reset(seed=int(rng.integers(2**31)) if saved else args.seed)  # a resumed run does not repeat its games
    begins = np.ones(args.num_envs, bool)  # is obs[i] the first of its episode?
    recurrent_state = q_network.initial_state(args.num_envs)

    start_time, start_step, recent_returns = time.time(), global_step, deque(maxlen=20)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    print(f"random actions for {args.learning_starts:,} steps, then an update every {args.train_frequency}; {run_dir}")
    print(f"the tape takes {args.buffer_size * obs[0].nbytes / 1e9:.2f} GB once it is full")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=0.2 if sys.stderr.isatty() else 5)
    while global_step < args.total_timesteps:
        if stop or args.checkpoint_interval and global_step % args.checkpoint_interval < args.num_envs:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            save(f"{run_dir}/checkpoint.pt", content)
        if stop:
            print(f"stopped; --resume {run_dir} goes on from step {global_step:,}")
            sys.exit(128 + stop[0])
        # ALGO LOGIC: put action logic here
        exploration = args.learning_starts, args.learning_starts + args.exploration_fraction * args.total_timesteps
        epsilon = np.interp(global_step, exploration, (args.start_e, args.end_e), left=1.0)
        q_values, recurrent_state = q_network.step(obs, begins, recurrent_state)
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
        for i in np.flatnonzero(infos["game_over"]):  # of whole games, also under episodic_life
            recent_returns.append(infos["final_info"]["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", recent_returns[-1], global_step)
            writer.add_scalar("charts/episodic_length", infos["final_info"]["episode"]["l"][i], global_step)
        obs = next_obs  # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        # ALGO LOGIC: training, at every multiple of train_frequency that this step has reached or passed
        updates_due = global_step // args.train_frequency - (global_step - args.num_envs) // args.train_frequency
        for _ in range(updates_due if global_step > args.learning_starts and tape_buffer.episodes else 0):
            tape = tape_buffer.sample(args.batch_size, rng, device)
            q_values = q_network(tape.obs, tape.begins)
            with torch.no_grad():
                target = td_target(q_values, target_network(tape.obs, tape.begins), tape, args.gamma)
            old_val = q_values.gather(1, tape.actions[:, None]).squeeze(1)[~tape.final]
            loss = F.smooth_l1_loss(old_val, target)

            anneal = max(0, 1 - global_step / args.total_timesteps) if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * anneal
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)
            if not torch.isfinite(loss + grad_norm):
                remedy = "scale rewards" if tape.rewards.norm() > 1e6 else f"--resume {run_dir} with a smaller --learning-rate"
                raise FloatingPointError(f"step {global_step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}")
            optimizer.step()
            # update target network
            for target_network_param, q_network_param in zip(target_network.parameters(), q_network.parameters()):
                target_network_param.data.lerp_(q_network_param.data, args.tau)

            if update % 50 == 0:
                writer.add_scalar("losses/td_loss", loss, global_step)
                writer.add_scalar("losses/q_values", old_val.mean(), global_step)
                writer.add_scalar("losses/grad_norm", grad_norm, global_step)
                writer.add_scalar("losses/transitions", len(old_val), global_step)
                writer.add_scalar("charts/epsilon", epsilon, global_step)
                writer.add_scalar("charts/buffer_fill", tape_buffer.rows / args.buffer_size, global_step)
                writer.add_scalar("charts/SPS", int((global_step - start_step) / (time.time() - start_time)), global_step)
                bar.set_postfix(episodic_return=np.mean(recent_returns or [np.nan]), loss=loss.item(), refresh=False)
            update += 1
        bar.update(global_step - bar.n)
    bar.close()
    catch_stop_signals(on=False)
    if update == 0:
        raise ValueError(f"--total-timesteps {args.total_timesteps}: no game had ended when an update was due; raise it")
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "q_network": q_network.state_dict()})
    print(f"trained for {global_step:,} steps, {update:,} updates, {time.time() - start_time:.1f} seconds: {run_dir}/model.pt")
    for idx, episodic_return in enumerate(evaluate(q_network, eval_envs, args) if args.eval_episodes else ()):
        writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume deletes it
    envs.close()
    writer.close()
