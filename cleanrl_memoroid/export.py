"""One step of a trained policy, (observation, begin, state) -> (action, state), for machines without PyTorch.

    python -m cleanrl_memoroid.export runs/RUN --to c      # policy.h: C99, no allocation, the caller owns the state
    python -m cleanrl_memoroid.export runs/RUN --to npz    # policy.npz, and policy.py, which runs it with NumPy alone
    python -m cleanrl_memoroid.export runs/RUN --to onnx   # policy.onnx; needs `pip install 'cleanrl-memoroid[onnx]'`

For a run of any script of this project whose observations are vectors. The action is what the network returns: the mean of
continuous actions, not clipped yet; the scores of finite ones, of which the largest wins. A state is real numbers, zeros
before the first step; of complex ones, all real parts, then all imaginary parts. An export is compared with the network.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile

import gymnasium as gym
import numpy as np
import torch

from cleanrl_memoroid.export_c import compiled, write_c
from cleanrl_memoroid.trace import trace

STEPS, TOLERANCE = 1_000, 1e-5  # of the comparison with the network
SPARSE = 0.4  # matrices with a smaller share of weights than this are stored by rows, each weight with its column
FUNCTIONS = {op: getattr(np, op) for op in "exp tanh sqrt reciprocal abs expm1 log".split()}
FUNCTIONS |= {"neg": np.negative, "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
FUNCTIONS |= {"max": np.maximum, "min": np.minimum, "where": lambda begins, x, y: np.where(begins > 0, x, y)}
FUNCTIONS |= {"sigmoid": lambda x: 0.5 + 0.5 * np.tanh(0.5 * x)}  # this form does not overflow
FUNCTIONS |= {"erf": np.vectorize(math.erf, otypes=[np.float32])}


class NumpyPolicy:
    """policy = NumpyPolicy("policy.npz"); action, state = policy.step(observation, begin, state), at first np.zeros(size)."""

    def __init__(self, path):
        self.arrays = dict(np.load(path))
        self.code, self.outputs = (json.loads(str(self.arrays[name])) for name in ("code", "outputs"))
        self.size = {param: size for op, _, size, param in self.code if op == "input"}["state"]

    def step(self, observation, begin, state):
        inputs, values = {"observation": observation, "begin": [begin], "state": state}, []
        for i, (op, ins, _, param) in enumerate(self.code):
            x = [values[j] for j in ins]
            if op == "input":
                y = np.asarray(inputs[param], np.float32)
            elif op == "const":
                y = self.arrays[f"v{i}"]
            elif op == "linear":
                weight, bias = self.arrays[f"w{i}"], self.arrays[f"b{i}"]
                y = (x[0].reshape(-1, weight.shape[1]) @ weight.T + bias).ravel()
            elif op == "gather":
                y = np.concatenate(x)[self.arrays[f"v{i}"]]
            elif op == "sum":
                y = x[0].reshape(-1, param).sum(1)
            else:
                y = FUNCTIONS[op](*x)
            values.append(y)
        return values[self.outputs["action"]], values[self.outputs["state"]]


def write_npz(program, path):
    """policy.npz; beside it policy.py, this class with what it needs."""
    arrays, code = {}, []
    for i, (op, ins, size, param) in enumerate(program.code):
        if op == "linear":
            arrays[f"w{i}"], arrays[f"b{i}"] = param
        elif op in ("const", "gather"):
            arrays[f"v{i}"] = param
        code.append([op, ins, size, param if op in ("input", "sum") else None])
    np.savez_compressed(path, code=json.dumps(code), outputs=json.dumps(program.outputs), **arrays)
    source = inspect.getsource(sys.modules[__name__])
    table = source[source.index("FUNCTIONS = {op") : source.index("class NumpyPolicy")]
    head = '"""Runs policy.npz with NumPy alone."""\n\nimport json\nimport math\n\nimport numpy as np\n\n'
    with open(os.path.join(os.path.dirname(path), "policy.py"), "w") as file:
        file.write(head + table + inspect.getsource(NumpyPolicy))


def write_onnx(program, path):
    """policy.onnx: inputs observation [O], begin [1] (0 or 1), state [S], outputs action [A], next_state [S]; all float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def const(array, kind=np.float32):
        constants.append(numpy_helper.from_array(np.asarray(array, kind), f"c{len(constants)}"))
        return constants[-1].name

    def node(op, *ins, **attributes):
        nodes.append(helper.make_node(op, list(ins), [f"n{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def shaped(x, *shape):
        return node("Reshape", x, const(shape, np.int64))

    values = []
    for op, ins, _, param in program.code:
        x = [values[j] for j in ins]
        if op == "input":
            y = param
        elif op == "const":
            y = const(param)
        elif op == "linear":
            weight, bias = param
            y = node("Add", node("MatMul", shaped(x[0], -1, weight.shape[1]), const(weight.T)), const(bias))
            y = shaped(y, -1)
        elif op == "gather":
            y = node("Gather", node("Concat", *x, axis=0) if len(x) > 1 else x[0], const(param, np.int64))
        elif op == "sum":
            y = node("ReduceSum", shaped(x[0], -1, param), const([1], np.int64), keepdims=0)
        elif op == "where":
            y = node("Where", node("Greater", x[0], const(0)), *x[1:])
        elif op == "expm1":
            y = node("Sub", node("Exp", x[0]), const(1))
        else:
            y = node(op.capitalize(), *x)
        values.append(y)
    sizes = {made.param: made.size for made in program.code if made.op == "input"}
    outs = {"action": program.outputs["action"], "next_state": program.outputs["state"]}
    nodes += [helper.make_node("Identity", [values[value]], [name]) for name, value in outs.items()]
    about = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name, size in sizes.items()]
    after = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [program.code[v].size]) for name, v in outs.items()]
    model = helper.make_model(helper.make_graph(nodes, "policy", about, after, constants))
    model.opset_import[0].version, model.ir_version = 17, 9
    onnx.checker.check_model(model)
    onnx.save(model, path)


def onnx_step(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda o, b, s: session.run(None, {"observation": o, "begin": np.array([b], np.float32), "state": s})


def load_run(folder, script=None):
    """(network, its flags, make_env) of a run's model.pt, by the script that saved it."""
    path = os.path.join(folder, "model.pt")
    if not os.path.exists(path):
        raise ValueError(f"expected a file {path}, got none; see `ls runs` for runs that have ended")
    saved = torch.load(path, "cpu", weights_only=True)
    script = script or os.path.join(os.path.dirname(__file__), "..", "single_files", saved["script"])
    if not os.path.exists(script):
        raise ValueError(f"--script: expected the file {saved['script']}, got none at {script}; name where it lies")
    spec = importlib.util.spec_from_file_location("exported_script", script)
    module = sys.modules["exported_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = module.Args(**{k: v for k, v in saved["args"].items() if k in module.Args.__dataclass_fields__})
    if not hasattr(module, "make_env"):
        raise ValueError(f"{saved['script']}: expected a script with vector observations; images have no export yet")
    envs = gym.vector.SyncVectorEnv([module.make_env(args.env_id, args.env_kwargs, args.prev_action)])
    weights = saved["agent" if "agent" in saved else "q_network"]
    if hasattr(module, "student_of"):
        return module.student_of(weights), saved["script"], envs
    agent = (module.Agent if "agent" in saved else module.QNetwork)(envs, args)
    agent.load_state_dict(weights)
    return agent, saved["script"], envs


def initial_state(agent):
    return (agent if hasattr(agent, "initial_state") else agent.memory).initial_state(1)


def flat(state):
    """A network's state as the real numbers of an export."""
    state = state.flatten()
    return (torch.cat([state.real, state.imag]) if state.is_complex() else state).numpy()


def played(envs, steps, seed=0):
    """(observation, begin) rows of random episodes, of which some begin before the last one has ended."""
    rng, rows, begin = np.random.default_rng(seed), [], True
    envs.action_space.seed(seed)
    obs, _ = envs.reset(seed=seed)
    for _ in range(steps):
        rows.append((obs[0].astype(np.float32), begin))
        obs, _, terminations, truncations, _ = envs.step(envs.action_space.sample())
        begin = bool((terminations | truncations)[0]) or rng.random() < 0.01
        if begin:
            obs, _ = envs.reset(seed=int(rng.integers(2**31)))
    return rows


def largest_error(agent, step, rows):
    """How far an export's actions are from the network's, each with a state of its own; of the largest, if above 1."""
    state, other, worst, largest = initial_state(agent), flat(initial_state(agent)), 0.0, 1.0
    for obs, begin in rows:
        action, *_, state = agent.step(obs[None], np.array([begin]), state)
        mine, other = step(obs, begin, other)
        action = flat(action[0] if isinstance(action, tuple) else action)
        worst, largest = max(worst, np.abs(action - mine).max()), max(largest, np.abs(action).max())
    return worst / largest


def export(folder, to, out=None, script=None, sparse=SPARSE, steps=STEPS):
    """Writes an export of a run, and compares it. Returns (path, largest error, or None if nothing here runs it)."""
    agent, name, envs = load_run(folder, script)
    program = trace(agent, envs.single_observation_space.shape[0], initial_state(agent))
    path = os.path.join(out or folder, f"policy.{'h' if to == 'c' else to}")
    step = None
    if to == "c":
        write_c(program, path, name, sparse)
        with tempfile.TemporaryDirectory() as scratch:
            step = compiled(path, scratch)
    elif to == "npz":
        write_npz(program, path)
        step = NumpyPolicy(path).step
    else:
        write_onnx(program, path)
        with contextlib.suppress(ImportError):
            step = onnx_step(path)
    return path, None if step is None else largest_error(agent, step, played(envs, steps))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="run directory with a model.pt")
    parser.add_argument("--to", choices=("c", "npz", "onnx"), default="c", help="what to write")
    parser.add_argument("--out", help="folder to write to (default: the run directory)")
    parser.add_argument("--script", help="path of the script that trained it (default: of that name in single_files/)")
    parser.add_argument("--sparse", type=float, default=SPARSE, help="C: matrices with a smaller share of weights become CSR")
    args = parser.parse_args()
    sys.path.append(os.getcwd())  # where `--env-id my_module:My-v0` may lie
    try:
        path, error = export(args.folder, args.to, args.out, args.script, args.sparse)
    except (ValueError, NotImplementedError, ImportError) as failure:
        raise SystemExit(f"export: {failure}") from failure
    if error is None:
        needs = {"c": "no C compiler", "onnx": "no onnxruntime"}[args.to]
        print(f"{path}: {os.path.getsize(path):,} bytes; not compared with the network: {needs} here")
        return
    print(f"{path}: {os.path.getsize(path):,} bytes; over {STEPS:,} steps with resets at most {error:.1e} from the network")
    if error > TOLERANCE:
        raise SystemExit(f"export: expected at most {TOLERANCE:.0e}: do not use it, and report it")


if __name__ == "__main__":
    main()
