"""What makes a sparse student small: `single_files/bpd_*.py` saves what `compact` returns, and reports what `costs` does.

Both take a student's weights by name, as the scripts save them: memory.{E,B,R}.{weight,bias}, memory.{nu,theta,gamma} and
V.{weight,bias}, where a weight that was dropped is zero. The rest finds the teacher, checks flags, and tries other thresholds.
"""

import copy
import glob
import os
import pickle
import time

import gymnasium as gym
import numpy as np
import torch


def read_teacher(args, newest, folder):
    """The model.pt of a teacher, as its script saved it.

    Args:
        args: its `teacher` is a run directory; if it is None, it becomes the newest run of the script `newest` in runs/. Its
            `teacher_script` is the path of the script that trained it, or None, if that lies in `folder`.
        newest: the name of a script.
        folder: where this script lies.
    Raises: ValueError if there is no such run, model or script, or if it is none of DQN or PPO.
    """
    if args.teacher is None:
        found = sorted(glob.glob(f"runs/*{newest}__*/model.pt"), key=os.path.getmtime)
        if not found:
            remedy = f"train one in a minute or two: python single_files/{newest}.py"
            raise ValueError(f"--teacher: expected a run directory, got none, and there is no such run in runs/; {remedy}")
        args.teacher = os.path.dirname(found[-1])
    path = os.path.join(args.teacher, "model.pt")
    if not os.path.exists(path):
        raise ValueError(f"--teacher: expected a file {path}, got none; see `ls runs` for runs that have ended")
    try:
        saved = torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"--teacher: expected a file {path}, got one that cannot be read ({why}); name another run"
        ) from error
    if not {"agent", "q_network"} & saved.keys() or saved["script"].startswith(("sapg_", "bpd_", "ad_")):
        raise ValueError(f"--teacher: expected a run of a DQN or PPO script, got one of {saved['script']}; name another run")
    script = args.teacher_script or os.path.join(folder, saved["script"])
    if not os.path.exists(script):
        raise ValueError(f"--teacher-script: expected the file {saved['script']}, got none at {script}; name where it lies")
    return saved


def check_cuts(args):
    """Raises ValueError if the flags that say how many weights to drop do not fit the kind of student."""
    if not all(0 <= share < 1 for share in args.target_sparsity):
        got = f"{args.target_sparsity}; 0.97 leaves 3 of 100 weights"
        raise ValueError(f"--target-sparsity: expected shares below 1, got {got}")
    if args.student == "magnitude" and len(args.target_sparsity) != 1:
        raise ValueError(f"--target-sparsity: magnitude prunes as it trains, to one, got {args.target_sparsity}; name one")
    if args.c_threshold and args.student != "svd":
        raise ValueError(f"--c-threshold: expected --student svd, got {args.student}; use --target-sparsity")


def check_spaces(saved, envs, env_id, path):
    """Raises ValueError if a student that was saved does not read the observations, or has not the actions, of environments.

    Args:
        saved: the content of its model.pt or checkpoint.pt.
        envs: a vector environment.
        env_id, path: for the error.
    """
    weights = saved["agent"] if "agent" in saved else saved["state"]["student"].state_dict()
    sizes = gym.spaces.flatdim(envs.single_observation_space), gym.spaces.flatdim(envs.single_action_space)
    if (weights["memory.E.weight"].shape[1], len(weights["V.weight"])) != sizes:
        raise ValueError(f"--env-id {env_id}, or sizes of layers: not those of the network in {path}; leave them out")


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


def sweep(student, prune, performance):
    """What thresholds of log alpha would leave, without fine-tuning: a row for each, which is printed.

    Args:
        student: as it was trained; its masks stay as they are.
        prune: the script's, (student, by, kind, value) -> student.
        performance: student -> percent between random actions and the teacher.
    """
    rows = []
    for threshold in (8, 5, 3, 1, 0, -2, -4):
        cut = prune(copy.deepcopy(student), "log_alpha", "threshold", threshold)
        kept = torch.cat([layer.mask.flatten() for layer in cut.layers().values()])
        row = {"threshold": threshold, "sparsity": 100 * (1 - int(kept.sum()) / len(kept))}
        row["performance"] = performance(cut)
        print("C {threshold:2d}: sparsity {sparsity:.1f} %, performance {performance:.1f} without fine-tuning".format(**row))
        rows.append(row)
    return rows
