"""The Python of docs/your_own.md, put where the page says: an environment, an encoder of images and two memories."""

import importlib
import re
import sys
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import last_return, run, run_folder, scalars

PAGE = (ROOT / "docs" / "your_own.md").read_text()
BLOCKS = {re.search(r"class (\w+)", code)[1]: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
SHORT = "--total-timesteps 600 --eval-episodes 2 --checkpoint-interval 0".split()
DQN = [*SHORT, *"--num-envs 4 --learning-starts 100 --batch-size 60 --hidden-size 16".split()]
PPO = [*SHORT, *"--num-envs 4 --num-steps 20 --hidden-size 16 --update-epochs 1".split()]


class Screen(gym.Env):
    """Images whose brightest corner names the action to take, for ten steps."""

    observation_space, action_space = gym.spaces.Box(0, 255, (9, 9, 3), np.uint8), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 10
        return self.show(), {}

    def show(self):
        self.bright = int(self.np_random.integers(2))
        image = np.zeros((9, 9, 3), np.uint8)
        image[-self.bright, -self.bright] = 255
        return image

    def step(self, action):
        self.left, reward = self.left - 1, float(action == self.bright)
        return self.show(), reward, self.left == 0, False, {}


@pytest.fixture
def folder(tmp_path):
    """A working directory with the page's my_env.py, of which nothing is remembered afterwards."""
    (tmp_path / "my_env.py").write_text(BLOCKS["Corridor"])
    with mock.patch.dict(gym.registry):
        yield tmp_path
    sys.modules.pop("my_env", None)


def with_class(name, script="dqn_tbb_ffm", cut=None):
    """The text of a script with a class of the page below FFM, and the page's line in place of the one that it replaces."""
    text = (ROOT / "single_files" / f"{script}.py").read_text()
    (line,) = set(re.findall(rf"`(self\.\w+ = {name}\([^`]*)`", PAGE)) or {
        "self.memory = Largest(args.hidden_size, args.hidden_size)"
    }
    kept = line.split(" = ")[0]
    text, changes = re.subn(rf"(?m)^( +){re.escape(kept)} = .*$", rf"\1{line}", text)
    assert changes == 1
    if cut:
        text, changes = re.subn(cut, "", text)
        assert changes == 1
    head, rest = re.split(r"(?m)^(?=class \w+\(NamedTuple\))", text, maxsplit=1)
    return f"{head}{BLOCKS[name]}\n\n{rest}"


def test_the_page_has_these_classes():
    assert list(BLOCKS) == ["Corridor", "Pixels", "GRU", "Largest"]
    assert len(BLOCKS["Largest"].splitlines()) <= 30


def test_the_environment_of_the_page_trains_in_dqn_and_in_ppo(folder):
    flags = ["--env-id", "my_env:Corridor-v0", "--env-kwargs", "length", "5"]
    assert "evaluation: episodic_return=" in run(folder, *flags, *DQN)
    assert "greedy episodes of my_env:Light-v0" in run(folder, "--env-id", "my_env:Light-v0", *PPO, script="ppo_tbb_lru")


def test_the_encoder_of_the_page_learns_from_images(tmp_path):
    """In a copy of the script, and without the two lines that expect vectors."""
    script = tmp_path / "my_agent.py"
    script.write_text(with_class("Pixels", cut=r"(?m)^ +if len\(obs_space\.shape or \(\)\) != 1:\n +raise ValueError.*\n"))
    gym.register("Screen-v0", Screen)
    out = run(tmp_path, "--env-id", "Screen-v0", *DQN, "--total-timesteps", 4000, "--learning-rate", 3e-3, script=script)
    assert last_return(out) > 8  # of 10; guessing gives 5
    assert scalars(run_folder(tmp_path))["losses/td_loss"]


@pytest.fixture(params=["GRU", "Largest"])
def script(request, tmp_path):
    path = tmp_path / f"my_agent_{request.param.lower()}.py"
    path.write_text(with_class(request.param))
    return request.param, path


def test_the_memory_of_the_page_trains(tmp_path, monkeypatch, script):
    """And computes on a tape what it computes step by step, and what each episode gives alone; no gradient crosses a begin."""
    name, path = script
    assert "evaluation: episodic_return=" in run(tmp_path, *DQN, script=path)
    monkeypatch.syspath_prepend(tmp_path)
    memory = getattr(importlib.import_module(path.stem), name)(6, 5)
    begins = torch.zeros(12, dtype=torch.bool)
    begins[[0, 4, 5, 11]] = True
    obs = torch.randn(12, 6, requires_grad=True)
    out, state, steps = memory(obs, begins), memory.initial_state(1), []
    for row in range(12):
        step, state = memory.step(obs[row : row + 1], begins[row : row + 1], state)
        steps.append(step)
    torch.testing.assert_close(out, torch.cat(steps))
    alone = [memory(episode, torch.arange(len(episode)) == 0) for episode in obs.split([4, 1, 6, 1])]
    torch.testing.assert_close(out, torch.cat(alone))
    (gradient,) = torch.autograd.grad(out[5:11].sum(), obs)
    assert gradient[5].abs().sum() > 0 and not gradient[:5].any() and not gradient[11:].any()


@pytest.mark.slow
def test_the_environment_of_the_page_is_learned(folder):
    command = next(line for line in PAGE.splitlines() if "learns it" in line).split("#")[0].split()
    assert last_return(run(folder, *command[2:])) == 1


@pytest.mark.slow
def test_the_memories_of_the_page_learn(tmp_path, script):
    """RepeatFirst, at the flags of the script that they were put into."""
    assert last_return(run(tmp_path, script=script[1])) > 0.9
