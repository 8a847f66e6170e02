"""Linear recurrences over a tape of episodes, with resets: the computation inside every memoroid of this project.

    from cleanrl_memoroid.scan import linear_scan
    h = linear_scan(decay, x, begins)        # h[t] = x[t] + decay * (0 if begins[t] else h[t-1])

A *tape* holds many episodes end to end; `begins` marks the first row of each, where the memory starts anew (Morad et al. 2024,
"Recurrent Reinforcement Learning with Memoroids", eq. 12). Gradients flow to decay, x and h0.

Backends: `numba` (CPU: close to the speed of a memory copy), `triton` (CUDA), `torch` (everywhere), `ref` (the definition, a
plain loop). They share one signature:

    forward(decay, x, begins, h0, reverse) -> h
    backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad) -> (grad_decay or None, grad_x, grad_h0 or None)

on contiguous x, h, grad_h [T, N, C], decay [N, C] (constant) or [T, N, C], begins bool [T, N] or None, h0 [N, C] or None. A
backend that says SHARES_X also takes x [T, 1, C] and begins [T, 1] for all N groups; `backward` then has `shared=True`.
`linear_attention` needs the scan between chunks of rows only. `tune_cpu()` sets two process-wide switches that matter more to
the speed of training on a CPU than the scan does.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import math
import sys
import time
import warnings

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree  # private in name, the one PyTorch itself builds on

from cleanrl_memoroid import scan_op, scan_torch
from cleanrl_memoroid.attention import CHUNK, ChunkedAttention
from cleanrl_memoroid.scan_torch import blelloch_scan

_DOUBLE = {  # of the dtypes that a scan takes
    torch.float32: torch.float64,
    torch.float64: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex128,
}


def linear_scan(decay, x, begins=None, h0=None, reverse=False, backend="auto"):
    """h[t] = x[t] + decay[t] * (0 if begins[t] else h[t-1]), with h[-1] = h0.

    Args:
        decay: tensor broadcastable to *S (the same at every step, never expanded over time), or [T, *S'] with S' broadcastable
            to *S and as many dimensions as x; or a Python number. Of x's dtype, or of double its precision (a complex128 decay
            for a complex64 x), and is then carried in double.
        x: [T, *S] with T >= 1; float32, float64, complex64 or complex128. A dimension of S may be 1 where that of a constant
            decay with as many is longer: all those channels share x, which is read as short as it is.
        begins: bool [T], or [T, N] where x is [T, N, ...]. A begin selects: nothing before it reaches a row after it, not nan
            nor inf, not in values nor in gradients. With `reverse` it marks the first row *in scan order*. None: no resets.
        h0: broadcastable to *S, of x's dtype: the state before the first row in scan order. None: zeros.
        reverse: run from the last row to the first: h[t] = x[t] + decay[t] * (0 if begins[t] else h[t+1]).
        backend: "auto" (numba on a CPU, triton on CUDA, torch where those are missing; also torch, after a warning, if numba
            is installed but fails), "numba", "triton", "torch" or "ref".
    Returns: h, [T, *S] with the longer of S in decay and x, of x's dtype and device. Differentiable once in decay, x and h0
        (twice with backend="ref").
    Raises: ValueError on a wrong shape, dtype, device or backend; the message names the argument and the remedy.
    Source: the memoroid of a diagonal linear recurrence, Morad et al. (2024), section 3 and eq. 12; gradient: the same scan in
        reverse, g[t] = dL/dh[t] + conj(decay[t+1]) (0 if begins[t+1] else g[t+1]).
    """
    if backend != "ref" and scan_op.transformed(decay, x, begins, h0):
        decay = decay if isinstance(decay, torch.Tensor) else x.new_full((), decay)
        return scan_op.call(decay, x, begins, h0, reverse, backend)
    decay, x, h0, rows, module = _canonical(decay, x, begins, h0, backend)
    if backend != "ref":
        return _LinearScan.apply(decay, x, begins, h0, reverse, rows, module)
    begins, h0 = (None if v is None else v.reshape(shape) for v, shape in ((begins, rows[:2]), (h0, rows[1:])))
    channels = x.shape[1:]
    decay = decay.reshape(rows if decay.dim() == x.dim() else rows[1:])
    return module.linear_scan(decay, x.reshape(rows), begins, h0, reverse).reshape(len(x), *channels)


def linear_attention(query, key, value, begins):
    """Row t is query[t] @ S[t], where S[t] is the sum of outer(key[s], value[s]) over the rows s <= t of t's episode.

    Exact, in chunks of 32 rows: a row sees its chunk by a masked matrix product, and what came before by the memory S [K, V]
    at the chunk's start, which `linear_scan` carries from chunk to chunk.

    Args:
        query, key: [T, K] with T >= 1; float32 or float64. The caller applies the feature map.
        value: [T, V], of the same dtype. A last column of ones gives the normaliser.
        begins: bool [T], the first rows of episodes. The masks multiply, so nan, inf or overflow in one episode may reach
            others of the same chunk: stop at a loss that is not finite, as the scripts do.
    Returns: [T, V], of query's dtype and device. Differentiable once in query, key and value.
    Raises: ValueError on a wrong shape, dtype or device; the message names the argument and the remedy.
    Source: Katharopoulos et al. (2020), "Transformers are RNNs", eq. 18 and the numerator of eq. 20; a column of ones in value
        adds eq. 19 and the denominator.
    """
    if _dtype(query) not in (torch.float32, torch.float64):
        raise _error("query", "a tensor of float32 or float64", _dtype(query), "convert it with .to()")
    if query.dim() != 2 or len(query) == 0:
        raise _error("query", "[T, K] with T >= 1", f"shape {tuple(query.shape)}", "put all rows of a tape in one dimension")
    steps = len(query)
    for name, v, dtype, shape in (
        ("key", key, query.dtype, "[T, K]"), ("value", value, query.dtype, "[T, V]"), ("begins", begins, torch.bool, "[T]"),
    ):  # fmt: skip
        if _dtype(v) != dtype:
            raise _error(name, f"a tensor of {dtype}", _dtype(v), f"convert it with {name}.to({dtype})")
        if v.dim() != shape.count(",") + 1 or len(v) != steps or (name == "key" and v.shape != query.shape):
            expected = f"shape {shape} for query [T, K] = {tuple(query.shape)}"
            raise _error(name, expected, tuple(v.shape), "pass one row for each row of query")
        _check_device(name, v, query)
    episode = begins.cumsum(0, dtype=torch.float32)  # a number for each row's episode, exact up to 16 million
    if pad := -steps % CHUNK:
        query, key, value = (F.pad(e, (0, 0, 0, pad)) for e in (query, key, value))
        episode = F.pad(episode, (0, pad), value=steps + 1)
    chunks = (e.unflatten(0, (-1, CHUNK)) for e in (query, key, value, episode[:, None]))
    return ChunkedAttention.apply(*chunks, linear_scan).flatten(0, 1)[:steps]


def associative_scan(operator, elems, dim=0, reverse=False):
    """Inclusive scan with any monoid: out[t] = elems[0] • elems[1] • ... • elems[t] along `dim`.

    Args:
        operator: associative `(left, right) -> out` on pytrees like `elems`; sees many time steps at once, time at `dim`.
        elems: pytree (tensor, tuple, list, dict, nested) of tensors that share T >= 1 steps along `dim`; any dtype.
        dim: the time dimension of every tensor.
        reverse: fold from the last step to the first: out[t] = elems[T-1] • ... • elems[t].
    Returns: pytree like `elems`: same structure, shapes, dtypes, devices. Differentiable through the operator, to any order.
    Raises: ValueError if there is no tensor, T is 0, the lengths along `dim` differ, or the operator changes the structure.
    Source: Blelloch (1993), section 1.4; with resets, Morad et al. (2024), eq. 12.
    """
    leaves, tree = pytree.tree_flatten(elems)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and -leaf.dim() <= dim < leaf.dim() for leaf in leaves):
        found = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves]
        raise _error("elems", f"a pytree of tensors that have a dimension {dim}", found, "pass tensors, or another dim")
    if len({leaf.shape[dim] for leaf in leaves}) > 1 or leaves[0].shape[dim] == 0:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise _error("elems", f"one length T >= 1 along dim {dim}", shapes, "cut or pad them to one length")

    def on_leaves(left, right):
        left, right = (pytree.tree_unflatten([leaf.movedim(0, dim) for leaf in side], tree) for side in (left, right))
        out, out_tree = pytree.tree_flatten(operator(left, right))
        if out_tree != tree:
            raise _error("operator", f"a result of the structure of elems, {tree}", out_tree, "return what came in")
        return tuple(leaf.movedim(dim, 0) for leaf in out)

    rows = tuple(leaf.movedim(dim, 0) for leaf in leaves)
    rows = tuple(leaf.flip(0) for leaf in rows) if reverse else rows
    rows = blelloch_scan(on_leaves, rows)
    rows = tuple(leaf.flip(0) for leaf in rows) if reverse else rows
    return pytree.tree_unflatten([leaf.movedim(0, dim) for leaf in rows], tree)


class _LinearScan(torch.autograd.Function):
    """Between the caller's shapes and the backends' canonical ones, without a view in the graph for each of them."""

    @staticmethod
    def forward(ctx, decay, x, begins, h0, reverse, rows, module):
        ctx.call, ctx.shapes = (reverse, rows, module), (decay.shape, x.shape, None if h0 is None else h0.shape)
        a, x, begins, h0 = (v if v is None else _plain(v) for v in (decay, x, begins, h0))
        (steps, groups, width), varying, channels = rows, a.dim() == x.dim(), a.shape[a.dim() - x.dim() + 1 :]
        own_groups = groups if x.shape[1:] == channels else 1
        a, x = a.view(rows if varying else rows[1:]), x.view(steps, own_groups, width)
        begins, h0 = (None if v is None else v.view(shape) for v, shape in ((begins, (steps, own_groups)), (h0, rows[1:])))
        out = module.forward(a, x, begins, h0, reverse).view(steps, *channels)
        ctx.save_for_backward(a, begins, h0, decay, out)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        a, begins, h0, decay, out = ctx.saved_tensors
        reverse, rows, module = ctx.call
        shared = {"shared": True} if ctx.shapes[1] != out.shape else {}
        twice = torch.is_grad_enabled()  # create_graph=True: whoever differentiates again must hear of it
        with torch.no_grad() if twice else contextlib.nullcontext():
            h, grad_h = out.detach().view(rows), _plain(grad_out).view(rows)
            grads = module.backward(a, h, begins, h0, grad_h, reverse, ctx.needs_input_grad[0], **shared)
        if twice:
            grads = _Once.apply(decay, out, grad_out, *grads)
        grad_decay, grad_x, grad_h0 = (g if g is None else g.view(shape) for g, shape in zip(grads, ctx.shapes))
        return grad_decay, grad_x, None, grad_h0, None, None, None


class _Once(torch.autograd.Function):
    """Passes gradients on and refuses to differentiate them, in what they were computed from."""

    @staticmethod
    def forward(ctx, decay, out, grad_out, *grads):
        return grads

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(scan_op.TWICE)


def _plain(v):
    """Contiguous memory outside the graph, without the conjugation and negation that PyTorch keeps as flags on a view."""
    v = v.detach()
    if v.is_conj() or v.is_neg():
        v = v.resolve_conj().resolve_neg()
    return v if v.is_contiguous() else v.contiguous()


def _check(decay, x, begins, h0):
    """Raises ValueError on the first argument that does not fit; returns decay as a tensor, and the channels' shape *S."""
    if _dtype(x) not in _DOUBLE:
        raise _error("x", "a tensor of float32, float64, complex64 or complex128", _dtype(x), "convert it with .to()")
    if x.dim() == 0 or x.shape[0] == 0:
        raise _error("x", "[T, ...] with T >= 1", f"shape {tuple(x.shape)}", "a scan needs at least one row")
    if not isinstance(decay, torch.Tensor):
        try:
            decay = torch.tensor(decay, dtype=x.dtype, device=x.device)
        except (TypeError, ValueError, RuntimeError):
            raise _error("decay", f"a tensor or a number of {x.dtype}", repr(decay), "pass a tensor") from None
    if decay.dtype not in (x.dtype, _DOUBLE[x.dtype]):
        allowed = " or ".join(sorted({str(x.dtype), str(_DOUBLE[x.dtype])}))
        raise _error("decay", f"dtype {allowed} for x of {x.dtype}", decay.dtype, f"convert it with decay.to({x.dtype})")
    if decay.dim() == x.dim() and decay.shape[0] != x.shape[0]:
        expected, remedy = f"{x.shape[0]} rows like x", "drop its first dimension if it is constant in time"
        raise _error("decay", expected, f"shape {tuple(decay.shape)}", remedy)
    channels = x.shape[1:]
    if decay.shape != channels and decay.dim() == len(channels):
        if all(n == 1 or d in (1, n) for d, n in zip(decay.shape, channels)):
            channels = torch.Size(d if n == 1 else n for d, n in zip(decay.shape, channels))
    _check_channels("decay", decay, x, x.shape if decay.dim() == x.dim() else channels)
    if begins is not None:
        if _dtype(begins) != torch.bool:
            raise _error("begins", "a bool tensor", _dtype(begins), "convert it with begins.bool()")
        if begins.dim() not in (1, 2) or begins.shape != x.shape[: begins.dim()]:
            expected = f"shape [T] or [T, N] of x {tuple(x.shape)}"
            raise _error("begins", expected, tuple(begins.shape), "mark the first row of each episode")
        _check_device("begins", begins, x)
    if h0 is not None:
        if _dtype(h0) != x.dtype:
            raise _error("h0", f"a tensor of x's dtype {x.dtype}", _dtype(h0), f"convert it with h0.to({x.dtype})")
        _check_channels("h0", h0, x, channels)
    return decay, channels


def _canonical(decay, x, begins, h0, backend):
    """Arguments that were checked, in the shapes that backends take but for flattening: (decay, x, h0, [T, N, C], module)."""
    decay, channels = _check(decay, x, begins, h0)
    module = _module(backend, x.device.type)
    steps, shared = x.shape[0], x.shape[1:] != channels
    if shared and not (getattr(module, "SHARES_X", False) and _can_share(x.shape[1:], channels)):
        x, shared = x.expand(steps, *channels), False
    full = x.shape if decay.dim() == x.dim() else channels
    decay = decay if decay.shape == full else decay.expand(full)
    h0 = h0 if h0 is None or h0.shape == channels else h0.expand(channels)
    groups = begins.shape[1] if begins is not None and begins.dim() == 2 else 1
    groups = channels.numel() // x[0].numel() if shared else groups
    return decay, x, h0, (steps, groups, channels.numel() // groups), module


def _gradients(decay, x, begins, h0, grad_out, reverse, backend):
    """Of decay, x and h0, as `_canonical` broadcasts them, for `linear_scan` outside a graph."""
    decay, x, h0, rows, module = _canonical(decay, x, begins, h0, backend)
    with torch.enable_grad():
        leaves = [v if v is None else v.detach().requires_grad_() for v in (decay, x, h0)]
        out = _LinearScan.apply(leaves[0], leaves[1], begins, leaves[2], reverse, rows, module)
    grads = iter(torch.autograd.grad(out, [v for v in leaves if v is not None], grad_out))
    return [v if v is None else next(grads) for v in leaves]


def _can_share(own, channels):
    """Are the dimensions in which x [T, *own] is shared the first ones? Then begins are one per row: [T] or [T, 1]."""
    first = next(i for i in range(len(own), -1, -1) if i == 0 or own[i - 1] != channels[i - 1])
    return own[:first].numel() == 1 and own.numel() > 0


def _check_channels(name, v, x, shape):
    if v.shape != shape and (v.dim() > len(shape) or any(a not in (1, b) for a, b in zip(v.shape[::-1], shape[::-1]))):
        expected = f"a shape broadcastable to {tuple(shape)}, of x {tuple(x.shape)}"
        raise _error(name, expected, tuple(v.shape), "line its dimensions up with those of x, from the right")
    _check_device(name, v, x)


def _check_device(name, v, x):
    if v.device != x.device:
        raise _error(name, f"a tensor on x's device {x.device}", v.device, f"move it with {name}.to(x.device)")


def _dtype(v):
    return v.dtype if isinstance(v, torch.Tensor) else type(v).__name__


def _error(name, expected, got, remedy):
    return ValueError(f"{name}: expected {expected}, got {got}; {remedy}")


@functools.cache
def _module(backend, device):
    """The backend's module; "auto" takes the fastest that is installed."""
    if backend == "auto":
        fast = {"cpu": "numba", "cuda": "triton"}.get(device)
        backend = fast if fast and importlib.util.find_spec(fast) else "torch"
        if backend == "numba":
            return _NumbaOnTrial()
    if backend not in ("numba", "triton", "torch", "ref"):
        raise _error("backend", "'auto', 'numba', 'triton', 'torch' or 'ref'", repr(backend), "'auto' is right for most uses")
    if backend == "numba" and device != "cpu":
        raise _error("backend", f"one for a {device} device", "'numba'", "use 'auto'")
    if backend in ("numba", "triton") and not importlib.util.find_spec(backend):
        raise _error("backend", "an installed one", repr(backend), f"pip install {backend}, or use 'auto'")
    return importlib.import_module(f"cleanrl_memoroid.scan_{backend}")


class _NumbaOnTrial:
    """The numba backend until it fails, to import, to compile or in whatever else; then plain PyTorch for good."""

    SHARES_X, failed = True, False

    def forward(self, *args):
        return self._run("forward", *args)

    def backward(self, *args, **kwargs):
        return self._run("backward", *args, **kwargs)

    def _run(self, name, *args, **kwargs):
        try:
            if not self.failed:
                return getattr(_module("numba", "cpu"), name)(*args, **kwargs)
        except Exception as error:
            self.failed = True
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            remedy = "install a numba that fits the installed numpy"
            if "cannot cache" in reason:
                remedy = "set NUMBA_CACHE_DIR to a directory that can be written"
            warnings.warn(
                f"numba fails, so the scan is plain PyTorch, six times slower; {remedy}. {reason}", RuntimeWarning, 2
            )
        return getattr(scan_torch, name)(*args, **kwargs)


def tune_cpu():
    """Two settings for the whole process that can double the speed of training on a CPU. Call it before the first tensor.

    1. glibc hands large blocks back to the system when they are freed, and every new tensor pays a page fault per 4 KB:
       cloning 32 MB runs at an eighth of the memory's speed. With raised thresholds freed memory stays with the process,
       which then holds on to its peak. On Linux with glibc only.
    2. With AVX-512, oneDNN can take single-precision matrix products over from MKL: PyTorch hands them on if lower precision
       is *permitted*; without matrix units for it, oneDNN still computes in full single precision. On AMD that is twice as
       fast, on some Intel processors slower. So five products of the scripts' sizes are timed both ways, in 20 to 50 ms; the
       best of several times counts. The permission stays if all are exact and the quotients of their times have a geometric
       mean below 0.95. On a Zen 5 it is 0.74: small products take twice as long there, and large ones half as long. Only where
       that is a close call may two processes decide differently.
       PyTorch 2.9 and later; call `torch.set_num_threads` first.

    Returns: the settings that took effect, ("malloc", "onednn") at most. Harmless to call twice; draws no random numbers.
    """
    effective = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
            if libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, -1):
                effective.append("malloc")
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    able = torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    if able and hasattr(switch, "fp32_precision"):
        precision = switch.fp32_precision
        try:
            if _permission_pays(switch):
                precision = "bf16"
                effective.append("onednn")
        finally:
            switch.fp32_precision = precision
    return tuple(effective)


def _permission_pays(switch):
    """Are products exact and on geometric average 5 % faster if lower precision is permitted? Leaves the switch anywhere."""
    wave, ratios = torch.sin(torch.arange(1056.0 * 256)), []
    sizes = (16, 128, 128), (64, 128, 256), (512, 128, 128), (1056, 256, 256)  # rows, inputs, outputs: acting, updates
    pairs = [(wave[: m * k].view(m, k), wave[: n * k].view(n, k).t()) for m, k, n in sizes]
    pairs.append((pairs[2][0].t(), pairs[2][0]))  # the gradient of a weight
    for a, b in pairs:
        best, product = {"ieee": math.inf, "bf16": math.inf}, a.new_empty(len(a), b.shape[1])
        for way in list(best) * (5 if len(a) > 1000 else 10):  # by turns, so that a busy machine slows both
            switch.fp32_precision = way
            best[way] = min(best[way], _time_product(a, b, product))
        if (product[:16] - a[:16].double() @ b.double()).abs().max() > 1e-3:  # single precision: 1e-5; bfloat16: 1e-1
            return False
        ratios.append(best["bf16"] / best["ieee"])
    return math.prod(ratios) < 0.95 ** len(ratios)


def _time_product(a, b, out):
    clock = time.thread_time if sys.platform == "linux" else time.perf_counter  # without what others do on a busy machine
    start = clock()
    torch.mm(a, b, out=out)
    return max(clock() - start, 1e-9)  # a coarse clock shows no difference, so nothing is permitted
