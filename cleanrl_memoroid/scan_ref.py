"""The recurrence as a plain loop: the definition that every other backend is tested against."""

import torch


def linear_scan(decay, x, begins, h0, reverse):
    """h[t] = x[t] + decay[t] * (0 if begins[t] else h[t-1]), one row after the other, differentiable by autograd.

    Args:
        decay: [N, C] (the same at every step) or [T, N, C].
        x: [T, N, C], float32, float64, complex64 or complex128.
        begins: bool [T, N], or None for no reset.
        h0: [N, C], the state before the first row in scan order, or None for zeros.
        reverse: run from the last row to the first.
    Returns: h like x; the arithmetic is done in decay's precision if that is the higher one.
    """
    state = torch.zeros_like(x[0], dtype=decay.dtype) if h0 is None else h0.to(decay.dtype)
    h = [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        if begins is not None:
            state = torch.where(begins[t, :, None], 0, state)  # select: 0 * nan would be nan
        # a begin also selects its decay, so that a nan decay cannot cross it either
        a = decay[t] if decay.dim() == 3 else decay
        product = a * state if begins is None else torch.where(begins[t, :, None], 0, a * state)
        state = x[t] + product
        h[t] = state
    return torch.stack(h).to(x.dtype)
