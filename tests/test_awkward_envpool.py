"""The envpool scripts: flags out of range, other people's files, names of runs, signals."""

import os
import re
import shutil
import signal

import pytest
import torch
from conftest import load_script
from scripts import fails, run_folder, saved_state, scalars

from cleanrl_memoroid import runs

pytest.importorskip("envpool")
from test_envpool import SCRIPT as DQN  # noqa: E402
from test_envpool import SEGMENTS, SMALL, main  # noqa: E402
from test_envpool_ppo import ATARI, FLAGS, MINIGRID, MULTIGPU  # noqa: E402

RUNS = {DQN: SMALL, ATARI: FLAGS[ATARI], MINIGRID: FLAGS[MINIGRID]}  # MULTIGPU is a variant of ATARI
every_run = pytest.mark.parametrize("script", RUNS)


def raises(script, folder, *flags):
    with pytest.raises(ValueError) as error:
        main(script, folder, *flags, fake=script != MINIGRID)
    return str(error.value)


@pytest.mark.parametrize("script", [*RUNS, MULTIGPU, SEGMENTS])
def test_numbers_out_of_range_name_their_flag_before_anything_starts(tmp_path, script):
    for name, value in vars(load_script(script).Args()).items():
        if type(value) in (int, float):
            flag = f"--{name.replace('_', '-')}"
            assert f"{flag}: expected at least" in fails(tmp_path, flag, -1, script=script)
    assert not list(tmp_path.iterdir())


@every_run
def test_a_stopped_run_saves_itself_and_goes_on_in_its_folder(tmp_path, monkeypatch, capsys, script):
    module, calls = load_script(script), []
    step = module.EnvPool.step

    def counted(self, actions):
        calls.append(0)
        if len(calls) == 37:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, actions)

    monkeypatch.setattr(module.EnvPool, "step", counted)
    try:
        main(script, tmp_path, *RUNS[script], "--checkpoint-interval", 0, "--exp-name", "a/b: c?", fake=script != MINIGRID)
    finally:
        runs.catch_stop_signals(on=False)
    assert re.search(r"stopped; --resume runs/\S+ goes on from step \d+", capsys.readouterr().out.splitlines()[-1])
    assert saved_state(tmp_path, script)["global_step"] > 0 and not (run_folder(tmp_path) / "model.pt").exists()
    assert re.fullmatch(r"[\w.=+-]+", run_folder(tmp_path).name)
    folder = run_folder(tmp_path).rename(tmp_path / "my run")
    (tmp_path / "here").mkdir()
    main(script, tmp_path / "here", "--resume", f"{folder}/", fake=script != MINIGRID)
    out = capsys.readouterr().out
    assert "greedy games of" in out.splitlines()[-1] and not list((tmp_path / "here").iterdir())
    assert scalars(folder)["eval/episodic_return"] and (folder / "model.pt").exists()


@every_run
def test_another_script_s_file_and_a_network_that_does_not_fit_are_refused(tmp_path, script):
    main(script, tmp_path, *RUNS[script], "--checkpoint-interval", 200, fake=script != MINIGRID)
    folder = run_folder(tmp_path)
    others = [other for other in RUNS if other != script]
    for what, file in (("--resume", "checkpoint.pt"), ("--evaluate", "model.pt")):
        for other in others:
            assert f"{file} is of {script}.py, expected one of {other}.py" in raises(other, tmp_path, what, folder)
        assert "sizes of layers" in raises(script, tmp_path, what, folder, "--hidden-size", 24)
    assert "--seed: a resumed run keeps 1, got 2" in raises(script, tmp_path, "--resume", folder, "--seed", 2)
    if not torch.cuda.is_available():
        assert "resume with --no-cuda" in raises(script, tmp_path, "--resume", folder, "--cuda")
    shutil.copy(folder / "model.pt", folder / "checkpoint.pt")
    (folder / "checkpoint.pt").write_bytes((folder / "model.pt").read_bytes()[:1000])
    assert "cannot be read" in raises(script, tmp_path, "--resume", folder)


def test_the_tape_lies_on_a_device_that_is_there(tmp_path):
    for device in ("cuda", "card"):
        assert f"--tape-device: expected cpu, or with --cuda cuda, got {device}; leave it out" in raises(
            DQN, tmp_path, "--tape-device", device
        )
    assert not list(tmp_path.iterdir())
