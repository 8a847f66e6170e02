"""The tape of frames against a plain list of episodes, its memory, and the network that reads it in pieces."""

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


SHAPE = (1, 2, 2)


def frame(i, episode, t):
    return np.array([i, episode % 256, t % 256, t // 256], np.uint8).reshape(SHAPE)


class Played:
    """Random episodes of N environments side by side, in a tape of frames and in a plain list."""

    def __init__(self, atari, capacity, num_envs, seed, lengths=(1, 9)):
        self.tape, self.rng, self.lengths = atari.FrameTape(capacity, SHAPE, num_envs), np.random.default_rng(seed), lengths
        self.episode, self.t, self.first = np.zeros(num_envs, int), np.zeros(num_envs, int), [0] * num_envs
        self.length = self.rng.integers(*lengths, size=num_envs, endpoint=True)
        self.rows, self.ended = 0, []  # (first row, environment, episode, length)

    def step(self):
        n = len(self.t)
        obs = np.stack([frame(i, self.episode[i], self.t[i]) for i in range(n)])
        self.first = [self.rows + i if self.t[i] == 0 else self.first[i] for i in range(n)]
        self.tape.add(obs, (self.t + self.episode) % 7, self.t / 8 + self.episode)
        self.rows, self.t = self.rows + n, self.t + 1
        for i in np.flatnonzero(self.t == self.length):
            self.tape.finish(i, frame(i, self.episode[i], self.t[i]), bool(self.episode[i] % 2))
            self.ended.append((self.first[i], i, self.episode[i], self.t[i]))
            self.episode[i], self.t[i], self.rows = self.episode[i] + 1, 0, self.rows + 1
            self.length[i] = self.rng.integers(*self.lengths, endpoint=True)

    def kept(self):
        """Episodes of which no row is overwritten yet."""
        return [episode[1:] for episode in sorted(self.ended) if episode[0] >= self.rows - len(self.tape.obs)]


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
    assert tape.transitions.tolist() == [row for row in range(len(obs) - lone) if row not in finals]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 60), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_the_tape_equals_a_list_of_episodes(atari, num_envs, spare, steps, seed):
    played = Played(atari, num_envs * 20 + spare, num_envs, seed)
    for _ in range(steps):
        played.step()
    kept = played.kept()
    assert len(played.tape.complete()) == len(kept)
    if kept:
        tape = played.tape.sample(2_000, np.random.default_rng(seed))
        found = read(tape)
        assert set(found) == set(kept)  # all can be reached, the oldest and the newest too, and no other
        assert len(tape.transitions) >= 2_000 > len(tape.transitions) - found[-1][2]  # and not an episode more than needed


def test_sampling_is_uniform_over_episodes(atari):
    played = Played(atari, 200, 2, 0, lengths=(3, 3))
    for _ in range(15):
        played.step()
    counts = np.unique(
        [e[:2] for e in read(played.tape.sample(30_000, np.random.default_rng(0)))], axis=0, return_counts=True
    )[1]
    assert len(counts) == 10 and abs(counts / counts.sum() - 0.1).max() < 0.01


def test_an_episode_longer_than_the_tape_is_an_error(atari):
    played = Played(atari, 20, 2, 0, lengths=(30, 30))
    with pytest.raises(ValueError, match="--buffer-size 20: an episode still runs after 10 steps in each of 2 env.*; use"):
        for _ in range(30):
            played.step()


def test_other_errors(atari):
    tape = atari.FrameTape(20, SHAPE, 2)
    with pytest.raises(ValueError, match="expected an episode that has ended, got none; finish one first"):
        tape.sample(5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="expected a running episode in environment 1, got none; add a step first"):
        tape.finish(1, frame(1, 0, 0), True)


@pytest.mark.parametrize("steps", [6, 90])
def test_a_saved_tape_holds_the_episodes_that_have_ended(atari, tmp_path, steps):
    played = Played(atari, 100, 2, 1)
    for _ in range(steps):
        played.step()
    torch.save(played.tape.state_dict(), tmp_path / "tape.pt")
    other = atari.FrameTape(100, SHAPE, 2)
    other.load_state_dict(torch.load(tmp_path / "tape.pt", weights_only=True))
    ours, theirs = (tape.sample(300, np.random.default_rng(1)) for tape in (played.tape, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    played.tape, played.t[:], played.first = other, 0, None  # new games on the loaded tape, as after --resume
    played.episode += 1
    played.first, played.ended = [0, 0], [e for e in played.ended if e[1:] in played.kept()]
    for _ in range(40):
        played.step()
    assert {e[:2] for e in read(other.sample(2_000, np.random.default_rng(0)))} == {e[:2] for e in played.kept()}


def test_a_frame_is_stored_once(atari):
    """Bar: the tape is within 5% of its frames' bytes: what stands beside a frame is 21 bytes, whatever its size."""
    tape = atari.FrameTape(1_000, (1, 84, 84), 8)
    assert atari.memory_needs(atari.Args(buffer_size=1_000), network(atari))["tape"] == 1_000 * (7_056 + 21)
    for _ in range(300):  # 2,400 frames and more through 1,000 rows: nothing is kept aside
        tape.add(np.zeros((8, 1, 84, 84), np.uint8), np.zeros(8, int), np.zeros(8))
        if tape.next_row % 5 == 0:
            tape.finish(tape.next_row % 8, np.zeros((1, 84, 84), np.uint8), True)
    whole = sum(v.nbytes for v in vars(tape).values() if isinstance(v, np.ndarray))
    assert whole == 1_000 * (7_056 + 13) and all(v.base is None for v in vars(tape).values() if isinstance(v, np.ndarray))


class Game:
    single_observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    single_action_space = gym.spaces.Discrete(4)


def network(atari, **args):
    args = {"cnn_channels": 2, "hidden_size": 8, "state_size": 4, "num_layers": 2, **args}
    made = atari.QNetwork(Game, atari.Args(**args))
    torch.nn.init.normal_(made.head.weight)
    return made


def test_a_tape_in_pieces_computed_twice_is_the_tape_at_once(atari):
    """Values and gradients, where pieces are kept and where they are computed again; and each step as the policy takes it."""
    frames, begins = torch.randint(0, 256, (600, 1, 84, 84), dtype=torch.uint8), torch.rand(600) < 0.02
    kept = network(atari, kept_rows=10_000)
    again = network(atari, kept_rows=1)
    again.load_state_dict(kept.state_dict())
    whole = kept.q_values(kept.memory(kept.encoder(frames.float() / 255), begins))
    outcomes = []
    for q_values, made in ((kept(frames, begins), kept), (again(frames, begins), again), (whole, kept)):
        made.zero_grad()
        q_values.square().mean().backward()
        outcomes.append([q_values.detach(), *(p.grad.clone() for p in made.parameters() if p.requires_grad)])
    for ours in outcomes[:2]:
        torch.testing.assert_close(ours, outcomes[2], rtol=1e-4, atol=1e-4)
    state = kept.memory.initial_state(1)
    with torch.no_grad():
        for t in range(60):
            step, state = kept.step(frames[t : t + 1], begins[t : t + 1], state)
            torch.testing.assert_close(step[0], outcomes[0][0][t], rtol=1e-4, atol=1e-4)


def test_pieces_beyond_kept_rows_are_not_kept(atari):
    """What an update holds of a tape longer than --kept-rows: features, and no result within the convolution."""
    frames, begins = torch.zeros(600, 1, 84, 84, dtype=torch.uint8), torch.zeros(600, dtype=torch.bool)
    held = {}
    for kept_rows in (599, 600):
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(atari, kept_rows=kept_rows)(frames, begins)
        held[kept_rows] = sum(sizes.values())
    assert held[600] > 4 * 600 * 84 * 84 and held[599] < 600 * (84 * 84 + 1_000)  # floats; bytes, and the memory's results


def test_more_memory_than_there_is_is_refused(atari, capsys):
    args = atari.Args(cnn_channels=2, hidden_size=8, buffer_size=100_000)
    needs = atari.memory_needs(args, network(atari))
    assert needs["tape"] == pytest.approx(100_000 * 7_056, rel=0.05)
    atari.check_memory(needs, sum(needs.values()))
    assert "memory (GB): tape 0.71, an update" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"memory: expected at most the .* GB available, got tape 0.71, .*lower --buffer-size"
    ):
        atari.check_memory(needs, sum(needs.values()) - 1)
    atari.check_memory(needs, None)  # a system that does not say
    assert 1e8 < atari.available_memory() < 1e14
