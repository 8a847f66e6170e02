"""The linear scan on CUDA: Triton kernels for h[t] = x[t] + decay[t] * (0 if begins[t] else h[t-1]), and its gradient.

Walking the T rows one after another leaves a GPU idle, so the rows are cut into chunks of L that are walked side by side:
reduce each, scan the reductions, apply (Blelloch 1993, "Prefix sums and their applications", section 1.2).

    rows             |  x0 x1 ..  |  xL ..     |  x2L ..  |       one thread per channel and chunk
    1 chunk_ends     |  end[0]    |  end[1]    |          |       h at the chunk's last row, had it begun from zero
    2 chunk_carries  h0 --------> c[1] ------> c[2]               c[j+1] = end[j] + decay^L * c[j]; only end[j] after a begin
    3 apply          |  h0 h1 ..  |  hL ..     |  h2L ..  |       each chunk again, now from its true carry

Work is O(T), depth O(L + T/L). Pass 3 with one chunk is the plain sequential scan: a short tape launches nothing else.
Tensors stay [T, N, C] with lanes along the channels, so loads coalesce; a complex number is two adjacent floats. State is
kept in the precision of `decay`: a double decay beside single x spares the rounding at each step and costs no traffic.

The gradient is a scan the other way. With c what row t hands on to row t-1,
    g[t] = grad_h[t] + c,   grad_x[t] = g[t],   grad_decay[t] = conj(h[t-1]) * g[t],   c = conj(decay[t]) * g[t],
the last two 0 where begins[t]. Each row meets its own decay and begin; the c that leaves the last row walked is grad_h0.

A begin selects, and never multiplies by zero: 0 * nan is nan, and would leak from one episode into another.
"""

import torch
import triton
import triton.language as tl

LANES = 32  # channels per program: one warp needs no barriers, and even a single tape spreads over many multiprocessors
AHEAD_BYTES = 192  # a thread's loads in flight: as many as hide the memory's latency, yet fit its registers
# Up to here one sequential kernel: two launches fewer, about 10 us each on the host, outweigh its longer walk (reasoned).
SINGLE_PASS_ROWS = 1024


def chunk_length(T):
    """Rows per chunk, a power of two near sqrt(T): the walk down a chunk is then about as long as the one over carries."""
    return T if T <= SINGLE_PASS_ROWS else 2 ** min(max((T.bit_length() - 1) // 2, 5), 10)


def rows_ahead(*read):
    """Rows to load before the first is used, a power of two up to 16. `read`: the tensors of which each row is loaded."""
    return min(16, 2 ** ((AHEAD_BYTES // sum(tensor.element_size() for tensor in read)).bit_length() - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Helpers. A number is a pair (re, im); for real tensors im is a copy of re that nothing reads, so the compiler drops it.
# N, C and STEP are compile-time constants: the addresses of the rows ahead then are offsets that take no registers.
@triton.jit
def load(pointer, at, mask, DTYPE: tl.constexpr, COMPLEX: tl.constexpr, CONJUGATE: tl.constexpr = False):
    if COMPLEX:  # one vector load for the pair
        pairs = pointer + (2 * at[:, None] + tl.arange(0, 2)[None, :])
        re, im = tl.split(tl.load(pairs, mask=mask[:, None], other=0.0).to(DTYPE))
        if CONJUGATE:
            im = -im
    else:
        re = tl.load(pointer + at, mask=mask, other=0.0).to(DTYPE)
        im = re
    return re, im


@triton.jit
def load_flag(flags, at, mask):
    if flags is None:
        flag = at < at  # False at compile time: selects on it vanish
    else:
        flag = tl.load(flags + at, mask=mask, other=0) != 0
    return flag


@triton.jit
def store(pointer, at, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        pairs = pointer + (2 * at[:, None] + tl.arange(0, 2)[None, :])
        tl.store(pairs, tl.join(re, im).to(pointer.dtype.element_ty), mask=mask[:, None])
    else:
        tl.store(pointer + at, re.to(pointer.dtype.element_ty), mask=mask)


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
def times_unless(flag, a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    """a * b, but 0 where flag, whatever a and b are."""
    re, im = times(a_re, a_im, b_re, b_im, COMPLEX)
    return tl.where(flag, 0.0, re), tl.where(flag, 0.0, im)


@triton.jit
def place(T, L, N: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's chunk and channels d = n * C + c, which of them exist, and where its first row and begin flag are."""
    TILES: tl.constexpr = (N * C + LANES - 1) // LANES
    chunk = (tl.program_id(0) // TILES).to(tl.int64)  # 64 bits, since T * N * C may pass 2^31
    if LAST_FIRST:
        chunk = tl.cdiv(T, L) - 1 - chunk
    d = tl.program_id(0) % TILES * LANES + tl.arange(0, LANES)
    row = chunk * L * STEP
    if STEP < 0:
        row += T - 1
    return chunk, d, d < N * C, row * (N * C) + d, row * N + d // C


# ----------------------------------------------------------------------------------------------------------------------
# Pass 1. Reduce each chunk to what it hands on: its end, whether a begin cuts the carry, the product of varying decays.
# The last chunk hands on to nobody and has no program here, so every chunk is whole.
@triton.jit(do_not_specialize=["T", "L"])
def chunk_ends(
    x, decay, begins, ends, products, begun, T, L, N: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    ADJOINT: tl.constexpr, VARYING: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = decay.dtype.element_ty
    chunk, d, mask, at, flag_at = place(T, L, N, C, STEP, LANES, LAST_FIRST=False)
    a_re, a_im = load(decay, d, mask, DTYPE, COMPLEX, ADJOINT)  # replaced row by row where it varies
    p_re, p_im = tl.full([LANES], 1.0, DTYPE), tl.zeros([LANES], DTYPE)
    re, im = tl.zeros([LANES], DTYPE), tl.zeros([LANES], DTYPE)
    cut = d < 0
    for _block in range(0, L, AHEAD):
        for _ahead in tl.static_range(AHEAD):  # unrolled, so that the loads of later rows overlap this row's arithmetic
            x_re, x_im = load(x, at, mask, DTYPE, COMPLEX)
            begin = load_flag(begins, flag_at, mask)
            if VARYING:
                a_re, a_im = load(decay, at, mask, DTYPE, COMPLEX, ADJOINT)
                p_re, p_im = times(a_re, a_im, p_re, p_im, COMPLEX)
            if ADJOINT:  # c <- conj(a) (x + c)
                re, im = re + x_re, im + x_im
            re, im = times_unless(begin, a_re, a_im, re, im, COMPLEX)
            if not ADJOINT:  # h <- a h + x
                re, im = re + x_re, im + x_im
            cut = cut | begin
            at += STEP * N * C
            flag_at += STEP * N
    out = chunk * (N * C) + d
    store(ends, out, re, im, mask, COMPLEX)
    if VARYING:
        store(products, out, p_re, p_im, mask, COMPLEX)
    if begins is not None:
        tl.store(begun + out, cut.to(tl.uint8), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Pass 2. Scan the chunks, in double, since this is where a rounding error lives longest. In place: end[j] becomes c[j].
#
# Why these *_rows functions recurse: no load may move above an earlier store that might alias it, so after a plain
# unrolled loop of load, step, store every row would wait for memory. Recursing between a row's step and its store
# puts AHEAD loads before AHEAD stores. REST is the function itself: Triton 3.2 cannot compile one that names itself.
@triton.jit
def carry_rows(
    REST: tl.constexpr, ends, products, begun, at, re, im, p_re, p_im, mask,
    CHANNELS: tl.constexpr, COMPLEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD chunks from the one at `at`, with carry (re, im). Returns the carry after them."""
    e_re, e_im = load(ends, at, mask, tl.float64, COMPLEX)
    cut = load_flag(begun, at, mask) | (re == 0) & (im == 0)  # of 0 nothing stays, though decay^L may overflow: 0 * inf
    if products is not None:
        p_re, p_im = load(products, at, mask, tl.float64, COMPLEX)
    c_re, c_im = times_unless(cut, p_re, p_im, re, im, COMPLEX)
    c_re, c_im = c_re + e_re, c_im + e_im
    if AHEAD > 1:
        c_re, c_im = REST(
            REST, ends, products, begun, at + CHANNELS, c_re, c_im, p_re, p_im, mask, CHANNELS, COMPLEX, AHEAD - 1
        )
    store(ends, at, re, im, mask, COMPLEX)
    return c_re, c_im


@triton.jit(do_not_specialize=["chunks", "doublings"])
def chunk_carries(
    ends, products, begun, decay, h0, chunks, doublings, CHANNELS: tl.constexpr,
    ADJOINT: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = at < CHANNELS
    re, im = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    if h0 is not None:
        re, im = load(h0, at, mask, tl.float64, COMPLEX)
    p_re, p_im = load(decay, at, mask, tl.float64, COMPLEX, ADJOINT)
    if products is None:
        for _ in range(doublings):  # decay^L, L = 2^doublings
            p_re, p_im = times(p_re, p_im, p_re, p_im, COMPLEX)
    whole = (chunks - 1) // AHEAD * AHEAD
    for _ in range(0, whole, AHEAD):
        re, im = carry_rows(carry_rows, ends, products, begun, at, re, im, p_re, p_im, mask, CHANNELS, COMPLEX, AHEAD)
        at += AHEAD * CHANNELS
    for _ in range(whole, chunks - 1):
        re, im = carry_rows(carry_rows, ends, products, begun, at, re, im, p_re, p_im, mask, CHANNELS, COMPLEX, 1)
        at += CHANNELS
    store(ends, at, re, im, mask, COMPLEX)


# ----------------------------------------------------------------------------------------------------------------------
# Pass 3. Each chunk again from its carry. Last chunk first: the end of what pass 1 read may still be in the L2 cache.
@triton.jit
def forward_rows(
    REST: tl.constexpr, x, decay, begins, h, at, flag_at, re, im, a_re, a_im, mask,
    N: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, VARYING: tl.constexpr, COMPLEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD rows from the one at `at`, with h[t-1] = (re, im). Returns the last h."""
    x_re, x_im = load(x, at, mask, re.dtype, COMPLEX)
    begin = load_flag(begins, flag_at, mask)
    if VARYING:
        a_re, a_im = load(decay, at, mask, re.dtype, COMPLEX)
    re, im = times_unless(begin, a_re, a_im, re, im, COMPLEX)
    re, im = re + x_re, im + x_im
    last_re, last_im = re, im
    if AHEAD > 1:
        last_re, last_im = REST(
            REST, x, decay, begins, h, at + STEP * N * C, flag_at + STEP * N, re, im, a_re, a_im, mask, N, C, STEP,
            VARYING, COMPLEX, AHEAD - 1,
        )  # fmt: skip
    store(h, at, re, im, mask, COMPLEX)
    return last_re, last_im


@triton.jit(do_not_specialize=["T", "L"])
def apply_forward(
    x, decay, begins, carries, h, T, L, N: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = decay.dtype.element_ty
    chunk, d, mask, at, flag_at = place(T, L, N, C, STEP, LANES, LAST_FIRST=True)
    a_re, a_im = load(decay, d, mask, DTYPE, COMPLEX)
    re, im = tl.zeros([LANES], DTYPE), tl.zeros([LANES], DTYPE)
    if carries is not None:
        re, im = load(carries, chunk * (N * C) + d, mask, DTYPE, COMPLEX)
    rows = tl.minimum(L, T - chunk * L)
    whole = rows // AHEAD * AHEAD
    for _ in range(0, whole, AHEAD):
        re, im = forward_rows(
            forward_rows, x, decay, begins, h, at, flag_at, re, im, a_re, a_im, mask, N, C, STEP, VARYING, COMPLEX, AHEAD
        )
        at += AHEAD * STEP * N * C
        flag_at += AHEAD * STEP * N
    for _ in range(whole, rows):
        re, im = forward_rows(
            forward_rows, x, decay, begins, h, at, flag_at, re, im, a_re, a_im, mask, N, C, STEP, VARYING, COMPLEX, 1
        )
        at += STEP * N * C
        flag_at += STEP * N


@triton.jit
def backward_rows(
    REST: tl.constexpr, grad_h, h, decay, begins, grad_x, grad_decay, at, flag_at, h0_at, re, im, sum_re, sum_im, a_re, a_im,
    mask, N: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD rows from the one at `at`, with c = (re, im). Returns the last c and the sum of grad_decay so far."""
    g_re, g_im = load(grad_h, at, mask, re.dtype, COMPLEX)
    begin = load_flag(begins, flag_at, mask)
    if VARYING:
        a_re, a_im = load(decay, at, mask, re.dtype, COMPLEX, CONJUGATE=True)
    g_re, g_im = g_re + re, g_im + im
    re, im = times_unless(begin, a_re, a_im, g_re, g_im, COMPLEX)
    if grad_decay is not None:
        before = at + STEP * N * C  # the row that h[t] was made from is the gradient's next
        h_re, h_im = load(h, before, mask & (before != h0_at), re.dtype, COMPLEX)
        da_re, da_im = times_unless(begin, h_re, -h_im, g_re, g_im, COMPLEX)
        sum_re, sum_im = sum_re + da_re, sum_im + da_im
    last_re, last_im = re, im
    if AHEAD > 1:
        last_re, last_im, sum_re, sum_im = REST(
            REST, grad_h, h, decay, begins, grad_x, grad_decay, at + STEP * N * C, flag_at + STEP * N, h0_at,
            re, im, sum_re, sum_im, a_re, a_im, mask, N, C, STEP, VARYING, COMPLEX, AHEAD - 1,
        )  # fmt: skip
    store(grad_x, at, g_re, g_im, mask, COMPLEX)
    if VARYING and grad_decay is not None:
        store(grad_decay, at, da_re, da_im, mask, COMPLEX)
    return last_re, last_im, sum_re, sum_im


@triton.jit(do_not_specialize=["T", "L"])
def apply_backward(
    grad_h, h, h0, decay, begins, carries, grad_x, grad_decay, grad_h0, T, L,
    N: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A constant decay gets one grad_decay per chunk, summed later: in fixed order, so that runs repeat bit for bit."""
    DTYPE: tl.constexpr = decay.dtype.element_ty
    chunk, d, mask, at, flag_at = place(T, L, N, C, STEP, LANES, LAST_FIRST=True)
    a_re, a_im = load(decay, d, mask, DTYPE, COMPLEX, CONJUGATE=True)
    re, im = tl.zeros([LANES], DTYPE), tl.zeros([LANES], DTYPE)
    sum_re, sum_im = re, im
    h0_at = d - N * C if STEP < 0 else d + T.to(tl.int64) * (N * C)  # where h0 would stand in h: one row beyond the end
    out = chunk * (N * C) + d
    if carries is not None:
        re, im = load(carries, out, mask, DTYPE, COMPLEX)
    rows = tl.minimum(L, T - chunk * L)
    whole = rows // AHEAD * AHEAD
    for _ in range(0, whole, AHEAD):
        re, im, sum_re, sum_im = backward_rows(
            backward_rows, grad_h, h, decay, begins, grad_x, grad_decay, at, flag_at, h0_at,
            re, im, sum_re, sum_im, a_re, a_im, mask, N, C, STEP, VARYING, COMPLEX, AHEAD,
        )  # fmt: skip
        at += AHEAD * STEP * N * C
        flag_at += AHEAD * STEP * N
    for _ in range(whole, rows):
        re, im, sum_re, sum_im = backward_rows(
            backward_rows, grad_h, h, decay, begins, grad_x, grad_decay, at, flag_at, h0_at,
            re, im, sum_re, sum_im, a_re, a_im, mask, N, C, STEP, VARYING, COMPLEX, 1,
        )  # fmt: skip
        at += STEP * N * C
        flag_at += STEP * N
    if h0 is not None:
        if (chunk + 1) * L >= T:
            store(grad_h0, d, re, im, mask, COMPLEX)
            if grad_decay is not None:  # h[t-1] of the last row walked is h0, for which the walk took 0
                tl.debug_barrier()  # before grad_x is read back
                at, flag_at = at - STEP * N * C, flag_at - STEP * N
                g_re, g_im = load(grad_x, at, mask, DTYPE, COMPLEX)
                h_re, h_im = load(h0, d, mask, DTYPE, COMPLEX)
                da_re, da_im = times_unless(load_flag(begins, flag_at, mask), h_re, -h_im, g_re, g_im, COMPLEX)
                if VARYING:
                    store(grad_decay, at, da_re, da_im, mask, COMPLEX)
                sum_re, sum_im = sum_re + da_re, sum_im + da_im
    if grad_decay is not None and not VARYING:
        store(grad_decay, out, sum_re, sum_im, mask, COMPLEX)


# ----------------------------------------------------------------------------------------------------------------------
# Host side
def forward(decay, x, begins, h0, reverse):
    """h of the scan. x [T, N, C]; decay [N, C] or [T, N, C]; begins bool [T, N] or None; h0 [N, C] or None."""
    h = torch.empty_like(x)
    if h.numel() == 0:
        return h
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors are on; no-op for CPU
        carries, grid, options = reduce_chunks(decay, x, begins, h0, -1 if reverse else 1, adjoint=False)
        ahead = rows_ahead(x, decay) if decay.dim() == 3 else rows_ahead(x)
        apply_forward[grid](floats(x), floats(decay), floats(begins), floats(carries), floats(h), AHEAD=ahead, **options)
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad):
    """Gradients of decay (None unless needed), x, and h0 (None without one), from the h that `forward` returned."""
    varying = decay.dim() == 3
    grad_x = torch.empty_like(h)
    grad_h0 = None if h0 is None else torch.empty_like(h0)
    if h.numel() == 0:
        return torch.zeros_like(decay) if need_decay_grad else None, grad_x, grad_h0
    with torch.cuda.device_of(h):
        carries, grid, options = reduce_chunks(decay, grad_h, begins, None, 1 if reverse else -1, adjoint=True)
        chunks = -(-options["T"] // options["L"])
        grad_decay = None
        if need_decay_grad:
            grad_decay = torch.empty_like(decay) if varying else decay.new_empty((chunks, *decay.shape))
        ahead = rows_ahead(grad_h, h, decay) if varying else rows_ahead(grad_h, h)
        apply_backward[grid](
            floats(grad_h), floats(h), floats(h0), floats(decay), floats(begins), floats(carries), floats(grad_x),
            floats(grad_decay), floats(grad_h0), AHEAD=ahead, **options,
        )  # fmt: skip
        if need_decay_grad and not varying:
            grad_decay = grad_decay.sum(0) if chunks > 1 else grad_decay[0]
    return grad_decay, grad_x, grad_h0


def reduce_chunks(decay, x, begins, h0, step, adjoint):
    """Passes 1 and 2. Returns the carry into every chunk (h0 if there is but one), and pass 3's grid and options."""
    T, N, C = x.shape
    L = chunk_length(T)
    chunks, tiles = triton.cdiv(T, L), triton.cdiv(N * C, LANES)
    kinds = {"COMPLEX": x.is_complex(), "LANES": LANES, "num_warps": 1, "enable_fp_fusion": True}
    options = {"T": T, "L": L, "N": N, "C": C, "STEP": step, "VARYING": decay.dim() == 3, **kinds}
    carries = h0
    if chunks > 1:
        ahead = rows_ahead(x, decay) if options["VARYING"] else rows_ahead(x)
        carries = decay.new_empty((chunks, N, C))
        products = torch.empty_like(carries) if options["VARYING"] else None
        begun = None if begins is None else begins.new_empty((chunks, N, C))
        partly = floats(carries), floats(products), floats(begun)
        chunk_ends[((chunks - 1) * tiles,)](
            floats(x), floats(decay), floats(begins), *partly,
            ADJOINT=adjoint, AHEAD=min(ahead, L), **options,
        )  # fmt: skip
        chunk_carries[(tiles,)](
            *partly, floats(decay), floats(h0), chunks, L.bit_length() - 1, N * C, ADJOINT=adjoint, AHEAD=16, **kinds
        )
    return carries, (chunks * tiles,), options


def floats(tensor):
    """The memory of a tensor as kernels take it: complex as adjacent floats, bool as bytes; None stays None."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    tensor = tensor.resolve_conj().resolve_neg()  # a lazy conjugate has the unconjugated numbers in memory
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
