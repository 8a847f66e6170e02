"""The scan on a CPU: one pass over memory in Numba, with the state carried in double precision.

Why sequential in time: a core advances a row of channels in about the time that the row takes to arrive from memory, so the
pass runs at the speed of a copy (benchmark/scan.py), and a tree over time could only add traffic. The parallelism is across
channels, in vector registers.

Why double: a decay rounded to single precision is wrong by 6e-8 per step, and a long tape multiplies it with itself a hundred
thousand times. Carried in double, the result is right to the last bits of single precision, and long tapes take no longer.

What the speed hangs on: only loops over one-dimensional arrays in a small function of their own are vectorised; a pass
that walks back in time walks its channels backwards too, so that memory is touched in one descending stream, which the
processor prefetches; slices cost tens of nanoseconds, half of a row's arithmetic, so the common case of one group has none.
"""

import numba
import numpy as np
import torch

# "contract" permits fused multiply-add and nothing else: nan and inf keep their meaning
_jit = numba.njit(cache=True, nogil=True, fastmath={"contract"})
_FLUSH = 64  # rows whose contributions to the gradient of a constant decay are added up in x's precision, then moved to double


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
    """x, h [T, D]; decay [1, D] or [T, D]; begins [T, N] or [0, N] for N groups of D / N channels; state [D] in double."""
    steps, groups, width = x.shape[0], begins.shape[1], x.shape[1] // begins.shape[1]
    a = decay[0]
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        if decay.shape[0] > 1:
            a = decay[t]
        x_row, h_row = x[t], h[t]
        if groups == 1:
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
def _step_back(a, grad, carry, grad_x, descending):
    """carry comes as conj(decay[t+1]) g[t+1] and leaves as conj(decay[t]) g[t], where g is the row of grad_x."""
    if descending:
        for c in range(a.shape[0] - 1, -1, -1):
            g = grad[c] + carry[c]
            grad_x[c] = g
            carry[c] = np.conj(a[c]) * g
    else:
        for c in range(a.shape[0]):
            g = grad[c] + carry[c]
            grad_x[c] = g
            carry[c] = np.conj(a[c]) * g


@_jit
def _decay_back(previous, grad_x, grad_decay, descending):
    """A loop of its own: within `_step_back` it would mix precisions, which takes longer than both loops together."""
    if descending:
        for c in range(previous.shape[0] - 1, -1, -1):
            grad_decay[c] += np.conj(previous[c]) * grad_x[c]
    else:
        for c in range(previous.shape[0]):
            grad_decay[c] += np.conj(previous[c]) * grad_x[c]


@_jit
def _begin_back(grad, carry, grad_x):
    for c in range(grad.shape[0]):
        grad_x[c] = grad[c] + carry[c]
        carry[c] = 0


@_jit
def _backward(decay, h, begins, first, grad_h, carry, partial, grad_decay, grad_x, need_decay_grad, reverse):
    """Walks against the scan; `first` [D] stands for the row before the first one; grad_decay is double [1, D] or [T, D]."""
    steps, groups, width = h.shape[0], begins.shape[1], h.shape[1] // begins.shape[1]
    a, constant = decay[0], decay.shape[0] == 1
    for i in range(steps):
        t = i if reverse else steps - 1 - i
        if not constant:
            a = decay[t]
        previous = first if i == steps - 1 else h[t + 1 if reverse else t - 1]
        grad_row, x_row = grad_h[t], grad_x[t]
        if groups == 1:
            if begins.shape[0] > 0 and begins[t, 0]:
                _begin_back(grad_row, carry, x_row)
            else:
                _step_back(a, grad_row, carry, x_row, not reverse)
                if need_decay_grad:
                    _decay_back(previous, x_row, partial, not reverse)
        else:
            for n in range(groups):
                own = slice(n * width, (n + 1) * width)
                if begins.shape[0] > 0 and begins[t, n]:
                    _begin_back(grad_row[own], carry[own], x_row[own])
                else:
                    _step_back(a[own], grad_row[own], carry[own], x_row[own], not reverse)
                    if need_decay_grad:
                        _decay_back(previous[own], x_row[own], partial[own], not reverse)
        if need_decay_grad and (not constant or i % _FLUSH == _FLUSH - 1 or i == steps - 1):
            grad_row = grad_decay[0 if constant else t]
            for c in range(partial.shape[0]):
                grad_row[c] += partial[c]
                partial[c] = 0


@_jit
def _forward_one(decay, x, begins, state, h, reverse):
    """One channel, its state in a register: x, h [T]; decay [1] or [T]; begins [T] or [0]. For returns and advantages."""
    a, s = decay[0], state[0]
    for i in range(x.shape[0]):
        t = x.shape[0] - 1 - i if reverse else i
        if decay.shape[0] > 1:
            a = decay[t]
        if begins.shape[0] > 0 and begins[t]:
            s = x[t]
        else:
            s = a * s + x[t]
        h[t] = s


def forward(decay, x, begins, h0, reverse):
    """See `scan.py` for the signature that all backends share. CPU tensors only."""
    h = torch.empty_like(x)
    rows, out = x.numpy().reshape(len(x), -1), h.numpy().reshape(len(x), -1)
    state = np.zeros(rows.shape[1], _double(rows)) if h0 is None else h0.numpy().reshape(-1).astype(_double(rows))
    arrays = _decay_rows(decay), rows, _flags(begins, x), state, out
    if rows.shape[1] == 1:
        _forward_one(*(array.reshape(-1) for array in arrays), reverse)
    else:
        _forward(*arrays, reverse)
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad):
    """See `scan.py`."""
    grad_x = torch.empty_like(h)
    decay_rows, rows = _decay_rows(decay), h.numpy().reshape(len(h), -1)
    first = np.zeros(rows.shape[1], rows.dtype) if h0 is None else h0.numpy().reshape(-1)
    carry, partial = np.zeros(rows.shape[1], _double(rows)), np.zeros(rows.shape[1], rows.dtype)
    grad_decay = np.zeros(decay_rows.shape if need_decay_grad else (1, 1), _double(rows))
    grads = grad_h.numpy().reshape(rows.shape), carry, partial, grad_decay, grad_x.numpy().reshape(rows.shape)
    _backward(decay_rows, rows, _flags(begins, h), first, *grads, need_decay_grad, reverse)
    grad_decay = torch.from_numpy(grad_decay).view(decay.shape).to(decay.dtype) if need_decay_grad else None
    return grad_decay, grad_x, None if h0 is None else torch.from_numpy(carry).view(h0.shape).to(h0.dtype)


def _double(rows):
    return np.complex128 if rows.dtype.kind == "c" else np.float64


def _decay_rows(decay):
    """[N, C] -> [1, D] in double; [T, N, C] -> [T, D] as it is, too large to copy."""
    rows = decay.numpy()
    return rows.reshape(len(rows), -1) if rows.ndim == 3 else rows.reshape(1, -1).astype(_double(rows), copy=False)


def _flags(begins, x):
    return np.zeros((0, x.shape[1]), np.bool_) if begins is None else begins.numpy()
