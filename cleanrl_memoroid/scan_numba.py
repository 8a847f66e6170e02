"""The scan on a CPU: one pass over memory in Numba, with the state carried in double precision.

Why sequential in time: a CPU core reads and writes a row of channels in the time that the row takes to arrive from memory,
so the pass runs at the speed of a copy (benchmark/scan.py) and a tree over time could only add traffic. The parallelism is
across channels, in vector registers.

Why double: a decay rounded to single precision is wrong by 6e-8 per step, and a long tape multiplies it with itself a
hundred thousand times. Carried in double, the result is right to the last bit of single precision, at no cost in time.

Two details are worth a factor of two each: rows are handled by small helpers on one-dimensional arrays, because only
those are vectorised; and a pass that walks back in time walks its channels backwards too, so that memory is touched in one
unbroken descending stream, which the processor prefetches.
"""

import numba
import numpy as np
import torch

# "contract" allows fused multiply-add and nothing else: nan and inf must keep their meaning
_jit = numba.njit(cache=True, nogil=True, fastmath={"contract"})
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@_jit
def _step(a, x, state, h, descending):
    if descending:
        for c in range(a.shape[0] - 1, -1, -1):
            state[c] = a[c] * state[c] + x[c]
            h[c] = state[c]
    else:
        for c in range(a.shape[0]):
            state[c] = a[c] * state[c] + x[c]
            h[c] = state[c]


@_jit
def _begin(x, state, h):
    for c in range(x.shape[0]):
        state[c] = x[c]
        h[c] = x[c]


@_jit
def _forward(decay, x, begins, state, h, reverse):
    """x, h [T, D]; decay [1, D] or [T, D]; begins [T, N] or [0, N], for N groups of D / N channels; state [D] double."""
    steps, groups, width = x.shape[0], begins.shape[1], x.shape[1] // begins.shape[1]
    a = decay[0]
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        if decay.shape[0] > 1:
            a = decay[t]
        x_row, h_row = x[t], h[t]
        if groups == 1:  # the slices of the general case cost as much as half the arithmetic
            if begins.shape[0] > 0 and begins[t, 0]:
                _begin(x_row, state, h_row)
            else:
                _step(a, x_row, state, h_row, reverse)
            continue
        for n in range(groups):
            own = slice(n * width, (n + 1) * width)
            if begins.shape[0] > 0 and begins[t, n]:
                _begin(x_row[own], state[own], h_row[own])
            else:
                _step(a[own], x_row[own], state[own], h_row[own], reverse)


@_jit
def _step_back(a, previous, grad, carry, grad_decay, grad_x, descending):
    """carry comes as conj(decay[t+1]) g[t+1] and leaves as conj(decay[t]) g[t]; grad_decay gains conj(h[t-1]) g[t]."""
    if descending:
        for c in range(a.shape[0] - 1, -1, -1):
            g = grad[c] + carry[c]
            grad_x[c] = g
            grad_decay[c] += np.conj(previous[c]) * g
            carry[c] = np.conj(a[c]) * g
    else:
        for c in range(a.shape[0]):
            g = grad[c] + carry[c]
            grad_x[c] = g
            grad_decay[c] += np.conj(previous[c]) * g
            carry[c] = np.conj(a[c]) * g


@_jit
def _begin_back(grad, carry, grad_x):
    for c in range(grad.shape[0]):
        grad_x[c] = grad[c] + carry[c]
        carry[c] = 0


@_jit
def _backward(decay, h, begins, first, grad_h, carry, grad_decay, grad_x, reverse):
    """Walks against the scan. `first` [D] stands for the row before the first one. Other shapes as in `_forward`."""
    steps, groups, width = h.shape[0], begins.shape[1], h.shape[1] // begins.shape[1]
    a, grad_a = decay[0], grad_decay[0]
    for i in range(steps):
        t = i if reverse else steps - 1 - i
        if decay.shape[0] > 1:
            a, grad_a = decay[t], grad_decay[t]
        previous = first if i == steps - 1 else h[t + 1 if reverse else t - 1]
        grad_row, x_row = grad_h[t], grad_x[t]
        if groups == 1:
            if begins.shape[0] > 0 and begins[t, 0]:
                _begin_back(grad_row, carry, x_row)
            else:
                _step_back(a, previous, grad_row, carry, grad_a, x_row, not reverse)
            continue
        for n in range(groups):
            own = slice(n * width, (n + 1) * width)
            if begins.shape[0] > 0 and begins[t, n]:
                _begin_back(grad_row[own], carry[own], x_row[own])
            else:
                _step_back(a[own], previous[own], grad_row[own], carry[own], grad_a[own], x_row[own], not reverse)


def forward(decay, x, begins, h0, reverse):
    """See `scan.py` for the signature that all backends share. CPU tensors only."""
    state = torch.zeros_like(x[0]) if h0 is None else h0
    state = state.to(_DOUBLE.get(x.dtype, x.dtype), copy=True)
    h = torch.empty_like(x)
    _forward(_decay_rows(decay), _rows(x), _flags(begins, x), state.flatten().numpy(), _rows(h), reverse)
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad):
    """See `scan.py`. The gradient of the decay costs nothing extra here, so it is always computed."""
    first = torch.zeros_like(h[0]) if h0 is None else h0
    carry = torch.zeros_like(h[0], dtype=_DOUBLE.get(h.dtype, h.dtype))
    decay_rows, grad_x = _decay_rows(decay), torch.empty_like(h)
    grad_decay = np.zeros(decay_rows.shape, decay_rows.dtype)
    rows = (decay_rows, _rows(h), _flags(begins, h), first.flatten().numpy(), _rows(grad_h), carry.flatten().numpy())
    _backward(*rows, grad_decay, _rows(grad_x), reverse)
    grad_decay = torch.from_numpy(grad_decay).reshape(decay.shape).to(decay.dtype)
    return grad_decay, grad_x, None if h0 is None else carry.to(h0.dtype)


def _rows(x):
    return x.flatten(1).numpy()


def _decay_rows(decay):
    """[N, C] -> [1, D] in double; [T, N, C] -> [T, D] as it is, too large to copy."""
    return decay.reshape(1, -1).to(_DOUBLE.get(decay.dtype, decay.dtype)).numpy() if decay.dim() == 2 else _rows(decay)


def _flags(begins, x):
    return np.zeros((0, x.shape[1]), np.bool_) if begins is None else begins.numpy()
