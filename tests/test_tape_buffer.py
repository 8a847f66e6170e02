"""The tape buffer against a plain list of episodes, and the targets against episodes computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bool, torch.int64, torch.float32, torch.bool, torch.bool]  # of a tape's columns


def episode(number, length):
    """Observations that name their episode and their step, so that a row out of place is seen."""
    obs = np.stack([np.full(length + 1, number), np.arange(length + 1)], axis=1).astype(np.float32)
    actions = np.arange(length) % 5 + 7 * number
    return obs, actions, np.arange(length) / 8 + number, bool(number % 2)


def fill(ffm, capacity, lengths):
    """The buffer after these inserts, and the episodes that a plain list would still hold."""
    buffer, kept = ffm.TapeBuffer(capacity), []
    for number, length in enumerate(lengths):
        buffer.add(*episode(number, length))
        kept.append((number, length))
        while sum(n + 1 for _, n in kept) > capacity:
            kept.pop(0)
    return buffer, kept


def read(tape):
    """The tape cut at its begins, every row checked: (number, length) of each episode."""
    assert [column.dtype for column in tape] == DTYPES
    tape, found = type(tape)(*(column.numpy() for column in tape)), []
    bounds = [*np.flatnonzero(tape.begins), len(tape.obs)]
    padding = 0
    while bounds[-1] - bounds[-2] == 1:  # rows that round the length up: episodes without a step
        bounds.pop()
        padding += 1
    assert len(tape.obs) % 32 == 0 and padding < 32
    expected_final = np.zeros(len(tape.obs), bool)
    expected_final[bounds[-1] :] = True
    for begin, end in zip(bounds[:-1], bounds[1:]):
        number, length = int(tape.obs[begin, 0]), end - begin - 1
        obs, actions, rewards, terminated = episode(number, length)
        rows = slice(begin, end - 1)
        assert np.array_equal(tape.obs[begin:end], obs)
        assert np.array_equal(tape.actions[rows], actions)
        assert np.array_equal(tape.rewards[rows], rewards.astype(np.float32))
        assert tape.terminations[rows].tolist() == [False] * (length - 1) + [terminated]
        expected_final[end - 1] = True
        found.append((number, length))
    assert np.array_equal(tape.final, expected_final)
    assert tape.begins[0] and not tape.terminations[tape.final].any()
    assert not tape.obs[bounds[-1] :].any() and not tape.rewards[bounds[-1] :].any()
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.lists(st.integers(1, 7), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_buffer_equals_a_list_of_episodes(ffm, capacity, lengths, seed):
    buffer, kept = fill(ffm, capacity, lengths)
    assert buffer.rows == sum(length + 1 for _, length in kept)
    rng = np.random.default_rng(seed)
    for batch_size in (1, 5, 100):
        tape = buffer.sample(batch_size, rng)
        found = read(tape)
        assert set(found) <= set(kept)
        transitions = sum(length for _, length in found)
        assert (~tape.final).sum() == transitions and transitions >= batch_size
        assert transitions - found[-1][1] < batch_size  # and not an episode more than needed
    everything = set(read(buffer.sample(25 * buffer.rows, rng)))  # 25 of each, so that none is missing
    assert everything == set(kept)  # every complete episode can be reached, the oldest and the newest too


def test_sampling_is_uniform_over_episodes(ffm):
    buffer, kept = fill(ffm, 64, [3] * 10)
    tape = buffer.sample(40_000, np.random.default_rng(0))
    counts = np.bincount([number for number, _ in read(tape)], minlength=10)
    assert abs(counts / counts.sum() - 0.1).max() < 0.01


def test_the_oldest_episodes_are_forgotten(ffm):
    buffer, kept = fill(ffm, 8, [3, 3])
    assert kept == [(0, 3), (1, 3)] and buffer.rows == 8  # full to the last row
    for number, length, left in ((2, 1, [1, 2]), (3, 2, [2, 3]), (4, 1, [2, 3, 4]), (5, 7, [5])):
        buffer.add(*episode(number, length))
        assert [int(episode.obs[0, 0]) for episode in buffer.episodes] == left
        assert buffer.rows == sum(len(episode.obs) for episode in buffer.episodes) <= buffer.buffer_size
    assert read(buffer.sample(1, np.random.default_rng(0))) == [(5, 7)]


def test_an_episode_as_large_as_the_buffer_fits_and_a_larger_one_is_an_error(ffm):
    buffer, _ = fill(ffm, 10, [2, 9])
    assert read(buffer.sample(1, np.random.default_rng(0))) == [(1, 9)]
    with pytest.raises(ValueError, match="--buffer-size 10: an episode of 10 steps takes 11 rows; raise it"):
        buffer.add(*episode(2, 10))
    assert read(buffer.sample(1, np.random.default_rng(0))) == [(1, 9)]  # nothing is lost by the attempt


@pytest.mark.parametrize("length", [3, 31], ids=["with padding", "without"])
def test_columns_have_their_dtypes_whatever_a_rollout_hands_over(ffm, length):
    """Lists of NumPy scalars in float64, as environments return them; targets in float64 would make the loss float64."""
    buffer = ffm.TapeBuffer(40)
    rewards = [np.float64(t) for t in range(length)]
    buffer.add([np.ones(2)] * (length + 1), [np.int64(1)] * length, rewards, np.bool_(True))
    tape = buffer.sample(1, np.random.default_rng(0))
    assert [column.dtype for column in tape] == DTYPES and [column.shape[1:] for column in tape] == [(2,)] + [()] * 5
    assert tape.rewards[:length].tolist() == rewards
    q = torch.zeros(len(tape.obs), 2)
    assert ffm.td_target(q, q, tape, 0.9).dtype == torch.float32


def test_a_buffer_from_a_checkpoint_goes_on_exactly(ffm, tmp_path):
    buffer, _ = fill(ffm, 20, [3] * 9)
    torch.save(buffer, tmp_path / "buffer.pt")
    other = torch.load(tmp_path / "buffer.pt", weights_only=False)
    for number in (20, 21):
        ours, theirs = (b.sample(30, np.random.default_rng(1)) for b in (buffer, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        for b in (buffer, other):
            b.add(*episode(number, 5))


# targets


def tape_of(ffm, *episodes):
    buffer = ffm.TapeBuffer(100)
    for rewards, terminated in episodes:
        buffer.add(np.zeros((len(rewards) + 1, 1)), np.zeros(len(rewards), int), rewards, terminated)
    order = iter(range(len(episodes)))

    class InOrder:
        def integers(self, high, size):
            return np.array([*order] + [0] * (size - len(episodes)))

    return buffer.sample(sum(len(rewards) for rewards, _ in episodes), InOrder())


def test_targets_of_episodes_computed_by_hand(ffm):
    """One terminated episode of two steps, one truncated of two, one terminated of one step; two actions, gamma 1/2."""
    tape = tape_of(ffm, ([1.0, 2.0], True), ([3.0, 4.0], False), ([5.0], True))
    #                      s0        s1        final     | s0'       s1'       final'    | s0''      final''
    lone = torch.full((32 - 8, 2), torch.nan)  # the rows that round the tape's length up
    q = torch.tensor([[9.0, 0], [0, 1], [1, 0], [9, 0], [1, 0], [0, 1], [9, 0], [0, 1]])
    next_q = torch.tensor([[90.0, 0], [10, 20], [30, 40], [90, 0], [50, 60], [70, 80], [90, 0], [11, 12]])
    q, next_q = torch.cat([q, lone]), torch.cat([next_q, lone])
    # online chooses action 1 in s1, action 0 in s1', action 1 in final'; the target network's numbers are taken
    expected = [1 + 20 / 2, 2.0, 3 + 50 / 2, 4 + 80 / 2, 5.0]
    torch.testing.assert_close(ffm.td_target(q, next_q, tape, 0.5), torch.tensor(expected))


def test_a_poisoned_bootstrap_behind_a_termination_is_not_seen(ffm):
    tape = tape_of(ffm, ([1.0], True))
    assert ffm.td_target(torch.zeros(32, 2), torch.full((32, 2), torch.nan), tape, 0.9).tolist() == [1.0]


def test_the_target_sees_the_first_observation(ffm):
    """Q(s[t+1]) in the target depends on o[0]: the memory of the target pass runs over the whole episode."""

    class Env:
        single_observation_space = ffm.gym.spaces.Box(-1, 1, (3,))
        single_action_space = ffm.gym.spaces.Discrete(2)

    network = ffm.QNetwork(Env, ffm.Args(hidden_size=16, trace_size=4))
    torch.nn.init.normal_(network.head.weight)
    buffer = ffm.TapeBuffer(20)
    buffer.add(torch.randn(3, 3).numpy(), [0, 0], [0.0, 0.0], False)
    tape = buffer.sample(2, np.random.default_rng(0))
    first = tape.obs.clone().requires_grad_()
    target = ffm.td_target(network(tape.obs, tape.begins), network(first, tape.begins), tape, 0.9)
    (grad,) = torch.autograd.grad(target[1], first)
    assert grad[0].abs().max() > 0
