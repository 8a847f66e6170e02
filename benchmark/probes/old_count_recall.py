"""POPGym's CountRecall as it was up to 1.0.6: without an action for the highest count, as the published runs had it.

    PYTHONPATH=benchmark/probes python single_files/dqn_tbb_ffm.py --env-id old_count_recall:OldCountRecallEasy-v0

Whoever has to answer with the highest count is wrong there, whatever the answer: the best possible return is a little below 1.
Observations are wrapped as the scripts wrap those of POPGym: with the previous action and a flag for the first step.
"""

import gymnasium as gym
from popgym.envs import count_recall
from popgym.wrappers import Antialias, Flatten, PreviousAction


def make(level):
    """An environment of the level Easy, Medium or Hard."""
    env = getattr(count_recall, f"CountRecall{level}")()
    env.action_space = gym.spaces.Discrete(env.max_card_count)  # since 1.0.7: one more
    return Flatten(Antialias(PreviousAction(env)))


for level in ("Easy", "Medium", "Hard"):
    gym.register(f"OldCountRecall{level}-v0", lambda level=level, **_: make(level), disable_env_checker=True)
