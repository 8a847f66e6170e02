"""Exported policies act as the networks that they come from: as C, as NumPy, as ONNX."""

import importlib.util
import re
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import load_script, run, run_folder

from cleanrl_memoroid import export as exporting
from cleanrl_memoroid.export_c import Writer, compiled, write_c
from cleanrl_memoroid.trace import Program, trace

MEMORIES = "ffm lru glru mingru s5 linattn".split()
SCRIPTS = [*(f"{family}_{memory}" for family in ("dqn_tbb", "ppo_tbb") for memory in MEMORIES), "ppo_sbb_lstm"]
SMALL = {"hidden_size": 16, "state_size": 4, "trace_size": 4, "key_size": 4, "value_size": 4}

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: the header is not compiled here"
)


def agent_of(script):
    """An untrained network of a script, small, with heads that are not close to zero; and its environment."""
    module = load_script(script)
    sizes = {name: size for name, size in SMALL.items() if name in module.Args.__dataclass_fields__}
    args = module.Args(**sizes)
    envs = gym.vector.SyncVectorEnv([module.make_env(args.env_id, args.env_kwargs, args.prev_action)])
    agent = (module.Agent if hasattr(module, "Agent") else module.QNetwork)(envs, args)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return agent, envs


def exported(agent, envs, to, folder, script="script", sparse=exporting.SPARSE):
    """(program, step) of a network's export."""
    program = trace(agent, envs.single_observation_space.shape[0], exporting.initial_state(agent))
    if to == "c":
        write_c(program, folder / "policy.h", script, sparse)
        return program, compiled(folder / "policy.h", folder)
    if to == "npz":
        exporting.write_npz(program, folder / "policy.npz")
        return program, exporting.NumpyPolicy(folder / "policy.npz").step
    exporting.write_onnx(program, folder / "policy.onnx")
    return program, exporting.onnx_step(folder / "policy.onnx")


@needs_compiler
@pytest.mark.parametrize("script", [*SCRIPTS, "ppo_tbb_lru_continuous_action"])
def test_every_script_is_exported(tmp_path, script):
    """With resets in the middle of episodes; each export keeps a state of its own."""
    agent, envs = agent_of(script)
    rows = exporting.played(envs, 200)
    assert 2 < sum(begin for _, begin in rows) < 20
    for to in ("c", "npz"):
        _, step = exported(agent, envs, to, tmp_path)
        assert exporting.largest_error(agent, step, rows) < exporting.TOLERANCE, to


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_glru", "ppo_sbb_lstm"])
def test_onnx(tmp_path, script):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    agent, envs = agent_of(script)
    _, step = exported(agent, envs, "onnx", tmp_path)
    assert exporting.largest_error(agent, step, exporting.played(envs, 100)) < exporting.TOLERANCE


@needs_compiler
def test_rows_of_a_sparse_matrix(tmp_path):
    """Weights at zero are left out: in a row without any, in the last row, in a column without any."""
    agent, envs = agent_of("ppo_tbb_lru_continuous_action")
    for parameter in agent.memory.parameters():
        if parameter.ndim == 2:
            parameter.data *= torch.rand_like(parameter) < 0.1
            parameter.data[[len(parameter) // 2, -1]] = 0
    rows = exporting.played(envs, 100)
    texts = []
    for sparse in (0, 1):
        _, step = exported(agent, envs, "c", tmp_path, sparse=sparse)
        assert exporting.largest_error(agent, step, rows) < exporting.TOLERANCE
        texts.append((tmp_path / "policy.h").read_text())
    assert "static const uint8_t k" in texts[1] and "static const uint8_t k" not in texts[0]
    assert len(texts[1]) < len(texts[0])
    (tmp_path / "policy.h").write_text(texts[1].replace("action[i] = ", "action[i] = 1.0f + "))
    other = compiled(tmp_path / "policy.h", tmp_path)  # not the library of that name which is loaded already
    assert exporting.largest_error(agent, other, rows) > 0.3


def test_the_numpy_policy_needs_numpy_alone(tmp_path):
    agent, envs = agent_of("dqn_tbb_linattn")
    _, step = exported(agent, envs, "npz", tmp_path)
    text = (tmp_path / "policy.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {"json", "math", "numpy"}
    spec = importlib.util.spec_from_file_location("policy", tmp_path / "policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    policy = module.NumpyPolicy(tmp_path / "policy.npz")
    obs = exporting.played(envs, 1)[0][0]
    for one, other in zip(policy.step(obs, True, np.zeros(policy.size)), step(obs, True, np.zeros(policy.size))):
        np.testing.assert_array_equal(one, other)


def test_gathers_of_gathers_are_one():
    program, rng = Program(), np.random.default_rng(0)
    x, y = (program.emit("input", (), size, name) for name, size in (("observation", 6), ("state", 4)))
    one, other = program.gather([x, y], [9, 0, 3, 3]), program.gather([y], [2, 1])
    both = program.gather([other, one, x], [5, 0, 2, 1, 11])
    assert program.code[both].ins == (x, y) or program.code[both].ins == (y, x)
    values = {x: rng.random(6), y: rng.random(4)}
    expected = np.concatenate([values[y][[2, 1]], np.concatenate([values[x], values[y]])[[9, 0, 3, 3]], values[x]])
    found = np.concatenate([values[source] for source in program.code[both].ins])[program.code[both].param]
    np.testing.assert_array_equal(found, expected[[5, 0, 2, 1, 11]])
    assert program.gather([x], range(6)) == x


def test_a_function_without_a_rule_is_named():
    class Odd(torch.nn.Module):
        def step(self, obs, begins, state):
            return torch.special.bessel_j0(torch.as_tensor(obs) + state), state

    with pytest.raises(NotImplementedError, match="bessel_j0.*add a rule"):
        trace(Odd(), 3, torch.zeros(1, 3))


@needs_compiler
@pytest.mark.parametrize("to", ["c", "npz"])
def test_the_command(tmp_path, capsys, monkeypatch, to):
    flags = "--total-timesteps 300 --num-envs 4 --learning-starts 220 --hidden-size 8 --trace-size 4 --eval-episodes 0"
    run(tmp_path, *flags.split(), "--checkpoint-interval", "0")
    folder = run_folder(tmp_path)
    monkeypatch.setattr("sys.argv", ["export", str(folder), "--to", to])
    exporting.main()
    out = capsys.readouterr().out
    name = "policy.h" if to == "c" else "policy.npz"
    assert re.fullmatch(
        rf"\S+/{name}: [\d,]+ bytes; over 1,000 steps with resets at most \d\.\de-\d\d from the network\n", out
    )
    assert (folder / name).exists()


@pytest.mark.parametrize(
    "flags, message", [(["nowhere"], "expected a file nowhere/model.pt, got none"), (["nowhere", "--to", "c"], "ls runs")]
)
def test_errors_say_what_to_do(monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["export", *flags])
    with pytest.raises(SystemExit, match=message):
        exporting.main()


def test_numbers_in_c_are_exact():
    writer = Writer.__new__(Writer)
    for value in np.float32([0, 1, -2, 1e-30, 3.4e38, 0.1, 1 / 3, 16777217]):
        assert np.float32(float(writer.number(value).rstrip("f"))) == value


@pytest.mark.parametrize("largest, kind", [(255, "uint8_t"), (256, "uint16_t"), (65535, "uint16_t"), (65536, "uint32_t")])
def test_places_in_c_have_the_smallest_type_that_takes_them(largest, kind):
    writer = Writer.__new__(Writer)
    writer.arrays = []
    writer.array("places", np.array([0, largest]))
    assert writer.arrays == [f"static const {kind} places[2] = {{0, {largest}}};"]
