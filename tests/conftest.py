"""Every test starts from one seed and one thread; tests/helpers/ can be imported by name."""

import sys
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "helpers")]
pytest.register_assert_rewrite("scripts", "variants")  # their assertions show what differs, too
from scripts import ROOT, load_script  # noqa: E402, F401  tests import them from here

# TensorBoard reads files of one second in the order of their names, which end in this number, and takes 10 to be before 9
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


@pytest.fixture(scope="session")
def ffm():
    return load_script("dqn_tbb_ffm")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
