"""What keeps a run from harm: environments that return what no tape can take, copies that are none, signals, closed pipes.

The scripts in `single_files/` run without this module, too. Then they trust their environments, and Ctrl-C stops them at once.
"""

import contextlib
import copy
import itertools
import os
import pickletools
import random
import re
import signal
import sys
import threading
import zipfile
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import EzPickle
from gymnasium.vector.utils import iterate

LARGEST = np.float64(np.finfo(np.float32).max)  # what a tape can hold


class Checked(gym.Wrapper):
    """An environment whose observations are arrays of its own in memory, whose rewards are finite floats, without infos.

    A tape keeps the final observation while the next episode begins already: an environment that writes all observations into
    one array would change it. Infos are for people; vector environments stack them, which fails where their shapes change.

    Args:
        env: an environment with one array as observation.
        idx: its place in a vector environment, for the error.
    Raises: ValueError on an observation of another shape than its space's, and on one, or a reward, that is nan, infinite,
        larger than float32 takes, or no number; it says which environment and step it came from.
    """

    def __init__(self, env, idx=0):
        super().__init__(env)
        self.idx, self.steps = idx, 0

    def reset(self, *, seed=None, options=None):
        return self.array(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.steps += 1
        try:
            number = float(reward if isinstance(reward, (int, float)) else np.asarray(reward).item())
        except (TypeError, ValueError):
            number = np.nan
        if not abs(number) <= LARGEST:
            raise self.error("one finite number as reward", reward)
        return self.array(obs), number, bool(terminated), bool(truncated), {}

    def array(self, obs):
        shape = self.env.observation_space.shape
        try:
            array = np.array(obs)
        except (TypeError, ValueError):  # rows of several lengths
            raise self.error(f"an observation of shape {shape}", obs) from None
        if array.shape != shape or (kind := array.dtype.kind) not in "biuf":
            raise self.error(f"an observation of numbers of shape {shape}", obs)
        if kind == "f" and not np.vdot(array, array) <= LARGEST:  # one pass; only if squares are too large, a closer look
            if not (np.abs(array) <= LARGEST).all():
                raise self.error("an observation of finite numbers", obs)
        return array

    def error(self, expected, got):
        got = np.array2string(got, threshold=20) if isinstance(got, np.ndarray) else repr(got)
        where = f"--env-id {self.spec.id if self.spec else self.unwrapped}: environment {self.idx}, step {self.steps:,}"
        return ValueError(f"{where}: expected {expected}, got {got[:500]}; correct the environment, or wrap it in make_env")


def unlike(envs, pickled, actions, outcome):
    """Why a pickle that was made before a step is no copy of the environments; "" if copies do in that step as they did.

    Args:
        envs: a vector environment, of `AutoresetMode.SAME_STEP`.
        pickled: as of `checkpoint`, before the step.
        actions: of the step.
        outcome: what `envs.step(actions)` returned.
    Returns: the reason. An environment whose pickle holds what its constructor was given (gymnasium.utils.EzPickle) is no
        copy, even if one step does not tell. The global random states are left as they are.
    """
    before = _random_states()
    next_obs, *rest, infos = outcome
    try:
        twins, *states = cloudpickle.loads(pickled)
        _set_random_states(*states)
        if isinstance(twins, gym.vector.VectorEnv):  # one that steps its environments as arrays
            same = all(map(np.array_equal, twins.step(actions)[:4], outcome[:4]))
            return "" if same else "a copy of the environments does not go on as they do"
        for i, (twin, action) in enumerate(zip(twins, iterate(envs.action_space, actions))):
            if name := _forgetful(twin):
                return f"{name} is pickled by EzPickle, which keeps what its constructor was given and not its state"
            obs, reward, terminated, truncated, _ = twin.step(action)
            ended = terminated or truncated
            same = np.array_equal(obs, infos["final_obs"][i] if ended else next_obs[i])
            same = same and [float(reward), terminated, truncated] == [float(rest[0][i]), rest[1][i], rest[2][i]]
            if not same or (ended and not np.array_equal(twin.reset()[0], next_obs[i])):
                return f"a copy of environment {i} does not go on as the environment does"
    except Exception as error:  # whatever an environment raises
        return f"a copy of it raises {error!r}"
    finally:
        _set_random_states(*before)
    return ""


def _forgetful(env):
    """The name of the class, in a chain of wrappers, whose pickle forgets its state; else ""."""
    hooks = "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"
    while env is not None:
        kind = type(env)
        if isinstance(env, EzPickle) and all(getattr(kind, name) is getattr(EzPickle, name) for name in hooks):
            return kind.__name__
        env = getattr(env, "env", None)
    return ""


def _random_states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_states(python, numpy, pytorch):
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(pytorch)


_handlers = {}  # signal -> its handler before catch_stop_signals


def catch_stop_signals(on=True):
    """From now on Ctrl-C and SIGTERM do not end the process, and neither does the other end of a pipe that closes.

    Args:
        on: False puts the handlers of before back.
    Returns: a list, empty until the first of these signals, whose number it holds then: look at it between steps, save, and
        exit. The same signal a second time ends the process at once. Outside the main thread, where Python catches no signals,
        it stays empty.
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():
        return caught

    def stop(number, frame):
        caught.append(number)
        signal.signal(number, _handlers.pop(number))
        with contextlib.suppress(OSError):  # print is not safe in a handler
            os.write(2, b"\nstopping after a checkpoint; once more: at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        if on:
            _handlers.setdefault(number, signal.getsignal(number))
            signal.signal(number, stop)
        elif number in _handlers:
            signal.signal(number, _handlers.pop(number))
    for stream in (sys.stdout, sys.stderr):
        _survive_closed_pipe(stream)
    return caught


def _survive_closed_pipe(stream):
    """What is written after the reader has gone, as with `| head`, is dropped."""

    def guarded(method):
        def call(*args):
            try:
                return method(*args)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return call

    try:
        stream.fileno()
        if not hasattr(stream.write, "__wrapped__"):
            stream.write, stream.flush = guarded(stream.write), guarded(stream.flush)
            stream.write.__wrapped__ = True
    except (AttributeError, OSError):  # no file behind it, as in a notebook
        pass


KEPT = "seed", "buffer_size", "segment_length", "burn_in"  # what a tape in a checkpoint was made with, and its random numbers
SHARES = """gamma gae_lambda tau start_e end_e exploration_fraction learning_rate sigma_learning_rate critic_learning_rate
    noise_memory eta_start eta_end borrowed_lambda""".split()  # at most 1
MAY_BE_ZERO = "seed checkpoint_interval max_prefix learning_starts burn_in fine_tune_updates".split()


def check_flags(args, zero=(), most=None, saved=()):
    """Raises ValueError on the first flag that is out of its range, and names it.

    Whole numbers are at least 1 or, if `MAY_BE_ZERO` has them, 0; other numbers are from 0 to a million, so finite, or, if
    `SHARES` has them, to 1. The steps hold at least one rollout, an LRU begins inside the unit circle, --cuda needs CUDA.

    Args:
        args: a dataclass.
        zero: the names of further whole numbers that may be 0.
        most: {name: the largest value} of further numbers.
        saved: {name: value} of a run that is resumed, else empty: those of `KEPT` cannot change.
    """
    flags, saved = vars(args), dict(saved)
    most = {**dict.fromkeys(SHARES, 1), "seed": 10**9, **(most or {})}
    if steps := flags.get("total_timesteps"):
        last = steps - ("learning_starts" in flags)  # then at least one step is left for an update
        most |= dict.fromkeys(("num_envs", "train_frequency", "learning_starts"), last)
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if name in KEPT and value != saved.get(name, value):
            raise ValueError(f"{flag}: a resumed run keeps {saved[name]}, got {value}; leave it out, or start a new run")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least = int(isinstance(value, int) and name not in (*MAY_BE_ZERO, *zero))
        largest = most.get(name, np.inf if isinstance(value, int) or name == "max_grad_norm" else 1e6)
        if not value >= least:
            raise ValueError(f"{flag}: expected at least {least}, got {value}; raise it")
        if value > largest:
            raise ValueError(f"{flag}: expected at most {largest:,}, got {value}; lower it")
    if steps and steps < (rollout := flags["num_envs"] * flags.get("num_steps", 1)):
        raise ValueError(f"--total-timesteps {steps}: expected one rollout at least, {rollout}; raise it")
    if "r_min" in flags and not 0 <= args.r_min <= args.r_max <= 1:
        got = f"{args.r_min} and {args.r_max}"
        raise ValueError(f"--r-min, --r-max: expected 0 <= r_min <= r_max <= 1, got {got}; change them")
    if flags.get("cuda") and not torch.cuda.is_available():
        raise ValueError("--cuda: expected a CUDA device, PyTorch finds none; drop the flag, or resume with --no-cuda")


@contextlib.contextmanager
def env_errors(env_id):
    """Whatever an environment raises while it is made becomes a ValueError that names the flags that made it."""
    try:
        yield
    except Exception as error:
        what = f"--env-id {env_id}: cannot be made and flattened with these --env-kwargs and --capture-video"
        raise ValueError(f"{what}: {error!r}; change them, or take in make_env a part of the observation") from error


def new_run_dir(name):
    """Makes the folder runs/NAME, or, if another run has it that began in the same second, runs/NAME-2, ...; returns its path.

    What file systems, shells or Weights and Biases take for more than a letter becomes a hyphen.
    """
    first = path = "runs/" + re.sub(r"[^\w.=+-]+", "-", name)[-120:]
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            os.makedirs(path)
            return path
        path = f"{first}-{number}"


def save(path, content):
    """Leaves a whole file or none under this name, also when the machine stops on the way.

    Args:
        path: in a run's folder.
        content: for `torch.save`, {"script": name, ...}: in front, as `load` reads it before it unpickles anything.
    Raises: OSError with path and remedy, as when the disk is full.
    """
    try:
        with open(f"{path}.partial", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.partial")
        raise OSError(f"{path}: {error}; make room on the disk, then --resume {os.path.dirname(path)}") from error


def load(path, script, args):
    """What `save` left in a run's folder, on the CPU; its "args" are those flags that this version of the script knows.

    Prints which flags it drops or adds, and whether the script is no longer the text that the run began with.

    Args:
        path: .../checkpoint.pt, which can run code as any pickle can, or .../model.pt, which cannot.
        script: the name that the file must have under "script".
        args: the script's flags at their defaults.
    Raises: ValueError where there is no such file, a damaged one, or one of another script.
    """
    flag = "--evaluate" if path.endswith("model.pt") else "--resume"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            with archive.open(next(name for name in archive.namelist() if name.endswith("/data.pkl"))) as file:
                words = (word for _, word, _ in pickletools.genops(file) if isinstance(word, str))
                first, found = next(words), next(words)
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
        why = "none" if isinstance(error, FileNotFoundError) else f"one that cannot be read ({error})"
        raise ValueError(f"{flag}: expected a file {path}, got {why}; see `ls runs` for other runs") from error
    if (first, found) != ("script", script):
        whose = f"of {found}" if first == "script" else "of an older version"
        raise ValueError(f"{flag}: {path} is {whose}, expected one of {script}; use that script, or another run")
    saved = torch.load(path, map_location="cpu", weights_only=flag == "--evaluate")
    flags = saved["args"]
    for name in sorted(flags.keys() - vars(args).keys()):
        print(f"{path}: this version of {script} has no --{name.replace('_', '-')}; {flags.pop(name)} is dropped")
    for name in sorted(vars(args).keys() - flags.keys()):
        print(f"{path}: of a version of {script} without --{name.replace('_', '-')}, which is {getattr(args, name)} now")
    began, now = Path(path).with_name(script), Path(getattr(sys.modules["__main__"], "__file__", ""))
    if began.is_file() and now.is_file() and began.read_bytes() != now.read_bytes():
        print(f"{script} has changed since this run began: `diff {began} {now}` shows how")
    return saved


def checkpoint(path, content, envs, stop=()):
    """Begins a checkpoint before a step, which shows whether copies of the environments go on as they do; ends it after.

    Args:
        path, content: for `save`. Under "envs" come the environments, for cloudpickle: (the list of them, `random.getstate()`,
            `np.random.get_state()`, `torch.get_rng_state()`), as environments may draw from those, too; or None, where they
            cannot be saved, which is printed as often as that becomes true. content["state"]["rng"] may be drawn from in the
            step; other variables must stay as they are.
        envs: a vector environment, of `AutoresetMode.SAME_STEP`.
        stop: what `catch_stop_signals` returned, if `finish` is to end a process that was asked to end.
    Returns: `finish(actions, outcome)`, which saves, for the actions of the step and for what `envs.step` returned.
    """
    content["state"]["rng"] = copy.deepcopy(content["state"]["rng"])
    try:
        pickled, reason = cloudpickle.dumps((envs.envs, *_random_states())), ""
    except Exception as error:  # whatever an environment raises
        pickled, reason = None, str(error)

    def finish(actions, outcome):
        why = reason or unlike(envs, pickled, actions, outcome)
        content["envs"] = None if why else pickled
        if why and path not in _unsaved:
            print(
                f"{content['args']['env_id']} cannot be saved ({why}): --resume will begin new episodes, the run will differ"
            )
        (_unsaved.add if why else _unsaved.discard)(path)
        save(path, content)
        if stop:
            print(f"stopped; --resume {os.path.dirname(path)} goes on from step {content['state']['global_step']:,}")
            sys.exit(128 + stop[0])

    return finish


_unsaved = set()  # paths of checkpoints without environments, of which this was said
