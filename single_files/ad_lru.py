# docs: docs/algorithm_distillation.md
# Variant of single_files/ad_mingru.py. Changed: Args, LRU (was MinGRU), Block
# Algorithm distillation: Laskin et al. (2022), https://arxiv.org/abs/2210.14215
# Memoroid and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
"""Algorithm distillation with LRU: a memoroid whose memory fades at fixed rates, which learns this slowly.

    python single_files/ad_lru.py                           # DarkRoom, on a CPU
    python single_files/ad_lru.py --total-updates 4000      # longer
    python single_files/ad_lru.py --resume runs/RUN         # continue a killed run exactly
    python single_files/ad_lru.py --evaluate runs/RUN       # play tasks that training has not seen, weights frozen

A model learns to predict the actions of an agent that is itself learning. Frozen, in a task that it has not seen, it then
improves from episode to episode by reading what it did before: the weights stay, the memory changes.
Copy this file into your project and edit it: the import from cleanrl_memoroid is optional and only makes it faster.
Shapes: B streams (or runs side by side), W rows of a window, T rows of a chunk, A actions, H width;
P complex numbers of the state.
Does not include: pixels, continuous actions, environments other than the two rooms below.
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
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    from cleanrl_memoroid.runs import catch_stop_signals, check_flags, load, new_run_dir, save
    from cleanrl_memoroid.scan import linear_scan
except ImportError:  # without the package: the same results, more slowly, and no checks of flags and files
    linear_scan = None
    catch_stop_signals, check_flags = lambda on=True: [], lambda *_: None
    load = lambda path, *_: torch.load(path, "cpu", weights_only="model.pt" in path)  # noqa: E731
    new_run_dir = "runs/{}".format

    def save(path, content):  # writes the whole file or nothing, even if the process is killed meanwhile
        torch.save(content, f"{path}.partial")
        os.replace(f"{path}.partial", path)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment, and of the tasks that are held out; on a CPU, equal seeds give equal runs
    cuda: bool = False  # if toggled, train on the CUDA device (networks this small are as fast on a CPU)
    track: bool = False  # if toggled, also log to Weights and Biases (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "cleanrl-memoroid"  # the project name in Weights and Biases (the team: WANDB_ENTITY)
    eval_runs: int = 4  # runs of each task after training and with --evaluate; 0: none after training (runs)
    eval_temperatures: tuple[float, ...] = (1.0, 0.5, 0.0)  # actions are drawn from softmax(logits / this); 0: the likeliest
    checkpoint_interval: int = 100  # updates between checkpoints, for --resume; 0: at Ctrl-C only (updates)
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory: play tasks with its trained model, and exit

    # Learning histories
    env_id: Literal["DarkRoom", "DarkKeyToDoor"] = "DarkRoom"  # find a hidden goal; or a hidden key, then a hidden door
    room_size: int = 5  # the room has as many rows and columns of cells; an odd number has a centre (cells)
    episode_length: int = 10  # every episode ends after so many steps (steps)
    episodes: int = 32  # length of a learning history, and of an evaluation (episodes)
    test_tasks: int = 6  # tasks that are held out of training, drawn by the seed (tasks)
    histories_per_task: int = 40  # learning histories of each of the other tasks (histories)
    source: Literal["q_learning", "noise"] = "q_learning"  # who wrote them: a learner, or an optimal agent with falling noise
    exploration_fraction: float = 0.9  # the source's epsilon falls from 1 to 0 over this fraction of a history

    # Algorithm specific arguments
    total_updates: int = 800  # updates of the experiment (updates)
    batch_rows: int = 1408  # rows of an update, over all streams (rows)
    learning_rate: float = 3e-3  # the largest learning rate of the optimizer
    warmup_updates: int = 100  # the learning rate rises over so many updates, then falls along a cosine (updates)
    final_rate: float = 0.05  # the learning rate of the last update, as a share of the largest
    max_grad_norm: float = 1.0  # the maximum norm of the gradient
    label_smoothing: float = 0.0  # this share of each target is spread over all actions (0.1 in the paper)
    hidden_size: int = 64  # width H of every layer (units)
    num_layers: int = 2  # the number of blocks one above the other

    # Memory specific arguments
    state_size: int = 64  # size P of the recurrent state of each layer (complex numbers)
    r_min: float = 0.9  # eigenvalues begin uniformly on the ring from r_min to r_max
    r_max: float = 0.999  # 1 / (1 - r_max) is the longest memory at the start (rows)
    chunk_length: int = 0  # a history is read in chunks of so many rows; 0: whole (rows)
    bptt_chunks: int = 1  # an update reads so many chunks of each stream; gradients do not reach further back (chunks)
    mem_grad_scale: float = 1.0  # the gradient into the state is multiplied by this at each boundary of two chunks; 0: stopped
    reset_on: Literal["history", "episode"] = "history"  # where memory begins anew; episode: the control without a past


class Rooms:
    """N tasks side by side, deterministic: a step looks state and action up in two tables.

    The agent starts in the centre and sees its cell, not what is hidden. Actions: stay, up, right, down, left; walls stop.
    DarkRoom rewards every step that ends on the goal. DarkKeyToDoor rewards the key once, and then the door once; what has
    been found is a part of the state, which is phase * cells + cell. Source: Laskin et al. (2022), section 4.
    """

    def __init__(self, args, tasks):
        size, cells, self.tasks, self.length = args.room_size, args.room_size**2, tasks, args.episode_length
        y, x = np.divmod(np.arange(cells)[:, None], size)
        moves = np.array([[0, 0], [-1, 0], [0, 1], [1, 0], [0, -1]])
        moved = (y + moves[:, 0]).clip(0, size - 1) * size + (x + moves[:, 1]).clip(0, size - 1)  # [cells, A]
        self.cells, self.start, self.rows = cells, cells // 2, np.arange(len(tasks))
        if args.env_id == "DarkRoom":
            self.reward = (moved == tasks[:, 0, None, None]).astype(np.float32)  # [N, states, A]
            self.successor = np.broadcast_to(moved, self.reward.shape)
        else:
            found = [moved == tasks[:, i, None, None] for i in range(2)]  # the key in phase 0, the door in phase 1
            phases = [*found, np.zeros_like(found[0])]
            self.reward = np.concatenate(phases, 1).astype(np.float32)  # [N, 3 * cells, A]
            self.successor = np.concatenate([(phase + hit) * cells + moved for phase, hit in enumerate(phases)], 1)

    def step(self, state, actions):
        """The next state and the reward of each task. [N], [N] -> [N], [N]"""
        return self.successor[self.rows, state, actions], self.reward[self.rows, state, actions]

    def expected_returns(self, choose):
        """Each task's return if `choose` reduces the values of actions: np.max, the optimum; np.mean, random moves. [N]"""
        value = np.zeros(self.reward.shape[:2])
        for _ in range(self.length):
            value = choose(self.reward + value[self.rows[:, None, None], self.successor], axis=2)
        return value[:, self.start]


class Rows(NamedTuple):
    """What a model reads, a row per observation; one history of two episodes of two steps:

    row       0    1    2    | 3    4    5       the final observation of an episode has a row of its own: without it the
    cell      s0   s1   s2   | s0'  s1'  s2'     last reward would stand beside the first cell of the next episode
    action    -    a0   a1   | -    a0'  a1'     the action before; "-" is a number of its own
    reward    0    r1   r2   | 0    r1'  r2'     for getting here: a reward and the cell that gave it stand in one row
    step      0    1    2    | 0    1    2
    episode   0    0    0    | 1    1    1       the position in the history, which the paper calls global
    target    a0   a1   none | a0'  a1'  none    the action to predict; -1 where there is none
    """

    cell: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    step: torch.Tensor
    episode: torch.Tensor
    target: torch.Tensor


ACTIONS = 5


def make_tasks(args):
    """Tasks for training and tasks that are held out, cells of the goal, or of key and door. [N, 1 or 2] each"""
    cells = np.delete(np.arange(args.room_size**2), args.room_size**2 // 2)  # hidden anywhere but in the centre
    tasks = cells[:, None]
    if args.env_id == "DarkKeyToDoor":
        tasks = np.array([(key, door) for key in cells for door in cells if key != door])
    tasks = np.random.default_rng([args.seed, 0]).permutation(tasks)
    return tasks[args.test_tasks :], tasks[: args.test_tasks]


def learning_histories(args, tasks, rng):
    """Whole lives of a learner, one for each task given, from random moves to the optimum. Rows of [N, episodes * (steps + 1)]

    Tabular Q-learning with a model: after each episode it goes through all transitions that it has seen, again and again
    (Dyna-Q, Sutton 1990), discount 0.8. Epsilon-greedy with ties broken at random.
    Returns: the rows, the source's returns [N, episodes], and the entropy floor: the mean of -log p(action) under the source's
    own probabilities, which no model's loss gets below, except by chance.
    """
    rooms, steps = Rooms(args, tasks), args.episode_length
    rows, (cells, actions, rewards) = rooms.rows, np.zeros((3, len(tasks), args.episodes, steps + 1), np.float32)
    targets, floor = np.full(cells.shape, -1), 0.0
    q = np.zeros(rooms.reward.shape, np.float32)
    seen = np.full(q.shape, float(args.source == "noise"), np.float32)  # the optimal agent knows everything from the start
    successor = rows[:, None, None] * q.shape[1] + rooms.successor  # in all tasks' states as one row
    actions[:, :, 0] = ACTIONS  # no action before the first
    for episode in range(args.episodes):
        for _ in range(steps if episode or args.source == "noise" else 0):
            q = seen * (rooms.reward + 0.8 * q.max(2).ravel()[successor])
        state = np.full(len(tasks), rooms.start)
        for step in range(steps):
            cells[:, episode, step] = state % rooms.cells
            epsilon = max(0.0, 1 - (episode * steps + step) / max(1e-9, args.exploration_fraction * args.episodes * steps))
            best = q[rows, state] == q[rows, state].max(1, keepdims=True)
            share = epsilon / ACTIONS + (1 - epsilon) * best / best.sum(1, keepdims=True)  # [N, A]
            action = (share.cumsum(1) < rng.random((len(tasks), 1))).sum(1).clip(max=ACTIONS - 1)
            floor -= np.log(share[rows, action]).mean() / (args.episodes * steps)
            seen[rows, state, action] = 1
            state, reward = rooms.step(state, action)
            targets[:, episode, step] = actions[:, episode, step + 1] = action
            rewards[:, episode, step + 1] = reward
        cells[:, episode, steps] = state % rooms.cells
    episode, step = np.indices(cells.shape[1:])
    columns = cells, actions, rewards, *(np.broadcast_to(v, cells.shape) for v in (step, episode)), targets
    kinds = torch.long, torch.long, torch.float32, torch.long, torch.long, torch.long
    columns = (torch.tensor(column.reshape(len(tasks), -1)).to(kind) for column, kind in zip(columns, kinds))
    return Rows(*columns), rewards.sum(2), floor


class Streams:
    """B streams that walk through histories, a window at a time; they start at different places, so that updates are alike.

    A stream that comes to the end of a history goes on at the first row of another, drawn at random with replacement.
    """

    def __init__(self, num_histories, num_windows, num_streams, rng):
        self.num_histories, self.num_windows = num_histories, num_windows
        self.history, self.window = rng.integers(num_histories, size=num_streams), np.arange(num_streams) % num_windows

    def next(self, length, rng):
        """Of each stream: history [B], rows in it [B, W], and whether a history begins there [B]."""
        history, rows, begins = self.history, self.window[:, None] * length + np.arange(length), self.window == 0
        self.window = (self.window + 1) % self.num_windows
        drawn = rng.integers(self.num_histories, size=len(history))
        self.history = np.where(self.window == 0, drawn, history)
        return history, rows, torch.from_numpy(begins)


def scale_gradient(x, scale):
    """x, whose gradient is multiplied by `scale` on its way back: 1 leaves it as it is, 0 stops it."""
    if scale == 0 or scale == 1:
        return x if scale else x.detach()
    return x.detach() + scale * (x - x.detach())


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

    def forward(self, obs, begins, recurrent_state):
        """TBB: B pieces of history, laid end to end on a tape. [B, T, H], [B, T], [B, P] -> [B, T, H], [B, P]

        Each goes on from its own state, which joins what its first row adds; there the tape begins anew.
        """
        x, lifted = self.lift(obs.flatten(0, 1))
        x = x.unflatten(0, obs.shape[:2])
        carried = self.decay().to(x.dtype) * torch.where(begins[:, :1], 0, recurrent_state)
        x = torch.cat([(x[:, 0] + carried)[:, None], x[:, 1:]], 1)
        first = torch.arange(obs.shape[1], device=obs.device) == 0
        states = self.scan(x.flatten(0, 1), (begins | first).flatten())
        return self.readout(states, lifted).view_as(obs), states.view_as(x)[:, -1]

    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments, each from its own state. [N, H], [N], [N, P] -> [N, H], [N, P]"""
        x, lifted = self.lift(obs)
        recurrent_state = torch.where(begins[:, None], 0, recurrent_state) * self.decay().to(x.dtype) + x
        return self.readout(recurrent_state, lifted), recurrent_state

    def initial_state(self, num_envs):
        return torch.zeros(num_envs, len(self.nu), dtype=torch.complex64, device=self.D.device)


class Block(nn.Module):
    """TBB: LRU, which has LayerNorm, gated linear unit and skip connection of its own."""

    def __init__(self, args):
        super().__init__()
        self.memory = LRU(args.hidden_size, args.state_size, args.r_min, args.r_max)

    def forward(self, x, begins, recurrent_state):
        """[B, T, H], [B, T], state -> [B, T, H], state"""
        return self.memory(x, begins, recurrent_state)

    def step(self, x, begins, recurrent_state):
        """[N, H], [N], state -> [N, H], state"""
        return self.memory.step(x, begins, recurrent_state)


class Tokens(nn.Module):
    """One token for each row: all that stands in it is embedded, added and mixed. Rows of [B, W] -> [B, W, H]"""

    def __init__(self, args):
        super().__init__()
        width, self.room_size = args.hidden_size, args.room_size
        self.place, self.reward = nn.Linear(2, width), nn.Linear(1, width, bias=False)
        sizes = ACTIONS + 1, args.episode_length + 1, args.episodes
        self.action, self.step, self.episode = (nn.Embedding(size, width) for size in sizes)
        for embedding in (self.action, self.step, self.episode):
            nn.init.normal_(embedding.weight, std=0.3)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, rows):
        # two numbers, not a vector for each cell: what is learned about some cells has to hold for those of unseen goals
        y, x = rows.cell // self.room_size, rows.cell % self.room_size
        place = torch.stack([y, x], -1) * (2 / (self.room_size - 1)) - 1
        token = self.place(place) + self.reward(rows.reward[..., None])
        token = token + self.action(rows.action) + self.step(rows.step) + self.episode(rows.episode)
        return self.norm(token + self.mlp(token))


# ALGO LOGIC: initialize agent here:
class Agent(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.tokens, self.args = Tokens(args), args
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.num_layers))
        self.norm = nn.LayerNorm(args.hidden_size)
        self.head = nn.Linear(args.hidden_size, ACTIONS)
        nn.init.zeros_(self.head.weight)

    def initial_memory(self, num_streams):
        """A recurrent state for each layer, which is all there is, in training as in acting."""
        return [block.memory.initial_state(num_streams) for block in self.blocks]

    initial_state = initial_memory

    def forward(self, rows, begins, memory):
        """Logits of a window's rows, and the memory after it. Rows of [B, W]; [B]; memory -> [B, W, A], memory

        No gradient reaches further back than the window; inside, it is scaled at each boundary of two chunks.
        """
        # TBB: rows at which memory begins anew although a history goes on: none, but for the control
        tokens, resets = self.tokens(rows), (rows.step == 0) & (self.args.reset_on == "episode")
        resets = torch.cat([resets[:, :1] | begins[:, None], resets[:, 1:]], 1)
        states, outputs, length = [state.detach() for state in memory], [], self.args.chunk_length or tokens.shape[1]
        for x, chunk_resets in zip(tokens.split(length, dim=1), resets.split(length, dim=1)):
            for i, block in enumerate(self.blocks):
                x, states[i] = block(x, chunk_resets, scale_gradient(states[i], self.args.mem_grad_scale))
            outputs.append(x)
        return self.head(self.norm(torch.cat(outputs, 1))), states

    @torch.no_grad()
    def step(self, rows, state):
        """Logits of one row of each run: as `forward`, a row at a time. Rows of [N]; state -> [N, A], state"""
        x, resets, after = self.tokens(rows), (rows.step == 0) & (self.args.reset_on == "episode"), []
        for block, before in zip(self.blocks, state):
            x, recurrent_state = block.step(x, resets, before)
            after.append(recurrent_state)
        return self.head(self.norm(x)), after


def play(agent, rooms, state, episodes, temperature, generator, still=False):
    """Plays some episodes of all tasks, weights frozen, the memory carried on from one to the next.

    Args:
        episodes: their numbers in the history, a range.
        temperature: of each task's softmax [N]; 0 takes the likeliest action.
        still: nobody acts, and nothing is found: the memory sees episodes that say nothing.
    Returns: returns [N, episodes], state.
    """
    device, num_tasks = agent.head.weight.device, len(rooms.tasks)
    returns = np.zeros((num_tasks, len(episodes)))
    for i, episode in enumerate(episodes):
        room, action, reward = np.full(num_tasks, rooms.start), np.full(num_tasks, ACTIONS), np.zeros(num_tasks)
        for step in range(rooms.length + 1):
            columns = (room % rooms.cells, action, reward, np.full(num_tasks, step), np.full(num_tasks, episode), action)
            rows = Rows(*(torch.as_tensor(v).to(device) for v in columns))
            logits, state = agent.step(rows._replace(reward=rows.reward.float()), state)
            if step < rooms.length:  # the final observation is for the memory alone
                share = torch.softmax(logits.cpu() / temperature[:, None].clamp(min=1e-4), dim=1)
                action = torch.multinomial(share, 1, generator=generator)[:, 0].numpy() * (not still)
                room, reward = rooms.step(room, action)
                returns[:, i] += reward
    return returns, state


def in_context_learning(returns, optimal, chance):
    """(mean of the last 10 % of episodes - mean of the first two) / (optimum - chance). [N, episodes], [N], [N] -> number"""
    last = max(1, round(returns.shape[1] / 10))
    return (returns[:, -last:].mean() - returns[:, :2].mean()) / (optimal.mean() - chance.mean())


def evaluate(agent, args):
    """{temperature: returns over in-context episodes} of the tasks held out, and as many tasks of training beside them."""
    train, test = make_tasks(args)
    tasks, runs = np.concatenate([test, train[: len(test)]]), args.eval_runs
    rooms = Rooms(args, np.tile(np.repeat(tasks, runs, 0), (len(args.eval_temperatures), 1)))
    temperature = torch.tensor(args.eval_temperatures).repeat_interleave(len(tasks) * runs)
    generator = torch.Generator().manual_seed(args.seed + 10**6)
    state = agent.initial_state(len(temperature))
    returns, _ = play(agent, rooms, state, range(args.episodes), temperature, generator)
    returns = returns.reshape(len(args.eval_temperatures), len(tasks), runs, -1)
    best, chance = (Rooms(args, tasks).expected_returns(choose) for choose in (np.max, np.mean))
    last, curves = max(1, round(args.episodes / 10)), {}
    for number, task in enumerate(tasks[: len(test)]):
        where = ", then ".join(f"({cell // args.room_size}, {cell % args.room_size})" for cell in task)
        shares = (f"{found.mean() / best[number]:.2f}" for found in returns[:, number, :, -last:])
        print(f"held-out task {where}: the last {last} episodes reach {', '.join(shares)} of the optimum {best[number]:.0f}")
    for temp, found in zip(args.eval_temperatures, returns):
        halves = [slice(0, len(test)), slice(len(test), None)]
        icl = [in_context_learning(found[h].reshape(-1, args.episodes), best[h], chance[h]) for h in halves]
        curves[temp] = found[halves[0]].mean((0, 1))
        change = f"{curves[temp][:2].mean():.2f} -> {curves[temp][-last:].mean():.2f}"
        print(f"temperature {temp:g}: return {change}; in-context learning {icl[0]:.3f}, on training tasks {icl[1]:.3f}")
    best, chance = best[: len(test)].mean(), chance[: len(test)].mean()
    print(f"return of the optimum {best:.2f}, of random moves {chance:.2f}; shares at temperatures {args.eval_temperatures}")
    temp = args.eval_temperatures[min(1, len(args.eval_temperatures) - 1)]
    what = f"the last {last} of {args.episodes} episodes of {len(test)} held-out tasks of {args.env_id}, temperature {temp:g}"
    print(f"evaluation: episodic_return={curves[temp][-last:].mean():.4f}, the mean of {what}")
    return curves


def check_memory(args):
    """The length of a window, after errors about flags that do not go together."""
    history = args.episodes * (args.episode_length + 1)
    window = (args.chunk_length or history) * args.bptt_chunks
    if window > history or history % window:
        what = f"--chunk-length {args.chunk_length} times --bptt-chunks {args.bptt_chunks}"
        raise ValueError(f"{what}: expected a divisor of a history's {history} rows, got {window}; change one of them")
    return window


if __name__ == "__main__":
    args, script = tyro.cli(Args, description=__doc__), os.path.basename(__file__)
    run_dir, saved = args.resume or args.evaluate, None
    if run_dir:
        saved = load(os.path.join(run_dir, "checkpoint.pt" if args.resume else "model.pt"), script, args)
        args = tyro.cli(Args, default=Args(**saved["args"]))  # the run's own flags, unless given again
    most = dict.fromkeys("final_rate label_smoothing mem_grad_scale".split(), 1) | {"room_size": 99}
    zero = "warmup_updates chunk_length context_length".split() + ["eval_runs"] * (not args.evaluate)
    check_flags(args, zero, most, saved["args"] if args.resume else {})
    if args.room_size % 2 == 0 or args.room_size < 3:
        raise ValueError(f"--room-size {args.room_size}: expected an odd number from 3; a room has a centre; raise it by one")
    if not args.eval_temperatures or not all(0 <= t <= 100 for t in args.eval_temperatures):
        raise ValueError(f"--eval-temperatures {args.eval_temperatures}: expected numbers from 0 to 100; give 1 0.5")
    num_tasks = sum(map(len, make_tasks(args)))
    if 2 * args.test_tasks > num_tasks:
        raise ValueError(f"--test-tasks {args.test_tasks}: expected at most half of the room's {num_tasks} tasks; lower it")
    window = check_memory(args)
    if args.batch_rows < window:
        raise ValueError(f"--batch-rows {args.batch_rows}: expected at least one window, {window} rows; raise it")
    kept = (
        "env_id room_size episode_length episodes test_tasks histories_per_task source exploration_fraction batch_rows".split()
    )
    kept += (
        "hidden_size num_layers cache chunk_length mem_len bptt_chunks context_length key_size value_size state_size".split()
    )
    for name in kept * bool(saved):
        value = saved["args"].get(name)
        if value != getattr(args, name, None) and not (args.evaluate and name in kept[5:9]):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: this run keeps {value}, got {getattr(args, name)}; leave it out, or start a new run")
    # no tune_cpu() here: its setting for matrix products makes attention on a CPU several times slower
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))
    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    agent = Agent(args).to(device)
    if args.evaluate:
        agent.load_state_dict(saved["agent"])
        evaluate(agent, args)
        sys.exit()
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    if args.track:
        import wandb

        run = {"name": run_name, "id": run_name, "resume": "allow", "config": vars(args)}
        wandb.init(project=args.wandb_project_name, sync_tensorboard=True, save_code=True, **run)
    writer = SummaryWriter(run_dir, purge_step=saved["state"]["update"] if saved else None)
    writer.add_text("hyperparameters", "\n".join(["|param|value|\n|-|-|", *(f"|{k}|{v}|" for k, v in vars(args).items())]))
    source = Path(__file__).read_text("utf-8")  # the text that made this run stays in its folder
    writer.add_text("source", f"```python\n{source}```")
    if not saved:
        Path(run_dir, script).write_text(source, "utf-8")
    stop = catch_stop_signals()  # empty until Ctrl-C or SIGTERM asks for an end
    tasks = np.repeat(make_tasks(args)[0], args.histories_per_task, 0)
    histories, source_returns, floor = learning_histories(args, tasks, np.random.default_rng([args.seed, 1]))
    histories = Rows(*(column.to(device) for column in histories))
    optimum = Rooms(args, tasks).expected_returns(np.max).mean()
    update, streams = 0, Streams(len(tasks), histories.cell.shape[1] // window, args.batch_rows // window, rng)
    memory = agent.initial_memory(args.batch_rows // window)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0, fused=True)
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the agent's weights
    state = "agent optimizer rng streams memory update".split()
    if saved:
        globals().update(saved["state"])
        agent.args = args
    size = f"{args.batch_rows:,} rows, {sum(p.numel() for p in agent.parameters()):,} weights"
    print(f"{args.exp_name}: {args.env_id}, {args.total_updates:,} updates of {size}, {device}")
    last = source_returns[:, -max(1, round(args.episodes / 10)) :].mean()
    print(f"source: return {last:.2f} at the end, optimum {optimum:.2f}; its entropy, the floor of the loss: {floor:.4f}")
    print(f"{len(tasks):,} histories of {args.episodes} episodes, {args.test_tasks} tasks held out; {run_dir}")
    start_time, start_cpu, start_update = time.time(), time.process_time(), update
    bar = tqdm(total=args.total_updates, initial=update, unit="update", mininterval=0.2 if sys.stderr.isatty() else 5)
    while update < args.total_updates:
        if stop or args.checkpoint_interval and update % args.checkpoint_interval == 0:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            save(f"{run_dir}/checkpoint.pt", content)
            if stop:
                print(f"stopped; --resume {run_dir} goes on from update {update:,}")
                sys.exit(128 + stop[0])
        # ALGO LOGIC: training
        history, place, begins = streams.next(window, rng)
        rows = Rows(*(column[history[:, None], place] for column in histories))
        logits, memory = agent(rows, begins.to(device), memory)
        target = rows.target.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), target, ignore_index=-1, label_smoothing=args.label_smoothing)
        progress = max(0.0, update - args.warmup_updates) / max(1, args.total_updates - args.warmup_updates)
        cosine = args.final_rate + (1 - args.final_rate) * (1 + np.cos(np.pi * progress)) / 2
        warmup = min(1.0, (update + 1) / max(1, args.warmup_updates))
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * cosine
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
        if not torch.isfinite(loss + grad_norm):
            remedy = f"--resume {run_dir} with a smaller --learning-rate"
            raise FloatingPointError(f"update {update}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}")
        optimizer.step()
        # every update: spikes of the gradient are rare
        writer.add_scalar("losses/cross_entropy", loss, update)
        writer.add_scalar("losses/above_floor", loss - floor, update)
        writer.add_scalar("losses/grad_norm", grad_norm, update)
        if update % 50 == 0:
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], update)
            writer.add_scalar("charts/SPS", int((update + 1 - start_update) / (time.time() - start_time)), update)
            bar.set_postfix(loss=loss.item(), above_floor=loss.item() - floor, refresh=False)
        update += 1
        bar.update()
    bar.close()
    catch_stop_signals(on=False)
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "agent": agent.state_dict()})
    seconds = f"{time.time() - start_time:.1f} seconds, {time.process_time() - start_cpu:.2f} of CPU"
    print(f"trained for {update:,} updates, {seconds}: {run_dir}/model.pt")
    for temp, curve in evaluate(agent, args).items() if args.eval_runs else ():
        for episode, episodic_return in enumerate(curve):  # over in-context episodes; --resume takes it back
            writer.add_scalar(f"eval/episodic_return_temperature_{temp:g}", episodic_return, update + episode)
    writer.close()
