"""Loads scripts by path, as they are no package; every test starts from one seed and one thread."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("scripts")  # its assertions show what differs, too
ROOT = Path(__file__).parent.parent


@functools.cache
def load_script(name):
    """The module of single_files/{name}.py; its training code is under `if __name__ == "__main__"` and does not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "single_files" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ffm():
    return load_script("dqn_tbb_ffm")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
