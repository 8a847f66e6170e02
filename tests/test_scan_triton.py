"""scan_triton against a plain loop with autograd: on CUDA if there is one, else in Triton's interpreter on CPU tensors."""

import importlib
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LATE = DEVICE == "cpu" and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if DEVICE == "cpu" and not LATE:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
pytest.importorskip("triton")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
scan_triton = importlib.import_module("cleanrl_memoroid.scan_triton")

interpreted = pytest.mark.skipif(LATE, reason="triton was imported without its interpreter: see test_in_a_fresh_process")
DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
TOLERANCE = {torch.float32: 2e-5, torch.complex64: 2e-5, torch.float64: 1e-11, torch.complex128: 1e-11}
torch.set_num_threads(1)


@pytest.mark.skipif(not LATE, reason="the interpreter is on, or there is a GPU")
def test_in_a_fresh_process():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__], env=env, check=True)


def loop(decay, x, begins, h0, reverse):
    """The definition, row by row, differentiable."""
    T = x.shape[0]
    h = torch.zeros_like(x[0]) if h0 is None else h0
    rows = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        carry = (decay[t] if decay.dim() == 3 else decay) * h
        if begins is not None:
            carry = torch.where(begins[t][:, None], torch.zeros_like(carry), carry)
        h = rows[t] = x[t] + carry
    return torch.stack(rows)


def inputs(T, N, C, dtype, varying=False, double_decay=False, begins=True, h0=True, seed=0):
    """Random numbers with |decay| in [0.6, 1.1]: nothing decays within a chunk, nothing overflows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=DOUBLE.get(dtype, dtype), generator=generator)

    decay = draw(*([T] if varying else []), N, C)
    decay = decay / decay.abs() * (0.6 + 0.5 * torch.rand(decay.shape, dtype=torch.float64, generator=generator))
    decay = decay if double_decay else decay.to(dtype)
    x, grad_h = draw(T, N, C).to(dtype), draw(T, N, C).to(dtype)
    begins = torch.rand(T, N, generator=generator) < 0.1 if begins else None
    h0 = draw(N, C).to(dtype) if h0 else None
    return [None if tensor is None else tensor.to(DEVICE) for tensor in (decay, x, begins, h0, grad_h)]


def expected(decay, x, begins, h0, grad_h, reverse):
    """h and the gradients of decay, x and h0, all in double."""
    leaves = [None if t is None else t.to(DOUBLE.get(t.dtype, t.dtype)).requires_grad_() for t in (decay, x, h0)]
    h = loop(leaves[0], leaves[1], begins, leaves[2], reverse)
    given = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(h, given, grad_h.to(h.dtype), allow_unused=True, materialize_grads=True)
    return [h.detach(), *grads, *[None] * (3 - len(grads))]


def actual(decay, x, begins, h0, grad_h, reverse):
    h = scan_triton.forward(decay, x, begins, h0, reverse)
    grads = scan_triton.backward(decay, h, begins, h0, grad_h, reverse, True)
    for tensor, like in zip((h, *grads), (x, decay, x, h0), strict=True):
        assert (tensor is None) == (like is None)
        assert tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device)
    return [h, *grads]


def check(data, reverse, tolerance=None):
    tolerance = tolerance or TOLERANCE[data[1].dtype]
    for name, a, b in zip(("h", "decay", "x", "h0"), actual(*data, reverse), expected(*data, reverse), strict=True):
        if b is not None:
            where = partial("{}: {}".format, name)
            torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * b.abs().max().item(), msg=where)


@pytest.fixture
def chunks_of(monkeypatch):
    """Forces L (a power of two), so that a handful of rows make several chunks; None for the single pass."""
    return lambda L: monkeypatch.setattr(scan_triton, "chunk_length", lambda T: min(L or T, T))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("h0", [False, True])
def test_every_kind_over_several_chunks(chunks_of, dtype, varying, reverse, begins, h0):
    chunks_of(8)
    check(inputs(27, 3, 1, dtype, varying, begins=begins, h0=h0), reverse)


@interpreted
@pytest.mark.parametrize("L", [None, 16])
@pytest.mark.parametrize("T", [1, 2, 3, 31, 32, 33, 70])
def test_lengths(chunks_of, T, L):
    chunks_of(L)
    check(inputs(T, 1, 5, torch.complex128, varying=T % 2 == 0, seed=T), reverse=T % 3 == 0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("varying", [False, True])
def test_more_channels_than_a_program_takes(chunks_of, dtype, varying):
    chunks_of(4)
    check(inputs(10, 3, 13, dtype, varying), reverse=varying)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("L", [None, 16])
def test_double_decay_keeps_single_x_exact(chunks_of, dtype, varying, L):
    """State, products and sums in double: what is left is one rounding of h, and what that does to the gradient of decay."""
    chunks_of(L)
    data = inputs(70, 1, 3, dtype, varying, double_decay=True, begins=False)
    data[0] = data[0] / data[0].abs()  # never forgets, so that errors would pile up
    check(data, False, tolerance=1e-7)


@interpreted
def test_default_chunks(monkeypatch):
    """No forced length: one row past the single pass, so chunks of 32 rows and a last one that is not full."""
    T = scan_triton.SINGLE_PASS_ROWS + 1
    assert scan_triton.chunk_length(T - 1) == T - 1 and scan_triton.chunk_length(T) == 32
    assert [scan_triton.chunk_length(2**k) for k in (12, 16, 20, 24)] == [64, 256, 1024, 1024]
    monkeypatch.setattr(scan_triton, "SINGLE_PASS_ROWS", 64)  # the interpreter takes 12 ms a row
    check(inputs(65, 1, 1, torch.float64), reverse=False)


@interpreted
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("L", [None, 4])
@pytest.mark.parametrize("begin", [8, 9, 11])  # first, second, last row of a chunk
def test_a_begin_contains_nan(chunks_of, varying, reverse, L, begin):
    chunks_of(L)
    decay, x, begins, h0, grad_h = inputs(20, 2, 1, torch.complex128, varying, begins=False)
    begins = torch.zeros(20, 2, dtype=torch.bool, device=DEVICE)
    begins[begin] = True
    before = begin + 1 if reverse else begin - 1  # the last row of the episode before
    inside = slice(None, begin + 1) if reverse else slice(begin, None)  # the episode after
    outside = slice(begin + 1, None) if reverse else slice(None, begin)
    clean = actual(decay, x, begins, h0, grad_h, reverse)

    bad_x, bad_decay = x.clone(), decay.clone()
    bad_x[before] = float("nan")
    if varying:
        bad_decay[begin] = float("nan")
    h, grad_decay, grad_x, grad_h0 = actual(bad_decay, bad_x, begins, h0, grad_h, reverse)
    torch.testing.assert_close(h[inside], clean[0][inside], rtol=0, atol=0)
    assert h[before].isnan().all()
    for a, b in zip((grad_decay, grad_x, grad_h0), clean[1:], strict=True):  # only h[before] is nan, and makes no other row
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    grad_h = grad_h.clone()
    grad_h[begin] = float("inf")
    h, grad_decay, grad_x, grad_h0 = actual(bad_decay, x, begins, h0, grad_h, reverse)
    torch.testing.assert_close(grad_x[outside], clean[2][outside], rtol=0, atol=0)
    torch.testing.assert_close(grad_h0, clean[3], rtol=0, atol=0)
    if varying:
        torch.testing.assert_close(grad_decay[outside], clean[1][outside], rtol=0, atol=0)
        assert (grad_decay[begin] == 0).all()
    else:  # nothing above but the begin's own row has an infinite gradient, and there decay is not used
        torch.testing.assert_close(grad_decay, clean[1], rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("varying", [False, True])
def test_overflowing_decay_of_nothing_is_nothing(chunks_of, varying):
    chunks_of(4)
    x = torch.zeros(12, 1, 2, dtype=torch.float64, device=DEVICE)
    x[-1] = 1
    decay = torch.full(((12,) if varying else ()) + (1, 2), 1e100, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(scan_triton.forward(decay, x, None, None, False), x, rtol=0, atol=0)


@interpreted
def test_grad_h_may_be_a_lazy_conjugate_and_decay_may_need_no_gradient(chunks_of):
    chunks_of(4)
    decay, x, begins, h0, grad_h = inputs(10, 1, 3, torch.complex128)
    h = scan_triton.forward(decay, x, begins, h0, False)
    lazy = grad_h.conj().resolve_conj().conj()
    assert lazy.is_conj()
    wanted = scan_triton.backward(decay, h, begins, h0, grad_h, False, True)
    for a, b in zip(scan_triton.backward(decay, h, begins, h0, lazy, False, True), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    without = scan_triton.backward(decay, h, begins, h0, grad_h, False, False)
    assert without[0] is None
    for a, b in zip(without[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@interpreted
def test_no_channels():
    data = inputs(3, 2, 0, torch.complex64)
    h = scan_triton.forward(*data[:4], False)
    grads = scan_triton.backward(data[0], h, data[2], data[3], data[4], False, True)
    assert [tuple(tensor.shape) for tensor in (h, *grads)] == [(3, 2, 0), (2, 0), (3, 2, 0), (2, 0)]


# Compiles what a launch would, for a GPU that need not be there: the real launch path with a stand-in for the driver.
COMPILE = """
import itertools, os, re, subprocess, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, sys.argv[1])
capability, every = int(sys.argv[2]), sys.argv[3] == "every way"
ways = [False, True] if every else [False]
dtypes = [[getattr(torch, name) for name in pair.split("/")] for pair in sys.argv[4:]]

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", capability, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

triton.runtime.driver.set_active(Driver())
compiled, run = [], JITFunction.run
def warm_up(self, *args, grid, warmup, **kwargs):
    compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
JITFunction.run = warm_up

from cleanrl_memoroid import scan_triton
for dtype, decay_dtype in dtypes:
    for varying, reverse, no_begins, no_h0 in itertools.product([False, True] if every else [True], ways, ways, ways):
        x = torch.zeros(2000, 1, 256, dtype=dtype)
        decay = torch.zeros((2000,) * varying + (1, 256), dtype=decay_dtype)
        begins, h0 = None if no_begins else torch.zeros(2000, 1, dtype=torch.bool), None if no_h0 else x[0]
        compiled.clear()
        scan_triton.forward(decay, x, begins, h0, reverse)
        scan_triton.backward(decay, x, begins, h0, x, reverse, True)
        for (name, kernel), way in zip(compiled, ("forward",) * 3 + ("backward",) * 3):
            with open("kernel.cubin", "wb") as file:
                file.write(kernel.asm["cubin"])
            tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
            report = subprocess.run([tool, "-res-usage", "kernel.cubin"], check=True, capture_output=True, text=True).stdout
            used = {key: re.search(key + r":(\\d+)", report).group(1) for key in ("REG", "STACK", "LOCAL", "SHARED")}
            # a spilled register lives on the stack, in local memory
            kind = f"{str(dtype)[6:]}/{str(decay_dtype)[6:]} {'varying' if varying else 'constant'}"
            kind += " reverse" * reverse + " no begins" * no_begins + " no h0" * no_h0
            print(f"sm_{capability} {kind} {way} {name}", *(f"{key} {value}" for key, value in used.items()))
"""


def compile_for(capability, ways, dtypes, path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, ROOT, str(capability), ways, *dtypes]
    done = subprocess.run(command, env=env, cwd=path, check=False, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 * len(dtypes) * (16 if ways == "every way" else 1)
    assert all("STACK 0 LOCAL 0" in line for line in lines)


def test_compiles_without_spills(tmp_path):
    """A decay of its own for each row, in double; the next test has all kinds."""
    compile_for(90, "one way", ["complex64/complex128"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "float64", "complex128"])
def test_every_kind_compiles_without_spills(tmp_path, capability, dtype):
    double = str(DOUBLE.get(getattr(torch, dtype), dtype)).removeprefix("torch.")
    compile_for(capability, "every way", sorted({f"{dtype}/{dtype}", f"{dtype}/{double}"}), tmp_path)
