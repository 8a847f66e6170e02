"""FFM as a memoroid: its algebra, and one memory by four roads: operator, linear_scan, step by step, each episode alone."""

import pytest
import torch

BEGINS = [0, 1, 4, 5, 11]  # episodes of 1, 3, 1, 6 and 9 steps on a tape of 20


def begins_at(rows, steps):
    begins = torch.zeros(steps, dtype=torch.bool)
    begins[rows] = True
    return begins


@pytest.fixture
def memory(ffm):
    memory = ffm.FFM(6, 5, 3, 4)
    with torch.no_grad():
        memory.alpha[0] = -0.3  # the sign must not matter
    return memory


def element(steps, begins=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, 4, 3, dtype=torch.complex64, generator=generator)
    t = torch.randint(0, 9, (steps,), generator=generator).float()
    return (x, t) if begins is None else (x, t, begins)


def test_operator_is_associative_and_has_an_identity(memory):
    a, b, c = (element(50, seed=s) for s in range(3))
    op = memory.operator
    torch.testing.assert_close(op(op(a, b), c), op(a, op(b, c)), rtol=1e-4, atol=1e-5)
    identity = tuple(e.expand_as(v) for e, v in zip(memory.identity, a))
    torch.testing.assert_close(op(identity, a), a)
    torch.testing.assert_close(op(a, identity), a)
    assert not torch.allclose(op(a, b)[0], op(b, a)[0])  # it is not commutative: order is tested


def test_resettable_is_associative_for_every_pattern_of_begins(ffm, memory):
    """All eight combinations of begins in three elements. The readout sees X; a longer scan sees t and the flag too."""
    op = ffm.resettable(memory.operator, memory.identity)
    flags = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    a, b, c = (element(8, flags[:, i], seed=i) for i in range(3))
    for left, right in zip(op(op(a, b), c), op(a, op(b, c))):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    identity = (*(e.expand_as(v) for e, v in zip(memory.identity, a)), torch.zeros(8, dtype=torch.bool))
    for got, expected in zip((*op(identity, a), *op(a, identity)), (*a, *a)):
        torch.testing.assert_close(got, expected)
    restarted = op(a, (*b[:2], torch.ones(8, dtype=torch.bool)))
    torch.testing.assert_close(restarted[0], b[0])  # what came before a begin is gone


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 33, 1000])
def test_operator_scan_equals_linear_scan(ffm, memory, monkeypatch, steps):
    obs = torch.randn(steps, 6, requires_grad=True)
    begins = torch.rand(steps) < 0.05
    begins[0] = True
    weight = torch.randn(steps, 5)

    def values_and_gradients():
        out = memory(obs, begins)
        # a single step has no use for the decay in the operator's form: no gradient, which is zero
        learned = [p for p in memory.parameters() if p.requires_grad]
        return out, *torch.autograd.grad(out, [obs, *learned], weight, allow_unused=True, materialize_grads=True)

    assert ffm.linear_scan is not None
    fast = values_and_gradients()
    monkeypatch.setattr(ffm, "linear_scan", None)
    plain = values_and_gradients()
    for a, b in zip(fast, plain):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-6)


@pytest.mark.parametrize("scan", ["linear_scan", "blelloch_scan"])
def test_tape_equals_each_episode_alone(ffm, memory, monkeypatch, scan):
    if scan == "blelloch_scan":
        monkeypatch.setattr(ffm, "linear_scan", None)
    obs = torch.randn(20, 6)
    tape = memory(obs, begins_at(BEGINS, 20))
    for begin, end in zip(BEGINS, [*BEGINS[1:], 20]):
        alone = memory(obs[begin:end], begins_at([0], end - begin))
        torch.testing.assert_close(tape[begin:end], alone)


def test_one_step_rollout_equals_scan(memory):
    """Two environments whose episodes begin at different rows, against a tape for each."""
    obs = torch.randn(20, 2, 6)
    begins = torch.stack([begins_at(BEGINS, 20), begins_at([0, 7], 20)], dim=1)
    state = torch.full_like(memory.initial_state(2), torch.nan)  # the first begin must clear it
    rollout = []
    for t in range(20):
        out, state = memory.step(obs[t], begins[t], state)
        rollout.append(out)
    for n in range(2):
        torch.testing.assert_close(torch.stack(rollout)[:, n], memory(obs[:, n], begins[:, n]))


@pytest.mark.parametrize("scan", ["linear_scan", "blelloch_scan"])
def test_no_gradient_and_no_nan_across_a_begin(ffm, memory, monkeypatch, scan):
    if scan == "blelloch_scan":
        monkeypatch.setattr(ffm, "linear_scan", None)
    obs = torch.randn(20, 6)
    obs[2] = torch.nan  # in the second episode, rows 1 to 3
    obs.requires_grad_()
    out = memory(obs, begins_at(BEGINS, 20))
    assert torch.isfinite(out[4:]).all() and torch.isfinite(out[:1]).all()
    assert torch.isnan(out[2:4]).all()  # the nan does reach its own episode
    (grad,) = torch.autograd.grad(out[13].sum(), obs)  # row 13 is in the last episode, which begins at 11
    assert (grad[4:11] == 0).all() and (grad[14:] == 0).all() and (grad[0] == 0).all()
    assert (grad[11:14].abs().sum(1) > 0).all()


def test_first_observation_reaches_the_end_of_a_long_episode(ffm):
    """The gradient is not truncated, not even 2,000 steps back."""
    memory = ffm.FFM(6, 5, 3, 4)
    obs = torch.randn(2000, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(memory(obs, begins_at([0], 2000))[-1].sum(), obs)
    assert grad[0].abs().max() > 0


def test_decay_is_the_exponential_that_the_operator_uses(memory):
    x, t = element(5)
    one = (torch.zeros(5, 4, 3, dtype=torch.complex64), torch.ones(5))
    torch.testing.assert_close(memory.operator((x, t), one)[0], x * memory.decay().to(torch.complex64))
    assert memory.decay().dtype == torch.complex128 and (memory.decay().abs() <= 1).all()
