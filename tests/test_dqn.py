"""The scripts as their users run them: in a process of their own, from the shell, also killed, resumed, copied and misused."""

import functools
import os
import re
import runpy
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from scripts import alone, assert_equal_runs, fails, kill_and_resume, popgym_ids, run, run_folder, scalars

SIZES = {
    "ffm": "--trace-size 4",
    "lru": "--state-size 4 --num-layers 2",
    "s5": "--state-size 4 --num-layers 2",
    "linattn": "--key-size 4 --value-size 4",
}
SCRIPTS = [f"dqn_{batching}_{memory}" for memory in SIZES for batching in ("tbb", "sbb")]
COUNTING = "--env-id counting_env:Counting-v0 --num-envs 3".split()


def small(script):
    """Flags of a run of a second or two; on RepeatFirstEasy the first episodes (51 steps, 16 environments) end at 816."""
    flags = "--total-timesteps 1500 --learning-starts 400 --hidden-size 16 --batch-size 60 --eval-episodes 5 "
    flags += SIZES[script.split("_")[-1]] + (" --segment-length 10" if "sbb" in script else "")
    return flags.split()


SMALL = small("dqn_tbb_ffm")


@pytest.fixture
def fails_here(tmp_path, monkeypatch):
    """The same in this process, where a script that soon fails has nothing to import."""

    def fails_here(flags, script="dqn_tbb_ffm"):
        path = str(ROOT / "single_files" / f"{script}.py")
        own = [] if "--resume" in flags else ["--no-tune-cpu"]  # its switches are for a whole process
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [path, *flags.split(), *own])
        with pytest.raises(ValueError) as error:
            runpy.run_path(path, run_name="__main__")
        return str(error.value)

    return fails_here


def resumable(script):
    """Flags of a run with ten checkpoints. Its second episodes begin at 1,020 and do not end, so the memory in the last
    checkpoint is that of each before it since the seventh, at 1,200; before that there are updates too."""
    flags = "--num-envs 20 --total-timesteps 2000 --train-frequency 16 --checkpoint-interval 200"
    return [*small(script), *flags.split()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """script -> (folder, output) of a finished run under its `resumable` flags, of which several tests read."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp(script)
        return folder, run(folder, *resumable(script), script=script).splitlines()

    return of


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_logs_saves_and_evaluates(finished, script):
    folder, out = finished(script)
    assert out[0].startswith(f"{script}: popgym-RepeatFirstEasy-v0") and "random actions for 400 steps" in out[1]
    assert out[-1].startswith("evaluation: episodic_return=") and "(5 greedy episodes" in out[-1]
    assert any(line.startswith("global_step=") and "SPS=" in line for line in out)  # plain lines where there is no terminal
    logged = scalars(run_folder(folder))
    names = "charts/episodic_return charts/episodic_length losses/td_loss losses/q_values charts/epsilon charts/buffer_fill"
    assert set(names.split()) <= set(logged)
    assert len(logged["eval/episodic_return"]) == 5
    assert {value for _, value in logged["charts/episodic_length"]} == {51.0}
    again = run(folder, "--evaluate", run_folder(folder), "--eval-episodes", "5", script=script)
    assert again.splitlines()[-1] == out[-1]  # equal seed, equal episodes, equal weights
    assert not list(folder.glob("runs/*/*.partial"))


@pytest.mark.parametrize("script", ["dqn_sbb_lru"])  # that of other scripts is in test_a_killed_run_resumes_exactly
def test_equal_seeds_give_equal_runs(finished, tmp_path, script):
    folder, _ = finished(script)
    run(tmp_path, *resumable(script), script=script)
    assert_equal_runs(folder, tmp_path)


def test_another_seed_gives_another_run(finished, tmp_path):
    run(tmp_path, *resumable("dqn_tbb_ffm"), "--seed", "2")
    ours, theirs = (scalars(run_folder(folder))["losses/td_loss"] for folder in (finished("dqn_tbb_ffm")[0], tmp_path))
    assert ours != theirs


@pytest.mark.parametrize(
    "script, kills",
    [  # after which of the checkpoints
        ("dqn_tbb_ffm", [(3, 5), (5, 6)]),
        ("dqn_tbb_lru", [(7, 8)]),
        ("dqn_tbb_linattn", [(7, 8)]),
        ("dqn_sbb_ffm", [(7, 8)]),
        ("dqn_sbb_s5", [(7, 8)]),
    ],
)
def test_a_killed_run_resumes_exactly(finished, tmp_path, script, kills):
    kill_and_resume(finished(script)[0], tmp_path, resumable(script), kills, script)


def test_a_finished_run_that_is_resumed_is_logged_once(finished, tmp_path):
    """As one that was killed after its evaluation is."""
    shutil.copytree(finished("dqn_tbb_ffm")[0] / "runs", tmp_path / "runs")
    run(tmp_path, "--resume", run_folder(tmp_path))
    assert_equal_runs(finished("dqn_tbb_ffm")[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("env_id", ["popgym-RepeatFirstEasy-v0", "popgym-PositionOnlyCartPoleEasy-v0", "CartPole-v1"])
def test_killed_at_random_moments(tmp_path, number, env_id):
    flags = "--total-timesteps 12000 --learning-starts 2000 --checkpoint-interval 1500 --eval-episodes 2".split()
    flags, whole, killed = [*flags, "--env-id", env_id], tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run(whole, *flags)
    kill_and_resume(whole, killed, flags, [(2, 4)], "dqn_tbb_ffm")


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_alone_runs(tmp_path, script):
    shorter = "--total-timesteps 60 --learning-starts 20 --train-frequency 32 --eval-episodes 1".split()
    out = run(tmp_path, *COUNTING, *small(script), *shorter, **alone(tmp_path, script))
    assert "my_agent: counting_env" in out and "this file's own scan" in out and " 1 updates" in out
    assert "evaluation: episodic_return=" in out


@pytest.mark.slow
def test_the_file_alone_learns(tmp_path):
    out = run(tmp_path, **alone(tmp_path, "dqn_tbb_ffm")).splitlines()[-1]
    assert float(out.split("episodic_return=")[1].split()[0]) >= 0.99, out


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "dqn_tbb_lru", "dqn_tbb_s5", "dqn_tbb_linattn"])
def test_a_task_that_needs_memory_is_learned(tmp_path, script):
    """The script as it comes: the first run behind each page of docs/."""
    out = run(tmp_path, script=script).splitlines()[-1]
    assert float(out.split("episodic_return=")[1].split()[0]) >= 0.95, out


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
def test_errors_say_what_to_do(fails_here, flags, message):
    found = fails_here(flags)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--segment-length 0", "--segment-length: expected at least 1, got 0"),
        ("--burn-in -1", "--burn-in: expected at least 0, got -1"),
    ],
)
def test_errors_about_segments(fails_here, tmp_path, flags, message):
    assert message in fails_here(flags, script="dqn_sbb_ffm")
    assert not list(tmp_path.iterdir())  # before anything is written


def test_an_image_environment_is_refused_before_training(ffm):
    image = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    with pytest.raises(ValueError, match="expected vector observations.*FlattenObservation"):
        ffm.check_spaces("X-v0", image, gym.spaces.Discrete(2))
    with pytest.raises(ValueError, match="expected a Discrete action space"):
        ffm.check_spaces("X-v0", gym.spaces.Box(0, 1, (2,)), gym.spaces.MultiDiscrete([2, 2]))


SIGNED = """
import gymnasium as gym
from counting_env import Counting


class Signed(Counting):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward * 0.5 * (-1) ** self.t, *rest


gym.register("Signed-v0", Signed)
"""


@pytest.mark.parametrize("reduction", ["mean_of_huber", "huber_of_mean"])
def test_the_first_loss_is_that_of_the_only_episode(tmp_path, reduction):
    """One environment, an update after each step, no learning: the first tape holds the buffer's first episode, repeated."""
    (tmp_path / "signed_env.py").write_text(SIGNED)
    flags = "--num-envs 1 --train-frequency 1 --learning-starts 1 --learning-rate 0 --total-timesteps 20".split()
    flags += ["--env-id", "signed_env:Signed-v0", "--checkpoint-interval", "10", "--loss-reduction", reduction]
    run(tmp_path, *SMALL, *flags, path=os.pathsep.join([str(tmp_path), str(ROOT / "tests")]))
    checkpoint = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=False)
    buffer, script = checkpoint["tape_buffer"], load_script("dqn_tbb_ffm")

    class Env:
        single_observation_space, single_action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(3)

    network = script.QNetwork(Env, script.Args(**checkpoint["args"]))
    network.load_state_dict(checkpoint["q_network"])
    rows = buffer["episode_rows"][0]
    obs, actions, rewards, terminations = (
        torch.from_numpy(buffer[name][:rows]) for name in ("obs", "actions", "rewards", "terminations")
    )
    with torch.no_grad():
        q = network(obs, torch.arange(rows) == 0)
    bootstrap = torch.where(terminations[:-1], 0, 0.99 * q[1:].max(dim=1).values)
    error = rewards[:-1] + bootstrap - q[:-1].gather(1, actions[:-1, None]).squeeze(1)
    assert error.min() < 0 < error.max() and error.abs().min() < 1 < error.abs().max()  # both signs, both pieces of the loss
    of_mean = F.huber_loss(error.abs().mean(), torch.zeros(()))
    expected = {"mean_of_huber": F.huber_loss(error, torch.zeros_like(error)), "huber_of_mean": of_mean}
    assert (expected["mean_of_huber"] - of_mean).abs() > 0.01
    (_, first), *_ = scalars(run_folder(tmp_path))["losses/td_loss"]
    torch.testing.assert_close(first, expected[reduction].item(), rtol=1e-5, atol=1e-6)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    flags = ["--env-kwargs", '{"reward": 1e38}', "--checkpoint-interval", "300"]
    last = fails(tmp_path, *COUNTING, *SMALL, *flags)
    assert "FloatingPointError: global_step=" in last and "checkpoint.pt" in last and "--learning-rate" in last
    checkpoint = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=False)
    assert all(torch.isfinite(v).all() for v in checkpoint["q_network"].values())


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
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_environment_trains(tmp_path, script, env_id):
    # episodes of up to 1,024 steps, those of the labyrinths
    flags = "--num-envs 2 --total-timesteps 2400 --learning-starts 200 --eval-episodes 2".split()
    run(tmp_path, "--env-id", env_id, *small(script), *flags, script=script)
    losses = [value for _, value in scalars(run_folder(tmp_path))["losses/td_loss"]]
    assert losses and np.isfinite(losses).all()


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
            self.length, self.steps = length, 0

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.t, self.steps = self.t + 1, self.steps + 1
            assert self.steps <= 80, "every share is full after two episodes of 40 steps"
            return np.zeros(2, np.float32), 1.0, self.t == self.length, False, {}

    network = ffm.QNetwork(gym.vector.SyncVectorEnv([lambda: Fixed(1)]), ffm.Args(hidden_size=8, trace_size=2))
    makers = [lambda length=length: Fixed(length) for length in (1, 2, 30, 40)]
    returns = ffm.evaluate(network, makers, 10, [0] * 4, "cpu")
    assert sorted(returns) == [1] * 3 + [2] * 3 + [30] * 2 + [40] * 2
    assert len(ffm.evaluate(network, makers, 2, [0] * 4, "cpu")) == 2
