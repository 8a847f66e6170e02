"""benchmark/tools/students.py on hand-made runs: what it counts, pairs and draws."""

import json
import sys

import pytest
from conftest import ROOT

COSTS = dict.fromkeys("numbers bytes_sparse bytes_dense bytes_state multiply_adds".split(), 10)


@pytest.fixture(scope="module")
def students():
    sys.path.append(str(ROOT / "benchmark" / "tools"))
    import students

    return students


def add_run(root, arm, seed, performance, state="done", cuts=("sparsity 0.97",), last_fifth=(90.0, 95.0)):
    folder = root / "runs" / "grids" / "bpd" / f"{arm}-{seed}"
    (folder / "runs" / "it").mkdir(parents=True)
    record = {"arm": arm, "seed": seed, "state": state, "cpu_seconds": 12.3, "commit": "0123456789", "dirty": False}
    command = [f"{root}/.venv/bin/python3", "single_files/bpd_tbb_lru_continuous_action.py"]
    (folder / "record.json").write_text(json.dumps(record | {"device": "a CPU", "command": command}))
    layers = {"memory.E": 50.0, "memory.B": 97.0, "memory.R": 98.0, "V": 60.0}
    report = {"args": {"updates": 10, "fine_tune_updates": 5}, "last_fifth": list(last_fifth), "returns": {"teacher": 0.9}}
    report["sweep"] = [{"threshold": -2, "sparsity": 97.0, "performance": 50.0}] if arm == "svd" else []
    report["cuts"] = [
        COSTS
        | {"cut": cut, "sparsity": 97.0, "performance": performance + i, "before_fine_tuning": 80.0, "heldout_error": 0.02}
        | {"weights": 380, "share_of_teacher": 0.28, "units": [3, 2, 1], "layers": layers, "latency": [1.0, 2.0]}
        for i, cut in enumerate(cuts)
    ]
    (folder / "runs" / "it" / "report.json").write_text(json.dumps(report))


def tables_of(students, root):
    results = root / "benchmark" / "results"
    students.collect_students(root, root / "runs", results)
    return students.student_tables(results)


def test_methods_are_compared_by_pairs_of_seeds(students, tmp_path):
    for seed, (ours, theirs) in enumerate([(98, 95), (97, 96), (99, 94)], start=1):
        add_run(tmp_path, "svd", seed, ours, cuts=("sparsity 0.97", "threshold 0"))
        add_run(tmp_path, "magnitude", seed, theirs)
    add_run(tmp_path, "magnitude", 4, 0.0)  # without a pair
    add_run(tmp_path, "magnitude", 5, 0.0, state="running")
    tables = tables_of(students, tmp_path)
    lines = tables["bpd_methods"].splitlines()
    assert "10 students; updates: 10 + 5; device: a CPU; code of 0123456" in lines[0]
    assert "| svd |  | 98.0 (98.0, 97.0, 99.0) |  |" in lines
    assert "| magnitude |  | 71.2 (95.0, 96.0, 94.0, 0.0) |  |" in lines
    # differences 3, 1, 5: mean 3, standard error 2 / sqrt(3), Student's t of two degrees of freedom 4.303
    assert "| magnitude |  | +3.0 (-2.0 to +8.0) |  |" in tables["bpd_ahead"].splitlines()
    assert "| svd |" not in tables["bpd_ahead"]


def test_each_arm_stands_at_its_own_sparsity(students, tmp_path):
    add_run(tmp_path, "svd", 1, 97.0, cuts=("threshold 3", "threshold 0", "sparsity 0.97"))
    add_run(tmp_path, "dense", 1, 99.0, cuts=("sparsity 0", "sparsity 0.97"))
    tables = tables_of(students, tmp_path)
    lines = tables["bpd_arms"].splitlines()
    assert "| dense | 97.0 | 99.0 | 90.0 | 12 |" in lines
    assert "| svd | 97.0 | 98.0 | 90.0 | 12 |" in lines  # the worst of the last fifth is 90
    assert "| -2 | 0.12 | 97.0 | 50.0 |" in tables["bpd_sweep"]
    assert "| 380 | 0.28 | 50, 97, 98, 60 | 3 2 1 | 99.0 |" in tables["bpd_layers"]


def test_the_picture_shows_every_student(students, tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "benchmark" / "results"
    pictures = []
    for seed in (1, 2):
        add_run(tmp_path, "svd", seed, 97.0)
        add_run(tmp_path, "L1", seed, 90.0)
        tables_of(students, tmp_path)
        students.draw_students(results)
        pictures.append((results / "bpd" / "picture.svg").read_bytes())
    assert pictures[0] != pictures[1]
    students.draw_students(results)
    assert (results / "bpd" / "picture.svg").read_bytes() == pictures[1]


def test_without_students_there_is_nothing(students, tmp_path):
    assert tables_of(students, tmp_path) == {} and not list(tmp_path.iterdir())
