"""benchmark/tools/report.py on hand-made runs: what it counts and names, and that pictures follow from the CSV files alone."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

GRIDS = sorted(path.parent for path in (ROOT / "benchmark" / "results").glob("*/runs.csv"))
STARTED = 1_700_000_000.0  # seconds since 1970, 2023-11-14T22:13:20Z


@pytest.fixture(scope="module")
def report():
    sys.path.append(str(ROOT / "benchmark" / "tools"))
    import report

    return report


def log(folder, training, evaluation):
    """TensorBoard events of a run: training [(step, seconds since its start, return)], evaluation [return]."""
    folder.mkdir(parents=True)
    events = [(step, seconds, "charts/episodic_return", value) for step, seconds, value in training]
    events += [(i, training[-1][1], "eval/episodic_return", value) for i, value in enumerate(evaluation)]
    with open(folder / "events.out.tfevents.1", "wb") as file:
        writer = RecordWriter(file)
        for step, seconds, tag, value in events:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write(Event(wall_time=STARTED + seconds, step=step, summary=summary).SerializeToString())


def add_run(root, arm, seed, training=(), evaluation=(), grid="tiny", **changes):
    """A run of a grid with its record. It ran for a hundred steps at most."""
    folder = root / "runs" / "grids" / grid / f"{arm}-{seed}".replace(" ", "-")
    folder.mkdir(parents=True)
    record = {"grid": grid, "key": folder.name, "script": "single_files/dqn_tbb_ffm.py", "arm": arm, "env_id": "popgym-A-v0"}
    record |= {"env_kwargs": "{}", "seed": seed, "total_timesteps": 100, "flags": [], "dirty": False, "workers": 2}
    record |= {"command": [f"{root}/.venv/bin/python3", "single_files/dqn_tbb_ffm.py", "--env-kwargs", '{"k": 2}']}
    record |= {"commit": "0123456789", "versions": {"torch": "2.6"}, "device": "a CPU", "started": "2023-11-14T22:13:20+00:00"}
    record |= {"seconds": 12.0, "exit_status": 0, "state": "done", "error": None, "folder": None, "resumed": None}
    if training:
        log(folder / "runs" / "it", list(training), evaluation)
        record["folder"] = str((folder / "runs" / "it").relative_to(root))
    (folder / "record.json").write_text(json.dumps(record | changes))


def steady(value, seconds=1.0):
    """A run that returns `value` ten times: an episode ends every ten steps and every so many seconds."""
    return [(10 * i, 2 + seconds * i, value) for i in range(1, 11)]


@pytest.fixture
def root(tmp_path):
    """A repository whose grid has two arms; one lost a run to an error, one waits for a run."""
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- results: tiny -->\n<!-- end results -->\n")
    add_run(tmp_path, "ffm tape", 1, steady(0.2), [0.5, 0.7])
    add_run(tmp_path, "ffm tape", 2, steady(0.4), [0.8, 1.0])
    error = f"Traceback\nValueError: tape | too long in {tmp_path}/single_files/x.py\nexit status 1"
    add_run(tmp_path, "ffm tape", 3, steady(-1.0), [-1.0], state="failed", exit_status=1, error=error)
    add_run(tmp_path, "ffm segments", 1, steady(0.1), [0.25], dirty=True)
    add_run(tmp_path, "ffm segments", 2, state="waiting", seconds=0.0, started=None, exit_status=None, commit=None)
    return tmp_path


def make(root, *flags):
    command = [sys.executable, ROOT / "benchmark" / "tools" / "report.py", "--root", root, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (root / "README.md").read_text()


def rows_of(root, name):
    with open(root / "benchmark" / "results" / "tiny" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def means_of_runs(report, monkeypatch):
    """rliable is no requirement of the tests; without its intervals, the mean."""
    import curves

    def mean(scores):
        return scores.mean(0), scores.min(0), scores.max(0)

    monkeypatch.setattr(curves, "interquartile_means", mean)


def collect(report, root):
    report.collect(root, root / "runs", root / "benchmark" / "results")


def test_table_counts_finished_runs_and_names_the_others(report, root, means_of_runs):
    collect(report, root)
    text = make(root, "--runs", "", "--no-pictures")
    mean = "0.75 ± 0.15 (0.60, 0.90; 2 of 3 done, 1 failed)"  # of 0.6 and 0.9: the failed run's -1 is not in it
    assert f"| A-v0 | ffm tape | 100 | {mean} | never | 12 |" in text
    assert "| ffm segments | 100 | 0.25 (1 of 2 done, 1 unfinished) | never | 12 |" in text
    assert "[every run](benchmark/results/tiny/runs.csv): 3 of 5 done, 1 failed" in text
    assert "failed: popgym-A-v0, ffm tape, seed 3: `ValueError: tape | too long in single_files/x.py (exit status 1)`" in text
    assert "unfinished: popgym-A-v0, ffm segments, seed 2" in text
    assert "3 of 5 done, 1 failed, 1 unfinished; greedy return of the final network over 1 or 2 episodes" in text
    assert "code of 0123456, 0123456 with changes;" in text
    assert str(root) not in text
    assert report.markdown([{"a": "|h|"}], ["a"]).splitlines()[-1] == "| \\|h\\| |"  # a bar would start a cell


def test_arms_and_environments_cross_in_the_papers_figure(report, root, means_of_runs):
    (root / "runs" / "grids" / "tiny").rename(root / "runs" / "grids" / "dqn_popgym")
    for path in root.glob("runs/grids/*/*/record.json"):
        path.write_text(path.read_text().replace("grids/tiny", "grids/dqn_popgym"))
    (root / "README.md").write_text("<!-- results: dqn_popgym -->\n<!-- end results -->\n")
    collect(report, root)
    text = make(root, "--runs", "", "--no-pictures")
    assert "| arm | A-v0, 100 steps |" in text and "| ffm tape | 0.75 ± 0.15 (2 of 3 done, 1 failed) |" in text


def test_an_arm_stands_in_the_table_where_it_has_a_name(report):
    def rows(*arms):
        row = {"env_id": "A", "env_kwargs": "{}", "seed": "1", "total_timesteps": "100", "state": "done", "greedy_return": "1"}
        row |= {"steps_to_half": "50", "seconds": "3", "device": "", "commit": "", "episodes": "9"}
        return [row | {"arm": arm} for arm in arms]

    assert report.run_table(rows("ppo"), "ppo").splitlines()[4:] == ["| A | 100 | 1.00 | 0.05 | 3 |"]
    assert [line.split(" | ")[1] for line in report.run_table(rows("ppo", "b"), "ppo").splitlines()[4:]] == ["", "b"]


def test_numbers_have_three_digits_at_most(report):
    import tables

    numbers = {0.0677321: "0.0677", 12048: "12,000", 999.7: "1,000", 1.5: "1.5", 38.0: "38", 5.52e-8: "5.5e-08", 0.0: "0"}
    assert {value: tables.number(value) for value in numbers} == numbers
    same_column = {0.3749: "0.37", 0.9996: "1.00", 16.25: "16.2", 1438.15: "1,440", -0.001: "0.00", -9.996: "-10.0"}
    assert {value: tables.number(value, 2) for value in same_column} == same_column
    assert tables.mean_and_spread([1247.9, 156.9]) == "702 ± 546" and tables.mean_and_spread(["0.5"]) == "0.50"
    assert tables.with_seeds([0.999, 1.0]) == "1.00 ± 0.00 (2 seeds)" and tables.with_seeds([]) == ""
    assert tables.with_seeds([0.2, 0.4], "1 failed") == "0.30 ± 0.10 (0.20, 0.40; 1 failed)"


def test_tables_of_what_was_measured_say_what_they_leave_out(report):
    """Crossed by hand from a few rows: which figure stands where."""
    import measured

    part = {"script": "dqn_tbb_ffm", "rows": "1000", "vs_products": "", "vs_paper": ""}
    rows = [part | {"what": "update", "median_ms": "23.373", "vs_products": "1.3875", "vs_paper": "2.1215"}]
    rows += [part | {"what": "jax paper", "median_ms": "49.586"}, part | {"what": "update", "rows": "9", "median_ms": "1"}]
    lines = measured.parts_table(rows, "dqn_tbb_ffm").splitlines()
    assert lines[2:] == ["| update | 23.4 | 1.39 | 1 |  |", "| the paper's update, jitted | 49.6 |  |  |  |"]
    assert measured.whole_table(rows).splitlines()[2:] == ["| FFM | 23.4 | 2.12 | 1 |  |"]
    scan = {"T": "256", "what": "forward", "median_ms": "0.008823", "copies": "1"}
    scans = [scan | {"backend": "copy"}, scan | {"backend": "numba", "copies": "3.6619"}]
    assert measured.scan_table(scans).splitlines()[2:] == ["| 256 forward | 0.00882 | 3.66 |  |  |  |"]


def test_rows_say_what_ran(report, root, means_of_runs):
    collect(report, root)
    rows = {row["key"]: row for row in rows_of(root, "runs")}
    assert len(rows) == 5
    row = rows["ffm-tape-1"]
    assert row["command"] == "python single_files/dqn_tbb_ffm.py --env-kwargs '{\"k\": 2}'"
    assert (row["commit"], row["versions"], row["device"], row["seconds"]) == ("0123456789", "torch 2.6", "a CPU", "12.0")
    assert (row["memory"], row["batching"], row["start_up"]) == ("ffm", "tape", "3.0")  # the first event came at 3 s
    assert rows["ffm-tape-3"]["greedy_return"] == "" and rows["ffm-tape-3"]["state"] == "failed"
    assert {row["key"] for row in rows_of(root, "curves")} == {"ffm-tape-1", "ffm-tape-2", "ffm-segments-1"}
    assert str(root) not in (root / "benchmark" / "results" / "tiny" / "runs.csv").read_text()


def test_curves_hold_current_returns_by_steps_and_seconds(report, root, means_of_runs):
    """A run that gets worse is shown getting worse; seconds count from the start of the process."""
    falling = [(10 * i, 2 + i, 1.0 if i <= 5 else -1.0) for i in range(1, 11)]
    add_run(root, "other", 1, falling, [0.0])
    collect(report, root)
    curve = [row for row in rows_of(root, "curves") if row["key"] == "other-1"]
    assert [float(row["episodic_return"]) for row in curve] == [1.0] * 5 + [-1.0] * 5
    assert [float(row["seconds"]) for row in curve] == [3.0 + i for i in range(10)]
    band = [r for r in rows_of(root, "intervals") if (r["arm"], r["axis"]) == ("ffm tape", "steps")]
    assert {(row["iqm"], row["runs"]) for row in band} == {("0.3000", "2")}  # of the two that ended well


def test_steps_to_the_goal_are_those_of_the_first_full_window(report, tmp_path):
    import records

    learned = [(10 * i, 2 + i, 0.0 if i <= 150 else 1.0) for i in range(1, 301)]
    add_run(tmp_path, "a", 1, learned, [1.0], total_timesteps=3000)
    add_run(tmp_path, "b", 1, learned[:99], [1.0], total_timesteps=3000)  # less than a window
    add_run(tmp_path, "c", 1, learned, [1.0], total_timesteps=3000, resumed="2023-11-14T23:13:20+00:00")
    add_run(tmp_path, "d", 1, learned[:200], (), total_timesteps=3000)  # a program that does not evaluate, and is half way
    a, b, c, d = (records.read_record(path, tmp_path)[0] for path in sorted(tmp_path.glob("runs/grids/tiny/*/record.json")))
    assert (a["steps_to_goal"], a["seconds_to_goal"]) == (2450, "247.0")  # episode 245: 95 of the last 100 returned 1
    assert (b["steps_to_goal"], b["seconds_to_goal"]) == ("", "")
    assert (c["steps_to_goal"], c["seconds_to_goal"]) == (2450, "")  # its clock ran while it did not
    assert (d["greedy_return"], d["training_return"], d["steps_to_goal"]) == ("", "0.5000", "")
    add_run(tmp_path, "lost", 1, folder="runs/grids/tiny/gone")
    lost, points = records.read_record(tmp_path / "runs/grids/tiny/lost-1/record.json", tmp_path)
    assert lost["state"] == "failed" and "missing" in lost["error"] and points == []
    text = report.race_table([{name: str(value) for name, value in row.items()} for row in (a, b, c, d, lost)])
    assert "| A-v0 | a | 3,000 | 2.45 | 247 |" in text and "| b | 3,000 | never | never |" in text
    assert "| c | 3,000 | 2.45 | stopped meanwhile |" in text and "| 0 of 1 done, 1 failed |" in text


def test_runs_of_another_machine_stay(report, root, means_of_runs):
    """The committed CSV files may hold results of runs that are not here, or that merely wait here."""
    collect(report, root)
    before = rows_of(root, "runs"), rows_of(root, "curves")
    shutil.rmtree(root / "runs" / "grids" / "tiny" / "ffm-tape-1")
    record = root / "runs" / "grids" / "tiny" / "ffm-tape-2" / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "waiting", "folder": None}))
    collect(report, root)
    assert (rows_of(root, "runs"), rows_of(root, "curves")) == before


def test_tasks_of_other_scales_are_seen_beside_each_other(report, monkeypatch, tmp_path):
    """Points of a game may be in thousands, or negative."""
    rows, points = [], []
    for env_id, scale in (("Many-v5", 1000), ("Lost-v5", -20)):
        row = {"key": env_id, "env_id": env_id, "env_kwargs": "{}", "arm": "tape", "seed": "1", "memory": "lru"}
        rows.append(row | {"batching": "tape", "state": "done"})
        points += [{"key": env_id, "global_step": step, "episodic_return": scale + step} for step in (0, 5)]
    curves = sys.modules[report.grid_picture.__module__]
    monkeypatch.setattr(curves, "save", lambda figure, path: path.append(figure))
    report.grid_picture(rows, points, [], figures := [], "steps")
    for axis in figures[0].axes:
        low, high = axis.get_ylim()
        assert all(low <= y <= high for line in axis.get_lines() for y in line.get_ydata())
        assert high - low < 20


def test_a_published_number_stands_beside_ours(report, root, means_of_runs):
    (root / "runs" / "grids" / "tiny").rename(root / "runs" / "grids" / "popgym_easy")
    for path in root.glob("runs/grids/*/*/record.json"):
        path.write_text(path.read_text().replace("grids/tiny", "grids/popgym_easy"))
    (root / "README.md").write_text("<!-- results: popgym_easy -->\n<!-- end results -->\n")
    (folder := root / "benchmark" / "results" / "popgym_easy").mkdir()
    (folder / "reference.csv").write_text('# Of papers.\nenv_id,"PPO, GRU",again,never\npopgym-A-v0,0.9,0.8,\n')
    collect(report, root)
    text = make(root, "--runs", "", "--no-pictures")
    assert "| environment | ffm segments | ffm tape | PPO, GRU; again; never |" in text
    assert "mean ± sd over seeds; 100 steps. Of papers." in text
    assert "| A-v0 | 0.25 (1 of 2 done, 1 unfinished) | 0.75 ± 0.15 (2 of 3 done, 1 failed) | 0.90; 0.80; - |" in text


def test_the_board_says_where_the_better_arm_reaches_what_was_published(report):
    def row(level, arm, seed, greedy, state="done"):
        key = f"{level}{arm}{seed}"
        row = dict.fromkeys("device commit dirty training_return".split(), "") | {"key": key, "env_id": f"popgym-A{level}-v0"}
        return row | {"arm": arm, "seed": seed, "greedy_return": greedy, "state": state, "episodes": 9, "cpu_seconds": 7}

    rows = [row("Hard", "PPO, gated LRU", 2, 0.4), row("Hard", "PPO, gated LRU", 1, 0.2), row("Hard", "DQN, FFM", 1, 0.1)]
    rows += [row("Easy", "DQN, FFM", 1, 0.899), row("Easy", "PPO, LSTM", 1, ""), row("Medium", "PPO, LSTM", 1, 0.5)]
    rows[4]["state"] = "waiting"
    curve = [
        {"key": row["key"], "episodic_return": value} for row in rows for value in (0.1, 0.6, 0.3) if row["state"] == "done"
    ]
    published = [{"env_id": f"popgym-A{level}-v0", "gru": 0.3, "best": 0.9, "best_memory": "X"} for level in ("Hard", "Easy")]
    text = report.board_table(rows, curve, published, "Of a paper.")
    assert "Of 2 environments that have a published number and a run, the better" in text
    assert "reaches GRU's in 2 and the best of thirteen memories' in 1 (" in text and "that best on A Hard. CPU" in text
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert head == "| environment | PPO, gated LRU | DQN, FFM | PPO, LSTM | published GRU, best |"
    assert lines == [
        "| A Easy |  | 0.90 (0.60) |  | 0.30, 0.90 |",
        "| A Medium |  |  | 0.50 (0.60) |  |",
        "| A Hard | 0.20, 0.40 (0.60) | 0.10 (0.60) |  | 0.30, 0.90 |",
    ]
    assert "1 runs of the grid are still to be done" in text


def test_the_table_of_sapg_shows_the_end_of_training_and_how_soon(report, root, means_of_runs):
    shutil.rmtree(root / "runs")
    for seed, late in ((1, 2.0), (2, 1.0)):
        training = [(10 * i, i, late if i >= 8 - seed else 0.0) for i in range(1, 11)]
        add_run(root, "SAPG", seed, training, [late], grid="sapg", cpu_seconds=30.0)
    add_run(root, "PPO", 1, steady(0.0), [0.0], grid="sapg", cpu_seconds=20.0)
    path = next((root / "runs" / "grids" / "sapg" / "SAPG-1" / "runs").glob("*/events*"))
    with open(path, "ab") as file:
        for step, value in ((50, 9.0), (95, 0.2), (100, 0.4)):
            summary = Summary(value=[Summary.Value(tag="sapg/coverage", simple_value=value)])
            RecordWriter(file).write(Event(wall_time=STARTED, step=step, summary=summary).SerializeToString())
    (root / "README.md").write_text("<!-- results: sapg -->\n<!-- end results -->\n")
    collect(report, root)
    text = make(root, "--runs", "", "--no-pictures")
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert lines == [  # 80 % of 1.5, the mean of the best arm
        "| SAPG | 1.50 ± 0.50 (2.00, 1.00) | 1.50 ± 0.50 (2.00, 1.00) | 0.00, never | 0.30, -, - | 30 |",
        "| PPO | 0.00 | 0.00 | never | -, -, - | 20 |",
    ]


def test_the_table_of_pixels_shows_how_much_of_a_batch_is_real(report, root, means_of_runs):
    shutil.rmtree(root / "runs")
    for arm, seed, late in (("tape", 1, 2.0), ("tape", 2, 1.0), ("segments of 80", 1, 0.0)):
        training = [(10 * i, i, late if i == 10 else 9.0) for i in range(1, 11)]
        add_run(root, arm, seed, training, [3.0, 4.0 + seed], grid="atari_segments", cpu_seconds=30.0 + seed)
        path = next((root / "runs" / "grids" / "atari_segments").glob(f"{arm.replace(' ', '-')}-{seed}/runs/*/events*"))
        with open(path, "ab") as file:
            for step, value in ((50, 500.0), (95, 520.0 + 20 * seed)):
                summary = Summary(value=[Summary.Value(tag="losses/transitions", simple_value=value)])
                RecordWriter(file).write(Event(wall_time=STARTED, step=step, summary=summary).SerializeToString())
    add_run(root, "segments of 80", 2, grid="atari_segments", state="waiting", exit_status=None)
    (root / "README.md").write_text("<!-- results: atari_segments -->\n<!-- end results -->\n")
    collect(report, root)
    lines = [line for line in make(root, "--runs", "", "--no-pictures").splitlines() if line.startswith("|")][2:]
    assert lines == [
        "| A-v0, 100 steps | tape | 525 | 4.25 ± 0.25 (4.00, 4.50) | 1.50 ± 0.50 (2.00, 1.00) | 31 to 32 |",
        "| A-v0, 100 steps | segments of 80 | 520 | 4.00 (1 of 2 done, 1 unfinished) | 0.00 | 31 |",
    ]


def test_batching_is_read_off_script_and_flags(report):
    import records

    def of(script, *flags):
        return records.batching({"script": script, "flags": flags})

    assert of("single_files/dqn_tbb_s5.py", "--segment-length", "9") == ("s5", "tape")
    assert of("single_files/dqn_sbb_lru.py", "--segment-length", "50") == ("lru", "segments of 50")
    assert of("single_files/dqn_sbb_lru.py", "--segment-length=10") == ("lru", "segments of 10")
    assert of("single_files/ppo_tbb_lru.py") == ("", "")


def test_intervals_are_rliables(report):
    """IQM of each point as rliable's own function computes it, the same on each call, and inside its interval."""
    metrics = pytest.importorskip("rliable.metrics")
    import curves

    scores = np.random.default_rng(0).normal(size=(8, 5))
    mean, low, high = curves.interquartile_means(scores)
    np.testing.assert_allclose(mean, [metrics.aggregate_iqm(scores[:, i : i + 1]) for i in range(5)])
    assert (low < mean).all() and (mean < high).all()
    np.random.seed(1)
    np.testing.assert_array_equal(curves.interquartile_means(scores)[1], low)
    alone = curves.interquartile_means(scores[:1])
    assert (alone[0] == scores[0]).all() and np.isnan(alone[1:]).all()


def test_each_machine_has_its_own_tables(report, root):
    for name, device, figure in ("one", "first", 1), ("other", "second", 2):
        (folder := root / "benchmark" / "results" / "machines" / name).mkdir(parents=True)
        (folder / "any.csv").write_text(f"# device: {device}\nwhat,median_ms\nscan,{figure}\n")
    markers = [f"<!-- results: {name} -->\n<!-- end results -->\n" for name in ("other/any", "one/any")]
    (root / "README.md").write_text("".join(markers))
    text = make(root, "--runs", "", "--no-pictures")
    assert re.findall(r"device: (\w+)|\| scan \| (\d) \|", text) == [("second", ""), ("", "2"), ("first", ""), ("", "1")]


def committed(name, folder):
    from tables import read_rows

    return read_rows(folder / f"{name}.csv")[0]


def check_intervals(folder):
    import curves

    ours = curves.interval_rows(committed("runs", folder), committed("curves", folder))
    ours = [{key: str(value) for key, value in row.items()} for row in ours]
    assert ours == committed("intervals", folder), f"{folder.name}: run benchmark/tools/report.py"


def test_committed_intervals_are_those_of_the_committed_curves(report):
    """They are of as many runs as are done, over the same steps; computed again for one grid."""
    from tables import grouped

    for folder in GRIDS:
        found, rows, curve = (committed(name, folder) for name in ("intervals", "runs", "curves"))
        done = {row["key"]: row for row in rows if row["state"] == "done"}
        assert {point["key"] for point in curve} == set(done)
        for cell in grouped(done.values(), lambda row: (row["env_id"], row["env_kwargs"], row["arm"])).values():
            band = [
                r for r in found if all(r[c] == cell[0][c] for c in ("env_id", "env_kwargs", "arm")) and r["axis"] == "steps"
            ]
            assert {row["runs"] for row in band} == {str(len(cell))}
            steps = [{p["global_step"] for p in curve if p["key"] == row["key"]} for row in cell]
            assert {row["x"] for row in band} == set.intersection(*steps)
    if importlib.util.find_spec("rliable"):
        check_intervals(ROOT / "benchmark" / "results" / "ppo_tbb_ffm")


@pytest.mark.slow
@pytest.mark.parametrize("folder", GRIDS, ids=lambda folder: folder.name)
def test_committed_intervals_computed_again(report, folder):
    pytest.importorskip("rliable", reason="pip install -e '.[bench]'")
    check_intervals(folder)


def same_picture(ours, theirs):
    """Are two pictures the same, as far as can be known here? Bytes vary with matplotlib, its fonts and the processor.

    Both files name what drew them, and what was drawn: two drawn by the same are compared byte by byte, others by the digest
    of data, colours and texts.
    """
    notes = [re.search(rb"drawn by (.*?); data (\w{64})", path.read_bytes()) for path in (ours, theirs)]
    if notes[0][1] == notes[1][1]:
        return ours.read_bytes() == theirs.read_bytes()
    return notes[0][2] == notes[1][2]


def test_pictures_follow_from_the_csv_files(report, root, means_of_runs):
    """Drawn twice they are the same bytes; a point that moved, an arm that came and a run that failed change them."""
    collect(report, root)
    results = root / "benchmark" / "results" / "tiny"
    names = [results / name for name in ("picture.svg", "seconds.svg")]
    make(root, "--runs", "")
    first = [path.read_bytes() for path in names]
    assert b"ffm tape: 2 of 3 runs done, 1 failed" in first[0]
    make(root, "--runs", "")
    assert [path.read_bytes() for path in names] == first
    old = shutil.copytree(results, root / "old")
    for name, before, after in (("curves", ",0.4000", ",0.4100"), ("runs", "ffm segments", "segments")):
        text = (results / f"{name}.csv").read_text()
        (results / f"{name}.csv").write_text(text.replace(before, after, 1))
        make(root, "--runs", "")
        assert not same_picture(names[0], old / "picture.svg")
        (results / f"{name}.csv").write_text(text)


def committed_pictures():
    ours = ROOT / "benchmark" / "results"
    return ours, sorted(path.relative_to(ours) for path in ours.rglob("*") if path.suffix not in ("", ".csv"))


def test_committed_pictures_show_what_the_report_draws(report, tmp_path, monkeypatch):
    """README's and the docs' pictures follow from the committed CSV files alone, and no other file is kept.

    Compared by data, colours and texts; the page is not laid out, which is what takes the time.
    """
    from matplotlib.figure import Figure

    def note_alone(figure, out, format, metadata):
        out.write(f"{metadata['Description']}</metadata>".encode())

    monkeypatch.setattr(Figure, "savefig", note_alone)
    ours, pictures = committed_pictures()
    shutil.copytree(ours, tmp_path, dirs_exist_ok=True, ignore=lambda folder, names: [n for n in names if n.endswith(".svg")])
    report.draw(tmp_path)
    assert pictures and sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.svg")) == pictures
    for path in pictures:
        digests = [re.search(rb"drawn by .*?; data (\w{64})", (of / path).read_bytes())[1] for of in (ours, tmp_path)]
        assert digests[0] == digests[1], f"{path}: run benchmark/tools/report.py"
        assert (ours / path).stat().st_size < 400_000, path


@pytest.mark.slow
def test_committed_pictures_are_what_the_report_draws(tmp_path):
    """Also in where everything lies on the page."""
    shutil.copytree(ROOT / "benchmark" / "results", tmp_path / "benchmark" / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    results, (ours, pictures) = tmp_path / "benchmark" / "results", committed_pictures()
    for path in pictures:
        (results / path).unlink()
    make(tmp_path, "--runs", "")
    for path in pictures:
        assert same_picture(ours / path, results / path), f"{path}: run benchmark/tools/report.py"


def test_export_is_what_openrlbenchmark_keeps(report, root):
    """Its cache, read as its cache.py and offline_db.py do; unfinished and failed runs are not in it."""
    import sqlite3

    command = [sys.executable, ROOT / "benchmark" / "tools" / "export.py", "--root", root, "--out", root / "out"]
    subprocess.run(command, check=True, capture_output=True)
    below = root / "out" / "local" / "cleanrl-memoroid"
    found = sqlite3.connect(below / "offline.sqlite").execute("SELECT id, entity, project, state, config FROM offlinerun")
    found = {
        json.loads(config)["exp_name"]: (Path(entity, project, id), state) for id, entity, project, state, config in found
    }
    assert sorted(found) == ["tiny.ffm-segments", "tiny.ffm-tape"]
    path, state = found["tiny.ffm-tape"]
    assert state == "finished"
    kept = json.loads((root / "out" / path / "run.json").read_text())
    assert kept["config"]["env_id"] == "popgym-A-v0" and kept["user"]["username"] == "local" and kept["tags"] == []
    with open(root / "out" / path / "run_df.csv") as file:
        points = list(csv.DictReader(file))
    assert [int(p["global_step"]) for p in points] == [10 * i for i in range(1, 11)]
    assert points[0].keys() == {"global_step", "_runtime", "charts/episodic_return"}
    assert len(list(below.glob("*/run.json"))) == 3


def test_the_page_of_sapg_counts_the_seeds_with_which_ppo_finds_the_hill():
    found = []
    for grid in ("sapg", "sapg_luck"):
        with open(ROOT / "benchmark" / "results" / grid / "runs.csv") as file:
            found.append([float(row["greedy_return"]) >= 1 for row in csv.DictReader(file) if row["arm"] == "PPO"])
    assert [sum(seeds) for seeds in found] == [1, 5] and [len(seeds) for seeds in found] == [5, 15]
    said = " ".join((ROOT / "docs" / "sapg.md").read_text().split())
    assert "PPO does with one seed of five and with five of [15 more]" in said
