"""Runs a grid: each line of the standard input is a run; waits for all, and goes on where an earlier start was stopped.

    printf '%s\n' "single_files/dqn_tbb_"{ffm,lru}".py --env-id popgym-RepeatFirstEasy-v0 --seed "{1,2} |
        python benchmark/tools/run.py --name first --workers 2

A line is `[ARM:] SCRIPT FLAGS`: ARM names the run in pictures and tables (default: the script's name), SCRIPT is a path below
the repository, FLAGS hold at least --env-id and --seed, quoted as in a shell. Runs are started in the order of the lines.

Each has a folder runs/grids/NAME/KEY with record.json (what ran, on what, how it ended), log.txt (what it printed) and its
TensorBoard folder. Whoever works on a run holds the lock of its folder, so several runners may share a grid. Started again, a
grid does what is missing: a run that was stopped goes on with --resume from its checkpoint, if it has one and the commit is
the same, and anew otherwise. A failed run stays failed until --retry-failed. The exit status is 1 if one failed.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from timing import ROOT, device_name

PACKAGES = ("torch", "numpy", "numba", "gymnasium", "popgym", "stable-baselines3", "sb3-contrib")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
GRACE = 10  # seconds a stopped run has to end by itself
ERROR_LINES = 20  # of a failed run's log, kept in its record


class Active(NamedTuple):
    """A run at work: its process, the open file that holds its lock, its record, when it was started (monotonic seconds)."""

    process: subprocess.Popen
    lock: object
    record: dict
    since: float


def flag(flags, name):
    """The value of --name among a command's flags, or None."""
    for here, after in zip(flags, [*flags[1:], None]):
        if here == f"--{name}":
            return after
        if here.startswith(f"--{name}="):
            return here.split("=", 1)[1]
    return None


def env_kwargs(flags):
    """What stands behind --env-kwargs among a command's flags, `k 10 num_decks 2`, as JSON: {"k":10,"num_decks":2}."""
    behind = flags[flags.index("--env-kwargs") + 1 :] if "--env-kwargs" in flags else []
    words = [json.loads(w.lower()) if re.fullmatch(r"True|False|-?\d+(\.\d+)?", w) else w for w in behind]
    end = next((i for i, word in enumerate(behind) if word.startswith("--")), len(behind))
    return json.dumps(dict(zip(words[:end:2], words[1:end:2])), separators=(",", ":"))


def parse_line(line, root):
    """The record of a run that nobody has started yet, from `[ARM:] SCRIPT FLAGS`. Raises ValueError."""
    label, colon, rest = line.partition(": ")
    arm, rest = (label.strip(), rest) if colon and ".py" not in label else ("", line)
    script, *flags = shlex.split(rest)
    if not (root / script).is_file():
        raise ValueError(f"line {line!r}: expected a script below {root}, got {script!r}; see `ls single_files`")
    env_id, seed, steps = (flag(flags, name) for name in ("env-id", "seed", "total-timesteps"))
    if not env_id or not (seed or "").isdigit():
        raise ValueError(
            f"line {line!r}: expected --env-id ID and --seed NUMBER, got {env_id} and {seed}; a run is named by both"
        )
    arm = arm or Path(script).stem
    short = hashlib.sha256(json.dumps([script, *flags]).encode()).hexdigest()[:8]
    names = (Path(script).stem, env_id, arm, seed, short)
    return {
        "grid": "",
        "key": "__".join(re.sub(r"[^\w.=-]+", "-", name).strip("-") for name in names),
        "script": script,
        "arm": arm,
        "env_id": env_id,
        "env_kwargs": env_kwargs(flags),
        "seed": int(seed),
        "total_timesteps": int(steps.replace("_", "")) if steps else None,
        "flags": flags,
        "command": ["python", script, *flags],  # from the repository's root
        "state": "waiting",
        "seconds": 0.0,  # of the process, from start to end, all its pieces together
        "cpu_seconds": 0.0,  # processor time of the same: what `seconds` hides on a busy machine
        **dict.fromkeys("commit dirty versions device workers started resumed exit_status error folder".split()),
    }


def read_record(folder):
    return json.loads((folder / "record.json").read_text())


def write_record(folder, record):
    partial = folder / f"record.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(folder / "record.json")


def lock(folder):
    """The open lock file of a run's folder, or None if someone else holds it. Ends with its holder, however that ends."""
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def register(root, name, records):
    """Makes the folders of runs that are new, and returns those of all, in the order of the lines."""
    folders = []
    for record in records:
        folder = root / "runs" / "grids" / name / record["key"]
        if folder in folders:
            raise ValueError(f"line {shlex.join(record['command'])!r}: expected each run once, got it twice; drop one")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "record.json").exists() and (held := lock(folder)):
            with held:
                if not (folder / "record.json").exists():  # still: another runner may have been here before the lock
                    write_record(folder, record | {"grid": name})
        folders.append(folder)
    return folders


def now():
    return datetime.now(timezone.utc).isoformat()


def code_version(root):
    """(commit, are there Python files that differ from it), or (None, None) outside of git."""
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True)
    return (commit.stdout.strip(), bool(changed.stdout.strip())) if commit.returncode == 0 else (None, None)


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def is_over(record, retry_since=None):
    """Is nothing left to do? With `retry_since`, failures of before that time are to be tried again, once."""
    again = record["state"] == "failed" and retry_since is not None and record["started"] < retry_since
    return record["state"] in ("done", "failed") and not again


def die_with_parent():
    """In the child, on Linux: a runner that is killed outright cannot stop its runs, so the kernel does."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(root, folder, held, workers):
    """Starts a run, or goes on with it; the caller holds its lock. Returns it as Active."""
    record = read_record(folder)
    commit, dirty = code_version(root)
    saved = sorted(folder.glob("runs/*/checkpoint.pt"))
    log = folder / "log.txt"
    if saved and record["state"] != "failed" and record["commit"] == commit:
        if record["state"] == "running":  # its runner was killed and could not add its time: until its last sign of life
            since = datetime.fromisoformat(record["resumed"] or record["started"]).timestamp()
            record["seconds"] += max(0.0, max(log.stat().st_mtime, saved[-1].stat().st_mtime) - since)
        flags = [*record["flags"], "--resume", str(saved[-1].parent.relative_to(folder))]
        record["resumed"] = now()
    else:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        flags = record["flags"]
        record |= {"started": now(), "resumed": None, "seconds": 0.0, "cpu_seconds": 0.0}
    device = "cuda" if "--cuda" in record["flags"] else "cpu"
    record |= {"state": "running", "error": None, "exit_status": None, "commit": commit, "dirty": dirty, "workers": workers}
    record |= {"versions": versions(), "device": f"{device_name(device)}, {os.cpu_count()} CPU cores"}
    write_record(folder, record)
    paths = [root, *(os.path.abspath(path) for path in os.getenv("PYTHONPATH", "").split(os.pathsep) if path)]
    with open(log, "a") as out:
        out.write(f"--- {now()} {shlex.join(['python', record['script'], *flags])}\n")
        out.flush()
        process = subprocess.Popen(
            [sys.executable, str(root / record["script"]), *flags],
            cwd=folder,  # where it writes runs/RUN
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=[held.fileno()],  # the lock lives as long as the run, also where that outlives its runner
            start_new_session=True,  # a Ctrl-C in the terminal is for the runner alone
            preexec_fn=die_with_parent,
        )
    return Active(process, held, record, time.monotonic())


def has_ended(run):
    """Has its process ended? If so, adds its processor time to the record."""
    if run.process.returncode is None:
        pid, status, usage = os.wait4(run.process.pid, os.WNOHANG)  # as Popen.poll, which throws the usage away
        if pid:
            run.process.returncode = os.waitstatus_to_exitcode(status)
            run.record["cpu_seconds"] = round(run.record["cpu_seconds"] + usage.ru_utime + usage.ru_stime, 2)
    return run.process.returncode is not None


def finish(root, folder, run, stopped=False):
    """Writes how a run ended, after its process has, and releases it. `stopped`: by us, so that it can go on later."""
    record, status = run.record, run.process.returncode
    folders = sorted(folder.glob("runs/*/"))
    record |= {
        "seconds": round(record["seconds"] + time.monotonic() - run.since, 2),
        "exit_status": None if stopped else status,
        "state": "waiting" if stopped else "failed" if status else "done",
        "folder": str(folders[-1].relative_to(root)) if folders else None,
    }
    if record["state"] == "failed":
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()[-ERROR_LINES:]
        killed = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        record["error"] = "\n".join([*lines, killed])
    write_record(folder, record)
    run.lock.close()
    return record


def stop(root, active):
    """Ends runs, and notes that they are to be continued."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for run in active.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, sent)
        until = time.monotonic() + GRACE
        while not all([has_ended(run) for run in active.values()]) and time.monotonic() < until:
            time.sleep(0.05)
    for folder, run in active.items():
        finish(root, folder, run, stopped=run.process.returncode != 0)


def outlook(folders):
    """How many runs are at work, whoever started them, and when all will have ended, in words.

    A run is expected to take as long as those that are done in the same cell by the same script, or else as any.
    """
    records, taken, seconds = [read_record(folder) for folder in folders], defaultdict(list), 0.0
    cells = [(r["script"], r["env_id"], r["env_kwargs"], r["total_timesteps"]) for r in records]
    for r, cell in zip(records, cells):
        for group in (cell, ()) if r["state"] == "done" else ():
            taken[group].append(r["seconds"])
    running = sum(r["state"] == "running" for r in records)
    if not taken:
        return f"{running} running, time left unknown"
    for r, cell in zip(records, cells):
        if r["state"] in ("running", "waiting"):
            known, since = taken.get(cell, taken[()]), r["resumed"] or r["started"]
            spent = time.time() - datetime.fromisoformat(since).timestamp() if r["state"] == "running" else 0.0
            seconds += max(0.0, sum(known) / len(known) - r["seconds"] - spent)
    hours, minutes = divmod(round(seconds / max(1, running) / 60), 60)
    return f"{running} running, " + (f"{hours} h {minutes:02} min left" if hours else f"{minutes} min left")


class Progress:
    """A line for each run that starts or ends; in a terminal, also a bar."""

    def __init__(self, folders):
        self.folders, self.over = folders, 0
        form = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
        self.bar = tqdm(total=len(folders), desc="runs", bar_format=form, disable=not sys.stderr.isatty())

    def tell(self, record):
        ended = is_over(record)
        self.over += ended
        self.bar.update(ended)
        rest = outlook(self.folders) if self.over < len(self.folders) else "all ended"
        took = f" in {record['seconds']:.0f} s" if ended else ""
        self.bar.set_postfix_str(rest)
        self.bar.write(f"[{self.over}/{len(self.folders)}] {record['state']}{took}: {record['key']}; {rest}")
        sys.stdout.flush()


def run_here(root, folders, workers, retry_since):
    """Runs what is left on this machine, `workers` at a time; waits also for what another runner is at."""
    pending, active, progress = list(folders), {}, Progress(folders)
    try:
        while pending or active:
            for folder in list(pending):
                if len(active) < workers and (held := lock(folder)):
                    pending.remove(folder)
                    record = read_record(folder)
                    if is_over(record, retry_since):
                        held.close()
                    else:
                        active[folder] = start(root, folder, held, workers)
                        record = active[folder].record
                    progress.tell(record)
            for folder, run in list(active.items()):
                if has_ended(run):
                    del active[folder]
                    progress.tell(finish(root, folder, run))
            time.sleep(0.1)
    finally:
        for sent in (signal.SIGINT, signal.SIGTERM):  # a second one would leave runs behind
            signal.signal(sent, signal.SIG_IGN)
        stop(root, active)
        progress.bar.close()


def run_jobs(root, folders, cluster, workers, parameters, retry_since):
    """Runs what is left as one array of jobs through submitit, and waits for them; `workers` is the most at a time."""
    import submitit

    progress, todo, grid = Progress(folders), [], folders[0].parent
    for folder in folders:
        if is_over(record := read_record(folder), retry_since):
            progress.tell(record)
        else:
            todo.append(folder)
    if not todo:
        return
    executor = submitit.AutoExecutor(folder=grid / "jobs", cluster=cluster)
    limits = {"timeout_min": 24 * 60, "cpus_per_task": 1, "mem_gb": 4, "name": grid.name}
    executor.update_parameters(**limits | {"slurm_array_parallelism": workers} | parameters)
    command = [sys.executable, str(Path(__file__).resolve()), "--root", str(root), "--name", grid.name]
    command += ["--retry-failed"] if retry_since else []
    with executor.batch():
        submitted = [executor.submit(submitit.helpers.CommandFunction([*command, "--job", folder.name])) for folder in todo]
    jobs = dict(zip(todo, submitted))
    print(f"submitted {len(jobs)} jobs; their own logs are in {executor.folder}", flush=True)
    try:
        while jobs:
            for folder, job in list(jobs.items()):
                if job.done():
                    del jobs[folder]
                    progress.tell(read_record(folder))
                    if not is_over(read_record(folder)):  # a time limit, a node that went down
                        print(f"job {job.job_id} ended before its run, see {job.paths.stderr}", flush=True)
            time.sleep(0.5)
    finally:
        for job in jobs.values():
            job.cancel()
        progress.bar.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the grid, a folder below runs/grids")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--retry-failed", action="store_true", help="start failed runs anew")
    parser.add_argument("--slurm", nargs="*", metavar="KEY=VALUE", help="as a Slurm job array, with submitit's parameters")
    parser.add_argument("--cluster", default="slurm", help="submitit's executor for --slurm; `local` needs no Slurm")
    parser.add_argument("--job", metavar="KEY", help="only this run of a grid that exists: what a job of --slurm does")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise SystemExit(f"--name: expected letters, digits, `_`, `-` and `.`, got {args.name!r}; it names a folder")
    if args.workers < 1:
        raise SystemExit(f"--workers: expected at least 1, got {args.workers}; raise it")
    root = args.root.resolve()
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: a shell's background jobs would ignore it
        signal.signal(sent, lambda number, _: sys.exit(128 + number))
    retry_since = now() if args.retry_failed else None
    if args.job:
        folder = root / "runs" / "grids" / args.name / args.job
        run_here(root, [folder], 1, retry_since)
        sys.exit(read_record(folder)["state"] != "done")
    try:
        lines = [line.strip() for line in sys.stdin]
        records = [parse_line(line, root) for line in lines if line and not line.startswith("#")]
        if not records:
            raise ValueError("standard input: expected a run per line, got none; see --help")
        folders = register(root, args.name, records)
        parameters = {}
        for pair in args.slurm or []:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(
                    f"--slurm: expected KEY=VALUE, got {pair!r}; as in --slurm slurm_partition=cpu timeout_min=60"
                )
            parameters[key] = int(value) if value.isdigit() else value
    except ValueError as error:
        raise SystemExit(f"run.py: {error}") from None
    if args.slurm is None:
        run_here(root, folders, args.workers, retry_since)
    else:
        run_jobs(root, folders, args.cluster, args.workers, parameters, retry_since)
    ended = [(folder, read_record(folder)) for folder in folders]
    for folder, record in ended:
        if record["state"] != "done":
            print(f"{record['state']}: {shlex.join(record['command'])}\n{record['error'] or ''}\nlog: {folder / 'log.txt'}\n")
    done = sum(record["state"] == "done" for _, record in ended)
    print(f"{args.name}: {done} of {len(ended)} runs done" + (f", {len(ended) - done} not" if done < len(ended) else ""))
    sys.exit(0 if done == len(ended) else 1)


if __name__ == "__main__":
    main()
