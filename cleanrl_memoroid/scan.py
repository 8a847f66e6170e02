"""Linear recurrences over a tape of episodes, with resets: the computation inside every memoroid of this project.

    from cleanrl_memoroid.scan import linear_scan
    h = linear_scan(decay, x, begins)        # h[t] = x[t] + decay * (0 if begins[t] else h[t-1])

A *tape* holds many episodes end to end; `begins` marks the first row of each, where the memory starts anew (Morad et al. 2024,
"Recurrent Reinforcement Learning with Memoroids", eq. 12). Gradients flow to decay, x and h0.

Backends: `numba` (CPU: runs at the speed of a memory copy), `triton` (CUDA), `torch` (everywhere), `ref` (the definition, a plain
loop). Each module has `forward(decay, x, begins, h0, reverse) -> h` and
`backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad) -> (grad_decay or None, grad_x, grad_h0 or None)` on canonical
shapes: x, h, grad_h [T, N, C], decay [N, C] (constant) or [T, N, C], begins bool [T, N] or None, h0 [N, C] or None, all contiguous.
`tune_cpu()` sets two process-wide switches that matter more to the speed of training on a CPU than the scan does.
"""

import ctypes
import importlib
import importlib.util
import sys

import torch
import torch.utils._pytree as pytree  # private in name, the one PyTorch itself builds on

from cleanrl_memoroid import scan_ref
from cleanrl_memoroid.scan_torch import blelloch_scan

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def linear_scan(decay, x, begins=None, h0=None, reverse=False, backend="auto"):
    """h[t] = x[t] + decay[t] * (0 if begins[t] else h[t-1]), with h[-1] = h0.

    Args:
        decay: tensor broadcastable to *S (the same at every step, never expanded over time), or [T, *S'] with S' broadcastable
            to *S and as many dimensions as x; or a Python number. Of x's dtype, or of double its precision (a complex128 decay
            for a complex64 x), and is then carried in double.
        x: [T, *S] with T >= 1; float32, float64, complex64 or complex128.
        begins: bool [T], or [T, N] where x is [T, N, ...]. A begin selects: nothing before it reaches a row after it, neither nan
            nor inf, neither in values nor in gradients. With `reverse` it marks the first row *in scan order*. None: no resets.
        h0: broadcastable to *S, of x's dtype: the state before the first row in scan order. None: zeros.
        reverse: run from the last row to the first: h[t] = x[t] + decay[t] * (0 if begins[t] else h[t+1]).
        backend: "auto" (numba on a CPU, triton on a CUDA card, torch where those are missing), or "numba", "triton", "torch", "ref".
    Returns: h, [T, *S], of x's dtype and device. Differentiable once in decay, x and h0 (twice with backend="ref").
    Raises: ValueError on a wrong shape, dtype, device or backend; the message names the argument and the remedy.
    Source: the memoroid of a diagonal linear recurrence, Morad et al. (2024), section 3 and eq. 12; gradient: the same scan in
        reverse, g[t] = dL/dh[t] + conj(decay[t+1]) (0 if begins[t+1] else g[t+1]).
    """
    decay = _check(decay, x, begins, h0)
    steps, channels = x.shape[0], x.shape[1:]
    groups = begins.shape[1] if begins is not None and begins.dim() == 2 else 1
    shape = (groups, channels.numel() // groups)
    decay = decay.expand(x.shape).reshape(steps, *shape) if decay.dim() == x.dim() else decay.expand(channels).reshape(shape)
    if h0 is not None:
        h0 = h0.expand(channels).reshape(shape)
    if begins is not None:
        begins = begins.reshape(steps, groups)
    rows = x.reshape(steps, *shape)
    name = _backend(backend, x.device)
    if name == "ref":
        return scan_ref.linear_scan(decay, rows, begins, h0, reverse).reshape(x.shape)
    return _LinearScan.apply(decay, rows, begins, h0, reverse, name).reshape(x.shape)


def associative_scan(operator, elems, dim=0, reverse=False):
    """Inclusive scan with any monoid: out[t] = elems[0] • elems[1] • ... • elems[t] along `dim`.

    Args:
        operator: associative `(left, right) -> out` on pytrees like `elems`; sees many time steps at once, time at `dim`.
        elems: pytree (tensor, tuple, list, dict, nested) of tensors that share T >= 1 steps along `dim`; any dtype.
        dim: the time dimension of every tensor.
        reverse: fold from the last step to the first: out[t] = elems[T-1] • ... • elems[t].
    Returns: pytree like `elems`: same structure, shapes, dtypes and devices. Differentiable through the operator, to any order.
    Raises: ValueError if there is no tensor, T is 0, the lengths along `dim` differ, or the operator changes the structure.
    Source: Blelloch (1993), section 1.4; with resets, Morad et al. (2024), eq. 12.
    """
    leaves, tree = pytree.tree_flatten(elems)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and -leaf.dim() <= dim < leaf.dim() for leaf in leaves):
        found = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves]
        raise ValueError(f"elems: expected a pytree of tensors that have a dimension {dim}, got {found}; pass tensors, or another dim")
    if len({leaf.shape[dim] for leaf in leaves}) > 1 or leaves[0].shape[dim] == 0:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"elems: expected one length T >= 1 along dim {dim}, got shapes {shapes}; cut or pad them to one length")

    def on_leaves(left, right):
        left, right = (pytree.tree_unflatten([leaf.movedim(0, dim) for leaf in side], tree) for side in (left, right))
        out, out_tree = pytree.tree_flatten(operator(left, right))
        if out_tree != tree:
            raise ValueError(f"operator: expected a result of the structure of elems, {tree}, got {out_tree}; return what came in")
        return tuple(leaf.movedim(dim, 0) for leaf in out)

    rows = tuple(leaf.movedim(dim, 0) for leaf in leaves)
    rows = tuple(leaf.flip(0) for leaf in rows) if reverse else rows
    rows = blelloch_scan(on_leaves, rows)
    rows = tuple(leaf.flip(0) for leaf in rows) if reverse else rows
    return pytree.tree_unflatten([leaf.movedim(0, dim) for leaf in rows], tree)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay, x, begins, h0, reverse, backend):
        decay, x, begins, h0 = (None if v is None else _plain(v.detach()) for v in (decay, x, begins, h0))
        ctx.module, ctx.reverse = importlib.import_module(f"cleanrl_memoroid.scan_{backend}"), reverse
        h = ctx.module.forward(decay, x, begins, h0, reverse)
        ctx.save_for_backward(decay, h, begins, h0)
        return h

    @staticmethod
    def backward(ctx, grad_h):
        decay, h, begins, h0 = ctx.saved_tensors
        with torch.no_grad():
            inputs = (None if v is None else _plain(v) for v in (decay, h, begins, h0, grad_h))
            grads = ctx.module.backward(*(v if v is None else v.detach() for v in inputs), ctx.reverse, ctx.needs_input_grad[0])
        if torch.is_grad_enabled():  # create_graph=True: whoever differentiates again must hear of it
            grads = _Once.apply(decay, h, grad_h, *grads)
        return grads[0], grads[1], None, grads[2], None, None


class _Once(torch.autograd.Function):
    """Passes gradients on and refuses to differentiate them, in what they were computed from."""

    @staticmethod
    def forward(ctx, decay, h, grad_h, *grads):
        return grads

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("linear_scan: cannot be differentiated twice; use backend='ref' or associative_scan for second derivatives")


def _plain(v):
    """Contiguous memory without the lazy conjugation and negation that PyTorch keeps as flags."""
    return v.resolve_conj().resolve_neg().contiguous()


def _check(decay, x, begins, h0):
    """Raises ValueError on the first argument that does not fit; returns decay as a tensor."""
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x: expected a tensor of float32, float64, complex64 or complex128, got {got}; convert it with .to()")
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"x: expected [T, ...] with T >= 1, got shape {tuple(x.shape)}; a scan needs at least one row")
    if not isinstance(decay, torch.Tensor):
        try:
            decay = torch.tensor(decay, dtype=x.dtype, device=x.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"decay: expected a tensor or a number of {x.dtype}, got {decay!r}; pass a tensor") from None
    if decay.dtype not in (x.dtype, _DOUBLE.get(x.dtype)):
        allowed = " or ".join(str(d) for d in (x.dtype, _DOUBLE.get(x.dtype)) if d)
        raise ValueError(f"decay: expected dtype {allowed} for x of {x.dtype}, got {decay.dtype}; convert it with decay.to({x.dtype})")
    _broadcasts("decay", decay, x, x.shape if decay.dim() == x.dim() else x.shape[1:], "one value per channel, or [T, ...] like x")
    if decay.dim() == x.dim() and decay.shape[0] != x.shape[0]:
        raise ValueError(
            f"decay: expected {x.shape[0]} rows like x, got shape {tuple(decay.shape)}; drop its first dimension if it is constant in time"
        )
    if begins is not None:
        if not isinstance(begins, torch.Tensor) or begins.dtype != torch.bool:
            got = begins.dtype if isinstance(begins, torch.Tensor) else type(begins).__name__
            raise ValueError(f"begins: expected a bool tensor, got {got}; convert it with begins.bool()")
        if begins.dim() not in (1, 2) or begins.shape != x.shape[: begins.dim()]:
            raise ValueError(f"begins: expected shape [T] or [T, N] of x {tuple(x.shape)}, got {tuple(begins.shape)}; one flag per row")
        _same_device("begins", begins, x)
    if h0 is not None:
        if not isinstance(h0, torch.Tensor) or h0.dtype != x.dtype:
            got = h0.dtype if isinstance(h0, torch.Tensor) else type(h0).__name__
            raise ValueError(f"h0: expected a tensor of x's dtype {x.dtype}, got {got}; convert it with h0.to({x.dtype})")
        _broadcasts("h0", h0, x, x.shape[1:], "one state, without a time dimension")
    return decay


def _broadcasts(name, v, x, shape, meaning):
    if v.dim() > len(shape) or any(a not in (1, b) for a, b in zip(reversed(v.shape), reversed(shape))):
        raise ValueError(
            f"{name}: expected a shape broadcastable to {tuple(shape)} ({meaning}; x is {tuple(x.shape)}), got {tuple(v.shape)};"
            " reshape it so that its dimensions line up with x's from the right"
        )
    _same_device(name, v, x)


def _same_device(name, v, x):
    if v.device != x.device:
        raise ValueError(f"{name}: expected a tensor on x's device {x.device}, got {v.device}; move it with {name}.to(x.device)")


def _backend(name, device):
    """The module to use, as its name's ending; "auto" takes the fastest that is installed."""
    fast = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if name == "auto":
        return fast if fast and importlib.util.find_spec(fast) else "torch"
    if name not in ("numba", "triton", "torch", "ref"):
        raise ValueError(f"backend: expected 'auto', 'numba', 'triton', 'torch' or 'ref', got {name!r}; 'auto' is right for most uses")
    if name == "numba" and device.type != "cpu":
        raise ValueError(f"backend: 'numba' runs on a CPU, x is on {device}; use 'triton', 'torch' or 'auto'")
    if name in ("numba", "triton") and not importlib.util.find_spec(name):
        raise ValueError(f"backend: {name!r} is not installed; pip install {name}, or use 'torch' or 'auto'")
    return name


def tune_cpu():
    """Two settings for the whole process that make training on a CPU up to twice as fast. Call it once, before the first tensor.

    1. glibc returns large blocks to the system when they are freed and takes fresh ones for the next tensor, one page fault per
       4 KB: a clone of 32 MB runs at an eighth of the memory's speed. The thresholds are set so that freed memory stays
       with the process (it then holds its peak). Linux with glibc only.
    2. MKL runs single-precision matrix products at half speed on AMD processors; oneDNN does not. PyTorch hands them to oneDNN when
       lower precision is *permitted*; without matrix units for it, the processor then still computes in full single precision. Kept
       only if a trial product shows that precision; on processors with such units (AMX), or where PyTorch lacks the switch
       (before 2.9), nothing changes.

    Returns: the names of the settings that took effect, ("malloc", "onednn") at most. Harmless to call twice.
    """
    effective = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
            if libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, -1):
                effective.append("malloc")
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if torch.backends.mkldnn.is_available() and hasattr(switch, "fp32_precision"):
        before, switch.fp32_precision = switch.fp32_precision, "bf16"
        a = torch.sin(torch.arange(256.0 * 256)).reshape(256, 256)
        error = (a @ a - (a.double() @ a.double()).float()).abs().max()
        if error < 1e-4:  # single precision: 1e-5; bfloat16: 1e-1
            effective.append("onednn")
        else:
            switch.fp32_precision = before
    return tuple(effective)
