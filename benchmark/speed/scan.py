"""Times and checks the scans, h[t] = x[t] + decay * (0 if begins[t] else h[t-1]), over T rows of 256 complex channels.

    python benchmark/speed/scan.py                              # one core; writes scan.csv
    python benchmark/speed/scan.py --lengths 1024 16384         # fewer tape lengths
    python benchmark/speed/scan.py --device cuda                # writes scan_cuda.csv

Three parts, each with bars that are printed at the end:
1. Speed, one decay per channel, an episode begins every 200 rows on average; "a decay per row" has one for each row, too, as
   the gated memories do. "copy" moves the same bytes between arrays of the same kind in the same run: for the forward pass x
   is read and h written, for forward and backward there are five passes (read x, write h, read the gradient of h, read h,
   write the gradient of x). Column "copies" is the time in copies.
   "jax paper" is the paper's resettable operator in jax.lax.associative_scan (Morad et al. 2024), "jax lax.scan" the
   sequential loop, both jitted and compiled beforehand: jax_baselines.py.
2. Accuracy at T = 262144 without resets: the largest error relative to the largest |h|, against a loop in complex128, for
   decays given in complex128.
3. Discounted returns of a million rewards, a scan in reverse, against the same operator in jax.
"""

import importlib.util
from functools import partial

import numpy as np
from timing import WITHOUT_JAX, OwnProcess, interleave, parser, print_bars, print_table, ratio, set_up, write_csv

CHANNELS, EPISODE, GAMMA, PER_ROW = 256, 200, 0.99, "a decay per row"
ACCURACY_ROWS, RETURN_ROWS = 262_144, 1_000_000


def parse_args():
    out = parser(__doc__.split("\n")[0])
    out.add_argument("--lengths", type=int, nargs="*", default=[256, 1024, 4096, 16384, 65536], help="tape lengths T (rows)")
    out.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the scans run")
    out.add_argument("--all", action="store_true", help="time jax beyond T = 16384 too: seconds per call")
    out.add_argument("--skip", nargs="*", default=[], choices=("accuracy", "returns", "jax"), help="parts to leave out")
    return out.parse_args()


def decay_rates(rng):
    """Complex128 [256], as an LRU or an FFM has them: |a| between 0.9 and 0.9999, any phase."""
    return rng.uniform(0.9, 0.9999, CHANNELS) * np.exp(2j * np.pi * rng.uniform(size=CHANNELS))


def normal(rng, shape):
    return rng.standard_normal((*shape, 2), dtype=np.float32).view(np.complex64)[..., 0]


def backends(device):
    """The backends that are installed, the fastest first."""
    return [name for name in ("triton" if device == "cuda" else "numba", "torch") if importlib.util.find_spec(name)]


def torch_associative_scan():
    """(decay [T, C], x) -> h by PyTorch's own associative_scan, or None where it is missing: it is a prototype and may move.

    Not compiled: its compiler makes no code for complex numbers (PyTorch 2.13), takes half a minute, and gains nothing.
    """
    try:
        from torch._higher_order_ops.associative_scan import associative_scan
    except ImportError:
        return None

    def operator(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lambda decay, x: associative_scan(operator, (decay, x), 0, combine_mode="generic")[1]


def finisher(device):
    """What a stopwatch has to wait for."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def contenders(steps, args, jax):
    """{what: {backend: call}} for one tape length."""
    rng = np.random.default_rng(steps)
    rates, flags = decay_rates(rng), rng.random(steps) < 1 / EPISODE
    x, w = (torch.from_numpy(normal(rng, (steps, CHANNELS))).to(args.device) for _ in range(2))
    decay, begins = torch.from_numpy(rates).to(args.device).requires_grad_(), torch.from_numpy(flags).to(args.device)
    h, grad_x, half, finish = torch.empty_like(x), torch.empty_like(x), steps // 2, finisher(args.device)

    def copy():
        h.copy_(x)
        finish()

    def copies():
        h.copy_(x)
        grad_x.copy_(w)
        grad_x[:half].copy_(h[:half])  # a pass that only reads has no copy; half of one moves as many bytes
        finish()

    forward, both, leaf = {"copy": copy}, {"copy": copies}, x.clone().requires_grad_()

    def add(name, scan, w, *leaves):
        def run():
            with torch.no_grad():
                scan(*leaves)
            finish()

        def run_both():
            torch.autograd.grad(scan(*leaves), leaves, w)
            finish()

        forward[name], both[name] = run, run_both

    for backend in backends(args.device):
        add(backend, lambda decay, x, backend=backend: linear_scan(decay, x, begins, backend=backend), w, decay, leaf)
    rows = decay.detach().to(x.dtype).repeat(steps, 1).requires_grad_()
    add(PER_ROW, lambda rows, x: linear_scan(rows, x, begins), w, rows, leaf)
    # in the layouts of others, with resets as decays of zero: repeated over time outside the stopwatch
    gates = torch.where(begins[:, None], 0, decay.detach().to(x.dtype))
    if (torchs := torch_associative_scan()) and (steps <= 16384 or args.all):
        ours, theirs = linear_scan(decay.detach(), x, begins), torchs(gates, x)
        assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max(), f"torch's and linear_scan disagree at T = {steps}"
        add("torch associative_scan", torchs, w, gates.clone().requires_grad_(), leaf)
    if args.device == "cuda" and importlib.util.find_spec("accelerated_scan"):
        from accelerated_scan.complex import scan

        rows = [tensor.T[None].contiguous() for tensor in (w, gates, x)]  # [1, D, T]
        add("accelerated_scan", scan, rows[0], *(tensor.requires_grad_() for tensor in rows[1:]))
    if jax and (steps <= 16384 or args.all):
        for name, baseline in (("jax paper", "paper_operator_scan"), ("jax lax.scan", "lax_scan")):
            forward[name] = OwnProcess("jax_baselines", baseline, steps, CHANNELS, flags, rates)
            both[name] = OwnProcess("jax_baselines", baseline, steps, CHANNELS, flags, rates, grad=True)
            theirs = torch.from_numpy(forward[name].inputs["x"]).to(args.device)
            ours, theirs = linear_scan(decay.detach(), theirs, begins).cpu(), torch.from_numpy(np.array(forward[name]()))
            assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max(), f"{name} and linear_scan disagree at T = {steps}"
    return {"forward": forward, "fwd+bwd": both}


def speed(args, jax):
    """Rows of the table, and {(T, what): times}."""
    rows, all_times = [], {}
    for steps in args.lengths:
        for what, calls in contenders(steps, args, jax).items():
            times = all_times[steps, what] = interleave(calls, args)
            rows += time_rows(steps, what, times)
            print_table(rows[-len(calls) :])
            for call in calls.values():
                if isinstance(call, OwnProcess):
                    call.close()
    return rows, all_times


def time_rows(steps, what, times):
    """Each ratio by medians, then by minima: the time in copies, and how many times faster than jax."""
    rows = []
    for name, values in times.items():
        row = {"T": steps, "what": what, "backend": name, "median_ms": float(np.median(values)), "min_ms": float(values.min())}
        row["copies"], row["copies_min"] = ratio(times, name, "copy")
        for column, other in (("vs_paper", "jax paper"), ("vs_lax_scan", "jax lax.scan")):
            if other in times:
                row[column], row[f"{column}_min"] = ratio(times, other, name)
        rows.append(row)
    return rows


def accuracy(device):
    """Rows of the table: errors against a loop in complex128, made and compared in pieces that fit the cache."""
    rng = np.random.default_rng(0)
    phase = np.exp(2j * np.pi * rng.uniform(size=CHANNELS))
    ffm = np.exp(-np.linspace(1e-6, 0.5, 64)[:, None] + 2j * np.pi / np.linspace(1, 1000, 4))
    cases = {
        "|a| in [0.9, 0.9999]": decay_rates(rng),
        "|a| = 0.999999": 0.999999 * phase,
        "|a| = 1": phase,
        "FFM": ffm.ravel(),
    }
    rows, x = [], normal(rng, (ACCURACY_ROWS, CHANNELS))
    names = backends(device)
    for case, decay in cases.items():
        inputs = torch.from_numpy(decay).to(device), torch.from_numpy(x).to(device)
        found = {name: linear_scan(*inputs, backend=name).cpu().numpy() for name in names}
        state, largest, errors = np.zeros(CHANNELS, complex), 0.0, dict.fromkeys(names, 0.0)
        for low in range(0, ACCURACY_ROWS, 1024):
            exact = np.empty((1024, CHANNELS), complex)
            for t, row in enumerate(x[low : low + 1024]):
                state = exact[t] = decay * state + row
            largest = max(largest, np.abs(exact).max())
            errors = {name: max(errors[name], np.abs(found[name][low : low + 1024] - exact).max()) for name in names}
        for name in names:
            error = float(errors[name] / largest)
            rows.append({"T": ACCURACY_ROWS, "what": f"accuracy, {case}", "backend": name, "error": error})
    return rows


def discounted_returns(args, jax):
    """Rows of the table, and {backend: times}. An episode ends where the next begins, which is part of the work."""
    rng = np.random.default_rng(0)
    rewards = torch.from_numpy(rng.standard_normal(RETURN_ROWS, dtype=np.float32)).to(args.device)
    flags, finish = rng.random(RETURN_ROWS) < 1 / EPISODE, finisher(args.device)
    begins, out, last = torch.from_numpy(flags).to(args.device), torch.empty_like(rewards), torch.ones_like(rewards[:1]).bool()

    def copy():
        out.copy_(rewards)
        finish()

    def returns(backend):
        linear_scan(GAMMA, rewards, torch.cat([begins[1:], last]), reverse=True, backend=backend)
        finish()

    calls = {"copy": copy, **{name: partial(returns, name) for name in backends(args.device)}}
    if jax:
        for name, sequential in (("jax paper", False), ("jax lax.scan", True)):
            calls[name] = OwnProcess("jax_baselines", "discounted_return", RETURN_ROWS, flags, GAMMA, sequential)
    times = interleave(calls, args)
    return time_rows(RETURN_ROWS, "returns", times), times


def bars(times, errors, returns, best):
    def at(steps, above, below):
        return ratio(times.get((steps, "fwd+bwd"), {}), above, below)

    for steps in (16384, 65536):
        yield f"{best}, forward and backward, T = {steps}: time in copies", "<=", 1.3, at(steps, best, "copy")
    faster = ((best, "jax paper", (15, 50)), (best, "jax lax.scan", (2, 5)), ("torch", "jax paper", (2, 7)))
    for backend, other, wanted in faster:
        for steps, least in zip((1024, 16384), wanted):
            text = f"{backend}, forward and backward, T = {steps}: times faster than {other}"
            yield text, ">=", least, at(steps, other, backend)
    for steps in (1024, 16384):
        text = f"{best}, forward and backward, T = {steps}: a decay per row, times a constant decay"
        yield text, "<=", 2, at(steps, PER_ROW, best)
    for backend, most in ((best, 1e-7), ("torch", 2e-5)):
        worst = max((row["error"] for row in errors if row["backend"] == backend), default=np.nan)
        yield f"{backend}: largest error against complex128, T = {ACCURACY_ROWS}", "<=", most, (worst, np.nan)
    text = f"{best}, returns of {RETURN_ROWS} rewards: share of jax paper's time"
    yield text, "<=", 0.25, ratio(returns, best, "jax paper")


if __name__ == "__main__":
    args = parse_args()
    where = set_up(args)
    print(where)
    import torch

    from cleanrl_memoroid.scan import linear_scan

    jax = "jax" not in args.skip and importlib.util.find_spec("jax") is not None
    if jax and args.device == "cuda":
        jax = importlib.import_module("jax").default_backend() == "gpu"
    if not jax:
        print(WITHOUT_JAX)
    rows, times = speed(args, jax)
    errors = [] if "accuracy" in args.skip else accuracy(args.device)
    return_rows, returns = ([], {}) if "returns" in args.skip else discounted_returns(args, jax)
    for found in (errors, return_rows):
        if found:
            print_table(found)
    print_bars(bars(times, errors, returns, backends(args.device)[0]))
    write_csv("scan" if args.device == "cpu" else "scan_cuda", where, rows + errors + return_rows, args)
