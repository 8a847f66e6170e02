"""benchmark/speed/ppo_update.py: the LSTMs that it times compute the same, and its update moves what PPO would."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def bench():
    sys.path.append(str(ROOT / "benchmark" / "speed"))
    import ppo_update

    return ppo_update


def outcome(bench, name, obs, begins):
    """Logits, values, loss and gradients of one update, the rows environment by environment."""
    update, forward, agent = bench.contender(name, obs, begins, hidden_size=32)
    policy, value, places = forward()
    order = places.argsort()
    loss = update()
    grads = {key: p.grad for key, p in agent.named_parameters() if p.grad is not None}
    logits = policy.logits if name in (bench.LOOP, bench.FUSED) else policy.flatten(1)
    return logits[order], value[order], torch.tensor(loss), grads


def test_the_step_by_step_lstm_is_the_baseline(bench):
    obs, begins = bench.rollout(60, 5)
    assert begins[1:].any()
    loop, baseline = (outcome(bench, name, obs, begins) for name in (bench.LOOP, "ppo_sbb_lstm"))
    torch.testing.assert_close(loop, baseline, rtol=1e-4, atol=1e-5)


def test_the_fused_lstm_is_the_loop_without_resets(bench):
    obs, begins = bench.rollout(60, 5)
    with_resets = outcome(bench, bench.LOOP, obs, begins)
    begins[1:] = False
    loop, fused = (outcome(bench, name, obs, begins) for name in (bench.LOOP, bench.FUSED))
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-5)
    assert (fused[1] - with_resets[1]).abs().max() > 1e-3  # so a reset does something


@pytest.mark.parametrize(
    "name", ["ppo_tbb_ffm", "ppo_tbb_lru", "ppo_tbb_glru", "ppo_tbb_mingru", "ppo_tbb_s5", "ppo_tbb_linattn"]
)
def test_a_memoroid_has_the_rows_of_the_batch_in_order(bench, name):
    obs, begins = bench.rollout(30, 3)
    update, forward, agent = bench.contender(name, obs, begins, hidden_size=32)
    policy, value, places = forward()
    state, found = agent.memory.initial_state(3), []
    with torch.no_grad():
        for row in zip(obs, begins):
            _, one, state = agent.step(*row, state)
            found.append(one)
    torch.testing.assert_close(value, torch.stack(found).T.flatten()[places], rtol=1e-4, atol=1e-5)
    before = [p.clone() for p in agent.parameters()]
    assert update() == update()
    assert all(map(torch.equal, before, agent.parameters()))


@pytest.mark.parametrize("name", ["ppo_tbb_lru", "ppo_sbb_lstm", "LSTM step by step"])
def test_an_epoch_has_every_row_once(bench, name):
    epoch, forward, agent = bench.contender(name, *bench.rollout(30, 4), hidden_size=32, minibatches=2)
    _, whole, order = forward()
    _, values, places = zip(*(forward(envs) for envs in np.split(np.arange(4), 2)))
    assert sorted(torch.cat(places).tolist()) == list(range(120))
    torch.testing.assert_close(torch.cat(values)[torch.cat(places).argsort()], whole[order.argsort()], rtol=1e-4, atol=1e-5)
    passes = []
    agent.encoder.register_forward_hook(lambda _, args, out: passes.append(out.shape[0]))
    epoch()
    assert passes == [60 if name == bench.LOOP else 64] * 2  # a tape is padded
