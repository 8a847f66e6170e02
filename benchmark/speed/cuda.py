"""One command that proves on a card what runs on CUDA, and measures it, in less than six minutes.

    python benchmark/speed/cuda.py                     # writes benchmark/results/cuda/CARD/
    python benchmark/speed/cuda.py --wheels FOLDER     # first installs wheels from a folder: for a machine without a network
    python benchmark/speed/cuda.py --rehearse          # all parts on the CPU, at small sizes, to try the command itself

a  parity     the Triton scan against the recurrence in complex128: values and gradients, every kind of input, up to 10^6 rows
b  scan       milliseconds forward and backward and peak memory, beside a copy of the same bytes, accelerated-scan,
              PyTorch's associative_scan, and cuDNN's LSTM and GRU; 256 complex channels
c  scripts    acting and updates of DQN and PPO with four memories, as they are and as CUDA graphs
d  learning   whole runs with --cuda, to their bars; equal seeds; a run that is killed and resumed
e  processes  torchrun with NCCL and one process: training, and the scan whose tape is cut between devices
f  pong       PPO on Pong for the time that is left

Each part is a process of its own: an error, or a kernel that breaks the card's context, costs that part alone. All files are
written anew after each part, so that being cut off costs the rest alone. Parts a and d run side by side, as neither is timed.
Without a card only part a runs, in Triton's interpreter at small sizes; the rest is skipped.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
from timing import ROOT, cell, load_script, print_table, write_csv

CHANNELS, EPISODE = 256, 200
TITLES = {"a": "parity", "b": "scan", "c": "scripts", "d": "learning", "e": "processes", "f": "pong"}
SECONDS = {"a": 90, "b": 75, "c": 60, "d": 150, "e": 35, "f": 90}  # at most, each
MEMORIES = "ffm", "lru", "s5", "linattn"


def parse_args(argv=None):
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--seconds", type=float, default=345, help="for all parts together (345)")
    out.add_argument("--parts", nargs="+", choices=list(TITLES), default=list(TITLES), help="parts to run (all)")
    out.add_argument("--out", type=Path, help="folder of the results (benchmark/results/cuda/CARD)")
    out.add_argument("--wheels", type=Path, help="folder of wheels to install for this command alone, without a network")
    out.add_argument("--rehearse", action="store_true", help="run every part on the CPU, at small sizes")
    out.add_argument("--child", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)  # what a part's own process gets
    out.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)  # this process's of a part's cases
    out.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    return out.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# What a part's process tells the one that started it: a line of JSON for each row, bar or note
class Report:
    def __init__(self, path, deadline):
        self.file, self.deadline, self.differences = open(path, "a"), deadline, []

    def say(self, **what):
        self.file.write(json.dumps(what, default=float) + "\n")
        self.file.flush()

    def row(self, **columns):
        self.say(row=columns)

    def bar(self, text, sign, wanted, figure):
        """figure: None if it was not measured."""
        self.say(bar=[text, sign, wanted, figure])

    def left(self):
        """Seconds of this part's time."""
        return self.deadline - time.time()


def first_line(error):
    """A short reason, such as a row of a table has room for."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:150]


# ----------------------------------------------------------------------------------------------------------------------
# a. Parity
def definition(decay, x, begins, h0, grad_h, reverse):
    """h, and the gradients of decay, x and h0: the two recurrences row by row. Numba compiles it if it is there.

    decay, x, grad_h complex128 [T, N, C]; begins bool [T, N]; h0 complex128 [N, C].
    """
    steps, groups, channels = x.shape
    h, grad_decay, grad_x, grad_h0 = np.empty_like(x), np.zeros_like(x), np.empty_like(x), np.zeros_like(h0)
    for n in range(groups):
        for c in range(channels):
            state = h0[n, c]
            for i in range(steps):
                t = steps - 1 - i if reverse else i
                grad_decay[t, n, c] = np.conj(state)  # of the row before, for now
                state = x[t, n, c] if begins[t, n] else x[t, n, c] + decay[t, n, c] * state
                h[t, n, c] = state
            carry = 0j
            for i in range(steps):
                t = i if reverse else steps - 1 - i
                g = grad_h[t, n, c] + carry
                grad_x[t, n, c] = g
                grad_decay[t, n, c] = 0j if begins[t, n] else grad_decay[t, n, c] * g
                carry = 0j if begins[t, n] else np.conj(decay[t, n, c]) * g
            grad_h0[n, c] = carry
    return h, grad_decay, grad_x, grad_h0


def parity_cases(small):
    """[(kind: dict, lengths)], the kinds that scripts use first."""
    import itertools

    import torch

    kinds = []
    for begins, reverse, decay, dtype in itertools.product(
        ("T", "T N"), (False, True), ("constant, double", "constant", "per step"), (torch.complex64, torch.float32)
    ):
        kinds.append({"dtype": dtype, "decay": decay, "reverse": reverse, "begins": begins, "h0": len(kinds) % 2 == 1})
    for dtype in (torch.complex64, torch.float32):
        plain = {"dtype": dtype, "decay": "constant, double", "reverse": False, "h0": False}
        kinds.append(plain | {"begins": "none", "h0": True})
        kinds.append(plain | {"begins": "T", "shared": True})
        kinds.append(plain | {"begins": "T", "decay": "per step", "reverse": True, "channels": 40})
    if small:  # in the interpreter, where a row takes a millisecond and chunks have four rows
        return [(kind, (11,) if i else (1, 11)) for i, kind in enumerate(kinds[::5])]
    return [(kind, (1, 2, 31, 32, 33, 1024, 1025, 4113, 65_537, 1_000_000)) for kind in kinds]


def parity_case(kind, steps, device):
    """{name: largest error of the Triton scan, relative to the largest value} of one case."""
    import torch

    from cleanrl_memoroid.scan import linear_scan

    dtype, shared, per_step = kind["dtype"], kind.get("shared", False), kind["decay"] == "per step"
    double = {torch.float32: torch.float64, torch.complex64: torch.complex128}[dtype]
    groups, channels = (2, 4) if kind["begins"] == "T N" or shared else (1, kind.get("channels", 8))
    rng = torch.Generator().manual_seed(steps)

    def draw(*shape):
        return torch.randn(*shape, dtype=double, generator=rng)

    decay = draw(*([steps] if per_step else []), groups, channels)
    largest = 0.9999 if "double" in kind["decay"] else 0.999
    sizes = 0.9 + (largest - 0.9) * torch.rand(decay.shape, dtype=torch.float64, generator=rng)
    decay = (decay / decay.abs() * sizes).to(double if "double" in kind["decay"] else dtype)
    x = draw(steps, 1 if shared else groups, channels).to(dtype)
    weight, h0 = draw(steps, groups, channels).to(dtype), draw(groups, channels).to(dtype) if kind["h0"] else None
    often = 0.1 if steps < 100 else 0.01
    begins = torch.rand(steps, *([groups] if kind["begins"] == "T N" else []), generator=rng) < often
    begins = None if kind["begins"] == "none" else begins

    leaves = [None if v is None else v.to(device, copy=True).requires_grad_() for v in (decay, x, h0)]
    flags = None if begins is None else begins.to(device)
    h = linear_scan(leaves[0], leaves[1], flags, leaves[2], reverse=kind["reverse"], backend="triton")
    wanted = [v for v in leaves if v is not None]
    grads = dict(zip(("decay", "x", "h0"), torch.autograd.grad(h, wanted, weight.to(device))))
    found = {"h": h} | grads

    def exact(v, *shape):
        return v.to(torch.complex128).expand(*shape).contiguous().numpy()

    rows = steps, groups, channels
    flags = torch.zeros(steps, 1, dtype=torch.bool) if begins is None else begins.reshape(steps, -1)
    flags, state = flags.expand(*rows[:2]).contiguous().numpy(), exact(torch.zeros(1) if h0 is None else h0, *rows[1:])
    inputs = exact(decay, *rows), exact(x, *rows), flags, state, exact(weight, *rows), kind["reverse"]
    loop = compiled_definition() if steps > 100 else definition
    errors = {}
    for name, value in zip(("h", "decay", "x", "h0"), loop(*inputs)):
        if name in found:
            ours = found[name].detach().cpu().to(torch.complex128)
            theirs = torch.from_numpy(value)
            if not dtype.is_complex:
                theirs = theirs.real.to(torch.complex128)
            theirs = theirs.sum_to_size(ours.shape) if theirs.dim() == ours.dim() else theirs.sum(0)
            errors[name] = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
            errors[name] = math.inf if math.isnan(errors[name]) else errors[name]
    return errors


_compiled = []


def compiled_definition():
    if not _compiled:
        try:
            import numba

            _compiled.append(numba.njit(definition))
        except ImportError:
            _compiled.append(definition)
    return _compiled[0]


def parity(report, args):
    small = args.device == "cpu"
    if small:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import torch

    from cleanrl_memoroid import scan_triton
    from cleanrl_memoroid.scan import linear_scan

    if small:
        scan_triton.chunk_length = lambda steps: min(4, steps)
    # is the loop the definition? Against `ref`, which autograd differentiates
    rng = torch.Generator().manual_seed(0)
    decay, x, weight, h0 = (torch.randn(20, 2, 3, dtype=torch.complex128, generator=rng) for _ in range(4))
    begins, leaves = torch.rand(20, 2, generator=rng) < 0.2, [decay, x, h0[0]]
    for reverse in (False, True):
        leaves = [v.detach().requires_grad_() for v in leaves]
        h = linear_scan(leaves[0], leaves[1], begins, leaves[2], reverse=reverse, backend="ref")
        wanted = h, *torch.autograd.grad(h, leaves, weight)
        inputs = [v.detach().numpy() for v in (decay, x, begins, h0[0], weight)]
        for ours, theirs in zip(definition(*inputs, reverse), wanted):
            torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=1e-10, atol=1e-10)
    share, shares = args.share
    cases, worst, done = parity_cases(small)[share::shares], 0.0, 0
    for kind, lengths in cases:
        for steps in lengths:
            shown = {"T": steps, **{key: str(v).removeprefix("torch.") for key, v in kind.items()}}
            if report.left() < 3:
                report.row(**shown, error="not reached: out of time")
                continue
            try:
                errors = parity_case(kind, steps, args.device)
                report.row(**shown, **{f"error of {'h' if n == 'h' else f'grad {n}'}": e for n, e in errors.items()})
                worst = max(worst, *errors.values())
            except Exception as error:
                report.row(**shown, error=first_line(error))
                worst = math.inf  # a case that cannot run is no case that is met
            done += 1
    report.bar(f"a: largest error of {done} cases, share {share + 1} of {shares}", "<=", 1e-5, worst if done else None)


# ----------------------------------------------------------------------------------------------------------------------
# b. The scan's time
class Stopwatch:
    """Milliseconds of `count` calls in a row, by events of the device, or on a CPU by the clock."""

    def __init__(self, device):
        import torch

        self.torch, self.cuda = torch, device == "cuda"

    def __call__(self, call, count):
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) * 1000 / count
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def interleave(self, calls, rounds=7, milliseconds=12.0):
        """{name: [ms]}, every call in turn, each as often as fits `milliseconds`; and {name: reason} of those that fail."""
        times, counts, failed = {}, {}, {}
        for name, call in calls.items():
            try:
                first = self(call, 1)  # compiles
                first = self(call, 1) if first < 2000 else first
                counts[name], times[name] = max(1, min(100, int(milliseconds / max(first, 1e-3)))), []
            except Exception as error:
                failed[name] = first_line(error)
        for _ in range(rounds):
            for name, values in times.items():
                if sum(values) < 1500:  # what takes seconds has a turn or two
                    values.append(self(calls[name], counts[name]))
        return times, failed


def scan_contenders(steps, device):
    """{name: () -> (forward, leaves, weight)}: made one after the other, so that the memory of one is free for the next."""
    import torch

    from cleanrl_memoroid.scan import linear_scan

    rng = np.random.default_rng(steps)
    rates = rng.uniform(0.9, 0.9999, CHANNELS) * np.exp(2j * np.pi * rng.uniform(size=CHANNELS))
    begins = torch.from_numpy(rng.random(steps) < 1 / EPISODE).to(device)
    decay = torch.from_numpy(rates).to(device)

    def numbers(*shape, dtype=torch.complex64):
        return torch.randn(*shape, dtype=dtype, device=device)

    def gates():  # decays expanded over time, with resets as zeros, as others take them
        return torch.where(begins[:, None], 0, decay.to(torch.complex64))

    def ours(backend):
        x = numbers(steps, CHANNELS).requires_grad_()
        leaves = decay.clone().requires_grad_(), x
        return lambda: linear_scan(leaves[0], x, begins, backend=backend), leaves, numbers(steps, CHANNELS)

    def per_row():
        leaves = gates().requires_grad_(), numbers(steps, CHANNELS).requires_grad_()
        return lambda: linear_scan(*leaves, begins), leaves, numbers(steps, CHANNELS)

    def accelerated():
        from accelerated_scan.complex import scan

        leaves = gates().T[None].contiguous().requires_grad_(), numbers(1, CHANNELS, steps).requires_grad_()
        return lambda: scan(*leaves), leaves, numbers(1, CHANNELS, steps)

    def torchs():
        from torch._higher_order_ops.associative_scan import associative_scan

        def operator(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        leaves = gates().requires_grad_(), numbers(steps, CHANNELS).requires_grad_()
        scan = lambda: associative_scan(operator, leaves, 0, combine_mode="generic")[1]  # noqa: E731
        return scan, leaves, numbers(steps, CHANNELS)

    def cudnn(kind):
        layer = kind(CHANNELS, CHANNELS).to(device)
        x = numbers(steps, 1, CHANNELS, dtype=torch.float32).requires_grad_()
        return lambda: layer(x)[0], (x, *layer.parameters()), numbers(steps, 1, CHANNELS, dtype=torch.float32)

    fast = {"cuda": "triton", "cpu": "numba"}[device]
    return {
        fast: lambda: ours(fast),
        "a decay per row": per_row,
        "accelerated-scan": accelerated,
        "cuDNN LSTM": lambda: cudnn(torch.nn.LSTM),
        "cuDNN GRU": lambda: cudnn(torch.nn.GRU),
        "torch": lambda: ours("torch"),
        "torch associative_scan": torchs,
    }


def time_contender(make, watch):
    """({"forward": [ms], "backward": [ms]}, {what: why it failed}, MB that both take at most beside their inputs)."""
    import torch

    call, leaves, weight = make()
    before = torch.cuda.memory_allocated() if watch.cuda else 0
    if watch.cuda:
        torch.cuda.reset_peak_memory_stats()
    out = call()

    def forward():
        with torch.no_grad():
            call()

    def backward():
        torch.autograd.grad(out, leaves, weight, retain_graph=True)

    backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if watch.cuda else float("nan")
    return *watch.interleave({"forward": forward, "backward": backward}), peak


def scan_times(report, args):
    import torch

    cuda = args.device == "cuda"
    watch, predicted, found = Stopwatch(args.device), {}, {}
    lengths = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576) if cuda else (256, 1024)
    for steps in lengths:
        x, h, g = (torch.randn(steps, CHANNELS, dtype=torch.complex64, device=args.device) for _ in range(3))

        def copies(x=x, h=h, g=g, half=steps // 2):  # read grad_h and h, write grad_x: three passes, one copy and a half
            h.copy_(x)
            g[:half].copy_(x[:half])

        times, _ = watch.interleave({"forward": lambda x=x, h=h: h.copy_(x), "backward": copies})
        copy = {what: float(np.median(values)) for what, values in times.items()}
        for what, values in times.items():
            report.row(T=steps, what=what, contender="copy of the same bytes", median_ms=copy[what], min_ms=min(values))
        del x, h, g
        for name, make in scan_contenders(steps, args.device).items():
            row = {"T": steps, "contender": name}
            if predicted.get(name, 0) > 2500 or report.left() < 8:  # milliseconds, forward and backward
                why = f"left out: {predicted[name]:.0f} ms expected" if predicted.get(name, 0) > 2500 else "out of time"
                report.row(**row, skipped=why)
                continue
            try:
                times, failed, peak = time_contender(make, watch)
                for what, values in times.items():
                    median = found[steps, what, name] = float(np.median(values))
                    report.row(
                        T=steps, what=what, contender=name, median_ms=median, min_ms=min(values),
                        copies=median / copy[what], peak_MB=peak,
                    )  # fmt: skip
                for what, why in failed.items():
                    report.row(**row, what=what, skipped=why)
                predicted[name] = 4 * sum(float(np.median(v)) for v in times.values())
            except Exception as error:
                report.row(**row, skipped=first_line(error))
                predicted[name] = math.inf if "OutOfMemory" in first_line(error) else predicted.get(name, 0)
            if cuda:
                torch.cuda.empty_cache()
        for what in copy:
            mine = found.get((steps, what, "triton" if cuda else "numba"))
            if steps >= 65_536 or not cuda:
                report.bar(f"b: {what}, T = {steps}: time in copies", "<=", 1.3, mine and mine / copy[what])
            for other, first in (("accelerated-scan", 65_536), ("cuDNN LSTM", 1024)):
                theirs = found.get((steps, what, other))
                if steps >= first and mine and theirs:
                    report.bar(f"b: {what}, T = {steps}: times faster than {other}", ">=", 1, theirs / mine)


# ----------------------------------------------------------------------------------------------------------------------
# c. Scripts: acting and updates
def fake_envs(obs_size=10, actions=4):
    from types import SimpleNamespace

    import gymnasium as gym

    box = gym.spaces.Box(-np.inf, np.inf, (obs_size,))
    return SimpleNamespace(single_observation_space=box, single_action_space=gym.spaces.Discrete(actions))


def acting(network, heads, num_envs, device):
    """`step` on tensors, and inputs: NumPy observations and begins as environments give them, and a state."""
    import torch

    @torch.no_grad()
    def step(obs, begins, state):
        markov_state, state = network.memory.step(network.encoder(obs), begins, state)
        out = heads(markov_state)
        return (*out, state) if isinstance(out, tuple) else (out, state)

    rng, state = np.random.default_rng(0), network.memory.initial_state(num_envs)
    return step, (rng.standard_normal((num_envs, 10), np.float32), rng.random(num_envs) < 0.1, state)


def dqn_update(script, args, device):
    """(update as in the script, the same with the rows of transitions known beforehand, what it changes, rows of the tape)."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    torch.manual_seed(0)
    networks = [script.QNetwork(fake_envs(), args).to(device) for _ in range(2)]
    q_network, target_network = networks
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-4, fused=True, capturable=device == "cuda")
    buffer, rng = script.TapeBuffer(100_000), np.random.default_rng(0)
    for _ in range(20):
        obs, rewards = rng.standard_normal((52, 10)), rng.standard_normal(51)
        buffer.add(obs, rng.integers(4, size=51), rewards, True)
    tape = buffer.sample(args.batch_size, rng, device)
    rows = (~tape.final).nonzero().squeeze(1)

    def finish(loss):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)
        optimizer.step()
        for target_network_param, q_network_param in zip(target_network.parameters(), q_network.parameters()):
            target_network_param.data.lerp_(q_network_param.data, args.tau)
        return (loss,)

    def update():
        q_values = q_network(tape.obs, tape.begins)
        with torch.no_grad():
            target = script.td_target(q_values, target_network(tape.obs, tape.begins), tape, args.gamma)
        old_val = q_values.gather(1, tape.actions[:, None]).squeeze(1)[~tape.final]
        return finish(F.smooth_l1_loss(old_val, target))

    def fixed():  # nonzero and boolean indices wait for the device: a graph cannot hold them
        q_values = q_network(tape.obs, tape.begins)
        with torch.no_grad():
            best = q_values[rows + 1].argmax(dim=1, keepdim=True)
            bootstrap = target_network(tape.obs, tape.begins)[rows + 1].gather(1, best).squeeze(1)
            target = tape.rewards[rows] + args.gamma * torch.where(tape.terminations[rows], 0, bootstrap)
        old_val = q_values.gather(1, tape.actions[:, None]).squeeze(1)[rows]
        return finish(F.smooth_l1_loss(old_val, target))

    return update, fixed, (networks, optimizer), q_network, q_network.q_values, len(tape.obs)


def ppo_update(script, args, device):
    """As `dqn_update`, of a minibatch of the default rollout."""
    import torch
    import torch.nn as nn

    torch.manual_seed(0)
    agent, rng = script.Agent(fake_envs(), args).to(device), np.random.default_rng(0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-4, fused=True, capturable=device == "cuda")
    envs = args.num_envs // args.num_minibatches
    obs = rng.standard_normal((args.num_steps, envs, 10)).astype(np.float32)
    begins = rng.random((args.num_steps, envs)) < 1 / 50
    begins[0] = True
    carried_tape = script.CarriedTape(obs, agent.memory.initial_state(envs))
    carried_tape.add(obs, begins)
    everyone = np.arange(envs)
    tape = carried_tape.sections(everyone, args.num_steps)
    actions = torch.randint(4, (len(tape.loss_rows), 1)).to(device)
    advantages, returns = torch.randn(2, len(tape.loss_rows)).to(device)

    def loss_of(tape):
        policy, newvalue, _ = agent(tape)
        ratio = (script.log_prob(policy, actions) + math.log(4)).exp()
        clipped = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
        entropy = -(policy.exp() * policy).sum((-2, -1)).mean()
        return pg_loss - args.ent_coef * entropy + args.vf_coef * 0.5 * ((newvalue - returns) ** 2).mean()

    def finish(loss):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
        optimizer.step()
        return (loss,)

    def update():
        return finish(loss_of(carried_tape.sections(everyone, args.num_steps)))

    def fixed():
        # whether all sections begin an episode, as they do here, is what memories ask the device, and wait for the answer
        with mock.patch.object(torch.Tensor, "all", lambda tensor: True):
            return finish(loss_of(tape))

    return update, fixed, ([agent], optimizer), agent, agent.heads, len(tape.obs)


def keep(networks, optimizer):
    """A function that puts weights and optimizer back to what they are now, in place, as a graph needs it."""
    tensors = [v for network in networks for v in network.state_dict().values()]
    before = [v.clone() for v in tensors]

    def restore():
        for place, value in zip(tensors, before):
            place.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    return restore


def record_nothing(function, inputs):
    """Stands in for `record_cuda` in a rehearsal: a replay is a call."""
    outputs = function(*inputs)

    def replay():
        for place, value in zip(outputs, function(*inputs)):
            place.copy_(value)

    return replay, outputs


def as_graph(update, restore, device):
    """`update` recorded, with its warm-up undone; on a CPU, where there are no graphs, the function itself."""
    if device != "cuda":
        return update
    from graphs import record_cuda

    replay, outputs = record_cuda(update, (), after_warm_up=restore)
    restore()

    def replayed():
        replay()
        return outputs

    return replayed


def script_times(report, args):
    """Acting and updates as they are and acting as a graph, of all scripts; then updates as graphs, since one may fail."""
    made, medians = {}, {}
    watch, cuda = Stopwatch(args.device), args.device == "cuda"

    def time_calls(name, calls):
        times, failed = watch.interleave(calls, rounds=5)
        for what, values in times.items():
            medians[name, what] = float(np.median(values))
            report.row(script=name, what=what, median_ms=medians[name, what], min_ms=min(values))
        for what, why in failed.items():
            report.row(script=name, what=what, skipped=why)

    names = [f"{algorithm}_tbb_{memory}" for algorithm in ("dqn", "ppo") for memory in (MEMORIES if cuda else ("ffm", "lru"))]
    for turn in (eager_calls, graph_calls):
        for name in names:
            try:
                if report.left() < 6:
                    raise TimeoutError("out of time")
                if name not in made:
                    script = load_script(ROOT / "single_files" / f"{name}.py")
                    own = script.Args() if cuda else script.Args(num_envs=8, hidden_size=32)
                    made[name] = own, *(dqn_update if "dqn" in name else ppo_update)(script, own, args.device)
                time_calls(name, turn(report, name, args.device, *made[name]))
            except Exception as error:
                report.row(script=name, what=turn.__name__.replace("_", " "), skipped=first_line(error))
    text = "c: largest difference of a graph and the same without one: outputs, relative; weights after three updates"
    report.bar(text, "<=", 1e-5, max(report.differences, default=None))
    for what in ("acting", "update"):
        gains = [
            medians[name, what] / medians[name, f"{what}, graph"] for name in names if (name, f"{what}, graph") in medians
        ]
        report.bar(f"c: {what} as a CUDA graph: times faster, least of {len(gains)}", ">=", 1, min(gains, default=None))


def eager_calls(report, name, device, own, update, fixed, parts, network, heads, rows):
    """{what: call}: what a script's loop does, and acting as a graph, which is compared first."""
    import graphs
    import torch

    step, inputs = acting(network, heads, own.num_envs, device)

    def on_device():
        return [torch.as_tensor(v).to(device) for v in inputs]

    recorded = graphs.graphed(step, device, None if device == "cuda" else record_nothing)
    pairs = list(zip(recorded(*inputs), step(*on_device())))
    apart = max((ours - theirs).abs().max().item() / theirs.abs().max().item() for ours, theirs in pairs)
    report.row(script=name, what="acting, graph", envs=own.num_envs, differs=apart)
    report.differences.append(apart)
    calls = {"acting": lambda: step(*on_device())[0].argmax(-1).cpu(), "update": update}
    return calls | {"acting, graph": lambda: recorded(*inputs)[0].argmax(-1).cpu()}


def graph_calls(report, name, device, own, update, fixed, parts, network, heads, rows):
    """{"update, graph": call}; three updates of it are compared with three of `update` from the same weights."""
    update()  # the optimizer makes its state
    restore, after = keep(*parts), []
    for way in (update, as_graph(fixed, restore, device)):
        restore()
        for _ in range(3):
            (loss,) = way()
        after.append([v.detach().clone() for v in network.parameters()])
    apart = max((a - b).abs().max().item() for a, b in zip(*after))
    report.row(script=name, what="update, graph", rows=rows, differs=apart, loss=loss.item())
    report.differences.append(apart)
    return {"update, graph": way}


# ----------------------------------------------------------------------------------------------------------------------
# d. Learning
def start(folder, script, *flags, processes=None):
    """A script in a process of its own, which writes to log.txt in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *map(str, flags)]
    if processes:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    log = open(folder / "log.txt", "a")
    return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stop(process):
    """Ends it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end(process):
    """As `stop`, but gives a part's process time to stop what it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        stop(process)


def last_return(folder):
    """The mean return that the run's evaluation printed; None if it has not."""
    text = (folder / "log.txt").read_text(errors="replace")
    found = text.rpartition("evaluation: episodic_return=")[2] if "evaluation: episodic_return=" in text else ""
    return float(found.split(",")[0]) if found else None


def weights(folder):
    import torch

    (path,) = folder.glob("runs/*/model.pt")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved["agent" if "agent" in saved else "q_network"]


def apart(one, other):
    """The largest difference of two runs' final weights."""
    one, other = weights(one), weights(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def learning(report, args):
    cuda, scripts, root = args.device == "cuda", ROOT / "single_files", Path(tempfile.mkdtemp(prefix="cuda-"))
    flags = ["--cuda"] if cuda else ["--eval-episodes", 4]
    small = {"dqn": "--total-timesteps 6000 --learning-starts 1000 --checkpoint-interval 1000 --eval-episodes 4".split()}
    small["ppo"] = "--total-timesteps 26624 --checkpoint-interval 4000 --eval-episodes 4".split()
    long = {"dqn_tbb_ffm": 0.95, "ppo_tbb_lru": 0.95, "ppo_tbb_lru_minigrid_envpool": 0.929}
    running = {}
    try:
        for name in long:
            if "envpool" in name and importlib.util.find_spec("envpool") is None:
                report.row(run=name, skipped="envpool is not installed")
                continue
            short = [] if cuda else ["--total-timesteps", 7000]
            seed = ["--seed", 2] if "minigrid" in name else []
            running[name] = start(root / name, scripts / f"{name}.py", *flags, *short, *seed), time.time()
        for algorithm, name in (("dqn", "dqn_tbb_ffm"), ("ppo", "ppo_tbb_lru")):
            folders = [root / f"{algorithm}-{what}" for what in ("one", "same", "killed")]
            others = [start(folder, scripts / f"{name}.py", *flags, *small[algorithm]) for folder in folders]
            try:
                seen, file = set(), "runs/*/checkpoint.pt"
                while len(seen) < 3 and others[2].poll() is None and report.left() > 5:
                    seen |= {path.stat().st_mtime_ns for path in folders[2].glob(file)}
                    time.sleep(0.02)
                stop(others[2])
                (run,) = folders[2].glob("runs/*")
                others[2] = start(folders[2], scripts / f"{name}.py", "--resume", run)
                for process in others:
                    process.wait(timeout=max(1, report.left()))
                for what, folder in (("equal seeds", folders[1]), ("killed and resumed", folders[2])):
                    difference = apart(folders[0], folder)
                    report.row(run=name, what=f"{what}: largest difference of weights", figure=difference)
                    report.bar(f"d: {name}, {what}: largest difference of weights", "<=", 0, difference)
            except Exception as error:
                report.row(run=name, what="equal seeds, killed and resumed", skipped=first_line(error))
            finally:
                for process in others:
                    stop(process)
        while running and report.left() > 1:
            for name, (process, began) in list(running.items()):
                if process.poll() is not None:
                    running.pop(name)
                    value, log = last_return(root / name), (root / name / "log.txt").read_text(errors="replace")
                    why = {} if process.returncode == 0 else {"skipped": log.strip().rpartition("\n")[2][:150]}
                    trained = re.search(r"trained for .* ([\d.]+) seconds", log)  # without its evaluation and its start
                    seconds = float(trained[1]) if trained else time.time() - began
                    report.row(run=name, what="greedy return", figure=value, seconds=seconds, **why)
                    if cuda:
                        report.bar(f"d: {name} --cuda: greedy return", ">=", long[name], value)
            time.sleep(0.2)
        for name in running:
            log = (root / name / "log.txt").read_text(errors="replace").strip()
            report.row(run=name, what="greedy return", skipped=f"out of time; {log[-80:]}")
    finally:
        for process, _ in running.values():
            stop(process)
        shutil.rmtree(root, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# e. Processes
def processes(report, args):
    root, name = Path(tempfile.mkdtemp(prefix="cuda-")), "ppo_tbb_lru_multigpu"
    train = ["--cuda", "--total-timesteps", 33_280] if args.device == "cuda" else ["--total-timesteps", 6656]
    scan = ["--child", "sharded", root / "sharded.json", "--device", args.device]
    training = ROOT / "single_files" / f"{name}.py"
    for what, script, flags in (
        ("training, one process", training, [*train, "--eval-episodes", 4]),
        ("scan, one process", __file__, scan),
    ):
        folder, began = root / what.split(",")[0].replace(" ", "-"), time.time()
        process = start(folder, script, *flags, processes=1)
        try:
            process.wait(timeout=max(1, report.left()))
            log = (folder / "log.txt").read_text(errors="replace").strip()
            why = {} if process.returncode == 0 else {"skipped": log.rpartition("\n")[2][:150]}
            report.row(run=f"{name}, {what}", seconds=time.time() - began, exit_status=process.returncode, **why)
            report.bar(f"e: torchrun, {what}: exit status", "<=", 0, abs(process.returncode))
        except subprocess.TimeoutExpired:
            report.row(run=f"{name}, {what}", skipped="out of time")
        finally:
            stop(process)
    if (root / "sharded.json").exists():
        for line in (root / "sharded.json").read_text().splitlines():
            report.say(**json.loads(line))
    shutil.rmtree(root, ignore_errors=True)


def sharded(report, args):
    import torch
    import torch.distributed as dist

    from cleanrl_memoroid.scan import linear_scan
    from cleanrl_memoroid.scan_sharded import sharded_linear_scan

    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    x = torch.randn(5000, 64, dtype=torch.complex64, device=args.device, requires_grad=True)
    decay = torch.polar(torch.full((64,), 0.99), torch.rand(64)).to(args.device)
    begins = (torch.rand(5000) < 0.01).to(args.device)
    found = [scan(decay, x, begins) for scan in (sharded_linear_scan, linear_scan)]
    pairs = [(h, *torch.autograd.grad(h.abs().sum(), x)) for h in found]
    apart = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(*pairs))
    report.bar(f"e: scan over {dist.get_world_size()} rank: largest error", "<=", 1e-6, apart)
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# f. Pong
def pong(report, args):
    if importlib.util.find_spec("envpool") is None:
        report.row(skipped="envpool is not installed")
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, name = Path(tempfile.mkdtemp(prefix="cuda-")), "ppo_tbb_lru_atari_envpool"
    flags = ["--cuda"] if args.device == "cuda" else ["--hidden-size", 32, "--cnn-channels", 4]
    process = start(root, ROOT / "single_files" / f"{name}.py", *flags, "--total-timesteps", 10**7, "--no-anneal-lr")
    try:
        while process.poll() is None and report.left() > 6:
            time.sleep(0.5)
        ended = process.poll()
    finally:
        stop(process)
    log, folders = (root / "log.txt").read_text(errors="replace").strip(), list(root.glob("runs/*"))
    events = EventAccumulator(str(folders[0]), size_guidance={"scalars": 0}).Reload() if folders else None
    for tag in ("charts/SPS", "charts/episodic_return", "losses/logprob_error"):
        found = events.Scalars(tag) if events and tag in events.Tags()["scalars"] else []
        if found:
            values = [event.value for event in found[-20:]]
            what, mean = f"{tag}, mean of the last {len(values)}", float(np.mean(values))
            report.row(run=name, what=what, step=found[-1].step, figure=mean)
    if ended is not None:
        report.row(run=name, skipped=f"it ended by itself, {ended}: {log.rpartition(chr(10))[2][:150]}")
    shutil.rmtree(root, ignore_errors=True)


RUN = {"a": parity, "b": scan_times, "c": script_times, "d": learning, "e": processes, "f": pong, "sharded": sharded}


# ----------------------------------------------------------------------------------------------------------------------
# The command itself. It never touches the card.
WHERE = """
import json, platform, sys
found = {"python": platform.python_version()}
try:
    import torch
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory_GB": round(card.total_memory / 1e9), "capability": f"{card.major}.{card.minor}"}
except Exception as error:
    found["problem"] = f"{type(error).__name__}: {error}"[:200]
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["without triton"] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps(found))
"""


def look_around():
    """What this machine has: card (missing: none), driver, versions."""
    done = subprocess.run([sys.executable, "-c", WHERE], capture_output=True, text=True)
    found = json.loads(done.stdout.strip().rpartition("\n")[2]) if done.returncode == 0 else {"problem": done.stderr[-200:]}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    return found | {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))}


def install(wheels):
    """Puts wheels into a folder of their own, first on the path of every process from here on."""
    folder = tempfile.mkdtemp(prefix="wheels-")
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"--wheels {wheels}: expected a folder of *.whl files, found none; see docs/cuda.md")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", folder]
    subprocess.run([*command, *files], check=True)
    return folder


def begin_part(part, args, device, seconds, folder, share=(0, 1)):
    """(process, its file, its deadline)"""
    file = folder / f"{part}-{share[0]}.jsonl"
    command = [sys.executable, __file__, "--child", part, file, "--seconds", seconds, "--device", device, "--share", *share]
    log = open(folder / f"{part}-{share[0]}.log", "w")
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return process, file, time.time() + seconds + 10  # a part ends by itself; this is for one that hangs


def collect(begun, part, seconds):
    """Rows, bars and state of a part from its processes, which have ended or will not."""
    rows, bars, errors = [], [], []
    for process, file, _ in begun:
        for line in file.read_text().splitlines() if file.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off
                what = json.loads(line)
                rows += [what["row"]] if "row" in what else []
                bars += [what["bar"]] if "bar" in what else []
                errors += [what["error"]] if "error" in what else []
        if process.returncode and not errors:
            log = file.with_suffix(".log").read_text(errors="replace").strip()
            errors.append(f"ended with {process.returncode}: {log.rpartition(chr(10))[2][:200]}")
    return outcome(part, "failed" if errors else "done", seconds, "; ".join(errors), rows, bars)


def outcome(part, state, seconds=0.0, why="", rows=(), bars=()):
    return {"part": part, "title": TITLES[part], "state": state, "seconds": seconds, "why": why, "rows": rows, "bars": bars}


def joined_bars(bars):
    """Bars of parts that several processes shared: the worst of them."""
    shares = [bar for bar in bars if ", share " in bar[0]]
    if not shares:
        return bars
    figures = [bar[3] for bar in shares if bar[3] is not None]
    cases = sum(int(bar[0].split(" cases")[0].split()[-1]) for bar in shares)
    text = f"a: largest relative error of values and gradients, {cases} cases"
    return [[text, *shares[0][1:3], max(figures, default=None)]] + [bar for bar in bars if bar not in shares]


def verdict(sign, wanted, figure):
    if figure is None or math.isnan(figure):
        return "not measured"
    return "met" if (figure <= wanted if sign == "<=" else figure >= wanted) else "missed"


def write(out, where, parts):
    """All files anew, each under another name first: a_parity.csv and so on, and summary.md. Returns the summary's tables."""
    shown = ", ".join(f"{name} {value}" for name, value in where.items())
    for part in parts:
        if part["rows"]:
            with contextlib.redirect_stdout(None):
                write_csv(f"{part['part']}_{part['title']}", shown, part["rows"], argparse.Namespace(out=out))
    states = [{k: part[k] for k in ("part", "title", "state", "seconds", "why")} for part in parts]
    bars = []
    for part in parts:
        for text, sign, wanted, figure in joined_bars(part["bars"]):
            shown_figure = "" if figure is None else float(figure)
            row = {"bar": text, "wanted": f"{sign} {wanted:g}", "figure": shown_figure}
            bars.append(row | {"verdict": verdict(sign, wanted, figure)})
    lines = ["# CUDA, measured", "", shown, ""]
    for table in (states, bars):
        if table:
            lines += [f"| {' | '.join(table[0])} |", "| --- " * len(table[0]) + "|"]
            lines += [f"| {' | '.join(cell(v).replace('|', '/') for v in row.values())} |" for row in table] + [""]
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "summary.partial"
    partial.write_text("\n".join(lines))
    os.replace(partial, out / "summary.md")
    return states, bars


def child(args):
    part, file = args.child
    report = Report(file, time.time() + args.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what it has started is stopped, too
    try:
        RUN[part](report, args)
    except BaseException as error:
        report.say(error=first_line(error))
        traceback.print_exc()
        sys.exit(1)


def main(args):
    began = time.time()
    if args.wheels:
        os.environ["PYTHONPATH"] = os.pathsep.join([install(args.wheels), *filter(None, [os.getenv("PYTHONPATH")])])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes side by side would ask for all cores, each
    where = look_around()
    card = where.get("card")
    device = "cuda" if card and not args.rehearse else "cpu"
    name = card if device == "cuda" else "rehearsal" if args.rehearse else "no card"
    out = args.out or ROOT / "benchmark" / "results" / "cuda" / name.lower().replace(" ", "-")
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    parts, started, folder = [], [], Path(tempfile.mkdtemp(prefix="cuda-parts-"))

    def skip(part, why):
        parts.append(outcome(part, "skipped", why=why))
        tell()

    def tell():
        last = parts[-1]
        print(f"{last['part']} {last['title']}: {last['state']}, {last['seconds']:.0f} seconds {last['why']}", flush=True)

    def run(together):
        """Some parts side by side; their results are written before this returns."""
        start_time, begun = time.time(), {}
        for part in together:
            seconds = min(SECONDS[part] * (1 if device == "cuda" else 4), args.seconds - (time.time() - began))
            if seconds < 5:
                skip(part, "no time is left")
                continue
            # compiling takes most of part a's time, and each process compiles its own kernels
            shares = max(1, min(8, where["cores"] // 2 - 1)) if part == "a" and device == "cuda" else 1
            begun[part] = [begin_part(part, args, device, seconds, folder, (i, shares)) for i in range(shares)]
            started.extend(process for process, *_ in begun[part])
        waiting = dict(begun)
        while waiting:
            for part, processes in list(waiting.items()):
                for process, _, deadline in processes:
                    if process.poll() is None and time.time() > deadline:
                        end(process)
                if all(process.poll() is not None for process, *_ in processes):
                    parts.append(collect(waiting.pop(part), part, time.time() - start_time))
                    write(out, where, parts)
                    tell()
            time.sleep(0.05)

    try:
        for together in ("ad", "b", "c", "e", "f"):
            wanted = [part for part in together if part in args.parts]
            if device == "cpu" and not args.rehearse:
                for part in [part for part in wanted if part != "a"]:
                    skip(part, "PyTorch finds no CUDA device")
                wanted = [part for part in wanted if part == "a"]
            if "a" in wanted and "triton" not in where:
                skip("a", f"triton cannot be imported: {where.get('without triton')}")
                wanted.remove("a")
            run(wanted)
    finally:
        for process in started:  # after Ctrl-C, say
            end(process)
        parts.sort(key=lambda part: part["part"])
        states, bars = write(out, where, parts)
        shutil.rmtree(folder, ignore_errors=True)
    print_table(states, f"parts, {time.time() - began:.0f} seconds")
    if bars:
        print_table(bars, "bars")
    print(f"written to {out}")
    return parts


if __name__ == "__main__":
    args = parse_args()
    if args.child:
        child(args)
    else:
        found = main(args)
        sys.exit(any(part["state"] == "failed" for part in found))
