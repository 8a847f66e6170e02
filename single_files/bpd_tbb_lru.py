# docs: docs/bpd.md
# Variant of single_files/bpd_tbb_lru_continuous_action.py. Changed: Args.data_noise, Args.label,
#   Args.temperature, load_teacher, Teacher, execute, env_actions, Student.forward, Student.step, clone_loss,
#   teacher in __main__
# Distillation: after "Bayesian Policy Distillation via Offline RL for Lightweight and Fast Inference" (submitted to ICLR 2025,
#   withdrawn; no code), of which the abstract is known. A reconstruction: sizes, schedules, data and memory are ours.
# Sparsity: Molchanov et al. (2017), "Variational Dropout Sparsifies Deep Neural Networks", https://arxiv.org/abs/1701.05369
# Memory and tape: Morad et al. (2024), "Recurrent Reinforcement Learning with Memoroids", https://arxiv.org/abs/2402.09900
# LRU: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", https://arxiv.org/abs/2303.06349
# Cloning: Rusu et al. (2016), "Policy Distillation", https://arxiv.org/abs/1511.06295
"""A small sparse student of a trained policy with memory that chooses among finite actions: as for continuous ones.

    python single_files/dqn_tbb_lru.py                      # the teacher: a minute on a CPU
    python single_files/bpd_tbb_lru.py --teacher runs/RUN   # its student; any dqn_tbb_* or ppo_tbb_* run can be the teacher
    python single_files/bpd_tbb_lru.py --resume runs/RUN    # continue a killed run exactly
    python single_files/bpd_tbb_lru.py --evaluate runs/RUN  # greedy episodes with the student
    python -m cleanrl_memoroid.export runs/RUN --to c       # one step of it as a C header

Shapes: T rows of a tape; O observation, A actions to choose from, H width, P complex numbers of the memory; time comes first.
Does not include: images, several choices at once, several layers.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14","gymnasium>=1.1","popgym>=1.0.7","tyro>=0.9","numpy","tensorboard","tqdm"]
# ///
import contextlib
import copy
import itertools
import json
import os
import random
import runpy
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    from cleanrl_memoroid.runs import Checked, catch_stop_signals, check_flags, env_errors, load, new_run_dir, save
    from cleanrl_memoroid.scan import linear_scan, tune_cpu
    from cleanrl_memoroid.students import check_cuts, check_spaces, compact, costs, latency, read_teacher, sweep
except ImportError:  # without the package: the same results, more slowly, and no checks of flags, files, environments
    linear_scan, tune_cpu, catch_stop_signals, check_flags = None, lambda: None, lambda on=True: [], lambda *_: None
    Checked, load = lambda env, idx: env, lambda path, *_: torch.load(path, "cpu", weights_only="model.pt" in path)
    env_errors, new_run_dir, check_cuts = contextlib.nullcontext, "runs/{}".format, lambda *_: None
    check_spaces = check_cuts
    compact, costs, latency = lambda weights: weights, lambda weights: {}, lambda *_: None  # the student stays as it is
    sweep, read_teacher = lambda *_: [], lambda args, *_: torch.load(f"{args.teacher}/model.pt", "cpu", weights_only=True)

    def save(path, content):  # writes the whole file or nothing, even if the process is killed meanwhile
        torch.save(content, f"{path}.partial")
        os.replace(f"{path}.partial", path)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment; on a CPU, equal seeds give equal runs
    cuda: bool = False  # if toggled, train on the CUDA device (networks this small are as fast on a CPU)
    track: bool = False  # if toggled, also log to Weights and Biases (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "cleanrl-memoroid"  # the project name in Weights and Biases (the team: WANDB_ENTITY)
    eval_episodes: int = 200  # number of greedy episodes of teacher and student, with the same starts (episodes)
    eval_max_steps: int = 10_000  # an episode ends here, in the data and in evaluation (steps)
    checkpoint_interval: int = 1_000  # updates between checkpoints, for --resume; 0: at Ctrl-C and before pruning only
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory: play greedy episodes with its student, and exit

    # Algorithm specific arguments
    teacher: str | None = None  # run directory of the teacher; without it, the newest run of its script in runs/
    teacher_script: str | None = None  # path of the script that trained it; without it, the one beside this file
    data_episodes: int = 256  # whole episodes that the teacher plays, all that the student learns from (episodes)
    heldout_episodes: int = 16  # further ones, on which the student's error is measured (episodes)
    data_noise: float = 0.6  # standard deviation of the noise on the teacher's probabilities; the largest sum is done
    noise_memory: float = 0.8  # correlation of that noise with the one before: errors that last show how to recover
    label: Literal["mean", "executed"] = "mean"  # what cloning imitates: the teacher's probabilities, or what was done
    temperature: float = 0.01  # of the softmax over the teacher's scores, be they logits or values: small is sharp
    student: Literal["svd", "dense", "magnitude", "l1"] = "svd"  # sparse variational dropout; or what to compare it with
    updates: int = 4_000  # the number of updates before pruning (updates)
    fine_tune_updates: int = 1_000  # the number of updates after pruning, without noise (updates)
    batch_episodes: int = 4  # TBB: whole episodes on the tape of an update (episodes)
    learning_rate: float = 3e-3  # of weights, biases and memory; falls to a tenth over the second half
    sigma_learning_rate: float = 3e-2  # of log sigma^2, which has ten units to travel
    max_grad_norm: float = 1.0  # the maximum norm of the gradient, without that of log sigma^2
    eta_max: float = 1.0  # largest weight of the KL divergence, as a multiple of what Bayes' rule says
    eta_schedule: Literal["linear", "exp", "constant"] = "linear"  # how that weight grows
    eta_start: float = 0.15  # share of the updates at which it begins to grow; pruning by magnitude likewise
    eta_end: float = 0.5  # share of the updates at which it is reached; pruning by magnitude likewise
    l1_coef: float = 1e-4  # weight of the sum of absolute weights for --student l1; grows as eta does
    c_threshold: tuple[float, ...] = ()  # svd: weights whose log alpha is larger are dropped; without this and the next: 0
    target_sparsity: tuple[float, ...] = ()  # share of weights to drop; several of either: one student each, the last is saved

    # Memory specific arguments
    hidden_size: int = 64  # width H of the student (units)
    state_size: int = 32  # complex numbers P in its memory (channels)
    r_min: float = 0.0  # the sizes of lambda begin between this and r_max: close to one, memory lasts long
    r_max: float = 0.99  # see r_min

    # computed at run time, from the teacher
    env_id: str | None = None  # the teacher's environment, or another with the same observations and actions
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # of its constructor
    prev_action: bool = True  # as the teacher's


def make_env(env_id, env_kwargs, prev_action=True, idx=0):
    def thunk():
        if env_id.startswith("popgym-"):
            from popgym.wrappers import Antialias, Flatten, PreviousAction

            # POPGym's wrappers take bare POPGym environments only, without the wrappers of gym.make
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs).unwrapped
            env = PreviousAction(env) if prev_action else env
            env = Flatten(Antialias(env))  # adds the flag "this is the first step", then concatenates everything
        else:
            env = gym.make(env_id, **env_kwargs)
            env = env if isinstance(env.observation_space, gym.spaces.Box) else gym.wrappers.FlattenObservation(env)
        space = env.action_space
        if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
            # a Gaussian has no bounds: those of the environment become two of its first standard deviations, if they are any
            bounded = (space.low > -1e6) & (space.high < 1e6) & (space.low < space.high)
            bounds = (np.where(bounded, two, bound) for two, bound in ((-2, space.low), (2, space.high)))
            env = gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, *bounds))
        return Checked(env, idx)  # copies observations, checks that all numbers are finite, drops infos

    return thunk


def load_teacher(args):
    """The classes of the script that trained the teacher, by name, its flags, and its model.pt as saved."""
    folder = os.path.dirname(os.path.abspath(__file__))
    saved = read_teacher(args, "dqn_tbb_lru", folder)
    script = args.teacher_script or os.path.join(folder, saved["script"])
    classes = runpy.run_path(script, run_name="teacher_script")
    known = {name: value for name, value in saved["args"].items() if name in classes["Args"].__dataclass_fields__}
    return classes, classes["Args"](**known), saved


class Teacher:
    """A trained policy, step by step: the probabilities of its actions, sharp. [N, O], [N], state -> [N, A], state"""

    def __init__(self, classes, args, saved, envs, device, temperature):
        space, self.temperature = envs.envs[0].action_space, temperature
        if not isinstance(space, gym.spaces.Discrete):
            raise ValueError(f"--teacher: expected one finite choice, got {space}; use bpd_tbb_lru_continuous_action.py")
        kind, name = ("Agent", "agent") if "agent" in saved else ("QNetwork", "q_network")
        self.agent = classes[kind](envs, args)
        self.agent.load_state_dict(saved[name])
        self.initial_state = self.agent.to(device).memory.initial_state
        self.numbers = sum(v.numel() for name, v in self.agent.named_parameters() if not name.startswith("critic"))

    def step(self, obs, begins, recurrent_state):
        scores, *_, recurrent_state = self.agent.step(obs, begins, recurrent_state)
        return torch.softmax(scores.flatten(1) / self.temperature, -1), recurrent_state


class Chance:
    """Uniform actions, which performance is measured from. [N, O], [N], state -> [N, A], state"""

    def __init__(self, action_size):
        self.action_size, self.initial_state = action_size, lambda num_envs: None

    def step(self, obs, begins, recurrent_state):
        return 2 * torch.rand(len(obs), self.action_size) - 1, recurrent_state


class Tape(NamedTuple):
    """TBB: whole episodes, one after the other; each ends with a row for its final observation, which carries no loss.

    row            0     1     2     3     | 4     5     6
    obs            o0    o1    o2    o3    | o0'   o1'   o2'
    begins         1     0     0     0     | 1     0     0
    final          0     0     0     1     | 0     0     1       labels there are unused
    """

    obs: torch.Tensor  # [T, O]
    begins: torch.Tensor  # [T] bool
    final: torch.Tensor  # [T] bool
    labels: torch.Tensor  # [T, A] what the teacher did, or what it would have done without noise: --label

    def episodes(self, which):
        """Some of the episodes, in this order. [E] -> a tape"""
        starts = [*self.begins.nonzero().squeeze(1).tolist(), len(self.begins)]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in which])
        return Tape(*(v[rows] for v in self))

    def sample(self, num_episodes, rng, device):
        """Whole episodes, drawn with replacement, on a tape of their own."""
        return Tape(*(v.to(device) for v in self.episodes(rng.integers(int(self.begins.sum()), size=num_episodes))))


def execute(labels, noise):
    """What the teacher does: noise leads it away, so that the data show how it recovers. [N, A], [N, A] -> one-hot [N, A]"""
    return np.eye(labels.shape[1], dtype=np.float32)[(labels + noise).argmax(1)]


def env_actions(envs, actions):
    """The actions with the largest numbers [N, A], as the environments take them."""
    return actions.argmax(1) + envs.single_action_space.start


def collect(teacher, env_fns, args, rng):
    """Whole episodes of the teacher, one in each environment: (a tape on the CPU, their returns [E])."""
    envs, num_envs = gym.vector.SyncVectorEnv(env_fns), len(env_fns)
    (obs, _), state = envs.reset(seed=args.seed), teacher.initial_state(num_envs)
    episodes, returns, noise, steps = [[] for _ in range(num_envs)], [0.0] * num_envs, 0, 0
    begins, running = np.ones((2, num_envs), bool)
    while running.any() and steps < args.eval_max_steps:
        labels, state = teacher.step(obs, begins, state)
        labels, fresh = labels.cpu().numpy(), rng.standard_normal(labels.shape, np.float32)
        noise = args.noise_memory * noise + (1 - args.noise_memory**2 * (steps > 0)) ** 0.5 * fresh
        actions = execute(labels, args.data_noise * noise)
        next_obs, rewards, terminations, truncations, _ = envs.step(env_actions(envs, actions))
        steps += 1
        ended = terminations | truncations | (steps == args.eval_max_steps)
        for i in np.flatnonzero(running):
            label = labels[i] if args.label == "mean" else actions[i]
            returns[i] += rewards[i]
            episodes[i].append((obs[i], begins[i], False, label))
            if ended[i]:
                episodes[i].append((next_obs[i], False, True, label))
        obs, begins, running = next_obs, np.zeros_like(running), running & ~ended
    envs.close()
    columns = [torch.from_numpy(np.stack(v)) for v in zip(*itertools.chain(*episodes))]
    return Tape(*(v if v.dtype == torch.bool else v.float() for v in columns)), returns


class SparseLinear(nn.Module):
    """x W + b, whose weights have a Gaussian posterior with mean W and variance sigma^2, and can be dropped for good.

    The noise of the weights is drawn as what it does to the output, anew for each row: Kingma et al. (2015), local
    reparametrisation. log alpha = log sigma^2 / W^2 says how little a weight matters: Molchanov et al. (2017), section 4.
    """

    def __init__(self, inputs, outputs, std):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(outputs, inputs))
        self.log_sigma2 = nn.Parameter(torch.full((outputs, inputs), -8.0))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("mask", torch.ones(outputs, inputs))

    def log_alpha(self):
        return self.log_sigma2 - torch.log(self.weight**2 + 1e-8)  # 1e-8: a finite gradient where a weight is zero

    def forward(self, x, rng=None):
        """[T, inputs] -> [T, outputs]; with the noise of `rng`, or of the mean weights."""
        mean = F.linear(x, self.weight * self.mask, self.bias)
        if rng is None:
            return mean
        variance = F.linear(x * x, self.log_sigma2.exp())
        noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32)).to(mean.device)
        return mean + torch.sqrt(variance + 1e-8) * noise


class SparseLRU(nn.Module):
    """TBB: a lean Linear Recurrent Unit, without the normalisation and the skip that would tie all units together.

    z = tanh(E o + e)                        [O] -> [H]
    u = exp(gamma) (B z + b)                 [H] -> [P] complex: rows of B are the real parts, then the imaginary parts
    h = lambda (0 if begin else h) + u       the memory, whose decays are not pruned: one at zero would be another decay
    y = relu(R [Re h; Im h; z] + c)          [2P + H] -> [H], the Markov state
    """

    def __init__(self, obs_size, lift_size, state_size, width, r_min=0.0, r_max=0.99):
        super().__init__()
        radius = torch.empty(state_size).uniform_(r_min**2, r_max**2).clamp(1e-6, 1 - 1e-6) ** 0.5  # uniform on the ring
        self.E = SparseLinear(obs_size, lift_size, max(1, obs_size) ** -0.5)
        self.B = SparseLinear(lift_size, 2 * state_size, (2 * max(1, lift_size)) ** -0.5)
        self.B.bias.requires_grad_(False)  # zero; compaction puts constants there
        self.R = SparseLinear(2 * state_size + lift_size, width, max(1, state_size + lift_size) ** -0.5)
        self.nu = nn.Parameter(torch.log(-torch.log(radius)))
        self.theta = nn.Parameter(torch.log(2 * torch.pi * torch.rand(state_size)))
        self.gamma = nn.Parameter(0.5 * torch.log(1 - radius**2))  # log of the factor that keeps the memory's variance at one

    def decay(self):
        """lambda = exp(-exp(nu) + i exp(theta)), in double for its powers. [P] c128"""
        return torch.exp(torch.complex(-self.nu.double().exp(), self.theta.double().exp()))

    def scan(self, x, begins):
        """TBB: the memory after every step of a tape. [T, P] c64, [T] -> [T, P] c64"""
        if linear_scan:
            return linear_scan(self.decay(), x, begins)
        decay, h, rows = self.decay().to(x.dtype), torch.zeros_like(x[0]), []
        for row, begin in zip(x, begins.tolist()):
            h = row if begin else decay * h + row
            rows.append(h)
        return torch.stack(rows)

    def forward(self, obs, begins, rng=None):
        """TBB: the Markov states along a tape of whole episodes. [T, O], [T] -> [T, H]"""
        z = torch.tanh(self.E(obs, rng))
        real, imag = self.B(z, rng).chunk(2, -1)
        h = self.scan(torch.complex(real, imag) * self.gamma.exp(), begins)
        return torch.relu(self.R(torch.cat([h.real, h.imag, z], -1), rng))

    def step(self, obs, begins, recurrent_state):
        """TBB: one step of N environments; the state is [Re h; Im h]. [N, O], [N], [N, 2P] -> [N, H], [N, 2P]"""
        z = torch.tanh(self.E(obs))
        scale = self.gamma.exp().repeat(2)
        u = F.linear(z, scale[:, None] * self.B.weight * self.B.mask, scale * self.B.bias)
        real, imag = torch.where(begins[:, None], 0, recurrent_state).chunk(2, -1)
        decay = self.decay()
        a, b = decay.real.float(), decay.imag.float()
        recurrent_state = torch.cat([a * real - b * imag, a * imag + b * real], -1) + u
        return torch.relu(self.R(torch.cat([recurrent_state, z], -1))), recurrent_state


# ALGO LOGIC: initialize agent here:
class Student(nn.Module):
    def __init__(self, obs_size, action_size, lift_size, state_size, width, r_min=0.0, r_max=0.99):
        super().__init__()
        self.memory = SparseLRU(obs_size, lift_size, state_size, width, r_min, r_max)
        self.V = SparseLinear(width, action_size, 0.5 * max(1, width) ** -0.5)

    def layers(self):
        return {"memory.E": self.memory.E, "memory.B": self.memory.B, "memory.R": self.memory.R, "V": self.V}

    def forward(self, obs, begins, rng=None):
        """TBB: probabilities along a tape; with `rng`, of weights drawn from their posterior. [T, O], [T] -> [T, A]"""
        return torch.softmax(self.V(self.memory(obs, begins, rng), rng), -1)

    def initial_state(self, num_envs):
        return torch.zeros(num_envs, 2 * len(self.memory.nu), device=self.memory.nu.device)

    @torch.no_grad()
    def step(self, obs, begins, recurrent_state):
        """TBB: scores of one step of N environments, and their states. NumPy [N, O], [N]; state [N, 2P]"""
        obs, begins = (torch.as_tensor(v).to(recurrent_state.device) for v in (np.asarray(obs, np.float32), begins))
        markov_state, recurrent_state = self.memory.step(obs, begins, recurrent_state)
        return self.V(markov_state), recurrent_state


def student_of(weights):
    """A student of the sizes that saved weights have."""
    (lift_size, obs_size), (action_size, width) = weights["memory.E.weight"].shape, weights["V.weight"].shape
    student = Student(obs_size, action_size, lift_size, len(weights["memory.nu"]), width)
    student.load_state_dict(weights, strict=False)  # without variances and masks, which act no longer
    return student


def clone_loss(student, tape, rng=None):
    """The cross entropy of the student's probabilities and the teacher's along a tape; with `rng`, of weights drawn anew."""
    actions = student(tape.obs, tape.begins, rng)[~tape.final]
    return -(tape.labels[~tape.final] * torch.log(actions + 1e-8)).sum(-1).mean()


def kl_divergence(log_alpha):
    """From the posterior to the log-uniform prior, plus a constant: 0 as alpha grows. Molchanov et al. (2017), eq. 14."""
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return (k1 + 0.5 * F.softplus(-log_alpha) - k1 * torch.sigmoid(k2 + k3 * log_alpha)).sum()


def ramp(done, start, end):
    """0 until the share `start` of the updates is done, 1 from `end` on, a line between."""
    return float(np.clip((done - start) / max(end - start, 1e-8), 0, 1))


def kl_weight(done, args):
    """eta: what the KL divergence counts after a share `done` of the updates."""
    if args.eta_schedule == "exp":
        return args.eta_max * 1e-3 ** (1 - min(1.0, done / max(args.eta_end, 1e-8)))
    return args.eta_max * (ramp(done, args.eta_start, args.eta_end) if args.eta_schedule == "linear" else 1)


@torch.no_grad()
def prune(student, by, kind, value):
    """Sets the masks and returns the student: drops what is above a "threshold" of log alpha, or a share "sparsity" of all.

    by: "log_alpha", or "weight" for absolute values, of which the least are dropped.
    """
    layers = student.layers().values()
    scores = [layer.log_alpha() if by == "log_alpha" else -layer.weight.abs() for layer in layers]  # high: dispensable
    ranked = torch.cat([score.flatten() for score in scores])
    if kind == "sparsity":
        dropped = round(value * len(ranked))
        value = ranked.sort(descending=True).values[dropped - 1].item() if dropped else float("inf")
    for layer, score in zip(layers, scores):
        layer.mask.copy_(score < value)
    return student


def deployed(student):
    """The weights that act, by name: masked, without variances."""
    weights = {name: v for name, v in student.state_dict().items() if "log_sigma2" not in name and "mask" not in name}
    for name, layer in student.layers().items():
        weights[f"{name}.weight"] = layer.weight.detach() * layer.mask
    return weights


def evaluate(agent, env_fns, args):
    """The returns of greedy episodes, one in each environment, so that short ones do not count more often. [E]"""
    envs, seed = gym.vector.SyncVectorEnv(env_fns), args.seed + 10**6
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):  # environments may draw from each
        seed_one(seed)
    (obs, _), recurrent_state = envs.reset(seed=seed), agent.initial_state(len(env_fns))
    steps, returns, begins, running = 0, np.zeros(len(env_fns)), *np.ones((2, len(env_fns)), bool)
    while running.any() and steps < args.eval_max_steps:
        actions, recurrent_state = agent.step(obs, begins, recurrent_state)
        obs, rewards, terminations, truncations, _ = envs.step(env_actions(envs, actions.cpu().numpy()))
        returns += rewards * running
        begins, running, steps = np.zeros_like(running), running & ~(terminations | truncations), steps + 1
    envs.close()
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
    check_flags(args, (), {}, saved["args"] if args.resume else {})
    check_cuts(args)
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", 1)))  # more are slower, unless networks are large and cores idle
    tune_cpu()
    # TRY NOT TO MODIFY: seeding
    rng = np.random.default_rng(args.seed)  # of all draws after the initial weights
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    if saved is None:
        classes, teacher_args, teacher_saved = load_teacher(args)
        args.env_id, args.env_kwargs = args.env_id or teacher_args.env_id, args.env_kwargs or teacher_args.env_kwargs
        args.prev_action = teacher_args.prev_action
    # env setup
    make = [args.env_id, args.env_kwargs, args.prev_action]
    with env_errors(args.env_id):  # they name the flags
        envs = gym.vector.SyncVectorEnv([make_env(*make)])
    if saved:
        check_spaces(saved, envs, args.env_id, path)
    eval_fns = [make_env(*make, i) for i in range(args.eval_episodes)]
    some_fns = eval_fns[: (args.eval_episodes + 3) // 4]  # for what is looked at in passing
    if args.evaluate:
        returns = evaluate(student_of(saved["agent"]).to(device), eval_fns, args)
        print(f"evaluation: episodic_return={returns.mean():.4f}, the mean of {len(returns)} greedy episodes of {args.env_id}")
        sys.exit()
    teacher = None if saved else Teacher(classes, teacher_args, teacher_saved, envs, device, args.temperature)
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-"))
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    if args.track:
        import wandb

        run = {"name": run_name, "id": run_name, "resume": "allow", "config": vars(args)}
        wandb.init(project=args.wandb_project_name, sync_tensorboard=True, save_code=True, **run)
    writer = SummaryWriter(run_dir, purge_step=saved["state"]["update"] + 1 if saved else None)
    writer.add_text("hyperparameters", "\n".join(["|param|value|\n|-|-|", *(f"|{k}|{v}|" for k, v in vars(args).items())]))
    source = Path(__file__).read_text("utf-8")  # the text that made this run stays in its folder
    writer.add_text("source", f"```python\n{source}```")
    if not saved:
        Path(run_dir, script).write_text(source, "utf-8")
    stop = catch_stop_signals()  # empty until Ctrl-C or SIGTERM asks for an end
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own loop (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.updates:,} updates before pruning, {device}, {scan}")
    print(f"student: {args.student}, teacher: {args.teacher}; {run_dir}")
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the student's weights
    state = "student optimizer rng tape heldout reference pruned update".split()
    if saved:
        globals().update(saved["state"])
    else:
        data_fns = [make_env(*make, i) for i in range(args.data_episodes + args.heldout_episodes)]
        played, data_returns = collect(teacher, data_fns, args, rng)
        tape, heldout = played.episodes(range(args.data_episodes)), played.episodes(range(args.data_episodes, len(data_fns)))
        obs_size, action_size = tape.obs.shape[1], tape.labels.shape[1]
        reference = {"data": data_returns, "random": evaluate(Chance(action_size), eval_fns, args).tolist()}
        reference |= {"teacher": evaluate(teacher, eval_fns, args).tolist(), "numbers": teacher.numbers}
        reference["latency"] = latency(teacher, tape.obs[0].numpy(), teacher.initial_state(1))
        student = Student(obs_size, action_size, args.hidden_size, args.state_size, args.hidden_size, args.r_min, args.r_max)
        student.to(device)
        sigmas = [layer.log_sigma2 for layer in student.layers().values()]
        others = [v for name, v in student.named_parameters() if v.requires_grad and "log_sigma2" not in name]
        optimizer = torch.optim.Adam([{"params": others}, {"params": sigmas}], lr=args.learning_rate, fused=True)
        heldout, update, pruned = Tape(*(v.to(device) for v in heldout)), 0, []
        for name in ("teacher", "data", "random"):
            writer.add_scalar(f"charts/{name}_return", np.mean(reference[name]), 0)
    transitions, total_weights = int((~tape.final).sum()), sum(layer.weight.numel() for layer in student.layers().values())
    means = ", ".join(f"{name} {np.mean(reference[name]):.3f}" for name in ("teacher", "data", "random"))
    print(f"{transitions:,} transitions, {args.data_episodes} episodes; returns: {means}; {total_weights:,} weights to prune")
    variational = args.student == "svd"
    cuts = [("threshold", value) for value in args.c_threshold] + [("sparsity", value) for value in args.target_sparsity]
    cuts = cuts or [("threshold" if variational else "sparsity", 0.0)]  # log alpha of 0: as much noise as weight
    by = "log_alpha" if variational else "weight"  # what decides which weights are dropped

    def performance(agent, env_fns):
        """Between random actions (0) and the teacher (100), of episodes with the same starts; and the returns."""
        returns = evaluate(agent, env_fns, args)
        low, high = (np.mean(reference[name][: len(returns)]) for name in ("random", "teacher"))
        return float(100 * (returns.mean() - low) / (high - low or 1)), returns

    def checkpoint():
        writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
        content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
        save(f"{run_dir}/checkpoint.pt", content)
        if stop:
            print(f"stopped; --resume {run_dir} goes on from update {update:,}")
            sys.exit(128 + stop[0])

    total, start_time, start_update = args.updates + len(cuts) * args.fine_tune_updates, time.time(), update
    bar = tqdm(total=total, initial=update, unit="update", mininterval=0.2 if sys.stderr.isatty() else 5)
    while update < args.updates:
        if stop or args.checkpoint_interval and update % args.checkpoint_interval == 0:
            checkpoint()
        done, batch = update / args.updates, tape.sample(args.batch_episodes, rng, device)
        # ALGO LOGIC: the student
        losses = {"clone_loss": clone_loss(student, batch, rng if variational else None)}
        loss = losses["clone_loss"]
        eta = kl_weight(done, args)
        if variational:
            log_alpha = torch.cat([layer.log_alpha().flatten() for layer in student.layers().values()])
            losses["kl"] = kl_divergence(log_alpha) / transitions
            loss = loss + eta * losses["kl"]
        elif args.student == "l1":
            losses["l1"] = sum(layer.weight.abs().sum() for layer in student.layers().values())
            loss = loss + args.l1_coef * ramp(done, args.eta_start, args.eta_end) * losses["l1"]
        for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.sigma_learning_rate)):
            group["lr"] = rate * (1 - 0.9 * ramp(done, 0.5, 1))
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm, foreach=True)
        if not torch.isfinite(loss + grad_norm):
            remedy = f"--resume {run_dir} with a smaller --learning-rate"
            raise FloatingPointError(f"update {update}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; {remedy}")
        optimizer.step()
        update += 1
        for layer in student.layers().values():
            layer.log_sigma2.data.clamp_(max=4)
        if args.student == "magnitude" and update % 50 == 0:  # a cubic ramp: Zhu and Gupta (2017), eq. 1
            share = 1 - (1 - ramp(update / args.updates, args.eta_start, args.eta_end)) ** 3
            prune(student, by, "sparsity", share * args.target_sparsity[0])
        if update % 100 == 0:
            for name, value in {**losses, "grad_norm": grad_norm}.items():
                writer.add_scalar(f"losses/{name}", value, update)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], update)
            writer.add_scalar("charts/SPS", int((update - start_update) / (time.time() - start_time)), update)
            if variational:
                writer.add_scalar("charts/eta", eta, update)
                writer.add_scalar("charts/sparsity", (log_alpha > 0).float().mean(), update)
            bar.set_postfix(clone_loss=losses["clone_loss"].item(), refresh=False)
        if update >= 0.8 * args.updates and update % max(1, args.updates // 20) == 0:
            # stability: checkpoints of the last fifth, pruned and not fine-tuned
            pruned.append(performance(prune(copy.deepcopy(student), by, *cuts[0]), some_fns)[0])
            writer.add_scalar("charts/pruned_performance", pruned[-1], update)
        bar.update(1)
    checkpoint()
    report = {"args": asdict(args), "transitions": transitions, "last_fifth": pruned, "cuts": []}
    report |= {name: reference[name] for name in ("numbers", "latency")}
    report["returns"] = {name: float(np.mean(reference[name])) for name in ("teacher", "data", "random")}
    # what other thresholds would do, without fine-tuning
    report["sweep"] = sweep(student, prune, lambda cut: performance(cut, some_fns)[0]) if variational else []
    global_step = update
    for kind, value in cuts:
        cut, cut_rng = prune(copy.deepcopy(student), by, kind, value), np.random.default_rng(args.seed)
        row = {"cut": f"{kind} {value:g}", "before_fine_tuning": performance(cut, some_fns)[0]}
        weights = [v for name, v in cut.named_parameters() if v.requires_grad and "log_sigma2" not in name]
        cut_optimizer = torch.optim.Adam(weights, lr=args.learning_rate, fused=True)
        for step in range(args.fine_tune_updates):
            if stop:
                checkpoint()
            cut_optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.fine_tune_updates)
            losses = {"clone_loss": clone_loss(cut, tape.sample(args.batch_episodes, cut_rng, device))}
            loss = losses["clone_loss"]
            cut_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, args.max_grad_norm, foreach=True)
            cut_optimizer.step()
            global_step += 1
            if global_step % 100 == 0:
                writer.add_scalar("losses/fine_tuned_clone_loss", losses["clone_loss"], global_step)
            bar.update(1)
        row["heldout_error"] = clone_loss(cut, heldout).item()
        final = compact(deployed(cut))
        agent = student_of(final).to(device)
        row["performance"], returns = performance(agent, eval_fns)
        left = sum(int(layer.mask.sum()) for layer in cut.layers().values())
        row |= {"weights": left, "sparsity": 100 * (1 - left / total_weights)}
        row |= {"share_of_teacher": 100 * left / reference["numbers"], "return": float(returns.mean()), **costs(final)}
        row["layers"] = {name: 100 * (1 - layer.mask.mean().item()) for name, layer in cut.layers().items()}
        row["latency"] = latency(agent, tape.obs[0].numpy(), agent.initial_state(1))
        report["cuts"].append(row)
        text = "{cut}: {weights} weights, sparsity {sparsity:.1f} %, {share_of_teacher:.2f} % of the teacher; "
        text += "performance {performance:.1f}, {before_fine_tuning:.1f} before fine-tuning"
        print(text.format(**row) + f"; layers {', '.join(f'{k} {v:.1f}' for k, v in row['layers'].items())}")
    bar.close()
    catch_stop_signals(on=False)
    save(f"{run_dir}/model.pt", {"script": script, "args": asdict(args), "agent": final})
    report["cpu_seconds"] = time.process_time()
    with open(f"{run_dir}/report.json", "w") as file:
        json.dump(report, file, indent=1)
    if linear_scan:
        text = "{bytes_sparse:,} bytes sparse, {bytes_dense:,} dense, {multiply_adds} multiply-adds, {latency[1]} us a step"
        print(text.format(**row), "(the teacher: {:,}, {})".format(4 * reference["numbers"], reference["latency"][1]))
    print(f"trained for {update:,} updates, {report['cpu_seconds']:.1f} seconds of CPU; the student is {run_dir}/model.pt")
    for idx, episodic_return in enumerate(returns):
        writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume deletes it
    writer.add_scalar("eval/normalised_performance", row["performance"], global_step)
    print(f"evaluation: episodic_return={returns.mean():.4f}, the mean of {len(returns)} greedy episodes of {args.env_id}")
    envs.close()
    writer.close()
