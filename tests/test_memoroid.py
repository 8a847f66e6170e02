"""Every memoroid: its algebra, and one memory by four roads: the package, the file's scan, steps, each episode alone."""

import functools

import pytest
import torch
from conftest import load_script

from cleanrl_memoroid import scan

MEMORIES = {  # the script, the class, its arguments
    "FFM": ("dqn_tbb_ffm", "FFM", (6, 5, 3, 4)),  # inputs, outputs, traces, contexts
    "LRU": ("dqn_tbb_lru", "LRU", (6, 4, 0.0, 1.0)),  # width, state, r_min, r_max
    "StackedLRU": ("dqn_tbb_lru", "StackedLRU", (6, 2, 4, 0.0, 1.0)),  # width, layers, and so on
    "GatedLRU": ("dqn_tbb_glru", "GatedLRU", (6, 4, 0.0, 1.0)),
    "StackedGatedLRU": ("dqn_tbb_glru", "StackedGatedLRU", (6, 2, 4, 0.0, 1.0)),
    "MinGRU": ("dqn_tbb_mingru", "MinGRU", (6, 5)),  # inputs, outputs
    "S5": ("dqn_tbb_s5", "S5", (6, 4, 0.001, 0.1)),  # width, state, dt_min, dt_max
    "StackedS5": ("dqn_tbb_s5", "StackedS5", (6, 2, 4, 0.001, 0.1)),
    "LinearAttention": ("dqn_tbb_linattn", "LinearAttention", (6, 5, 3, 4)),  # inputs, outputs, keys, values
}
DIAGONAL = ["FFM", "LRU", "S5"]  # one layer that fades and turns; what is said of it holds for its stack
GATED = ["GatedLRU", "MinGRU"]  # one layer that fades as its input says
ALGEBRAS = [*DIAGONAL, *GATED, "LinearAttention"]
BEGINS = [0, 1, 4, 5, 11]  # episodes of 1, 3, 1, 6 and 9 steps on a tape of 20
LONG_BEGINS = [0, 1, 4, 5, 11, 30, 70, 97]  # on a tape of 100, of which the package makes chunks of 32
LENGTHS = [1, 2, 3, 20, 31, 32, 33, 64, 65, 1000]
ROADS = ["package", "own"]


def take(road, script, monkeypatch):
    """From here on a script computes along a tape by the package's function, or by the scan that it holds itself."""
    fast = "linear_attention" if hasattr(script, "linear_attention") else "linear_scan"
    if road == "own":
        monkeypatch.setattr(script, fast, None)
        monkeypatch.setattr(script, "linear_scan", None)
    elif not hasattr(scan, fast):
        pytest.skip(f"this package has no {fast}")
    else:
        assert getattr(script, fast) is getattr(scan, fast)


def begins_at(rows, steps):
    begins = torch.zeros(steps, dtype=torch.bool)
    begins[[row for row in rows if row < steps]] = True
    return begins


@pytest.fixture(params=MEMORIES)
def memory(request):
    script, name, sizes = MEMORIES[request.param]
    memory = getattr(load_script(script), name)(*sizes)
    with torch.no_grad():
        if name == "FFM":
            memory.alpha[0] = -0.3  # the sign must not matter
        for parameter in memory.parameters():  # gains that are one and biases that are zero would hide mistakes
            parameter += 0.05 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return memory


@pytest.fixture
def script(memory):
    return load_script(type(memory).__module__)


@pytest.fixture(params=ROADS)
def road(request, script, monkeypatch):
    take(request.param, script, monkeypatch)
    return request.param


@pytest.fixture
def identity(script, memory, monkeypatch):
    """The identity that the memoroid itself hands to `resettable`, a number for each part of an element."""
    found, resettable = [], script.resettable

    def listen(operator, identity):
        found.append(identity)
        return resettable(operator, identity)

    with monkeypatch.context() as patch:
        take("own", script, patch)
        patch.setattr(script, "resettable", listen)
        memory(torch.randn(2, 6), begins_at([0], 2))
    return found[0]


def only(names):
    return pytest.mark.parametrize("memory", names, indirect=True)


def initial_state(memory, num_envs):
    if hasattr(memory, "initial_state"):
        return memory.initial_state(num_envs)
    size = memory.nu.shape if hasattr(memory, "nu") else memory.decay().shape  # a layer of a stack has none of its own
    return torch.zeros(num_envs, *size, dtype=torch.complex64)


def element(memory, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = {"generator": generator}
    if hasattr(memory, "alpha"):
        steps_covered = torch.randint(0, 9, (steps,), **random).float()
        return torch.randn(steps, 4, 3, dtype=torch.complex64, **random), steps_covered
    if hasattr(memory, "attend"):
        return (torch.randn(steps, 3, 5, **random),)
    dtype = torch.complex64 if hasattr(memory, "C") else torch.float32
    return tuple(torch.randn(steps, 4, dtype=dtype, **random) for _ in range(2))


def state_of(memory, element):
    """The part of a fading memoroid's element that the readout sees."""
    return element[0] if hasattr(memory, "alpha") else element[1]


def values_and_gradients(memory, obs, begins, forward=None, weight=None):
    """Output, and gradients of its weighted sum in obs and in every parameter that is learned."""
    obs = obs.clone().requires_grad_()
    out = (forward or memory)(obs, begins)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)) if weight is None else weight
    learned = [p for p in memory.parameters() if p.requires_grad]
    # a single step has no use for the decay in the operator's form: no gradient, which is zero
    gradients = torch.autograd.grad(out, [obs, *learned], weight.to(out.dtype), allow_unused=True, materialize_grads=True)
    return out.detach(), *gradients


@only(ALGEBRAS)
def test_operator_is_associative_and_has_an_identity(memory, identity):
    a, b, c = (element(memory, 50, seed=s) for s in range(3))
    op = memory.operator
    torch.testing.assert_close(op(op(a, b), c), op(a, op(b, c)), rtol=1e-4, atol=1e-5)
    assert len(identity) == len(a)
    identity = tuple(torch.full_like(v, e) for e, v in zip(identity, a))
    torch.testing.assert_close(op(identity, a), a)
    torch.testing.assert_close(op(a, identity), a)


@only([*DIAGONAL, *GATED])
def test_operator_is_not_commutative(memory):
    """So that the other tests test order."""
    a, b = (element(memory, 50, seed=s) for s in range(2))
    assert not torch.allclose(state_of(memory, memory.operator(a, b)), state_of(memory, memory.operator(b, a)))


@only(ALGEBRAS)
def test_resettable_is_associative_for_every_pattern_of_begins(script, memory, identity):
    """All eight combinations of begins in three elements, in everything that an element holds."""
    op = script.resettable(memory.operator, identity)
    flags = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    a, b, c = ((*element(memory, 8, seed=i), flags[:, i]) for i in range(3))
    for left, right in zip(op(op(a, b), c), op(a, op(b, c))):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    identity = (*(torch.full_like(v, e) for e, v in zip(identity, a)), torch.zeros(8, dtype=torch.bool))
    for got, expected in zip((*op(identity, a), *op(a, identity)), (*a, *a)):
        torch.testing.assert_close(got, expected)
    restarted = op(a, (*b[:-1], torch.ones(8, dtype=torch.bool)))
    torch.testing.assert_close(restarted[:-1], b[:-1])  # what came before a begin is gone
    going_on = op(a, (*b[:-1], torch.zeros(8, dtype=torch.bool)))
    torch.testing.assert_close(going_on[:-1], memory.operator(a[:-1], b[:-1]))
    assert restarted[-1].all() and torch.equal(going_on[-1], a[-1])


@pytest.mark.parametrize("steps", [*LENGTHS[:-1], 127, 129])
def test_associative_scan_is_the_loop(steps):
    """For products of matrices, of which none commutes: in values, gradients and the number of applications."""
    script, rows, calls = load_script("dqn_tbb_ffm"), 0, 0

    def operator(left, right):
        nonlocal rows, calls
        rows, calls = rows + len(left[0]), calls + 1
        return left[0] @ right[0], left[1] + right[1]

    matrices = torch.linalg.qr(torch.randn(steps, 3, 3, dtype=torch.float64)).Q.requires_grad_()
    number = torch.randn(steps, dtype=torch.float64)
    found = script.associative_scan(operator, (matrices, number))
    loop = torch.stack([functools.reduce(torch.matmul, matrices[: t + 1]) for t in range(steps)])
    torch.testing.assert_close(found, (loop, number.cumsum(0)))
    weight = torch.randn_like(loop)
    ours, theirs = (torch.autograd.grad(out, matrices, weight)[0] for out in (found[0], loop))
    torch.testing.assert_close(ours, theirs)
    assert rows <= 2 * steps and calls <= 2 * steps.bit_length()


@pytest.mark.parametrize("steps", LENGTHS)
def test_own_scan_equals_the_package(script, memory, monkeypatch, steps):
    obs, begins = torch.randn(steps, 6), torch.rand(steps) < 0.05
    begins[0] = True
    take("package", script, monkeypatch)
    fast = values_and_gradients(memory, obs, begins)
    take("own", script, monkeypatch)
    own = values_and_gradients(memory, obs, begins)
    for a, b in zip(fast, own):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-6)


@pytest.mark.parametrize(("begins", "steps"), [(BEGINS, 20), (LONG_BEGINS, 100)])
def test_tape_equals_each_episode_alone(memory, road, begins, steps):
    obs = torch.randn(steps, 6)
    tape = memory(obs, begins_at(begins, steps))
    for begin, end in zip(begins, [*begins[1:], steps]):
        alone = memory(obs[begin:end], begins_at([0], end - begin))
        torch.testing.assert_close(tape[begin:end], alone, rtol=1e-5, atol=1e-5)


def test_a_tape_begins_at_its_first_row_with_or_without_the_mark(memory, road):
    obs = torch.randn(20, 6)
    torch.testing.assert_close(memory(obs, begins_at(BEGINS[1:], 20)), memory(obs, begins_at(BEGINS, 20)))


def test_one_step_rollout_equals_scan(memory):
    """Two environments whose episodes begin at different rows, against a tape for each."""
    obs = torch.randn(20, 2, 6)
    begins = torch.stack([begins_at(BEGINS, 20), begins_at([0, 7], 20)], dim=1)
    state = torch.full_like(initial_state(memory, 2), torch.nan)  # the first begin must clear it
    rollout = []
    for t in range(20):
        out, state = memory.step(obs[t], begins[t], state)
        rollout.append(out)
    for n in range(2):
        torch.testing.assert_close(torch.stack(rollout)[:, n], memory(obs[:, n], begins[:, n]), rtol=1e-5, atol=1e-5)


def test_the_initial_state_is_what_a_begin_leaves(memory):
    obs, state = torch.randn(3, 6), initial_state(memory, 3)
    begun = memory.step(obs, torch.ones(3, dtype=torch.bool), torch.randn_like(state))
    torch.testing.assert_close(memory.step(obs, torch.zeros(3, dtype=torch.bool), state), begun)
    assert state.shape == begun[1].shape and state.dtype == begun[1].dtype


def skip_if_nan_spreads(memory, road):
    if hasattr(memory, "attend") and road == "package":
        pytest.skip("nan spreads in the masked products of linear_attention; the scripts stop at a loss that is not finite")


def test_no_nan_across_a_begin(memory, road):
    skip_if_nan_spreads(memory, road)
    obs = torch.randn(20, 6)
    obs[2] = torch.nan  # in the second episode, rows 1 to 3
    out = memory(obs, begins_at(BEGINS, 20))
    assert torch.isfinite(out[4:]).all() and torch.isfinite(out[:2]).all()
    assert torch.isnan(out[2:4]).all()  # the nan does reach its own episode


def test_no_gradient_across_a_begin(memory, road):
    obs = torch.randn(20, 6, requires_grad=True)
    out = memory(obs, begins_at(BEGINS, 20))
    # of row 13, in the last episode, which begins at 11; weighted, as the plain sum of normalised outputs is constant
    (grad,) = torch.autograd.grad(out[13] @ torch.randn(out.shape[1]), obs)
    assert (grad[4:11] == 0).all() and (grad[14:] == 0).all() and (grad[0] == 0).all()
    assert (grad[11:14].abs().sum(1) > 1e-6).all()


@pytest.mark.parametrize("rows", [[2], [50], [0], [99], [33, 69, 98], [63, 64]])
def test_a_broken_observation_changes_nothing_in_other_episodes(memory, road, rows):
    """Values and gradients there are, to the last bit, those of a tape with a sound observation in its place."""
    skip_if_nan_spreads(memory, road)
    begins, obs = begins_at(LONG_BEGINS, 100), torch.randn(100, 6)
    episode = begins.cumsum(0)
    others = ~torch.isin(episode, episode[rows])
    weight = torch.randn_like(memory(obs, begins)) * others[:, None]
    sound = values_and_gradients(memory, obs, begins, weight=weight)
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        obs[rows, 2] = value  # in one place: an infinite one leaves some of a product's results infinite, not nan
        broken = values_and_gradients(memory, obs, begins, weight=weight)
        for a, b in zip(broken[:2], sound[:2]):  # a parameter's gradient sums over all rows, and 0 * nan is nan
            assert torch.isfinite(b).all()
            torch.testing.assert_close(a[others], b[others], rtol=0, atol=0, msg=lambda text, v=value: f"{v}: {text}")


def test_first_observation_reaches_the_end_of_a_long_episode(memory, road):
    """The gradient is not truncated: 2,000 steps back it is of the size that it has 1,000 steps back."""
    with torch.no_grad():
        for layer in memory.modules():
            if hasattr(layer, "alpha"):
                layer.alpha[1] = 1e-6
            elif hasattr(layer, "nu"):
                layer.nu.fill_(torch.tensor(0.0005).log())  # fades to e^-1 over the 2,000 steps
            elif hasattr(layer, "log_step"):
                layer.log_step.fill_(torch.tensor(0.001).log())
            elif type(layer).__name__ == "MinGRU":
                layer.inputs.bias[:5] = -8  # z
    obs = torch.randn(2000, 6, requires_grad=True)
    out = memory(obs, begins_at([0], 2000))[-1]
    (grad,) = torch.autograd.grad(out @ torch.randn(out.shape), obs)
    assert grad[0].abs().max() > 0.1 * grad[1000].abs().max() > 0


@only(DIAGONAL)
def test_decay_is_what_the_operator_multiplies_earlier_memory_by(memory):
    earlier = element(memory, 5)
    nothing, decay = torch.zeros_like(state_of(memory, earlier)), memory.decay().to(torch.complex64)
    one = (nothing, torch.ones(5)) if hasattr(memory, "alpha") else (decay.expand_as(nothing), nothing)  # a step without input
    torch.testing.assert_close(state_of(memory, memory.operator(earlier, one)), state_of(memory, earlier) * decay)
    assert memory.decay().dtype == torch.complex128 and (memory.decay().abs() <= 1).all()


@only(GATED)
def test_a_gated_step_is_the_operator_with_what_its_input_says(memory):
    obs, state = torch.randn(5, 6), torch.randn_like(initial_state(memory, 5))
    decay, x, *_ = memory.lift(obs)
    _, after = memory.step(obs, torch.zeros(5, dtype=torch.bool), state)
    torch.testing.assert_close(after, memory.operator((torch.ones_like(state), state), (decay, x))[1])
    assert (decay.abs() <= 1).all() and decay.abs().std() > 0.01


def gated(r, i, state_size=6):
    """A GatedLRU whose gates stand at the logits `r` and `i` whatever it sees, as lift gives it; and its lambda."""
    memory = load_script("dqn_tbb_glru").GatedLRU(6, state_size, 0.5, 0.99)
    with torch.no_grad():
        memory.gates.weight.zero_()
        memory.gates.bias[:state_size], memory.gates.bias[state_size:] = r, i
    a, x, (normed, _) = memory.lift(torch.randn(5, 6, requires_grad=True))
    unit = torch.view_as_complex((normed @ memory.B).unflatten(-1, (-1, 2)))
    eigenvalue = torch.exp(torch.complex(-memory.nu.exp(), memory.theta.exp()))
    return memory, a, x, unit, eigenvalue.expand_as(a)


@pytest.mark.parametrize("r", [50.0, 2.0, 0.0, -4.0])
def test_the_gated_lru_keeps_its_variance_whatever_its_gate_says(r):
    memory, a, x, unit, eigenvalue = gated(r, i=50.0)
    torch.testing.assert_close(a.abs(), eigenvalue.abs() ** torch.sigmoid(torch.tensor(r)))
    torch.testing.assert_close((x / unit).abs() ** 2 + a.abs() ** 2, torch.ones_like(a.abs()), rtol=1e-5, atol=1e-5)
    if r == 50:
        torch.testing.assert_close(a, eigenvalue)


@pytest.mark.parametrize("r", [-50.0, -200.0])
def test_a_shut_gate_holds_the_memory_and_has_finite_gradients(r):
    memory, a, x, unit, eigenvalue = gated(r, i=2.0)
    torch.testing.assert_close(a, eigenvalue / eigenvalue.abs())
    assert (x.abs() <= 1e-3 * unit.abs()).all()
    gradients = torch.autograd.grad((a.abs().sum() + x.abs().sum()), [memory.nu, memory.theta, memory.gates.bias, memory.B])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@only(["S5"])
def test_s5_fades_also_with_eigenvalues_in_the_right_half_plane(memory):
    with torch.no_grad():
        memory.lambda_re.fill_(3.0)
    assert (memory.decay().abs() < 1).all()
    assert torch.isfinite(memory(torch.randn(1000, 6), begins_at([0], 1000))).all()
