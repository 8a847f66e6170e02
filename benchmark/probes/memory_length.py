"""How far back a trained Q network looks (value memory length, VML), and how far back its task asks it to (RML).

    python benchmark/probes/memory_length.py runs/RUN runs/OTHER_RUN              # writes benchmark/results/memory_length
    python benchmark/probes/memory_length.py runs/RUN --reward-memory-length 2    # a task whose RML is not known here

The sensitivity of an action's value to the observation of age n - i (Morad et al., 2024, eq. 15), and its share:

    |dQ(s_n, a_n) / do_i|    and    |dQ(s_n, a_n) / do_i| / sum_j |dQ(s_n, a_n) / do_j|,    i, j = 0 ... n

|.| adds up the absolute values over an observation's components (L1 norm), of which the previous action a_{i-1} is one group
if the model has it; a_n is the greedy action. Every model plays whole greedy episodes in its own environment, all with the
same seeds. Each episode is a tape by itself: memory runs from o_0 on, also in a model that was trained on segments. Shares
are averaged over episodes and over the rows n, of which there are two sets:
last action          as in the paper: where it terminates the episode, Q(s_n, a_n) is its reward and nothing after it
along the episode    rows at even distances up to the last action, all with ages outside the RML if the episode is that long;
                     an age that a row does not have is a share of zero there, so this curve falls faster with age

The paper's code (losses.py:tape_ddqn_loss_filtered, plotting/grads.py) has the same norm at the last action of one greedy
episode, and plots the sum from the oldest age to the newest over the whole: its mark at -10 is the share of ages >= 10, here
`share_outside`. In these files `cumulative_share` begins at age 0.

The RML is how many of the newest observations, o_{n-RML+1} ... o_n, predict the reward of a_n as well as all do (eq. 13).
VML = RML would mean a share of zero from age RML on. curves.csv has the curves, which benchmark/tools/report.py draws;
summary.csv has a row per model and set of rows: share of the ages below the RML, and of the others; of the oldest one needed
(age RML - 1; in RepeatFirst o_0); age_90, the first age up to which at least 90 % add up. A greedy return far below the one at
the end of training says that the script has changed since: weights that still fit may mean something else now.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from timing import ROOT, load_script, print_table, set_up, write_csv


def load_model(folder, script=None):
    """(the script's module, its arguments as a namespace, the network's weights) of a run's directory."""
    path = Path(folder, "model.pt")
    if not path.is_file():
        remedy = "see `ls runs`, and mind that a run saves its model when training ends"
        raise ValueError(f"runs: expected run directories with a model.pt, got {str(folder)!r}; {remedy}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    script = Path(script or ROOT / "single_files" / f"{content['args']['exp_name']}.py")
    if not script.is_file():
        raise ValueError(f"--script: expected the script that trained {folder}, got {str(script)!r}; name its path")
    module = load_script(script)
    own = vars(module.Args()) | content["args"]  # an argument younger than the model has its default, as with --evaluate
    return module, argparse.Namespace(**own), content["q_network"]


def task_memory_length(env):
    """The RML of a task (observations): inf if it is the whole episode, None if it is not known here."""
    try:
        from popgym.envs.repeat_first import RepeatFirst
        from popgym.envs.repeat_previous import RepeatPrevious
    except ImportError:
        return None
    if isinstance(env.unwrapped, RepeatPrevious):
        # a_n is compared with player[-k], dealt k - 1 steps before o_n: POPGym's own docstring counts one step more.
        # Rewards after a_n ask for newer cards, so that Q(s_n, a_n) needs no older ones. k = 0 means player[0], o_0
        return env.unwrapped.k or math.inf
    return math.inf if isinstance(env.unwrapped, RepeatFirst) else None


def play(q_network, envs, seeds):
    """One greedy episode per environment: (observations [n+1, O], greedy actions [n+1], return) of each.

    The final observation is not among them: no action is taken there.
    """
    obs, _ = envs.reset(seed=seeds)
    begins, running = np.ones(envs.num_envs, bool), np.ones(envs.num_envs, bool)
    recurrent_state = q_network.memory.initial_state(envs.num_envs)
    episodes = [([], [], []) for _ in seeds]
    while running.any():
        with torch.no_grad():
            q_values, recurrent_state = q_network.step(obs, begins, recurrent_state)
        actions, before = q_values.argmax(dim=1).numpy(), np.array(obs, np.float32)
        obs, rewards, terminations, truncations, _ = envs.step(actions + envs.single_action_space.start)
        for i in np.flatnonzero(running):
            for column, value in zip(episodes[i], (before[i], actions[i], rewards[i])):
                column.append(value)
        begins = terminations | truncations
        running &= ~begins
    return [(np.stack(obs), np.array(actions), float(sum(rewards))) for obs, actions, rewards in episodes]


def rows_along(length, count, memory_length):
    """Up to `count` rows at even distances, the last one length - 1; rows all of whose ages are below the RML are left out."""
    before = memory_length - 1 if memory_length and memory_length < length else -1
    return sorted({before - (-i * (length - 1 - before) // count) for i in range(1, count + 1)})


def sensitivity(q_network, obs, actions, rows):
    """sum |dQ(s_n, a_n) / do_i| over the components of o_i, for every n in rows. [n+1, O], [n+1] -> [R, n+1] f64"""
    obs = torch.as_tensor(obs).clone().requires_grad_()
    begins = torch.zeros(len(obs), dtype=torch.bool)
    begins[0] = True
    q_values = q_network(obs, begins)
    grads = [torch.autograd.grad(q_values[n, int(actions[n])], obs, retain_graph=True)[0] for n in rows]
    found = torch.stack(grads).double().abs().sum(dim=2).numpy()
    if not np.isfinite(found).all():
        raise ValueError("model: expected finite gradients, got inf or nan; it has diverged, train it again")
    return found


def shares_by_age(found, rows, longest):
    """Each row's sensitivities as shares of their sum, age 0 first; nan if they are all zero. [R, T] -> [R, longest]"""
    shares = np.zeros((len(rows), longest))
    for share, row, n in zip(shares, found, rows):
        with np.errstate(invalid="ignore"):
            share[: n + 1] = row[n::-1] / row[: n + 1].sum()
    return shares


def summarise(shares, rows, memory_length):
    """Figures of the mean curve: shares [R, ages], the rows' n [R], the RML or None."""
    curve = shares.mean(axis=0)
    figures = {"share_inside": "", "share_outside": "", "share_oldest_needed": ""}
    if memory_length:
        inside = curve[: min(memory_length, len(curve))].sum()
        # a row with fewer observations than the RML needs all of them, down to o_0
        oldest = np.minimum(memory_length - 1, rows).astype(int)
        needed = shares[np.arange(len(rows)), oldest].mean()
        figures = {"share_inside": inside, "share_outside": curve.sum() - inside, "share_oldest_needed": needed}
    return figures | {"age_90": int(np.searchsorted(curve.cumsum(), 0.9 * curve.sum()))}


def measure(q_network, episodes, count, memory_length):
    """{set of rows: (mean share by age [ages], figures)} of a model's episodes, as `play` returns them."""
    longest = max(len(obs) for obs, _, _ in episodes)
    shares, rows, last = [], [], []
    for obs, actions, _ in episodes:
        along = rows_along(len(obs), count, memory_length)
        shares.append(shares_by_age(sensitivity(q_network, obs, actions, along), along, longest))
        rows += along
        last += [n == along[-1] for n in along]
    shares, rows = np.concatenate(shares), np.array(rows)
    depends = np.isfinite(shares).all(axis=1)  # a value that depends on no observation has no shares
    found = {}
    for name, chosen in {"last action": depends & last, "along the episode": depends}.items():
        if not chosen.any():
            raise ValueError(f"model: expected Q values that depend on observations, got none ({name}); is it trained?")
        figures = summarise(shares[chosen], rows[chosen], memory_length)
        found[name] = shares[chosen].mean(axis=0), {"rows": int(chosen.sum())} | figures
    return found


def measure_run(path, args, seeds):
    """(rows of the curves, rows of the summary) of one saved model."""
    script, own, weights = load_model(path, args.script)
    make = script.make_env(own.env_id, own.env_kwargs, own.prev_action)
    envs = gym.vector.SyncVectorEnv([make] * len(seeds), autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    q_network = script.QNetwork(envs, own)
    try:
        q_network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"--script: expected the script that trained {path}, got one whose network differs: {error}"
        ) from None
    memory_length = args.reward_memory_length or task_memory_length(envs.envs[0])
    episodes = play(q_network, envs, seeds)
    envs.close()
    run = {
        "script": own.exp_name,
        "env_id": own.env_id,
        "env_kwargs": json.dumps(own.env_kwargs, separators=(",", ":")),
        "seed": own.seed,
        "segment_length": getattr(own, "segment_length", ""),  # empty: trained on a tape
        "gamma": own.gamma,
    }
    task = {
        "episodes": len(episodes),
        "greedy_return": float(np.mean([episode[2] for episode in episodes])),
        "reward_memory_length": "episode" if memory_length == math.inf else memory_length or "",
    }
    curves, summary = [], []
    for name, (curve, figures) in measure(q_network, episodes, args.rows, memory_length).items():
        for age, (share, total) in enumerate(zip(curve, curve.cumsum())):
            curves.append(run | {"at": name, "age": age, "share": float(share), "cumulative_share": float(total)})
        figures = {key: float(value) if isinstance(value, np.floating) else value for key, value in figures.items()}
        summary.append(run | {"at": name} | task | figures)
    return curves, summary


def parse_args():
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("runs", nargs="+", help="run directories, runs/RUN")
    out.add_argument("--episodes", type=int, default=20, help="greedy episodes of each model")
    out.add_argument("--rows", type=int, default=10, help="rows n along each episode, a backward pass for each")
    rml = "RML of the tasks, newest observation included (observations); left out, it is known for POPGym's RepeatPrevious "
    out.add_argument("--reward-memory-length", type=int, help=rml + "and RepeatFirst, and other tasks get the curve only")
    out.add_argument("--seed", type=int, default=0, help="seed of the episodes, the same for every model")
    out.add_argument("--script", help="training script of the models; left out, single_files/EXP_NAME.py")
    out.add_argument("--out", default=str(ROOT / "benchmark" / "results" / "memory_length"), help="folder of the CSV files")
    args = out.parse_args()
    for name in ("episodes", "rows", "reward_memory_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}; raise it")
    return args


if __name__ == "__main__":
    args = parse_args()
    where = set_up(argparse.Namespace(threads=1, cpu_time=False))
    print(where)
    seeds = np.random.default_rng(args.seed).integers(2**31, size=args.episodes).tolist()
    curves, summary = [], []
    for path in args.runs:
        curve, figures = measure_run(path, args, seeds)
        curves += curve
        summary += figures

    groups = defaultdict(list)
    for row in summary:
        groups[row["env_id"], row["env_kwargs"]].append({k: v for k, v in row.items() if not k.startswith("env_")})
    for (env_id, env_kwargs), rows in groups.items():
        print_table(rows, f"{env_id} {env_kwargs}, {args.episodes} greedy episodes of each model")
    write_csv("curves", where, curves, args)
    write_csv("summary", where, summary, args)
