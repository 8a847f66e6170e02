"""linear_scan and associative_scan against the definition, in values and gradients."""
# ruff: noqa: B023  (the closures are called before their loop goes on)

import itertools
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from cleanrl_memoroid import scan, scan_numba, scan_torch
from cleanrl_memoroid.scan import associative_scan, linear_attention, linear_scan

TOLERANCE = {torch.float32: 3e-6, torch.complex64: 3e-6, torch.float64: 1e-13, torch.complex128: 1e-13}
SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}
LENGTHS = [1, 2, 3, 31, 32, 33, 48, 49, 63, 64, 65, 397]  # the last: its chunks are so many that they are cut into chunks
BACKENDS = ["numba", "torch"]


def make(steps, channels, dtype, varying=False, groups=None, state=False, seed=0):
    """decay, x, begins, h0 of a tape in double precision, decays up to one in size."""
    generator = torch.Generator().manual_seed(seed)
    size = (steps, *channels) if varying else channels
    decay = (0.7 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype)
    if dtype.is_complex:
        decay = decay * torch.exp(1j * torch.rand(size, generator=generator, dtype=torch.float64))
    x = torch.randn(steps, *channels, dtype=dtype, generator=generator)
    begins = None if groups is None else torch.rand(steps, *groups, generator=generator) < 0.1
    h0 = torch.randn(channels, dtype=dtype, generator=generator) if state else None
    return decay, x, begins, h0


def loop(decay, x, begins, h0, reverse):
    """The recurrence once more, independent of the package: the definition is a loop over rows."""
    h, state = [None] * len(x), torch.zeros_like(x[0]) if h0 is None else h0
    for t in sorted(range(len(x)), reverse=reverse):
        a = decay[t] if decay.dim() == x.dim() else decay
        if begins is not None:
            flag = begins[t].reshape(begins[t].shape + (1,) * (state.dim() - begins[t].dim()))
            state = torch.where(flag, 0, state)
        state = x[t] + a * state
        h[t] = state
    return torch.stack(h)


def outcome(scan, inputs, weight):
    """Output and all gradients of a scan; inputs that are None or bool have none."""
    leaves = [v.detach().clone().requires_grad_() if v is not None and v.dtype != torch.bool else v for v in inputs]
    h = scan(*leaves)
    wanted = [v for v in leaves if v is not None and v.requires_grad]
    return [h, *torch.autograd.grad(h, wanted, weight.to(h.dtype))]


def assert_equal(ours, theirs, tolerance):
    for name, a, b in zip(("h", "grad decay", "grad x", "grad h0"), ours, theirs):
        assert a.shape == b.shape
        scale = 1 + b.abs().max()
        assert (a.to(b.dtype) - b).abs().max() <= tolerance * scale, f"{name}: {(a.to(b.dtype) - b).abs().max() / scale:.1e}"


@pytest.mark.parametrize("steps", LENGTHS)
def test_backends_equal_the_loop(steps):
    """All of them in one test, as the loop is what takes the time."""
    backends = [*BACKENDS, "ref"] if steps <= 100 else BACKENDS  # the definition needs no long test
    shapes = [((5,), None), ((5,), ()), ((4, 3), ()), ((4, 3), (4,)), ((4,), (4,)), ((), ()), ((1,), (1,))]
    dtypes = [torch.float64, torch.complex128]
    cases = list(itertools.product(shapes, dtypes, *[[False, True]] * 3))
    for (channels, groups), dtype, varying, state, reverse in cases if steps <= 3 else cases[steps % 3 :: 3]:  # a third each
        inputs = make(steps, channels, dtype, varying, groups, state)
        weight = torch.randn(steps, *channels, dtype=dtype)
        single = [v if v is None or v.dtype == torch.bool else v.to(SINGLE[dtype]) for v in inputs]
        double_decay = [inputs[0], *single[1:]]  # a decay in double for rows in single
        for cast, tolerance in ((inputs, TOLERANCE[dtype]), *((v, TOLERANCE[SINGLE[dtype]]) for v in (single, double_decay))):
            exact = [v if v is None or v.dtype == torch.bool else v.to(dtype) for v in cast]
            expected = outcome(lambda *v: loop(*v, reverse), exact, weight)
            for backend in backends:
                ours = outcome(lambda *v: linear_scan(*v, reverse=reverse, backend=backend), cast, weight)  # noqa: B023
                assert ours[0].dtype == cast[1].dtype and ours[1].dtype == cast[0].dtype
                assert_equal(ours, expected, tolerance * 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["first row", "last row", "every row"])
def test_begin_at_the_edges(backend, where):
    for reverse in (False, True):
        decay, x, _, h0 = make(70, (3,), torch.complex128, state=True)
        begins = torch.zeros(70, dtype=torch.bool)
        begins[{"first row": 0, "last row": -1, "every row": slice(None)}[where]] = True
        inputs, weight = (decay, x, begins, h0), torch.randn(70, 3, dtype=torch.complex128)
        expected = outcome(lambda *v: loop(*v, reverse), inputs, weight)
        assert_equal(outcome(lambda *v: linear_scan(*v, reverse=reverse, backend=backend), inputs, weight), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_decay(backend):
    """A decay of one value, or one per row, has the summed gradient in its own shape."""
    _, x, begins, h0 = make(70, (4, 3), torch.float64, groups=(), state=True)
    weight = torch.randn_like(x)
    for shape in [(), (1,), (3,), (4, 1), (1, 3), (70, 1, 1), (70, 4, 1)]:
        decay = 0.5 + 0.5 * torch.rand(shape, dtype=torch.float64)
        h_shape = (4, 3) if len(shape) < 3 else (70, 4, 3)
        expected = outcome(lambda a, *v: loop(a.expand(h_shape), *v, False), (decay, x, begins, h0), weight)
        ours = outcome(lambda *v: linear_scan(*v, backend=backend), (decay, x, begins, h0), weight)
        assert ours[1].shape == shape
        assert_equal(ours, expected, 1e-12)
    number = linear_scan(0.5, x, begins, backend=backend)
    assert_equal([number], [loop(torch.full((3,), 0.5, dtype=torch.float64), x, begins, None, False)], 1e-13)


@pytest.mark.parametrize("backend", [*BACKENDS, "ref"])
def test_channels_share_x(backend):
    """x is 1 where a constant decay is longer: as if it were expanded, its gradient summed; wherever that dimension stands."""
    shapes = [((4, 16), (1, 16)), ((2, 3, 5), (1, 1, 5)), ((4, 3), (4, 1)), ((4, 1, 3), (1, 1, 3)), ((5,), (1,))]
    shapes += [((2, 3, 8), (1, 3, 8)), ((2, 3, 8), (2, 1, 8)), ((1, 3), (1, 1)), ((3, 2), (1, 1))]
    cases = list(itertools.product(shapes, TOLERANCE, [None, (), (1,)], *[[False, True]] * 2))
    if backend != "numba":  # every shape with every dtype, and by turns with all else: five is no divisor of twelve
        cases = cases[::5]
    for (channels, own), dtype, groups, state, reverse in cases:
        if groups == (1,) and own[0] != 1:
            continue
        kind = torch.complex128 if dtype.is_complex else torch.float64
        decay, x, begins, h0 = make(70, channels, kind, groups=groups, state=state)
        x = torch.randn(70, *own, dtype=kind)
        single = [v if v is None or v.dtype == torch.bool else v.to(dtype) for v in (decay, x, begins, h0)]
        weight = torch.randn(70, *channels, dtype=kind)
        exact = [v if v is None or v.dtype == torch.bool else v.to(kind) for v in single]
        expected = outcome(lambda a, x, *v: loop(a, x.expand(-1, *channels), *v, reverse), exact, weight)
        ours = outcome(lambda *v: linear_scan(*v, reverse=reverse, backend=backend), single, weight.to(dtype))
        assert ours[0].shape == (70, *channels) and ours[2].shape == x.shape
        assert_equal(ours, expected, TOLERANCE[dtype] * 10)


def test_x_is_shared_only_with_a_constant_decay_of_its_channels():
    x, begins = torch.randn(5, 1, 3), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="decay: expected"):
        linear_scan(torch.rand(2, 4), x)
    with pytest.raises(ValueError, match="decay: expected"):
        linear_scan(torch.rand(5, 2, 3), x)  # changes in time
    with pytest.raises(ValueError, match="decay: expected"):
        linear_scan(torch.rand(2), torch.randn(5))
    with pytest.raises(ValueError, match="begins: expected"):
        linear_scan(torch.rand(2, 3), x, begins)
    with pytest.raises(ValueError, match="h0: expected"):
        linear_scan(torch.rand(2, 3), x, h0=torch.rand(4, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    for dtype, varying, reverse in itertools.product([torch.float64, torch.complex128], [False, True], [False, True]):
        decay, x, begins, h0 = make(60, (2,), dtype, varying, (), True)
        leaves = [v.requires_grad_() for v in (decay, x, h0)]
        call = lambda a, x, h0: linear_scan(a, x, begins, h0, reverse=reverse, backend=backend)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", [*BACKENDS, "ref"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_crosses_a_begin(backend, poison):
    """Rows 0-29 hold nan or inf; an episode begins at 30 and another at 60. Also where the decay at a begin is nan."""
    begins = torch.zeros(90, dtype=torch.bool)
    begins[[30, 60]] = True
    for varying, reverse in itertools.product([False, True], [False, True]):
        decay, x, _, h0 = make(90, (3,), torch.float64, varying, state=True)
        if varying:
            decay[[30, 60]] = poison
        flags = begins.flip(0) if reverse else begins
        x[(slice(60, None) if reverse else slice(0, 30))][5] = poison
        if varying and reverse:
            decay = decay.flip(0)
        leaves = [v.requires_grad_() for v in (decay, x, h0)]
        h = linear_scan(leaves[0], leaves[1], flags, leaves[2], reverse=reverse, backend=backend)
        clean = slice(0, 60) if reverse else slice(30, None)
        assert torch.isfinite(h[clean]).all()
        # a poisoned gradient in the last episode reaches none of the rows before it
        weight = torch.ones_like(h)
        last = slice(0, 30) if reverse else slice(60, None)
        middle = slice(30, 60)
        weight[last] = poison
        grad_decay, grad_x, _ = torch.autograd.grad(h, leaves, weight)
        assert torch.isfinite(grad_x[middle]).all()
        if varying:
            assert torch.isfinite(grad_decay[middle]).all()
            assert (grad_decay[flags] == 0).all()


def test_lazy_conjugation_and_strides():
    decay, x, begins, h0 = make(70, (4, 3), torch.complex128, groups=(4,), state=True)
    expected = linear_scan(decay.conj().resolve_conj(), x.conj().resolve_conj(), begins, h0.conj().resolve_conj())
    assert_equal([linear_scan(decay.conj(), x.conj(), begins, h0.conj())], [expected], 0)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_equal([linear_scan(decay, strided, begins, h0)], [linear_scan(decay, x, begins, h0)], 0)
    leaf = x.clone().requires_grad_()
    linear_scan(decay, leaf, begins, h0).conj().real.sum().backward()  # the gradient arrives conjugated lazily, and expanded
    other = x.clone().requires_grad_()
    loop(decay, other, begins, h0, False).conj().real.sum().backward()
    assert_equal([leaf.grad], [other.grad], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    decay, x, begins, _ = make(5, (3,), torch.float64, groups=())
    x.requires_grad_()
    (grad,) = torch.autograd.grad((linear_scan(decay, x, begins, backend=backend) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()
    decay.requires_grad_()
    (grad,) = torch.autograd.grad(linear_scan(decay, x, begins, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()  # linear in x, but not in decay
    (grad,) = torch.autograd.grad((linear_scan(decay, x, begins, backend="ref") ** 2).sum(), x, create_graph=True)
    grad.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend, bound", [("numba", 1e-7), ("torch", 2e-5)])
def test_accuracy_on_a_long_tape(backend, bound):
    steps = 2**14
    alpha, omega = torch.linspace(1e-6, 0.5, 8).double(), 2 * torch.pi / torch.linspace(1, 1000, 4).double()
    decays = [torch.exp(torch.complex(-alpha[:, None], omega)).flatten(), torch.exp(1j * torch.rand(32, dtype=torch.float64))]
    for decay in decays:
        x = torch.randn(steps, 32, dtype=torch.complex64)
        exact = linear_scan(decay, x.to(torch.complex128), backend=backend)
        assert_equal([exact[:2000]], [loop(decay, x[:2000].to(torch.complex128), None, None, False)], 1e-12)
        h = linear_scan(decay, x, backend=backend)
        assert (h - exact).abs().max() <= bound * exact.abs().max()


GOOD = {"decay": torch.ones(3), "x": torch.ones(5, 3), "begins": torch.zeros(5, dtype=torch.bool), "h0": torch.zeros(3)}


@pytest.mark.parametrize(
    "name, value, expected, got",
    [
        ("x", [1.0], "a tensor", "list"),
        ("x", torch.ones(5, 3, dtype=torch.int64), "float32", "int64"),
        ("x", torch.ones(5, 3, dtype=torch.bfloat16), "float32", "bfloat16"),
        ("x", torch.ones(()), "T >= 1", r"\(\)"),
        ("x", torch.ones(0, 3), "T >= 1", r"\(0, 3\)"),
        ("decay", torch.ones(4), "broadcastable", r"\(4,\)"),
        ("decay", torch.ones(4, 3), "5 rows|broadcastable", r"\(4, 3\)"),
        ("decay", torch.ones(1, 3), "5 rows", r"\(1, 3\)"),
        ("decay", torch.ones(1, 5, 3), "broadcastable", r"\(1, 5, 3\)"),
        ("decay", torch.ones(3, dtype=torch.complex64), "float32", "complex64"),
        ("decay", torch.ones(3, dtype=torch.int64), "float32", "int64"),
        ("decay", "fast", "a tensor or a number", "fast"),
        ("decay", torch.ones(3, device="meta"), "device cpu", "meta"),
        ("begins", torch.zeros(5), "bool", "float32"),
        ("begins", [True], "bool", "list"),
        ("begins", torch.zeros(4, dtype=torch.bool), r"\[T\]", r"\(4,\)"),
        ("begins", torch.zeros(5, 2, dtype=torch.bool), r"\[T, N\]", r"\(5, 2\)"),
        ("h0", torch.zeros(4), "broadcastable", r"\(4,\)"),
        ("h0", torch.zeros(1, 1, 3), "broadcastable", r"\(1, 1, 3\)"),
        ("h0", torch.zeros(3, dtype=torch.float64), "float32", "float64"),
        ("h0", 0.0, "a tensor", "float"),
        ("backend", "cuda", "'auto'", "'cuda'"),
    ],
)
def test_errors_name_argument_expected_got_remedy(name, value, expected, got):
    with pytest.raises(ValueError, match=rf"(?s)^{name}: .*expected.*({expected}).*got.*{got}.*;"):
        linear_scan(**{**GOOD, name: value})


def test_importing_the_package_compiles_nothing():
    code = "import sys, cleanrl_memoroid.scan; sys.exit(any(m in sys.modules for m in ('numba', 'triton', 'jax')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_numba_the_torch_backend_serves(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(scan_numba, "forward", None)
    scan._module.cache_clear()
    assert torch.isfinite(linear_scan(**GOOD)).all()
    with pytest.raises(ValueError, match="^backend: expected an installed one, got 'numba'; pip install numba"):
        linear_scan(**GOOD, backend="numba")
    scan._module.cache_clear()


FIRST_SCANS = """
import sys, warnings, torch
from cleanrl_memoroid.scan import linear_scan
x = torch.ones(3, 2, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        linear_scan(0.5, x).sum().backward()
print(len(caught), caught[0].message)
assert x.grad.tolist() == [[5.25, 5.25], [4.5, 4.5], [3, 3]]
try:
    linear_scan(0.5, x, backend="numba")
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("what", ["import", "cache"])
def test_a_broken_numba_costs_one_warning(tmp_path, what):
    """A numba that cannot be imported, or finds no place for its cache: plain PyTorch instead, unless numba was asked for."""
    shutil.copytree(
        os.path.dirname(scan.__file__), tmp_path / "cleanrl_memoroid", ignore=shutil.ignore_patterns("__pycache__")
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    if what == "import":
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less.')")
        expected = "1 numba fails.*plain PyTorch.*install a numba.*ImportError: Numba needs NumPy 2.3 or less.\nImportError\n"
    else:
        (tmp_path / "cleanrl_memoroid" / "__pycache__").touch()  # a file, where no directory can be made
        env |= {name: os.devnull for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "LOCALAPPDATA")}
        expected = "1 numba fails.*plain PyTorch.*NUMBA_CACHE_DIR.*RuntimeError: cannot cache.*\nRuntimeError\n"
    done = subprocess.run([sys.executable, "-c", FIRST_SCANS], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert re.fullmatch(expected, done.stdout), done


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_kernel_that_fails_costs_one_warning(monkeypatch, name):
    """Also in the middle of a graph, of whatever shapes; and for good."""
    calls = []

    def fail(*args):
        calls.append(args)
        raise TypeError("planted")

    cases = [((4,), (4,), ()), ((4, 3), (1, 3), ()), ((4, 3), (1, 3), (1,)), ((4, 3), (4, 3), (4,))]
    monkeypatch.setattr(scan_numba, "_" + name, fail)
    scan._module.cache_clear()
    with pytest.warns(RuntimeWarning, match="numba fails.*plain PyTorch.*TypeError: planted") as caught:
        for channels, own, groups in cases * 2:
            decay, _, begins, h0 = make(70, channels, torch.complex128, groups=groups, state=True)
            inputs = decay, torch.randn(70, *own, dtype=torch.complex128), begins, h0
            weight = torch.randn(70, *channels, dtype=torch.complex128)
            expected = outcome(lambda a, x, *v: loop(a, x.expand(-1, *channels), *v, False), inputs, weight)
            assert_equal(outcome(linear_scan, inputs, weight), expected, 1e-12)
    assert len(caught) == len(calls) == 1
    with pytest.raises(TypeError, match="planted"):
        outcome(lambda *v: linear_scan(*v, backend="numba"), inputs, weight)
    scan._module.cache_clear()


# linear attention


def attention_loop(query, key, value, begins):
    rows, memory = [], 0
    for q, k, v, begin in zip(query, key, value, begins):
        memory = (0 if begin else memory) + torch.outer(k, v)
        rows.append(q @ memory)
    return torch.stack(rows)


@pytest.mark.parametrize("steps", [1, 2, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("where", ["none", "0", "edges", "every", "some"])
def test_linear_attention_equals_loop(steps, where):
    begins = torch.zeros(steps, dtype=torch.bool)
    begins[{"none": [], "0": [0], "edges": slice(0, None, 32), "every": slice(None), "some": slice(5, None, 13)}[where]] = True
    for dtype in (torch.float32, torch.float64):
        query, key, weight = (torch.randn(steps, size, dtype=dtype) for size in (3, 3, 5))
        value = torch.randn(steps, 5, dtype=dtype)
        exact = [e.double() for e in (query, key, value)]
        expected = outcome(attention_loop, [*exact, begins], weight.double())
        ours = outcome(linear_attention, [query, key, value, begins], weight)
        assert ours[0].dtype == dtype
        for name, a, b in zip(("attention", "grad query", "grad key", "grad value"), ours, expected, strict=True):
            scale = 1 + b.abs().max()
            assert (a - b).abs().max() <= 3 * TOLERANCE[dtype] * scale, f"{name}: {(a - b).abs().max() / scale:.1e}"


def test_linear_attention_cannot_be_differentiated_twice():
    query, key, value = (torch.randn(40, 3, requires_grad=True) for _ in range(3))
    out = linear_attention(query, key, value, torch.zeros(40, dtype=torch.bool))
    (grad,) = torch.autograd.grad((out**2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "name, value, expected, got",
    [
        ("query", [1.0], "float32 or float64", "list"),
        ("query", torch.ones(5, 3, dtype=torch.complex64), "float32 or float64", "complex64"),
        ("query", torch.ones(5), r"\[T, K\]", r"\(5,\)"),
        ("query", torch.ones(0, 3), "T >= 1", r"\(0, 3\)"),
        ("key", torch.ones(5, 3, dtype=torch.float64), "float32", "float64"),
        ("key", torch.ones(5, 2), r"\[T, K\].*\(5, 3\)", r"\(5, 2\)"),
        ("key", torch.ones(5, 3, device="meta"), "device cpu", "meta"),
        ("value", None, "float32", "NoneType"),
        ("value", torch.ones(4, 2), r"\[T, V\]", r"\(4, 2\)"),
        ("value", torch.ones(5), r"\[T, V\]", r"\(5,\)"),
        ("begins", torch.zeros(5), "bool", "float32"),
        ("begins", torch.zeros(5, 1, dtype=torch.bool), r"\[T\]", r"\(5, 1\)"),
        ("begins", torch.zeros(4, dtype=torch.bool), r"\[T\]", r"\(4,\)"),
    ],
)
def test_linear_attention_errors(name, value, expected, got):
    good = {"query": torch.ones(5, 3), "key": torch.ones(5, 3), "value": torch.ones(5, 2), "begins": GOOD["begins"]}
    with pytest.raises(ValueError, match=rf"^{name}: expected.*({expected}).*got.*{got}.*;"):
        linear_attention(**{**good, name: value})


# any monoid


def matrix_product(left, right):
    return right @ left  # not commutative


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100])
def test_associative_scan_equals_fold(steps):
    elems = torch.randn(steps, 3, 3, dtype=torch.float64) / 2
    elems.requires_grad_()
    for reverse in (False, True):
        calls = []

        def operator(left, right):
            calls.append(len(left))  # noqa: B023
            return matrix_product(left, right)

        out = associative_scan(operator, elems, reverse=reverse)
        folded, expected = None, [None] * steps
        for t in sorted(range(steps), reverse=reverse):
            folded = elems[t] if folded is None else matrix_product(folded, elems[t])
            expected[t] = folded
        torch.testing.assert_close(out, torch.stack(expected))
        weight = torch.randn_like(out)
        ours = torch.autograd.grad(out, elems, weight)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(torch.stack(expected), elems, weight)[0])
        assert sum(calls) <= 2 * steps and len(calls) <= 2 * max(1, steps.bit_length())  # O(T) work, O(log T) depth


def test_associative_scan_on_a_pytree_along_another_dimension():
    elems = {"sum": torch.randn(2, 9), "pair": (torch.rand(4, 9), [torch.randn(3, 9)])}

    def operator(left, right):
        assert left["sum"].shape[0] == 2  # time stays where it is
        (a, (x,)), (b, (y,)) = left["pair"], right["pair"]
        return {"sum": left["sum"] + right["sum"], "pair": (a * b, [torch.maximum(x, y)])}

    out = associative_scan(operator, elems, dim=1)
    torch.testing.assert_close(out["sum"], elems["sum"].cumsum(1))
    torch.testing.assert_close(out["pair"][0], elems["pair"][0].cumprod(1))
    torch.testing.assert_close(out["pair"][1][0], elems["pair"][1][0].cummax(1).values)
    torch.testing.assert_close(associative_scan(operator, elems, dim=-1)["sum"], out["sum"])


def test_associative_scan_errors():
    add = torch.add
    with pytest.raises(ValueError, match=r"^elems: .*\(3,\), \(4,\)"):
        associative_scan(lambda left, right: left, (torch.ones(3), torch.ones(4)))
    with pytest.raises(ValueError, match="^elems: .*T >= 1"):
        associative_scan(add, torch.ones(0))
    with pytest.raises(ValueError, match="^elems: .*pytree of tensors"):
        associative_scan(add, ())
    with pytest.raises(ValueError, match="^elems: .*dimension 1"):
        associative_scan(add, torch.ones(3), dim=1)
    with pytest.raises(ValueError, match="^operator: "):
        associative_scan(lambda left, right: (left, right), torch.ones(3))


@pytest.mark.parametrize("capability", [None, "avx2"])
def test_tune_cpu_keeps_single_precision(capability):
    code = (
        "import torch; from cleanrl_memoroid.scan import tune_cpu; torch.set_num_threads(1);"
        "effective = tune_cpu(); assert tune_cpu() == effective;"
        "x, w = torch.randn(1000, 256), torch.randn(256, 256);"
        "e = (x @ w - (x.double() @ w.double()).float()).abs().max(); assert e < 2e-4, e;"
        "print('onednn' in effective, torch.backends.cpu.get_cpu_capability())"
    )
    env = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    if "AVX512" not in done.stdout:  # oneDNN takes these products over on no other processor
        assert done.stdout.startswith("False")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is time on the wall")
def test_tune_cpu_does_not_count_the_time_of_others(monkeypatch):
    """Else a busy machine decides, and a run that is resumed computes other last digits."""
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: time.sleep(0.05))
    assert scan._time_product(*torch.ones(3, 1, 1)) < 0.02
    monkeypatch.setattr(time, "thread_time", lambda: 7.0)  # a clock so coarse that it stands still
    assert scan._time_product(*torch.ones(3, 1, 1)) > 0


@pytest.mark.parametrize(
    "seconds, small, error, kept",
    [
        (0.9, 1, 0, True),
        (0.97, 1, 0, False),
        (1.5, 1, 0, False),
        (0.55, 5, 0, True),  # Zen 5, and worse: what large products save counts as much as what small ones lose
        (1.1, 0.5, 0, False),
        (0.5, 1, 1e-2, False),
        (RuntimeError, 1, 0, False),
    ],
)
@pytest.mark.parametrize("before", ["none", "bf16"])
def test_tune_cpu_permits_what_is_exact_and_faster(monkeypatch, seconds, small, error, kept, before):
    """Planted times on a processor that claims AVX-512: a product takes `seconds` with the switch on, 1 with it off.

    The product of 16 rows takes `small` times as long.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("PyTorch before 2.9 has no such switch")
    ways = []

    def time_product(a, b, out):
        ways.append(switch.fp32_precision)
        torch.mm(a, b, out=out)
        if ways[-1] == "ieee":
            return 1
        if seconds is RuntimeError:
            raise RuntimeError("planted")
        out += error
        return seconds * (small if len(a) == 16 else 1) + len(ways) % 3  # only the best of several counts

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(scan, "_time_product", time_product)
    found, state = switch.fp32_precision, torch.get_rng_state()
    try:
        switch.fp32_precision = before
        if seconds is RuntimeError:
            with pytest.raises(RuntimeError, match="planted"):
                scan.tune_cpu()
        else:
            assert ("onednn" in scan.tune_cpu()) == kept
        assert switch.fp32_precision == ("bf16" if kept else before)
    finally:
        switch.fp32_precision = found
    assert len(ways) == 2 or set(ways[::2]) == {"ieee"} and set(ways[1::2]) == {"bf16"}  # by turns
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_are_crossed():
    """The lengths above are of use only if they span several chunks of the torch backend."""
    assert scan_torch._BASE < 64
