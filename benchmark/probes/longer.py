"""Do memories whose length fits the task last on longer episodes? Trains on short ones, evaluates on 2, 4 and 16 times longer.

    python benchmark/probes/longer.py --seeds 1 2 3     # trains what is missing, then measures: benchmark/results/longer

Every network learns one short task: RepeatPrevious of two cards and RepeatFirst, each with one deck of 52 cards, or
position-only CartPole for 50 steps. Then it plays greedy episodes of 1, 2, 4 and 16 times as many decks or steps, with no
training in between. The drop is its return on the short task less its return on the longest. All three tasks scale their
rewards by the length of the episode, so that a policy that is as good all along has the same return at every length.

Arms: the tape; segments of 10 and of 50; and the tape without resets, where memory runs on from one episode into the next, in
updates and while it acts (`ablate.py no_resets`). Episodes that are evaluated begin with an empty memory in all arms.

The shares are those of `memory_length.py`, of rows along episodes of the short task: `share_outside` is the part of a Q
value's sensitivity that falls on observations which the task does not need. RepeatPrevious of two cards needs 2. Position-only
CartPole needs 2: two positions and the action between them give the velocity. RepeatFirst needs the first observation alone,
so its `share_outside` here is that of all others.

networks.csv has a row per network, correlations.csv the rank correlation of the outside share with the drop. A cell that has
not run is "unfinished". A second start does what is missing: cells are kept in runs/longer until the files hold them.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from ablate import ablated
from memory_length import measure, play
from timing import ROOT, load_script, set_up, write_csv

FACTORS = 1, 2, 4, 16
COMMON = "--hidden-size 64 --batch-size 300 --learning-starts 1000 --eval-episodes 0 --checkpoint-interval 0 --tau 0.1".split()
TASKS = {  # of each: the short environment and its flags; the longer one; what says how long; how many observations it needs
    "RepeatPrevious": {
        "flags": "--env-id popgym-RepeatPreviousEasy-v0 --env-kwargs k 2 --gamma 0.5 --no-anneal-lr --total-timesteps 14000"
        " --train-frequency 32",
        "env": ("popgym-RepeatPreviousEasy-v0", {"k": 2}, "num_decks", 1),
        "needs": 2,
    },
    "PositionOnlyCartPole": {
        "flags": "--env-id popgym-PositionOnlyCartPoleEasy-v0 --env-kwargs max_episode_length 50 --total-timesteps 20000"
        " --train-frequency 32",
        "env": ("popgym-PositionOnlyCartPoleEasy-v0", {}, "max_episode_length", 50),
        "needs": 2,
    },
    "RepeatFirst": {
        "flags": "--env-id popgym-RepeatFirstEasy-v0 --gamma 0.5 --total-timesteps 40000 --train-frequency 32",
        "env": ("popgym-RepeatFirst-v0", {}, "num_decks", 1),
        "needs": None,
    },
}
BATCHING = {
    "tape": ("tbb", [], None),
    "segments of 10": ("sbb", ["--segment-length", "10"], None),
    "segments of 50": ("sbb", ["--segment-length", "50"], None),
    "tape, no resets": ("tbb", [], "no_resets"),
}
MEMORIES = {"LRU": "lru", "FFM": "ffm", "gated LRU": "glru"}
LEARNED = 0.9  # a network with at least this return on the short task has learned it
FEWEST = 10  # networks of which a correlation says something


def cells(tasks, seeds):
    """(task, memory, batching, seed) of the grid, seed by seed: what stands when it is cut short has all arms."""
    for seed, task, memory, batching in itertools.product(seeds, tasks, MEMORIES, BATCHING):
        if MEMORIES[memory] != "glru" or "segments" not in batching:  # the gated one has the tape alone
            yield task, memory, batching, seed


def trained(task, memory, batching, seed):
    """(the script's module, its arguments, the trained network) of a cell, after its script has run in this process."""
    kind, own_flags, change = BATCHING[batching]
    script = ROOT / "single_files" / f"dqn_{kind}_{MEMORIES[memory]}.py"
    text = script.read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, script.name)
        path.write_text(ablated(text, change) if change else text)
        sys.argv = [str(path), *TASKS[task]["flags"].split(), *COMMON, *own_flags, "--seed", str(seed)]
        os.chdir(folder)  # its run's folder is of no use later
        found = runpy.run_path(str(path), run_name="__main__")
    module = load_script(script)
    envs = gym.vector.SyncVectorEnv([module.make_env(found["args"].env_id, found["args"].env_kwargs)])
    q_network = module.QNetwork(envs, found["args"])
    q_network.load_state_dict(found["q_network"].state_dict())
    return module, found["args"], q_network


def played(module, q_network, task, factor, episodes):
    """Greedy episodes, `factor` times as long as those of the training."""
    env_id, kwargs, name, short = TASKS[task]["env"]
    make = module.make_env(env_id, kwargs | {name: short * factor})
    envs = gym.vector.SyncVectorEnv([make] * episodes, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    found = play(q_network, envs, np.random.default_rng(0).integers(2**31, size=episodes).tolist())
    envs.close()
    return found


def measured(task, memory, batching, seed, episodes):
    """A cell's row: trains its network, and measures it."""
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    module, _, q_network = trained(task, memory, batching, seed)
    row = {"task": task, "memory": memory, "batching": batching, "seed": seed, "state": "done"}
    row["train_cpu_seconds"] = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
    found = {factor: played(module, q_network, task, factor, episodes) for factor in FACTORS}
    row |= {f"return_x{factor}": float(np.mean([episode[2] for episode in found[factor]])) for factor in FACTORS}
    needs = TASKS[task]["needs"]
    figures = measure(q_network, found[1][:10], 5, needs or np.inf)["along the episode"][1]
    if needs is None:  # the first observation alone is needed
        figures["share_inside"] = figures["share_oldest_needed"]
        figures["share_outside"] = 1 - figures["share_inside"]
    row |= {name: float(figures[name]) for name in ("share_inside", "share_outside")}
    return row | {"drop": row["return_x1"] - row[f"return_x{FACTORS[-1]}"]}


def ranks(values):
    """Ranks of the values; equal ones share theirs."""
    values = np.asarray(values)
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])


def correlation(x, y):
    """Spearman's rank correlation, nan if one of the two is constant."""
    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else float("nan")


def correlations(rows, repetitions=2000):
    """Per task, over all memories and over each: networks that learned, correlation, 95 % bootstrap interval over networks."""
    found, rng = [], np.random.default_rng(0)
    done = [row for row in rows if row["state"] == "done" and row["return_x1"] >= LEARNED]
    for task, memory in itertools.product(TASKS, ["all", *MEMORIES]):
        cell = [row for row in done if row["task"] == task and memory in ("all", row["memory"])]
        pairs = np.array([(row["share_outside"], round(row["drop"], 4)) for row in cell]).reshape(-1, 2)  # 1e-14 is no drop
        figures = {"correlation": float("nan"), "low": float("nan"), "high": float("nan")}
        if len(pairs) >= FEWEST:
            drawn = [correlation(*pairs[rng.integers(len(pairs), size=len(pairs))].T) for _ in range(repetitions)]
            drawn = np.array(drawn)[np.isfinite(drawn)]
            low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (float("nan"),) * 2
            figures = {"correlation": correlation(*pairs.T), "low": float(low), "high": float(high)}
        found.append({"task": task, "memory": memory, "networks": len(pairs)} | figures)
    return found


def in_own_process(function, *args):
    """function(*args) in a copy of this process, which has the imports already; an error ends this one, too."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def parse_args():
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="seeds of every arm")
    out.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="the tasks to run")
    out.add_argument("--episodes", type=int, default=20, help="greedy episodes of each network at each length")
    out.add_argument("--measure-only", action="store_true", help="train nothing: write the files from what has run")
    out.add_argument("--kept", default=str(ROOT / "runs" / "longer"), help="folder of the cells that have run")
    out.add_argument("--out", default=str(ROOT / "benchmark" / "results" / "longer"), help="folder of the CSV files")
    args = out.parse_args()
    if args.episodes < 10:
        raise ValueError(f"--episodes: expected at least 10, which the shares are measured on, got {args.episodes}; raise it")
    return args


NAMES = "task", "memory", "batching", "seed"


def has_run(args):
    """{cell: its row} of all cells that have run: those in the file of results, and those kept since it was written."""
    rows, path = [], Path(args.out, "networks.csv")
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for row in csv.DictReader(lines):
            words = "state", *NAMES[:-1]
            rows.append({name: value if name in words or not value else float(value) for name, value in row.items()})
            rows[-1]["seed"] = int(row["seed"])
    rows += [json.loads(kept.read_text()) for kept in sorted(Path(args.kept).glob("*.json"))]
    return {tuple(row[name] for name in NAMES): row for row in rows if row["state"] == "done"}


def write(args, where):
    """Both files, from the cells that have run; a cell of a seed that has begun, and has not run, is unfinished."""
    done = has_run(args)
    seeds = sorted({*args.seeds, *(seed for *_, seed in done)})
    rows = [done.get(cell, dict(zip(NAMES, cell)) | {"state": "unfinished"}) for cell in cells(TASKS, seeds)]
    write_csv("networks", where, rows, args)
    write_csv("correlations", where, correlations(rows), args)


if __name__ == "__main__":
    args = parse_args()
    cores = os.sched_getaffinity(0)
    where = set_up(argparse.Namespace(threads=1, cpu_time=False)).replace(", pinned to 1; clock: wall", "")
    os.sched_setaffinity(0, cores)  # nothing is timed here
    import popgym  # noqa: F401  # here, so that the copies have it

    gym.register("popgym-RepeatFirst-v0", entry_point="popgym.envs.repeat_first:RepeatFirst")  # takes num_decks
    done = has_run(args)
    for cell in [] if args.measure_only else cells(args.tasks, args.seeds):
        if cell not in done:
            path = Path(args.kept, "__".join(map(str, cell)).replace(" ", "-").replace(",", "") + ".json")
            began = time.time()
            row = in_own_process(measured, *cell, args.episodes)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row) + "\n")
            print(*cell, f"{row['train_cpu_seconds']:.0f} s of CPU, {time.time() - began:.0f} s,", json.dumps(row), flush=True)
    write(args, where)
