"""What makes a sparse student small: `single_files/bpd_*.py` saves what `compact` returns, and reports what `costs` does.

Both take a student's weights by name, as the scripts save them: memory.{E,B,R}.{weight,bias}, memory.{nu,theta,gamma} and
V.{weight,bias}, where a weight that was dropped is zero.
"""

import time

import numpy as np
import torch


@torch.no_grad()
def compact(weights):
    """The weights of a smaller student that acts the same: with as many units and channels as are alive.

    A unit without incoming weights is a constant: what reads it takes it into its biases. A channel that is not written is
    zero; one that is written by its bias alone counts time, and stays. What nobody reads goes. Each can make another one
    useless, hence the loop.
    """
    names = "memory.E", "memory.B", "memory.R", "V"
    E, B, R, V = (weights[f"{name}.weight"].clone() for name in names)
    e, b, c, v = (weights[f"{name}.bias"].clone() for name in names)
    nu, theta, gamma = (weights[f"memory.{name}"] for name in ("nu", "theta", "gamma"))
    channels, before = len(nu), None
    while before != (before := [int((w != 0).sum()) for w in (E, B, R, V)]):
        lift, constant = R[:, 2 * channels :], (E == 0).all(1)  # a view: what R reads of z
        b += B[:, constant] @ torch.tanh(e[constant])
        c += lift[:, constant] @ torch.tanh(e[constant])
        B[:, constant] = 0
        lift[:, constant] = 0
        constant = (R == 0).all(1)
        v += V[:, constant] @ torch.relu(c[constant])
        V[:, constant] = 0
        written = ((B != 0).any(1) | (b != 0)).view(2, -1).any(0)
        R[:, : 2 * channels][:, ~written.repeat(2)] = 0
        R[(V == 0).all(0)] = 0  # nobody reads these units
        read = (R[:, : 2 * channels] != 0).any(0).view(2, -1).any(0)
        B[~read.repeat(2)] = 0
        b[~read.repeat(2)] = 0
        E[~((B != 0).any(0) | (lift != 0).any(0))] = 0
    units, outs = (E != 0).any(1), (R != 0).any(1)
    for alive in (units, outs, read):  # one of each stays, since nobody expects a matrix without rows
        alive[:1] |= ~alive.any()
    both = read.repeat(2)
    factor = gamma.exp().repeat(2)  # becomes part of B
    B, b = factor[:, None] * B, factor * b
    parts = (
        (E[units], e[units]),
        (B[both][:, units], b[both]),
        (R[outs][:, torch.cat([both, units])], c[outs]),
        (V[:, outs], v),
    )
    small = {"memory.nu": nu[read], "memory.theta": theta[read], "memory.gamma": torch.zeros_like(gamma[read])}
    for name, (weight, bias) in zip(names, parts):
        small |= {f"{name}.weight": weight.contiguous(), f"{name}.bias": bias}
    return small


def costs(weights):
    """What a student costs, by name: numbers to store, bytes, units that are alive, multiply-adds of a step."""
    matrices = [value for name, value in weights.items() if value.ndim == 2]
    channels, biases = len(weights["memory.nu"]), sum(len(v) for name, v in weights.items() if name.endswith("bias"))
    left, size = (sum(int(count(matrix)) for matrix in matrices) for count in (torch.count_nonzero, torch.numel))
    return {
        "units": [len(weights["memory.E.bias"]), channels, len(weights["memory.R.bias"])],  # of z, of the memory, of y
        "numbers": left + biases + 2 * channels,  # with the real and the imaginary part of each decay
        "bytes_dense": 4 * (size + biases + 2 * channels),
        # a float and a byte for its column; two bytes where each output begins
        "bytes_sparse": 5 * left + 4 * (biases + 2 * channels) + 2 * (biases + len(matrices)),
        "bytes_state": 8 * channels,
        "multiply_adds": left + 4 * channels,
    }


def latency(agent, obs, state, repetitions=300):
    """Microseconds of CPU that a step of one environment takes in PyTorch: the least, and the median."""
    times, begins = [], np.zeros(1, bool)
    for _ in range(repetitions):
        start = time.process_time_ns()
        agent.step(obs[None], begins, state)
        times.append((time.process_time_ns() - start) / 1e3)
    return [round(float(min(times)), 1), round(float(np.median(times)), 1)]
