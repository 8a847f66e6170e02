"""Times one update of the DQN scripts at the paper's sizes, and what it is made of.

    python benchmark/speed/update.py                              # every script, one core; writes update.csv
    python benchmark/speed/update.py --paper memory-monoids       # beside the paper's jitted updates: paper_update.py says how
    python benchmark/speed/update.py --only dqn_tbb_ffm --rows 1000 --profile       # PyTorch's own account of the time

The networks: 8 observations, 4 actions, layers of 256 units, and the memories of the paper's experiments (SIZES below). The
tape: --rows transitions in episodes of about 100 steps; for segments, as many rows in segments of --segment-length. Beside the
whole update, its parts run alone, on the shapes and the very tensors that one update gave them, in the same run:
matrix products   every one of them, forward (online and target) and backward
scan              linear_scan, forward twice and backward once; linear attention scans only between its chunks
optimiser         clipping, Adam, the target network's step
rest              what the parts leave of the update: elementwise work, losses, and what autograd and Python cost
sampling          drawing the tape from a full buffer, which is no part of the update
`waste` is the share of the rows that carry no loss: padding, and the rows of final observations.

Then, into update_scan.csv: the gated LRU beside LRU at the scripts' default sizes, an update and the scans in it; for linear
attention at 64 x 64, attention alone against the paper's scan; and for tape against segments, a scan of T rows against one of
L rows of T / L segments side by side, whose tree is log L deep instead of log T. `--rows` without a number times only these.
"""

import importlib.util
from types import SimpleNamespace

import numpy as np
from timing import (
    ROOT,
    WITHOUT_JAX,
    OwnProcess,
    interleave,
    load_script,
    parser,
    print_bars,
    print_table,
    ratio,
    set_up,
    write_csv,
)

OBS_SIZE, ACTIONS, EPISODE = 8, 4, 100
SIZES = {
    "ffm": {"hidden_size": 256, "trace_size": 64, "context_size": 4},
    "lru": {"hidden_size": 256, "state_size": 128, "num_layers": 2},
    "glru": {"hidden_size": 256, "state_size": 128, "num_layers": 2},
    "mingru": {"hidden_size": 256},
    "s5": {"hidden_size": 256, "state_size": 128, "num_layers": 2},
    "linattn": {"hidden_size": 256, "key_size": 16, "value_size": 16},
}
PAPER = {"ffm": "ffm", "lru": "lru", "s5": "s5", "linattn": "linear_transformer"}  # names in paper_update.py
FASTER = {"ffm": (2, 2.7), "lru": (3.3, 3.5), "s5": (3.3, None), "linattn": (1.5, None)}  # than the paper at 1000, 10000 rows


def parse_args():
    out = parser(__doc__.split("\n")[0])
    out.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000], help="transitions on the tape; none: scans only")
    scripts = [path.stem for path in (ROOT / "single_files").glob("dqn_*.py") if path.stem.split("_")[-1] in SIZES]
    scripts.sort(key=lambda name: ("_sbb_" in name, name))
    out.add_argument("--only", nargs="+", default=scripts, choices=scripts, metavar="SCRIPT", help="scripts to time")
    out.add_argument("--segment-length", type=int, nargs="+", default=[10, 100], help="for the dqn_sbb scripts (transitions)")
    out.add_argument("--paper", help="clone of the paper's repository: time its updates too (needs jax)")
    out.add_argument("--profile", action="store_true", help="also print the operators that take most time, by torch.profiler")
    return out.parse_args()


def filled_buffer(script, rng, args, capacity=100_000):
    segments = hasattr(args, "segment_length")
    buffer = script.SegmentBuffer if segments else script.TapeBuffer
    buffer = buffer(capacity, *((args.segment_length, args.burn_in) if segments else ()))
    while buffer.rows < capacity - 2 * EPISODE:
        steps = int(rng.integers(0.8 * EPISODE, 1.2 * EPISODE))
        obs, rewards = rng.standard_normal((steps + 1, OBS_SIZE)), rng.standard_normal(steps)
        buffer.add(obs, rng.integers(ACTIONS, size=steps), rewards, bool(rng.random() < 0.5))
    return buffer


def recorded(script, update):
    """The matrix products and the scans of one update: [(function, its arguments)], [arguments of linear_scan]."""
    products, scans, linear_scan = [], [], script.linear_scan
    names = {"mm", "addmm", "bmm", "baddbmm"}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if (name := function.overloadpacket.__name__.rstrip("_")) in names:
                products.append((getattr(torch.ops.aten, name).default, args))  # again and again, so never in place
            return function(*args, **(kwargs or {}))

    def scan(*args, **kwargs):
        args = [v.detach().clone().requires_grad_(v.requires_grad) if torch.is_tensor(v) else v for v in args]
        scans.append((args, kwargs))
        return linear_scan(*args, **kwargs)

    script.linear_scan = scan
    with Recorder():
        update()
    script.linear_scan = linear_scan
    return products, scans


def contenders(script, rows, sizes):
    """{name: call} for a tape of `rows` transitions, the tape, and how many matrix products an update has."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    spaces = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,)), gym.spaces.Discrete(ACTIONS)
    envs, args = SimpleNamespace(single_observation_space=spaces[0], single_action_space=spaces[1]), script.Args(**sizes)
    q_network, target_network = script.QNetwork(envs, args), script.QNetwork(envs, args)
    target_network.load_state_dict(q_network.state_dict())
    # a rate of 0 does the same work and lets thousands of updates of one tape, and of the optimiser alone, stay where they are
    optimizer = torch.optim.Adam(q_network.parameters(), lr=0.0, fused=True)
    buffer = filled_buffer(script, rng, args)
    # the last episode is drawn whole: of many tapes the one that overshoots least, as the paper's code cuts it
    tape = min((buffer.sample(rows, rng) for _ in range(100)), key=lambda tape: (~tape.final).sum())

    def clip():
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, error_if_nonfinite=True)

    def step():
        optimizer.step()
        for target_network_param, q_network_param in zip(target_network.parameters(), q_network.parameters()):
            target_network_param.data.lerp_(q_network_param.data, args.tau)

    def update():  # what stands under "ALGO LOGIC: training." in the script, without sampling and logging
        q_values = q_network(tape.obs, tape.begins)
        with torch.no_grad():
            target = script.td_target(q_values, target_network(tape.obs, tape.begins), tape, args.gamma)
        old_val = q_values.gather(1, tape.actions[:, None]).squeeze(1)[~tape.final]
        loss = F.smooth_l1_loss(old_val, target)
        optimizer.zero_grad()
        loss.backward()
        clip()
        step()

    update()  # leaves gradients for the optimiser alone
    found, scans = recorded(script, update)

    @torch.no_grad()
    def products():
        for function, arguments in found:
            function(*arguments)

    def scan():
        for arguments, keywords in scans:
            h = linear_scan(*arguments, **keywords)
            if h.requires_grad:
                leaves = [v for v in arguments if torch.is_tensor(v) and v.requires_grad]
                torch.autograd.grad(h, leaves, h.detach())

    def optimise():
        clip()
        step()

    calls = {"update": update, "matrix products": products, "scan": scan, "optimiser": optimise}
    return calls | {"sampling": lambda: buffer.sample(rows, rng)}, tape


def time_script(name, rows, segment_length, args):
    """Rows of the table for one script on one tape, and its bars."""
    memory = name.split("_")[-1]
    sizes = SIZES[memory] | ({"segment_length": segment_length} if segment_length else {})
    calls, tape = contenders(load_script(ROOT / "single_files" / f"{name}.py"), rows, sizes)
    if args.paper and not segment_length and memory in PAPER:
        paper = {"rows": rows, "obs_size": OBS_SIZE, "actions": ACTIONS, "episode": EPISODE}
        calls["jax paper"] = OwnProcess("paper_update", "paper_update", args.paper, PAPER[memory], **paper)
    times, found = interleave(calls, args), []
    where = {"script": name, "L": segment_length or "", "rows": rows, "T": len(tape.obs)}
    where |= {"waste": float(tape.final.float().mean())}
    for part, values in times.items():
        found.append(where | {"what": part, "median_ms": float(np.median(values)), "min_ms": float(values.min())})
        if part in ("update", "scan", "optimiser", "jax paper"):
            found[-1]["vs_products"], found[-1]["vs_products_min"] = ratio(times, part, "matrix products")
        if part == "update" and "jax paper" in times:
            found[-1]["vs_paper"], found[-1]["vs_paper_min"] = ratio(times, "jax paper", part)
    rest = where | {"what": "rest"}
    for column in ("median_ms", "min_ms"):
        rest[column] = found[0][column] - sum(row[column] for row in found[1:4])
    found.insert(4, rest)
    print_table(found)
    bars, text = [], f"{name}, {rows} rows: update"
    if name == "dqn_tbb_ffm":
        bars.append((f"{text}, times its matrix products", "<=", 1.4, ratio(times, "update", "matrix products")))
    wanted = None if segment_length else dict(zip((1000, 10_000), FASTER.get(memory, ()))).get(rows)
    if wanted:
        bars.append((f"{text}, times faster than the paper's", ">=", wanted, ratio(times, "jax paper", "update")))
    if args.profile:
        profile(calls["update"])
    if "jax paper" in calls:
        calls["jax paper"].close()
    return found, bars


def time_gates(args, rows):
    """An update with the gated LRU, and the scans in it, beside LRU's, at the scripts' default sizes."""
    calls, found, bars = {}, [], []
    for name in ("dqn_tbb_lru", "dqn_tbb_glru"):
        parts, tape = contenders(load_script(ROOT / "single_files" / f"{name}.py"), rows, {})
        calls |= {f"{name}, {part}": parts[part] for part in ("update", "scan")}
    times = interleave(calls, args)
    for name, values in times.items():
        row = {"script": name.split(",")[0], "T": len(tape.obs), "what": f"{name.split(', ')[1]}, default sizes"}
        found.append(row | {"median_ms": float(np.median(values)), "min_ms": float(values.min())})
    for part, most in (("update", 1.5), ("scan", 2)):
        figure = ratio(times, f"dqn_tbb_glru, {part}", f"dqn_tbb_lru, {part}")
        bars.append((f"gated LRU, {rows} rows, default sizes: {part}, times LRU's", "<=", most, figure))
    print_table(found)
    return found, bars


def time_attention(args, with_jax, steps, key_size=64):
    """Linear attention alone, forward and backward, chunked against the paper's scan over [T, K, V]."""
    script = load_script(ROOT / "single_files" / "dqn_tbb_linattn.py")
    attention = script.LinearAttention(256, 256, key_size, key_size)
    begins = np.arange(steps) % EPISODE == 0
    query, key = ((1 + F.elu(torch.randn(steps, key_size))).requires_grad_() for _ in range(2))
    value, weight = torch.randn(steps, key_size, requires_grad=True), torch.randn(steps, key_size)

    def chunked():
        read = attention.attend(query, key, F.pad(value, (0, 1), value=1.0), torch.from_numpy(begins))
        weighted, normaliser = read.split((key_size, 1), dim=-1)
        torch.autograd.grad(weighted * normaliser.reciprocal(), (query, key, value), weight)

    calls = {"attention": chunked}
    if with_jax:
        sizes = {"T": steps, "K": key_size, "V": key_size, "begins": begins, "grad": True}
        calls["jax paper"] = OwnProcess("jax_baselines", "linear_transformer_scan", **sizes)
    times = interleave(calls, args)
    rows = [
        {"script": "dqn_tbb_linattn", "T": steps, "what": f"{name}, {key_size} x {key_size}, fwd+bwd"}
        | {"median_ms": float(np.median(values)), "min_ms": float(values.min())}
        for name, values in times.items()
    ]
    rows[0]["vs_paper"], rows[0]["vs_paper_min"] = ratio(times, "jax paper", "attention")
    print_table(rows)
    text = f"linear attention {key_size} x {key_size}, {steps} rows: times faster than the paper's scan"
    if with_jax:
        calls["jax paper"].close()
    return rows, [(text, ">=", 25, ratio(times, "jax paper", "attention"))]


def time_depth(args, channels=256):
    """A scan's forward pass over T rows in one piece, and over L rows of T / L segments side by side."""
    rows, decay = [], 0.9 * torch.exp(1j * torch.rand(channels, dtype=torch.float64))

    def operator(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    def calls_of(x, begins, name):
        elems = decay.to(x.dtype).expand_as(x), x
        return {
            f"numba, {name}": lambda: linear_scan(decay, x, begins, backend="numba"),
            f"torch, {name}": lambda: linear_scan(decay, x, begins, backend="torch"),
            f"tree, {name}": lambda: associative_scan(operator, elems),
        }

    for steps in (1024, 16_384):
        x, begins = torch.randn(steps, channels, dtype=torch.complex64), torch.arange(steps) % EPISODE == 0
        calls = calls_of(x, begins, "tape")
        for length in (512, 64, 8):
            calls |= calls_of(x.view(-1, length, channels).transpose(0, 1).contiguous(), None, f"L = {length}")
        times = interleave(calls, args)
        for name, values in times.items():
            tape = times[f"{name.split(',')[0]}, tape"]
            row = {"script": "scan", "T": steps, "what": name, "median_ms": float(np.median(values))}
            rows.append(row | {"min_ms": float(values.min()), "vs_tape": float(np.median(values) / np.median(tape))})
    print_table(rows)
    return rows


def profile(call, updates=20):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(updates):
            call()
    print(f"\ntorch.profiler, {updates} updates")
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48))


if __name__ == "__main__":
    args = parse_args()
    where = set_up(args)
    print(where)
    import gymnasium as gym
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    from cleanrl_memoroid.scan import associative_scan, linear_scan

    if args.paper and importlib.util.find_spec("jax") is None:
        print(WITHOUT_JAX)
        args.paper = None
    rows, bars = [], []
    for length in args.rows:
        for name in args.only:
            for segment_length in args.segment_length if "_sbb_" in name else (None,):
                found, wanted = time_script(name, length, segment_length, args)
                rows, bars = rows + found, bars + wanted
                write_csv("update", where, rows, args)  # minutes of work: a run cut short leaves what it has
    scans = []
    for length in (1000, 10_000):
        found, wanted = time_gates(args, length)
        scans, bars = scans + found, bars + wanted
    for steps in (1024, 4096):
        found, wanted = time_attention(args, importlib.util.find_spec("jax") is not None, steps)
        scans, bars = scans + found, bars + wanted
    write_csv("update_scan", where, scans + time_depth(args), args)
    print_bars(bars)
