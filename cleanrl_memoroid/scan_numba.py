"""The scan on a CPU: one pass over memory in Numba, with the state carried in double precision.

Why sequential in time: a core advances a row of channels in about the time that the row takes to arrive from memory, so the
pass runs at about the speed of a copy (benchmark/speed/scan.py), and a tree over time could only add traffic. The parallelism
is across channels, in vector registers.

Why double: a decay rounded to single precision is wrong by 6e-8 per step, and a long tape multiplies it with itself a hundred
thousand times. Carried in double, the result is right to the last bits of single precision, and long tapes take no longer.

What the speed hangs on:
  - The loop over a row's channels is written in vectors. Plain loops over complex numbers take twice as long forward and two
    to three times as long backward; over real and imaginary parts apart 1.1 and 1.5 times at T = 544, 256 channels (AVX2).
  - All rows are offsets into flat arrays: Numba counts references to a slice, which takes half as long as the arithmetic.
  - A pass that walks back in time walks its channels backwards too, so that memory is touched in one descending stream,
    which the processor prefetches; without that, a long tape's backward pass takes more than twice as long.
"""

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

SHARES_X = True  # x [T, 1, C] may stand for all N groups, see `scan.py`
_FUSED = ("contract",)  # permits fused multiply-add and nothing else: nan and inf keep their meaning
_jit = numba.njit(cache=True, nogil=True, fastmath=set(_FUSED))
_NUMBERS = 8  # in a vector: 4 complex or 8 real channels; LLVM cuts it into the registers that the processor has
_DOUBLE = {np.dtype(kind): np.dtype(double) for kind, double in zip("fdFD", "ddDD")}


def _vector_product(conjugate):
    """A function (a, i, b, j, plus, k, out, m, copy, n) of flat arrays and offsets, for one vector, in the precision of `out`.

    out[m:] = copy[n:] = a[i:] b[j:] + plus[k:], or with conj(a). A complex product takes one swap of neighbours, one change of
    sign and two copies within pairs:

        a    p  q  ..      a b  =  p p .. * b  +  q q .. * i b
        b    x  y  ..      i b  =  -y x ..          (for conj(a): -i b = y -x ..)
    """

    def shuffle(builder, v, w, index):
        return builder.shuffle_vector(v, w, ir.Constant(ir.VectorType(ir.IntType(32), _NUMBERS), index))

    @intrinsic
    def product(typing, a, i, b, j, plus, k, out, m, copy, n):
        def build(context, builder, signature, args):
            pointers = []
            for kind, array, offset in zip(signature.args[::2], args[::2], args[1::2]):
                number = context.get_value_type(getattr(kind.dtype, "underlying_float", kind.dtype))
                first = builder.gep(context.make_array(kind)(context, builder, array).data, [offset])
                pointers.append(builder.bitcast(first, ir.VectorType(number, _NUMBERS).as_pointer()))
            exact = pointers[3].type.pointee

            def cast(v, kind):
                convert = builder.fpext if kind.element == ir.DoubleType() else builder.fptrunc
                return v if v.type == kind else convert(v, kind)

            x, y, z = (cast(builder.load(pointer, align=4), exact) for pointer in pointers[:3])
            if isinstance(a.dtype, numba.types.Complex):
                x, imaginary = (shuffle(builder, x, x, [e // 2 * 2 + part for e in range(_NUMBERS)]) for part in (0, 1))
                swap = [(e ^ 1) + _NUMBERS * (e % 2 == conjugate) for e in range(_NUMBERS)]
                turned = shuffle(builder, y, builder.fneg(y), swap)
                z = builder.fadd(builder.fmul(imaginary, turned, flags=_FUSED), z, flags=_FUSED)
            z = builder.fadd(builder.fmul(x, y, flags=_FUSED), z, flags=_FUSED)
            for pointer in pointers[3:]:
                builder.store(cast(z, pointer.type.pointee), pointer, align=4)  # bytes, since rows start anywhere
            return context.get_dummy_value()

        offset = numba.intp
        return numba.void(a, offset, b, offset, plus, offset, out, offset, copy, offset), build

    return product


_vector, _conjugate_vector = _vector_product(False), _vector_product(True)


# Rows of `width` channels, as offsets into flat arrays


@_jit
def _row_product(a, i, b, j, plus, k, out, m, copy, n, width, descending, conjugate):
    """out = copy = a b + plus, or with conj(a). `descending` walks the vectors backwards; what fills none comes last."""
    channels = _NUMBERS // 2 if np.iscomplexobj(a) else _NUMBERS
    whole = width // channels * channels
    for v in range(0, whole, channels):
        c = whole - channels - v if descending else v
        if conjugate:
            _conjugate_vector(a, i + c, b, j + c, plus, k + c, out, m + c, copy, n + c)
        else:
            _vector(a, i + c, b, j + c, plus, k + c, out, m + c, copy, n + c)
    for c in range(whole, width):
        out[m + c] = (np.conj(a[i + c]) if conjugate else a[i + c]) * b[j + c] + plus[k + c]
        copy[n + c] = out[m + c]


@_jit
def _begin(state, s, x, j, h, k, width):
    for c in range(width):
        state[s + c] = x[j + c]
        h[k + c] = x[j + c]


@_jit
def _add(g, i, total, k, width):
    """total += g. LLVM leaves such a loop as it is if its index is signed, since that might count from the end."""
    for c in range(width):
        total[np.uint64(k + c)] += g[np.uint64(i + c)]


@_jit
def _forward(decay, x, begins, state, h, reverse):
    """h [T, N, C]; x [T, N, C] or [T, 1, C]; decay [1, N, C] or [T, N, C]; begins [T, N or 1] or [0, 1]; state in double."""
    steps, groups, width = h.shape
    constant, own = len(decay) == 1, x.shape[1]
    a, rows, s, out = decay.ravel(), x.ravel(), state.ravel(), h.ravel()
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        for n in range(groups):
            at, row, x_row = n * width, (t * groups + n) * width, (t * own + min(n, own - 1)) * width
            if len(begins) > 0 and begins[t, min(n, begins.shape[1] - 1)]:
                _begin(s, at, rows, x_row, out, row, width)
            else:
                _row_product(a, at if constant else row, s, at, rows, x_row, s, at, out, row, width, reverse, False)


@_jit
def _backward(decay, h, begins, first, grad_h, state, grad_decay, g, grad_x, need_decay_grad, reverse):
    """The same scan the other way, of grad_h with the conjugate decay; a row takes decay and begin of the row walked before.

    `state` ends as g of the last row; `first` stands for the row before the first. Where groups share x, their gradients g are
    one row only, to be summed in grad_x [T, 1, C]; else g is grad_x.
    """
    steps, groups, size = len(h), begins.shape[1], h.shape[1] * h.shape[2]
    constant, width, shared = len(decay) == 1, size // groups, grad_x.shape[2] if grad_x.shape[1] < h.shape[1] else 0
    a, rows, s, grads = decay.ravel(), h.ravel(), state.ravel(), grad_h.ravel()
    total, out, x_rows, before = grad_decay.ravel(), g.ravel(), grad_x.ravel(), first.ravel()
    for i in range(steps):
        t, step = (i, 1) if reverse else (steps - 1 - i, -1)
        for m in range(groups):
            n = m if reverse else groups - 1 - m
            at, row = n * width, t * size + n * width
            g_row, k = at if shared > 0 else row, at if constant else row
            if i == 0 or len(begins) > 0 and begins[t - step, n]:
                _begin(s, at, grads, row, out, g_row, width)
            else:
                j = at if constant else row - step * size
                _row_product(a, j, s, at, grads, row, s, at, out, g_row, width, not reverse, False)
            if need_decay_grad and not (len(begins) > 0 and begins[t, n]):
                previous, j = (rows, row + step * size) if i < steps - 1 else (before, at)
                _row_product(previous, j, out, g_row, total, k, total, k, total, k, width, not reverse, True)
        if shared > 0:
            for at in range(0, size, shared):
                _add(out, at, x_rows, t * shared, shared)


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
    h = x.new_empty((len(x), *decay.shape[-2:]))
    state = np.zeros(h.shape[1:], _DOUBLE[x.numpy().dtype])
    if h0 is not None:
        state[:] = h0.numpy()
    arrays = _decay_rows(decay, state.dtype), x.numpy(), _flags(begins), state, h.numpy()
    if state.size == 1:
        _forward_one(*(array.reshape(-1) for array in arrays), reverse)
    else:
        _forward(*arrays, reverse)
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad, shared=False):
    """See `scan.py`."""
    grad_x, edge = torch.zeros_like(h[:, :1]) if shared else torch.empty_like(h), -1 if reverse else 0
    rows, double = h.numpy(), _DOUBLE[h.numpy().dtype]
    a, state = np.conj(_decay_rows(decay, double)), np.zeros(rows.shape[1:], double)
    first = np.zeros(state.shape, rows.dtype) if h0 is None else h0.numpy()
    grad_decay = np.zeros(a.shape if need_decay_grad else (1, 1, 1), a.dtype)  # in double, if it sums over the rows
    g = np.empty((1, *state.shape), rows.dtype) if shared else grad_x.numpy()
    grads = grad_h.numpy(), state, grad_decay, g, grad_x.numpy()
    _backward(a, rows, _flags(begins), first, *grads, need_decay_grad, reverse)
    grad_h0 = None
    if h0 is not None:
        grad_h0 = (torch.from_numpy(a[edge if len(a) > 1 else 0]) * torch.from_numpy(state)).to(h0.dtype)
        grad_h0 = grad_h0 if begins is None else torch.where(begins[edge, :, None], 0, grad_h0)
    grad_decay = torch.from_numpy(grad_decay).view(decay.shape).to(decay.dtype) if need_decay_grad else None
    return grad_decay, grad_x, grad_h0


def _decay_rows(decay, double):
    """[N, C] -> [1, N, C] in double; [T, N, C] as it is, too large to copy."""
    rows = decay.numpy()
    return rows if rows.ndim == 3 else rows[None].astype(double, copy=False)


def _flags(begins):
    return np.zeros((0, 1), np.bool_) if begins is None else begins.numpy()
