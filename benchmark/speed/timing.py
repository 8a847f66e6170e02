"""What the benchmarks share: one core, contenders in turn, tables, CSV files. Import it first, before torch and jax."""

import argparse
import csv
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed
WITHOUT_JAX = 'rows of jax are left out; to have them: pip install "cleanrl-memoroid[bench]"'


def parser(description, threads=1, rounds=15, seconds=3.0):
    """An argument parser with the flags that every benchmark has."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("--threads", type=int, default=threads, help="cores to run on, and threads of each library")
    out.add_argument("--rounds", type=int, default=rounds, help="least number of turns of each contender")
    out.add_argument(
        "--seconds", type=float, default=seconds, help="turns go on for this long per group of contenders (seconds)"
    )
    clock = "count this process's processor time, not time on the wall: leaves out what others had of a shared core"
    out.add_argument("--cpu-time", action="store_true", help=f"{clock}; with one thread only")
    results = ROOT / "benchmark" / "results" / "machines" / "mine"
    out.add_argument("--out", default=str(results), help="folder of the CSV file, named after the machine")
    return out


def set_up(args):
    """Pins the process, limits every library to args.threads, calls tune_cpu. Returns a line that says where this runs."""
    if args.cpu_time and args.threads != 1:
        raise SystemExit("--cpu-time: expected --threads 1, since the time of several threads adds up; drop one of the two")
    cores = "not pinned"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
        cores = f"pinned to {len(os.sched_getaffinity(0))}"
    os.environ |= {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    if args.threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import torch

    from cleanrl_memoroid.scan import tune_cpu

    torch.set_num_threads(args.threads)
    tuned = "+".join(tune_cpu()) or "none"
    packages = [name for name in ("torch", "numba", "jax", "triton", "gymnasium", "popgym") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    clock = "processor" if args.cpu_time else "wall"
    return (
        f"device: {device_name(getattr(args, 'device', 'cpu'))}; threads: {args.threads}, {cores}; clock: {clock}; "
        f"tune_cpu: {tuned}; python {platform.python_version()}, {versions}"
    )


def device_name(device):
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def load_script(path):
    """A training script as a module; what stands under its __main__ does not run."""
    spec = importlib.util.spec_from_file_location("script", path)
    sys.modules["script"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OwnProcess:
    """A baseline in a process of its own, as its users run it: `tune_cpu` would speed it up too. It measures itself.

    The process runs `module.function(*args, **kwargs)`, which makes the call to be timed; it shares this one's cores.
    """

    def __init__(self, module, function, *args, **kwargs):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, module, function, args, kwargs), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies leaves an EOFError, and no endless wait
        self.inputs = self.pipe.recv()  # arrives once the call is compiled

    def __call__(self):
        """What the call returns."""
        self.pipe.send("result")
        return self.pipe.recv()

    def timed(self, cpu_time=False):
        """Milliseconds of one call."""
        self.pipe.send("cpu" if cpu_time else "wall")
        return self.pipe.recv()

    def close(self):
        self.process.terminate()


def _serve(pipe, module, function, args, kwargs):
    call = getattr(importlib.import_module(module), function)(*args, **kwargs)
    pipe.send(getattr(call, "inputs", None))
    while True:
        try:
            wish = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        if wish == "result":
            pipe.send(call())
        else:
            clock = time.process_time_ns if wish == "cpu" else time.perf_counter_ns
            begin = clock()
            call()
            pipe.send((clock() - begin) / 1e6)


def interleave(calls, args):
    """Times of every contender in milliseconds, {name: array}.

    Round after round, each has a turn, so that whatever else the machine does hits all alike. A turn is 5 ms of calls that are
    not counted, one at least, which bring its data into the cache after the others', as it is when a program does nothing else
    (left out if a call takes 0.2 s or more), then 5 ms or three calls.
    """
    clock = time.process_time_ns if args.cpu_time else time.perf_counter_ns
    times = {name: [] for name in calls}

    def once(call):
        if isinstance(call, OwnProcess):
            return call.timed(args.cpu_time)
        begin = clock()
        call()
        return (clock() - begin) / 1e6

    begin, turn = time.perf_counter(), 0
    while turn < args.rounds or time.perf_counter() - begin < args.seconds:
        for name, call in calls.items():
            uncounted = 0.0
            while uncounted < 5 and (turn == 0 or np.median(times[name]) < 200):
                uncounted += once(call)
            spent, calls_made = 0.0, 0
            while spent < 5 or (calls_made < 3 and spent < 50):
                times[name].append(once(call))
                spent, calls_made = spent + times[name][-1], calls_made + 1
            if isinstance(call, OwnProcess):
                time.sleep(0.03)  # its threads spin and free memory after a call, for milliseconds and on the same core
        turn += 1
    return {name: np.array(values) for name, values in times.items()}


def ratio(times, above, below):
    """How many times longer `above` takes than `below`: by medians, and by minima. (nan, nan) if one was not run."""
    if above not in times or below not in times:
        return np.nan, np.nan
    return float(np.median(times[above]) / np.median(times[below])), float(times[above].min() / times[below].min())


def cell(value):
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def print_table(rows, title=""):
    """Rows are dicts; columns stand in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    texts = [[line[i] for line in lines[1:] if line[i]] for i in range(len(names))]
    left = [any(text[0].isalpha() and text != "nan" for text in column) for column in texts]
    print(f"\n{title}" if title else "")
    for line in lines:
        print("  ".join(v.ljust(w) if is_left else v.rjust(w) for v, w, is_left in zip(line, widths, left)).rstrip())
    sys.stdout.flush()


def print_bars(bars):
    """Bars are (text, "<=" or ">=", wanted, (figure by medians, figure by minima))."""
    rows = []
    for text, sign, wanted, (figure, by_minima) in bars:
        met = figure <= wanted if sign == "<=" else figure >= wanted
        verdict = "not measured" if np.isnan(figure) else "met" if met else "missed"
        rows.append(
            {"bar": text, "wanted": f"{sign} {wanted:g}", "figure": figure, "by minima": by_minima, "verdict": verdict}
        )
    print_table(rows, "bars")


def write_csv(name, where, rows, args):
    """name.csv in --out; a comment line says where it ran. Written under another name first: a reader finds it whole."""
    path = Path(args.out) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.write(f"# {where}\n")
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for row in rows:
            texts = {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()}
            writer.writerow({key: "" if v == "nan" else v for key, v in texts.items()})
    os.replace(partial, path)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(f"written to {shown}")
