"""benchmark/tools/run.py with scripts that take no time: what is run, what is not run again, what fails, who stops whom."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT
from scripts import run_folder, scalars

# writes a line per start and per step; steps last --pause seconds; --resume goes on behind the last step saved
SCRIPT = """
import argparse, os, pathlib, time
parser = argparse.ArgumentParser()
for name in ("--env-id", "--resume"):
    parser.add_argument(name)
parser.add_argument("--env-kwargs", nargs="*")
for name in ("--seed", "--total-timesteps"):
    parser.add_argument(name, type=int, default=3)
parser.add_argument("--pause", type=float, default=0.0)
args = parser.parse_args()
here = pathlib.Path.cwd()
with open(here / "starts", "a") as file:
    file.write(f"{os.getpid()} {args.resume}\\n")
if args.resume:
    seed, pause, steps, saved = (here / args.resume / "checkpoint.pt").read_text().split()
    args.seed, args.pause, args.total_timesteps, first = int(seed), float(pause), int(steps), int(saved) + 1
else:
    first = 0
run = here / (args.resume or "runs/run")
run.mkdir(parents=True, exist_ok=True)
for step in range(first, args.total_timesteps):
    with open(here / "steps", "a") as file:
        file.write(f"{step}\\n")
    (run / "partial").write_text(f"{args.seed} {args.pause} {args.total_timesteps} {step}")
    (run / "partial").replace(run / "checkpoint.pt")
    time.sleep(args.pause)
if args.seed == 13:
    raise SystemExit("planted failure")
print("finished")
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "fake.py").write_text(SCRIPT)
    return tmp_path


def lines(seeds, **flags):
    rest = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
    return "".join(f"fake.py --env-id fake-v0 --seed {seed} {rest}\n" for seed in seeds)


def start(root, text, *flags):
    command = [sys.executable, ROOT / "benchmark" / "tools" / "run.py", "--name", "grid", "--root", root, *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process.stdin.write(text)
    process.stdin.close()
    process.stdin = None
    return process


def run(root, text, *flags):
    process = start(root, text, *flags)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def records(root):
    found = [json.loads(path.read_text()) for path in root.glob("runs/grids/grid/*/record.json")]
    return {record["seed"]: record for record in found}


def rows(root, record, name):
    return (root / "runs" / "grids" / "grid" / record["key"] / name).read_text().splitlines()


def wait_until(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def seeds_at_work(root):
    """Of the runs that have saved a step."""
    saved = {path.parents[2].name for path in root.glob("runs/grids/grid/*/runs/run/checkpoint.pt")}
    return [seed for seed, record in records(root).items() if record["state"] == "running" and record["key"] in saved]


def steps(root, record):
    path = root / "runs" / "grids" / "grid" / record["key"] / "steps"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_records_what_ran_and_how_it_ended(root):
    text = "some, arm: fake.py --env-id fake-v0 --env-kwargs k 1 rate 0.5 wide True name an_id --seed 2\n"
    status, out = run(root, text, "--workers", "2")
    record = records(root)[2]
    assert status == 0 and "1 of 1 runs done" in out
    assert record["grid"] == "grid" and record["arm"] == "some, arm" and record["env_id"] == "fake-v0"
    assert record["command"][:6] == ["python", "fake.py", "--env-id", "fake-v0", "--env-kwargs", "k"]
    assert record["script"] == "fake.py" and record["flags"] == record["command"][2:]
    assert record["env_kwargs"] == '{"k":1,"rate":0.5,"wide":true,"name":"an_id"}' and record["total_timesteps"] is None
    assert record["state"] == "done" and record["exit_status"] == 0 and record["error"] is None and record["workers"] == 2
    assert record["versions"]["torch"] and record["device"] and record["started"].endswith("+00:00")
    assert 0 < record["cpu_seconds"] < record["seconds"] < 30
    assert (root / record["folder"]).is_dir() and not os.path.isabs(record["folder"])
    assert rows(root, record, "log.txt")[-1] == "finished"


def test_a_failure_is_seen_and_kept_and_the_others_complete(root):
    status, out = run(root, lines([12, 13, 14]))
    found = records(root)
    assert status == 1 and "2 of 3 runs done, 1 not" in out and "planted failure" in out
    assert {seed: record["state"] for seed, record in found.items()} == {12: "done", 13: "failed", 14: "done"}
    assert found[13]["exit_status"] == 1 and "planted failure" in found[13]["error"]
    assert "planted failure" in rows(root, found[13], "log.txt")

    assert run(root, lines([12, 13, 14]))[0] == 1  # it neither vanishes nor is tried again
    assert len(rows(root, found[13], "starts")) == 1
    assert run(root, lines([12, 13, 14]), "--retry-failed")[0] == 1
    assert [len(rows(root, record, "starts")) for record in found.values()] == [2 if seed == 13 else 1 for seed in found]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_it_finishes_exactly_what_was_missing(root, sent):
    text = lines([1], total_timesteps=2) + lines([2, 3], total_timesteps=8, pause=0.15) + lines([4], total_timesteps=2)
    process = start(root, text, "--workers", "2")
    wait_until(lambda: records(root).get(1, {}).get("state") == "done" and set(seeds_at_work(root)) == {2, 3})
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    started = [
        row.split()[0] for record in records(root).values() if steps(root, record) for row in rows(root, record, "starts")
    ]
    wait_until(lambda: not any(alive(pid) for pid in started))  # no children left behind
    before = {seed: steps(root, record) for seed, record in records(root).items()}
    assert before[1] == [0, 1] and 0 < len(before[2]) < 8 and before[4] == []

    status, out = run(root, text, "--workers", "2")
    found = records(root)
    assert status == 0 and "4 of 4 runs done" in out
    for seed, record in found.items():
        assert steps(root, record) == list(range(2 if seed in (1, 4) else 8)), "a step is missing, or was done twice"
        assert [row.split()[1] for row in rows(root, record, "starts")] == ["None"] + ["runs/run"] * (seed in (2, 3))
        assert all("--pause" in row for row in rows(root, record, "log.txt") if "--resume" in row)  # its flags stay beside it
    assert found[2]["seconds"] > 7 * 0.15  # both pieces


@pytest.mark.parametrize("change", ["no checkpoint", "other code", "failed"])
def test_it_starts_anew_where_it_cannot_go_on(root, change):
    text = lines([1], total_timesteps=5, pause=0.2)
    process = start(root, text)
    wait_until(lambda: seeds_at_work(root))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    (record,) = records(root).values()
    assert record["state"] == "waiting" and record["seconds"] > 0
    folder = root / "runs" / "grids" / "grid" / record["key"]
    if change == "no checkpoint":
        (folder / "runs" / "run" / "checkpoint.pt").unlink()
    else:
        changed = {"commit": "another"} if change == "other code" else {"state": "failed"}
        (folder / "record.json").write_text(json.dumps(record | changed))
    assert run(root, text, "--retry-failed")[0] == 0
    assert [row.split()[1] for row in rows(root, record, "starts")] == ["None", "None"]
    assert steps(root, record)[-5:] == list(range(5))


def test_two_runners_share_a_grid(root):
    text = lines(range(1, 7), total_timesteps=2, pause=0.1)
    both = [start(root, text) for _ in range(2)]
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("6 of 6 runs done" in out for out in outs)  # each waited for the other's
    assert all(steps(root, record) == [0, 1] for record in records(root).values())
    workers = Counter("first" if f"running: {record['key']}" in outs[0] else "second" for record in records(root).values())
    assert len(workers) == 2


def test_a_run_whose_runner_was_killed_but_that_lives_is_not_started_twice(root):
    """Where the kernel does not end it with its runner, its lock outlives the runner."""
    import fcntl

    run(root, lines([1]))
    (record,) = records(root).values()
    folder = root / "runs" / "grids" / "grid" / record["key"]
    (folder / "record.json").write_text(json.dumps(record | {"state": "running"}))
    with open(folder / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start(root, lines([1]))
        time.sleep(2)
        assert process.poll() is None and len(rows(root, record, "starts")) == 1
    process.communicate(timeout=30)
    assert process.returncode == 0 and len(rows(root, record, "starts")) == 2


@pytest.mark.slow
def test_jobs_through_submitit(root):
    pytest.importorskip("submitit", reason="pip install -e '.[bench]'")
    flags = ["--slurm", "timeout_min=5", "--cluster", "local"]
    status, out = run(root, lines([1, 13, 2]), *flags)
    assert status == 1 and "2 of 3 runs done, 1 not" in out and "submitted 3 jobs" in out
    assert {seed: record["state"] for seed, record in records(root).items()} == {1: "done", 13: "failed", 2: "done"}
    status, out = run(root, lines([1, 13, 2, 3]), *flags)
    assert status == 1 and "submitted 1 jobs" in out and records(root)[3]["state"] == "done"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected a run per line, got none"),
        ("nothing.py --env-id a --seed 1", "expected a script below"),
        ("fake.py --seed 1", "expected --env-id ID and --seed NUMBER"),
        ("fake.py --env-id a --seed one", "expected --env-id ID and --seed NUMBER"),
        ("fake.py --env-id a --seed 1\nfake.py --env-id a --seed 1", "expected each run once"),
    ],
)
def test_a_bad_line_is_refused_before_anything_runs(root, text, message):
    status, out = run(root, text)
    assert status != 0 and message in out and "Traceback" not in out
    assert not list(root.glob("runs/grids/grid/*/starts"))


@pytest.mark.parametrize("change", ["memoryless", "huber_of_mean", "lr_warmup=200", "optimizer=runs/RUN"])
def test_an_ablation_fits_the_scripts_of_its_grids(change):
    sys.path.append(str(ROOT / "benchmark" / "probes"))
    from ablate import ablated

    dqn = ["dqn_tbb_ffm", "dqn_tbb_lru", "dqn_sbb_lru", "dqn_tbb_s5", "dqn_sbb_s5"]
    ppo = ["ppo_tbb_lru_continuous_action", "ppo_tbb_lru_minigrid_envpool"]
    for script in ppo if change.split("=")[0] in ("memoryless", "optimizer") else dqn:
        text = (ROOT / "single_files" / f"{script}.py").read_text()
        compile(ablated(text, change), script, "exec")
    with pytest.raises(ValueError, match="expected one `.*` in the script, found 0"):
        ablated("", change)


@pytest.mark.slow
def test_the_baseline_logs_what_the_report_reads(tmp_path):
    pytest.importorskip("sb3_contrib", reason="pip install -e '.[bench]'")
    command = [sys.executable, ROOT / "benchmark" / "probes" / "sb3_recurrent_ppo.py", "--eval-episodes", "10"]
    subprocess.run([*command, "--total-timesteps", "1000"], cwd=tmp_path, check=True)
    logged = scalars(run_folder(tmp_path))
    training, evaluation = logged["charts/episodic_return"], logged["eval/episodic_return"]
    assert len(training) == 16 and training[0][0] == 51 * 8  # RepeatFirstEasy has 51 steps; eight environments, 1,024 steps
    assert logged["charts/episodic_length"] == [(step, 51) for step, _ in training]
    assert [step for step, _ in evaluation] == list(range(1024, 1034))
    assert all(-1 <= value <= 1 for _, value in training + evaluation)
