"""The segment buffer against segments cut from a plain list of episodes, and segments against the tape they stand for."""

import numpy as np
import pytest
import torch
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tape_buffer import DTYPES, episode


@pytest.fixture(scope="module")
def sbb():
    return load_script("dqn_sbb_ffm")


def fill(sbb, capacity, lengths, segment_length, burn_in=0):
    buffer, kept = sbb.SegmentBuffer(capacity, segment_length, burn_in), []
    for number, length in enumerate(lengths):
        buffer.add(*episode(number + 1, length))  # no episode is number 0: a row of zeros is padding
        kept.append((number + 1, length))
        while sum(n + 1 for _, n in kept) > capacity:
            kept.pop(0)
    return buffer, kept


def read(tape, segment_length, burn_in, lengths):
    """Every row of every segment checked: (number, first transition) of each."""
    assert [column.dtype for column in tape] == DTYPES
    tape, found = type(tape)(*(column.numpy() for column in tape)), []
    width = burn_in + segment_length + 1
    assert len(tape.obs) % width == 0
    assert np.array_equal(np.flatnonzero(tape.begins), np.arange(0, len(tape.obs), width))  # memory starts in each
    expected = []
    for begin in range(0, len(tape.obs), width):
        number, start = tape.obs[begin].astype(int)
        obs, actions, rewards, terminated = episode(number, lengths[number])
        in_loss = begin + np.flatnonzero(~tape.final[begin : begin + width])
        first = int(tape.obs[in_loss[0], 1])
        assert first % segment_length == 0  # segments do not overlap
        assert start == max(0, first - burn_in)  # warmed by as many rows as there are
        last = min(first + segment_length, lengths[number])
        rows = np.arange(start, last + 1)
        assert np.array_equal(tape.obs[begin : begin + len(rows)], obs[rows])  # with the successor of the last step
        assert not tape.obs[begin + len(rows) : begin + width].any()  # zeros
        expected += [*range(begin + first - start, begin + last - start)]
        assert np.array_equal(tape.actions[in_loss], actions[first:last])
        assert np.array_equal(tape.rewards[in_loss], rewards[first:last].astype(np.float32))
        assert tape.terminations[in_loss].tolist() == [terminated and t == lengths[number] - 1 for t in range(first, last)]
        found.append((number, first))
    assert np.flatnonzero(~tape.final).tolist() == expected
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 40),
    st.lists(st.integers(1, 7), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(0, 8),
    st.integers(0, 2**32 - 1),
)
def test_segments_equal_a_list_of_episodes_cut_up(sbb, capacity, lengths, segment_length, burn_in, seed):
    buffer, kept = fill(sbb, capacity, lengths, segment_length, burn_in)
    every = {(number, first) for number, length in kept for first in range(0, length, segment_length)}
    rng = np.random.default_rng(seed)
    for batch_size in (1, 20):
        found = read(buffer.sample(batch_size, rng), segment_length, burn_in, dict(kept))
        assert set(found) <= every
        assert len(found) == max(1, round(batch_size / segment_length))  # as many rows as on a tape
    draws = 25 * len(every) * segment_length  # 25 of each, so that none is missing
    assert set(read(buffer.sample(draws, rng), segment_length, burn_in, dict(kept))) == every


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 30), st.lists(st.integers(1, 7), min_size=1, max_size=40), st.integers(1, 9))
def test_segments_are_those_of_the_episodes_that_are_held(sbb, capacity, lengths, segment_length):
    """After every insert, in order: none of an episode that is forgotten, all of those that are not."""
    buffer = sbb.SegmentBuffer(capacity, segment_length, 0)
    for number, length in enumerate(lengths):
        buffer.add(*episode(number, length))
        assert buffer.rows == sum(len(held.obs) for held in buffer.episodes) <= capacity
        firsts = [(held, first) for held in buffer.episodes for first in range(0, len(held.obs) - 1, segment_length)]
        assert len(buffer.segments) == len(firsts)
        for (found, found_first), (held, first) in zip(buffer.segments, firsts):
            assert found is held and found_first == first


def test_sampling_is_uniform_over_segments(sbb):
    """Not over episodes: those of 1, 5 and 9 steps have 1, 3 and 5 segments of two."""
    buffer, kept = fill(sbb, 64, [1, 5, 9], 2)
    rng = np.random.default_rng(0)
    first, second = (buffer.sample(15_000, rng).obs[::3] for _ in range(2))  # the first row of each segment names it
    assert not torch.equal(first, second)  # drawn anew each time
    _, counts = np.unique(torch.cat([first, second]).numpy(), axis=0, return_counts=True)
    assert len(counts) == 9 and abs(counts / counts.sum() - 1 / 9).max() < 0.01


def test_segments_longer_than_the_episodes_are_the_tape(sbb):
    """Nothing is cut then: Q values and the gradient's reach are those of whole episodes; padding has no loss."""

    class Env:
        single_observation_space = sbb.gym.spaces.Box(-1, 1, (2,))
        single_action_space = sbb.gym.spaces.Discrete(2)

    network = sbb.QNetwork(Env, sbb.Args(hidden_size=16, trace_size=4))
    torch.nn.init.normal_(network.head.weight)
    buffer, kept = fill(sbb, 64, [3, 6], 10)
    tape = buffer.sample(100, np.random.default_rng(0))
    q = network(tape.obs, tape.begins)
    for begin in torch.nonzero(tape.begins).flatten().tolist():
        number = int(tape.obs[begin, 0])
        length = dict(kept)[number]
        obs = torch.from_numpy(episode(number, length)[0])
        alone = network(obs, torch.arange(length + 1) == 0)
        torch.testing.assert_close(q[begin : begin + length + 1], alone)


def test_a_segment_forgets_what_was_before_it_and_burn_in_brings_it_back(sbb):
    class Env:
        single_observation_space = sbb.gym.spaces.Box(-1, 1, (2,))
        single_action_space = sbb.gym.spaces.Discrete(2)

    network = sbb.QNetwork(Env, sbb.Args(hidden_size=16, trace_size=4))
    torch.nn.init.normal_(network.head.weight)
    obs = torch.from_numpy(episode(1, 6)[0])
    whole = network(obs, torch.arange(7) == 0)
    for burn_in, equal in ((0, False), (2, False), (4, True)):
        buffer, kept = fill(sbb, 64, [6], 2, burn_in)
        tape = buffer.sample(200, np.random.default_rng(0))
        q = network(tape.obs, tape.begins)
        last = (~tape.final & (tape.obs[:, 1] == 4)).nonzero()[0, 0]  # the first step of the last segment
        assert torch.allclose(q[last], whole[4], atol=1e-5) == equal


def test_errors(sbb):
    with pytest.raises(ValueError, match="--segment-length: expected at least 1, got 0; raise it"):
        sbb.SegmentBuffer(10, 0, 0)
    with pytest.raises(ValueError, match="--burn-in: expected at least 0, got -1; raise it"):
        sbb.SegmentBuffer(10, 3, -1)
    buffer, kept = fill(sbb, 10, [9], 20)
    with pytest.raises(ValueError, match="--buffer-size 10: an episode of 10 steps takes 11 rows; raise it"):
        buffer.add(*episode(2, 10))
    assert read(buffer.sample(1, np.random.default_rng(0)), 20, 0, dict(kept)) == [(1, 0)]  # nothing is lost by the attempt


def test_a_buffer_from_a_checkpoint_goes_on_exactly_and_stores_each_episode_once(sbb, tmp_path):
    buffer, _ = fill(sbb, 20_000, [300] * 9, 2, 1)
    torch.save(buffer, tmp_path / "buffer.pt")
    columns = sum(column.nbytes for held in buffer.episodes for column in held)
    assert columns < (tmp_path / "buffer.pt").stat().st_size < 3 * columns  # 150 segments share an episode
    other = torch.load(tmp_path / "buffer.pt", weights_only=False)
    for number in (20, 21):
        ours, theirs = (b.sample(100, np.random.default_rng(1)) for b in (buffer, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        for b in (buffer, other):
            b.add(*episode(number, 5))
