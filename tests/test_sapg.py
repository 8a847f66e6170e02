"""SAPG: who borrows what, what a borrowed row is worth, whose memory reads it, and the hill car."""

import random
import sys
import textwrap

import cloudpickle
import numpy as np
import pytest
import torch
from scripts import ROOT, fails, kill_and_resume, load_script, model, run, run_folder, scalars

from cleanrl_memoroid import runs

SCRIPT, DISJOINT = "sapg_tbb_lru_continuous_action", "sapg_disjoint_tbb_lru_continuous_action"
sapg, disjoint = load_script(SCRIPT), load_script(DISJOINT)
SHORT = """--total-timesteps 384 --num-envs 16 --num-steps 8 --num-minibatches 2 --update-epochs 2 --hidden-size 8
    --state-size 4 --eval-episodes 0"""


def make_agent(script=sapg, **flags):
    torch.manual_seed(0)
    flags |= {"latent_size": 3} if script is sapg else {}
    agent = script.Agent(sapg.HillCar(4), script.Args(hidden_size=8, state_size=4, **flags))
    for network in getattr(agent, "networks", [agent]):  # else mean actions are almost equal
        torch.nn.init.normal_(network.actor.weight, 0, 0.3)
    return agent


def make_rows(steps, columns, seed=0, share=0.2):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(steps, columns, 1, generator=rng), torch.rand(steps, columns, generator=rng) < share


def zeros(columns):
    return torch.zeros(columns, 4, dtype=torch.complex64)


@torch.no_grad()
def act(agent, obs, begins, state, ids):
    """Policies, values and memory after each row, acting step by step."""
    found = []
    for step in range(len(obs)):
        policy, value, states = agent(obs[step, None], begins[step, None], state, ids)
        state = states[-1]
        found.append((policy[0], value, states))
    return [torch.cat(v) for v in zip(*found)]


# ---- who borrows what


@pytest.mark.parametrize("ratio, borrow", [(1, "union"), (3, "union"), (1, "block"), (2, "block")])
def test_the_leader_borrows_whole_environments_of_its_followers(ratio, borrow):
    args, rng = sapg.Args(num_policies=4, off_policy_ratio=ratio, borrow=borrow), np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        columns, ids = sapg.borrowed_columns(rng, 32, args)
        assert len(columns) == len(set(columns)) == 8 * ratio and not ids.any() and columns.min() >= 8
        assert borrow == "union" or len(set(columns // 8)) == ratio
        seen |= set(columns)
    assert seen == set(range(8, 32))


def test_symmetric_each_policy_borrows_one_other_block():
    args, rng, shifts = sapg.Args(num_policies=4, aggregation="symmetric"), np.random.default_rng(0), set()
    for _ in range(30):
        columns, ids = sapg.borrowed_columns(rng, 32, args)
        assert sorted(columns) == list(range(32)) and (np.bincount(ids) == 8).all()
        (shift,) = set((columns // 8 - ids) % 4)
        shifts.add(shift)
    assert shifts == {1, 2, 3}


@pytest.mark.parametrize(
    "flags", [{"aggregation": "none"}, {"num_policies": 1}, {"num_policies": 1, "aggregation": "symmetric"}]
)
def test_nobody_borrows_without_aggregation_or_followers(flags):
    rng = np.random.default_rng(0)
    assert sapg.borrowed_columns(rng, 32, sapg.Args(**flags)).shape == (2, 0)
    assert rng.random() == np.random.default_rng(0).random()  # and no random number is drawn


def test_with_one_policy_every_arm_is_ppo_to_the_last_bit(tmp_path):
    found = []
    arms = ["", "--aggregation none", "--aggregation symmetric", "--importance one", "--importance naive", "--entropy-scale 0"]
    for number, arm in enumerate([*arms, "--borrowed-state stored", "--follower-kl 1", "--borrow block"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(folder, *SHORT.split(), "--num-policies", 1, *arm.split(), script=SCRIPT)
        found.append(model(folder))
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in other)


# ---- what a borrowed row is worth


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_loss_is_that_of_the_paper_in_values_and_gradients(sign):
    rng = torch.Generator().manual_seed(0)
    old, acted, new = torch.randn(3, 200, dtype=torch.float64, generator=rng)
    advantages = sign * torch.rand(200, dtype=torch.float64, generator=rng)
    one, other = (new.clone().requires_grad_() for _ in range(2))
    ours = sapg.policy_loss(one, old, acted, advantages, 0.2, "mu")
    mu, r = (old - acted).exp(), (other - acted).exp()
    theirs = -torch.min(r * advantages, torch.clamp(r, mu * 0.8, mu * 1.2) * advantages)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for loss in (ours, theirs):
        loss.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0)
    assert 0 < (one.grad == 0).sum() < 200  # some rows are clipped


def test_the_other_two_ways_to_weigh_a_borrowed_row():
    old, acted, new, advantage = torch.tensor([0.3]), torch.tensor([-0.4]), torch.tensor([0.35]), torch.tensor([2.0])
    assert sapg.policy_loss(new, old, acted, advantage, 0.2, "one").item() == pytest.approx(-1.2 * 2)  # exp(0.75) is clipped
    assert sapg.policy_loss(new, old, acted, advantage, 0.2, "naive").item() == pytest.approx(-2 * np.exp(0.05))
    for importance in ("mu", "one", "naive"):  # on an own row they are one
        assert sapg.policy_loss(new, old, old, advantage, 0.2, importance).item() == pytest.approx(-2 * np.exp(0.05))


@pytest.mark.parametrize("latent_at", ["input", "head"])
def test_equal_latents_give_a_borrowed_row_the_weight_one_and_others_do_not(latent_at):
    agent = make_agent(latent_at=latent_at)
    obs, begins = make_rows(30, 8)
    ids, leader = torch.arange(8) // 2, torch.zeros(8, dtype=torch.long)
    for equal in (False, True):
        if equal:
            agent.latents.data[:] = agent.latents.data[0]
        tape = sapg.CarriedColumns(obs, begins, zeros(8))
        tape.add(obs[:14], begins[:14], begins[14], 100, agent, ids)
        front = tape.read(agent, torch.arange(8), ids)
        mean, _, _ = act(agent, obs[14:], begins[14:], front, ids)
        actions = mean + 0.5 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        acted = sapg.log_prob((mean, agent.log_std[ids]), actions)
        policy, _, _ = agent(obs[14:], begins[14:], tape.read(agent, torch.arange(8), leader), leader)
        log_mu = (sapg.log_prob(policy, actions) - acted).abs()
        assert log_mu.max() < 2e-6 if equal else log_mu[:, 2:].min(0).values.max() > 1e-3


def test_a_loss_on_borrowed_rows_teaches_the_leader_alone():
    agent = make_agent()
    obs, begins = make_rows(6, 5)
    leader = torch.zeros(5, dtype=torch.long)
    policy, values, _ = agent(obs, begins, zeros(5), leader)
    loss = sapg.policy_loss(sapg.log_prob(policy, obs), *torch.randn(3, 6, 5), 0.2, "mu").mean() + (values**2).mean()
    loss.backward()
    for grad in (agent.latents.grad, agent.log_std.grad):
        assert grad[0].abs().max() > 0 and not grad[1:].any()


# ---- targets


def test_the_value_of_what_follows_a_row():
    """Column 0 terminates in its second row, column 1 is cut off there, column 2 goes on."""
    agent, ids = make_agent(), torch.tensor([1, 2, 0])
    obs, begins = make_rows(3, 3, share=0)
    begins[2, :2] = True
    ended, cut_off, final_obs = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, 1)
    ended[1, :2], cut_off[1, 1], final_obs[1, 1] = True, True, 0.7
    _, values, states = act(agent, obs, begins, zeros(3), ids)
    next_obs, next_begins = torch.full((3, 1), 0.2), torch.zeros(3, dtype=torch.bool)
    rollout = next_obs, next_begins, ended, cut_off, final_obs
    found = sapg.values_of_next(agent, rollout, values, states, torch.arange(3), ids)
    assert found[1, 0] == 0
    shown = torch.cat([obs[:2, 1:2], torch.full((1, 1, 1), 0.7)])  # what the memory has seen when the episode is cut off
    (_, seen, _) = act(agent, shown, torch.zeros(3, 1, dtype=torch.bool), zeros(1), ids[1:2])
    torch.testing.assert_close(found[1, 1], seen[2, 0])
    torch.testing.assert_close(found[0], values[1])
    after = agent(next_obs[None], next_begins[None], states[-1], ids)[1][0]
    torch.testing.assert_close(found[2], after)
    some = torch.tensor([2, 1])  # of some columns, in another order
    again = sapg.values_of_next(agent, rollout, values[:, some], states[:, some], some, ids[some])
    torch.testing.assert_close(again, found[:, some])


def test_n_step_advantages_by_hand():
    """Those that benchmark/probes/ablate.py n_step=3 computes in the script."""
    rewards, values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]])
    ended = torch.tensor([[False], [False], [True], [False], [False]])
    next_values = torch.tensor([[0.2], [0.3], [0.0], [0.5], [0.6]])
    sys.path.append(str(ROOT / "benchmark" / "probes"))
    from ablate import ablated

    lines = ablated((ROOT / "single_files" / f"{SCRIPT}.py").read_text(), "n_step=3").splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.strip().startswith("delta = advantages ="))
    (last,) = (i for i, line in enumerate(lines) if line.strip().startswith("explained_var ="))
    names = {"args": sapg.Args(gamma=0.5), "F": torch.nn.functional, "rewards": rewards, "values": values}
    names |= {"next_values": next_values, "ended": ended}
    exec(textwrap.dedent("\n".join(lines[first:last])), names)
    found = names["advantages"][:, 0].tolist()
    returns = [1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3, 4 + 0.5 * 5 + 0.25 * 0.6, 5 + 0.5 * 0.6]
    assert found == pytest.approx([r - v for r, v in zip(returns, values[:, 0].tolist())])


@pytest.mark.parametrize("alone", [False, True])
def test_advantages_with_a_trace_for_each_row(alone, monkeypatch):
    """A[t] = delta[t] + gamma trace[t] A[t+1], and nothing behind an end."""
    monkeypatch.setattr(sapg, "linear_scan", None if alone else sapg.linear_scan)
    rewards, values, next_values, traces = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ended = torch.tensor([[False, False], [True, False], [False, False], [False, True], [False, False]])
    found = sapg.traced_gae(rewards, values, next_values, ended, 0.9, traces)
    wanted, behind = rewards + 0.9 * next_values - values, torch.zeros(2)
    for t in range(4, -1, -1):
        wanted[t] += 0.9 * traces[t] * torch.where(ended[t], 0, behind)
        behind = wanted[t]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        sapg.traced_gae(rewards, values, next_values, ended, 0.9, 0 * traces), rewards + 0.9 * next_values - values
    )


def test_what_follows_a_borrowed_row_counts_as_much_as_the_leader_would_do_it():
    mu = torch.tensor([[0.5, 3.0], [0.2, 1.5], [9.0, 0.7]])
    torch.testing.assert_close(sapg.retrace(mu, 0.9), torch.tensor([[0.18, 0.9], [0.9, 0.63], [0, 0]]))


# ---- whose memory


@pytest.mark.parametrize("max_prefix", [0, 3, 100])
@pytest.mark.parametrize("script", [sapg, disjoint])
def test_the_carried_tape_knows_what_acting_step_by_step_knows(max_prefix, script):
    """At every rollout, for columns whose episodes began in any earlier one, or have just begun."""
    agent, ids = make_agent(script), torch.arange(8) // 2
    obs, begins = make_rows(40, 8, share=0.08)
    begins[0], begins[10, 1:], begins[:21, 0] = True, True, False  # column 0: the longest episode, which ends before row 20
    begins[[0, 20], 0] = True
    tape, everything = sapg.CarriedColumns(obs, begins, zeros(8)), torch.arange(8)
    for end in range(4, 40, 4):
        tape.add(obs[end - 4 : end], begins[end - 4 : end], begins[end], max_prefix, agent, ids)
        states = act(agent, obs[:end], begins[:end], zeros(8), ids)[2]
        running = ~begins[end]
        torch.testing.assert_close(tape.read(agent, everything, ids)[running], states[-1][running])
        ages = [min(end - int(begins[:end, i].nonzero().max()), max_prefix) * bool(running[i]) for i in range(8)]
        assert len(tape.begins) == max(ages)


@pytest.mark.parametrize("latent_at", ["input", "head"])
def test_rescan_is_the_leader_stepping_through_the_same_rows_and_stored_is_not(latent_at):
    agent, ids, leader = make_agent(latent_at=latent_at), torch.arange(1, 4), torch.zeros(3, dtype=torch.long)
    obs, begins = make_rows(20, 3, share=0)
    begins[0], begins[12, 0] = True, True  # the first column's rollout begins an episode
    tape = sapg.CarriedColumns(obs, begins, zeros(3))
    tape.add(obs[:12], begins[:12], begins[12], 100, agent, ids)
    stored, rescan = tape.read(agent, torch.arange(3), ids), tape.read(agent, torch.arange(3), leader)
    stepped = act(agent, obs, begins, zeros(3), leader)[0][12:]
    read = {name: agent(obs[12:], begins[12:], front, leader)[0][0] for name, front in {"r": rescan, "s": stored}.items()}
    torch.testing.assert_close(read["r"], stepped)
    torch.testing.assert_close(read["s"][:, 0], stepped[:, 0])
    if latent_at == "head":
        torch.testing.assert_close(read["s"], stepped)  # all policies share one memory
    else:
        assert (read["s"][0, 1:] - stepped[0, 1:]).abs().min() > 1e-3


def test_the_scan_of_the_package_is_that_of_the_file_alone(monkeypatch):
    agent, ids = make_agent(), torch.arange(4)
    obs, begins = make_rows(9, 4)
    begins[0] = torch.tensor([1, 0, 1, 0])
    state = torch.randn(4, 4, dtype=torch.complex64)
    found = []
    for scan in (sapg.linear_scan, None):
        monkeypatch.setattr(sapg, "linear_scan", scan)
        agent.zero_grad()
        policy, values, states = agent(obs, begins, state, ids)
        (policy[0].sum() + values.sum()).backward()
        found.append([policy[0], values, states, *(p.grad for p in agent.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_disjoint_networks_read_their_own_columns_in_any_order():
    agent = make_agent(disjoint)
    obs, begins = make_rows(7, 6)
    ids, order = torch.tensor([3, 0, 0, 2, 3, 0]), torch.tensor([5, 2, 0, 4, 1, 3])
    (mean, log_std), values, states = agent(obs, begins, zeros(6), ids)
    (mean2, log_std2), values2, states2 = agent(obs[:, order], begins[:, order], zeros(6), ids[order])
    for one, other in ((mean, mean2), (values, values2), (states, states2)):
        torch.testing.assert_close(one[:, order], other)
    torch.testing.assert_close(agent.networks[3](obs[:, [0, 4]], begins[:, [0, 4]], zeros(2))[0], mean[:, [0, 4]])
    (mean.sum() + values.sum()).backward()
    assert [p.grad is not None for p in (net.critic.bias for net in agent.networks)] == [True, False, True, True]


def test_shared_and_disjoint_networks_have_as_many_weights_as_the_page_says():
    agents = [script.Agent(sapg.HillCar(4), script.Args()) for script in (sapg, disjoint)]
    assert [sum(p.numel() for p in agent.parameters()) for agent in agents] == [5142, 18252]


@pytest.mark.parametrize("arm", ["", "disjoint", "--aggregation symmetric", "--borrowed-state stored", "--max-prefix 3"])
def test_before_the_first_update_every_row_is_read_as_it_was(tmp_path, arm):
    """Borrowed ones, too: of all rows, those of the first minibatch. Standard deviations stay in their bounds."""
    flags = [*SHORT.split(), "--total-timesteps", "1280", "--learning-rate", "0.05", "--std-min", "0.45", "--std-max", "0.55"]
    script, arm = (DISJOINT, "") if arm == "disjoint" else (SCRIPT, arm)
    run(tmp_path, *flags, *arm.split(), script=script)
    logged = scalars(run_folder(tmp_path))
    assert len(logged["losses/logprob_error"]) == 10 and max(v for _, v in logged["losses/logprob_error"]) < 1e-4
    weights = [v for _, v in logged["sapg/effective_sample_size"]]
    assert weights[0] > 0.9 and min(weights) < 0.99 and max(v for _, v in logged["sapg/largest_weight"]) > 1
    stds = [v for i in range(4) for _, v in logged[f"sapg/std_{i}"]]
    assert 0.4499 < min(stds) < max(stds) < 0.5501


# ---- the hill car


def test_the_hill_car_is_what_its_equations_say():
    """Against a loop in plain Python over one car at a time, through several episodes."""
    envs, rng = sapg.HillCar(5), np.random.default_rng(1)
    obs, _ = envs.reset(seed=0)
    cars = [[float(x), 0.0, 0] for x in envs.x]
    assert obs.shape == (5, 1) and (np.abs(obs) <= 0.1).all()
    crossed = 0
    for _ in range(300):
        action = rng.normal(0, 1.5, (5, 1)).astype(np.float32)
        obs, rewards, terminations, truncations, infos = envs.step(action)
        for i, (x, v, t) in enumerate(cars):
            a = float(action[i, 0])
            v += 0.25 * (0.5 * min(max(a, -1), 1) - np.pi / 2 * (2 if x < 0 else 1) * np.sin(np.pi * x))
            x, t = x + 0.25 * v, t + 1
            assert rewards[i] == pytest.approx((2 if x > 1 else 0) - 0.01 * a * a)
            assert terminations[i] == (abs(x) > 1) and truncations[i] == (t >= 64 and abs(x) <= 1)
            assert infos["final_obs"][i, 0] == pytest.approx(x, abs=1e-5)
            crossed += x > 1
            cars[i] = [float(envs.x[i]), 0.0, 0] if terminations[i] or truncations[i] else [x, v, t]
            assert obs[i, 0] == pytest.approx(cars[i][0], abs=1e-5) and envs.t[i] == cars[i][2]
    assert crossed


@pytest.mark.parametrize(
    "policy, low, high", [("half", 1.88, 1.92), ("full", 1.74, 1.78), ("nothing", 0, 0), ("position", -1, 0)]
)
def test_what_scripted_drivers_earn(policy, low, high):
    envs = sapg.HillCar(256)
    envs.reset(seed=0)
    running, total = np.ones(256, bool), np.zeros(256)
    while running.any():
        way = np.where(envs.v >= 0, 1.0, -1.0)
        push = {"half": 0.5 * way, "full": way, "nothing": 0 * way, "position": 0.3 * np.sign(envs.x)}[policy]
        _, rewards, terminations, truncations, _ = envs.step(push[:, None])
        total += rewards * running
        running &= ~(terminations | truncations)
    assert low <= total.mean() <= high


@pytest.mark.parametrize("knows", [True, False])
def test_the_cue_is_shown_once_and_decides_which_top_pays(knows):
    envs = sapg.HillCar(64, cue=True)
    obs, _ = envs.reset(seed=0)
    side, x = obs[:, 1].copy(), envs.x.copy()
    assert set(side) == {-1, 1}
    total, running = np.zeros(64), np.ones(64, bool)
    for step in range(32):
        obs, rewards, terminations, truncations, infos = envs.step((side if knows else -side)[:, None])
        assert (np.array_equal(envs.x, x)) == (step < 16)  # the brake
        ended = terminations | truncations
        assert not infos["final_obs"][:, 1].any() and not obs[~ended, 1].any() and (obs[ended, 1] != 0).all()
        total, running = total + rewards * running, running & ~ended
    assert not running.any() and total == pytest.approx([2 if knows else -1] * 64, abs=0.3)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_copy_of_the_cars_that_goes_on_otherwise_is_noticed(wrong):
    class Twin(sapg.HillCar):
        def __setstate__(self, state):
            vars(self).update(state, wrong=wrong)

        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            return obs, rewards + vars(self).get("wrong", 0), *rest

    envs = Twin(3)
    envs.reset(seed=0)
    pickled = cloudpickle.dumps((envs.envs, random.getstate(), np.random.get_state(), torch.get_rng_state()))
    actions = np.ones((3, 1))
    assert bool(runs.unlike(envs, pickled, actions, envs.step(actions))) == bool(wrong)


def test_a_killed_run_of_hill_cars_resumes_exactly(tmp_path):
    flags = [*SHORT.split(), "--total-timesteps", "3072", "--checkpoint-interval", "128", "--eval-episodes", "4"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", *flags, script=SCRIPT)
    kill_and_resume(tmp_path / "whole", tmp_path / "killed", flags, [(2, 4)], SCRIPT)


def test_flags_that_do_not_fit_together_are_refused(tmp_path):
    for flags, message in [
        ("--num-envs 30", "--num-envs 30: expected a multiple of --num-policies 4"),
        ("--off-policy-ratio 4", "--off-policy-ratio: expected at most 3 (--num-policies less the leader), got 4; lower it"),
        ("--std-min 0", "--std-min, --std-init, --std-max: expected 0 < min <= init <= max, got 0.0, 0.5 and 1.0"),
        ("--num-envs 4 --num-minibatches 5", "--num-minibatches: expected at most --num-envs 4, got 5; lower it"),
        ("--env-id CartPole-v1", "--env-id: expected Box actions of floats, got Discrete(2)"),
    ]:
        assert message in fails(tmp_path, *flags.split(), script=SCRIPT)
    assert not list(tmp_path.iterdir())
