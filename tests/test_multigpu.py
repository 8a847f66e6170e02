"""ppo_tbb_lru_multigpu.py under torchrun: two processes learn as one, write once, stop together and go on exactly."""

import os
import time

import numpy as np
import pytest
import torch
from processes import finish, spied, torchrun
from scripts import ROOT, assert_keeps_its_source, fails, last_return, model, run, run_folder, scalars

SCRIPT = "ppo_tbb_lru_multigpu"
FEW = """--num-envs 4 --num-steps 16 --num-minibatches 1 --update-epochs 2 --total-timesteps 512 --hidden-size 16
    --state-size 4 --eval-episodes 2 --max-grad-norm 1000000 --checkpoint-interval 64""".split()


def test_two_processes_learn_as_one_on_the_joined_tape(tmp_path):
    """Each with half of the environments, beside one process with all: one gradient, one writer, equal weights."""
    out = finish(torchrun(tmp_path, spied(tmp_path, SCRIPT, "{rank}", update=4), *FEW))
    assert out.count("trained for 512 steps") == out.count("evaluation: ") == 1 and "warning" not in out
    one, other = (torch.load(tmp_path / f"last_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items()) and one[2] != other[2]
    run(tmp_path, *FEW, script=spied(tmp_path, "ppo_tbb_lru", "whole", update=4))
    whole = torch.load(tmp_path / "last_whole.pt", weights_only=False)
    np.testing.assert_array_equal(np.concatenate([one[1], other[1]], 1), whole[1])  # the same episodes, of equal seeds
    whole, ours, theirs = (torch.load(tmp_path / f"gradient_{who}_1.pt") for who in ("whole", 0, 1))
    assert len(whole) > 10 and max(grad.abs().max() for grad in whole) > 1e-2
    for one, other, expected in zip(ours, theirs, whole):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)
    ours, theirs = (scalars(next(tmp_path.glob(f"runs/*__{script}__*"))) for script in (SCRIPT, "ppo_tbb_lru"))
    assert ours.keys() == theirs.keys() and len(ours["losses/value_loss"]) == 8
    assert_keeps_its_source(next(tmp_path.glob(f"runs/*__{SCRIPT}__*")), tmp_path / f"{SCRIPT}.py")
    assert "episodic_return" in run(tmp_path, "--evaluate", next(tmp_path.glob(f"runs/*__{SCRIPT}__*")), script=SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_a_stopped_run_goes_on_exactly(tmp_path, how):
    """At kill -9 of every process, or together after the same rollout."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    flags, path = [*FEW, "--total-timesteps", 6400], ROOT / "single_files" / f"{SCRIPT}.py"
    out = finish(torchrun(whole, path, *flags))
    process = torchrun(part, path, *flags)
    while not list(part.glob("runs/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    if how == "kill":
        os.killpg(process.pid, 9)
        process.communicate()
    else:
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert out.count("; --resume runs/") == 1 and "stopped" in out, err
    again = finish(torchrun(part, path, "--resume", run_folder(part)))
    assert "new episodes" not in again
    assert model(whole).keys() == model(part).keys()
    assert all(torch.equal(tensor, model(part)[name]) for name, tensor in model(whole).items())
    one, two = scalars(run_folder(whole)), scalars(run_folder(part))
    assert one == two and len(one["losses/value_loss"]) == 100


@pytest.mark.slow
def test_with_another_number_of_processes_a_run_goes_on_with_new_episodes(tmp_path):
    path = ROOT / "single_files" / f"{SCRIPT}.py"
    finish(torchrun(tmp_path, path, *FEW))
    out = finish(torchrun(tmp_path, path, "--resume", run_folder(tmp_path), "--total-timesteps", 1024, processes=1))
    assert "new episodes begin" in out and "trained for 1,024 steps" in out and last_return(out) <= 1


def test_errors_say_what_to_do(tmp_path):
    assert "--num-envs 6: expected a multiple of 4, minibatches x processes" in fails(
        tmp_path, *"--num-envs 6 --num-minibatches 4".split(), script=SCRIPT
    )
    if not torch.cuda.is_available():
        assert "--cuda: expected a CUDA device, PyTorch finds none" in fails(tmp_path, "--cuda", script=SCRIPT)
    assert not list(tmp_path.iterdir())
