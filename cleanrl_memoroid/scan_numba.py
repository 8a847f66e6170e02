"""The scan on a CPU: one pass over memory in Numba, with the state carried in double precision.

Why sequential in time: a core advances a row of channels in about the time that the row takes to arrive from memory, so the
pass runs at the speed of a copy (benchmark/scan.py), and a tree over time could only add traffic. The parallelism is across
channels, in vector registers.

Why double: a decay rounded to single precision is wrong by 6e-8 per step, and a long tape multiplies it with itself a hundred
thousand times. Carried in double, the result is right to the last bits of single precision, and long tapes take no longer.

What the speed hangs on:
  - The three loops over a row's channels are written in vectors. LLVM left to itself takes complex numbers apart and puts
    them together again, which costs more than the arithmetic, and some releases leave loops that descend as they are.
  - A row is a bare pointer: Numba counts references to a slice, in atomic operations half as long as the arithmetic.
  - A pass that walks back in time walks its channels backwards too, so that memory is touched in one descending stream,
    which the processor prefetches; without that, a long tape's backward pass takes more than twice as long.
  - A long tape is written past the cache, row by row: a plain store first fetches the line that it is about to overwrite.
"""

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

SHARES_X = True  # x [T, 1, C] may stand for all N groups, see `scan.py`
_FUSED = ("contract",)  # permits fused multiply-add and nothing else: nan and inf keep their meaning
_jit = numba.njit(cache=True, nogil=True, fastmath=set(_FUSED))
_LINE = 64  # bytes of a cache line
_PAST_CACHE = 24 << 20  # bytes: an output larger than this is written past the cache, which could not hold it anyway
_NO_FLAGS = np.zeros((0, 1), np.bool_)
_DOUBLE = {np.dtype(kind): np.dtype(double) for kind, double in zip("fdFD", "ddDD")}
_FLUSH = 64  # rows whose contributions to the gradient of a constant decay are added up in x's precision, then moved to double


# Vectors: 8 numbers, so 4 complex or 8 real channels (16 numbers in `_decay_back`, whose numbers may be half as long).
# LLVM cuts them into the registers that the processor has.


@intrinsic
def _row(typing, array, t, start, stop):
    """array[t, start:stop] of a contiguous array, without counting references: valid as long as the array is."""
    view = numba.types.Array(array.dtype, 1, "C")

    def build(context, builder, signature, args):
        whole, (_, t, start, stop) = context.make_array(array)(context, builder, args[0]), args
        begin = builder.add(builder.mul(t, builder.extract_value(whole.shape, 1)), start)
        row, shape = context.make_array(view)(context, builder), [builder.sub(stop, start)]
        populate_array(row, builder.gep(whole.data, [begin]), shape, [whole.itemsize], whole.itemsize, None)
        return row._getvalue()

    return view(array, numba.intp, numba.intp, numba.intp), build


def _vectors(context, builder, signature, args, numbers):
    """Pointers to `numbers` numbers of each row from channel c, the last argument, on: parts of complex numbers alternate."""
    for row, value in zip(signature.args[:-1], args):
        data = builder.gep(context.make_array(row)(context, builder, value).data, [args[-1]])
        number = context.get_value_type(getattr(row.dtype, "underlying_float", row.dtype))
        yield builder.bitcast(data, ir.VectorType(number, numbers).as_pointer())


def _load(builder, pointer, kind=None):
    return _cast(builder, builder.load(pointer, align=_align(pointer)), kind or pointer.type.pointee)


def _store(builder, vector, pointer):
    builder.store(_cast(builder, vector, pointer.type.pointee), pointer, align=_align(pointer))


def _align(pointer):
    return 8 if pointer.type.pointee.element == ir.DoubleType() else 4  # bytes; of a number, since rows start anywhere


def _cast(builder, vector, kind):
    if vector.type == kind:
        return vector
    return (builder.fpext if kind.element == ir.DoubleType() else builder.fptrunc)(vector, kind)


def _multiply(builder, row, a, b, plus=None, conjugate=False):
    """a b + plus, or conj(a) b + plus; as complex numbers if those of the type `row` are.

    A complex product takes no more than one swap of neighbours, one change of sign and two copies within pairs:

        a    p  q  ..      a b  =  p p .. * b  +  q q .. * i b
        b    x  y  ..      i b  =  -y x ..          (for conj(a): -i b = y -x ..)
    """

    def shuffle(v, w, index):
        return builder.shuffle_vector(v, w, ir.Constant(ir.VectorType(ir.IntType(32), len(index)), index))

    if isinstance(row.dtype, numba.types.Complex):
        pairs = range(a.type.count)
        a, imaginary = (shuffle(a, a, [i // 2 * 2 + part for i in pairs]) for part in (0, 1))
        turned = shuffle(b, builder.fneg(b), [(i ^ 1) + len(pairs) * (i % 2 == conjugate) for i in pairs])
        second = builder.fmul(imaginary, turned, flags=_FUSED)
        plus = second if plus is None else builder.fadd(second, plus, flags=_FUSED)
    first = builder.fmul(a, b, flags=_FUSED)
    return first if plus is None else builder.fadd(first, plus, flags=_FUSED)


@intrinsic
def _step_vector(typing, a, x, state, h, c):
    def build(context, builder, signature, args):
        a, x, state, h = _vectors(context, builder, signature, args, 8)
        a, x, double = _load(builder, a, state.type.pointee), _load(builder, x, state.type.pointee), _load(builder, state)
        new = _multiply(builder, signature.args[0], a, double, x)
        _store(builder, new, state)
        _store(builder, new, h)
        return context.get_dummy_value()

    return numba.void(a, x, state, h, c), build


@intrinsic
def _step_back_vector(typing, a, grad, carry, grad_x, c):
    def build(context, builder, signature, args):
        a, grad, carry, grad_x = _vectors(context, builder, signature, args, 8)
        g = builder.fadd(_load(builder, grad, carry.type.pointee), _load(builder, carry))
        _store(builder, _multiply(builder, signature.args[0], _load(builder, a, g.type), g, conjugate=True), carry)
        _store(builder, g, grad_x)
        return context.get_dummy_value()

    return numba.void(a, grad, carry, grad_x, c), build


@intrinsic
def _decay_back_vector(typing, previous, grad_x, partial, c):
    def build(context, builder, signature, args):
        pointers = list(_vectors(context, builder, signature, args, 16))
        vectors = (_load(builder, pointer) for pointer in pointers)
        _store(builder, _multiply(builder, signature.args[0], *vectors, conjugate=True), pointers[-1])
        return context.get_dummy_value()

    return numba.void(previous, grad_x, partial, c), build


@intrinsic
def _past_cache_vector(typing, row, out, c):
    def build(context, builder, signature, args):
        row, out = _vectors(context, builder, signature, args, 16)
        store = builder.store(builder.load(row, align=_align(row)), out, align=_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return numba.void(row, out, c), build


# Rows: `descending` walks the channels backwards, vector by vector; the channels that fill no vector come last.


@_jit
def _step(a, x, state, h, descending):
    channels = 4 if np.iscomplexobj(x) else 8
    whole = x.shape[0] // channels * channels
    for i in range(0, whole, channels):
        _step_vector(a, x, state, h, whole - channels - i if descending else i)
    for c in range(whole, x.shape[0]):
        state[c] = a[c] * state[c] + x[c]
        h[c] = state[c]


@_jit
def _past_cache(row, out, descending):
    """Copies a row to memory without fetching what was there: a third less traffic, where nobody reads it soon."""
    channels = 8 if np.iscomplexobj(row) else 16
    for i in range(0, row.shape[0], channels):
        _past_cache_vector(row, out, row.shape[0] - channels - i if descending else i)


@_jit
def _begin(x, state, h):
    for c in range(x.shape[0]):
        state[c] = x[c]
        h[c] = x[c]


@_jit
def _forward(decay, x, begins, state, h, scratch, reverse):
    """h [T, D]; decay [1, D] or [T, D]; begins [T, N] or [0, N] for N groups of D / N channels; state [1, D] in double.

    x [T, D], or [T, D / N] for N groups that share it, while begins has one for all.
    """
    steps, groups = h.shape[0], max(begins.shape[1], h.shape[1] // x.shape[1])
    width, constant, apart = h.shape[1] // groups, decay.shape[0] == 1, int(x.shape[1] == h.shape[1])
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        for n in range(groups):
            start, stop = n * width, (n + 1) * width
            x_row, state_row = _row(x, t, apart * start, apart * start + width), _row(state, 0, start, stop)
            h_row = _row(scratch, 0, start, stop) if scratch.shape[0] > 0 else _row(h, t, start, stop)
            if begins.shape[0] > 0 and begins[t, apart * n]:
                _begin(x_row, state_row, h_row)
            else:
                _step(_row(decay, 0 if constant else t, start, stop), x_row, state_row, h_row, reverse)
        if scratch.shape[0] > 0:
            _past_cache(_row(scratch, 0, 0, h.shape[1]), _row(h, t, 0, h.shape[1]), reverse)


@_jit
def _step_back(a, grad, carry, grad_x, descending):
    """carry comes as conj(decay[t+1]) g[t+1] and leaves as conj(decay[t]) g[t], where g is the row of grad_x."""
    channels = 4 if np.iscomplexobj(grad) else 8
    whole = grad.shape[0] // channels * channels
    for i in range(0, whole, channels):
        _step_back_vector(a, grad, carry, grad_x, whole - channels - i if descending else i)
    for c in range(whole, grad.shape[0]):
        g = grad[c] + carry[c]
        grad_x[c] = g
        carry[c] = np.conj(a[c]) * g


@_jit
def _decay_back(previous, grad_x, partial, descending):
    """A loop of its own, in longer vectors: within `_step_back` it takes a quarter more time."""
    channels = 8 if np.iscomplexobj(grad_x) else 16
    whole = grad_x.shape[0] // channels * channels
    for i in range(0, whole, channels):
        _decay_back_vector(previous, grad_x, partial, whole - channels - i if descending else i)
    for c in range(whole, grad_x.shape[0]):
        partial[c] += np.conj(previous[c]) * grad_x[c]


@_jit
def _begin_back(grad, carry, grad_x):
    for c in range(grad.shape[0]):
        grad_x[c] = grad[c] + carry[c]
        carry[c] = 0


@_jit
def _add(row, out):
    """Short enough for LLVM to write in vectors, which it does not where `row` is indexed from a variable start."""
    for c in range(out.shape[0]):
        out[c] += row[c]


@_jit
def _flush(partial, grad_decay):
    for c in range(partial.shape[0]):
        grad_decay[c] += partial[c]
        partial[c] = 0


@_jit
def _backward(decay, h, begins, first, grad_h, carry, partial, grad_decay, grad_x, scratch, need_decay_grad, reverse):
    """Walks against the scan; `first` [1, D] stands for the row before the first; grad_decay is double, [1, D] or [T, D].

    grad_x [T, D], or less where groups of channels share a row; their gradients are then computed in `scratch` [1, D].
    """
    steps, groups, width = h.shape[0], begins.shape[1], h.shape[1] // begins.shape[1]
    constant, shared = decay.shape[0] == 1, grad_x.shape[1]
    for i in range(steps):
        t = i if reverse else steps - 1 - i
        for n in range(groups):
            start, stop = n * width, (n + 1) * width
            carry_row = _row(carry, 0, start, stop)
            grad_row = _row(grad_h, t, start, stop)
            x_row = _row(scratch, 0, start, stop) if scratch.shape[0] > 0 else _row(grad_x, t, start, stop)
            if begins.shape[0] > 0 and begins[t, n]:
                _begin_back(grad_row, carry_row, x_row)
                continue
            _step_back(_row(decay, 0 if constant else t, start, stop), grad_row, carry_row, x_row, not reverse)
            if need_decay_grad:
                previous = _row(first, 0, start, stop) if i == steps - 1 else _row(h, t + 1 if reverse else t - 1, start, stop)
                _decay_back(previous, x_row, _row(partial, 0, start, stop), not reverse)
        if shared < h.shape[1]:
            out = _row(grad_x, t, 0, shared)
            out[:] = 0
            for start in range(0, h.shape[1], shared):
                _add(_row(scratch, 0, start, start + shared), out)
        elif scratch.shape[0] > 0:
            _past_cache(_row(scratch, 0, 0, h.shape[1]), _row(grad_x, t, 0, h.shape[1]), not reverse)
        if need_decay_grad and (not constant or i % _FLUSH == _FLUSH - 1 or i == steps - 1):
            _flush(_row(partial, 0, 0, h.shape[1]), _row(grad_decay, 0 if constant else t, 0, h.shape[1]))


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
    rows, h = _rows(x), torch.empty_like(x) if decay.dim() == x.dim() else x.new_empty((len(x), *decay.shape))
    state = np.zeros((1, h.numel() // len(h)), _DOUBLE[rows.dtype])
    if h0 is not None:
        state[0] = h0.numpy().reshape(-1)
    arrays = _decay_rows(decay, x, state.dtype), rows, _flags(begins), state, _rows(h)
    if state.shape[1] == 1:
        _forward_one(*(array.reshape(-1) for array in arrays), reverse)
    else:
        _forward(*arrays, _scratch(arrays[-1]), reverse)
    return h


def backward(decay, h, begins, h0, grad_h, reverse, need_decay_grad, shared=False):
    """See `scan.py`."""
    grad_x, rows = torch.empty_like(h[:, :1] if shared else h), _rows(h)
    row, double = (1, rows.shape[1]), _DOUBLE[rows.dtype]
    first = np.zeros(row, rows.dtype) if h0 is None else h0.numpy().reshape(row)
    carry, partial, decay_rows = np.zeros(row, double), np.zeros(row, rows.dtype), _decay_rows(decay, h, double)
    grad_decay = np.zeros(decay_rows.shape if need_decay_grad else (1, 1), double)
    grads = _rows(grad_h), carry, partial, grad_decay, _rows(grad_x)
    scratch = np.empty(row, rows.dtype) if shared else _scratch(grads[-1])
    _backward(decay_rows, rows, _flags(begins), first, *grads, scratch, need_decay_grad, reverse)
    grad_decay = torch.from_numpy(grad_decay).view(decay.shape).to(decay.dtype) if need_decay_grad else None
    return grad_decay, grad_x, None if h0 is None else torch.from_numpy(carry).view(h0.shape).to(h0.dtype)


def _rows(x):
    """[T, *S] -> [T, D]"""
    rows = x.numpy()
    return rows if rows.ndim == 2 else rows.reshape(len(rows), -1)


def _scratch(out):
    """A row to compute in before it goes past the cache [1, D], or none [0, D]: a short output is better left in the cache."""
    past_cache = (
        out.nbytes > _PAST_CACHE
        and out.ctypes.data % _LINE == 0  # whole lines; asked last, as it takes longer than a short scan
        and out.shape[1] * out.itemsize % (2 * _LINE) == 0  # whole vectors
    )
    return np.empty((int(past_cache), out.shape[1]), out.dtype)


def _decay_rows(decay, x, double):
    """*S -> [1, D] in double; [T, *S] -> [T, D] as it is, too large to copy."""
    if decay.dim() == x.dim():
        return _rows(decay)
    rows = decay.numpy()
    return (rows if rows.dtype == double else rows.astype(double)).reshape(1, -1)


def _flags(begins):
    """[T] or [T, N] -> [T, N]; None -> [0, 1]"""
    if begins is None:
        return _NO_FLAGS
    flags = begins.numpy()
    return flags if flags.ndim == 2 else flags[:, None]
