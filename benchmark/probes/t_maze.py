"""The passive T-maze: one cue, a corridor, one choice. Nothing but memory over its whole length can earn the reward.

    PYTHONPATH=benchmark/probes python single_files/ppo_tbb_ffm.py --env-id t_maze:TMaze-v0 --env-kwargs length 200

The first observation shows whether the goal is up or down. The corridor then moves the agent on, whatever it does, and every
observation in it is the same. At the junction, `length` steps later, going the right way earns 1, the wrong way -1, and the
episode ends. Guessing returns 0. After Bakker (2001), "Reinforcement Learning with Long Short-Term Memory", and the passive
form in Ni et al. (2023), "When Do Transformers Shine in RL?", https://arxiv.org/abs/2307.03864.
"""

import gymnasium as gym
import numpy as np


class TMaze(gym.Env):
    """Observations [4]: the goal is down; is up (in the first observation alone); in the corridor; at the junction."""

    observation_space = gym.spaces.Box(0, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)  # at the junction: down, up

    def __init__(self, length=200, render_mode=None):
        if length < 1:
            raise ValueError(f"length: expected at least 1 step from the cue to the junction, got {length}; make it longer")
        self.length, self.render_mode = length, render_mode  # nothing is rendered

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.goal = 0, int(self.np_random.integers(2))
        obs = np.zeros(4, np.float32)
        obs[self.goal] = 1
        return obs, {}

    def step(self, action):
        at_junction = self.t == self.length
        self.t += 1
        obs = np.zeros(4, np.float32)
        obs[3 if self.t >= self.length else 2] = 1
        return obs, (1.0 if action == self.goal else -1.0) if at_junction else 0.0, at_junction, False, {}


gym.register("TMaze-v0", TMaze)
