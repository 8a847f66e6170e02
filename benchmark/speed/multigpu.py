"""How much faster are several processes of ppo_tbb_lru_multigpu.py than one, if each has as many environments as that one?

    python benchmark/speed/multigpu.py                     # one and two processes, in turn; writes multigpu.csv
    python benchmark/speed/multigpu.py --processes 1 2 4   # a core for each; with --cuda a card for each

steps_per_second   environment steps of all processes together, of the script's own clock, without start and evaluation
cpu_ms             processor time per 1,000 steps, of all processes together
messages           share of the time that processes spend in torch.distributed, where they also wait for each other
messages_cpu       the same share of the processor time, which a busy machine does not change
Bar: two processes make at least 1.7 times the steps per second of one. That needs cores that nobody else uses. The bar by
processor time says what idle cores would give at best: each process alone on its core, and no time lost by waiting.
"""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import ROOT, device_name, print_bars, print_table, write_csv

SCRIPT = ROOT / "single_files" / "ppo_tbb_lru_multigpu.py"
CALLS = "all_gather", "all_reduce", "barrier", "broadcast_object_list"


def worker(file, flags):
    """One process of torchrun: the script as it is, with a clock around each message; from the first to the last of them."""
    import torch.distributed as dist

    spent = {"wall": 0.0, "cpu": 0.0, "messages": 0, "began": None}

    def timed(call):
        def wrapped(*args, **kwargs):
            began = time.perf_counter(), time.process_time()
            if call.__name__ == "all_gather":
                spent["began"] = spent["began"] or began  # the loop over rollouts begins with one
            out = call(*args, **kwargs)
            spent["wall"] += time.perf_counter() - began[0]
            spent["cpu"] += time.process_time() - began[1]
            spent["messages"] += 1
            return out

        return wrapped

    def ended(call=dist.destroy_process_group):
        wall, cpu = time.perf_counter() - spent["began"][0], time.process_time() - spent["began"][1]
        row = {"wall": wall, "cpu": cpu, "messages": spent["messages"]}
        row |= {"messages_wall": spent["wall"], "messages_cpu": spent["cpu"]}
        Path(f"{file}-{dist.get_rank()}").write_text(json.dumps(row))
        call()

    for name in CALLS:
        setattr(dist, name, timed(getattr(dist, name)))
    dist.destroy_process_group = ended
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def measure(processes, args):
    """A row of the table: one run."""
    envs, steps = args.num_envs * processes, args.steps * processes
    flags = f"--num-envs {envs} --total-timesteps {steps} --eval-episodes 0 --checkpoint-interval 0".split()
    flags += ["--cuda"] * args.cuda
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command += [__file__, "--worker", Path(folder) / "spent", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])}
        done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{processes} processes: torchrun ended with {done.returncode}\n{done.stderr[-2000:]}")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("spent-*"))]
    trained, seconds = re.search(r"trained for ([\d,]+) steps, ([\d.]+) seconds", done.stdout).groups()
    trained, cpu = int(trained.replace(",", "")), sum(row["cpu"] for row in found)
    return {
        "processes": processes,
        "steps": trained,
        "steps_per_second": trained / float(seconds),
        "cpu_ms": 1e6 * cpu / trained,
        "messages": sum(row["messages_wall"] for row in found) / sum(row["wall"] for row in found),
        "messages_cpu": sum(row["messages_cpu"] for row in found) / cpu,
        "number": found[0]["messages"],
    }


def parse_args():
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, in turn (1 2)")
    out.add_argument("--rounds", type=int, default=3, help="runs of each (3)")
    out.add_argument("--steps", type=int, default=66_560, help="environment steps of each process in a run (66560)")
    out.add_argument("--num-envs", type=int, default=64, help="environments of each process (64)")
    out.add_argument("--cuda", action="store_true", help="a card for each process")
    out.add_argument("--out", default=str(ROOT / "benchmark" / "results" / "machines" / "mine"), help="folder of the CSV file")
    return out.parse_args()


def main(args):
    cores = len(os.sched_getaffinity(0))
    if max(args.processes) > cores:
        print(f"{max(args.processes)} processes on {cores} cores: they share cores, so the bar means little")
    load = os.getloadavg()[0]
    where = f"device: {device_name('cuda' if args.cuda else 'cpu')}; cores: {cores}; load when it began: {load:.1f}"
    print(where)
    rows = []
    for _ in range(args.rounds):
        for processes in args.processes:
            rows.append(measure(processes, args))
            write_csv("multigpu", where, rows, args)
    print_table(rows)

    def of(processes, column):
        values = [row[column] for row in rows if row["processes"] == processes]
        return np.array(values or [np.nan])

    bars = []
    for processes in (n for n in args.processes if n > 1):
        fast, slow = of(processes, "steps_per_second"), of(1, "steps_per_second")
        figure = float(np.median(fast) / np.median(slow)), float(fast.max() / slow.max())
        wanted = 0.85 * processes
        bars.append((f"{processes} processes: times the steps per second of one", ">=", wanted, figure))
        dear, cheap = of(processes, "cpu_ms"), of(1, "cpu_ms")
        figure = float(processes * np.median(cheap) / np.median(dear)), float(processes * cheap.min() / dear.min())
        bars.append((f"{processes} processes: the same by processor time, at best", ">=", wanted, figure))
    print_bars(bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main(parse_args())
