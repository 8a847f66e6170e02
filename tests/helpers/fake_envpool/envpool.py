"""What the scripts use of envpool, with games whose every frame, reward and ending a test knows: `episode` says it all."""

from collections import namedtuple
from types import SimpleNamespace

import gymnasium as gym
import numpy as np

FRAME = (1, 48, 48)
ENDINGS = ("over", "time limit", "over in the step of the time limit", "life lost")  # in turn
Config = namedtuple("Config", "stack_num episodic_life num_threads max_episode_steps", defaults=(4, False, 0, 27_000))


def episode(seed, number):
    """(frames [L + 1, 1, 48, 48], rewards [L], ending) of a game's episode; actions change nothing."""
    rng = np.random.default_rng([seed, number])
    length = rng.integers(2, 7)
    blocks = rng.integers(2, size=(length + 1, 1, 6, 6), dtype=np.uint8)  # to a network all frames of noise look alike
    frames = 255 * blocks.repeat(8, 2).repeat(8, 3)
    return frames, rng.integers(-3, 4, size=length).astype(np.float32), ENDINGS[number % len(ENDINGS)]


class Games:
    """As of envpool, the step after an episode's end is a reset: it ignores its action."""

    def __init__(self, seeds):
        self.seeds, self.number, self.time = seeds, [-1] * len(seeds), [None] * len(seeds)

    def reset(self):
        obs, *_, infos = self.step([0] * len(self.seeds))
        return obs, infos

    def step(self, actions, ids=None):
        ids = range(len(self.seeds)) if ids is None else ids
        assert len(actions) == len(ids)
        obs, rewards, terminated, truncated, over = zip(*(self.step_one(i) for i in ids))
        infos = {"terminated": np.array(over, np.int32)}
        return np.stack(obs), np.array(rewards, np.float32), np.array(terminated), np.array(truncated), infos

    def step_one(self, i):
        if self.time[i] is None:
            self.number[i], self.time[i] = self.number[i] + 1, 0
            return episode(self.seeds[i], self.number[i])[0][0], 0.0, False, False, False
        frames, rewards, ending = episode(self.seeds[i], self.number[i])
        self.time[i] += 1
        t, done = self.time[i], self.time[i] == len(rewards)
        self.time[i] = None if done else t
        limit = done and "time limit" in ending
        return frames[t], rewards[t - 1], done and not limit, limit, done and "over" in ending

    def close(self):
        pass


def make_spec(env_id, **options):
    space = gym.spaces.Box(0, 255, {"Pong-v5": FRAME}[env_id], np.uint8)
    return SimpleNamespace(
        config=Config(**options), gymnasium_observation_space=space, gymnasium_action_space=gym.spaces.Discrete(3)
    )


def make_gymnasium(env_id, num_envs, seed, **options):
    assert len(seed) == num_envs
    return Games(seed)
