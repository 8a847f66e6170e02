"""What a script's loop computes: the tape of a real run, its first loss, its returns and advantages, its environments."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from scripts import model, popgym_ids, run, run_folder, saved_state, scalars
from test_scripts import SCRIPTS

COUNTING = "--env-id counting_env:Counting-v0 --num-envs 4".split()
DQN, PPO = (SCRIPTS[f"{algorithm}_tbb_ffm"].flags.split() for algorithm in ("dqn", "ppo"))


@pytest.mark.parametrize("truncation", ["--no-truncation-is-terminal", "--truncation-is-terminal"])
def test_the_tape_of_a_dqn_run_holds_what_happened(tmp_path, truncation):
    """Every episode on the tape is whole, in order, with its final observation, from one environment."""
    run(tmp_path, *DQN, *COUNTING, truncation, "--buffer-size", "700", "--total-timesteps", "1500")
    buffer = saved_state(tmp_path, "dqn_tbb_ffm")["tape_buffer"]
    assert len(buffer.episodes) > 50 and buffer.rows == sum(len(tape.obs) for tape in buffer.episodes) <= 700
    for tape in buffer.episodes:
        rows = len(tape.obs)
        assert (tape.obs[:, 2] == np.arange(rows)).all()  # from the first observation to the final one
        assert len(set(tape.obs[:, 0])) == 1 and len(set(tape.obs[:, 1])) == 1  # of one environment and one episode
        np.testing.assert_array_equal(tape.rewards[:-1], tape.obs[1:, 2])  # the reward of the step to the next row
        assert set(tape.actions[:-1]) <= {0, 1, 2}
        terminated = truncation == "--truncation-is-terminal" or tape.obs[0, 1] % 2 == 0
        assert tape.terminations.tolist() == [False] * (rows - 2) + [terminated, False]
        assert tape.begins.tolist() == [True] + [False] * (rows - 1) and tape.final.tolist() == [False] * (rows - 1) + [True]
    assert {tape.obs[0, 0] for tape in buffer.episodes} == {1, 2, 3, 4}  # environments have seeds in a row, from --seed on


def test_the_first_loss_is_that_of_the_only_episode(tmp_path):
    """One environment, an update after each step, no learning: the first tape holds the buffer's first episode, repeated."""
    flags = "--num-envs 1 --train-frequency 1 --learning-starts 1 --learning-rate 0 --total-timesteps 20 --seed 5".split()
    run(tmp_path, *DQN, *flags, "--env-id", "counting_env:Signed-v0", "--checkpoint-interval", "10")
    state, script = saved_state(tmp_path, "dqn_tbb_ffm"), load_script("dqn_tbb_ffm")
    tape = script.Tape(*(torch.from_numpy(column) for column in state["tape_buffer"].episodes[0]))
    with torch.no_grad():
        q = state["q_network"](tape.obs, tape.begins)
    bootstrap = torch.where(tape.terminations[:-1], 0, 0.99 * q[1:].max(dim=1).values)
    error = tape.rewards[:-1] + bootstrap - q[:-1].gather(1, tape.actions[:-1, None]).squeeze(1)
    assert error.min() < 0 < error.max() and error.abs().min() < 1 < error.abs().max()  # both signs, both pieces of the loss
    (_, first), *_ = scalars(run_folder(tmp_path))["losses/td_loss"]
    torch.testing.assert_close(first, F.huber_loss(error, torch.zeros_like(error)).item(), rtol=1e-5, atol=1e-6)


def test_epsilon_and_the_learning_rate_fall_as_their_flags_say(tmp_path):
    flags = "--total-timesteps 3000 --learning-starts 1000 --exploration-fraction 0.5 --start-e 0.8 --end-e 0.2".split()
    run(tmp_path, *DQN, *COUNTING, *flags)
    logged = scalars(run_folder(tmp_path))["charts/epsilon"]
    expected = [max(0.2, 0.8 - 0.6 * (step - 4 - 1000) / 1500) for step, _ in logged]  # of the step before the update
    np.testing.assert_allclose([value for _, value in logged], expected, rtol=1e-5)
    assert len(logged) > 2 and logged[-1][1] < logged[0][1]


def test_actions_are_random_until_learning_starts(tmp_path):
    run(tmp_path, *DQN, *COUNTING, *"--total-timesteps 420 --start-e 0 --end-e 0 --checkpoint-interval 400".split())
    actions = np.concatenate([tape.actions[:-1] for tape in saved_state(tmp_path, "dqn_tbb_ffm")["tape_buffer"].episodes])
    assert (np.bincount(actions, minlength=3) / len(actions) > 0.25).all()


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("ppo")])
def test_the_rollout_and_the_tape_are_one_policy(tmp_path, script):
    """Before the first update of every iteration, prefixes and refreshed states included."""
    out = run(tmp_path, *SCRIPTS[script].flags.split(), "--max-prefix", "0" if "lstm" in script else "4096", script=script)
    logged = scalars(run_folder(tmp_path))
    assert 0 < max(value for _, value in logged["losses/logprob_error"]) < 1e-5 and "warning" not in out
    shares = np.array([value for _, value in logged["charts/prefix_share"]])
    if script == "ppo_sbb_lstm":
        assert (shares == 0).all()
    elif "continuous" in script:  # the first episodes last 200 steps, and the third rollout's prefix is two rollouts long
        np.testing.assert_allclose(shares[:12], 1 - 1 / (1 + np.arange(12)), rtol=1e-5)
    else:
        np.testing.assert_allclose(shares[:4], 1 - 1 / (1 + np.arange(4)), rtol=1e-5)
        np.testing.assert_allclose(shares[4], 1 - 1 / (1 + 13 / 16), rtol=1e-5)  # the episodes from row 51 on
    rates = [value for _, value in logged["charts/learning_rate"]]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(16) / 16), rtol=1e-5)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("torch.where(begins[:, None, None], 0, recurrent_state) * self.decay()", "recurrent_state * self.decay()"),
        ("self.memory.step(self.encoder(obs), begins", "self.memory.step(-self.encoder(obs), begins"),
        ("recurrent_state[running] = agent(", "recurrent_state[running] = 0 * agent("),
    ],
)
def test_a_rollout_that_is_another_policy_than_the_tape_is_reported(tmp_path, right, wrong):
    text = (ROOT / "single_files" / "ppo_tbb_ffm.py").read_text()
    assert text.count(right) == 1
    (tmp_path / "planted.py").write_text(text.replace(right, wrong))
    out = run(tmp_path, *PPO, "--learning-rate", "1e-2", script=tmp_path / "planted.py")
    assert "warning: rollout and tape differ by " in out


def test_the_tape_of_a_ppo_run_holds_the_running_episodes(tmp_path):
    """At every checkpoint: from the first observation of each, without a gap, up to the one that comes next."""
    longest = {2: 0, 4096: 0}
    for steps, cut in ((160, 4096), (176, 4096), (192, 4096), (192, 2)):
        folder = tmp_path / f"{steps}-{cut}"
        folder.mkdir()
        flags = f"--num-steps 4 --checkpoint-interval 1 --total-timesteps {steps} --max-prefix {cut}"
        run(folder, *PPO, *COUNTING, *flags.split(), script="ppo_tbb_ffm")
        state = saved_state(folder, "ppo_tbb_ffm")
        assert state["global_step"] == steps - 16  # before the last rollout
        tape = state["carried_tape"]
        for obs, begins, following, new in zip(tape.obs, tape.begins, state["next_obs"], state["next_begins"]):
            longest[cut] = max(longest[cut], len(obs))
            if new:
                assert len(obs) == 0 and following[2] == 0
                continue
            assert len(obs) == min(following[2], cut)
            assert (obs[:, :2] == following[:2]).all()  # one environment, one episode
            np.testing.assert_array_equal(obs[:, 2], np.arange(following[2] - len(obs), following[2]))
            np.testing.assert_array_equal(begins, obs[:, 2] == 0)
    assert longest[2] == 2 < longest[4096]


@pytest.mark.parametrize(
    "env_id, truncation, norm",
    [
        ("counting_env:Counting-v0", "--no-truncation-is-terminal", "--norm-reward"),
        ("counting_env:Counting-v0", "--truncation-is-terminal", "--no-norm-reward"),
        ("counting_env:Both-v0", "--no-truncation-is-terminal", "--no-norm-reward"),
    ],
)
def test_the_value_loss_is_that_of_returns_computed_by_hand(tmp_path, env_id, truncation, norm):
    """No learning, one epoch, one minibatch: half the mean squared advantage, with V(final observation) at truncations."""
    script, steps = load_script("ppo_tbb_ffm"), 8 * 16
    flags = "--learning-rate 0 --update-epochs 1 --num-minibatches 1 --gamma 0.9 --gae-lambda 0.8 --total-timesteps 512"
    run(tmp_path, *PPO, *COUNTING, "--env-id", env_id, *flags.split(), truncation, norm, script="ppo_tbb_ffm")
    args = torch.load(run_folder(tmp_path) / "model.pt", weights_only=True)["args"]
    envs = [gym.make(env_id) for _ in range(4)]
    agent = script.Agent(gym.vector.SyncVectorEnv([lambda: envs[0]]), script.Args(**args))
    agent.load_state_dict(model(tmp_path))
    values, next_values, rewards, ends = np.zeros((4, steps, 4))
    kinds = set()
    for i, env in enumerate(envs):
        obs, _ = env.reset(seed=1 + i)
        state, begin = agent.memory.initial_state(1), True

        def value(obs, begin, state):
            _, value, state = agent.step(obs[None], np.array([begin]), state)
            return value.item(), state

        for t in range(steps):
            values[t, i], state = value(obs, begin, state)
            obs, rewards[t, i], terminated, truncated, _ = env.step(5)
            kinds |= {(terminated, truncated)}
            ends[t, i] = begin = terminated or truncated
            worthless = terminated or truncated and truncation == "--truncation-is-terminal"
            next_values[t, i] = 0 if worthless else value(obs, False, state)[0]
            if begin:
                obs, _ = env.reset()
    assert len(kinds) == (2 if "Both" in env_id else 3)

    found, scale, discounted, seen = [], np.ones(steps), np.zeros(4), []
    for t in range(steps if norm == "--norm-reward" else 0):
        discounted = 0.9 * discounted + rewards[t]
        seen = [*seen, *discounted]
        mean = np.sum(seen) / (len(seen) + 1e-4)  # it begins as if 1e-4 of a return, of mean 0 and variance 1, had been seen
        variance = (1e-4 * (1 + mean**2) + np.sum((seen - mean) ** 2)) / (len(seen) + 1e-4)
        scale[t] = 1 / np.sqrt(variance + 1e-8)
        discounted[ends[t] == 1] = 0
    deltas = rewards * scale[:, None] + 0.9 * next_values - values
    for rollout in np.split(np.arange(steps), 8):
        advantage, squares = np.zeros(4), []
        for t in rollout[::-1]:
            advantage = deltas[t] + np.where(ends[t] == 1, 0, 0.9 * 0.8 * advantage)
            squares.append(advantage**2)
        found.append(0.5 * np.mean(squares))
    logged = [value for _, value in scalars(run_folder(tmp_path))["losses/value_loss"]]
    np.testing.assert_allclose(logged, found, rtol=1e-5)


@pytest.mark.parametrize("env_id", ["popgym-MineSweeperEasy-v0", "popgym-BattleshipEasy-v0"])
def test_multi_discrete_actions_train(tmp_path, env_id):
    out = run(tmp_path, *PPO, "--env-id", env_id, "--total-timesteps", "512", script="ppo_tbb_ffm")
    assert "evaluation: episodic_return=" in out and "warning" not in out


@pytest.mark.parametrize("script", ["dqn_tbb_ffm", "ppo_tbb_ffm"])
@pytest.mark.parametrize("env_id", popgym_ids())
def test_every_popgym_environment_with_finite_actions_is_wrapped(script, env_id):
    for prev_action in (True, False):
        env = load_script(script).make_env(env_id, {}, prev_action)()
        assert isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1
        obs, _ = env.reset(seed=0)
        for _ in range(2):
            assert env.observation_space.contains(obs)
            obs, *_ = env.step(env.action_space.sample())


def test_constructor_arguments_reach_the_environment(tmp_path, ffm):
    env = ffm.make_env("popgym-RepeatPreviousEasy-v0", {"k": 10, "num_decks": 2})()
    assert env.unwrapped.k == 10 and env.unwrapped.max_episode_length == 103
    assert env.observation_space.shape == (10,)  # suit, previous action, first-step flag
    assert ffm.make_env("popgym-RepeatPreviousEasy-v0", {}, prev_action=False)().observation_space.shape == (6,)
    short = "--total-timesteps 600 --learning-starts 500 --eval-episodes 1 --checkpoint-interval 0".split()
    kwargs = "--env-id FrozenLake-v1 --env-kwargs is_slippery False map_name 8x8".split()
    run(tmp_path, *DQN, *short, *kwargs)
    args = torch.load(run_folder(tmp_path) / "model.pt", weights_only=True)["args"]
    assert args["env_kwargs"] == {"is_slippery": False, "map_name": "8x8"}


class Fixed(gym.Env):
    """Episodes of one length, of reward 1 a step."""

    observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, length):
        self.length = length

    def reset(self, *, seed=None, options=None):
        self.t, self.seed_seen = 0, seed
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == self.length, False, {}


def test_evaluation_counts_every_episode_once():
    """Environments whose episodes are short go on with further ones, which must not count."""
    for name in ("dqn_tbb_ffm", "ppo_tbb_ffm"):
        script = load_script(name)
        make = [lambda length=length: Fixed(length) for length in (1, 2, 30, 40)]
        envs = gym.vector.SyncVectorEnv(make[:1])
        network = (script.QNetwork if "dqn" in name else script.Agent)(envs, script.Args(hidden_size=8, trace_size=2))
        assert script.evaluate(network, make, script.Args()).tolist() == [1, 2, 30, 40]


@pytest.mark.parametrize("level, actions", [("Easy", 26), ("Medium", 26), ("Hard", 16)])
def test_the_old_count_recall_lacks_one_action(monkeypatch, level, actions):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark" / "probes"))
    old = gym.make(f"old_count_recall:OldCountRecall{level}-v0")
    make = load_script("ppo_tbb_glru").make_env
    new = make(f"popgym-CountRecall{level}-v0", {})()
    assert old.action_space.n == actions == new.action_space.n - 1
    seen = [env.reset(seed=3)[0] for env in (old, new)]  # the previous action has one place less
    for _ in range(40):
        lists = [obs.tolist() for obs in seen]
        assert len(lists[0]) == len(lists[1]) - 1 and sum(lists[0]) == sum(lists[1])
        (a, *outcome, _), (b, *wanted, _) = (env.step(2) for env in (old, new))
        assert outcome == wanted
        seen = [a, b]


@pytest.mark.parametrize("length", [1, 7, 200])
def test_the_t_maze_rewards_what_the_cue_said(monkeypatch, length):
    (folder,) = {path.parent for path in (ROOT / "benchmark").rglob("t_maze.py")}
    monkeypatch.syspath_prepend(str(folder))
    env, goals = gym.make("t_maze:TMaze-v0", length=length), set()
    for seed in range(8):
        obs, _ = env.reset(seed=seed)
        goal, seen = int(obs[1]), [obs.tolist()]
        rewards = []
        for t in range(length + 1):
            obs, reward, terminated, truncated, _ = env.step(goal if seed % 2 or t < length else 1 - goal)
            rewards.append(reward)
            assert (terminated, truncated) == (t == length, False)
            seen.append(obs.tolist())
        goals.add(goal)
        corridor, junction = [0, 0, 1, 0], [0, 0, 0, 1]
        assert seen == [[1 - goal, goal, 0, 0], *[corridor] * (length - 1), junction, junction]
        assert rewards == [0] * length + [1 if seed % 2 else -1]
    assert goals == {0, 1}
    with pytest.raises(ValueError, match="length: expected at least 1 step"):
        gym.make("t_maze:TMaze-v0", length=0)
