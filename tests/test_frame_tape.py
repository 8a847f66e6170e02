"""The tape of frames against a plain list of episodes, its memory, and the network that reads it in pieces."""

import tracemalloc

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def atari():
    return load_script("dqn_tbb_lru_atari_envpool")


def frame(i, episode, t):
    return np.array([i, episode % 256, t % 256, t // 256], np.uint8).reshape(2, 2)


class Played:
    """Random episodes of N environments side by side, in a tape of frames and in a plain list."""

    def __init__(self, atari, capacity, num_envs, seed, lengths=(1, 9)):
        self.tape, self.rng, self.lengths = atari.FrameTape(capacity, num_envs, []), np.random.default_rng(seed), lengths
        self.episode, self.t = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.length = self.rng.integers(*lengths, size=num_envs, endpoint=True)
        self.ended = []  # (environment, episode, length)

    def step(self):
        n = len(self.t)
        obs = np.stack([frame(i, self.episode[i], self.t[i]) for i in range(n)])
        self.tape.add(obs, (self.t + self.episode) % 7, (self.t / 8 + self.episode).astype(np.float32))
        obs[:] = 99  # the environment's own array: a tape of views would show it
        self.t += 1
        for i in np.flatnonzero(self.t == self.length):
            self.tape.finish(i, frame(i, self.episode[i], self.t[i]), bool(self.episode[i] % 2))
            self.ended.append((i, self.episode[i], self.t[i]))
            self.episode[i], self.t[i] = self.episode[i] + 1, 0
            self.length[i] = self.rng.integers(*self.lengths, endpoint=True)

    def kept(self):
        """As many of the latest episodes as fit on the tape beside those that run."""
        rows = self.t.sum() + np.cumsum([length + 1 for *_, length in self.ended[::-1]])
        return self.ended[::-1][: (rows <= self.tape.buffer_size).sum()]


def read(tape):
    """The tape cut at its begins, every row checked: (environment, episode, length) of each."""
    obs, found = tape.obs.numpy().reshape(-1, 4).astype(int), []
    bounds, lone = [*np.flatnonzero(tape.begins), len(obs)], 0
    while bounds[-1] - bounds[-2] == 1:  # rows that round the length up: episodes without a step
        bounds.pop()
        lone += 1
    assert len(obs) % 32 == 0 and lone < 32 and tape.begins[0]
    for begin, end in zip(bounds[:-1], bounds[1:]):
        i, number, length = *obs[begin, :2].tolist(), end - begin - 1
        assert (obs[begin:end, :2] == (i, number)).all() and (obs[begin:end, 2] == np.arange(length + 1)).all()
        t = np.arange(length)
        assert tape.actions[begin : end - 1].tolist() == ((t + number) % 7).tolist()
        assert tape.rewards[begin : end - 1].tolist() == (t / 8 + number).tolist()
        assert tape.terminations[begin : end - 1].tolist() == [False] * (length - 1) + [bool(number % 2)]
        found.append((i, number, length))
    finals = {end - 1 for end in bounds[1:]}
    assert tape.final.tolist() == [row in finals or row >= len(obs) - lone for row in range(len(obs))]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 60), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_the_tape_equals_a_list_of_episodes(atari, num_envs, spare, steps, seed):
    played = Played(atari, num_envs * 20 + spare, num_envs, seed)
    for _ in range(steps):
        played.step()
        assert played.tape.rows <= played.tape.buffer_size
    kept = played.kept()
    assert len(played.tape.episodes) == len(kept)
    if kept:
        tape = played.tape.sample(2_000, np.random.default_rng(seed))
        found = read(tape)
        assert set(found) == set(kept)  # all can be reached, the oldest and the newest too, and no other
        transitions = (~tape.final).sum()
        assert transitions >= 2_000 > transitions - found[-1][2]  # and not an episode more than needed


def test_sampling_is_uniform_over_episodes(atari):
    played = Played(atari, 200, 2, 0, lengths=(3, 3))
    for _ in range(15):
        played.step()
    episodes = [e[:2] for e in read(played.tape.sample(30_000, np.random.default_rng(0)))]
    counts = np.unique(episodes, axis=0, return_counts=True)[1]
    assert len(counts) == 10 and abs(counts / counts.sum() - 0.1).max() < 0.01


def test_running_episodes_longer_than_the_tape_are_an_error(atari):
    played = Played(atari, 20, 2, 0, lengths=(30, 30))
    with pytest.raises(ValueError, match="--buffer-size 20: the running episodes have 22 rows; use a larger one, fewer env"):
        for _ in range(30):
            played.step()


@pytest.mark.parametrize("steps", [6, 90])
def test_a_tape_goes_on_from_the_episodes_in_a_checkpoint(atari, tmp_path, steps):
    played = Played(atari, 100, 2, 1)
    for _ in range(steps):
        played.step()
    torch.save(played.tape.episodes, tmp_path / "episodes.pt")
    size = (tmp_path / "episodes.pt").stat().st_size
    assert size < 10_000 + 10_000 * len(played.tape.episodes)  # a pickle of arrays would be larger
    other = atari.FrameTape(100, 2, torch.load(tmp_path / "episodes.pt", weights_only=False))
    ours, theirs = (tape.sample(300, np.random.default_rng(1)) for tape in (played.tape, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    played.tape, played.t[:], played.ended = other, 0, played.kept()[::-1]  # new games on it, as after --resume
    played.episode += 1
    for _ in range(40):
        played.step()
    assert set(read(other.sample(2_000, np.random.default_rng(0)))) == set(played.kept())


def test_a_frame_is_stored_once(atari):
    """Bar: 15 bytes beside a whole episode's frame, and no copies aside, while three times as many frames pass through."""
    tape, rng, peak = atari.FrameTape(1_000, 8, []), np.random.default_rng(0), 1_000 * (7_056 + 15)
    tracemalloc.start()
    for _ in range(375):
        tape.add(np.zeros((8, 84, 84), np.uint8), np.zeros(8, int), np.zeros(8, np.float32))
        for i in np.flatnonzero(rng.random(8) < 0.05):
            tape.finish(i, np.zeros((84, 84), np.uint8), True)
    assert tracemalloc.get_traced_memory()[1] < 1.2 * peak  # and an episode that is being put together
    tracemalloc.stop()
    rows = sum(len(episode.obs) for episode in tape.episodes)
    assert 700 < rows <= tape.rows <= 1_000
    assert sum(v.numel() * v.element_size() for episode in tape.episodes for v in episode) == rows * (7_056 + 15)


class Game:
    single_observation_space = gym.spaces.Box(0, 255, (52, 52), np.uint8)
    single_action_space = gym.spaces.Discrete(4)


def network(atari):
    made = atari.QNetwork(Game, atari.Args(cnn_channels=2, hidden_size=8, state_size=4))
    torch.nn.init.normal_(made.head.weight)
    return made


def test_a_tape_in_pieces_computed_twice_is_the_tape_at_once(atari, monkeypatch):
    """Values and gradients, where pieces are kept and where they are computed again; and each step as the policy takes it."""
    frames, begins = torch.randint(0, 256, (600, 52, 52), dtype=torch.uint8), torch.rand(600) < 0.02
    made = network(atari)
    outcomes = []
    for kept_rows in (600, 599, None):
        monkeypatch.setattr(atari, "KEPT_ROWS", kept_rows)
        whole = made.encoder(frames[:, None].float() / 255) if kept_rows is None else None
        q_values = made(frames, begins) if kept_rows else made.q_values(made.memory(whole, begins))
        made.zero_grad()
        q_values.square().mean().backward()
        outcomes.append([q_values.detach(), *(p.grad.clone() for p in made.parameters() if p.requires_grad)])
    for ours in outcomes[:2]:
        torch.testing.assert_close(ours, outcomes[2], rtol=1e-4, atol=1e-4)
    state = made.initial_state(1)
    for t in range(60):
        step, state = made.step(frames[t : t + 1].numpy(), begins[t : t + 1].numpy(), state)
        torch.testing.assert_close(step[0], outcomes[0][0][t], rtol=1e-4, atol=1e-4)


def test_pieces_beyond_kept_rows_are_not_kept(atari, monkeypatch):
    """What an update holds of a tape longer than KEPT_ROWS: features, and no result within the convolution."""
    frames, begins = torch.zeros(600, 52, 52, dtype=torch.uint8), torch.zeros(600, dtype=torch.bool)
    held = {}
    for kept_rows in (599, 600):
        monkeypatch.setattr(atari, "KEPT_ROWS", kept_rows)
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(atari)(frames, begins)
        held[kept_rows] = sum(sizes.values())
    assert held[600] > 4 * 600 * 52 * 52 and held[599] < 600 * (52 * 52 + 1_000)  # floats; bytes, and the memory's results


def test_the_tape_lies_on_its_device(atari):
    """On "meta", a device that every machine has: nothing of a whole episode stays elsewhere, nor of a checkpoint's."""
    played = Played(atari, 100, 2, seed=0)
    for _ in range(40):
        played.step()
    tape = atari.FrameTape(100, 2, played.tape.episodes, "meta")
    assert tape.episodes is played.tape.episodes  # the list that a checkpoint holds
    tape.add(np.zeros((2, 2, 2), np.uint8), np.zeros(2, int), np.zeros(2))
    tape.finish(0, np.zeros((2, 2), np.uint8), True)
    for episode in [*tape.episodes, tape.sample(20, np.random.default_rng(0), "meta")]:
        assert {column.device.type for column in episode} == {"meta"}
    assert len(tape.episodes) > 3 and {column.dtype for column in tape.episodes[-1]} == {
        column.dtype for column in tape.episodes[0]
    }
