"""The tape buffer against a plain list of episodes, and the targets against episodes computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def episode(number, length):
    """Observations that name their episode and their step, so that a row out of place is seen."""
    obs = np.stack([np.full(length + 1, number), np.arange(length + 1)], axis=1).astype(np.float32)
    actions = np.arange(length) % 5 + 7 * number
    return obs, actions, np.arange(length) / 8 + number, bool(number % 2)


def fill(ffm, capacity, lengths):
    """The buffer after these inserts, and the episodes that a plain list would still hold."""
    buffer, kept = ffm.TapeBuffer(capacity, 2), []
    for number, length in enumerate(lengths):
        buffer.add(*episode(number, length))
        kept.append((number, length))
        while sum(n + 1 for _, n in kept) > capacity:
            kept.pop(0)
    return buffer, kept


def read(tape):
    """The tape cut at its begins, every row checked: (number, length) of each episode."""
    tape, found = type(tape)(*(v.numpy() for v in tape)), []
    bounds = [*np.flatnonzero(tape.begins), len(tape.obs)]
    lone = 0
    while bounds[-1] - bounds[-2] == 1:  # rows that round the length up: episodes without a step
        bounds.pop()
        lone += 1
    assert len(tape.obs) % 32 == 0 and lone < 32
    for begin, end in zip(bounds[:-1], bounds[1:]):
        number, length = int(tape.obs[begin, 0]), end - begin - 1
        obs, actions, rewards, terminated = episode(number, length)
        rows = slice(begin, end - 1)
        assert np.array_equal(tape.obs[begin:end], obs)
        assert np.array_equal(tape.actions[rows], actions)
        assert np.array_equal(tape.rewards[rows], rewards.astype(np.float32))
        assert tape.terminations[rows].tolist() == [False] * (length - 1) + [terminated]
        found.append((number, length))
    finals = set(bounds[1:])
    expected = [t for t in range(len(tape.obs) - lone) if t + 1 not in finals]
    assert tape.transitions.tolist() == expected  # every row but the final ones
    assert tape.begins[0]
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 40), st.lists(st.integers(1, 7), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_buffer_equals_a_list_of_episodes(ffm, capacity, lengths, seed):
    buffer, kept = fill(ffm, capacity, lengths)
    assert buffer.rows == sum(length + 1 for _, length in kept)
    rng = np.random.default_rng(seed)
    for batch_size in (1, 5, 300):
        tape = buffer.sample(batch_size, rng)
        found = read(tape)
        assert set(found) <= set(kept)
        transitions = sum(length for _, length in found)
        assert len(tape.transitions) == transitions and transitions >= batch_size
        assert transitions - found[-1][1] < batch_size  # and not an episode more than needed
    assert set(read(buffer.sample(2000, rng))) == set(
        kept
    )  # every complete episode can be reached, the oldest and the newest too


def test_sampling_is_uniform_over_episodes(ffm):
    buffer, kept = fill(ffm, 64, [3] * 10)
    tape = buffer.sample(60_000, np.random.default_rng(0))
    counts = np.bincount([number for number, _ in read(tape)], minlength=10)
    assert abs(counts / counts.sum() - 0.1).max() < 0.01


def test_begins_on_both_sides_of_the_wrap(ffm):
    buffer, kept = fill(ffm, 10, [3, 3, 3])  # the third episode takes rows 8, 9, 0, 1
    assert kept == [(1, 3), (2, 3)] and buffer.episode_begins[2] == 8 and buffer.end == 2
    assert {e for e in read(buffer.sample(100, np.random.default_rng(0)))} == set(kept)
    buffer.add(*episode(3, 7))  # from row 2 to row 9, in place of both
    assert read(buffer.sample(1, np.random.default_rng(0))) == [(3, 7)]


def test_an_episode_as_large_as_the_buffer_fits_and_a_larger_one_is_an_error(ffm):
    buffer, _ = fill(ffm, 10, [2, 9])
    assert read(buffer.sample(1, np.random.default_rng(0))) == [(1, 9)]
    with pytest.raises(ValueError, match="--buffer-size 10: an episode of 10 steps takes 11 rows; use a larger one"):
        buffer.add(*episode(2, 10))
    assert read(buffer.sample(1, np.random.default_rng(0))) == [(1, 9)]  # nothing is lost by the attempt


def test_other_errors(ffm):
    buffer = ffm.TapeBuffer(10, 2)
    with pytest.raises(ValueError, match="add one first"):
        buffer.sample(5, np.random.default_rng(0))
    obs, *rest = episode(0, 3)
    with pytest.raises(ValueError, match="expected the 3 observations of the actions and the final one, got 3"):
        buffer.add(obs[:-1], *rest)


def test_state_dict_is_exact_and_holds_touched_rows_only(ffm):
    for lengths in ([3, 3], [3] * 9):
        buffer, kept = fill(ffm, 20, lengths)
        state = buffer.state_dict()
        assert len(state["obs"]) == min(20, 4 * len(lengths))
        other = ffm.TapeBuffer(20, 2)
        other.load_state_dict(state)
        for b in (buffer, other):
            b.add(*episode(20, 5))
        ours, theirs = (b.sample(30, np.random.default_rng(1)) for b in (buffer, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# targets


def tape_of(ffm, *episodes):
    buffer = ffm.TapeBuffer(100, 1)
    for rewards, terminated in episodes:
        buffer.add(np.zeros((len(rewards) + 1, 1)), np.zeros(len(rewards)), rewards, terminated)
    order = iter(range(len(episodes)))

    class InOrder:
        def integers(self, low, high, size):
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
    buffer = ffm.TapeBuffer(20, 3)
    buffer.add(torch.randn(3, 3).numpy(), [0, 0], [0.0, 0.0], False)
    tape = buffer.sample(2, np.random.default_rng(0))
    first = tape.obs.clone().requires_grad_()
    target = ffm.td_target(network(tape.obs, tape.begins), network(first, tape.begins), tape, 0.9)
    (grad,) = torch.autograd.grad(target[1], first)
    assert grad[0].abs().max() > 0
