# docs: docs/ppo.md
# Variant of single_files/ppo_tbb_ffm.py. Changed: Args, LSTM (was FFM), Agent.__init__
# The baseline: rollout segments with stored state, as in CleanRL's ppo_atari_lstm.py, with resets and bootstraps done right
# LSTM: Hochreiter and Schmidhuber (1997), "Long Short-Term Memory", https://doi.org/10.1162/neco.1997.9.8.1735
"""PPO with an LSTM, trained on the segments that rollouts cut episodes into: the baseline.

    python single_files/ppo_sbb_lstm.py                               # a memory task, on a CPU
    python single_files/ppo_sbb_lstm.py --env-id CartPole-v1          # any vector observation with finite actions
    python single_files/ppo_sbb_lstm.py --resume runs/RUN             # continue a killed run exactly
    python single_files/ppo_sbb_lstm.py --evaluate runs/RUN           # greedy episodes with the trained model

Copy this file into your project and edit it: the import from cleanrl_memoroid is optional and only makes it faster.
Shapes: S steps of a rollout, N environments, E of them in a minibatch, T rows of a tape, B of them with a loss; O observation,
D parts of an action, H width, P pieces between resets; time comes first. Does not include: continuous actions, images.
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
    checkpoint_interval: int = 50_000  # environment steps between checkpoints, for --resume; 0: at Ctrl-C only (steps)
    resume: str | None = None  # run directory to continue, with its flags unless you give others (unpickles: only your own)
    evaluate: str | None = None  # run directory whose trained model plays greedy episodes; then exit

    # Algorithm specific arguments
    env_id: str = "popgym-RepeatFirstEasy-v0"  # any environment with vector observations and finite actions
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # for its constructor: k 10 num_decks 2
    prev_action: bool = True  # if toggled, POPGym observations include the previous action
    total_timesteps: int = 150_000  # total timesteps of the experiment, over all environments (steps)
    learning_rate: float = 1e-3  # the learning rate of the optimizer at the start
    num_envs: int = 64  # the number of parallel environments
    num_steps: int = 52  # the number of steps S to run in each environment per policy rollout (steps)
    anneal_lr: bool = True  # if toggled, the learning rate falls linearly to zero
    gamma: float = 0.99  # the discount factor gamma
    gae_lambda: float = 0.95  # the lambda for the general advantage estimation
    num_minibatches: int = 4  # the number of minibatches; TBB: each has whole environments, whose steps stay in order
    update_epochs: int = 4  # the K epochs to update the policy
    norm_reward: bool = True  # if toggled, divide rewards by the standard deviation of the discounted return so far
    norm_adv: bool = True  # if toggled, advantages are normalised over each minibatch
    clip_coef: float = 0.2  # the surrogate clipping coefficient
    clip_vloss: bool = True  # if toggled, the value's loss is clipped, too, as in the paper
    ent_coef: float = 0.01  # coefficient of the entropy
    vf_coef: float = 0.5  # coefficient of the value function
    max_grad_norm: float = 0.5  # the maximum norm of the gradient
    target_kl: float | None = None  # stop updating after an epoch with a larger KL divergence from the rollout's policy
    truncation_is_terminal: bool = False  # if toggled, a time limit ends the return as termination does (POPGym's reading)

    # Memory specific arguments
    max_prefix: int = 0  # the baseline has no prefix: a state is carried, and no gradient crosses a rollout's edge (rows)
    hidden_size: int = 128  # width H of every layer (units)


def make_env(env_id, env_kwargs, prev_action=True, idx=0, video_folder=None):
    def thunk():
        if env_id.startswith("popgym-"):
            from popgym.wrappers import Antialias, Flatten, PreviousAction

            # POPGym's wrappers take bare POPGym environments only, without the wrappers of gym.make
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs).unwrapped
            env = PreviousAction(env) if prev_action else env
            env = Flatten(Antialias(env))  # adds the flag "this is the first step", then concatenates everything one-hot
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


class LSTM(nn.Module):
    """The memory that most recurrent PPO has: its state is a nonlinear function of the one before, so time is a loop.

    The loop runs inside oneDNN or cuDNN, over the pieces between resets side by side, in four groups of like lengths:
    PyTorch's packed sequences do the same, and take three to four times as long on a CPU.
    Source: Hochreiter and Schmidhuber (1997); initialised as in CleanRL's ppo_atari_lstm.py.
    """

    def __init__(self, input_size, output_size):
        super().__init__()
        self.lstm = nn.LSTM(input_size, output_size)
        for name, param in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.constant_(param, 0)
            else:
                nn.init.orthogonal_(param, 1.0)

    def forward(self, tape, obs):
        """All sections of a rollout at once; there is no prefix, so no state to compute again. [T, H] -> [B, O], None"""
        fresh, begins = tape.begins[tape.starts], tape.begins.index_fill(0, tape.starts, True)
        firsts, piece = begins.nonzero().squeeze(1), begins.cumsum(0) - 1  # [P] where each piece begins; [T] each row's piece
        before = obs.new_zeros(len(firsts), *tape.state.shape[1:])
        before[piece[tape.starts]] = torch.where(fresh[:, None, None], 0, tape.state)
        at = torch.arange(len(obs), device=obs.device) - firsts[piece]  # [T] each row's place in its piece
        lengths = torch.diff(firsts, append=firsts.new_tensor([len(obs)]))
        hidden, place = obs.new_zeros(len(obs), self.lstm.hidden_size), torch.empty_like(lengths)
        for group in lengths.argsort(stable=True).tensor_split(min(4, len(lengths))):  # of like lengths: less padding
            here, place[group] = torch.isin(piece, group).nonzero().squeeze(1), torch.arange(len(group), device=obs.device)
            at_here = at[here], place[piece[here]]
            padded = obs.new_zeros(int(lengths[group].max()), len(group), obs.shape[1]).index_put(at_here, obs[here])
            out, _ = self.lstm(padded, tuple(before[group].transpose(0, 1)[:, None].contiguous()))
            hidden = hidden.index_put((here,), out[at_here])
        return hidden.index_select(0, tape.loss_rows) if len(tape.loss_rows) < len(hidden) else hidden, None

    def step(self, obs, begins, recurrent_state):
        """One step of N environments, each from its own state. [N, H], [N], [N, 2, O] -> [N, O], [N, 2, O]"""
        before = torch.where(begins[:, None, None], 0, recurrent_state).transpose(0, 1)[:, None].contiguous()
        hidden, after = self.lstm(obs[None], tuple(before))
        return hidden[0], torch.cat(after).transpose(0, 1)

    def initial_state(self, num_envs):
        return torch.zeros(num_envs, 2, self.lstm.hidden_size, device=self.lstm.weight_hh_l0.device)


# ALGO LOGIC: initialize agent here:
class Agent(nn.Module):
    def __init__(self, envs, args):
        super().__init__()
        obs_space, space, hidden = envs.single_observation_space, envs.single_action_space, args.hidden_size
        if not isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)) or len(space.shape) > 1:
            raise ValueError(f"--env-id: expected finite actions, got {space}; use ppo_tbb_lru_continuous_action.py")
        if len(obs_space.shape or ()) != 1:
            raise ValueError(f"--env-id: expected vector observations, got {obs_space}; flatten them, or edit this encoder")
        self.nvec = space.nvec.tolist() if isinstance(space, gym.spaces.MultiDiscrete) else [int(space.n)]
        norm = nn.LayerNorm(hidden).requires_grad_(False)  # without parameters, as in the paper
        self.encoder = nn.Sequential(nn.Linear(obs_space.shape[0], hidden), norm, nn.LeakyReLU(inplace=True))
        if args.max_prefix != 0:
            raise ValueError(f"--max-prefix {args.max_prefix}: expected 0 here; the tbb scripts carry episodes on a tape")
        self.memory = LSTM(hidden, hidden)
        self.norm = nn.LayerNorm(hidden).requires_grad_(False)
        self.actor, self.critic = nn.Linear(hidden, sum(self.nvec)), nn.Linear(hidden, 1)
        for layer, std in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, std)
            nn.init.zeros_(layer.bias)

    def heads(self, markov_state):
        """Log-probabilities of the choices in each part of an action [B, D, choices], and values [B]."""
        markov_state, most = self.norm(markov_state), max(self.nvec)  # a choice that a part lacks has probability 0
        parts = [F.pad(p, (0, most - p.shape[-1]), value=-1e9) for p in self.actor(markov_state).split(self.nvec, dim=-1)]
        return torch.stack(parts, -2).log_softmax(-1), self.critic(markov_state).squeeze(-1)

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


def log_prob(policy, actions):
    return policy.gather(-1, actions[..., None]).sum((-2, -1))  # [B, D, choices], [B, D] -> [B]


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


def env_actions(envs, actions):
    """Actions [N, D] in the form of the action space: one number each if it is Discrete, counted from its `start`."""
    return actions.cpu().numpy().reshape(envs.action_space.shape) + envs.single_action_space.start


def evaluate(agent, env_fns, args):
    """The returns of greedy episodes, one in each environment, so that short ones do not count more often. [E]"""
    envs, seed = gym.vector.SyncVectorEnv(env_fns), args.seed + 10**6
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):  # environments may draw from each
        seed_one(seed)
    (obs, _), recurrent_state = envs.reset(seed=seed), agent.memory.initial_state(len(env_fns))
    steps, returns, begins, running = 0, np.zeros(len(env_fns)), *np.ones((2, len(env_fns)), bool)
    while running.any() and steps < args.eval_max_steps:
        policy, _, recurrent_state = agent.step(obs, begins, recurrent_state)
        obs, rewards, terminations, truncations, _ = envs.step(env_actions(envs, policy.argmax(-1)))
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
    if args.num_envs % args.num_minibatches:  # a minibatch is made of whole environments
        raise ValueError(f"--num-minibatches {args.num_minibatches}: expected a divisor of --num-envs {args.num_envs}")
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
    make = [args.env_id, args.env_kwargs, args.prev_action]
    # TBB: in the step that ends an episode, next_obs is already the first one of the next episode; infos has the final one
    with env_errors(args.env_id):  # they name the flags
        envs = gym.vector.SyncVectorEnv([make_env(*make, i) for i in range(args.num_envs)], autoreset_mode="SameStep")
        if args.capture_video:  # if it cannot be recorded, say so before training
            make_env(*make, 0, "videos")().close()
    agent = Agent(envs, args).to(device)
    if saved:
        saved = torch.load(path, map_location=device, weights_only=not args.resume) if args.cuda else saved
        weights = saved["agent"] if args.evaluate else saved["state"]["agent"].state_dict()
        if [v.shape for v in weights.values()] != [v.shape for v in agent.state_dict().values()]:
            raise ValueError(f"--env-id {args.env_id}, or sizes of layers: not those of the network in {path}; leave them out")
    run_dir = run_dir or new_run_dir(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-"))
    run_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in os.path.basename(os.path.abspath(run_dir)))
    video = f"videos/{run_name}" if args.capture_video else None
    eval_fns = [make_env(*make, i, video if i == 0 else None) for i in range(args.eval_episodes)]
    if args.evaluate:
        agent.load_state_dict(weights)
        evaluate(agent, eval_fns, args)
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
    obs = np.zeros((args.num_steps, *envs.observation_space.shape), np.float32)
    begins = np.zeros((args.num_steps, args.num_envs), bool)
    return_rms, global_step = gym.wrappers.utils.RunningMeanStd(), 0  # the former of discounted returns, for --norm-reward
    # the variables that a checkpoint holds; pickled together, so that the optimizer still refers to the agent's weights
    state = "agent optimizer carried_tape rng global_step next_obs next_begins recurrent_state discounted return_rms".split()
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
        recurrent_state = agent.memory.initial_state(args.num_envs)
        carried_tape = CarriedTape(obs, recurrent_state)
    # ALGO Logic: Storage setup
    logprobs, values, bootstraps = torch.zeros(3, args.num_steps, args.num_envs, device=device)
    gains, ends = np.zeros(begins.shape, np.float32), np.zeros(begins.shape, bool)  # rewards, ends; moved once a rollout
    start_time, start_step, recent_returns = time.time(), global_step, deque(maxlen=100)
    scan = "cleanrl_memoroid's scan" if linear_scan else "this file's own scan (faster with `pip install` of cleanrl-memoroid)"
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments, {device}, {scan}")
    size = f"{4e-9 * obs[0].size * (args.num_steps + args.max_prefix):.2f} GB of observations at most"
    print(f"{num_iterations} rollouts of {args.num_steps} steps; {size}; {run_dir}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=0.2 if sys.stderr.isatty() else 5)
    for iteration in range(global_step // batch_size + 1, num_iterations + 1):
        due = stop or args.checkpoint_interval and global_step % args.checkpoint_interval < batch_size
        if due:
            writer.flush()  # before the checkpoint: a resumed run logs only what comes after it
            content = {"script": script, "args": asdict(args), "state": {name: globals()[name] for name in state}}
            finish = checkpoint(f"{run_dir}/checkpoint.pt", content, envs, stop)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations if args.anneal_lr else 1)
        actions = []  # [S] of [N, D]
        noise = rng.gumbel(size=(*begins.shape, len(agent.nvec), max(agent.nvec))).astype(np.float32)
        noise = torch.from_numpy(noise).to(device)  # of all steps at once: every transfer to a device waits for it
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step], begins[step] = next_obs, next_begins
            # ALGO LOGIC: action logic
            policy, values[step], recurrent_state = agent.step(next_obs, next_begins, recurrent_state)
            action = (policy + noise[step]).argmax(-1)  # a draw from the policy, by the Gumbel-max trick
            logprobs[step] = log_prob(policy, action)
            actions.append(action)
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
        writer.add_scalar("charts/prefix_share", 1 - batch_size / sum(map(len, carried_tape.begins)), global_step)
        # bootstrap value if not done
        _, next_value, _ = agent.step(next_obs, next_begins, recurrent_state)
        rewards, ended = (torch.from_numpy(v).to(device) for v in (gains, ends))
        next_values = torch.where(ended, bootstraps, torch.cat([values[1:], next_value[None]]))
        advantages = gae(rewards, values, next_values, ended, args.gamma, args.gae_lambda)
        # TBB: order the batch by environment, [S, N] -> [N, S], so that the steps of each stay in order
        batch = [v.transpose(0, 1) for v in (torch.stack(actions), logprobs, values, advantages, advantages + values)]
        explained_var = 1 - advantages.var() / (advantages + values).var()
        # Optimizing the policy and value network
        clipfracs, logprob_error = [], None
        for _ in range(args.update_epochs):
            for mb_envs in rng.permutation(args.num_envs).reshape(args.num_minibatches, -1):
                mb_actions, mb_logprobs, mb_values, mb_advantages, mb_returns = (v[mb_envs].flatten(0, 1) for v in batch)
                policy, newvalue, _ = agent(carried_tape.sections(mb_envs, args.num_steps))
                logratio = log_prob(policy, mb_actions) - mb_logprobs
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
                entropy_loss = -(policy.exp() * policy).sum((-2, -1)).mean()
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
    for idx, episodic_return in enumerate(evaluate(agent, eval_fns, args) if args.eval_episodes else ()):
        writer.add_scalar("eval/episodic_return", episodic_return, global_step + idx)  # --resume deletes it
    envs.close()
    writer.close()
