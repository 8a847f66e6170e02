"""What can be said of CUDA without a card: the command that proves it there, and what a loop moves to a device and back."""

import ast
import csv
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "single_files").glob("ppo_*.py"))
MOVES = {"item", "cpu", "tolist", "to", "as_tensor", "from_numpy", "numpy", "cuda"}


def test_the_command_without_a_card(tmp_path):
    """Part a runs in Triton's interpreter; all else is skipped, with its reason."""
    pytest.importorskip("triton")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card: run the command itself")
    command = [sys.executable, ROOT / "benchmark" / "speed" / "cuda.py", "--seconds", 900, "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert "| a | parity | done |" in summary and " | <= 1e-05 | " in summary and " | met |" in summary
    for part in ("b | scan", "c | scripts", "d | learning", "e | processes", "f | pong"):
        assert f"| {part} | skipped | 0 | PyTorch finds no CUDA device |" in summary
    assert f"torch {torch.__version__}" in summary and "triton " in summary
    rows = list(csv.DictReader((tmp_path / "a_parity.csv").read_text().splitlines()[1:]))
    assert len(rows) > 6 and all(0 <= float(row["error of h"]) < 1e-5 for row in rows)
    assert {row["T"] for row in rows} == {"1", "11"} and {row["dtype"] for row in rows} == {"complex64", "float32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_parity.csv", "summary.md"]


@pytest.mark.slow
def test_every_part_of_the_command_is_in_order(tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "speed" / "cuda.py", "--rehearse", "--seconds", 900, "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and done.stdout.count(": done, ") == 6
    skipped = [row for path in tmp_path.glob("*.csv") for row in csv.DictReader(path.read_text().splitlines()[1:])]
    skipped = [row["skipped"] for row in skipped if row.get("skipped")]
    assert not [why for why in skipped if "accelerated_scan" not in why and "not installed" not in why], skipped


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_moves_observations_and_actions_alone(script):
    """Inside the loop over steps, apart from `agent.step`, which takes observations, nothing crosses but the actions."""
    tree = ast.parse((ROOT / "single_files" / f"{script}.py").read_text())
    (loop,) = (
        line
        for line in ast.walk(tree.body[-1])
        if isinstance(line, ast.For) and ast.unparse(line.target) == "step" and "num_steps" in ast.unparse(line.iter)
    )
    calls = [
        ast.unparse(call)
        for call in ast.walk(loop)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in MOVES
    ]
    assert [call for call in calls if "actions[step]" not in call] == []
