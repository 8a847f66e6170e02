"""The PPO scripts as their users run them: from the shell, killed, resumed, copied, misused; and what their loop computes."""

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
from conftest import ROOT, load_script
from scripts import alone, assert_equal_runs, fails, kill_and_resume, popgym_ids, run, run_folder, scalars

SIZES = {
    "ppo_tbb_ffm": "--trace-size 4",
    "ppo_tbb_lru": "--state-size 4",
    "ppo_tbb_s5": "--state-size 4",
    "ppo_tbb_linattn": "--key-size 4 --value-size 4",
    "ppo_sbb_lstm": "",
    "ppo_tbb_lru_continuous_action": "--state-size 4",
}
SCRIPTS = list(SIZES)
CONTINUOUS = "ppo_tbb_lru_continuous_action"
COUNTING = "--env-id counting_env:Counting-v0 --num-envs 4".split()
METRICS = """charts/episodic_return charts/episodic_length charts/learning_rate charts/prefix_share losses/value_loss
    losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac losses/explained_variance
    losses/grad_norm losses/logprob_error eval/episodic_return"""


def small(script):
    """Flags of a run of a second or two, whose episodes of 51 steps (200 on the pendulum) run across rollouts of 16."""
    flags = "--total-timesteps 2048 --num-envs 8 --num-steps 16 --num-minibatches 2 --update-epochs 2 --hidden-size 16 "
    return (flags + "--eval-episodes 3 --checkpoint-interval 256 " + SIZES[script]).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """script -> (folder, output) of a finished run, of which several tests read."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp(script)
        return folder, run(folder, *small(script), script=script).splitlines()

    return of


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_logs_saves_and_evaluates(finished, script):
    folder, out = finished(script)
    assert out[0].startswith(f"{script}: popgym-") and out[1].startswith("16 rollouts of 16 steps; runs/")
    assert any(line.startswith("global_step=2048 ") and "SPS=" in line for line in out)
    assert "trained for 2,048 steps, 16 rollouts" in "\n".join(out)
    assert out[-1].startswith("evaluation: episodic_return=") and "(3 greedy episodes" in out[-1]
    logged = scalars(run_folder(folder))
    assert set(METRICS.split()) == set(logged)
    assert len(logged["eval/episodic_return"]) == 3 and len(logged["losses/value_loss"]) == 16
    length = 200 if script == CONTINUOUS else 51
    assert {value for _, value in logged["charts/episodic_length"]} == {length}
    assert len(logged["charts/episodic_return"]) == 8 * (2048 // 8 // length)
    rates = [value for _, value in logged["charts/learning_rate"]]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(16) / 16), rtol=1e-5)
    again = run(folder, "--evaluate", run_folder(folder), "--eval-episodes", "3", script=script)
    assert again.splitlines()[-1] == out[-1]  # equal seed, equal episodes, equal weights
    assert not list(folder.glob("runs/*/*.partial"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_rollout_and_the_tape_are_one_policy(finished, script):
    """Before the first update of every iteration, prefixes and refreshed states included."""
    folder, out = finished(script)
    logged = scalars(run_folder(folder))
    errors = [value for _, value in logged["losses/logprob_error"]]
    assert 0 < max(errors) < 1e-5
    assert not [line for line in out if "warning" in line]
    shares = np.array([value for _, value in logged["charts/prefix_share"]])
    if script == "ppo_sbb_lstm":
        assert (shares == 0).all()
    elif script == CONTINUOUS:  # the first episodes last 200 steps, and the third rollout's prefix is two rollouts long
        np.testing.assert_allclose(shares[:12], 1 - 1 / (1 + np.arange(12)), rtol=1e-5)
    else:
        np.testing.assert_allclose(shares[:4], 1 - 1 / (1 + np.arange(4)), rtol=1e-5)
        np.testing.assert_allclose(shares[4], 1 - 1 / (1 + 13 / 16), rtol=1e-5)  # the episodes from row 51 on


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("torch.where(begins[:, None, None], 0, recurrent_state) * self.decay()", "recurrent_state * self.decay()"),
        ("self.memory.step(self.encoder(obs), begins", "self.memory.step(-self.encoder(obs), begins"),
        ("recurrent_state[running] = agent(", "recurrent_state[running] = 0 * agent("),
    ],
)
def test_a_rollout_that_is_another_policy_than_the_tape_is_reported(tmp_path, right, wrong):
    text = (ROOT / "single_files" / "ppo_tbb_ffm.py").read_text()
    assert text.count(right) == 1
    (tmp_path / "planted.py").write_text(text.replace(right, wrong))
    out = run(tmp_path, *small("ppo_tbb_ffm"), "--learning-rate", "1e-2", script=tmp_path / "planted")
    assert "warning: rollout and tape differ by " in out


def test_equal_seeds_give_equal_runs_and_others_do_not(finished, tmp_path):
    folder, _ = finished("ppo_tbb_lru")
    run(tmp_path, *small("ppo_tbb_lru"), script="ppo_tbb_lru")
    assert_equal_runs(folder, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    run(other, *small("ppo_tbb_lru"), "--seed", "2", script="ppo_tbb_lru")
    assert scalars(run_folder(other))["losses/value_loss"] != scalars(run_folder(folder))["losses/value_loss"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_resumes_exactly(finished, tmp_path, script):
    kill_and_resume(finished(script)[0], tmp_path, small(script), [(3, 4), (2, 3)], script)


def test_a_finished_run_that_is_resumed_is_logged_once(finished, tmp_path):
    """As one that was killed after its evaluation is."""
    shutil.copytree(finished("ppo_tbb_lru")[0] / "runs", tmp_path / "runs")
    run(tmp_path, "--resume", run_folder(tmp_path), script="ppo_tbb_lru")
    assert_equal_runs(finished("ppo_tbb_lru")[0], tmp_path)


@pytest.mark.parametrize("cut", [0, 10])
def test_a_killed_run_with_carried_states_resumes_exactly(tmp_path, cut):
    flags, whole, killed = [*small("ppo_tbb_s5"), "--max-prefix", str(cut)], tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run(whole, *flags, script="ppo_tbb_s5")
    kill_and_resume(whole, killed, flags, [(4, 5)], "ppo_tbb_s5")


def test_an_environment_that_cannot_be_saved_resumes_with_new_episodes(tmp_path):
    flags = ["--env-id", "counting_env:Unpicklable-v0", *small("ppo_tbb_ffm")]
    out = run(tmp_path, *flags, script="ppo_tbb_ffm")
    assert sum("cannot be saved" in line for line in out.splitlines()) == 1
    resumed = run(tmp_path, "--resume", run_folder(tmp_path), script="ppo_tbb_ffm")
    assert resumed.splitlines()[-1].startswith("evaluation") and "warning" not in resumed


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_alone_runs(tmp_path, script):
    env = [] if script == CONTINUOUS else COUNTING
    out = run(tmp_path, *small(script), "--total-timesteps", "256", *env, **alone(tmp_path, script))
    assert "my_agent: " in out and "this file's own scan" in out and "warning" not in out
    assert "evaluation: episodic_return=" in out


def test_the_tape_of_a_run_holds_the_running_episodes(tmp_path):
    """At every checkpoint: from the first observation of each, without a gap, up to the one that comes next."""
    flags = [*small("ppo_tbb_ffm"), *COUNTING, "--num-steps", "4", "--checkpoint-interval", "1"]
    longest = {2: 0, 4096: 0}
    for steps, cut in ((160, 4096), (176, 4096), (192, 4096), (192, 2)):
        folder = tmp_path / f"{steps}-{cut}"
        folder.mkdir()
        run(folder, *flags, "--total-timesteps", str(steps), "--max-prefix", str(cut), script="ppo_tbb_ffm")
        checkpoint = torch.load(run_folder(folder) / "checkpoint.pt", weights_only=False)
        _, iteration, next_obs, next_begins, *_ = checkpoint["loop"]
        assert iteration == steps // 16  # before the last rollout
        tape = checkpoint["carried_tape"]
        for obs, begins, following, new in zip(tape["obs"], tape["begins"], next_obs, next_begins):
            longest[cut] = max(longest[cut], len(obs))
            if new:
                assert len(obs) == 0 and following[2] == 0
                continue
            assert len(obs) == min(following[2], cut)
            assert (obs[:, :2] == following[:2]).all()  # one environment, one episode
            np.testing.assert_array_equal(obs[:, 2], np.arange(following[2] - len(obs), following[2]))
            np.testing.assert_array_equal(begins, obs[:, 2] == 0)
    assert longest[2] == 2 < longest[4096]


@pytest.mark.parametrize("truncation", ["--no-truncation-is-terminal", "--truncation-is-terminal"])
@pytest.mark.parametrize("norm", ["--no-norm-reward", "--norm-reward"])
def test_the_value_loss_is_that_of_returns_computed_by_hand(tmp_path, truncation, norm):
    """No learning, one epoch, one minibatch: half the mean squared advantage, with V(final observation) at truncations."""
    script, steps = load_script("ppo_tbb_ffm"), 8 * 16
    flags = (
        "--learning-rate 0 --update-epochs 1 --num-minibatches 1 --gamma 0.9 --gae-lambda 0.8 --total-timesteps 512".split()
    )
    run(tmp_path, *small("ppo_tbb_ffm"), *COUNTING, *flags, truncation, norm, script="ppo_tbb_ffm")
    checkpoint = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=False)
    seeds = np.random.default_rng(1).integers(2**31, size=(2, 4)).tolist()[0]
    envs = [gym.make("counting_env:Counting-v0") for _ in seeds]
    agent = script.Agent(gym.vector.SyncVectorEnv([lambda: envs[0]]), script.Args(**checkpoint["args"]))
    agent.load_state_dict(checkpoint["agent"])
    values, next_values, rewards, ends = np.zeros((4, steps, 4))
    kinds = set()
    for i, (env, seed) in enumerate(zip(envs, seeds)):
        obs, _ = env.reset(seed=seed)
        state, begin = agent.memory.initial_state(1), True

        def value(obs, begin, state):
            with torch.no_grad():
                _, value, state = agent.step(torch.from_numpy(obs)[None], torch.tensor([begin]), state)
            return value.item(), state

        for t in range(steps):
            values[t, i], state = value(obs, begin, state)
            obs, rewards[t, i], terminated, truncated, _ = env.step(5)
            kinds |= {(terminated, truncated)}
            ends[t, i] = begin = terminated or truncated
            worthless = terminated or truncated and truncation == "--truncation-is-terminal"
            next_values[t, i] = 0 if worthless else value(obs, False, state)[0]
            if begin:
                obs, _ = env.reset()
    assert len(kinds) == 3

    found, scale, discounted, seen = [], np.ones(steps), np.zeros(4), []
    for t in range(steps if norm == "--norm-reward" else 0):
        discounted = 0.9 * discounted + rewards[t]
        seen = [*seen, *discounted]
        mean = np.sum(seen) / (len(seen) + 1e-4)  # it begins as if 1e-4 of a return, of mean 0 and variance 1, had been seen
        variance = (1e-4 * (1 + mean**2) + np.sum((seen - mean) ** 2)) / (len(seen) + 1e-4)
        scale[t] = 1 / np.sqrt(variance + 1e-8)
        discounted[ends[t] == 1] = 0
    deltas = rewards * scale[:, None] + 0.9 * next_values - values
    for rollout in np.split(np.arange(steps), 8):
        advantage, squares = np.zeros(4), []
        for t in rollout[::-1]:
            advantage = deltas[t] + np.where(ends[t] == 1, 0, 0.9 * 0.8 * advantage)
            squares.append(advantage**2)
        found.append(0.5 * np.mean(squares))
    logged = [value for _, value in scalars(run_folder(tmp_path))["losses/value_loss"]]
    np.testing.assert_allclose(logged, found, rtol=1e-5)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    flags = ["--env-kwargs", '{"reward": 1e38}', "--no-norm-reward"]
    last = fails(tmp_path, *small("ppo_tbb_ffm"), *COUNTING, *flags, script="ppo_tbb_ffm")
    assert "FloatingPointError: global_step=" in last and "checkpoint.pt" in last and "--learning-rate" in last
    checkpoint = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=False)
    assert all(torch.isfinite(v).all() for v in checkpoint["agent"].values())


@pytest.mark.parametrize("env_id", ["popgym-MineSweeperEasy-v0", "popgym-BattleshipEasy-v0"])
def test_multi_discrete_actions_train(tmp_path, env_id):
    out = run(tmp_path, *small("ppo_tbb_ffm"), "--env-id", env_id, "--total-timesteps", "512", script="ppo_tbb_ffm")
    assert "evaluation: episodic_return=" in out and "warning" not in out


@pytest.mark.parametrize(
    "flags, message, script",
    [
        ("--env-id popgym-PositionOnlyPendulumEasy-v0", "expected Discrete or MultiDiscrete.*ppo_tbb_lru_cont", "ppo_tbb_ffm"),
        ("--env-id CartPole-v1", "expected Box actions, got Discrete.*ppo_tbb_lru.py", CONTINUOUS),
        ("--num-minibatches 3", "--num-minibatches 3: expected a divisor of 64 envs; .*whole environments", "ppo_tbb_ffm"),
        ("--total-timesteps 100", "--total-timesteps 100: expected one rollout at least, 3328 steps", "ppo_tbb_ffm"),
        ("--max-prefix -1", "--max-prefix: expected at least 0, got -1", "ppo_tbb_ffm"),
        ("--max-prefix 10", "--max-prefix 10: expected 0 here; the tbb scripts carry", "ppo_sbb_lstm"),
        ("--num-steps 0", "--num-steps: expected at least 1, got 0", "ppo_tbb_ffm"),
        ("--resume nowhere", "expected a run's directory with a file checkpoint.pt.*got 'nowhere'", "ppo_tbb_ffm"),
        ("--evaluate nowhere", "with a file ppo_tbb_ffm.cleanrl_model.*'nowhere'", "ppo_tbb_ffm"),
        ("--capture-video", "expected an environment that renders, popgym-RepeatFirstEasy-v0 does not", "ppo_tbb_ffm"),
    ],
)
def test_errors_say_what_to_do(tmp_path, monkeypatch, flags, message, script):
    path = str(ROOT / "single_files" / f"{script}.py")
    own = [] if "--resume" in flags else ["--no-tune-cpu"]  # its switches are for a whole process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *flags.split(), *own])
    with pytest.raises(ValueError) as error:
        runpy.run_path(path, run_name="__main__")
    assert re.search(message, str(error.value)), str(error.value)
    assert not list(tmp_path.iterdir())  # before anything is written


@pytest.mark.parametrize("length", [1, 7, 200])
def test_the_t_maze_rewards_what_the_cue_said(monkeypatch, length):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    env, goals = gym.make("t_maze:TMaze-v0", length=length), set()
    for seed in range(8):
        obs, _ = env.reset(seed=seed)
        goal, seen = int(obs[1]), [obs.tolist()]
        rewards = []
        for t in range(length + 1):
            obs, reward, terminated, truncated, _ = env.step(goal if seed % 2 or t < length else 1 - goal)
            rewards.append(reward)
            assert (terminated, truncated) == (t == length, False)
            seen.append(obs.tolist())
        goals.add(goal)
        corridor, junction = [0, 0, 1, 0], [0, 0, 0, 1]
        assert seen == [[1 - goal, goal, 0, 0], *[corridor] * (length - 1), junction, junction]
        assert rewards == [0] * length + [1 if seed % 2 else -1]
    assert goals == {0, 1}
    with pytest.raises(ValueError, match="length: expected at least 1 step"):
        gym.make("t_maze:TMaze-v0", length=0)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", popgym_ids())
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != CONTINUOUS])
def test_every_environment_trains(tmp_path, script, env_id):
    out = run(tmp_path, "--env-id", env_id, *small(script), "--checkpoint-interval", "0", script=script)
    assert "evaluation: episodic_return=" in out and "warning" not in out
    assert all(np.isfinite(value) for _, value in scalars(run_folder(tmp_path))["losses/value_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != CONTINUOUS])
def test_a_task_that_needs_memory_is_learned(tmp_path, script):
    out = run(tmp_path, script=script).splitlines()[-1]
    assert float(out.split("episodic_return=")[1].split()[0]) >= 0.95, out


@pytest.mark.slow
def test_the_file_alone_learns(tmp_path):
    out = run(tmp_path, **alone(tmp_path, "ppo_tbb_ffm")).splitlines()[-1]
    assert float(out.split("episodic_return=")[1].split()[0]) >= 0.95, out


@pytest.mark.slow
def test_video_and_offline_tracking(tmp_path, monkeypatch):
    pytest.importorskip("wandb"), pytest.importorskip("moviepy")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = [*small("ppo_tbb_ffm"), *COUNTING, "--capture-video", "--track"]
    run(tmp_path, *flags, script="ppo_tbb_ffm")
    assert list(tmp_path.glob("videos/*/*.mp4")) and list(tmp_path.glob("wandb/offline-run-*"))
    assert os.path.getsize(next(tmp_path.glob("videos/*/*.mp4"))) > 0
