"""The linear scan on CUDA: Triton kernels for h[t] = x[t] + decay[t] * (0 if begins[t] else h[t-1]), and its gradient.

Walking the T rows one after another leaves a GPU idle, so the rows are cut into chunks of L that run side by side, after
Blelloch (1993), "Prefix sums and their applications", section 1.2: reduce, scan the reductions, apply.

    rows             |  x0 x1 .. |  xL ..    |  x2L ..   |        one thread per channel and chunk, walking down its rows
    1 chunk_ends     |    end 0  |    end 1  |  (unused) |        h at the chunk's last row had it started from zero
    2 chunk_carries  h0 --------> c1 -------> c2                  c[j+1] = end[j] + decay^L * c[j], or end[j] after a begin
    3 apply          |  h0 .. hL |  ..       |  ..       |        the chunk again, now from its true carry; writes h

Work is O(T), depth O(L + T/L). Pass 3 with a single chunk is the plain sequential scan: short tapes launch only that one.
Tensors stay [T, N, C] with lanes along the channels, so loads coalesce; a complex number is two adjacent floats. The state
is kept in the precision of `decay`: a double decay with single x costs no memory traffic and no rounding per step.

The gradient walks the other way. With c the carry that row t hands to row t-1, it is a scan of the same shape:
    g[t] = grad_h[t] + c,   grad_decay[t] = conj(h[t-1]) * g[t],   c = conj(decay[t]) * g[t],   both 0 where begins[t].
Each row meets its own decay and begin, so nothing is shifted by one, and the c that leaves the last row is grad_h0.

A begin selects, and never multiplies by zero: 0 * nan is nan, and would leak from one episode into the next.
"""

import contextlib

import torch
import triton
import triton.language as tl

LANES = 32  # channels per program: one warp, so no barriers, and a single tape still spreads over many multiprocessors
# Up to this many rows, one sequential kernel: two launches fewer (about 10 us each on the host) outweigh its longer walk.
SINGLE_PASS_ROWS = 1024


def chunk_length(T):
    """Rows per chunk, a power of two. Near sqrt(T) the walk down a chunk and the walk over all carries are equally long."""
    if T <= SINGLE_PASS_ROWS:
        return T
    return 2 ** min(max((T.bit_length() - 1) // 2, 5), 10)


# ----------------------------------------------------------------------------------------------------------------------
# Helpers. A number is a pair (re, im); for real tensors im is a copy of re that nothing reads, so the compiler drops it.
# ----------------------------------------------------------------------------------------------------------------------
@triton.jit
def load(pointer, at, mask, DTYPE: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:  # one vector load for the pair
        pairs = pointer + (2 * at[:, None] + tl.arange(0, 2)[None, :])
        re, im = tl.split(tl.load(pairs, mask=mask[:, None], other=0.0).to(DTYPE))
    else:
        re = tl.load(pointer + at, mask=mask, other=0.0).to(DTYPE)
        im = re
    return re, im


@triton.jit
def store(pointer, at, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        pairs = pointer + (2 * at[:, None] + tl.arange(0, 2)[None, :])
        tl.store(pairs, tl.join(re, im).to(pointer.dtype.element_ty), mask=mask[:, None])
    else:
        tl.store(pointer + at, re.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_decay(decay, at, mask, ADJOINT: tl.constexpr, DTYPE: tl.constexpr, COMPLEX: tl.constexpr):
    re, im = load(decay, at, mask, DTYPE, COMPLEX)
    if ADJOINT:
        im = -im  # the gradient meets conj(decay)
    return re, im


@triton.jit
def times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = a_re * b_re - a_im * b_im
        im = a_re * b_im + a_im * b_re
    else:
        re = a_re * b_re
        im = re
    return re, im


@triton.jit
def load_flag(flags, at, mask):
    if flags is None:
        flag = at < at  # constant False: the selects on it compile to nothing
    else:
        flag = tl.load(flags + at, mask=mask, other=0) != 0
    return flag


@triton.jit
def zero_where(flag, re, im):
    return tl.where(flag, 0.0, re), tl.where(flag, 0.0, im)


@triton.jit
def lanes(tile, channels, C, LANES: tl.constexpr):
    """Flat channels d = n * C + c of this tile, the tape n each is on, and which exist."""
    d = tile.to(tl.int64) * LANES + tl.arange(0, LANES)
    return d, d // C, d < channels


# ----------------------------------------------------------------------------------------------------------------------
# Pass 1. Reduce each chunk to what it hands to the next: its end, whether a begin cuts the carry, the product of decays.
# ----------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["first", "step", "L"])
def chunk_ends(
    x, decay, begins, ends, products, begun, first, step, L, channels, N, C,
    VARYING: tl.constexpr, ADJOINT: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = decay.dtype.element_ty
    tiles = tl.cdiv(channels, LANES)
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    d, n, mask = lanes(tl.program_id(0) % tiles, channels, C, LANES)
    a_re, a_im = load_decay(decay, d, mask, ADJOINT, DTYPE, COMPLEX)  # overwritten row by row where it varies
    p_re = tl.full([LANES], 1.0, DTYPE)
    p_im = tl.zeros([LANES], DTYPE)
    re = tl.zeros([LANES], DTYPE)
    im = re
    cut = d < d
    row = first + chunk * L * step
    for i in range(0, L, AHEAD):  # never a partial chunk: nobody follows the last one, so it has no program here
        for _ in tl.static_range(AHEAD):  # unrolled, so that the loads of later rows overlap this row's arithmetic
            at = row * channels + d
            x_re, x_im = load(x, at, mask, DTYPE, COMPLEX)
            begin = load_flag(begins, row * N + n, mask)
            if VARYING:
                a_re, a_im = load_decay(decay, at, mask, ADJOINT, DTYPE, COMPLEX)
                p_re, p_im = times(a_re, a_im, p_re, p_im, COMPLEX)
            if ADJOINT:  # c <- conj(a) (x + c)
                re += x_re
                im += x_im
            re, im = times(a_re, a_im, re, im, COMPLEX)
            re, im = zero_where(begin, re, im)
            if not ADJOINT:  # h <- x + a h
                re += x_re
                im += x_im
            cut = cut | begin
            row += step
    out = chunk * channels + d
    store(ends, out, re, im, mask, COMPLEX)
    if VARYING:
        store(products, out, p_re, p_im, mask, COMPLEX)
    if begins is not None:
        tl.store(begun + out, cut.to(tl.uint8), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Pass 2. Scan over chunks, in double: the errors of all chunks meet here. In place: end[j] gives way to the carry into j.
#
# On the recursion, here and in pass 3: a load may not move above an earlier store that might alias it, so a plain unrolled
# loop would wait for memory at every row. Recursing between a row's load and its store issues AHEAD loads, then AHEAD stores.
# ----------------------------------------------------------------------------------------------------------------------
@triton.jit
def carry_rows(ends, products, begun, at, channels, c_re, c_im, p_re, p_im, mask, COMPLEX: tl.constexpr, AHEAD: tl.constexpr):
    e_re, e_im = load(ends, at, mask, tl.float64, COMPLEX)
    cut = load_flag(begun, at, mask)
    if products is not None:
        p_re, p_im = load(products, at, mask, tl.float64, COMPLEX)
    n_re, n_im = times(p_re, p_im, c_re, c_im, COMPLEX)
    n_re, n_im = zero_where(cut, n_re, n_im)
    n_re += e_re
    n_im += e_im
    if AHEAD > 1:
        n_re, n_im = carry_rows(
            ends, products, begun, at + channels, channels, n_re, n_im, p_re, p_im, mask, COMPLEX, AHEAD - 1
        )
    store(ends, at, c_re, c_im, mask, COMPLEX)
    return n_re, n_im


@triton.jit(do_not_specialize=["chunks", "doublings"])
def chunk_carries(
    ends, products, begun, decay, h0, chunks, doublings, channels, C,
    ADJOINT: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    d, n, mask = lanes(tl.program_id(0), channels, C, LANES)
    re = tl.zeros([LANES], tl.float64)
    im = re
    if h0 is not None:
        re, im = load(h0, d, mask, tl.float64, COMPLEX)
    p_re, p_im = load_decay(decay, d, mask, ADJOINT, tl.float64, COMPLEX)  # overwritten chunk by chunk where it varies
    if products is None:
        for _ in range(doublings):  # decay^L, L = 2^doublings
            p_re, p_im = times(p_re, p_im, p_re, p_im, COMPLEX)
    at = d
    whole = (chunks - 1) // AHEAD * AHEAD
    for _ in range(0, whole, AHEAD):
        re, im = carry_rows(ends, products, begun, at, channels, re, im, p_re, p_im, mask, COMPLEX, AHEAD)
        at += AHEAD * channels
    for _ in range(whole, chunks - 1):
        re, im = carry_rows(ends, products, begun, at, channels, re, im, p_re, p_im, mask, COMPLEX, 1)
        at += channels
    store(ends, at, re, im, mask, COMPLEX)


# ----------------------------------------------------------------------------------------------------------------------
# Pass 3. Walk each chunk again from its carry. Last chunk first: of what pass 1 read, the end is still in the L2 cache.
# ----------------------------------------------------------------------------------------------------------------------
@triton.jit
def forward_rows(
    x, decay, begins, h, row, step, channels, N, d, n, mask, re, im, a_re, a_im,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    at = row * channels + d
    x_re, x_im = load(x, at, mask, re.dtype, COMPLEX)
    begin = load_flag(begins, row * N + n, mask)
    if VARYING:
        a_re, a_im = load(decay, at, mask, re.dtype, COMPLEX)
    re, im = times(a_re, a_im, re, im, COMPLEX)
    re, im = zero_where(begin, re, im)
    re += x_re
    im += x_im
    last_re, last_im = re, im
    if AHEAD > 1:
        last_re, last_im = forward_rows(
            x, decay, begins, h, row + step, step, channels, N, d, n, mask, re, im, a_re, a_im, VARYING, COMPLEX, AHEAD - 1
        )
    store(h, at, re, im, mask, COMPLEX)
    return last_re, last_im


@triton.jit(do_not_specialize=["first", "step", "L", "T", "chunks"])
def apply_forward(
    x, decay, begins, carries, h, first, step, L, T, chunks, channels, N, C,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = decay.dtype.element_ty
    tiles = tl.cdiv(channels, LANES)
    chunk = (chunks - 1 - tl.program_id(0) // tiles).to(tl.int64)
    d, n, mask = lanes(tl.program_id(0) % tiles, channels, C, LANES)
    a_re, a_im = load(decay, d, mask, DTYPE, COMPLEX)
    re = tl.zeros([LANES], DTYPE)
    im = re
    if carries is not None:
        re, im = load(carries, chunk * channels + d, mask, DTYPE, COMPLEX)
    row = first + chunk * L * step
    rows = tl.minimum(L, T - chunk * L)
    whole = rows // AHEAD * AHEAD
    for _ in range(0, whole, AHEAD):
        re, im = forward_rows(
            x, decay, begins, h, row, step, channels, N, d, n, mask, re, im, a_re, a_im, VARYING, COMPLEX, AHEAD
        )
        row += AHEAD * step
    for _ in range(whole, rows):
        re, im = forward_rows(
            x, decay, begins, h, row, step, channels, N, d, n, mask, re, im, a_re, a_im, VARYING, COMPLEX, 1
        )
        row += step


@triton.jit
def backward_rows(
    grad_h, h, h0, decay, begins, grad_x, grad_decay, row, step, channels, N, d, n, mask, h0_at, h0_re, h0_im,
    re, im, sum_re, sum_im, a_re, a_im, VARYING: tl.constexpr, COMPLEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    at = row * channels + d
    g_re, g_im = load(grad_h, at, mask, re.dtype, COMPLEX)
    begin = load_flag(begins, row * N + n, mask)
    if VARYING:
        a_re, a_im = load_decay(decay, at, mask, True, re.dtype, COMPLEX)
    g_re += re
    g_im += im
    re, im = times(a_re, a_im, g_re, g_im, COMPLEX)
    re, im = zero_where(begin, re, im)
    if grad_decay is not None:  # conj(h[t-1]) g[t]
        before = at + step * channels  # step is the gradient's, so this is the row h[t] was made from
        h_re, h_im = load(h, before, mask & (before != h0_at), re.dtype, COMPLEX)
        if h0 is not None:
            h_re = tl.where(before == h0_at, h0_re, h_re)
            h_im = tl.where(before == h0_at, h0_im, h_im)
        da_re, da_im = times(h_re, -h_im, g_re, g_im, COMPLEX)
        da_re, da_im = zero_where(begin, da_re, da_im)
        sum_re += da_re
        sum_im += da_im
    last_re, last_im = re, im
    if AHEAD > 1:
        last_re, last_im, sum_re, sum_im = backward_rows(
            grad_h, h, h0, decay, begins, grad_x, grad_decay, row + step, step, channels, N, d, n, mask, h0_at, h0_re, h0_im,
            re, im, sum_re, sum_im, a_re, a_im, VARYING, COMPLEX, AHEAD - 1,
        )  # fmt: skip
    store(grad_x, at, g_re, g_im, mask, COMPLEX)
    if VARYING and grad_decay is not None:
        store(grad_decay, at, da_re, da_im, mask, COMPLEX)
    return last_re, last_im, sum_re, sum_im


@triton.jit(do_not_specialize=["first", "step", "L", "T", "chunks"])
def apply_backward(
    grad_h, h, h0, decay, begins, carries, grad_x, grad_decay, grad_h0, first, step, L, T, chunks, channels, N, C,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`grad_decay` is one row per chunk where decay is constant: a sum in fixed order, without atomics, is reproducible."""
    DTYPE: tl.constexpr = decay.dtype.element_ty
    tiles = tl.cdiv(channels, LANES)
    chunk = (chunks - 1 - tl.program_id(0) // tiles).to(tl.int64)
    d, n, mask = lanes(tl.program_id(0) % tiles, channels, C, LANES)
    a_re, a_im = load_decay(decay, d, mask, True, DTYPE, COMPLEX)
    re = tl.zeros([LANES], DTYPE)
    im = re
    sum_re = re
    sum_im = re
    h0_re = re
    h0_im = re
    if carries is not None:
        re, im = load(carries, chunk * channels + d, mask, DTYPE, COMPLEX)
    if h0 is not None:
        h0_re, h0_im = load(h0, d, mask, DTYPE, COMPLEX)
    h0_at = (first + T.to(tl.int64) * step) * channels + d  # one row past the gradient's last: where h0 would stand
    row = first + chunk * L * step
    rows = tl.minimum(L, T - chunk * L)
    whole = rows // AHEAD * AHEAD
    for _ in range(0, whole, AHEAD):
        re, im, sum_re, sum_im = backward_rows(
            grad_h, h, h0, decay, begins, grad_x, grad_decay, row, step, channels, N, d, n, mask, h0_at, h0_re, h0_im,
            re, im, sum_re, sum_im, a_re, a_im, VARYING, COMPLEX, AHEAD,
        )  # fmt: skip
        row += AHEAD * step
    for _ in range(whole, rows):
        re, im, sum_re, sum_im = backward_rows(
            grad_h, h, h0, decay, begins, grad_x, grad_decay, row, step, channels, N, d, n, mask, h0_at, h0_re, h0_im,
            re, im, sum_re, sum_im, a_re, a_im, VARYING, COMPLEX, 1,
        )  # fmt: skip
        row += step
    if grad_decay is not None and not VARYING:
        store(grad_decay, chunk * channels + d, sum_re, sum_im, mask, COMPLEX)
    if grad_h0 is not None:
        if chunk == chunks - 1:
            store(grad_h0, d, re, im, mask, COMPLEX)


# ----------------------------------------------------------------------------------------------------------------------
# Host side
# ----------------------------------------------------------------------------------------------------------------------
def forward(decay, x, begins, h0, reverse):
    """h of the linear scan: x [T, N, C]; decay [N, C] or [T, N, C]; begins bool [T, N] or None; h0 [N, C] or None."""
    T, N, C = x.shape
    h = torch.empty_like(x)
    if h.numel() == 0:
        return h
    varying = decay.dim() == 3
    first, step = (T - 1, -1) if reverse else (0, 1)
    with on_device(x):
        carries, L, chunks, tiles = carry(decay, x, begins, h0, first, step, adjoint=False)
        apply_forward[(chunks * tiles,)](
            reals(x), reals(decay), reals(begins), reals(carries), reals(h), first, step, L, T, chunks, N * C, N, C,
            VARYING=varying, COMPLEX=x.is_complex(), LANES=LANES, AHEAD=8 if varying else 16, num_warps=1,
        )  # fmt: skip
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad):
    """Gradients for decay (None unless needed), x and h0 (None without h0), from the h that `forward` returned."""
    T, N, C = h.shape
    varying = decay.dim() == 3
    first, step = (0, 1) if reverse else (T - 1, -1)
    grad_x = torch.empty_like(h)
    grad_h0 = None if h0 is None else torch.empty_like(h0)
    if h.numel() == 0:
        return torch.zeros_like(decay) if need_decay_grad else None, grad_x, grad_h0
    grad_decay = None
    with on_device(h):
        carries, L, chunks, tiles = carry(decay, grad_h, begins, None, first, step, adjoint=True)
        if need_decay_grad:
            grad_decay = torch.empty_like(decay) if varying else decay.new_empty((chunks, N, C))
        apply_backward[(chunks * tiles,)](
            reals(grad_h), reals(h), reals(h0), reals(decay), reals(begins), reals(carries),
            reals(grad_x), reals(grad_decay), reals(grad_h0), first, step, L, T, chunks, N * C, N, C,
            VARYING=varying, COMPLEX=h.is_complex(), LANES=LANES, AHEAD=8, num_warps=1,
        )  # fmt: skip
        if need_decay_grad and not varying:
            grad_decay = grad_decay.sum(0)
    return grad_decay, grad_x, grad_h0


def carry(decay, x, begins, h0, first, step, adjoint):
    """Passes 1 and 2. Returns the carry into every chunk (h0 if there is one chunk), L, chunks, and channel tiles."""
    T, N, C = x.shape
    L = chunk_length(T)
    chunks, tiles = triton.cdiv(T, L), triton.cdiv(N * C, LANES)
    if chunks == 1:
        return h0, L, chunks, tiles
    varying = decay.dim() == 3
    ends = decay.new_empty((chunks, N, C))
    products = torch.empty_like(ends) if varying else None
    begun = None if begins is None else begins.new_empty((chunks, N, C))
    options = dict(ADJOINT=adjoint, COMPLEX=x.is_complex(), LANES=LANES, num_warps=1)
    chunk_ends[((chunks - 1) * tiles,)](
        reals(x), reals(decay), reals(begins), reals(ends), reals(products), reals(begun), first, step, L, N * C, N, C,
        VARYING=varying, AHEAD=min(8 if varying else 16, L), **options,
    )  # fmt: skip
    chunk_carries[(tiles,)](
        reals(ends), reals(products), reals(begun), reals(decay), reals(h0), chunks, L.bit_length() - 1, N * C, C,
        AHEAD=16, **options,
    )  # fmt: skip
    return ends, L, chunks, tiles


def reals(tensor):
    """The tensor as kernels take it: complex as adjacent pairs of floats, bool as bytes, None as None."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    tensor = tensor.resolve_conj().resolve_neg()  # a lazy conjugate's memory is not yet conjugated
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def on_device(tensor):
    """Triton launches on the current device, which need not be the tensor's. (In its interpreter tensors are on the CPU.)"""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
