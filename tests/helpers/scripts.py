"""Scripts as their users run them: from the command line, killed, resumed, copied and misused.

`run` and `fails` run a script in this process, which has imported everything already; `start` runs it in a process of its own.
"""

import contextlib
import functools
import importlib.util
import io
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import gymnasium as gym
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).parent


def path_of(script):
    return script if isinstance(script, Path) else ROOT / "single_files" / f"{script}.py"


@functools.cache
def load_script(name):
    """The module of single_files/{name}.py; its training code is under `if __name__ == "__main__"` and does not run."""
    spec = importlib.util.spec_from_file_location(name, path_of(name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def run(folder, *flags, script="dqn_tbb_ffm", alone=False):
    """What `python SCRIPT FLAGS` prints, run in `folder`; `alone`: as if cleanrl_memoroid were not installed."""
    out, path = io.StringIO(), path_of(script)
    package = [name for name in sys.modules if name.split(".")[0] == "cleanrl_memoroid"] or ["cleanrl_memoroid"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_set(sys.modules, dict.fromkeys(package) if alone else {}))
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *map(str, flags)]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        with contextlib.suppress(SystemExit):  # of --evaluate
            runpy.run_path(str(path), run_name="__main__")
    return out.getvalue()


@contextlib.contextmanager
def _set(mapping, values):
    """Other keys stay as they become meanwhile: mock.patch.dict would take imported modules away again."""
    before = {key: mapping[key] for key in values if key in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for key in values:
            del mapping[key]
        mapping.update(before)


def fails(folder, *flags, **where):
    """The message of the error that the script ends with."""
    try:
        run(folder, *flags, **where)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"expected an error, {flags} ran to the end")


def start(folder, *flags, script="dqn_tbb_ffm", paths=(HELPERS, ROOT)):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, path_of(script), *map(str, flags)]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_folder(folder):
    (found,) = Path(folder, "runs").iterdir()
    return found


def in_place_of_main(script):
    """Checkpoints refer to the classes of the script that saved them as those of `__main__`."""
    return _set(sys.modules, {"__main__": load_script(script)})


def saved_state(folder, script):
    """The variables in a run's checkpoint by name."""
    with in_place_of_main(script):
        return torch.load(run_folder(folder) / "checkpoint.pt", weights_only=False)["state"]


def model(folder):
    saved = torch.load(run_folder(folder) / "model.pt", weights_only=True)
    return saved["agent" if "agent" in saved else "q_network"]


def scalars(folder):
    """Everything that a run logged, as {name: [(step, value)]}, without what depends on the clock."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "charts/SPS"}


def source_texts(folder):
    """The scripts that a run's events hold, one from each start."""
    events = EventAccumulator(str(folder)).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("source/text_summary")]
    return [text.removeprefix("```python\n").removesuffix("```") for text in texts]


def assert_keeps_its_source(folder, script):
    """In the run's folder and in its events."""
    source = path_of(script).read_text(encoding="utf-8")
    assert (folder / path_of(script).name).read_text(encoding="utf-8") == source
    assert source_texts(folder) == [source]


def last_return(out):
    return float(out.rsplit("evaluation: episodic_return=", 1)[1].split(",")[0])


def assert_equal_runs(one, other, script):
    """In everything logged and learned, and in the memory of each environment at the last checkpoint."""
    outcomes = []
    for folder in (one, other):
        tensors = {**model(folder), "recurrent_state": saved_state(folder, script).get("recurrent_state", torch.zeros(1))}
        outcomes.append({**scalars(run_folder(folder)), **{name: tensor.tolist() for name, tensor in tensors.items()}})
    ours, theirs = outcomes
    assert any(name.endswith("_loss") and logged for name, logged in ours.items()) and ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


def kill_and_resume(whole, folder, flags, kills, script, stop=signal.SIGKILL):
    """Kills a run at random moments, each some checkpoints after its start, and compares it with one that nobody killed.

    Returns: how often it was killed; it may end before the last time.
    """
    process, resumed = start(folder, *flags, script=script), 0
    for low, high in kills:
        seen, wanted = set(), random.randint(low, high)  # a resumed run's first checkpoint is the one that it resumed from
        while len(seen) < wanted and process.poll() is None:
            seen |= {path.stat().st_mtime_ns for path in Path(folder).glob("runs/*/checkpoint.pt")}
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        if process.poll() is None:
            process.send_signal(stop)
            process.wait()
            process, resumed = start(folder, "--resume", run_folder(folder), script=script), resumed + 1
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert resumed > 0
    assert out.splitlines()[-1].startswith("evaluation")
    assert_equal_runs(whole, folder, script)  # nothing logged twice, nothing missing
    return resumed


def popgym_ids():
    """Every POPGym environment with finite actions."""
    import popgym  # noqa: F401  registers its environments

    return sorted(name for name in gym.registry if name.startswith("popgym-") and "Pendulum" not in name)
