"""What users bring and do: awkward environments, flags out of range, other people's files, signals, full disks.

Each case is run in every family of scripts that it concerns.
"""

import errno
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import awkward_env
import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import (
    ROOT,
    assert_equal_runs,
    fails,
    in_place_of_main,
    kill_and_resume,
    load_script,
    model,
    run,
    run_folder,
    saved_state,
    scalars,
    start,
)
from test_scripts import FAMILIES, SCRIPTS, every_family, finished  # noqa: F401

from cleanrl_memoroid import runs

FINITE = [script for script in FAMILIES if "continuous" not in script]
DQN, PPO = ([script for script in FAMILIES if kind in script] for kind in ("dqn", "ppo"))


BOXES = "Plain Counts Constant Forgets Later Dice Endless Wrong Types Reuses Parts Wide".split()  # take `box`


def flags(script, env, *more, **kwargs):
    """Of a short run in an environment of awkward_env, with what its constructor is given."""
    kwargs |= {"box": True} if "continuous" in script and env in BOXES else {}
    given = ["--env-kwargs", *(str(word) for pair in kwargs.items() for word in pair)] if kwargs else []
    short = "--total-timesteps 900 --learning-starts 300 --eval-episodes 2" if "dqn" in script else "--total-timesteps 768"
    return [*SCRIPTS[script].flags.split(), "--env-id", f"awkward_env:{env}-v0", *given, *short.split(), *map(str, more)]


def losses(folder, script):
    return [value for _, value in scalars(run_folder(folder))["losses/td_loss" if "dqn" in script else "losses/value_loss"]]


@pytest.fixture
def stop_in_step(monkeypatch):
    """stop_in_step(k, number): the process gets the signal during the k-th step of the vector environment."""

    def plan(k, number=signal.SIGTERM):
        step, calls = gym.vector.SyncVectorEnv.step, []

        def counted(self, actions):
            calls.append(0)
            if len(calls) == k:
                os.kill(os.getpid(), number)
            return step(self, actions)

        monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", counted)

    yield plan
    runs.catch_stop_signals(on=False)


# environments in checkpoints


@every_family
@pytest.mark.parametrize("env", ["Plain", "Dice"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_itself_and_goes_on_exactly(tmp_path, monkeypatch, stop_in_step, script, env, number):
    """Also where the environment draws from the global random numbers."""
    if env == "Plain" and (number == signal.SIGINT or script != "dqn_tbb_ffm"):
        pytest.skip("Dice is the harder case")
    (whole := tmp_path / "whole").mkdir(), (stopped := tmp_path / "stopped").mkdir()
    run(whole, *flags(script, env), script=script)
    interval = re.search(r"checkpoint-interval (\d+)", SCRIPTS[script].flags)[1]
    stop_in_step(37, number)
    out = run(stopped, *flags(script, env, "--checkpoint-interval", 0), script=script)
    assert re.search(r"stopped; --resume runs/\S+ goes on from step \d+", out.splitlines()[-1]), out
    assert not (run_folder(stopped) / "model.pt").exists()
    monkeypatch.undo()
    run(stopped, "--resume", run_folder(stopped), "--checkpoint-interval", interval, script=script)
    assert_equal_runs(whole, stopped, script)


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_lru_continuous_action"])
def test_an_evaluation_on_global_random_numbers_repeats_exactly(tmp_path, script):
    out = run(tmp_path, *flags(script, "Dice"), script=script)
    assert run(tmp_path, "--evaluate", run_folder(tmp_path), script=script).splitlines()[-1] == out.splitlines()[-1]


def test_the_second_signal_ends_a_run_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without one
    before = signal.getsignal(signal.SIGINT)
    caught = runs.catch_stop_signals()
    os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    runs.catch_stop_signals(on=False)
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)


@every_family
@pytest.mark.parametrize(
    "env, why",
    [
        ("Counts", "Counts is pickled by EzPickle"),
        ("Constant", "Constant is pickled by EzPickle"),
        ("Forgets", "a copy of environment 0 does not go on as the environment does"),
        ("Later", "cannot pickle '_thread.lock' object"),
    ],
)
def test_an_environment_that_is_not_saved_is_named_when_that_is_so_and_at_resume(tmp_path, script, env, why):
    out = run(tmp_path, *flags(script, env), script=script)
    said = [line for line in out.splitlines() if "cannot be saved" in line]
    assert len(said) == 1 and why in said[0] and "--resume will begin new episodes" in said[0], out
    with in_place_of_main(script):
        assert torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=False)["envs"] is None
    resumed = run(tmp_path, "--resume", run_folder(tmp_path), script=script)
    assert "new episodes begin" in resumed and "evaluation" in resumed and np.isfinite(losses(tmp_path, script)).all()


def test_a_copy_is_compared_in_observation_reward_end_and_what_follows_an_end():
    class Twin(awkward_env.Plain):
        wrong = None

        def __setstate__(self, state):
            self.__dict__.update(state)
            self.wrong = self.__dict__.pop("planted", None)

        def step(self, action):
            obs, reward, terminated, truncated, infos = super().step(action)
            obs = obs + (self.wrong == "obs")
            return obs, reward + (self.wrong == "reward"), terminated, truncated or self.wrong == "end", infos

        def reset(self, *, seed=None, options=None):
            obs, infos = super().reset(seed=seed)
            return obs + (self.wrong == "reset"), infos

    for planted, steps, unlike in [
        (None, 9, False),
        ("obs", 1, True),
        ("reward", 1, True),
        ("end", 1, True),
        ("reset", 9, True),
    ]:
        envs = gym.vector.SyncVectorEnv([Twin] * 2, autoreset_mode="SameStep")
        envs.reset(seed=0)
        for t in range(1, 10):
            envs.envs[1].planted = planted
            pickled = cloudpickle.dumps((envs.envs, random.getstate(), np.random.get_state(), torch.get_rng_state()))
            del envs.envs[1].planted
            actions = np.zeros(2, int)
            outcome = envs.step(actions)
            if t == steps:
                assert bool(runs.unlike(envs, pickled, actions, outcome)) == unlike, planted
                break


# runs without an end, or without learning


@every_family
def test_an_evaluation_ends(tmp_path, script):
    limit = {"max_episode_steps": 9} if "dqn" in script else {}  # without an end, DQN has no episode to learn from
    out = run(tmp_path, *flags(script, "Endless", "--eval-episodes", 2, "--eval-max-steps", 5, **limit), script=script)
    assert out.splitlines()[-1].endswith("2 greedy episodes of awkward_env:Endless-v0; 2 cut off by --eval-max-steps")


@pytest.mark.parametrize("script", DQN)
def test_a_run_that_learns_nothing_says_so_and_leaves_no_model(tmp_path, script):
    process = start(tmp_path, *flags(script, "Endless", "--eval-max-steps", 30), script=script)
    out, err = process.communicate()
    assert process.returncode and "warning: no episode has ended, and before one does nothing is learned" in out
    assert "ValueError: --total-timesteps 900: no episode had ended when an update was due" in err
    assert not (run_folder(tmp_path) / "model.pt").exists()
    found = fails(tmp_path, *flags(script, "Endless", "--buffer-size", 40), script=script)
    assert "--buffer-size 40: an episode has not ended after so many steps" in found
    (other := tmp_path / "other").mkdir()
    found = fails(other, *flags(script, "Plain", "--learning-starts", 900), script=script)
    assert "--learning-starts: expected at most 899, got 900" in found and not list(other.iterdir())


# flags


@every_family
def test_evaluation_and_resumption_take_another_environment_or_refuse_it(finished, tmp_path, script):  # noqa: F811
    run(tmp_path, *flags(script, "Plain"), script=script)
    folder, box = run_folder(tmp_path), ["--env-kwargs", "box", "True"] if "continuous" in script else []
    for what in ("--evaluate", "--resume"):
        out = run(tmp_path, what, folder, "--env-id", "awkward_env:Dice-v0", *box, script=script)
        assert "greedy episodes of awkward_env:Dice-v0" in out and ("new episodes begin" in out) == (what == "--resume")
        found = fails(tmp_path, what, folder, "--env-id", "awkward_env:Counts-v0", *box, script=script)
        assert "--env-id awkward_env:Counts-v0, or sizes of layers: not those of the network in" in found
        assert "sizes of layers" in fails(tmp_path, what, folder, "--hidden-size", 8, script=script)
    out = run(tmp_path, "--resume", folder, "--num-envs", 4, "--total-timesteps", 2048, script=script)
    assert "in 4 environments" in out and "new episodes begin" in out
    assert "--seed: a resumed run keeps 1, got 2" in fails(tmp_path, "--resume", folder, "--seed", 2, script=script)
    for name in ("--buffer-size", "--segment-length", "--burn-in") if "sbb_s5" in script else ():
        assert f"{name}: a resumed run keeps" in fails(tmp_path, "--resume", folder, name, 500, script=script)


@every_family
def test_numbers_out_of_range_name_their_flag_before_anything_starts(tmp_path, script):
    defaults = vars(load_script(script).Args())
    for name, value in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float):
            assert f"{flag}: expected at least" in fails(tmp_path, flag, -1, script=script)
        if isinstance(value, float):
            assert re.search(f"{flag}(,|:)", fails(tmp_path, flag, "nan", script=script))
    for name in "gamma gae_lambda tau start_e end_e exploration_fraction learning_rate seed".split():
        if name in defaults:
            too_large = 10**9 + 1 if name == "seed" else 1.5
            found = fails(tmp_path, f"--{name.replace('_', '-')}", too_large, script=script)
            assert f"--{name.replace('_', '-')}: expected at most" in found
    assert not list(tmp_path.iterdir())


@every_family
def test_no_episodes_are_none_after_training_and_an_error_in_an_evaluation(finished, tmp_path, script):  # noqa: F811
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    out = run(tmp_path, *flags(script, "Plain", "--eval-episodes", 0, "--exp-name", "x"), script=script)
    assert "evaluation" not in out
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if "__x__" not in path.name]
    assert "--eval-episodes: expected at least 1" in fails(tmp_path, "--evaluate", folder, "--eval-episodes", 0, script=script)


@pytest.mark.parametrize("script", PPO)
def test_a_minibatch_of_one_row_trains(tmp_path, script):
    more = "--num-envs 4 --num-steps 1 --num-minibatches 4 --total-timesteps 64".split()
    run(tmp_path, *flags(script, "Plain", *more), script=script)
    assert np.isfinite(losses(tmp_path, script)).all()
    assert all(torch.isfinite(v).all() for v in model(tmp_path).values())


# files


@pytest.mark.parametrize("script", FAMILIES)
@pytest.mark.parametrize("what, file", [("--resume", "checkpoint.pt"), ("--evaluate", "model.pt")])
def test_another_script_s_run_is_refused_by_name_and_left_alone(finished, tmp_path, script, what, file):  # noqa: F811
    other = FAMILIES[FAMILIES.index(script) - 1]
    shutil.copytree(finished(other)[0] / "runs", tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in run_folder(tmp_path).iterdir()}
    found = fails(tmp_path, what, run_folder(tmp_path), script=script)
    assert re.search(rf"ValueError: {what}: \S+/{file} is of {other}.py, expected one of {script}.py; use that script", found)
    assert {path.name: path.read_bytes() for path in run_folder(tmp_path).iterdir()} == before


@every_family
@pytest.mark.parametrize("harm", ["empty", "half", "flipped", "text"])
def test_a_damaged_file_is_named(finished, tmp_path, script, harm):  # noqa: F811
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    for what, file in (("--resume", "checkpoint.pt"), ("--evaluate", "model.pt")):
        path = run_folder(tmp_path) / file
        whole = path.read_bytes()
        at = whole.index(b"data/0") + 200  # in a tensor
        flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "flipped": flipped, "text": b"no"}[harm])
        found = fails(tmp_path, what, run_folder(tmp_path), script=script)
        assert re.search(rf"ValueError: {what}: expected a file \S+{file}, got one that cannot be read", found), found


def test_a_run_of_another_version_goes_on_with_a_line(finished, tmp_path):  # noqa: F811
    script = "dqn_tbb_ffm"
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    path = run_folder(tmp_path) / "checkpoint.pt"
    with in_place_of_main(script):
        saved = torch.load(path, weights_only=False)
        saved["args"] = {"gone": 5, **{name: value for name, value in saved["args"].items() if name != "eval_max_steps"}}
        torch.save(saved, path)
    out = run(tmp_path, "--resume", run_folder(tmp_path), script=script)
    assert "has no --gone; 5 is dropped" in out and "without --eval-max-steps, which is 10000 now" in out
    assert "evaluation" in out
    del saved["script"]
    with in_place_of_main(script):
        torch.save(saved, path)
    assert "is of an older version" in fails(tmp_path, "--resume", run_folder(tmp_path), script=script)


@every_family
def test_a_run_lives_in_the_folder_that_was_given(finished, tmp_path, script):  # noqa: F811
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(run_folder(finished(script)[0]), tmp_path / "elsewhere" / "my run: (2)")
    (tmp_path / "here").mkdir()
    folder = f"{tmp_path}/elsewhere/my run: (2)/"
    more = ["--total-timesteps", 2300]
    out = run(tmp_path / "here", "--resume", folder, *more, script=script)
    assert f"; {folder}" in out and not list((tmp_path / "here").iterdir())
    out = run(tmp_path / "here", "--evaluate", folder, "--exp-name", "other", script=script)
    assert "evaluation" in out and not list((tmp_path / "here").iterdir())


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", lambda *_: exec("raise KeyError('stop')"))
    for _ in range(3):
        assert "stop" in fails(tmp_path, *flags("dqn_tbb_ffm", "Plain"))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"awkward_env-Plain-v0__dqn_tbb_ffm__1__1000000000{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("script", ["dqn_tbb_ffm"])
@pytest.mark.parametrize("name", ["sweep/lr3", "a:b?c *d\\e", "x" * 300, "../../out"])
def test_any_name_of_an_experiment_becomes_a_folder(tmp_path, script, name):
    run(tmp_path, *flags(script, "Plain", "--exp-name", name), script=script)
    folder = run_folder(tmp_path)
    assert (folder / "model.pt").exists() and re.fullmatch(r"[\w.=+-]+", folder.name)
    assert os.listdir(tmp_path) == ["runs"]


@every_family
def test_a_full_disk_is_named_with_the_remedy(tmp_path, monkeypatch, script):
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(0)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    found = fails(tmp_path, *flags(script, "Plain"), script=script)
    assert re.search(r"OSError: runs/\S+/checkpoint.pt: .*No space left on device; make room .*--resume runs/", found), found
    assert not list(tmp_path.glob("runs/*/*.partial")) and saved_state(tmp_path, script)["global_step"] > 0
    monkeypatch.undo()
    assert "evaluation" in run(tmp_path, "--resume", run_folder(tmp_path), script=script)  # from the checkpoint before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@every_family
def test_a_run_of_a_gpu_goes_on_without_one(finished, tmp_path, script):  # noqa: F811
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    for file, what in (("checkpoint.pt", "--resume"), ("model.pt", "--evaluate")):
        path = run_folder(tmp_path) / file
        with in_place_of_main(script):
            saved = torch.load(path, weights_only=False)
            saved["args"]["cuda"] = True
            torch.save(saved, path)
        found = fails(tmp_path, what, run_folder(tmp_path), script=script)
        assert "--cuda: expected a CUDA device, PyTorch finds none; drop the flag, or resume with --no-cuda" in found
        assert "evaluation" in run(tmp_path, what, run_folder(tmp_path), "--no-cuda", script=script)


# what environments return


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "obs, fits",
    [
        (np.full(9, 3e38, np.float32), True),  # whose square is infinite
        (np.full((2, 3), 300, np.float16), True),
        (np.full((2, 2), 1e38)[:, ::-1], True),
        (np.zeros(0, np.float32), True),
        (np.full(4, 1e300), False),  # infinite in float32
        (np.array([[1, 1], [1, np.nan]], np.float32), False),
        (np.array([1, -np.inf], np.float16), False),
    ],
)
def test_every_number_that_float32_holds_may_be_observed(obs, fits):
    env = gym.Env()
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, obs.dtype)
    env.step = lambda action: (obs, 0.0, False, False, {})
    if fits:
        assert np.array_equal(runs.Checked(env).step(0)[0], obs)
    else:
        with pytest.raises(ValueError, match="expected an observation of finite numbers"):
            runs.Checked(env).step(0)


@every_family
@pytest.mark.parametrize(
    "what",
    ["obs nan", "obs inf", "obs 1e39", "obs None", "shape 3", "reward nan", "reward -inf", "reward None", "reward text"],
)
def test_what_is_no_finite_number_is_named_where_it_comes_in(tmp_path, script, what):
    if script not in ("dqn_tbb_ffm", "ppo_tbb_lru") and what not in ("obs nan", "reward None"):
        pytest.skip("the same lines of the package as in the other families")
    given = flags(script, "Wrong", "--num-envs", 8, "--total-timesteps", 4000, what=what)
    found = fails(tmp_path, *given, script=script)
    kind = "reward" if "reward" in what else "observation"
    where = rf"ValueError: --env-id Wrong-v0: environment 0, step 100: expected .*{kind}.*, got .*(correct|wrap)"
    assert re.search(where, found, re.DOTALL), found
    saved = saved_state(tmp_path, script)
    network = saved["q_network" if "dqn" in script else "agent"]
    assert all(torch.isfinite(v).all() for v in network.state_dict().values())


@every_family
@pytest.mark.parametrize("env", ["Types", "Reuses", "Parts"])
def test_what_an_environment_may_return_trains(tmp_path, script, env):
    run(tmp_path, *flags(script, env), script=script)
    logged = scalars(run_folder(tmp_path))
    assert np.isfinite(losses(tmp_path, script)).all()
    assert {value for _, value in logged["charts/episodic_return"]} == {9.0}


@pytest.mark.parametrize("script", DQN)
def test_a_final_observation_stays_what_it_was(tmp_path, script):
    """Also in an environment that writes all its observations into one array."""
    run(tmp_path, *flags(script, "Reuses"), script=script)
    for tape in saved_state(tmp_path, script)["tape_buffer"].episodes:
        assert tape.obs[:, 0].tolist() == list(range(10))


@every_family
def test_a_constructor_without_render_mode(tmp_path, script):
    env = "BareBox" if "continuous" in script else "Bare"
    run(tmp_path, *flags(script, env), script=script)
    assert np.isfinite(losses(tmp_path, script)).all()
    (other := tmp_path / "other").mkdir()
    found = fails(other, *flags(script, env, "--capture-video"), script=script)
    assert re.search(rf"ValueError: --env-id awkward_env:{env}-v0: cannot be made .*--capture-video: .*render_mode", found), (
        found
    )


@every_family
def test_what_env_kwargs_say_of_rendering_holds(tmp_path, script):
    run(tmp_path, *flags(script, "Plain", render_mode="rgb_array"), script=script)
    found = fails(tmp_path, *flags(script, "Plain", nonsense=1), script=script)
    assert (
        "ValueError: --env-id awkward_env:Plain-v0: cannot be made and flattened with these --env-kwargs" in found
        and "nonsense" in found
    )
    found = fails(tmp_path, *SCRIPTS[script].flags.split(), "--env-id", "Nothing-v0", script=script)
    assert re.search(r"ValueError: --env-id Nothing-v0: cannot be made .*Environment `Nothing` doesn't exist", found)


@every_family
def test_spaces_that_a_script_cannot_take(tmp_path, script):
    if "dqn" in script:
        expected = {"Matrix": "expected Discrete actions", "Whole": "expected Discrete actions"}
    elif "continuous" in script:
        expected = {"Matrix": "expected Box actions of floats", "Whole": "expected Box actions of floats"}
    else:
        expected = {"Matrix": "expected finite actions", "Whole": "expected finite actions"}
    for env, message in {**expected, "Texts": "take in make_env a part of the observation"}.items():
        assert message in (found := fails(tmp_path, *flags(script, env), script=script)), found
        assert found.startswith("ValueError: --env-id")
    assert not list(tmp_path.iterdir())


def test_actions_reach_all_of_their_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(awkward_env.Far, "seen", [])
    run(tmp_path, *flags("ppo_tbb_lru_continuous_action", "Far"), script="ppo_tbb_lru_continuous_action")
    seen = np.array(awkward_env.Far.seen)
    assert (seen.min(0)[:2] >= (0, 100)).all() and (seen.max(0) <= (1, 200, 5)).all()
    assert (np.quantile(seen, 0.1, axis=0)[:2] < (0.4, 140)).all() and (np.quantile(seen, 0.9, axis=0)[:2] > (0.6, 160)).all()
    assert len(np.unique(seen[:, 1])) > 100 and np.abs(seen[:, 2]).mean() < 2  # no bound below: it stays as it is


@every_family
def test_the_size_of_a_large_tape_is_said_at_the_start(tmp_path, stop_in_step, script):
    more = ["--buffer-size", 400] if "dqn" in script else ["--max-prefix", 0]
    stop_in_step(1)
    out = run(tmp_path, *flags(script, "Wide", *more, "--hidden-size", 2), script=script)
    assert f"{0.4 if 'dqn' in script else 0.13:.2f} GB of observations at most; runs/" in out.splitlines()[1]


@pytest.mark.parametrize("script", ["dqn_tbb_ffm"])
def test_a_module_in_the_working_directory_is_found(tmp_path, script):
    shutil.copy(ROOT / "tests" / "helpers" / "awkward_env.py", tmp_path / "my_module.py")
    given = [flag.replace("awkward_env", "my_module") for flag in flags(script, "Plain")]
    process = start(tmp_path, *given, script=script, paths=())
    out, err = process.communicate()
    assert process.returncode == 0, err


# a process's life


@pytest.mark.parametrize("script", ["ppo_tbb_lru"])
def test_a_closed_pipe_does_not_end_training(tmp_path, script):
    path = ROOT / "single_files" / f"{script}.py"
    given = " ".join(SCRIPTS[script].flags.split())
    command = f"set -o pipefail; {sys.executable} -u {path} {given} 2>&1 | head -1"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert (run_folder(tmp_path) / "model.pt").exists()
    assert len(scalars(run_folder(tmp_path))["eval/episodic_return"]) > 2  # to the very end


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_on_global_random_numbers_goes_on_exactly_from_any_moment(tmp_path, script, number):
    (whole := tmp_path / "whole").mkdir()
    given = flags(script, "Dice", "--total-timesteps", 4096)
    run(whole, *given, script=script)
    kills = 0
    while kills < 20:
        folder = tmp_path / str(kills)
        folder.mkdir()
        kills += kill_and_resume(whole, folder, given, [(1, 4), (1, 4)], script, stop=number)
    print(f"{script}: equal after {kills} of {kills} signals {number.name}")


# the scripts that are in no family: what is theirs alone

SAPG, STUDENT = "sapg_tbb_lru_continuous_action", "bpd_tbb_lru_continuous_action"
SMALL = {
    SAPG: """--total-timesteps 256 --num-envs 8 --num-steps 8 --num-minibatches 2 --update-epochs 1 --hidden-size 8
        --state-size 4 --eval-episodes 2 --checkpoint-interval 128 --env-id awkward_env:Plain-v0 --env-kwargs box True""",
    STUDENT: """--updates 20 --fine-tune-updates 10 --data-episodes 3 --heldout-episodes 1 --batch-episodes 2 --hidden-size 8
        --state-size 4 --eval-episodes 2 --checkpoint-interval 10""",
    "ad_mingru": """--room-size 3 --episode-length 3 --episodes 8 --test-tasks 2 --histories-per-task 2 --total-updates 4
        --batch-rows 64 --hidden-size 8 --warmup-updates 2 --checkpoint-interval 1 --eval-runs 2""",
    "optim4rl_lru": """--num-windows 2 --num-updates 2 --life 4 --num-agents 2 --num-envs 2 --num-steps 5 --sample 64
        --num-validations 1 --valid-agents 1 --test-agents 1 --test-updates 2 --checkpoint-interval 1 --no-baselines""",
}
every_other = pytest.mark.parametrize("script", SMALL)
of_environments = pytest.mark.parametrize("script", [SAPG, STUDENT])


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """The run directory of a teacher in awkward_env:Plain-v0, whose episodes have 9 steps."""
    folder = tmp_path_factory.mktemp("taught")
    script = "ppo_tbb_lru_continuous_action"
    run(folder, *flags(script, "Plain", "--eval-episodes", 0, "--total-timesteps", 256), script=script)
    return run_folder(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory, taught):
    """(folder, its flags) of a short run of one of these scripts."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp(script)
        given = SMALL[script].split() + (["--teacher", str(taught)] if script == STUDENT else [])
        run(folder, *given, script=script)
        return folder, given

    return of


def other_env(script, name, **kwargs):
    """Flags that put another environment of awkward_env in the place of Plain."""
    kwargs |= {"box": True} if name in BOXES else {}
    given = [str(word) for pair in kwargs.items() for word in pair]
    return ["--env-id", f"awkward_env:{name}-v0", *(["--env-kwargs", *given] if given else [])]


@every_other
def test_numbers_out_of_range_name_their_flag_there_too(tmp_path, script):
    for name, value in vars(load_script(script).Args()).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float):
            assert f"{flag}: expected at least" in fails(tmp_path, flag, -1, script=script)
        if isinstance(value, float):
            assert re.search(f"{flag}(,|:)", fails(tmp_path, flag, "nan", script=script))
    assert not list(tmp_path.iterdir())


@every_other
def test_a_run_of_theirs_moves_is_named_freely_and_is_no_other_script_s(small, tmp_path, script):
    shutil.copytree(run_folder(small(script)[0]), tmp_path / "my run: (2)")
    (here := tmp_path / "here").mkdir()
    folder = f"{tmp_path}/my run: (2)/"
    before = {path.name: path.read_bytes() for path in (tmp_path / "my run: (2)").iterdir()}
    for what, file in (("--resume", "checkpoint.pt"), ("--evaluate", "model.pt")):
        found = fails(here, what, folder, script="dqn_tbb_ffm")
        assert re.search(rf"{what}: .*{file} is of {script}.py, expected one of dqn_tbb_ffm.py; use that script", found), found
    assert {path.name: path.read_bytes() for path in (tmp_path / "my run: (2)").iterdir()} == before
    run(here, "--resume", folder, script=script)
    out = run(here, "--evaluate", folder, "--exp-name", "other", script=script)
    assert not list(here.iterdir()) and ("evaluation" in out or script == "optim4rl_lru")
    run(here, *small(script)[1], "--exp-name", "a/b: c?", script=script)
    assert os.listdir(here) == ["runs"] and re.fullmatch(r"[\w.=+-]+", run_folder(here).name)
    (run_folder(here) / "checkpoint.pt").write_bytes(b"no")
    found = fails(here, "--resume", run_folder(here), script=script)
    assert re.search(r"--resume: expected a file \S+checkpoint.pt, got one that cannot be read", found), found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [SAPG, STUDENT, "ad_mingru"])
def test_a_run_of_theirs_on_a_gpu_goes_on_without_one(small, tmp_path, script):
    shutil.copytree(small(script)[0] / "runs", tmp_path / "runs")
    path = run_folder(tmp_path) / "model.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"]["cuda"] = True
    torch.save(saved, path)
    found = fails(tmp_path, "--evaluate", run_folder(tmp_path), script=script)
    assert "--cuda: expected a CUDA device, PyTorch finds none; drop the flag, or resume with --no-cuda" in found
    assert "evaluation" in run(tmp_path, "--evaluate", run_folder(tmp_path), "--no-cuda", script=script)


@of_environments
@pytest.mark.parametrize("what", ["obs nan", "reward None"])
def test_what_is_no_finite_number_is_named_there_too(small, tmp_path, script, what):
    # a student's data have 36 steps, of an environment each 9
    env = other_env(script, "Wrong", what=what, since=20 if script == SAPG else 5)
    found = fails(tmp_path, *small(script)[1], *env, script=script)
    where = (
        rf"ValueError: --env-id Wrong-v0: environment 0, step \d+: expected .*{what.split()[0][:3]}.*, got .*(correct|wrap)"
    )
    assert re.search(where, found, re.DOTALL), found


@of_environments
def test_what_an_environment_may_return_trains_there_too(small, tmp_path, script):
    out = run(tmp_path, *small(script)[1], *other_env(script, "Types"), script=script)
    assert "evaluation: episodic_return=9.0000, the mean of 2 greedy episodes of awkward_env:Types-v0" in out


@of_environments
def test_episodes_without_an_end_end_there_too(small, tmp_path, script):
    given = [*small(script)[1], *other_env(script, "Endless"), "--eval-max-steps", 5]
    out = run(tmp_path, *given, script=script)
    assert "evaluation: episodic_return=5.0000, the mean of 2 greedy episodes of awkward_env:Endless-v0" in out


@of_environments
def test_they_evaluate_and_resume_in_another_environment_or_refuse_it(small, tmp_path, script):
    shutil.copytree(small(script)[0] / "runs", tmp_path / "runs")
    folder = run_folder(tmp_path)
    for what in ("--evaluate", "--resume"):
        out = run(tmp_path, what, folder, *other_env(script, "Dice"), script=script)
        assert "greedy episodes of awkward_env:Dice-v0" in out
        found = fails(tmp_path, what, folder, *other_env(script, "Counts"), script=script)
        assert "--env-id awkward_env:Counts-v0, or sizes of layers: not those of the network in" in found, found


@of_environments
def test_no_episodes_are_an_error_in_an_evaluation_there_too(small, tmp_path, script):
    found = fails(tmp_path, "--evaluate", run_folder(small(script)[0]), "--eval-episodes", 0, script=script)
    assert "--eval-episodes: expected at least 1" in found


def test_sapg_saves_what_can_be_saved_and_says_what_cannot(tmp_path, monkeypatch, stop_in_step):
    """Global random numbers go on after a signal as if there had been none; EzPickle is told when it is so and at --resume."""
    (whole := tmp_path / "whole").mkdir(), (stopped := tmp_path / "stopped").mkdir(), (lost := tmp_path / "lost").mkdir()
    given = [*SMALL[SAPG].split(), *other_env(SAPG, "Dice")]
    run(whole, *given, script=SAPG)
    stop_in_step(11)
    out = run(stopped, *given, "--checkpoint-interval", 0, script=SAPG)
    assert re.search(r"stopped; --resume runs/\S+ goes on from step 128", out.splitlines()[-1]), out
    monkeypatch.undo()
    run(stopped, "--resume", run_folder(stopped), "--checkpoint-interval", 128, script=SAPG)
    assert_equal_runs(whole, stopped, SAPG)
    out = run(lost, *SMALL[SAPG].split(), *other_env(SAPG, "Constant"), script=SAPG)
    assert "Constant is pickled by EzPickle" in out and "--resume will begin new episodes" in out
    assert "new episodes begin" in run(lost, "--resume", run_folder(lost), script=SAPG)


def test_spaces_that_sapg_cannot_take(tmp_path):
    for env, message in {"Whole": "expected Box actions of floats", "Texts": "take in make_env a part"}.items():
        found = fails(tmp_path, *SMALL[SAPG].split(), "--env-id", f"awkward_env:{env}-v0", "--env-kwargs", script=SAPG)
        assert found.startswith("ValueError: --env-id") and message in found, found
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_none_is_named(small, taught, tmp_path):
    (tmp_path / "half").mkdir()
    for name in ("model.pt", "checkpoint.pt"):
        whole = (taught / name).read_bytes()
        (tmp_path / "half" / name).write_bytes(whole[: len(whole) // 2])
    for run_dir, message in [
        (tmp_path / "half", r"--teacher: expected a file \S+model.pt, got one that cannot be read"),
        (run_folder(small(SAPG)[0]), f"--teacher: expected a run of a DQN or PPO script, got one of {SAPG}.py"),
        (run_folder(small(STUDENT)[0]), f"--teacher: expected a run of a DQN or PPO script, got one of {STUDENT}.py"),
    ]:
        found = fails(tmp_path, *SMALL[STUDENT].split(), "--teacher", run_dir, script=STUDENT)
        assert re.match(f"ValueError: {message}", found), found
    assert os.listdir(tmp_path) == ["half"]


ENVIRONMENTS = [
    f"awkward_env:{env}-v0" for env in "Plain Dice Counts Types Reuses Parts Bare Endless Matrix Whole Far Texts".split()
]
ENVIRONMENTS += "CartPole-v1 Pendulum-v1 popgym-RepeatFirstEasy-v0 popgym-PositionOnlyPendulumEasy-v0 Nothing-v0 x:y".split()
WORDS = ["mine", "a/b: c?", "", "x" * 300, "runs"]
INTEGERS, FLOATS = [-5, -1, 0, 1, 2, 3, 7, 16, 64, 1000], [-1.0, 0.0, 1e-3, 0.5, 1.0, 2.0, 1e30, "nan", "inf"]


def command_line(rng, others):
    """A script, and flags of a short run with one to four others at random. `others`: folders of runs."""
    script = rng.choice(list(SCRIPTS))
    args = load_script(script).Args()
    given = flags(script, "Plain", "--total-timesteps", 600)
    for name in rng.sample(list(vars(args)), rng.randint(1, 4)):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if isinstance(value, bool):
            given += [flag if rng.random() < 0.5 else f"--no-{flag[2:]}"]
        elif name == "env_kwargs":
            given += [flag, *rng.choice([["box", "True"], ["nonsense", "1"], ["render_mode", "rgb_array"], []])]
        elif isinstance(value, int):
            given += [flag, rng.choice(INTEGERS[:-1] if name in ("update_epochs", "num_layers") else INTEGERS)]
        elif isinstance(value, float) or name == "target_kl":
            given += [flag, rng.choice(FLOATS)]
        else:
            pool = {"env_id": ENVIRONMENTS, "resume": others, "evaluate": others}.get(name, WORDS)
            given += [flag, rng.choice(pool)]
    return script, [str(flag) for flag in given]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(300))
def test_a_random_command_line_trains_or_names_a_flag(finished, tmp_path, monkeypatch, seed):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "disabled")
    others = ["nowhere", *(run_folder(finished(script)[0]) for script in ("dqn_tbb_ffm", "ppo_tbb_lru"))]
    folders = [shutil.copytree(path, tmp_path / "other" / path.name) if path != "nowhere" else path for path in others]
    script, given = command_line(random.Random(seed), folders)
    began = time.time()
    try:
        run(tmp_path, *given, script=script)
    except ValueError as error:
        assert re.search("--[a-z]", str(error)), (script, given, error)
    assert time.time() - began < 20, (script, given)
