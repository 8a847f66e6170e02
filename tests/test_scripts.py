"""The life of every script: it logs, saves and evaluates, is killed and resumed, runs alone, and says what is wrong.

A new script adds a row to SCRIPTS. What a script computes is in test_training.py.
"""

import functools
import os
import re
import shutil
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scripts import (
    assert_equal_runs,
    assert_keeps_its_source,
    fails,
    in_place_of_main,
    kill_and_resume,
    last_return,
    model,
    popgym_ids,
    run,
    run_folder,
    saved_state,
    scalars,
    source_texts,
    start,
)

DQN = """--total-timesteps 2000 --num-envs 20 --learning-starts 400 --train-frequency 16 --hidden-size 16 --batch-size 60
    --eval-episodes 5 --checkpoint-interval 200"""  # the first episodes, of 51 steps, end at 1,020
PPO = """--total-timesteps 2048 --num-envs 8 --num-steps 16 --num-minibatches 2 --update-epochs 2 --hidden-size 16
    --eval-episodes 3 --checkpoint-interval 256"""  # episodes of 51 steps (200 on the pendulum) run across 16 rollouts
DQN_LOGS = """charts/episodic_return charts/episodic_length losses/td_loss losses/q_values losses/grad_norm losses/transitions
    charts/epsilon charts/buffer_fill eval/episodic_return"""
PPO_LOGS = """charts/episodic_return charts/episodic_length charts/learning_rate charts/prefix_share losses/value_loss
    losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac losses/explained_variance
    losses/grad_norm losses/logprob_error eval/episodic_return"""

SAPG_LOGS = """charts/episodic_return charts/episodic_length charts/learning_rate losses/value_loss losses/policy_loss
    losses/entropy losses/approx_kl losses/clipfrac losses/explained_variance losses/grad_norm
    losses/logprob_error sapg/effective_sample_size sapg/largest_weight sapg/clipfrac_borrowed
    sapg/kl_between_policies sapg/return_0 sapg/return_1 sapg/return_2 sapg/return_3 sapg/std_0 sapg/std_1
    sapg/std_2 sapg/std_3 eval/episodic_return"""


class Script(NamedTuple):
    flags: str  # of a run of a second or two
    logs: str  # every metric
    reaches: float  # at least, at its defaults, on the task that its page shows first
    length: int = 51  # of an episode there (steps)
    counting: str = "counting_env:Counting-v0"  # an environment for it whose observations say where they are


SCRIPTS = {
    "dqn_tbb_ffm": Script(f"{DQN} --trace-size 4", DQN_LOGS, 0.99),
    "dqn_tbb_lru": Script(f"{DQN} --state-size 4", DQN_LOGS, 0.95),
    "dqn_tbb_glru": Script(f"{DQN} --state-size 4", DQN_LOGS, 0.95),
    "dqn_tbb_mingru": Script(DQN, DQN_LOGS, 0.95),
    "dqn_tbb_s5": Script(f"{DQN} --state-size 4", DQN_LOGS, 0.95),
    "dqn_tbb_linattn": Script(f"{DQN} --key-size 4 --value-size 4", DQN_LOGS, 0.95),
    "dqn_sbb_ffm": Script(f"{DQN} --trace-size 4 --segment-length 10", DQN_LOGS, -1),
    "dqn_sbb_lru": Script(f"{DQN} --state-size 4 --segment-length 10", DQN_LOGS, -1),
    "dqn_sbb_s5": Script(f"{DQN} --state-size 4 --segment-length 10 --burn-in 3", DQN_LOGS, -1),
    "dqn_sbb_linattn": Script(f"{DQN} --key-size 4 --value-size 4 --segment-length 10", DQN_LOGS, -1),
    "ppo_tbb_ffm": Script(f"{PPO} --trace-size 4", PPO_LOGS, 0.99),
    "ppo_tbb_lru": Script(f"{PPO} --state-size 4 --max-prefix 10", PPO_LOGS, 0.95),
    "ppo_tbb_glru": Script(f"{PPO} --state-size 4 --max-prefix 10", PPO_LOGS, 0.99),
    "ppo_tbb_mingru": Script(PPO, PPO_LOGS, 0.95),
    "ppo_tbb_s5": Script(f"{PPO} --state-size 4 --max-prefix 0", PPO_LOGS, 0.95),
    "ppo_tbb_linattn": Script(f"{PPO} --key-size 4 --value-size 4", PPO_LOGS, 0.95),
    "ppo_sbb_lstm": Script(PPO, PPO_LOGS, 0.95),
    "ppo_tbb_lru_continuous_action": Script(f"{PPO} --state-size 4", PPO_LOGS, 0.8, 200, "counting_env:CountingBox-v0"),
    "sapg_tbb_lru_continuous_action": Script(
        f"{PPO} --state-size 4 --max-prefix 20 --env-id popgym-PositionOnlyPendulumEasy-v0",
        SAPG_LOGS,
        1.8,
        200,
        "counting_env:CountingBox-v0",
    ),
}
FAMILIES = ["dqn_tbb_ffm", "dqn_sbb_s5", "ppo_tbb_lru", "ppo_sbb_lstm", "ppo_tbb_lru_continuous_action"]
every_script = pytest.mark.parametrize("script", SCRIPTS)
every_family = pytest.mark.parametrize("script", FAMILIES)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """script -> (folder, lines of output) of a finished run, of which several tests read."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp(script)
        return folder, run(folder, *SCRIPTS[script].flags.split(), script=script).splitlines()

    return of


@every_script
def test_a_run_logs_saves_and_evaluates(finished, script):
    (folder, out), (flags, logs, _, length, _) = finished(script), SCRIPTS[script]
    assert out[0].startswith(f"{script}: popgym-") and out[1].endswith(f"; runs/{run_folder(folder).name}")
    assert any(line.startswith("trained for 2,0") and line.endswith("/model.pt") for line in out)
    assert re.fullmatch(
        rf"evaluation: episodic_return=-?\d\.\d{{4}}, the mean of \d greedy episodes of {out[0].split()[1][:-1]}", out[-1]
    )
    logged = scalars(run_folder(folder))
    assert set(logged) == set(logs.split())
    assert {value for _, value in logged["charts/episodic_length"]} == {length}
    episodes = int(re.search(r"eval-episodes (\d)", flags)[1])
    assert [step for step, _ in logged["eval/episodic_return"]] == list(range(2000 if "dqn" in script else 2048, 2100))[
        :episodes
    ]
    again = run(folder, "--evaluate", run_folder(folder), script=script)
    assert again.splitlines()[-1] == out[-1]  # equal seed, equal episodes, equal weights
    assert f"the mean of {episodes - 1}" in run(
        folder, "--evaluate", run_folder(folder), "--eval-episodes", episodes - 1, script=script
    )
    assert not list(folder.glob("runs/*/*.partial"))
    assert_keeps_its_source(run_folder(folder), script)


def test_a_script_that_changed_meanwhile_is_told_from_the_one_that_began_the_run(finished, tmp_path):
    """The folder keeps the text that the run began with; the events have both."""
    script, changed = "dqn_tbb_ffm", tmp_path / "dqn_tbb_ffm.py"
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    (source,) = source_texts(run_folder(tmp_path))
    changed.write_text(source + "# changed\n")
    kept = run_folder(tmp_path) / changed.name
    told = f"{script}.py has changed since this run began: `diff {kept} {changed}` shows how"
    for flag in ("--resume", "--evaluate"):
        assert run(tmp_path, flag, run_folder(tmp_path), script=changed).splitlines()[0] == told
        assert "has changed" not in run(tmp_path, flag, run_folder(tmp_path), script=script)
    assert kept.read_text() == source and source_texts(run_folder(tmp_path)) == [source, source + "# changed\n", source]


@every_family
def test_equal_seeds_give_equal_runs_and_others_do_not(finished, tmp_path, script):
    flags, loss = SCRIPTS[script].flags.split(), "losses/td_loss" if "dqn" in script else "losses/value_loss"
    folders = [tmp_path / seed for seed in ("1", "2")]
    for folder in folders:
        folder.mkdir()
        run(folder, *flags, "--seed", folder.name, script=script)
    assert_equal_runs(finished(script)[0], folders[0], script)
    assert scalars(run_folder(folders[0]))[loss] != scalars(run_folder(folders[1]))[loss]


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_lru"])  # and test_sapg.py; all scripts below
def test_a_killed_run_resumes_exactly(finished, tmp_path, script):
    kill_and_resume(finished(script)[0], tmp_path, SCRIPTS[script].flags.split(), [(3, 6)], script)


@pytest.mark.slow
@every_script
def test_a_run_that_is_killed_at_random_moments_resumes_exactly(finished, tmp_path, script):
    kills = 0
    while kills < 20:
        folder = tmp_path / str(kills)
        folder.mkdir()
        kills += kill_and_resume(finished(script)[0], folder, SCRIPTS[script].flags.split(), [(1, 4), (1, 4)], script)
    print(f"{script}: equal after {kills} of {kills} kills")


@every_script
def test_a_finished_run_that_is_resumed_is_logged_once(finished, tmp_path, script):
    """As one that was killed after its evaluation is."""
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    run(tmp_path, "--resume", run_folder(tmp_path), script=script)
    assert_equal_runs(finished(script)[0], tmp_path, script)


@every_family
def test_a_resumed_run_takes_the_flags_that_it_is_given(finished, tmp_path, script):
    """Its own flags hold otherwise; the folder is the one that was given, from whatever directory."""
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder, name = run_folder(tmp_path), "q_network" if "dqn" in script else "agent"
    flags = "--learning-rate 1e-5 --no-anneal-lr --total-timesteps 2400".split()
    out = run(elsewhere, "--resume", folder, *flags, script=script)
    assert "trained for 2,40" in out or "trained for 2,304" in out
    args = torch.load(folder / "model.pt", weights_only=True)["args"]
    assert args["learning_rate"] == 1e-5 and args["total_timesteps"] == 2400 and args["hidden_size"] == 16
    assert saved_state(tmp_path, script)["optimizer"].param_groups[0]["lr"] == 1e-5
    assert not list(elsewhere.iterdir())
    assert [k for k, v in model(finished(script)[0]).items() if not torch.equal(v, model(tmp_path)[k])], name


def test_evaluation_takes_the_flags_that_it_is_given_and_else_those_of_the_run(tmp_path):
    kwargs = "--env-id counting_env:Counting-v0 --env-kwargs reward 2".split()
    flags = [*SCRIPTS["dqn_tbb_ffm"].flags.split(), *kwargs, "--total-timesteps", "500"]
    run(tmp_path, *flags)
    found = [
        last_return(run(tmp_path, "--evaluate", run_folder(tmp_path), *more)) for more in ((), ("--env-kwargs", "reward", 4))
    ]
    assert found[1] == 2 * found[0] > 0
    assert last_return(run(tmp_path, "--evaluate", run_folder(tmp_path), "--env-id", "counting_env:Both-v0")) == found[0]


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_lru"])
def test_an_environment_that_cannot_be_saved_resumes_with_new_episodes(tmp_path, script):
    flags = ["--env-id", "counting_env:Unpicklable-v0", *SCRIPTS[script].flags.split()]
    out = run(tmp_path, *flags, script=script)
    assert sum("cannot be saved (this environment cannot be pickled)" in line for line in out.splitlines()) == 1
    resumed = run(tmp_path, "--resume", run_folder(tmp_path), script=script)
    assert "could not be saved: new episodes begin" in resumed and "warning" not in resumed
    assert resumed.splitlines()[-1].startswith("evaluation")


@every_script
def test_the_file_alone_runs(tmp_path, script):
    copy = tmp_path / "my_agent.py"
    shutil.copy(os.path.join(os.path.dirname(__file__), "..", "single_files", f"{script}.py"), copy)
    short = "--total-timesteps 512 --num-envs 4 --eval-episodes 1".split()
    short += "--learning-starts 20 --train-frequency 250".split() if "dqn" in script else []
    flags = [*SCRIPTS[script].flags.split(), *short, "--env-id", SCRIPTS[script].counting]
    out = run(tmp_path, *flags, script=copy, alone=True)
    assert out.startswith("my_agent: counting_env:") and "this file's own scan" in out and "warning" not in out
    assert "evaluation: episodic_return=" in out
    name = "losses/td_loss" if "dqn" in script else "losses/value_loss"
    assert np.isfinite([value for _, value in scalars(run_folder(tmp_path))[name]]).all()


def test_a_new_process_runs_the_script_from_anywhere(tmp_path):
    """Not in this process, as the other tests do: no import is missing, and the bar goes to stderr."""
    process = start(tmp_path, *SCRIPTS["dqn_tbb_ffm"].flags.split())
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("dqn_tbb_ffm: popgym-") and "2000/2000" in err and "evaluation: episodic_return" in out


ERRORS = [  # script, flags, the message
    ("dqn_tbb_ffm", "--env-id popgym-PositionOnlyPendulumEasy-v0", "--env-id: expected Discrete actions, got Box.*PPO script"),
    ("dqn_tbb_ffm", "--env-id counting_env:Image-v0", "--env-id: expected vector observations, got Box.*flatten"),
    ("dqn_tbb_ffm", "--env-id counting_env:Counting-v0 --env-kwargs k", "SystemExit"),
    ("dqn_tbb_ffm", "--resume nowhere", "--resume: expected a file nowhere/checkpoint.pt, got none; see `ls runs`"),
    ("dqn_tbb_ffm", "--evaluate nowhere", "--evaluate: expected a file nowhere/model.pt, got none"),
    (
        "dqn_tbb_ffm",
        "--buffer-size 20 --batch-size 20",
        "--buffer-size 20: an episode has not ended after so many steps; raise it",
    ),
    ("dqn_tbb_ffm", "--num-envs 0", "--num-envs: expected at least 1, got 0"),
    ("dqn_tbb_ffm", "--batch-size 0", "--batch-size: expected at least 1, got 0"),
    ("dqn_tbb_ffm", "--train-frequency 0", "--train-frequency: expected at least 1, got 0"),
    (
        "dqn_tbb_ffm",
        "--env-id counting_env:Silent-v0 --capture-video",
        "--env-id counting_env:Silent-v0: cannot be made .*--capture-video: .*render_mode.*change them",
    ),
    ("dqn_sbb_ffm", "--segment-length 0", "--segment-length: expected at least 1, got 0"),
    ("dqn_sbb_ffm", "--burn-in -1", "--burn-in: expected at least 0, got -1"),
    ("dqn_tbb_lru", "--r-min 2", "--r-min, --r-max: expected 0 <= r_min <= r_max <= 1, got 2"),
    ("dqn_tbb_s5", "--dt-min 0", "--dt-min, --dt-max: expected 0 < dt_min <= dt_max, got 0"),
    (
        "ppo_tbb_ffm",
        "--env-id popgym-PositionOnlyPendulumEasy-v0",
        "expected finite actions, got Box.*ppo_tbb_lru_continuous_action",
    ),
    ("ppo_tbb_ffm", "--env-id counting_env:Image-v0", "--env-id: expected vector observations, got Box.*flatten"),
    ("ppo_tbb_ffm", "--num-minibatches 3", "--num-minibatches 3: expected a divisor of --num-envs 64"),
    ("ppo_tbb_ffm", "--total-timesteps 100", "--total-timesteps 100: expected one rollout at least, 3328; raise it"),
    ("ppo_tbb_ffm", "--max-prefix -1", "--max-prefix: expected at least 0, got -1"),
    ("ppo_tbb_ffm", "--num-steps 0", "--num-steps: expected at least 1, got 0"),
    ("ppo_tbb_ffm", "--resume nowhere", "--resume: expected a file nowhere/checkpoint.pt, got none"),
    ("ppo_tbb_lru_continuous_action", "--env-id CartPole-v1", "expected Box actions of floats, got Discrete.*ppo_tbb_lru.py"),
    ("ppo_sbb_lstm", "--max-prefix 10", "--max-prefix 10: expected 0 here; the tbb scripts carry"),
    *(
        []
        if torch.cuda.is_available()
        else [("dqn_tbb_ffm", "--cuda", "PyTorch finds none"), ("ppo_tbb_ffm", "--cuda", "finds none")]
    ),
]


@pytest.mark.parametrize("script, flags, message", ERRORS)
def test_errors_say_what_to_do(tmp_path, capsys, script, flags, message):
    if message == "SystemExit":  # tyro's own, which ends the process with its explanation
        out = run(tmp_path, *flags.split(), script=script)
        assert "env-kwargs" in out or not list(tmp_path.iterdir())
        return
    found = fails(tmp_path, *flags.split(), script=script)
    assert re.search(message, found), found
    assert "--buffer-size" in flags or not list(tmp_path.iterdir())  # before anything is written


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_lru"])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_helps(tmp_path, script):
    """Rewards so large that a smaller learning rate would not help."""
    flags = [*SCRIPTS[script].flags.split(), "--env-id", "counting_env:Counting-v0", "--env-kwargs", "reward", "1e37"]
    flags += ["--no-norm-reward"] if "ppo" in script else ["--total-timesteps", "600"]
    found = fails(tmp_path, *flags, script=script)
    assert re.search(r"FloatingPointError: step \d+: loss \S+, gradient norm \S+; scale rewards", found), found
    saved = saved_state(tmp_path, script)
    assert all(torch.isfinite(v).all() for v in saved["q_network" if "dqn" in script else "agent"].state_dict().values())


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_lru"])
def test_a_run_that_has_diverged_names_the_way_back(finished, tmp_path, script):
    """Weights that are not finite, as after too large a step."""
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    path = run_folder(tmp_path) / "checkpoint.pt"
    with in_place_of_main(script):
        saved = torch.load(path, weights_only=False)
        network = saved["state"]["q_network" if "dqn" in script else "agent"]
        next(network.parameters()).data[0] = torch.inf
        torch.save(saved, path)
    found = fails(tmp_path, "--resume", run_folder(tmp_path), "--total-timesteps", 4000, script=script)
    assert "FloatingPointError: step" in found and f"--resume {run_folder(tmp_path)} with a smaller --learning-rate" in found


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_ffm"])
def test_video(tmp_path, script):
    pytest.importorskip("moviepy")
    flags = [
        *SCRIPTS[script].flags.split(),
        "--env-id",
        "counting_env:Counting-v0",
        "--total-timesteps",
        "512",
        "--capture-video",
    ]
    run(tmp_path, *flags, script=script)
    assert [path.stat().st_size > 0 for path in tmp_path.glob("videos/*/*.mp4")]


@pytest.mark.slow
def test_offline_tracking(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start(
        tmp_path,
        *SCRIPTS["ppo_tbb_ffm"].flags.split(),
        "--env-id",
        "counting_env:Counting-v0",
        "--track",
        script="ppo_tbb_ffm",
    )
    assert process.wait() == 0
    assert list(tmp_path.glob("wandb/offline-run-*"))


@pytest.mark.parametrize(
    "script, words",
    [("dqn_tbb_ffm", "the capacity of the tape buffer"), ("ppo_tbb_ffm", "a running episode keeps so many of its last rows")],
)
def test_help_reads_like_documentation(script, words):
    out = " ".join(run(".", "--help", script=script).replace("│", " ").split())
    assert "solved in a minute on a CPU" in out and words in out


@pytest.mark.slow
@pytest.mark.parametrize("env_id", popgym_ids())
@every_script
def test_every_environment_trains(tmp_path, script, env_id):
    flags = SCRIPTS[script].flags.split()  # episodes of up to 1,024 steps, those of the labyrinths
    flags += "--num-envs 2 --total-timesteps 2400 --learning-starts 200 --eval-episodes 2".split() if "dqn" in script else []
    if "continuous" in script:
        pytest.skip("its environments have other actions")
    run(tmp_path, "--env-id", env_id, *flags, "--checkpoint-interval", "0", script=script)
    losses = scalars(run_folder(tmp_path))["losses/td_loss" if "dqn" in script else "losses/value_loss"]
    assert losses and np.isfinite([value for _, value in losses]).all()


@pytest.mark.slow
@every_script
def test_a_task_that_needs_memory_is_learned(tmp_path, script):
    """The script as it comes: the first run behind each page of docs/."""
    began = time.time()
    out = run(tmp_path, script=script)
    assert last_return(out) >= SCRIPTS[script].reaches, out
    print(f"{script}: {last_return(out)} in {time.time() - began:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_ffm"])
def test_the_file_alone_learns(tmp_path, script):
    out = run(tmp_path, script=script, alone=True)
    assert last_return(out) >= SCRIPTS[script].reaches, out
