"""Times one update of single_files/dqn_tbb_ffm.py at the paper's sizes, and what it is made of.

    python benchmark/update.py                              # one core; writes benchmark/results/update.csv
    python benchmark/update.py --paper memory-monoids       # beside the paper's jitted update: paper_update.py says how
    python benchmark/update.py --rows 1000 --profile        # PyTorch's own account of the time

The network: 8 observations, 4 actions, layers of 256 units, an FFM of 64 traces and 4 contexts. The tape: --rows transitions
in episodes of about 100 steps. Beside the whole update, parts of it run alone, on the same shapes, in the same run:
matrix products   every Linear layer of one online forward pass, its backward pass, and one target forward pass
scan              linear_scan twice forward, once backward
optimiser         clipping, AdamW, the target network's step
rest              what the parts leave of the update: elementwise work, losses, and what autograd and Python cost
sampling          drawing the tape from a full TapeBuffer, which is no part of the update
Bars: the update takes at most 1.4 times its matrix products, and at most half as long as the paper's at 1000 rows.
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
SIZES = {"hidden_size": 256, "trace_size": 64, "context_size": 4}


def parse_args():
    out = parser(__doc__.split("\n")[0])
    out.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000], help="transitions on the tape")
    out.add_argument("--paper", help="clone of the paper's repository: time its update too (needs jax)")
    out.add_argument("--profile", action="store_true", help="also print the operators that take most time, by torch.profiler")
    out.add_argument("--script", default=str(ROOT / "single_files" / "dqn_tbb_ffm.py"), help="the training script")
    return out.parse_args()


def filled_buffer(script, rng, capacity=100_000):
    buffer = script.TapeBuffer(capacity, OBS_SIZE)
    while buffer.oldest == 0:  # until the first episode is overwritten
        steps = int(rng.integers(0.8 * EPISODE, 1.2 * EPISODE))
        obs, rewards = rng.standard_normal((steps + 1, OBS_SIZE)), rng.standard_normal(steps)
        buffer.add(obs, rng.integers(ACTIONS, size=steps), rewards, bool(rng.random() < 0.5))
    return buffer


def contenders(script, rows):
    """{name: call} for a tape of `rows` transitions, and the number of rows of that tape, final observations included."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    spaces = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,)), gym.spaces.Discrete(ACTIONS)
    envs, args = SimpleNamespace(single_observation_space=spaces[0], single_action_space=spaces[1]), script.Args(**SIZES)
    q_network, target_network = script.QNetwork(envs, args), script.QNetwork(envs, args)
    target_network.load_state_dict(q_network.state_dict())
    # a rate of 0 does the same work and lets thousands of updates of one tape, and of the optimiser alone, stay where they are
    optimizer = torch.optim.AdamW(q_network.parameters(), lr=0.0, weight_decay=0, fused=True)
    buffer = filled_buffer(script, rng)
    # the last episode is drawn whole: of many tapes the one that overshoots least, as the paper's code cuts it
    tape = min((buffer.sample(rows, rng) for _ in range(100)), key=lambda tape: len(tape.transitions))

    def clip():
        return nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)

    def step():
        optimizer.step()
        for target_network_param, q_network_param in zip(target_network.parameters(), q_network.parameters()):
            target_network_param.data.lerp_(q_network_param.data, args.tau)

    def update():  # the script's training block, without sampling and logging
        q_values = q_network(tape.obs, tape.begins)
        with torch.no_grad():
            target = script.td_target(q_values, target_network(tape.obs, tape.begins), tape, args.gamma)
        old_val = q_values[tape.transitions, tape.actions[tape.transitions]]
        loss = F.smooth_l1_loss(old_val, target)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = clip()
        if not torch.isfinite(loss + grad_norm):
            raise FloatingPointError(f"loss {loss:.3g}, gradient norm {grad_norm:.3g}")
        step()

    update()  # leaves gradients for the optimiser alone

    def optimise():
        clip()
        step()

    layers, steps = [m for m in q_network.modules() if isinstance(m, nn.Linear)], len(tape.obs)
    inputs = [torch.randn(steps, m.in_features) for m in layers]
    outputs = [torch.randn(steps, m.out_features) for m in layers]

    @torch.no_grad()
    def products():
        for m, x in zip(layers + layers, inputs + inputs):  # online, target
            F.linear(x, m.weight, m.bias)
        for m, x, grad in zip(layers, inputs, outputs):
            grad.t().mm(x)
            if m is not layers[0]:  # nobody asks for the gradient of the observations
                grad.mm(m.weight)

    decay = q_network.memory.decay().detach().requires_grad_()
    x, w = (torch.randn(steps, *decay.shape, dtype=torch.complex64) for _ in range(2))
    x.requires_grad_()

    def scan():
        h = linear_scan(decay, x, tape.begins)
        with torch.no_grad():
            linear_scan(decay, x, tape.begins)
        torch.autograd.grad(h, (decay, x), w)

    calls = {"update": update, "matrix products": products, "scan": scan, "optimiser": optimise}
    return calls | {"sampling": lambda: buffer.sample(rows, rng)}, steps


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

    from cleanrl_memoroid.scan import linear_scan

    if args.paper and importlib.util.find_spec("jax") is None:
        print(WITHOUT_JAX)
        args.paper = None
    script, rows, bars = load_script(args.script), [], []
    for length in args.rows:
        calls, steps = contenders(script, length)
        if args.paper:
            sizes = {"rows": length, "obs_size": OBS_SIZE, "actions": ACTIONS, "episode": EPISODE}
            calls["jax paper"] = OwnProcess("paper_update", "paper_update", args.paper, **sizes)
        times = interleave(calls, args)
        found = []
        for name, values in times.items():
            found.append(
                {
                    "rows": length,
                    "T": steps,
                    "what": name,
                    "median_ms": float(np.median(values)),
                    "min_ms": float(values.min()),
                }
            )
            if name in ("update", "scan", "optimiser", "jax paper"):
                found[-1]["vs_products"], found[-1]["vs_products_min"] = ratio(times, name, "matrix products")
            if name == "update" and args.paper:
                found[-1]["vs_paper"], found[-1]["vs_paper_min"] = ratio(times, "jax paper", name)
        rest = {"rows": length, "T": steps, "what": "rest"}
        for column in ("median_ms", "min_ms"):
            rest[column] = found[0][column] - sum(row[column] for row in found[1:4])
        found.insert(4, rest)
        print_table(found)
        rows += found
        bars.append(
            (f"update of {length} rows: times its matrix products", "<=", 1.4, ratio(times, "update", "matrix products"))
        )
        if length == 1000:
            bars.append(("update of 1000 rows: times faster than the paper's", ">=", 2, ratio(times, "jax paper", "update")))
        if args.profile:
            profile(calls["update"])
    print_bars(bars)
    write_csv("update", where, rows, args)
