"""Atari through envpool: what reaches the tape, against frames that say where they are and against the emulator itself."""

import ast
import contextlib
import functools
import importlib.util
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from scripts import assert_keeps_its_source, run_folder, saved_state, scalars

envpool = pytest.importorskip("envpool", reason="pip install 'cleanrl-memoroid[envpool]'")

SCRIPT = "dqn_tbb_lru_atari_envpool"
SEGMENTS = "dqn_sbb_lru_atari_envpool"
every_script = pytest.mark.parametrize("script", [SCRIPT, SEGMENTS])
MAKE = envpool.make_gymnasium
TINY = "--cnn-channels 2 --hidden-size 8 --state-size 4 --eval-episodes 0 --checkpoint-interval 0".split()


def main(script, folder, *flags, fake=False):
    """Runs a script's __main__ here, where nothing is imported twice. -> its variables. `fake`: with games that tests know."""
    path, module = ROOT / "single_files" / f"{script}.py", load_script(script)
    body = ast.parse(path.read_text()).body[-1].body
    space = dict(vars(module)) | {"tune_cpu": lambda: None}  # its switches are for a whole process
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(path), *map(str, flags)])
        patch.setitem(sys.modules, "envpool", fake_envpool() if fake else envpool)
        patch.setitem(sys.modules, "__main__", module)  # as it is when the script runs by itself
        exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space


@functools.cache
def fake_envpool():
    spec = importlib.util.spec_from_file_location("fake_envpool", ROOT / "tests" / "helpers" / "fake_envpool" / "envpool.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def atari():
    return load_script(SCRIPT)


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
    """[T, 84, 84] -> environment, episode and step of every row [T, 3]"""
    return np.ascontiguousarray(obs[:, 0, :24]).view(np.int64)


def check_episode(episode, terminated, limit):
    """One episode on the tape is one episode of one environment, from its first frame to its last. -> its place"""
    place, steps = places(episode.obs.numpy()), len(episode.obs) - 1
    assert (place[:, :2] == place[0, :2]).all(), "rows of two environments or two episodes"
    assert place[:, 2].tolist() == list(range(steps + 1)), "a row is missing, or there twice"
    assert episode.rewards[:-1].tolist() == list(range(1, steps + 1)), "a reward of another step"
    assert episode.terminations.tolist() == [False] * (steps - 1) + [terminated, False]
    assert episode.begins.tolist() == [True] + [False] * steps and episode.final.tolist() == [False] * steps + [True]
    assert steps <= limit and (terminated or steps == limit), "truncated before its time"
    return tuple(place[0, :2].tolist())


def collect(atari, folder, steps, limit, flags=()):
    """Runs the script with random actions on stamped frames; every episode is checked as it ends. -> episodes, terminations"""
    found = {}

    class Checked(atari.FrameTape):
        def finish(self, i, final_obs, terminated):
            super().finish(i, final_obs, terminated)
            assert terminated in (True, False)
            found[check_episode(self.episodes[-1], bool(terminated), limit)] = bool(terminated)
            if len(found) % 200 == 1:  # and what an update would read, while older episodes are forgotten
                tape = self.sample(50, np.random.default_rng(len(found)))
                place, begins = places(tape.obs.numpy()), tape.begins.numpy()
                same = (place[1:, :2] == place[:-1, :2]).all(1) & (place[1:, 2] == place[:-1, 2] + 1)
                assert (same | begins[1:]).all() and (place[begins, 2] == 0).all()

    flags = [*flags, *"--env-id Breakout-v5 --num-envs 8 --no-clip-reward --train-frequency 8".split()]
    flags += f"--total-timesteps {steps} --learning-starts {steps - 8}".split()
    flags += f"--max-episode-steps {limit} --buffer-size {max(2_000, 8 * (limit + 1))}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atari, "FrameTape", Checked)
        patch.setattr(envpool, "make_gymnasium", lambda *args, **kwargs: Stamped(MAKE(*args, **kwargs)))
        assert main(SCRIPT, folder, *TINY, *flags)["global_step"] == steps
    return found


SLOW = pytest.mark.slow  # as what takes most of the time is the emulator


@pytest.mark.parametrize(
    "limit, steps",
    [(7, 400), *(pytest.param(limit, 100_000, marks=SLOW) for limit in (7, 50, 2_000))],
)
def test_no_row_on_the_tape_mixes_two_episodes(atari, tmp_path, limit, steps):
    """Bar: over 10^5 random steps in 8 environments, with time limits and without."""
    found = collect(atari, tmp_path, steps, limit)
    for i in range(8):  # none is lost on the way
        numbers = sorted(episode for env, episode in found if env == i)
        assert numbers == list(range(len(numbers)))
    expected = {7: 0, 50: 0, 2_000: len(found)}[limit]  # only a game without a limit is over; none lasts for 2,000 steps
    assert sum(found.values()) == expected and len(found) > steps / (400 if limit == 2_000 else limit + 2)


@SLOW
def test_a_lost_life_ends_an_episode_only_if_asked(atari, tmp_path):
    games = collect(atari, tmp_path, 8_000, 2_000)
    assert len(scalars(run_folder(tmp_path))["charts/episodic_return"]) == len(games)
    shutil.rmtree(tmp_path / "runs")
    lives = collect(atari, tmp_path, 8_000, 2_000, ["--episodic-life"])
    assert len(lives) > 3 * len(games) and all(games.values()) and all(lives.values())
    logged = scalars(run_folder(tmp_path))["charts/episodic_length"]  # of whole games
    assert 4 * len(logged) < len(lives) and min(length for _, length in logged) > 100


def test_a_game_that_is_over_in_the_step_of_its_time_limit_is_terminated(atari):
    def play(limit):
        envs, rng = atari.make_env("Breakout-v5", 1, {"max_episode_steps": limit}), np.random.default_rng(0)
        envs.reset(seed=5)
        for t in range(1, 2_000):
            _, _, terminations, truncations, infos = envs.step(rng.integers(4, size=1))
            if terminations[0] or truncations[0]:
                return t, bool(terminations[0]), bool(truncations[0]), bool(infos["game_over"][0])

    length, *end = play(2_000)
    assert end == [True, False, True]
    assert play(length) == (length, True, True, True)
    assert play(length - 1) == (length - 1, False, True, True)


@pytest.mark.parametrize(
    "script, clip", [(SCRIPT, "--clip-reward"), (SCRIPT, "--no-clip-reward"), (SEGMENTS, "--clip-reward")]
)
def test_the_tape_holds_every_game_that_has_ended(tmp_path, script, clip):
    """Frames, rewards and endings of games that a test knows, of which the last of each environment still runs."""
    flags = "--num-envs 3 --total-timesteps 180 --learning-starts 178 --train-frequency 3".split()
    flags += "--max-episode-steps 6 --buffer-size 500".split()
    space = main(script, tmp_path, *TINY, *flags, clip, "--episodic-life", fake=True)
    found, returns, frames = {}, [], 0
    for episode in space["tape_buffer"].episodes:
        found.setdefault(episode.obs.numpy().tobytes(), []).append(episode)
    for seed in (1, 2, 3):  # --seed 1
        steps, number, game = 0, 0, 0.0
        while True:
            obs, rewards, ending = fake_envpool().episode(seed, number)
            steps, number, game = steps + len(rewards), number + 1, game + rewards.sum()
            if steps > 60:
                break
            (episode,) = found.pop(obs.tobytes())
            assert episode.rewards[:-1].tolist() == (np.sign(rewards) if clip == "--clip-reward" else rewards).tolist()
            assert episode.terminations.tolist() == [False] * (len(rewards) - 1) + [ending != "time limit", False]
            assert episode.begins.nonzero().tolist() == [[0]] and episode.final.nonzero().tolist() == [[len(rewards)]]
            if ending != "life lost":
                returns.append(game)
                game = 0.0
            frames += len(obs)
    assert not found and frames > 150
    logged = scalars(run_folder(tmp_path))["charts/episodic_return"]
    assert sorted(value for _, value in logged) == sorted(returns)


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
        ("Breakout", 40, 180, ""),
        pytest.param("Breakout", 27_000, 1_500, "", marks=SLOW),
        pytest.param("Breakout", 27_000, 1_500, "--episodic-life", marks=SLOW),
        pytest.param("Pong", 27_000, 6_000, "", marks=SLOW),
        pytest.param("SpaceInvaders", 27_000, 4_000, "", marks=SLOW),
        pytest.param("SpaceInvaders", 27_000, 4_000, "--episodic-life", marks=SLOW),
        pytest.param("Seaquest", 90, 2_000, "", marks=SLOW),
    ],
)
def test_the_tape_holds_what_the_emulator_shows(atari, monkeypatch, tmp_path, game, limit, steps, flags):
    """Actions on the tape, played again through Gymnasium and ALE: frames to rounding; rewards, ends and lives exactly."""
    ended, lives = [], []

    class Recorded(atari.FrameTape):
        def finish(self, i, final_obs, terminated):
            super().finish(i, final_obs, terminated)
            ended.append((i, self.episodes[-1]))

    class Watched(atari.EnvPool):
        def step(self, actions):
            out = super().step(actions)
            lives.append(out[-1]["lives"])
            return out

    monkeypatch.setattr(atari, "FrameTape", Recorded)
    monkeypatch.setattr(atari, "EnvPool", Watched)
    flags = [*flags.split(), *f"--env-id {game}-v5 --env-kwargs noop_max 1 use_fire_reset False".split()]
    flags += f"--num-envs 2 --train-frequency 2 --no-clip-reward --total-timesteps {steps} --max-episode-steps {limit}".split()
    main(SCRIPT, tmp_path, *TINY, "--learning-starts", steps - 2, "--buffer-size", 2 * limit + 3_000, *flags)
    assert len(ended) >= 4 and {i for i, _ in ended} == {0, 1}
    emulators, new_game, steps = [Emulator(game), Emulator(game)], [True, True], [0, 0]
    for i, (obs, _, actions, rewards, terminations, _) in ended:
        emulators[i].begin(new_game[i])
        for t in range(len(obs)):
            assert abs(emulators[i].look() - obs[t].numpy()).max() < 0.501, (i, t)  # a half may go to either side
            if t < len(obs) - 1:
                reward, over, lost = emulators[i].step(int(actions[t]))
                assert reward == rewards[t] and emulators[i].lives == lives[steps[i]][i]
                steps[i] += 1
                end = over or (lost and "--episodic-life" in flags)
                assert end == terminations[t] and (end or t + 2 == limit + 1) == (t + 2 == len(obs))
        new_game[i] = over or len(obs) == limit + 1


SMALL = "--cnn-channels 2 --hidden-size 8 --state-size 4 --num-envs 3 --max-episode-steps 6 --buffer-size 500".split()
SMALL += "--total-timesteps 900 --learning-starts 300 --batch-size 60 --train-frequency 30 --checkpoint-interval 200".split()
SMALL += ["--eval-episodes", "4"]
FLAGS = {SCRIPT: SMALL, SEGMENTS: [*SMALL, *"--segment-length 3 --burn-in 2".split()]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """script -> the folder of a finished run, of which several tests read."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp("finished")
        main(script, folder, *FLAGS[script], fake=True)
        return folder

    return of


@every_script
def test_a_run_logs_saves_and_evaluates(finished, tmp_path, capsys, script):
    main(script, tmp_path, *FLAGS[script], fake=True)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "games run in C++ and cannot be saved: --resume will begin new ones"
    assert out[1].startswith(f"{script}: Pong-v5, 900 steps") and out[3] == "the tape takes 0.00 GB once it is full"
    assert out[-1].startswith("evaluation: episodic_return=") and out[-1].endswith("the mean of 4 greedy games of Pong-v5")
    logged = scalars(run_folder(tmp_path))
    names = "charts/episodic_return charts/episodic_length losses/td_loss losses/q_values charts/epsilon charts/buffer_fill"
    assert set(names.split()) <= set(logged) and len(logged["eval/episodic_return"]) == 4
    assert logged == scalars(run_folder(finished(script)))  # equal seeds, equal runs
    main(script, tmp_path, "--evaluate", run_folder(tmp_path), fake=True)
    assert capsys.readouterr().out.splitlines()[-1] == out[-1]
    assert not list(tmp_path.glob("runs/*/*.partial"))
    assert_keeps_its_source(run_folder(tmp_path), script)


@every_script
def test_a_resumed_run_goes_on_with_tape_and_weights_and_new_games(finished, tmp_path, capsys, script):
    """From the last checkpoint of a finished run, at 800 steps, with a larger tape."""
    shutil.copytree(finished(script) / "runs", tmp_path / "runs")
    saved = saved_state(tmp_path, script)
    assert saved["global_step"] == 801 and saved["update"] == 801 // 30 - 300 // 30 and len(saved["episodes"]) > 50
    seeds, make = [], fake_envpool().make_gymnasium
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda *args, seed, **options: seeds.append(seed) or make(*args, seed=seed, **options)  # noqa: E731
        patch.setattr(fake_envpool(), "make_gymnasium", spy)
        space = main(script, tmp_path, "--resume", run_folder(tmp_path), "--buffer-size", "5000", fake=True)
    assert not set(seeds[0]) & {1, 2, 3} and seeds[1] == [1_000_001, 1_000_002, 1_000_003, 1_000_004]
    out = capsys.readouterr().out
    assert "cannot be saved: new ones begin" in out and "900 steps, 20 updates" in out and "evaluation:" in out
    ours = space["tape_buffer"].episodes
    assert len(ours) > len(saved["episodes"])  # nothing forgotten, as there is room enough
    for one, other in zip(ours, saved["episodes"]):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert len(scalars(run_folder(tmp_path))["eval/episodic_return"]) == 4  # not also those before the run was resumed


def test_evaluation_plays_one_whole_game_in_each_environment(atari):
    """Also where a lost life ends an episode: memory begins anew, and the game goes on. Later games do not count."""

    class Lives:
        """Game i has lives of i + 1 steps, which earn 1, 2 and so on; after three lives it is over."""

        num_envs = 3

        def reset(self, seed):
            self.t, self.begun, self.over = np.zeros(3, int), [], np.zeros(3, int)
            return np.zeros((3, 52, 52), np.uint8), {}

        def step(self, actions):
            self.t += 1
            ends, length = self.t % (np.arange(3) + 1) == 0, 3 * (np.arange(3) + 1)
            over, rewards = self.t == length, self.t.astype(np.float32)
            self.t[over], self.over = 0, self.over + over
            return np.zeros((3, 52, 52), np.uint8), rewards, ends, np.zeros(3, bool), {"game_over": over}

        def close(self):
            self.closed = True

    class Network:
        def __init__(self):
            self.begins = []

        def initial_state(self, num_envs):
            return torch.zeros(num_envs, 1)

        def step(self, obs, begins, state):
            self.begins.append(begins.tolist())
            return torch.zeros(3, 4), state

    envs, network = Lives(), Network()
    assert atari.evaluate(network, envs, atari.Args()).tolist() == [1 + 2 + 3, sum(range(1, 7)), sum(range(1, 10))]
    assert envs.closed and envs.over.tolist() == [3, 1, 1]
    assert np.array(network.begins).T.tolist() == [[True] * 9, [t % 2 == 0 for t in range(9)], [t % 3 == 0 for t in range(9)]]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id Pnog-v5", "--env-id Pnog-v5, .*: envpool raised KeyError.'Pnog-v5'.; .*see its list_all_envs"),
        (
            "--env-id CartPole-v1",
            "--env-id CartPole-v1, .*: envpool raised TypeError.*unexpected keyword argument 'stack_num'",
        ),
        ("--env-kwargs colour 1", "--env-kwargs .*'colour': 1.*unexpected keyword argument 'colour'.*make_spec.NAME..config"),
        ("--env-kwargs noop_max 0", "--env-kwargs noop_max: expected at least 1, got 0; raise it or leave it out"),
        ("--env-kwargs img_height 43", "--env-kwargs img_height: expected at least 44, got 43; raise it"),
        ("--env-kwargs gray_scale False", "--env-kwargs gray_scale: expected at least 1, got False; .*leave it out"),
        ("--buffer-size 1000", "--buffer-size: expected at least 216008, got 1000; raise it, or lower --max-episode-steps"),
        ("--num-envs 0", "--num-envs: expected at least 1, got 0; raise it"),
        ("--resume nowhere", "--resume: expected a file nowhere/checkpoint.pt, got none; see `ls runs`"),
    ],
)
def test_errors_say_what_to_do(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(SCRIPT, tmp_path, *flags.split())


@pytest.mark.parametrize(
    "script, words", [(SCRIPT, "trained on a tape of whole games"), (SEGMENTS, "on zero-padded segments")]
)
def test_help_reads_like_documentation(tmp_path, capsys, script, words):
    main(script, tmp_path, "--help")
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert words in out and "the id of the game in envpool" in out
    assert ("transitions per segment" in out) == (script == SEGMENTS)
