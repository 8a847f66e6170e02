"""A scan over rows that several processes hold: tests/helpers/sharded.py, started as its users start theirs."""

import os
import subprocess
import sys

import pytest
import torch
from scripts import HELPERS

from cleanrl_memoroid.scan_sharded import sharded_linear_scan


def test_stretches_of_two_and_of_four_processes_are_one_tape():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", HELPERS / "sharded.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("48 cases, largest") == 8  # lines of several processes may run into one another


def test_without_processes_it_says_what_is_missing():
    with pytest.raises(ValueError, match="group: expected torch.distributed to be initialised.*init_process_group first"):
        sharded_linear_scan(torch.zeros(2), torch.zeros(3, 2))
