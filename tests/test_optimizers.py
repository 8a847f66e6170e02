"""benchmark/tools/optimizers.py on hand-made runs: what it keeps of earlier ones, and what the tables say."""

import csv
import json
import sys

import pytest
from conftest import ROOT
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


@pytest.fixture(scope="module")
def optimizers():
    sys.path.append(str(ROOT / "benchmark" / "tools"))
    import optimizers

    return optimizers


def add_run(root, arm, seed, areas, script="optim4rl_lru", state="done"):
    """A run whose tests returned a number after each of 11 updates: {name: area}."""
    key = f"{arm}-{seed}".replace(" ", "-")
    folder = root / "runs" / "grids" / "optim4rl" / key
    (folder / "runs" / "it").mkdir(parents=True)
    with open(folder / "runs" / "it" / "events.out.tfevents.1", "wb") as file:
        for name, area in areas.items():
            scalars = [(n, f"test/{name}", area * n / 5) for n in range(11)]
            scalars += [
                (50, f"test_{what}/{name}", value) for what, value in (("auc", area), ("return", 1), ("worst", area - 0.1))
            ]
            for step, tag, value in scalars:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                RecordWriter(file).write(Event(wall_time=1.0, step=step, summary=summary).SerializeToString())
    record = {"key": key, "arm": arm, "seed": seed, "state": state, "script": f"single_files/{script}.py", "cpu_seconds": 14.0}
    record |= {
        "folder": str((folder / "runs" / "it").relative_to(root)),
        "commit": "0123456789",
        "dirty": False,
        "device": "a CPU",
    }
    record |= {"command": ["python", f"single_files/{script}.py", "--seed", str(seed)]}
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "log.txt").write_text("meta-trained for 50 windows, 12.3 seconds of CPU; 0 skipped\n")


def test_tables_show_each_seed_and_the_best_rate(optimizers, tmp_path):
    known = {"untrained": -0.6, "Adam 0.01": 0.4, "Adam 0.05": 0.7, "signSGD 0.1": 0.5}
    for seed, area in ((1, 0.8), (2, 0.9)):
        add_run(tmp_path, "memoroid", seed, {"optim4rl_lru": area, **known})
    add_run(tmp_path, "GRU raw, signlog", 1, {"optim4rl": 0.3}, script="optim4rl")
    add_run(tmp_path, "GRU raw, none", 1, {"optim4rl": 0.1}, script="optim4rl", state="failed")
    results = tmp_path / "benchmark" / "results"
    optimizers.collect_optimizers(tmp_path, tmp_path / "runs", results)
    tables = optimizers.optimizer_tables(results)
    assert "| memoroid | 1.00 (1.00, 1.00) | 0.85 (0.80, 0.90) | 0.70 | 12 |" in tables["optim4rl"]
    assert "| memoroid, untrained | 1.00 (1.00, 1.00) | -0.60 (-0.60, -0.60) | -0.70 |  |" in tables["optim4rl"]
    assert "| Adam | 0.01: 0.40, 0.05: 0.70 | 1.00 | 0.70 | 0.60 |" in tables["optim4rl_known"]
    assert "untrained" not in tables["optim4rl_known"]
    assert "| raw |  | 0.30 (1) |  |  |" in tables["optim4rl_crossed"]
    with open(results / "optim4rl" / "tests.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["key"] == "memoroid-1" and row["optimiser"] == "cell"]
    assert [(int(row["update"]), float(row["return"])) for row in rows] == [(0, 0), (5, 0.8), (10, 1.6)]


def test_runs_of_another_machine_stay(optimizers, tmp_path):
    import shutil

    results = tmp_path / "benchmark" / "results"
    for seed in (1, 2):
        add_run(tmp_path, "memoroid", seed, {"optim4rl_lru": 0.8})
        optimizers.collect_optimizers(tmp_path, tmp_path / "runs", results)
        shutil.rmtree(tmp_path / "runs")
    assert "0.80 (0.80, 0.80)" in optimizers.optimizer_tables(results)["optim4rl"]


def test_transfer_is_read_at_each_step_size(optimizers):
    rows = [("Adam", "", "0.01", "2"), ("Adam", "", "0.1", "4"), ("cell", "a", "0.001", "3"), ("cell", "b", "0.001", "4")]
    rows = [dict(zip(("optimiser", "run", "step_size", "return"), row)) | {"task": "grid"} for row in rows]
    lines = optimizers.transfer_table(rows).splitlines()
    assert lines[2:] == ["| grid | Adam | 1 | 0.01: 2, 0.1: 4 | 4 | 1.00 |", "| grid | cell | 2 | 0.001: 3.5 | 3.5 | 0.88 |"]


def test_the_crossed_table_says_what_its_runs_took_on_each_machine(optimizers):
    runs = [{"device": device, "cpu_seconds": seconds} for device, seconds in (("B", "90.0"), ("A", "600"), ("B", "150"))]
    assert optimizers.cost(runs).splitlines() == [
        "1 runs: 10 minutes of one core, tests included (A).",
        "",
        "2 runs: 4 minutes of one core, tests included (B).",
        "",
    ]
