"""Scripts as their users run them: in a process of their own, from the shell, killed, resumed, copied and misused."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def start(folder, *flags, script="dqn_tbb_ffm", path=ROOT / "tests"):
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "single_files" / f"{script}.py", *flags]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder, *flags, **where):
    process = start(folder, *flags, **where)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def fails(folder, *flags, **where):
    process = start(folder, *flags, **where)
    _, err = process.communicate()
    assert process.returncode != 0
    return err.strip().splitlines()[-1]


def run_folder(folder):
    (found,) = Path(folder, "runs").iterdir()
    return found


def scalars(folder):
    """Everything that a run logged, as {name: [(step, value)]}, without what depends on the clock."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "charts/SPS"}


def assert_equal_runs(one, other):
    """In everything logged and learned, and in the memory of each environment at the last checkpoint."""
    outcomes = []
    for folder in (run_folder(one), run_folder(other)):
        (model,) = folder.glob("*.cleanrl_model")
        saved = torch.load(model, weights_only=True)
        tensors = saved["agent" if "agent" in saved else "q_network"]
        tensors["recurrent_state"] = torch.load(folder / "checkpoint.pt", weights_only=False)["loop"][4]
        outcomes.append({**scalars(folder), **{name: tensor.tolist() for name, tensor in tensors.items()}})
    ours, theirs = outcomes
    assert ours.get("losses/td_loss", ours.get("losses/value_loss")) and ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


def kill_and_resume(whole, folder, flags, kills, script):
    """Kills a run at random moments, each some checkpoints after its start, and compares it with one that nobody killed."""
    process, resumed = start(folder, *flags, script=script), 0
    for low, high in kills:
        seen, wanted = set(), random.randint(low, high)  # a resumed run's first checkpoint is the one that it resumed from
        while len(seen) < wanted and process.poll() is None:
            seen |= {path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")}
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, resumed = start(folder, "--resume", run_folder(folder), script=script), resumed + 1
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert resumed > 0
    assert out.splitlines()[-1].startswith("evaluation")
    assert_equal_runs(whole, folder)  # nothing logged twice, nothing missing


def alone(tmp_path, script):
    """A copy of the script, and the path under which `import cleanrl_memoroid` fails, as where it is not installed."""
    package = tmp_path / "path" / "cleanrl_memoroid"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not installed')")
    (tmp_path / "my_agent.py").write_bytes((ROOT / "single_files" / f"{script}.py").read_bytes())
    return {"script": tmp_path / "my_agent", "path": os.pathsep.join([str(package.parent), str(ROOT / "tests")])}


def popgym_ids():
    """Every POPGym environment with finite actions."""
    import popgym  # noqa: F401  registers its environments

    return sorted(name for name in gym.registry if name.startswith("popgym-") and "Pendulum" not in name)
