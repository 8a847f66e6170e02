"""The scan in plain PyTorch, for every device: time is cut into chunks that advance side by side.

With T = K L rows, row j of all K chunks is one slab x[j::L], so that L slab operations advance K chunks at once:

    chunk      0            1            2
    rows       0 1 2 .. L-1 | L ..       | 2L ..          slab j = rows j, L+j, 2L+j, ...
    1 reduce   run every chunk from zero, keep only its end
    2 carry    end[k] += decay^L * end[k-1] unless chunk k holds a begin: the same recurrence, K rows long, in double precision
    3 apply    run every chunk again, from the end of the chunk before it, and write

This is the two-sweep scan of Blelloch (1993), section 1.4, with a branching of L instead of 2: memory is read twice and
written once, and the longest chain of operations is 2 L + K. A tree of branching 2 loses digits where the decay is near one.
"""

import math

import torch

SHARES_X = True  # x [T, 1, C] may stand for all N groups, see `scan.py`
_BASE = 48  # rows; up to here, one row after the other is quickest
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def forward(decay, x, begins, h0, reverse):
    """See `scan.py` for the signature that all backends share."""
    x, begins = x.expand(-1, *decay.shape[-2:]), None if begins is None else begins.expand(-1, decay.shape[-2])
    if len(x) <= _BASE:
        return _loop(decay, x, begins, h0, reverse)
    length = 2 ** (
        round(math.log2(len(x)) / 2) - 1
    )  # short: each row of a chunk adds the rounding of a single-precision decay
    slabs, dead = _cut(begins, len(x), length, reverse)
    constant, a = decay.dim() == 2, decay.to(x.dtype)

    def tail(state, count):
        """The chunks that have a row j; the last chunk in scan order may be short."""
        return state[len(state) - count :] if reverse else state[:count]

    ends = torch.zeros_like(x[:1]).repeat(-(-len(x) // length), 1, 1)
    powers = None if constant else torch.ones_like(ends)
    for rows, count, begin in slabs:
        state = tail(ends, count)
        _step(a if constant else a[rows], state, x[rows], begin, out=state)
        if not constant:
            tail(powers, count).mul_(a[rows])

    double = _DOUBLE.get(x.dtype, x.dtype)
    if constant:
        powers = decay.to(double)
        for _ in range(length.bit_length() - 1):  # decay^L by squaring: pow() takes a logarithm, and that of 0 is -inf
            powers = powers * powers
    ends = forward(powers.to(double), ends.to(double), dead, None if h0 is None else h0.to(double), reverse).to(x.dtype)

    first = torch.zeros_like(x[:1]) if h0 is None else h0[None]
    state = torch.cat([ends[1:], first] if reverse else [first, ends[:-1]])
    h = torch.empty_like(x)
    for rows, count, begin in slabs:
        _step(a if constant else a[rows], tail(state, count), x[rows], begin, out=h[rows])
        state = h[rows]
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad, shared=False):
    """See `scan.py`. The gradient is the same scan in the other direction, where a row leaves through the next row's decay.

    With g[t] = grad_h[t] + conj(decay[t+1]) (0 if begins[t+1] else g[t+1]), decay and begins move by one row; past the
    end of the tape stands anything, since the state there is zero.
    """
    conj_decay, begins = decay.conj().resolve_conj(), None if begins is None else begins.expand(-1, h.shape[1])
    next_decay = conj_decay if decay.dim() == 2 else _shift(conj_decay, reverse)
    grad_x = forward(next_decay, grad_h, None if begins is None else _shift(begins, reverse), None, not reverse)

    edge = -1 if reverse else 0  # the first row in scan order: its decay and its begin lead to h0
    grad_h0 = None
    if h0 is not None:
        grad_h0 = (conj_decay if decay.dim() == 2 else conj_decay[edge]) * grad_x[edge]
        grad_h0 = (grad_h0 if begins is None else torch.where(begins[edge, :, None], 0, grad_h0)).to(h0.dtype)
    own = grad_x.sum(1, keepdim=True) if shared else grad_x
    if not need_decay_grad:
        return None, own, grad_h0

    # grad_decay[t] = conj(h[t-1]) g[t] unless t is a begin, summed over t if the decay is constant; in blocks that fit a cache
    first = torch.zeros_like(h[:1]) if h0 is None else h0[None]
    grad_decay = torch.zeros_like(decay)
    for low in range(0, len(h), 1024):
        high = min(low + 1024, len(h))
        if reverse:
            previous = h[low + 1 : high + 1] if high < len(h) else torch.cat([h[low + 1 :], first])
        else:
            previous = h[low - 1 : high - 1] if low else torch.cat([first, h[: high - 1]])
        product = torch.mul(previous.conj(), grad_x[low:high])
        if begins is not None:
            product[begins[low:high].nonzero(as_tuple=True)] = 0
        if decay.dim() == 3:
            grad_decay[low:high] = product
        else:
            grad_decay += product.sum(0)
    return grad_decay, own, grad_h0


def blelloch_scan(operator, elems):
    """Inclusive scan of a tuple of tensors [T, ...] along time: out[t] = elems[0] • elems[1] • ... • elems[t].

    Combine neighbours, scan the result, which is half as long, and fill in the rows between: O(T) operator applications,
    O(log T) deep, differentiable through the operator (Blelloch, 1993, section 1.4).
    """
    steps = len(elems[0])
    if steps == 1:
        return elems
    pairs = operator(tuple(e[:-1:2] for e in elems), tuple(e[1::2] for e in elems))
    odd = blelloch_scan(operator, pairs)  # out[1], out[3], ...
    even = tuple(e[:1] for e in elems)  # out[0], then out[2] = out[1] • elems[2], ...
    if steps > 2:
        rest = operator(tuple(o[: (steps - 1) // 2] for o in odd), tuple(e[2::2] for e in elems))
        even = tuple(torch.cat(rows) for rows in zip(even, rest))
    if steps % 2:  # one row more, to make the last pair whole, and off again
        odd = tuple(torch.cat([o, o[-1:]]) for o in odd)
    return tuple(torch.stack(rows, 1).flatten(0, 1)[:steps] for rows in zip(even, odd))


def _cut(begins, steps, length, reverse):
    """For each slab j: its rows, how many chunks have it, its begins as (chunk, group) or None. And: which chunks have one."""
    counts = [(steps - 1 - j) // length + 1 for j in range(length)]
    rows = [slice((steps - 1 - j) % length if reverse else j, None, length) for j in range(length)]
    if begins is None:
        return list(zip(rows, counts, [None] * length)), None
    t, group = begins.nonzero(as_tuple=True)
    order = steps - 1 - t if reverse else t
    j, chunk = order % length, order // length
    dead = torch.zeros(counts[0], begins.shape[1], dtype=torch.bool, device=begins.device)
    dead[counts[0] - 1 - chunk if reverse else chunk, group] = True
    if reverse:
        chunk = (steps - 1 - j) // length - chunk  # slabs are in order of rows, and a short chunk is missing at the front
    by_slab, sizes = j.argsort(), torch.bincount(j, minlength=length).tolist()
    begin = [pair if len(pair[0]) else None for pair in zip(chunk[by_slab].split(sizes), group[by_slab].split(sizes))]
    return list(zip(rows, counts, begin)), dead


def _step(a, state, x, begin, out):
    """out = x + a * state, but out = x where an episode begins; `out` may be `state`."""
    torch.addcmul(x, a, state, out=out)
    if begin is not None:
        out[begin] = x[begin]


def _loop(decay, x, begins, h0, reverse):
    state = torch.zeros_like(x[0], dtype=decay.dtype) if h0 is None else h0.to(decay.dtype)
    h, x = torch.empty_like(x), x.to(decay.dtype)
    any_begin = [False] * len(x) if begins is None else begins.any(1).tolist()
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        new = torch.addcmul(x[t], decay if decay.dim() == 2 else decay[t], state)
        state = torch.where(begins[t, :, None], x[t], new) if any_begin[t] else new
        h[t] = state
    return h


def _shift(rows, reverse):
    edge = torch.zeros_like(rows[:1])
    return torch.cat([edge, rows[:-1]]) if reverse else torch.cat([rows[1:], edge])
