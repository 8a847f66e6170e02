"""The tape of frames and its segments against a plain list of episodes, memory, and the network that reads it in pieces."""

import tracemalloc

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def atari():
    return load_script("dqn_tbb_lru_atari_envpool")


@pytest.fixture(scope="module")
def sbb():
    return load_script("dqn_sbb_lru_atari_envpool")


@pytest.fixture(scope="module", params=["atari", "sbb"])
def either(request):
    return request.getfixturevalue(request.param)


def make_tape(script, capacity, num_envs, episodes, device="cpu", segment_length=4, burn_in=0):
    if hasattr(script, "FrameTape"):
        return script.FrameTape(capacity, num_envs, episodes, device)
    return script.FrameSegments(capacity, num_envs, episodes, segment_length, burn_in, device)


def frame(i, episode, t):
    return np.array([i, episode % 256, t % 256, t // 256], np.uint8).reshape(2, 2)


class Played:
    """Random episodes of N environments side by side, in a tape of frames and in a plain list."""

    def __init__(self, script, capacity, num_envs, seed, lengths=(1, 9), **segments):
        self.tape, self.rng, self.lengths = (
            make_tape(script, capacity, num_envs, [], **segments),
            np.random.default_rng(seed),
            lengths,
        )
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

    def found(self, batch_size=2_000):
        """The whole episodes that a sample of rows comes from, every row checked."""
        sample = self.tape.sample(batch_size, np.random.default_rng(0))
        return {e[:3] for e in (read_segments(sample, self) if hasattr(self.tape, "segments") else read(sample))}


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


def read_segments(tape, played):
    """Every row of every segment checked: (environment, episode, length, first transition) of each."""
    length, burn_in, lengths = played.tape.segment_length, played.tape.burn_in, {e[:2]: e[2] for e in played.ended}
    width, obs, found, in_loss = burn_in + length + 1, tape.obs.numpy().reshape(-1, 4).astype(int), [], []
    assert len(obs) % width == 0 and tape.begins.nonzero().flatten().tolist() == list(range(0, len(obs), width))
    for begin in range(0, len(obs), width):
        i, number, start, _ = obs[begin].tolist()
        first = int(obs[begin + (~tape.final[begin : begin + width]).nonzero()[0, 0], 2])
        last = min(first + length, lengths[i, number])
        assert first % length == 0 and start == max(0, first - burn_in)  # no overlap; warmed by as many rows as there are
        rows = np.arange(start, last + 1)  # with the successor of the last step
        assert (obs[begin : begin + len(rows), :2] == (i, number)).all() and not obs[begin + len(rows) : begin + width].any()
        assert (obs[begin : begin + len(rows), 2] == rows).all()
        steps, t = slice(begin + first - start, begin + last - start), np.arange(first, last)
        in_loss += range(steps.start, steps.stop)
        assert tape.actions[steps].tolist() == ((t + number) % 7).tolist()
        assert tape.rewards[steps].tolist() == (t / 8 + number).tolist()
        assert tape.terminations[steps].tolist() == (bool(number % 2) & (t == lengths[i, number] - 1)).tolist()
        found.append((i, number, lengths[i, number], first))
    assert (~tape.final).nonzero().flatten().tolist() == in_loss
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


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 60),
    st.integers(1, 120),
    st.integers(1, 10),
    st.integers(0, 10),
    st.integers(0, 2**32 - 1),
)
def test_segments_equal_a_list_of_episodes_cut_up(sbb, num_envs, spare, steps, length, burn_in, seed):
    """After every step, all segments of the episodes that are held, in order, and none of one that is forgotten."""
    played = Played(sbb, num_envs * 20 + spare, num_envs, seed, segment_length=length, burn_in=burn_in)
    for _ in range(steps):
        played.step()
        tape = played.tape
        assert tape.rows == played.t.sum() + sum(len(episode.obs) for episode in tape.episodes) <= tape.buffer_size
        firsts = [(held, first) for held in tape.episodes for first in range(0, len(held.obs) - 1, length)]
        assert len(tape.segments) == len(firsts)
        assert all(a is b and i == j for (a, i), (b, j) in zip(tape.segments, firsts))
    kept, rng = played.kept(), np.random.default_rng(seed)
    assert len(played.tape.episodes) == len(kept)
    every = {(*episode, first) for episode in kept for first in range(0, episode[2], length)}
    for batch_size in (1, 20, 25 * len(every) * length) if kept else ():  # at last 25 of each, so that none is missing
        found = read_segments(played.tape.sample(batch_size, rng), played)
        assert len(found) == max(1, round(batch_size / length))  # as many rows as on a tape
        assert set(found) <= every
    assert not kept or set(found) == every


def test_sampling_is_uniform_over_segments(sbb):
    """Not over episodes: those of 1 to 9 steps have 1 to 5 segments of two."""
    played = Played(sbb, 40, 2, 0, segment_length=2)
    for _ in range(40):
        played.step()
    firsts = played.tape.sample(20_000, np.random.default_rng(0)).obs[::3].flatten(1)  # which name their segments
    counts = np.unique(firsts.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == len(played.tape.segments) > 2 * len(played.tape.episodes)
    assert abs(counts / counts.mean() - 1).max() < 0.15


def test_sampling_is_uniform_over_episodes(atari):
    played = Played(atari, 200, 2, 0, lengths=(3, 3))
    for _ in range(15):
        played.step()
    episodes = [e[:2] for e in read(played.tape.sample(30_000, np.random.default_rng(0)))]
    counts = np.unique(episodes, axis=0, return_counts=True)[1]
    assert len(counts) == 10 and abs(counts / counts.sum() - 0.1).max() < 0.01


def test_running_episodes_longer_than_the_tape_are_an_error(either):
    played = Played(either, 20, 2, 0, lengths=(30, 30))
    with pytest.raises(ValueError, match="--buffer-size 20: the running episodes have 22 rows; use a larger one, fewer env"):
        for _ in range(30):
            played.step()


def test_wrong_lengths_of_segments_are_errors(sbb):
    with pytest.raises(ValueError, match="--segment-length: expected at least 1, got 0; raise it"):
        sbb.FrameSegments(10, 1, [], 0, 0)
    with pytest.raises(ValueError, match="--burn-in: expected at least 0, got -1; raise it"):
        sbb.FrameSegments(10, 1, [], 1, -1)


@pytest.mark.parametrize("steps", [6, 90])
def test_a_tape_goes_on_from_the_episodes_in_a_checkpoint(either, tmp_path, steps):
    played = Played(either, 100, 2, 1)
    for _ in range(steps):
        played.step()
    torch.save(played.tape.episodes, tmp_path / "episodes.pt")
    size = (tmp_path / "episodes.pt").stat().st_size
    assert size < 10_000 + 10_000 * len(played.tape.episodes)  # a pickle of arrays would be larger
    other = make_tape(either, 100, 2, torch.load(tmp_path / "episodes.pt", weights_only=False))
    ours, theirs = (tape.sample(300, np.random.default_rng(1)) for tape in (played.tape, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    played.tape, played.t[:], played.ended = other, 0, played.kept()[::-1]  # new games on it, as after --resume
    played.episode += 1
    for _ in range(40):
        played.step()
    assert played.found() == set(played.kept())


def test_a_frame_is_stored_once(either):
    """Bar: 15 bytes beside a whole episode's frame, and no copies aside, while three times as many frames pass through."""
    tape, rng, peak = make_tape(either, 1_000, 8, []), np.random.default_rng(0), 1_000 * (7_056 + 15)
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


@pytest.mark.parametrize("length, burn_in", [(4, 0), (4, 3), (9, 0), (9, 9)])
def test_an_update_on_segments_is_that_of_their_transitions_alone(sbb, length, burn_in):
    """Loss and gradient, against segments cut from the episodes by hand: each from an empty memory, row by row, unpadded."""
    rng, tape = np.random.default_rng(0), make_tape(sbb, 200, 1, [], segment_length=length, burn_in=burn_in)
    for steps, terminated in ((9, True), (2, False), (6, True)):
        for _ in range(steps):
            tape.add(rng.integers(256, size=(1, 52, 52), dtype=np.uint8), rng.integers(4, size=1), rng.normal(size=1))
        tape.finish(0, rng.integers(256, size=(52, 52), dtype=np.uint8), terminated)
    online, target = network(sbb), network(sbb)

    batch = tape.sample(12 * length, np.random.default_rng(1))
    q_values = online(batch.obs, batch.begins)
    goals = sbb.td_target(q_values, target(batch.obs, batch.begins), batch, 0.9).detach()
    loss = F.smooth_l1_loss(q_values.gather(1, batch.actions[:, None]).squeeze(1)[~batch.final], goals)
    loss.backward()
    ours = [loss.detach(), *(p.grad.clone() for p in online.parameters() if p.requires_grad)]

    losses = []
    for i in np.random.default_rng(1).integers(len(tape.segments), size=12):
        segments = [(e, first) for e in tape.episodes for first in range(0, len(e.obs) - 1, length)]
        episode, first = segments[i]
        last = min(first + length, len(episode.obs) - 1)
        start = max(0, first - burn_in)
        values = []
        for made in (online, target):
            state, outs = made.initial_state(1), []
            for t in range(start, last + 1):
                state_in = made.features(episode.obs[t : t + 1])
                out, state = made.memory.step(state_in, torch.tensor([t == start]), state)
                outs.append(made.q_values(out)[0])
            values.append(torch.stack(outs))
        for t in range(first, last):
            row = t - start
            bootstrap = values[1][row + 1, values[0][row + 1].argmax()].detach() * (not episode.terminations[t])
            goal = episode.rewards[t] + 0.9 * bootstrap
            losses.append(F.smooth_l1_loss(values[0][row, episode.actions[t]], goal))
    online.zero_grad()
    loss = torch.stack(losses).mean()
    loss.backward()
    theirs = [loss.detach(), *(p.grad.clone() for p in online.parameters() if p.requires_grad)]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


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


def test_the_tape_lies_on_its_device(either):
    """On "meta", a device that every machine has: nothing of a whole episode stays elsewhere, nor of a checkpoint's."""
    played = Played(either, 100, 2, seed=0)
    for _ in range(40):
        played.step()
    tape = make_tape(either, 100, 2, played.tape.episodes, "meta")
    assert tape.episodes is played.tape.episodes  # the list that a checkpoint holds
    tape.add(np.zeros((2, 2, 2), np.uint8), np.zeros(2, int), np.zeros(2))
    tape.finish(0, np.zeros((2, 2), np.uint8), True)
    for episode in [*tape.episodes, tape.sample(20, np.random.default_rng(0), "meta")]:
        assert {column.device.type for column in episode} == {"meta"}
    assert len(tape.episodes) > 3 and {column.dtype for column in tape.episodes[-1]} == {
        column.dtype for column in tape.episodes[0]
    }
