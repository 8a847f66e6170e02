"""benchmark/probes/memory_length.py against networks whose answer is known, against finite differences, and from the shell."""

import argparse
import csv
import json
import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def bench():
    sys.path.append(str(ROOT / "benchmark" / "probes"))
    import memory_length

    return memory_length


@pytest.fixture
def saved(ffm, tmp_path):
    """The directory of a run of a small network in RepeatPrevious, k = 2, under the arguments of a segment-trained one."""
    own = ffm.Args(env_id="popgym-RepeatPreviousEasy-v0", env_kwargs={"k": 2}, hidden_size=8, trace_size=4)
    envs = gym.vector.SyncVectorEnv([ffm.make_env(own.env_id, {"k": 2})])
    content = {"q_network": ffm.QNetwork(envs, own).state_dict(), "args": vars(own) | {"segment_length": 10}}
    del content["args"]["context_size"]  # a model may be older than an argument of its script
    torch.save(content, tmp_path / "model.pt")
    return tmp_path


class Delayed(torch.nn.Module):
    """Q(s_n, a) = (a + 1) (o_{n-3} . w), and no memory to carry."""

    weight = torch.tensor([3.0, -1.0])
    memory = argparse.Namespace(initial_state=lambda num_envs: torch.zeros(num_envs))

    def forward(self, obs, begins):
        assert begins.tolist() == [True] + [False] * (len(obs) - 1)
        value = torch.cat([torch.zeros(3), obs @ self.weight])[: len(obs)]
        return value[:, None] * torch.tensor([1.0, 2.0])

    def step(self, obs, begins, recurrent_state):
        return torch.stack([torch.zeros(len(obs)), torch.from_numpy(obs[:, 0])], 1), recurrent_state


def test_a_network_that_reads_age_three_only(bench):
    obs, actions = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32), np.array([0, 1, 0] * 3)
    found = bench.sensitivity(Delayed(), obs, actions, [4, 8])
    assert found.tolist() == [[0, 8, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 4, 0, 0, 0]]  # (a + 1) (|3| + |-1|)
    for length, inside in (3, 0), (4, 1), (math.inf, 1):
        (curve, figures), (along, _) = bench.measure(Delayed(), [(obs, actions, 0.0)], 3, length).values()
        assert curve.tolist() == along.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
        assert figures["share_inside"] == inside and figures["share_outside"] == 1 - inside and figures["age_90"] == 3
        assert figures["share_oldest_needed"] == (length == 4)
    found = bench.measure(Delayed(), [(obs, actions, 0.0)], 3, None)
    figures = found["along the episode"][1]
    assert figures["share_inside"] == "" and figures["rows"] == 2  # of rows 2, 5, 8 the first depends on nothing
    assert found["last action"][1]["rows"] == 1


def test_a_value_without_observations_is_an_error(bench):
    with pytest.raises(ValueError, match="depend on observations"):
        bench.measure(Delayed(), [(np.ones((3, 2), np.float32), np.zeros(3, int), 0.0)], 2, None)
    with pytest.raises(ValueError, match="finite"):
        bench.sensitivity(lambda obs, begins: (obs * torch.nan).cumsum(0), np.ones((3, 2), np.float32), [0, 0, 0], [2])


def test_sensitivity_equals_finite_differences_of_acting(bench, ffm):
    """The gradient along the tape against the network stepped with one number of one observation moved."""
    envs = argparse.Namespace(single_observation_space=gym.spaces.Box(-1, 1, (3,)), single_action_space=gym.spaces.Discrete(2))
    q_network = ffm.QNetwork(envs, ffm.Args(hidden_size=8, trace_size=3, context_size=2))
    torch.nn.init.normal_(q_network.head.weight)  # as it is made, it gives values too small for differences in float32
    obs, actions, rows = torch.randn(6, 3), [0, 1, 1, 0, 1, 0], [2, 5]
    found = bench.sensitivity(q_network, obs.numpy(), actions, rows)

    def value(obs, n):
        state = q_network.memory.initial_state(1)
        with torch.no_grad():
            for i in range(n + 1):
                q_values, state = q_network.step(obs[i : i + 1].numpy(), np.array([i == 0]), state)
        return q_values[0, actions[n]].item()

    for n, row in zip(rows, found):
        for i in range(6):
            total, distance = 0.0, 2e-3
            for component in range(3):
                move = torch.zeros(6, 3)
                move[i, component] = distance
                total += abs(value(obs + move, n) - value(obs - move, n)) / (2 * distance)
            assert row[i] == pytest.approx(total, rel=0.01, abs=1e-3), (n, i)
            assert (row[i] > 0) == (i <= n)


def test_shares_add_up_to_one(bench):
    found = np.array([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    shares = bench.shares_by_age(found, [1, 3, 2], longest=5)
    assert shares[:2].tolist() == [[0.75, 0.25, 0, 0, 0], [0.5, 0, 0.25, 0.25, 0]]
    assert np.isnan(shares[2, :3]).all()
    figures = bench.summarise(shares[:2], np.array([1, 3]), 3)
    assert figures["share_inside"] == 0.875 and figures["share_inside"] + figures["share_outside"] == 1
    assert figures["share_oldest_needed"] == 0.25  # row 1 has two observations: it needs age 1, row 3 age 2
    assert figures["age_90"] == 3
    assert bench.summarise(shares[:2], np.array([1, 3]), math.inf)["share_oldest_needed"] == 0.25  # o_0 of both


def test_rows_along_the_episode(bench):
    assert bench.rows_along(51, 10, None) == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]
    assert bench.rows_along(51, 10, math.inf) == bench.rows_along(51, 10, None)
    assert bench.rows_along(51, 10, 41) == [41, 42, 43, 44, 45, 46, 47, 48, 49, 50]  # row 41 has one age outside
    assert bench.rows_along(51, 3, 10) == [23, 37, 50]
    assert bench.rows_along(3, 10, 10) == [0, 1, 2]
    assert bench.rows_along(3, 10, 3) == [0, 1, 2]


def test_memory_length_of_a_task_is_what_its_reward_asks_for(bench):
    """Who repeats the observation of age RML - 1 is never wrong."""
    from popgym.envs.repeat_first import RepeatFirstEasy
    from popgym.envs.repeat_previous import RepeatPrevious

    env = RepeatPrevious(num_decks=2, k=10)
    assert (length := bench.task_memory_length(env)) == 10
    seen, ended, total = [env.reset(seed=0)[0]], False, 0.0
    while not ended:
        obs, reward, ended, _, _ = env.step(seen[max(0, len(seen) - length)])
        seen.append(obs)
        total += reward
    assert total == pytest.approx(1)
    assert bench.task_memory_length(RepeatFirstEasy()) == math.inf
    assert bench.task_memory_length(gym.make("CartPole-v1")) is None


@pytest.mark.parametrize("limit", [9, 4], ids=["terminated", "truncated"])
def test_play_gives_each_environments_first_episode(bench, limit):
    import counting_env  # noqa: F401  registers the environment

    make = [lambda: gym.make("Counting-v0", max_episode_steps=limit)] * 4
    envs = gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    network = Delayed()
    network.step = lambda obs, begins, state: (torch.tensor(np.stack([begins, 0 * obs[:, 0] + 0.5, obs[:, 2] - 2.5]).T), state)
    episodes = bench.play(network, envs, [5, 6, 7, 8])
    assert (len({len(obs) for obs, _, _ in episodes}) > 1) == (limit == 9)  # these seeds: 4 steps or more
    for number, (obs, actions, total) in zip((5, 6, 7, 8), episodes):
        steps = range(len(actions))
        assert obs.tolist() == [[number, 0, step] for step in steps]
        assert total == sum(step + 1 for step in steps)
        assert actions.tolist() == [0, 1, 1, 1, 2, 2][: len(actions)]  # greedy, at the first step and where step > 3


def test_from_a_run_to_the_files(bench, saved, tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "probes" / "memory_length.py", saved, f"{saved}/"]
    flags = ["--episodes", "2", "--rows", "3", "--out", tmp_path / "out"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "share_outside" in done.stdout
    rows, read = {}, csv.DictReader
    for name in "curves", "summary":
        comment, *lines = (tmp_path / "out" / f"{name}.csv").read_text().splitlines()
        assert comment.startswith("# device: ")
        rows[name] = list(read(lines))
    curves, summary = rows.values()
    assert len(summary) == 4 and summary[:2] == summary[2:]  # one model, named in two ways
    for row in summary:
        assert (row["script"], row["segment_length"], row["reward_memory_length"]) == ("dqn_tbb_ffm", "10", "2")
        curve = [c for c in curves if c["at"] == row["at"]][:51]
        assert [int(c["age"]) for c in curve] == list(range(51))
        assert sum(float(c["share"]) for c in curve) == pytest.approx(1, abs=1e-3)
        assert float(row["share_inside"]) == pytest.approx(float(curve[1]["cumulative_share"]), abs=1e-4)
        assert float(row["share_inside"]) + float(row["share_outside"]) == pytest.approx(1, abs=1e-4)


def test_bad_paths_say_what_was_expected(bench, saved, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    (checkpoint := tmp_path / "checkpoint.pt").touch()
    for path in tmp_path / "nowhere", empty, checkpoint:
        with pytest.raises(ValueError, match=r"runs: expected run directories with a model.pt, got .*; see `ls runs`"):
            bench.load_model(path)
    with pytest.raises(ValueError, match="--script: expected the script that trained .*nowhere.py"):
        bench.load_model(saved, tmp_path / "nowhere.py")
    other = torch.load(saved / "model.pt")
    other["args"]["trace_size"] = 5
    torch.save(other, saved / "model.pt")
    args = argparse.Namespace(script=None, rows=2, reward_memory_length=None)
    with pytest.raises(ValueError, match="--script: expected the script .* network differs"):
        bench.measure_run(saved, args, seeds=[1])


def test_longer_goes_on_from_its_files_and_correlates_by_rank(tmp_path):
    """Cells of the committed file and of the folder count as done; a drop that is a rounding error is none."""
    sys.path.append(str(ROOT / "benchmark" / "probes"))
    import longer

    args = argparse.Namespace(out=str(tmp_path / "out"), kept=str(tmp_path / "kept"), seeds=[1, 2, 3])
    done = [cell for cell in longer.cells(["RepeatPrevious"], args.seeds)]
    (tmp_path / "kept").mkdir()
    for i, cell in enumerate(done):
        row = dict(zip(longer.NAMES, cell)) | {"state": "done", "return_x1": 1.0, "share_outside": i / 99, "drop": i / 99}
        (tmp_path / "kept" / f"{i}.json").write_text(json.dumps(row | {"drop": 1e-14 * i} if i < 2 else row))
    longer.write(args, "here")
    for path in (tmp_path / "kept").glob("*"):
        path.unlink()
    assert list(longer.has_run(args)) == done
    rows = list(csv.DictReader((tmp_path / "out" / "correlations.csv").read_text().splitlines()[1:]))
    assert [row["networks"] for row in rows if row["task"] == "RepeatPrevious"] == ["30", "12", "12", "6"]
    assert 0.99 < float(rows[0]["correlation"]) < 1 and rows[3]["correlation"] == ""
