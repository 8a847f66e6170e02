"""Environments whose observations say where they are, for tests that read the tape of a real run."""

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """obs = (environment, episode, step); episodes of 2 to 6 steps, every second one truncated, the others terminated."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(3, start=5)
    metadata = {"render_modes": ["rgb_array"]}

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


class Unpicklable(Counting):
    def __reduce__(self):
        raise TypeError("this environment cannot be pickled")


gym.register("Counting-v0", Counting)
gym.register("Unpicklable-v0", Unpicklable)
