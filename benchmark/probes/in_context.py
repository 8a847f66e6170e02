"""Trains models of algorithm distillation, and measures how they learn in context and how long they remember.

    echo "minGRU: single_files/ad_mingru.py --seed 1" | python benchmark/probes/in_context.py

A line of the standard input is a run, `ARM: SCRIPT FLAGS`; its folder is runs/in_context/KEY. What has been measured, in
benchmark/results/in_context, is not done again, so a grid that was stopped goes on. The files:

summary.csv    a row per run. icl_1 and icl_0.5: in-context learning at these temperatures, on held-out tasks, 4 runs each:
               (mean of the last 10 % of episodes - mean of the first two) / (optimum - random moves); icl_train_0.5: the
               same on training tasks. worst_0.5: the last 10 % as a share of the optimum, of the task where that is smallest.
               above_floor: loss of the last 50 updates less the source's entropy (nat). updates_to_floor: updates until the
               mean loss of 20 is within 0.1 nat of it; empty: never. grad_*: percentiles of the gradient's norm before
               clipping; spikes: norms above 10 times the median of the 50 before. train_seconds: processor time of the
               training loop; step_ms: of an acting step of 24 runs side by side, in milliseconds. saved_mb: what an update
               keeps for its backward pass, weights left out; saved_row_kb: the same per row
curves.csv     mean return of the held-out tasks over in-context episodes, as a share of the optimum
retention.csv  after half a history in context, J episodes in which nobody moves or is rewarded, then one episode: its return
               as a share of the optimum, over the runs whose last three episodes were above 0.6, of which there are `runs`
"""

import argparse
import copy
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("speed", "tools")]
from tables import read_rows, write_rows  # noqa: E402
from timing import ROOT, load_script  # noqa: E402

GAPS = 0, 1, 2, 3, 4, 6, 8, 12


def train(script, flags, folder):
    """Runs a script in a process of its own, unless it has finished there; returns (run directory, processor seconds)."""
    log = folder / "log.txt"
    if not list(folder.glob("runs/*/model.pt")):
        folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(log, "w") as out:
            command = [sys.executable, ROOT / script, *flags, "--eval-runs", "0"]
            subprocess.run(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, check=True)
    seconds = float(re.search(r"([\d.]+) of CPU", log.read_text())[1])
    return sorted(folder.glob("runs/*/model.pt"))[-1].parent, seconds


def load_agent(run):
    """(the script's module, its arguments, the agent) of a run's directory."""
    saved = torch.load(run / "model.pt", weights_only=True)
    module = load_script(ROOT / "single_files" / f"{saved['args']['exp_name']}.py")
    args = module.Args(**saved["args"])
    agent = module.Agent(args)
    agent.load_state_dict(saved["agent"])
    return module, args, agent


def training_figures(run):
    """What the log says about the loss and the gradient."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    above, norms = (np.array([e.value for e in events.Scalars(f"losses/{n}")]) for n in ("above_floor", "grad_norm"))
    smooth = np.convolve(above, np.ones(20) / 20, "valid")
    reached = np.flatnonzero(smooth <= 0.1)
    spikes = sum(norms[i] > 10 * np.median(norms[max(0, i - 50) : i]) for i in range(10, len(norms)))
    figures = {"above_floor": above[-50:].mean(), "updates_to_floor": reached[0] + 20 if len(reached) else ""}
    figures |= {f"grad_{p}": np.percentile(norms, p) for p in (50, 95, 99, 100)}
    return figures | {"spikes": int(spikes)}


def saved_bytes(module, args, agent):
    """(bytes that an update keeps for its backward pass, without the weights; rows of that update)."""
    window = module.check_memory(args)
    tasks = module.make_tasks(args)[0]
    streams = args.batch_rows // window
    tasks = tasks[np.arange(streams) % len(tasks)]
    rows = module.learning_histories(args, tasks, np.random.default_rng(0))[0]
    rows = module.Rows(*(column[:, :window] for column in rows))
    own = {p.untyped_storage().data_ptr() for p in agent.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, _ = agent(rows, torch.zeros(streams, dtype=torch.bool), agent.initial_memory(streams))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.target.flatten(), ignore_index=-1)
    del loss
    return sum(kept.values()), streams * window


def in_context(module, args, agent, runs, temperature, tasks):
    """(returns [tasks, runs, episodes], optimum [tasks], random moves [tasks])"""
    rooms = module.Rooms(args, np.repeat(tasks, runs, 0))
    number, generator = len(rooms.tasks), torch.Generator().manual_seed(args.seed)
    temperatures = torch.full((number,), temperature)
    returns, _ = module.play(agent, rooms, agent.initial_state(number), range(args.episodes), temperatures, generator)
    best, chance = (module.Rooms(args, tasks).expected_returns(choose) for choose in (np.max, np.mean))
    return returns.reshape(len(tasks), runs, -1), best, chance


def step_milliseconds(module, args, agent, runs=24):
    """Processor time of an acting step of so many runs side by side, the mean over one whole history."""
    tasks = np.resize(module.make_tasks(args)[0], (runs, module.make_tasks(args)[0].shape[1]))
    history = module.learning_histories(args, tasks, np.random.default_rng(0))[0]
    rows = [module.Rows(*(column[:, t] for column in history)) for t in range(history.cell.shape[1])]
    state, began = agent.initial_state(runs), time.process_time()
    for row in rows:
        _, state = agent.step(row, state)
    return 1e3 * (time.process_time() - began) / len(rows)


def retention(module, args, agent, runs, tasks):
    """{J: (return after J episodes of standing still as a share of the optimum, runs that it is of)}"""
    rooms = module.Rooms(args, np.repeat(tasks, runs, 0))
    best, number = rooms.expected_returns(np.max), len(rooms.tasks)
    generator, temperature = torch.Generator().manual_seed(args.seed), torch.full((number,), 0.5)
    learned = args.episodes // 2  # and no episode has a number that training does not know
    returns, state = module.play(agent, rooms, agent.initial_state(number), range(learned), temperature, generator)
    good, found, episode = returns[:, -3:].mean(1) > 0.6 * best, {}, learned
    for gap in (gap for gap in GAPS if learned + gap < args.episodes):
        if still := range(episode, learned + gap):
            _, state = module.play(agent, rooms, state, still, temperature, generator, still=True)
        episode = learned + gap
        after, _ = module.play(agent, rooms, copy.deepcopy(state), range(episode, episode + 1), temperature, generator)
        found[gap] = (after[good, 0] / best[good]).mean() if good.any() else np.nan, int(good.sum())
    return found


def measure(run):
    """(figures for the summary, shares of the optimum by episode, retention) of a trained model."""
    torch.set_num_threads(1)
    module, args, agent = load_agent(run)
    train_tasks, test = module.make_tasks(args)
    test = test[:24]
    figures = {"weights": sum(p.numel() for p in agent.parameters())}
    for temperature in (1.0, 0.5):
        returns, best, chance = in_context(module, args, agent, 4, temperature, test)
        last = max(1, round(args.episodes / 10))
        figures[f"icl_{temperature:g}"] = module.in_context_learning(returns.reshape(-1, args.episodes), best, chance)
        figures[f"return_{temperature:g}"] = returns[..., -last:].mean()
        if temperature == 1:
            curve = returns.mean((0, 1)) / best.mean()
    figures["worst_0.5"] = (returns[..., -last:].mean((1, 2)) / best).min()
    train_returns, train_best, train_chance = in_context(module, args, agent, 4, 0.5, train_tasks[: len(test)])
    flat = train_returns.reshape(-1, args.episodes)
    figures["icl_train_0.5"] = module.in_context_learning(flat, train_best, train_chance)
    figures["step_ms"] = step_milliseconds(module, args, agent)
    size, rows = saved_bytes(module, args, agent)
    figures |= {"optimum": best.mean(), "random": chance.mean(), "saved_mb": size / 1e6, "saved_row_kb": size / rows / 1e3}
    curves = {1: curve, 0.5: returns.mean((0, 1)) / best.mean()}
    return figures | training_figures(run), curves, retention(module, args, agent, 4, test)


def short(value):
    return float(f"{value:.4g}") if isinstance(value, (float, np.floating)) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmark" / "results" / "in_context", help="folder of the CSV files"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "in_context", help="folder of the runs")
    args = parser.parse_args()
    for line in filter(str.strip, sys.stdin):
        arm, _, command = line.strip().partition(": ")
        script, *flags = shlex.split(command)
        key = f"{Path(script).stem}__{hashlib.sha256(command.encode()).hexdigest()[:8]}"
        names = "summary", "curves", "retention"
        tables = {n: read_rows(path)[0] if (path := args.out / f"{n}.csv").exists() else [] for n in names}
        if any(row["key"] == key for row in tables["summary"]):
            continue
        run, seconds = train(script, flags, args.runs / key)
        figures, curves, kept = measure(run)
        own = torch.load(run / "model.pt", weights_only=True)["args"]
        head = {"key": key, "arm": arm, "env_id": own["env_id"], "room_size": own["room_size"], "seed": own["seed"]}
        row = head | {"updates": own["total_updates"], "train_seconds": seconds} | figures
        row = {name: short(value) for name, value in row.items()} | {"command": f"python {command}"}
        tables["summary"].append(row)
        for temperature, curve in curves.items():
            point = head | {"temperature": temperature}
            tables["curves"] += [point | {"episode": i, "share": short(share)} for i, share in enumerate(curve)]
        tables["retention"] += [head | {"gap": j, "share": short(s), "runs": n} for j, (s, n) in kept.items()]
        for name, rows in tables.items():
            write_rows(args.out / f"{name}.csv", rows)
        print(f"{arm}, {own['env_id']}, seed {own['seed']}: {row['icl_1']} and {row['icl_0.5']}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
