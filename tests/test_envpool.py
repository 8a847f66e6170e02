"""Atari through envpool: what reaches the tape, against frames that say where they are and against the emulator itself."""

import ast
import functools
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from scripts import run, run_folder, scalars

envpool = pytest.importorskip("envpool", reason="pip install 'cleanrl-memoroid[envpool]'")

SCRIPT = "dqn_tbb_lru_atari_envpool"
MAKE = envpool.make_gymnasium
TINY = "--cnn-channels 2 --hidden-size 8 --state-size 4 --eval-episodes 0 --checkpoint-interval 0 --no-save-model".split()


@pytest.fixture(scope="module")
def atari():
    return load_script(SCRIPT)


@pytest.fixture
def main(atari, monkeypatch, tmp_path):
    """A function that runs what stands under the script's __main__ with these flags, here, where tests can look inside."""

    def main(*flags):
        path = ROOT / "single_files" / f"{SCRIPT}.py"
        body = ast.parse(path.read_text()).body[-1].body
        monkeypatch.chdir(tmp_path)
        own = [] if "--resume" in flags else ["--no-tune-cpu"]  # its switches are for a whole process
        monkeypatch.setattr(sys, "argv", [str(path), *flags, *own])
        space = dict(vars(atari))
        exec(compile(ast.Module(body, []), str(path), "exec"), space)
        return space

    return main


class Stamped:
    """envpool, with each frame's place written into its first pixels and the reward replaced by the number of the step.

    Place is (environment, episode, step). It counts as envpool resets: when it is told to, or in the step after a done.
    """

    def __init__(self, envs):
        self.envs, self.size = envs, len(envs.spec.config.env_seed)
        self.observation_space, self.action_space = envs.observation_space, envs.action_space
        self.episode, self.t, self.done = np.full(self.size, -1), np.zeros(self.size, int), np.ones(self.size, bool)

    def stamp(self, obs, who):
        places = np.stack([who, self.episode[who], self.t[who]], axis=1).astype(np.int64)
        obs[:, 0, 0, :24] = np.ascontiguousarray(places).view(np.uint8)
        return obs

    def reset(self, who=None):
        obs, infos = self.envs.reset() if who is None else self.envs.reset(who)
        who = infos["env_id"]
        self.episode[who], self.t[who], self.done[who] = self.episode[who] + 1, 0, False
        return self.stamp(obs, who), infos

    def step(self, actions, who=None):
        obs, _, terminations, truncations, infos = self.envs.step(actions, who)
        assert infos["env_id"].tolist() == list(range(self.size) if who is None else who)
        who = infos["env_id"]
        self.episode[who] += self.done[who]
        self.t[who] = np.where(self.done[who], 0, self.t[who] + 1)
        self.done[who] = terminations | truncations
        return self.stamp(obs, who), self.t[who].astype(np.float32), terminations, truncations, infos

    def close(self):
        self.envs.close()


def places(obs):
    """[T, 1, 84, 84] -> environment, episode and step of every row [T, 3]"""
    return np.ascontiguousarray(obs[:, 0, 0, :24]).view(np.int64)


def check_episode(tape_buffer, rows, terminated, limit):
    """One episode on the tape is one episode of one environment, from its first frame to its last. -> its place"""
    at = rows % len(tape_buffer.obs)
    place = places(tape_buffer.obs[at])
    assert (place[:, :2] == place[0, :2]).all(), "rows of two environments or two episodes"
    assert place[:, 2].tolist() == list(range(len(rows))), "a row is missing, or there twice"
    assert tape_buffer.rewards[at[:-1]].tolist() == list(range(1, len(rows))), "a reward of another step"
    assert tape_buffer.terminations[at].tolist() == [False] * (len(rows) - 2) + [terminated, False]
    assert len(rows) - 1 <= limit and (terminated or len(rows) - 1 == limit), "truncated before its time"
    return tuple(place[0, :2].tolist())


def collect(atari, main, monkeypatch, steps, limit, flags=()):
    """Runs the script with random actions on stamped frames; every episode is checked as it ends. -> episodes, terminations"""
    found = {}

    class Checked(atari.FrameTape):
        def finish(self, i, final_obs, terminated):
            first = self.running[i]
            super().finish(i, final_obs, terminated)
            assert terminated in (True, False)
            found[check_episode(self, self.episodes[first], bool(terminated), limit)] = bool(terminated)
            if len(found) % 200 == 1:  # and what an update would read, while older rows are overwritten
                tape = self.sample(50, np.random.default_rng(len(found)))
                place, begins = places(tape.obs.numpy()), tape.begins.numpy()
                same = (place[1:, :2] == place[:-1, :2]).all(1) & (place[1:, 2] == place[:-1, 2] + 1)
                assert (same | begins[1:]).all() and (place[begins & (np.arange(len(begins)) < 51), 2] == 0).all()

    flags = [*flags, *"--env-id Breakout-v5 --num-envs 8 --no-clip-reward --learning-starts 1000000".split()]
    flags += f"--total-timesteps {steps} --max-episode-steps {limit} --buffer-size {max(2_000, 8 * (limit + 1))}".split()
    with monkeypatch.context() as patch:
        patch.setattr(atari, "FrameTape", Checked)
        patch.setattr(envpool, "make_gymnasium", lambda *args, **kwargs: Stamped(MAKE(*args, **kwargs)))
        assert main(*TINY, *flags)["tape_buffer"].next_row >= steps
    return found


LIMITS = [7, 50, 2_000]  # none of Breakout's random games lasts as long as the last


@pytest.mark.parametrize("steps", [6_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("limit", LIMITS)
def test_no_row_on_the_tape_mixes_two_episodes(atari, main, monkeypatch, limit, steps):
    """Bar: over 10^5 random steps in 8 environments, with time limits and without."""
    found = collect(atari, main, monkeypatch, steps, limit)
    for i in range(8):  # none is lost on the way
        numbers = sorted(episode for env, episode in found if env == i)
        assert numbers == list(range(len(numbers)))
    expected = {7: 0, 50: 0, 2_000: len(found)}[limit]  # only a game without a limit is over
    assert sum(found.values()) == expected and len(found) > steps / (400 if limit == 2_000 else limit + 1)


def test_a_lost_life_ends_an_episode_only_if_asked(atari, main, monkeypatch, tmp_path):
    games = collect(atari, main, monkeypatch, 8_000, 2_000)
    assert len(scalars(run_folder(tmp_path))["charts/episodic_return"]) == len(games)
    shutil.rmtree(tmp_path / "runs")
    lives = collect(atari, main, monkeypatch, 8_000, 2_000, ["--episodic-life"])
    assert len(lives) > 3 * len(games) and all(games.values()) and all(lives.values())
    logged = scalars(run_folder(tmp_path))["charts/episodic_length"]  # of whole games
    assert 4 * len(logged) < len(lives) and min(length for _, length in logged) > 100


def test_a_game_that_is_over_in_the_step_of_its_time_limit_is_terminated(atari):
    def play(limit):
        envs, rng = atari.EnvPool("Breakout-v5", 2, np.asarray, max_episode_steps=limit), np.random.default_rng(0)
        envs.reset(seed=[5, 6])
        for t in range(1, 2_000):
            _, _, terminations, truncations, infos = envs.step(rng.integers(4, size=2))
            if terminations[0] or truncations[0]:
                return t, bool(terminations[0]), bool(truncations[0]), bool(infos["game_over"][0])

    length, *end = play(2_000)
    assert end == [True, False, True]
    assert play(length) == (length, True, True, True)
    assert play(length - 1) == (length - 1, False, True, True)


@functools.cache
def area(n, m):
    """Weights [m, n] that shrink n pixels to m, each the mean of what it covers."""
    edges, pixel = np.linspace(0, n, m + 1), np.arange(n)
    weights = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return weights.clip(0) * m / n


class Emulator:
    """The game through Gymnasium and ALE, one frame at a time, with what envpool makes of frames written out.

    An observation is the pixelwise maximum of the last two of four frames, shrunk to 84 x 84. Of a step in which the game ends
    before its fourth frame, envpool shows the third, or, if there is none, what it showed before.
    """

    def __init__(self, game):
        import gymnasium as gym

        ale_py = pytest.importorskip("ale_py", reason="pip install ale-py")
        gym.register_envs(ale_py)
        fixed = {"frameskip": 1, "repeat_action_probability": 0.0, "obs_type": "grayscale"}
        self.env = gym.make(f"ALE/{game}-v5", max_num_frames_per_episode=10**9, **fixed)

    def look(self):
        """The observation [84, 84] in fractions of a grey level."""
        return area(210, 84) @ self.shown.astype(float) @ area(160, 84).T

    def begin(self, new_game):
        """A frame without action begins an episode: envpool's noop_max=1 is one, not a random number up to it."""
        if new_game:
            self.env.reset()  # with a seed, it would load the game again, from which some games begin otherwise
        self.shown, *_, info = self.env.step(0)
        self.lives = info["lives"]

    def step(self, action):
        """-> reward, is the game over, is a life lost"""
        frames, reward, over, before = [], 0.0, False, self.lives
        while len(frames) < 4 and not over:
            frame, earned, over, _, info = self.env.step(action)
            frames.append(frame)
            reward += earned
        if len(frames) > 2:
            self.shown = np.max(frames[2:], axis=0)
        self.lives = info["lives"]
        return reward, over, self.lives < before


@pytest.mark.parametrize(
    "game, limit, steps, flags",
    [
        ("Breakout", 27_000, 1_500, ""),
        ("Breakout", 60, 700, ""),
        ("Breakout", 27_000, 1_500, "--episodic-life"),
        pytest.param("Pong", 27_000, 6_000, "", marks=pytest.mark.slow),
        pytest.param("SpaceInvaders", 27_000, 4_000, "", marks=pytest.mark.slow),
        pytest.param("SpaceInvaders", 27_000, 4_000, "--episodic-life", marks=pytest.mark.slow),
        pytest.param("Seaquest", 90, 2_000, "", marks=pytest.mark.slow),
    ],
)
def test_the_tape_holds_what_the_emulator_shows(atari, main, monkeypatch, game, limit, steps, flags):
    """Actions on the tape, played again through Gymnasium and ALE: frames to rounding; rewards, ends and lives exactly."""
    ended, lives = [], []

    class Recorded(atari.FrameTape):
        def finish(self, i, final_obs, terminated):
            first = self.running[i]
            super().finish(i, final_obs, terminated)
            ended.append((i, self.episodes[first]))

    class Watched(atari.EnvPool):
        def step(self, actions):
            out = super().step(actions)
            lives.append(out[-1]["lives"])
            return out

    monkeypatch.setattr(atari, "FrameTape", Recorded)
    monkeypatch.setattr(atari, "EnvPool", Watched)
    kwargs = '{"noop_max": 1, "use_fire_reset": false}'
    flags = [*flags.split(), "--env-id", f"{game}-v5", "--env-kwargs", kwargs, "--num-envs", "2", "--no-clip-reward"]
    flags += f"--total-timesteps {steps} --max-episode-steps {limit} --buffer-size {2 * limit + 3_000}".split()
    tape_buffer = main(*TINY, "--learning-starts", "1000000", *flags)["tape_buffer"]
    assert len(ended) >= 4 and {i for i, _ in ended} == {0, 1} and tape_buffer.next_row < len(tape_buffer.obs)
    emulators, new_game, steps = [Emulator(game), Emulator(game)], [True, True], [0, 0]
    for i, rows in ended:
        obs, actions, rewards = tape_buffer.obs[rows, 0], tape_buffer.actions[rows], tape_buffer.rewards[rows]
        emulators[i].begin(new_game[i])
        for t in range(len(rows)):
            assert abs(emulators[i].look() - obs[t]).max() < 0.501, (i, t)  # a half may go to either side
            if t < len(rows) - 1:
                reward, over, lost = emulators[i].step(int(actions[t]))
                assert reward == rewards[t] and emulators[i].lives == lives[steps[i]][i]
                steps[i] += 1
                end = over or (lost and "--episodic-life" in flags)
                assert end == tape_buffer.terminations[rows[t]] and (end or t + 2 == limit + 1) == (t + 2 == len(rows))
        new_game[i] = over or len(rows) == limit + 1


SMALL = "--cnn-channels 2 --hidden-size 8 --state-size 4 --num-envs 3 --max-episode-steps 40 --buffer-size 500".split()
SMALL += "--total-timesteps 1500 --learning-starts 500 --batch-size 60 --train-frequency 30 --checkpoint-interval 300".split()
SMALL += "--eval-episodes 4 --env-id Breakout-v5".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, *SMALL, script=SCRIPT).splitlines()


def test_a_run_logs_saves_and_evaluates(finished):
    folder, out = finished
    assert out[0].startswith("memory (GB): tape 0.00") and out[1].startswith(f"{SCRIPT}: Breakout-v5")
    assert out[-1].startswith("evaluation: episodic_return=") and "(4 greedy games" in out[-1]
    logged = scalars(run_folder(folder))
    names = "charts/episodic_return charts/episodic_length losses/td_loss losses/q_values charts/epsilon charts/buffer_fill"
    assert set(names.split()) <= set(logged) and len(logged["eval/episodic_return"]) == 4
    assert {value for _, value in logged["charts/episodic_length"]} == {40.0}
    again = run(folder, "--evaluate", run_folder(folder), "--eval-episodes", "4", script=SCRIPT)
    assert again.splitlines()[-1] == out[-1]
    assert not list(folder.glob("runs/*/*.partial"))


def test_equal_seeds_give_equal_runs(finished, tmp_path):
    run(tmp_path, *SMALL, script=SCRIPT)
    assert scalars(run_folder(tmp_path)) == scalars(run_folder(finished[0]))


def test_a_resumed_run_goes_on_with_tape_and_weights_and_new_games(finished, main, tmp_path, capsys):
    """From the last checkpoint of a finished run, at 1,200 steps."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    saved = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 1200 and saved["update"] == (1200 - 500) // 30 + 1
    space = main("--resume", str(run_folder(tmp_path)))
    out = capsys.readouterr().out
    assert f" {saved['update'] + 10} updates" in out and "evaluation: episodic_return=" in out
    rows = np.arange(1_110, 1_200) % 500  # written before the checkpoint, and not overwritten since
    np.testing.assert_array_equal(space["tape_buffer"].obs[rows], saved["tape_buffer"]["obs"].numpy()[rows])
    assert space["env_seeds"] != np.random.default_rng(1).integers(2**31, size=(2, 3))[0].tolist()  # not those of the start
    lengths = scalars(run_folder(tmp_path))["charts/episodic_length"]
    assert {value for _, value in lengths} == {40.0}
    assert [step for step, _ in lengths if 1200 < step] == [1320] * 3 + [1440] * 3
    assert len(scalars(run_folder(tmp_path))["eval/episodic_return"]) == 4  # not also those before the run was resumed


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id Pnog-v5", "--env-id: expected a game of envpool, got 'Pnog-v5'; the nearest are P"),
        (
            "--env-id CartPole-v1",
            "--env-id CartPole-v1, .*: expected options that this game has, got episodic_life, stack_num",
        ),
        ('--env-kwargs {"stack_num":4}', "--env-kwargs: expected none of .*stack_num, got stack_num; this file sets them"),
        ('--env-kwargs {"max_episode_steps":9}', "got max_episode_steps; this file sets them, by flags of its own"),
        ('--env-kwargs {"noop_max":0}', "--env-kwargs: expected noop_max of at least 1, got 0"),
        (
            '--env-kwargs {"colour":1}',
            "--env-id Pong-v5, --env-kwargs: expected options .*, got colour; its own: envpool.make_spec",
        ),
        ('--env-kwargs {"img_height":42}', "expected frames .1, 84, 84. of bytes, got Box.*leave img_height"),
        ("--buffer-size 1000", "--buffer-size: expected at least 216008, got 1000; raise it, or lower --max-episode-steps"),
        ("--num-envs 0", "--num-envs: expected at least 1, got 0; raise it"),
        ("--buffer-size 100000000", "memory: expected at most the .* GB available, got tape .*; lower --buffer-size"),
        ("--resume nowhere", "expected a run's directory with a file checkpoint.pt.*got 'nowhere'"),
    ],
)
def test_errors_say_what_to_do(main, flags, message):
    with pytest.raises(ValueError, match=message):
        main(*flags.split())
