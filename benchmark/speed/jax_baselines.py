"""Scans in jitted JAX, to time this project's scans against. Needs `pip install "cleanrl-memoroid[bench]"`.

Every public function builds its inputs, compiles, runs once, and returns a callable without arguments. Calling it runs
the compiled function, waits for the device and returns the outputs, so a stopwatch around the call is the measurement.
The callable carries `inputs` (dict of numpy arrays, for running the same numbers elsewhere) and `compile_seconds`.

    call = paper_operator_scan(T=1024, channels=256, begins=begins, decay=decay, grad=True)
    h, grad_decay, grad_x = call()

Without `grad` a callable returns the scan's outputs; with it also the gradients of sum(Re(h * w)), where w = `inputs["w"]`
has h's shape: the forward and the backward pass, both with materialised results, as in torch's `h.backward(w.conj())`.
JAX's gradient of a complex array is the conjugate of torch's. All arrays are float32 or complex64; time comes first.

    python benchmark/speed/jax_baselines.py --T 1024      check every baseline against a float64 loop, then print times

XLA takes every core. For one core: `taskset -c 0`, with
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".
"""

import argparse
import time
from functools import partial

import numpy as np

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError('the JAX baselines need jax: pip install "cleanrl-memoroid[bench]"') from error


# ---- plumbing
def normal(rng, shape, dtype=np.float32):
    """Standard normal numbers of `shape`; a complex dtype has them in both parts."""
    out = rng.standard_normal(shape).astype(dtype)
    return out + 1j * rng.standard_normal(shape).astype(np.float32) if np.iscomplexobj(out) else out


def begin_flags(T, begins):
    """`begins` as a numpy bool array [T]; ValueError for any other shape."""
    begins = np.asarray(begins, dtype=bool)
    if begins.shape != (T,):
        raise ValueError(f"begins: expected shape ({T},), one flag per step, got {begins.shape}")
    return begins


def decay_rates(channels, decay):
    """`decay` as float32 or complex64 [channels], constant in time; ValueError for any other shape."""
    decay = np.asarray(decay)
    if decay.shape != (channels,):
        raise ValueError(f"decay: expected shape ({channels},), constant in time, got {decay.shape}")
    return decay.astype(np.complex64 if np.iscomplexobj(decay) else np.float32)


def compiled(forward, differentiable, inputs, grad):
    """Compile forward(**inputs) and return the callable described above.

    Args:
        forward: pure function of the arrays in `inputs`, apart from "w", to one array.
        differentiable: names of the inputs that get a gradient, in the order of the returned gradients.
        inputs: dict of numpy arrays; "w" is the cotangent of the output.
        grad: also run the backward pass.
    """
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    w = arrays.pop("w")

    def backward(arrays, w):
        def of_chosen(*chosen):
            return forward(**{**arrays, **dict(zip(differentiable, chosen, strict=True))})

        out, pullback = jax.vjp(of_chosen, *(arrays[name] for name in differentiable))
        return out, *pullback(w)

    function, arguments = (jax.jit(backward), (arrays, w)) if grad else (jax.jit(lambda a: forward(**a)), (arrays,))
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))

    def call():
        return jax.block_until_ready(function(*arguments))

    call.inputs, call.compile_seconds = inputs, time.perf_counter() - begin
    return call


# ---- linear recurrence: h[t] = x[t] + (0 if begins[t] else decay * h[t-1])
def recurrence_inputs(T, channels, begins, decay, seed):
    rng, decay = np.random.default_rng(seed), decay_rates(channels, decay)
    x, w = (normal(rng, (T, channels), decay.dtype) for _ in range(2))  # [T, D] each
    return {"decay": decay, "x": x, "begins": begin_flags(T, begins), "w": w}


def resettable_recurrence(left, right):
    """The linear recurrence's operator in resettable form (Morad et al. 2024, eq. 12), with flags as products."""
    (left_decay, left_x, left_begin), (decay, x, begin) = left, right
    keep = jnp.logical_not(begin)
    left_decay, left_x = keep * left_decay + begin * jnp.ones_like(left_decay), keep * left_x
    return decay * left_decay, decay * left_x + x, jnp.logical_or(left_begin, begin)


def paper_operator_scan(T, channels, begins, decay, grad=False, seed=0):
    """`jax.lax.associative_scan` as the LRU and S5 of Morad et al. (2024) use it: the decay repeated over T, a begin flag
    in each element, and the initial state (zero) as one element more in front.

    Args:
        T, channels: steps; independent recurrences D.
        begins: bool [T]; True resets the state before the step.
        decay: real or complex [D]; x takes its dtype.
        grad: also the gradients of decay and x.
    Returns: callable -> h [T, D], or with `grad` (h [T, D], grad decay [D], grad x [T, D]).
    """

    def forward(decay, x, begins):
        decays = jnp.concatenate([jnp.ones((1, channels), decay.dtype), jnp.repeat(decay[None], T, axis=0)])
        x = jnp.concatenate([jnp.zeros((1, channels), x.dtype), x])
        begins = jnp.concatenate([jnp.zeros((1, 1), bool), begins[:, None]])
        return jax.lax.associative_scan(resettable_recurrence, (decays, x, begins))[1][1:]

    return compiled(forward, ("decay", "x"), recurrence_inputs(T, channels, begins, decay, seed), grad)


def lax_scan(T, channels, begins, decay, grad=False, seed=0, unroll=1):
    """The same recurrence, step by step in `jax.lax.scan`: on a CPU the strong JAX baseline.

    Arguments and result as `paper_operator_scan`; `unroll` is lax.scan's (steps per loop turn).
    """

    def forward(decay, x, begins):
        def step(h, inputs):
            x, begin = inputs
            h = decay * jnp.where(begin, jnp.zeros_like(h), h) + x
            return h, h

        return jax.lax.scan(step, jnp.zeros_like(x[0]), (x, begins), unroll=unroll)[1]

    return compiled(forward, ("decay", "x"), recurrence_inputs(T, channels, begins, decay, seed), grad)


# ---- fast and forgetful memory
def ffm_operator_scan(T, traces, contexts, begins, grad=False, seed=0):
    """FFM's operator, (X exp(t' (-|alpha| + i omega)) + X', t + t'), in `jax.lax.associative_scan`: the exponential is
    taken inside the operator, at every combination. Initial state (zero) in front, as in `paper_operator_scan`.

    Args:
        T, traces, contexts: steps; decay rates M; oscillations C. alpha and omega are set to FFM's initial values.
        begins: bool [T].
        grad: also the gradients of alpha, omega and x, where x is the gated input before its repetition over C.
    Returns: callable -> X [T, M, C] complex64, or with `grad` (X, grad alpha [M], grad omega [C], grad x [T, M]).
    """
    rng = np.random.default_rng(seed)
    inputs = {
        "alpha": np.linspace(1e-6, 0.5, traces, dtype=np.float32),
        "omega": (2 * np.pi / np.linspace(1, 1000, contexts)).astype(np.float32),
        "x": normal(rng, (T, traces)),
        "begins": begin_flags(T, begins),
        "w": normal(rng, (T, traces, contexts), np.complex64),
    }

    def forward(alpha, omega, x, begins):
        def operator(left, right):
            (left_state, left_t, left_begin), (state, t, begin) = left, right
            rate = jax.lax.complex(*jnp.broadcast_arrays(-jnp.abs(alpha)[None, :, None], omega[None, None, :]))
            keep = jnp.logical_not(begin)
            t = keep * t  # as the released code does: the flag zeroes the right t, which a left begin makes irrelevant
            return (keep * left_state) * jnp.exp(rate * t) + state, left_t + t, jnp.logical_or(left_begin, begin)

        x = jnp.repeat(x[:, :, None], contexts, axis=2)
        x = jnp.concatenate([jnp.zeros((1, traces, contexts), jnp.complex64), x])  # [T+1, M, C], complex from here
        begins = jnp.concatenate([jnp.zeros((1, 1, 1), bool), begins[:, None, None]])
        return jax.lax.associative_scan(operator, (x, jnp.ones((T + 1, 1, 1), jnp.int32), begins))[0][1:]

    return compiled(forward, ("alpha", "omega", "x"), inputs, grad)


# ---- discounted return
def discounted_return(T, begins, gamma=0.99, sequential=False, seed=0):
    """Reward-to-go of every step of a tape: R[t] = r[t] + (0 if the episode ends at t else gamma * R[t+1]).

    Args:
        T: steps.
        begins: bool [T]; an episode ends where the next one begins, and at T-1.
        gamma: discount per step.
        sequential: `jax.lax.scan` instead of `jax.lax.associative_scan`.
    Returns: callable -> returns [T] float32.
    """
    rng, begins = np.random.default_rng(seed), begin_flags(T, begins)
    inputs = {"rewards": normal(rng, (T,)), "begins": begins, "w": normal(rng, (T,))}

    def forward(rewards, begins):
        ends = jnp.concatenate([begins[1:], jnp.ones(1, bool)])
        if not sequential:  # in reverse, the operator's left element is the later one in time
            elements = (jnp.full_like(rewards, gamma), rewards, ends)
            return jax.lax.associative_scan(resettable_recurrence, elements, reverse=True)[1]

        def step(later, inputs):
            reward, end = inputs
            total = reward + gamma * jnp.where(end, 0.0, later)
            return total, total

        return jax.lax.scan(step, jnp.zeros((), rewards.dtype), (rewards, ends), reverse=True)[1]

    return compiled(forward, ("rewards",), inputs, False)


# ---- linear transformer
def linear_transformer_scan(T, K, V, begins, grad=False, seed=0):
    """Linear attention with every state kept: S[t] = sum k v^T in [T, K, V] and z[t] = sum k in [T, 1, K], summed by
    `jax.lax.associative_scan` with resets, and the readout S^T q / (z . q).

    Deviates: the released code of Morad et al. (2024) divides by (sum z)(sum q), at the same cost.

    Args:
        T, K, V: steps; key and query size; value size. Keys and queries are positive, as 1 + elu leaves them.
        begins: bool [T].
        grad: also the gradients of keys, values and queries.
    Returns: callable -> out [T, V] float32, or with `grad` (out, grad keys [T, K], grad values [T, V], grad queries [T, K]).
    """
    rng = np.random.default_rng(seed)
    keys, queries = (np.asarray(1 + jax.nn.elu(normal(rng, (T, K)))) for _ in range(2))
    inputs = {
        "keys": keys,
        "values": normal(rng, (T, V)),
        "queries": queries,
        "begins": begin_flags(T, begins),
        "w": normal(rng, (T, V)),
    }

    def forward(keys, values, queries, begins):
        def operator(left, right):
            (left_s, left_z, left_begin), (s, z, begin) = left, right
            keep = jnp.logical_not(begin)
            return keep * left_s + s, keep * left_z + z, jnp.logical_or(left_begin, begin)

        s = jnp.concatenate([jnp.zeros((1, K, V), keys.dtype), jnp.einsum("tk,tv->tkv", keys, values)])
        z = jnp.concatenate([jnp.zeros((1, 1, K), keys.dtype), keys[:, None]])
        begins = jnp.concatenate([jnp.zeros((1, 1, 1), bool), begins[:, None, None]])
        s, z, _ = jax.lax.associative_scan(operator, (s, z, begins))
        return jnp.einsum("tkv,tk->tv", s[1:], queries) / jnp.einsum("tzk,tk->tz", z[1:], queries).clip(1e-6)

    return compiled(forward, ("keys", "values", "queries"), inputs, grad)


# ---- check against a loop, then time
def loop(decay, x, begins):
    """h[t] = x[t] + decay * h[t-1] with resets, one step at a time in numpy; decay [...], x [T, ...]."""
    out, h = np.empty_like(x), np.zeros_like(x[0])
    for t in range(len(x)):
        h = x[t] + decay * (np.zeros_like(h) if begins[t] else h)
        out[t] = h
    return out


def loop_gradients(decay, x, begins, w):
    """h and the gradients of sum(h * w) with respect to decay and x, not conjugated; a loop in numpy."""
    h, ends = loop(decay, x, begins), np.append(begins[1:], True)
    grad_x = loop(decay, w[::-1], ends[::-1])[::-1]
    grad_decay = (grad_x[1:] * h[:-1] * ~begins[1:].reshape(-1, *[1] * (x.ndim - 1))).sum(0)
    return h, grad_decay, grad_x


def check(name, outputs, expected):
    """Raise AssertionError where `outputs` is further than 1e-3 of the largest entry from `expected`; else its error."""
    errors = [float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in zip(outputs, expected, strict=True)]
    assert max(errors) < 1e-3, f"{name}: relative errors {errors}"
    return max(errors)


def check_all(T, channels=6):
    """Every baseline, values and gradients, against the loops above in float64. Prints the largest relative errors."""
    rng = np.random.default_rng(1)
    begins = rng.random(T) < 0.05
    for dtype in (np.float32, np.complex64):
        phase = rng.uniform(0, 6, channels)
        decay = rng.uniform(0.8, 0.999, channels) * (np.exp(1j * phase) if dtype == np.complex64 else 1)
        for function in (paper_operator_scan, lax_scan):
            call = function(T, channels, begins, decay, True)
            wide = {k: v if v.dtype == bool else v.astype(np.result_type(v, np.float64)) for k, v in call.inputs.items()}
            expected = loop_gradients(**wide)
            error = max(
                check(function.__name__, call(), expected),
                check(function.__name__, [function(T, channels, begins, decay)()], expected[:1]),
            )
            print(f"{function.__name__:24} {dtype.__name__:10} {error:.0e}")

    call = ffm_operator_scan(T, 4, 3, begins, True)
    alpha, omega, x, w = (call.inputs[k].astype(np.float64 if k != "w" else complex) for k in ("alpha", "omega", "x", "w"))
    decay = np.exp(-np.abs(alpha)[:, None] + 1j * omega)
    h, grad_decay, grad_x = loop_gradients(decay, np.repeat(x[:, :, None], 3, 2) + 0j, begins, w)
    slope = grad_decay * decay  # of sum(h * w) in the exponent
    expected = (h, -slope.real.sum(1), -slope.imag.sum(0), grad_x.real.sum(2))  # of its real part
    print(f"{'ffm_operator_scan':24} {'complex64':10} {check('ffm_operator_scan', call(), expected):.0e}")

    for sequential in (False, True):
        call, ends = discounted_return(T, begins, sequential=sequential), np.append(begins[1:], True)
        expected = loop(np.float64(0.99), call.inputs["rewards"][::-1].astype(np.float64), ends[::-1])[::-1]
        print(f"{'discounted_return':24} {'float32':10} {check('discounted_return', [call()], [expected]):.0e}")

    def attention(keys, values, queries):
        s, z = loop(1.0, keys[:, :, None] * values[:, None], begins), loop(1.0, keys, begins)
        return np.einsum("tkv,tk->tv", s, queries) / np.einsum("tk,tk->t", z, queries)[:, None]

    call = linear_transformer_scan(T, 4, 3, begins, True)
    arrays = [call.inputs[k].astype(np.float64) for k in ("keys", "values", "queries")]
    tangents = [rng.standard_normal(a.shape) for a in arrays]  # gradients: along one random direction each
    out, *gradients = call()
    for i, gradient in enumerate(gradients):
        shifted = [attention(*(a + sign * 1e-5 * tangents[j] * (i == j) for j, a in enumerate(arrays))) for sign in (1, -1)]
        slope = (((shifted[0] - shifted[1]) / 2e-5) * call.inputs["w"]).sum()
        check("linear_transformer_scan gradient", [(np.asarray(gradient) * tangents[i]).sum()], [slope])
    print(f"{'linear_transformer_scan':24} {'float32':10} {check('linear_transformer_scan', [out], [attention(*arrays)]):.0e}")


def median_ms(call, seconds=1.0):
    """Median time of a call over about `seconds`, at least 3 calls, in milliseconds."""
    times = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check the JAX baselines against numpy loops, then time them.")
    parser.add_argument("--T", type=int, nargs="*", default=[1024], help="tape lengths to time, in steps")
    args = parser.parse_args()
    check_all(257)
    rng = np.random.default_rng(0)
    decay = rng.uniform(0.9, 0.9999, 256) * np.exp(1j * rng.uniform(0, 6.28, 256))
    print(f"\n{'median ms, 256 complex channels':32} {'T':>7} {'forward':>10} {'fwd+bwd':>10} {'compile s':>10}")
    for T in args.T:
        begins = rng.random(T) < 1 / 200
        baselines = {
            "paper_operator_scan": partial(paper_operator_scan, T, 256, begins, decay),
            "lax_scan": partial(lax_scan, T, 256, begins, decay),
            "ffm_operator_scan 64x4": partial(ffm_operator_scan, T, 64, 4, begins),
            "linear_transformer_scan 16x16": partial(linear_transformer_scan, T, 16, 16, begins),
            "discounted_return": partial(discounted_return, T, begins),
            "discounted_return sequential": partial(discounted_return, T, begins, sequential=True),
        }
        for name, build in baselines.items():
            calls = [build()] if name.startswith("discounted") else [build(), build(grad=True)]
            columns = [f"{median_ms(call):10.3f}" for call in calls] + [" " * 10] * (2 - len(calls))
            print(f"{name:32} {T:7} {' '.join(columns)} {sum(c.compile_seconds for c in calls):10.1f}", flush=True)
