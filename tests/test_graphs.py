"""graphs.py without a card: a recording that a test fakes fills the same inputs and outputs as a CUDA graph does."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmark" / "speed"))
import graphs  # noqa: E402
from graphs import graphed  # noqa: E402


def recorder(counts):
    """As `record_cuda`: a replay computes from what the inputs hold then, and writes into the same outputs."""

    def record(function, inputs):
        outputs, number = function(*inputs), len(counts)
        counts.append(0)

        def replay():
            counts[number] += 1
            for place, value in zip(outputs, function(*inputs)):
                place.copy_(value)

        return replay, outputs

    return record


class Memory(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))

    @torch.no_grad()
    def step(self, obs, begins, state):
        state = torch.where(begins[:, None], 0, state) * 0.9 + obs @ self.weight
        return state.sum(1), state


def test_on_a_cpu_it_is_the_function_itself():
    step = Memory().step
    assert graphed(step, "cpu") is step


def test_a_replay_returns_what_the_function_does_and_keeps_what_it_returned():
    memory, counts = Memory(), []
    act, rng = graphed(memory.step, "cpu", recorder(counts)), np.random.default_rng(0)
    state, expected, seen = torch.zeros(4, 3), torch.zeros(4, 3), []
    for _ in range(10):
        obs, begins = rng.standard_normal((4, 3), np.float32), rng.random(4) < 0.3
        (value, state), (wanted, expected) = (
            act(obs, begins, state),
            memory.step(*map(torch.as_tensor, (obs, begins, expected))),
        )
        assert torch.equal(value, wanted) and torch.equal(state, expected)
        seen.append((value, wanted, state, expected))
        memory.weight.data.mul_(0.99)  # as an optimizer does, in place
    assert counts == [10]
    for value, wanted, state, expected in seen:  # later calls have not written over them
        assert torch.equal(value, wanted) and torch.equal(state, expected)


def test_each_kind_of_input_is_recorded_once_and_no_more_than_a_few(monkeypatch):
    monkeypatch.setattr(graphs, "KINDS", 3)
    memory, counts = Memory(), []
    act = graphed(memory.step, "cpu", recorder(counts))
    for _ in range(2):
        for envs in (1, 2, 3, 4, 5):  # the last two run as they are
            obs, begins, state = torch.randn(envs, 3), torch.ones(envs, dtype=torch.bool), torch.zeros(envs, 3)
            for ours, theirs in zip(act(obs, begins, state), memory.step(obs, begins, state)):
                assert torch.equal(ours, theirs)
    assert counts == [2, 2, 2]


def test_a_recording_that_fails_is_a_warning_and_then_the_function():
    def record(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    memory = Memory()
    act = graphed(memory.step, "cpu", record)
    inputs = torch.randn(2, 3), torch.ones(2, dtype=torch.bool), torch.zeros(2, 3)
    with pytest.warns(RuntimeWarning, match="so it runs as it is: operation not permitted when stream is capturing$"):
        found = act(*inputs)
    for ours, theirs in zip((*found, *act(*inputs)), memory.step(*inputs) * 2):
        assert torch.equal(ours, theirs)
