# docs: docs/sbb.md
# Variant of single_files/dqn_tbb_lru.py. Changed: Args, SegmentBuffer (was TapeBuffer), tape_buffer in __main__
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
# Burn-in: Kapturowski et al. (2019), "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2)
"""Double dueling DQN with Linear Recurrent Units (LRU), trained on zero-padded segments: the baseline of the tape.

    python single_files/dqn_sbb_lru.py                               # a memory task, on a CPU
    python single_files/dqn_sbb_lru.py --env-id CartPole-v1          # any vector observation with discrete actions
    python single_files/dqn_sbb_lru.py --resume runs/RUN             # continue a killed run exactly
    python single_files/dqn_sbb_lru.py --evaluate runs/RUN           # greedy episodes with the trained model

Copy this file into your project and edit it: the import from cleanrl_memoroid is optional and only makes it faster.
Shapes: T rows of a tape, B transitions on it, N environments, O observation, A actions, H width, P complex numbers of a layer;
time comes first. Does not include: n-step returns, prioritised replay, continuous actions, images, frame stacking.
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
from typing import NamedTuple

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
    checkpoint_interval: int = 10_000  # environment steps between checkpoints, for --resume; 0: at Ctrl-C only (steps)
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory whose trained model plays greedy episodes; then exit

    # Algorithm specific arguments
    env_id: str = "popgym-RepeatFirstEasy-v0"  # any environment with vector observations and discrete actions
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # for its constructor: k 10 num_decks 2
    prev_action: bool = True  # if toggled, POPGym observations include the previous action
    total_timesteps: int = 90_000  # total timesteps of the experiment, over all environments (steps)
    learning_rate: float = 1e-3  # the learning rate of the optimizer at the start
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to zero
    num_envs: int = 16  # the number of parallel environments
    buffer_size: int = 100_000  # the capacity of the tape buffer; an episode of L transitions takes L + 1 rows (rows)
    gamma: float = 0.99  # the discount factor gamma
    tau: float = 0.01  # the target network moves this share of the way to the Q network at each update
    batch_size: int = 500  # a tape is filled with whole episodes until it holds this many transitions (transitions)
    start_e: float = 1.0  # the starting epsilon for exploration
    end_e: float = 0.05  # the ending epsilon for exploration
    exploration_fraction: float = 0.25  # the fraction of `total_timesteps` from start_e to end_e, once learning has started
    learning_starts: int = 5_000  # timestep to start learning; until then actions are random (steps)
    train_frequency: int = 32  # environment steps per update (steps)
    max_grad_norm: float = 1.0  # the maximum norm of the gradient
    truncation_is_terminal: bool = False  # if toggled, a time limit ends the return as termination does (POPGym's reading)

    # Memory specific arguments
    hidden_size: int = 128  # width H of every layer (units)
    state_size: int = 64  # complex numbers P in the memory of each layer (channels)
    num_layers: int = 2  # layers of the memory, one above the other
    r_min: float = 0.9  # the sizes of lambda begin between this and r_max: close to one, memory lasts long
    r_max: float = 0.999  # see r_min
    segment_length: int = 50  # transitions per segment; as many are drawn as fill `batch_size`, padding included (transitions)
    burn_in: int = 0  # rows before a segment that only warm its memory, as in R2D2; on top of `batch_size` (transitions)


def make_env(env_id, env_kwargs, prev_action=True, idx=0, video_folder=None):
    def thunk():
        if env_id.startswith("popgym-"):
            from popgym.wrappers import Antialias, DiscreteAction, Flatten, PreviousAction

            # POPGym's wrappers take bare POPGym environments only, without the wrappers of gym.make
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs).unwrapped
            env = PreviousAction(env) if prev_action else env
            env = Flatten(Antialias(env))  # adds the flag "this is the first step", then concatenates everything one-hot
            env = DiscreteAction(env) if isinstance(env.action_space, gym.spaces.MultiDiscrete) else env
        else:
            env = gym.make(env_id, **(env_kwargs | ({"render_mode": "rgb_array"} if video_folder else {})))
            env = env if isinstance(env.observation_space, gym.spaces.Box) else gym.wrappers.FlattenObservation(env)
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


class StackedLRU(nn.Module):
    """Layers one above the other: each reads the Markov states of the one below, and keeps a memory of its own."""

    def __init__(self, width, num_layers, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(LRU(width, *sizes) for _ in range(num_layers))

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


class SegmentBuffer:
    """SBB: whole episodes up to `buffer_size` rows, handed out as segments of `segment_length` transitions.

    row            0    1    2    | 3    4    5    | 6    7    8    |     an episode of five steps in segments of two:
    obs            o0   o1   o2   | o2   o3   o4   | o4   o5   0    |     each ends in a row for the successor of its last
    begins         1    0    0    | 1    0    0    | 1    0    0    |     step, zeros pad the episode's last one, and memory
    in the loss    yes  yes  -    | yes  yes  -    | yes  -    -    |     starts from nothing at the first row of every one

    With `burn_in`, up to that many earlier rows stand before a segment and warm its memory, outside the loss (R2D2).
    """

    def __init__(self, buffer_size, segment_length, burn_in):
        if segment_length < 1:
            raise ValueError(f"--segment-length: expected at least 1, got {segment_length}; raise it")
        if burn_in < 0:
            raise ValueError(f"--burn-in: expected at least 0, got {burn_in}; raise it")
        self.buffer_size, self.segment_length, self.burn_in = buffer_size, segment_length, burn_in
        self.rows, self.episodes, self.segments = 0, [], []  # oldest first; a segment: (its episode, its first row there)

    def add(self, obs, actions, rewards, terminated):
        """Adds an episode: obs [L+1, O] with the final one, actions [L], rewards [L]; `terminated` tells how it ended."""
        steps = len(actions)
        if steps + 1 > self.buffer_size:
            raise ValueError(f"--buffer-size {self.buffer_size}: an episode of {steps} steps takes {steps + 1} rows; raise it")
        row, rewards = np.arange(steps + 1), np.append(rewards, 0).astype(np.float32)
        obs, actions = np.asarray(obs, np.float32), np.append(actions, 0)
        self.episodes.append(Tape(obs, row == 0, actions, rewards, (row == steps - 1) & terminated, row == steps))
        self.segments += [(self.episodes[-1], first) for first in range(0, steps, self.segment_length)]
        self.rows += steps + 1
        while self.rows > self.buffer_size:
            oldest = len(self.episodes.pop(0).obs)
            self.rows -= oldest
            del self.segments[: len(range(0, oldest - 1, self.segment_length))]

    def sample(self, batch_size, rng, device="cpu"):
        """batch_size / segment_length segments, uniform over all segments with replacement: as many rows as on a tape."""
        drawn, rows = [], np.arange(self.burn_in + self.segment_length + 1)
        for i in rng.integers(len(self.segments), size=max(1, round(batch_size / self.segment_length))):
            episode, first = self.segments[i]
            row = rows + max(first - self.burn_in, 0)  # of the episode, for each row of the segment
            last = min(first + self.segment_length, len(episode.obs) - 1)  # the successor of the segment's last step
            segment = Tape(*(column[np.minimum(row, last)] for column in episode))
            segment.obs[row > last] = 0
            drawn.append(segment._replace(begins=rows == 0, final=(row < first) | (row >= last)))
        return Tape(*(torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*drawn)))


# ALGO LOGIC: initialize agent here:
class QNetwork(nn.Module):
    def __init__(self, env, args):
        super().__init__()
        obs_space, space = env.single_observation_space, env.single_action_space
        if not isinstance(space, gym.spaces.Discrete):
            raise ValueError(f"--env-id: expected Discrete actions, got {space}; use a PPO script, or an ActionWrapper")
        if len(obs_space.shape or ()) != 1:
            raise ValueError(f"--env-id: expected vector observations, got {obs_space}; flatten them, or edit this encoder")
        self.encoder = self.block(obs_space.shape[0], args.hidden_size)
        self.memory = StackedLRU(args.hidden_size, args.num_layers, args.state_size, args.r_min, args.r_max)
        self.network = nn.Sequential(*(self.block(args.hidden_size, args.hidden_size) for _ in range(2)))
        self.head = nn.Linear(args.hidden_size, 1 + space.n)  # the value, and each action's advantage
        nn.init.uniform_(self.head.weight, -((0.01 / args.hidden_size) ** 0.5), (0.01 / args.hidden_size) ** 0.5)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def block(inputs, outputs):
        norm = nn.LayerNorm(outputs).requires_grad_(False)  # without parameters, as in the paper
        return nn.Sequential(nn.Linear(inputs, outputs), norm, nn.LeakyReLU(inplace=True))

    def q_values(self, markov_state):
        value, advantage = self.head(self.network(markov_state)).split((1, self.head.out_features - 1), dim=-1)
        return value + advantage - advantage.mean(-1, keepdim=True)

    def forward(self, obs, begins):
        """TBB: Q values along a tape. [T, O], [T] -> [T, A]"""
        return self.q_values(self.memory(self.encoder(obs), begins))

    @torch.no_grad()
    def step(self, obs, begins, recurrent_state):
        """TBB: Q values of one step of N environments. NumPy [N, O], [N]; state -> [N, A], state"""
        obs, begins = (torch.as_tensor(v).to(recurrent_state.device) for v in (np.asarray(obs, np.float32), begins))
        markov_state, recurrent_state = self.memory.step(self.encoder(obs), begins, recurrent_state)
        return self.q_values(markov_state), recurrent_state


def td_target(q, next_q, tape, gamma):
    """r[t] + gamma (1 - termination[t]) Q_target(s[t+1], argmax_a Q(s[t+1], a)) for every transition of the tape. [B]

    TBB: the successor of transition t is row t + 1, whose memory has seen the same episode from its first observation on.
    Double DQN, van Hasselt et al. (2016): q [T, A] of the online network chooses, next_q [T, A] of the target network rates.
    """
    rows = (~tape.final).nonzero().squeeze(1)
    bootstrap = next_q[rows + 1].gather(1, q[rows + 1].argmax(dim=1, keepdim=True)).squeeze(1)
    return tape.rewards[rows] + gamma * torch.where(tape.terminations[rows], 0, bootstrap)


def evaluate(q_network, env_fns, args):
    """The returns of greedy episodes, one in each environment, so that short ones do not count more often. [E]"""
    envs, seed = gym.vector.SyncVectorEnv(env_fns), args.seed + 10**6
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):  # environments may draw from each
        seed_one(seed)
    (obs, _), recurrent_state = envs.reset(seed=seed), q_network.memory.initial_state(len(env_fns))
    steps, returns, begins, running = 0, np.zeros(len(env_fns)), *np.ones((2, len(env_fns)), bool)
    while running.any() and steps < args.eval_max_steps:
        q_values, recurrent_state = q_network.step(obs, begins, recurrent_state)
        actions = q_values.argmax(dim=1).cpu().numpy() + envs.single_action_space.start
        obs, rewards, terminations, truncations, _ = envs.step(actions)
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
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))  # more are slower, unless networks are large and cores idle
    tune_cpu()
    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    # env setup
    make = [args.env_id, args.env_kwargs, args.prev_action]
    # TBB: in the step that ends an episode, next_obs is already the first one of the next episode; infos has the final one
    with env_errors(args.env_id):  # they name the flags
        envs = gym.vector.SyncVectorEnv([make_env(*make, i) for i in range(args.num_envs)], autoreset_mode="SameStep")
        if args.capture_video:  # if it cannot be recorded, say so before training
            make_env(*make, 0, "videos")().close()
    q_network, target_network = QNetwork(envs, args).to(device), QNetwork(envs, args).to(device)
    target_network.load_state_dict(q_network.state_dict())
    if saved:
        saved = torch.load(path, map_location=device, weights_only=not args.resume) if args.cuda else saved
        weights = saved["q_network"] if args.evaluate else saved["state"]["q_network"].state_dict()
        if [v.shape for v in weights.values()] != [v.shape for v in q_network.state_dict().values()]:
            raise ValueError(f"--env-id {args.env_id}, or sizes of layers: not those of the network in {path}; leave them out")
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-"))
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    video = f"videos/{run_name}" if args.capture_video else None
    eval_fns = [make_env(*make, i, video if i == 0 else None) for i in range(args.eval_episodes)]
    if args.evaluate:
        q_network.load_state_dict(weights)
        evaluate(q_network, eval_fns, args)
        sys.exit()
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    tape_buffer = SegmentBuffer(args.buffer_size, args.segment_length, args.burn_in)
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
    global_step = update = 0
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the network's weights
    state = "q_network target_network optimizer tape_buffer rng global_step update obs begins recurrent_state running".split()
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
        obs, _ = envs.reset(seed=int(rng.integers(2**31)) if saved else args.seed)
        begins = np.ones(args.num_envs, bool)  # is obs[i] the first of its episode?
        recurrent_state = q_network.memory.initial_state(args.num_envs)
        running = [[] for _ in range(args.num_envs)]  # TBB: (obs, action, reward) of each step of the running episodes
    start_time, start_step, recent_returns = time.time(), global_step, deque(maxlen=20)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    size = f"{4e-9 * obs[0].size * min(args.buffer_size, 2 * args.total_timesteps):.2f} GB of observations at most"
    print(f"{args.learning_starts:,} random steps, then an update every {args.train_frequency}; {size}; {run_dir}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=0.2 if sys.stderr.isatty() else 5)
    while global_step < args.total_timesteps:
        due = stop or args.checkpoint_interval and global_step % args.checkpoint_interval < args.num_envs
        if due:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            finish = checkpoint(f"{run_dir}/checkpoint.pt", content, envs, stop)
        # ALGO LOGIC: put action logic here
        exploration = args.learning_starts, args.learning_starts + args.exploration_fraction * args.total_timesteps
        epsilon = np.interp(global_step, exploration, (args.start_e, args.end_e), left=1.0)
        q_values, recurrent_state = q_network.step(obs, begins, recurrent_state)
        random_actions = rng.integers(envs.single_action_space.n, size=args.num_envs)
        actions = np.where(rng.random(args.num_envs) < epsilon, random_actions, q_values.argmax(dim=1).cpu().numpy())
        # TRY NOT TO MODIFY: execute the game and log data.
        taken = actions + envs.single_action_space.start
        outcome = next_obs, rewards, terminations, truncations, infos = envs.step(taken)
        if due:
            finish(taken, outcome)  # this step shows whether a copy of the environments does the same
        global_step += args.num_envs
        begins = terminations | truncations
        # TBB: save data to the tape buffer, one whole episode at a time, with its final observation
        for i, row in enumerate(zip(obs, actions, rewards)):
            running[i].append(row)
            if begins[i]:
                episode_obs, *actions_and_rewards = zip(*running[i])
                terminated = terminations[i] or args.truncation_is_terminal
                tape_buffer.add([*episode_obs, infos["final_obs"][i]], *actions_and_rewards, terminated)
                running[i] = []
                recent_returns.append(infos["final_info"]["episode"]["r"][i])
                writer.add_scalar("charts/episodic_return", recent_returns[-1], global_step)
                writer.add_scalar("charts/episodic_length", infos["final_info"]["episode"]["l"][i], global_step)
        obs = next_obs  # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        if max(map(len, running)) >= args.buffer_size:
            raise ValueError(f"--buffer-size {args.buffer_size}: an episode has not ended after so many steps; raise it")
        if not tape_buffer.episodes and 0 < global_step - args.learning_starts <= args.num_envs:
            print("warning: no episode has ended, and before one does nothing is learned; --env-kwargs max_episode_steps 200?")
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
        raise ValueError(f"--total-timesteps {args.total_timesteps}: no episode had ended when an update was due; raise it")
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "q_network": q_network.state_dict()})
    print(f"trained for {global_step:,} steps, {update:,} updates, {time.time() - start_time:.1f} seconds: {run_dir}/model.pt")
    for idx, episodic_return in enumerate(evaluate(q_network, eval_fns, args) if args.eval_episodes else ()):
        writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume deletes it
    envs.close()
    writer.close()
