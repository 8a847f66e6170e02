"""Environments whose observations say where they are, for tests that read the tape of a real run; and some awkward ones."""

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """obs = (environment, episode, step); episodes of 2 to 6 steps, every second one truncated, the others terminated.

    `number` is the seed that a reset names, modulo 1,000: a vector environment gives its environments seeds in a row.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(3, start=5)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, reward=1.0, render_mode=None):
        self.reward, self.render_mode, self.episode, self.number = reward, render_mode, -1, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.number = seed % 1000
        self.episode, self.t, self.length = self.episode + 1, 0, int(self.np_random.integers(2, 7))
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        done = self.t == self.length
        return self.obs(), self.reward * self.t, done and self.episode % 2 == 0, done and self.episode % 2 == 1, {}

    def obs(self):
        return np.array([self.number, self.episode, self.t], np.float32)

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


class Signed(Counting):
    """Rewards of both signs, small and large."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward * 0.5 * (-1) ** self.t, *rest


class Both(Counting):
    """Its episodes end by termination and by truncation in the same step."""

    def step(self, action):
        obs, reward, terminated, truncated, infos = super().step(action)
        return obs, reward, terminated or truncated, terminated or truncated, infos


class CountingBox(Counting):
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


class Unpicklable(Counting):
    def __reduce__(self):
        raise TypeError("this environment cannot be pickled")


class Silent(Counting):
    """It has nothing to show."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode=None):
        super().__init__()


class Image(Counting):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def obs(self):
        return np.zeros((8, 8, 3), np.uint8)


for kind in (Counting, Signed, Both, CountingBox, Unpicklable, Silent, Image):
    gym.register(f"{kind.__name__}-v0", kind)
