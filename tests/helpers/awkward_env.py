"""Environments as people bring them: each does one thing that Gymnasium allows, or does not forbid, and that hurts."""

import random
import threading

import gymnasium as gym
import numpy as np
import torch

FINITE, BOX = gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (1,), np.float32)


class Plain(gym.Env):
    """Observations (number of the step, a random number); episodes of 9 steps. `box`: continuous actions."""

    observation_space = gym.spaces.Box(0, 9, (2,), np.float32)

    def __init__(self, box=False, render_mode=None):
        self.action_space = BOX if box else FINITE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), {}

    def step(self, action):
        self.t += 1
        return self.obs(), self.reward(), self.t == 9, False, {}

    def obs(self):
        return np.array([self.t, self.np_random.random()], np.float32)

    def reward(self):
        return 1.0


class Counts(gym.Env, gym.utils.EzPickle):
    """Its pickle holds what its constructor was given, and nothing else."""

    observation_space = gym.spaces.Box(0, 9, (1,), np.float32)

    def __init__(self, box=False, render_mode=None):
        gym.utils.EzPickle.__init__(self, box, render_mode)
        self.action_space = BOX if box else FINITE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 1.0, self.t == 9, False, {}


class Constant(Counts):
    """One step does not tell a copy from it: all its observations are equal."""

    def __init__(self, box=False, render_mode=None):
        super().__init__(box, render_mode)
        self.t = 0

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 1.0, self.t == 9, False, {}


class Forgets(Plain):
    """Its pickle leaves out where it is."""

    def __getstate__(self):
        return {**self.__dict__, "t": 0}


class Later(Plain):
    """It can be pickled until its second episode."""

    def reset(self, *, seed=None, options=None):
        self.lock = threading.Lock() if hasattr(self, "t") else None
        return super().reset(seed=seed)


class Dice(Plain):
    """It draws from the global random numbers."""

    def obs(self):
        return np.array([random.random(), np.random.random()], np.float32)

    def reward(self):
        return random.random() + np.random.random() + torch.rand(()).item()


class Endless(Plain):
    def step(self, action):
        self.t = min(self.t + 1, 8)
        return self.obs(), 1.0, False, False, {}


class Wrong(Plain):
    """From its hundredth step on, its observation or reward is what `what` says: "obs nan", "reward None", ..."""

    def __init__(self, what, since=100, box=False, render_mode=None):
        super().__init__(box)
        self.what, self.steps, self.since = what.split(), 0, since

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.steps += 1
        if self.steps >= self.since:
            name, value = self.what
            value = {"None": None, "text": "text"}[value] if value in ("None", "text") else float(value)
            obs = {"obs": [1.0, value], "shape": np.ones(3)}.get(name, obs)
            reward = value if name == "reward" else reward
        return obs, reward, *rest


class Types(Plain):
    """Rewards of every type that is one number, and infos whose types and shapes change."""

    def step(self, action):
        obs, _, terminated, truncated, _ = super().step(action)
        reward = [[1.0], np.ones(1), True, 1, np.float32(1), np.ones(()), 1.0][self.t % 7]
        infos = [{}, {"a": 1}, {"a": "text"}, {"points": np.zeros((self.np_random.integers(1, 5), 2))}, {"a": {"b": [1]}}]
        return obs, reward, np.bool_(terminated), int(truncated), infos[self.t % 5]


class Reuses(Plain):
    """All its observations are one array."""

    array = None

    def obs(self):
        self.array = np.zeros(2, np.float32) if self.array is None else self.array
        self.array[:] = self.t, 0
        return self.array


class Bare(Plain):
    """Its constructor takes nothing."""

    def __init__(self):
        super().__init__()


class BareBox(Plain):
    def __init__(self):
        super().__init__(box=True)


class Matrix(Plain):
    def __init__(self, render_mode=None):
        self.action_space = gym.spaces.MultiDiscrete([[2, 3], [4, 5]])


class Whole(Plain):
    def __init__(self, render_mode=None):
        self.action_space = gym.spaces.Box(0, 9, (1,), np.int64)


class Far(Plain):
    """The bounds of its actions are far from what a Gaussian draws, and one has none."""

    action_space = gym.spaces.Box(np.array([0.0, 100, -np.inf], np.float32), np.array([1.0, 200, 5], np.float32))
    seen = []

    def __init__(self, render_mode=None):
        pass

    def step(self, action):
        self.seen.append(np.array(action))
        return super().step(action)


class Mission(gym.spaces.Space):
    """A space of one's own, as MiniGrid's of texts."""

    def sample(self, mask=None, probability=None):
        return "go"

    def contains(self, x):
        return True


class Texts(Plain):
    observation_space = gym.spaces.Dict({"image": gym.spaces.Box(0, 1, (2,), np.float32), "mission": Mission()})

    def obs(self):
        return {"image": np.zeros(2, np.float32), "mission": "go"}


class Parts(Plain):
    """Dict and Tuple observations."""

    observation_space = gym.spaces.Dict({"a": gym.spaces.Tuple((gym.spaces.Discrete(3), BOX)), "b": BOX})

    def obs(self):
        return {"a": (self.t % 3, np.zeros(1, np.float32)), "b": np.zeros(1, np.float32)}


class Wide(Plain):
    observation_space = gym.spaces.Box(0, 1, (250_000,), np.float32)

    def obs(self):
        return np.zeros(250_000, np.float32)


for kind in list(vars().values()):
    if isinstance(kind, type) and issubclass(kind, gym.Env) and kind is not gym.Env:
        gym.register(f"{kind.__name__}-v0", kind)
