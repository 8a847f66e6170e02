"""Stable-Baselines3's RecurrentPPO on POPGym, as a user of it would run it: the baseline of benchmark/learn/race.sh.

    python benchmark/probes/sb3_recurrent_ppo.py --env-id popgym-RepeatFirstEasy-v0 --total-timesteps 100000

Needs `pip install -e '.[bench]'`. Same wrappers, evaluation and TensorBoard tags as the project's scripts, so that
benchmark/tools/report.py reads both alike. Defaults are the library's own, in eight environments and with minibatches of two
of them, 256 transitions; benchmark/learn/race.sh has RL Baselines3 Zoo's for the one of its tasks that is also in POPGym.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from timing import ROOT, load_script


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment
    env_id: str = "popgym-RepeatFirstEasy-v0"  # the id of the environment
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # for its constructor: k 10 num_decks 2
    total_timesteps: int = 100_000  # total timesteps of the experiment, over all environments (steps)
    num_envs: int = 8  # the number of parallel environments
    num_steps: int = 128  # the number of steps per policy rollout in each environment; the gradient is cut there (steps)
    batch_size: int = 256  # the size of a minibatch (transitions)
    update_epochs: int = 10  # the number of epochs over a rollout
    learning_rate: float = 3e-4  # the learning rate at the start
    clip_coef: float = 0.2  # the surrogate clipping coefficient at the start
    anneal: bool = False  # if toggled, learning rate and clipping coefficient fall linearly to zero
    gamma: float = 0.99  # the discount factor gamma
    gae_lambda: float = 0.95  # the lambda for the general advantage estimation
    ent_coef: float = 0.0  # coefficient of the entropy
    eval_episodes: int = 100  # number of greedy episodes after training (episodes)


class EpisodeReturns:
    """A callback that logs each training episode when it ends, at the global step of then, as the project's scripts do."""

    def __init__(self, writer, num_envs):
        self.writer, self.running, self.lengths = writer, np.zeros(num_envs), np.zeros(num_envs, int)
        self.last_report = time.time()

    def __call__(self, its_locals, its_globals):
        global_step = its_locals["self"].num_timesteps
        self.running += its_locals["rewards"]
        self.lengths += 1
        for i in np.flatnonzero(its_locals["dones"]):
            self.writer.add_scalar("charts/episodic_return", self.running[i], global_step)
            self.writer.add_scalar("charts/episodic_length", self.lengths[i], global_step)
            self.running[i], self.lengths[i] = 0, 0
        if time.time() - self.last_report > 5:
            self.last_report = time.time()
            print(f"global_step={global_step}", flush=True)
        return True


def evaluate(model, envs, episodes, seed):
    """Returns of greedy episodes [episodes]; each environment has its share, so that short ones are not counted more often."""
    envs.seed(seed)
    num_envs = envs.num_envs
    share = np.array([len(range(i, episodes, num_envs)) for i in range(num_envs)])
    obs, states, begins, running, returns = envs.reset(), None, np.ones(num_envs, bool), np.zeros(num_envs), []
    while share.any():
        actions, states = model.predict(obs, state=states, episode_start=begins, deterministic=True)
        obs, rewards, begins, _ = envs.step(actions)
        running += rewards
        for i in np.flatnonzero(begins):
            if share[i]:
                returns.append(running[i])
                share[i] -= 1
            running[i] = 0
    return returns


class Wrapped(gym.Wrapper):
    """POPGym's wrappers have no `render_mode`, which Stable-Baselines3 asks every environment for."""

    render_mode = None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    from sb3_contrib import RecurrentPPO  # here, so that --help needs no extra
    from stable_baselines3.common.vec_env import DummyVecEnv

    torch.set_num_threads(1)
    script = load_script(ROOT / "single_files" / "ppo_sbb_lstm.py")  # for its environments
    thunk = script.make_env(args.env_id, args.env_kwargs)
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    writer = SummaryWriter(Path("runs", run_name))
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n%s" % "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    envs = DummyVecEnv([lambda: Wrapped(thunk())] * args.num_envs)
    model = RecurrentPPO(
        "MlpLstmPolicy",
        envs,
        learning_rate=lambda left: args.learning_rate * (left if args.anneal else 1),
        clip_range=lambda left: args.clip_coef * (left if args.anneal else 1),
        n_steps=args.num_steps,
        batch_size=args.batch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        ent_coef=args.ent_coef,
        seed=args.seed,
        device="cpu",
    )
    start_time = time.time()
    print(f"{args.exp_name}: {args.env_id}, {args.total_timesteps:,} steps in {args.num_envs} environments; runs/{run_name}")
    model.learn(args.total_timesteps, callback=EpisodeReturns(writer, args.num_envs))
    print(f"trained for {model.num_timesteps:,} steps, {time.time() - start_time:.1f} seconds")
    returns = evaluate(model, envs, args.eval_episodes, args.seed + 1_000_000)
    for index, episodic_return in enumerate(returns):
        writer.add_scalar("eval/episodic_return", episodic_return, model.num_timesteps + index)
    print(f"evaluation: episodic_return={np.mean(returns):.4f}, the mean of {len(returns)} greedy episodes")
    writer.close()
