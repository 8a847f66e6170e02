"""The script as its users run it: in a process of its own, from the shell, also killed, resumed, copied and misused."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = ROOT / "single_files" / "dqn_tbb_ffm.py"
SMALL = (
    "--total-timesteps 1500 --learning-starts 400 --hidden-size 16 --trace-size 4 --batch-size 60 --eval-episodes 5".split()
)
COUNTING = "--env-id counting_env:Counting-v0 --num-envs 3".split()


def start(folder, *flags, script=SCRIPT, path=ROOT / "tests"):
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, script, *flags], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder, *flags, **where):
    process = start(folder, *flags, **where)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def fails(folder, *flags):
    process = start(folder, *flags)
    _, err = process.communicate()
    assert process.returncode != 0
    return err.strip().splitlines()[-1]


def run_folder(folder):
    (found,) = Path(folder, "runs").iterdir()
    return found


def scalars(folder):
    """Everything logged, as {name: [(step, value)]}, without what depends on the clock."""
    events = EventAccumulator(str(run_folder(folder)), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "charts/SPS"}


def weights(folder):
    return torch.load(run_folder(folder) / "dqn_tbb_ffm.cleanrl_model", weights_only=True)["q_network"]


def test_a_run_logs_saves_and_evaluates(tmp_path):
    out = run(tmp_path, *SMALL).splitlines()
    assert "popgym-RepeatFirstEasy-v0" in out[0] and "random actions for 400 steps" in out[1]
    assert out[-1].startswith("evaluation: episodic_return=") and "(5 greedy episodes" in out[-1]
    assert any(line.startswith("global_step=") and "SPS=" in line for line in out)  # plain lines where there is no terminal
    logged = scalars(tmp_path)
    names = "charts/episodic_return charts/episodic_length losses/td_loss losses/q_values charts/epsilon charts/buffer_fill"
    assert set(names.split()) <= set(logged)
    assert len(logged["eval/episodic_return"]) == 5
    assert {value for _, value in logged["charts/episodic_length"]} == {51.0}
    again = run(tmp_path, "--evaluate", run_folder(tmp_path), "--eval-episodes", "5")
    assert again.splitlines()[-1] == out[-1]  # equal seed, equal episodes, equal weights
    assert not list(tmp_path.glob("runs/*/*.partial"))


def test_equal_seeds_give_equal_runs(tmp_path):
    logs = []
    for i, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(i)
        folder.mkdir()
        run(folder, *SMALL, "--seed", str(seed), "--train-frequency", "16")
        logs.append((scalars(folder), weights(folder)))
    assert logs[0][0] == logs[1][0] and logs[0][0]["losses/td_loss"]
    assert all(torch.equal(logs[0][1][name], logs[1][1][name]) for name in logs[0][1])
    assert logs[0][0]["losses/td_loss"] != logs[2][0]["losses/td_loss"]


def kill_and_resume(tmp_path, kills, flags):
    """Kills a run at random moments, each some checkpoints after its start, and compares it with one that nobody killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run(whole, *flags)
    process, resumed = start(killed, *flags), 0
    for _ in range(kills):
        seen, wanted = set(), random.randint(2, 4)  # a resumed run's first checkpoint is the one that it resumed from
        while len(seen) < wanted and process.poll() is None:
            seen |= {path.stat().st_mtime_ns for path in killed.glob("runs/*/checkpoint.pt")}
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.2))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, resumed = start(killed, "--resume", run_folder(killed)), resumed + 1
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert resumed > 0
    expected, got = weights(whole), weights(killed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert out.splitlines()[-1].startswith("evaluation")
    whole_log, killed_log = scalars(whole), scalars(killed)
    assert whole_log["losses/td_loss"] == killed_log["losses/td_loss"]  # nothing logged twice, nothing missing
    return resumed


def test_a_killed_run_resumes_exactly(tmp_path):
    kill_and_resume(tmp_path, 2, [*SMALL, "--total-timesteps", "4000", "--checkpoint-interval", "400"])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("env_id", ["popgym-RepeatFirstEasy-v0", "popgym-PositionOnlyCartPoleEasy-v0", "CartPole-v1"])
def test_killed_at_random_moments(tmp_path, number, env_id):
    flags = "--total-timesteps 12000 --learning-starts 2000 --checkpoint-interval 1500 --eval-episodes 2".split()
    kill_and_resume(tmp_path, 1, [*flags, "--env-id", env_id])


def test_the_tape_of_a_run_holds_what_happened(tmp_path):
    """Every episode on the tape is whole, in order, with its final observation, from one environment."""
    for truncation in ("", "--truncation-is-terminal"):
        folder = tmp_path / (truncation or "bootstrap")
        folder.mkdir()
        run(folder, *COUNTING, *SMALL, "--buffer-size", "700", "--checkpoint-interval", "1400", *truncation.split())
        buffer = torch.load(run_folder(folder) / "checkpoint.pt", weights_only=False)["tape_buffer"]
        numbers = set()
        assert buffer["newest"] - buffer["oldest"] > 50
        for e in range(buffer["oldest"], buffer["newest"]):
            slot = e % (700 // 2)
            begin, rows = buffer["episode_begins"][slot], buffer["episode_rows"][slot]
            at = (begin + np.arange(rows)) % 700
            obs = buffer["obs"][at]
            assert (obs[:, 2] == np.arange(rows)).all()  # from the first observation to the final one
            assert len(set(obs[:, 0])) == 1 and len(set(obs[:, 1])) == 1  # of one environment and one episode
            np.testing.assert_array_equal(buffer["rewards"][at[:-1]], obs[1:, 2])  # the reward of the step to the next row
            assert set(buffer["actions"][at[:-1]]) <= {0, 1, 2}
            terminated = bool(truncation) or obs[0, 1] % 2 == 0
            assert buffer["terminations"][at].tolist() == [False] * (rows - 2) + [terminated, False]
            numbers.add(obs[0, 0])
        assert len(numbers) == 3


def test_an_environment_that_cannot_be_saved_resumes_with_new_episodes(tmp_path):
    flags = ["--env-id", "counting_env:Unpicklable-v0", *SMALL]
    out = run(tmp_path, *flags, "--checkpoint-interval", "700")
    assert sum("cannot be saved" in line for line in out.splitlines()) == 1
    assert run(tmp_path, "--resume", run_folder(tmp_path)).splitlines()[-1].startswith("evaluation")


def blocked(tmp_path):
    """A folder where `import cleanrl_memoroid` fails, as where it is not installed."""
    package = tmp_path / "path" / "cleanrl_memoroid"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not installed')")
    return package.parent


def test_the_file_alone_runs(tmp_path):
    copy = tmp_path / "my_agent.py"
    copy.write_bytes(SCRIPT.read_bytes())
    out = run(tmp_path, *SMALL, script=copy, path=blocked(tmp_path))
    assert "evaluation: episodic_return=" in out and "this file's own scan" in out


@pytest.mark.slow
def test_the_file_alone_learns(tmp_path):
    copy = tmp_path / "my_agent.py"
    copy.write_bytes(SCRIPT.read_bytes())
    out = run(tmp_path, script=copy, path=blocked(tmp_path)).splitlines()[-1]
    assert float(out.split("episodic_return=")[1].split()[0]) >= 0.99, out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_task_that_needs_memory_is_learned(tmp_path, seed):
    out = run(tmp_path, "--seed", str(seed)).splitlines()[-1]
    assert float(out.split("episodic_return=")[1].split()[0]) >= 0.99, out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id popgym-PositionOnlyPendulumEasy-v0", "expected a Discrete action space, got Box.*PPO.*finite choice"),
        ("--env-id counting_env:Counting-v0 --env-kwargs {k:1}", "--env-kwargs: expected a JSON object.*got '{k:1}'"),
        ("--env-id counting_env:Counting-v0 --env-kwargs [1]", "--env-kwargs: expected a JSON object"),
        ("--resume nowhere", "expected a run's directory with a file checkpoint.pt.*got 'nowhere'"),
        ("--resume nowhere --seed 3", "under its own flags, got also seed; drop them"),
        ("--evaluate nowhere", "expected a run's directory with a file dqn_tbb_ffm.cleanrl_model.*'nowhere'"),
        ("--buffer-size 20", "--buffer-size 20: an episode of 51 steps takes 52 rows; use a larger one"),
        ("--num-envs 0", "--num-envs: expected at least 1, got 0"),
        ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
        ("--train-frequency 0", "--train-frequency: expected at least 1, got 0"),
        ("--capture-video", "--capture-video: expected an environment that renders, popgym-RepeatFirstEasy-v0 does not"),
        pytest.param(
            "--cuda", "PyTorch finds none", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_errors_say_what_to_do(tmp_path, flags, message):
    last = fails(tmp_path, *flags.split())
    assert re.search(message, last), last


def test_an_image_environment_is_refused_before_training(ffm):
    image = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    with pytest.raises(ValueError, match="expected vector observations.*FlattenObservation"):
        ffm.check_spaces("X-v0", image, gym.spaces.Discrete(2))
    with pytest.raises(ValueError, match="expected a Discrete action space"):
        ffm.check_spaces("X-v0", gym.spaces.Box(0, 1, (2,)), gym.spaces.MultiDiscrete([2, 2]))


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    flags = ["--env-kwargs", '{"reward": 1e38}', "--checkpoint-interval", "300"]
    last = fails(tmp_path, *COUNTING, *SMALL, *flags)
    assert "FloatingPointError: global_step=" in last and "checkpoint.pt" in last and "--learning-rate" in last
    checkpoint = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=False)
    assert all(torch.isfinite(v).all() for v in checkpoint["q_network"].values())


def popgym_ids():
    import popgym  # noqa: F401  registers its environments

    return sorted(name for name in gym.registry if name.startswith("popgym-") and "Pendulum" not in name)


@pytest.mark.parametrize("env_id", popgym_ids())
def test_every_popgym_environment_with_finite_actions_is_wrapped(ffm, env_id):
    for prev_action in (True, False):
        env = ffm.make_env(env_id, {}, prev_action)()
        ffm.check_spaces(env_id, env.observation_space, env.action_space)
        obs, _ = env.reset(seed=0)
        for action in (0, env.action_space.n - 1):
            assert env.observation_space.contains(obs)
            obs, *_ = env.step(action)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [*popgym_ids(), "CartPole-v1", "Acrobot-v1", "FrozenLake-v1"])
def test_every_environment_trains(tmp_path, env_id):
    flags = "--total-timesteps 2000 --learning-starts 500 --eval-episodes 2 --learning-starts 200".split()
    run(tmp_path, "--env-id", env_id, *flags)
    assert all(np.isfinite(value) for _, value in scalars(tmp_path).get("losses/td_loss", []))


def test_constructor_arguments_reach_the_environment(ffm):
    env = ffm.make_env("popgym-RepeatPreviousEasy-v0", ffm.parse_env_kwargs('{"k": 10, "num_decks": 2}'))()
    assert env.unwrapped.k == 10 and env.unwrapped.max_episode_length == 103
    assert env.observation_space.shape == (10,)  # suit, previous action, first-step flag
    assert ffm.make_env("popgym-RepeatPreviousEasy-v0", {}, prev_action=False)().observation_space.shape == (6,)


def test_evaluation_counts_episodes_evenly(ffm):
    """Environments whose episodes are short must not fill the count: of 10 episodes in 4 environments, 3, 3, 2 and 2."""

    class Fixed(gym.Env):
        observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2)

        def __init__(self, length):
            self.length = length

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(2, np.float32), 1.0, self.t == self.length, False, {}

    network = ffm.QNetwork(gym.vector.SyncVectorEnv([lambda: Fixed(1)]), ffm.Args(hidden_size=8, trace_size=2))
    makers = [lambda length=length: Fixed(length) for length in (1, 2, 30, 40)]
    returns = ffm.evaluate(network, makers, 10, [0] * 4, "cpu")
    assert sorted(returns) == [1] * 3 + [2] * 3 + [30] * 2 + [40] * 2
    assert len(ffm.evaluate(network, makers, 2, [0] * 4, "cpu")) == 2
