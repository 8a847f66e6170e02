"""The tape that PPO carries from rollout to rollout: the policy that acted, under any weights, with an unbroken gradient."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script

SIZES = {
    "ppo_tbb_ffm": {"trace_size": 3},
    "ppo_tbb_lru": {"state_size": 4, "r_min": 0.5},
    "ppo_tbb_s5": {"state_size": 4, "dt_min": 0.05},
    "ppo_tbb_linattn": {"key_size": 4, "value_size": 3},
    "ppo_sbb_lstm": {},
    "ppo_tbb_lru_continuous_action": {"state_size": 4, "r_min": 0.5},
}
CARRYING = [name for name in SIZES if name != "ppo_sbb_lstm"]
OBS, STEPS, ENVS = 5, 9, 4


class Spaces:
    single_observation_space = gym.spaces.Box(-1, 1, (OBS,))
    single_action_space = gym.spaces.MultiDiscrete([3, 2])


class BoxSpaces(Spaces):
    single_action_space = gym.spaces.Box(-1, 1, (2,))


def make(name, sizes=None):
    script = load_script(name)
    agent = script.Agent(BoxSpaces if "continuous" in name else Spaces, script.Args(hidden_size=8, **(sizes or SIZES[name])))
    with torch.no_grad():
        for parameter in agent.parameters():  # heads this small would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return agent


@pytest.fixture(params=["linear_scan", "blelloch_scan"])
def backend(request):
    return request.param


@pytest.fixture(params=SIZES)
def agent(request, backend, monkeypatch):
    if backend == "blelloch_scan":
        monkeypatch.setattr(load_script(request.param), "linear_scan", None)
    return make(request.param)


def only(names):
    return pytest.mark.parametrize("agent", names, indirect=True)


def script_of(agent):
    return load_script(type(agent).__module__)


def random_rollouts(number, seed=0):
    """[(obs [S, N, O], begins [S, N])], and whether each environment's next observation begins an episode, after each."""
    rng = np.random.default_rng(seed)
    begins = rng.random((number * STEPS + 1, ENVS)) < 0.12
    begins[0] = True
    begins[1:, 0] = False  # one episode that does not end
    begins[STEPS, 1] = True  # one that ends with the first rollout
    begins[2 * STEPS - 1, 2] = True  # one that begins in the last row of the second
    obs = rng.normal(size=(number * STEPS, ENVS, OBS)).astype(np.float32)
    rows = [slice(i * STEPS, (i + 1) * STEPS) for i in range(number)]
    return [(obs[r], begins[r], begins[r.stop]) for r in rows]


def outputs(policy, value):
    """What tells one policy from another, and the value: [B, ...]"""
    told = policy.mean if isinstance(policy, torch.distributions.Independent) else policy.logits.exp()
    return torch.cat([told.flatten(1), value[:, None]], 1)


@torch.no_grad()
def act(agent, obs, begins, state):
    """A rollout step by step: outputs [N * S, ...], environment by environment, and the state after it."""
    found = []
    for row, begin in zip(torch.from_numpy(obs), torch.from_numpy(begins)):
        policy, value, state = agent.step(row, begin, state)
        found.append(outputs(policy, value))
    return torch.stack(found, 1).flatten(0, 1), state


@pytest.mark.parametrize("max_prefix", [0, 1, 5, STEPS, 1000])
def test_the_tape_is_the_policy_that_acted(agent, max_prefix):
    """Rollout after rollout, wherever the prefix is cut, and for every choice and order of environments."""
    if max_prefix and "lstm" in type(agent).__module__:
        pytest.skip("the baseline carries no rows")
    state = agent.memory.initial_state(ENVS)
    tape = script_of(agent).CarriedTape(np.zeros((STEPS, ENVS, OBS), np.float32), state)
    lengths = [0] * ENVS
    for obs, begins, next_begins in random_rollouts(5):
        acted, state = act(agent, obs, begins, state)
        tape.add(obs, begins)
        for envs in ([0, 1, 2, 3], [2, 0], [3]):
            sections = tape.sections(envs, STEPS)
            assert len(sections.obs) % 32 == 0 and len(sections.transitions) == STEPS * len(envs)
            with torch.no_grad():
                policy, value, _ = agent(sections)
            rows = np.concatenate([np.arange(i * STEPS, (i + 1) * STEPS) for i in envs])
            torch.testing.assert_close(outputs(policy, value), acted[rows], rtol=1e-5, atol=1e-5)
        carried = tape.carry(next_begins, state, max_prefix, agent)
        going_on = ~torch.from_numpy(next_begins)
        torch.testing.assert_close(carried[going_on], state[going_on], rtol=1e-5, atol=1e-5)
        state = carried
        lengths = [0 if new else age + STEPS for age, new in zip(lengths, next_begins)]
        for i, rows in enumerate(begins.T):  # a begin within the rollout: the running episode is as old as it is
            if rows.any() and not next_begins[i]:
                lengths[i] = STEPS - np.flatnonzero(rows)[-1]
        assert [len(rows) for rows in tape.begins] == [min(length, max_prefix) for length in lengths]


@only(CARRYING)
def test_states_are_those_of_the_weights_of_now(agent):
    """After an update the running episodes are remembered as the new network would have, from their first rows on."""
    rollouts = random_rollouts(3)
    state = agent.memory.initial_state(ENVS)
    tape = script_of(agent).CarriedTape(np.zeros((STEPS, ENVS, OBS), np.float32), state)
    for number, (obs, begins, next_begins) in enumerate(rollouts):
        stale = act(agent, obs, begins, state)[1]
        tape.add(obs, begins)
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
        state = tape.carry(next_begins, stale, 1000, agent)
        fresh = agent.memory.initial_state(ENVS)
        for obs, begins, _ in rollouts[: number + 1]:
            fresh = act(agent, obs, begins, fresh)[1]
        going_on = ~torch.from_numpy(next_begins)
        torch.testing.assert_close(state[going_on], fresh[going_on], rtol=1e-5, atol=1e-5)
        assert (stale - state)[going_on].abs().max() > 0.01


def cue_and_reward(agent, max_prefix, edges):
    """The gradient of the policy at an episode's last row by the weights that see its first; rollouts end at `edges`."""
    obs = torch.randn(3 * STEPS, 1, OBS, generator=torch.Generator().manual_seed(1)).numpy()
    obs[:, :, 0] = 0
    obs[0, :, 0] = 1  # the cue
    begins = np.zeros((len(obs), 1), bool)
    begins[0] = True
    state = agent.memory.initial_state(1)
    tape = script_of(agent).CarriedTape(obs, state)
    for start, end in zip([0, *edges], [*edges, len(obs)]):
        tape.add(obs[start:end], begins[start:end])
        if end < len(obs):
            state = act(agent, obs[start:end], begins[start:end], state)[1]
            state = tape.carry(np.zeros(1, bool), state, max_prefix, agent)
    policy, _, _ = agent(tape.sections([0], 1))
    actions = torch.ones(1, 2, dtype=agent.action_dtype)
    agent.zero_grad()
    policy.log_prob(actions).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in agent.named_parameters() if parameter.grad is not None}


@only(CARRYING)
def test_the_gradient_crosses_the_edge_of_a_rollout(agent):
    """Cue in the first rollout, choice in the third: the gradient is that of the unbroken episode, in every weight."""
    unbroken = cue_and_reward(agent, 1000, [])
    carried = cue_and_reward(agent, 1000, [STEPS, 2 * STEPS])
    cut = cue_and_reward(agent, 0, [STEPS, 2 * STEPS])
    half = cue_and_reward(agent, STEPS, [STEPS, 2 * STEPS])
    assert unbroken["encoder.0.weight"][:, 0].abs().max() > 1e-4
    assert unbroken.keys() == carried.keys()
    for name, grad in unbroken.items():
        torch.testing.assert_close(carried[name], grad, rtol=1e-4, atol=1e-6)
    assert (cut["encoder.0.weight"][:, 0] == 0).all() and (half["encoder.0.weight"][:, 0] == 0).all()
    assert (cut["encoder.0.weight"][:, 1] != half["encoder.0.weight"][:, 1]).any()


def test_the_baseline_has_no_gradient_at_the_cue():
    agent = make("ppo_sbb_lstm")
    assert (cue_and_reward(agent, 0, [])["encoder.0.weight"][:, 0] != 0).all()  # within a rollout it has
    assert (cue_and_reward(agent, 0, [2 * STEPS])["encoder.0.weight"][:, 0] == 0).all()


@pytest.mark.parametrize("max_prefix", [0, 4, 1000])
def test_nothing_leaks_between_environments_or_episodes(agent, max_prefix):
    """Poison in one environment, and in an earlier episode of another: what follows is as without, in value and gradient."""
    if max_prefix and "lstm" in type(agent).__module__:
        pytest.skip("the baseline carries no rows")
    found = []
    for poison in (0.0, torch.nan):
        state = agent.memory.initial_state(ENVS)
        tape = script_of(agent).CarriedTape(np.zeros((STEPS, ENVS, OBS), np.float32), state)
        for number, (obs, begins, next_begins) in enumerate(random_rollouts(2)):
            obs, begins, next_begins = obs.copy(), begins.copy(), next_begins.copy()
            begins[:, 1:], next_begins[1:] = False, False
            begins[0, 1:] |= number == 0
            if number == 0:
                obs[:, 3] += poison  # all that environment 3 has seen before the episode in the second rollout
                obs[2, 2] += poison
            else:
                begins[[0, 4], [3, 2]] = True
            tape.add(obs, begins)
            if number == 0:
                next_begins[3] = True
                state = act(agent, obs, begins, state)[1]
                state = tape.carry(next_begins, state, max_prefix, agent)
        sections = tape.sections([2, 3, 1, 0], STEPS)
        sections = sections._replace(obs=sections.obs.clone().requires_grad_())
        policy, value, _ = agent(sections)
        rows = np.r_[4:STEPS, STEPS : 4 * STEPS]  # without what environment 2 did in its poisoned episode
        out = outputs(policy, value)[rows]
        (grad,) = torch.autograd.grad(out.sum(), sections.obs)
        row, edges = torch.arange(len(sections.obs)), [*sections.starts.tolist(), len(sections.obs)]
        kept = torch.zeros(len(row), dtype=torch.bool)  # the last episode of every environment
        for start, end in zip(edges, edges[1:]):
            kept[max([start, *row[start:end][sections.begins[start:end]].tolist()]) : end] = True
        found.append((out.detach(), grad, kept))
    (clean, clean_grad, _), (poisoned, poisoned_grad, kept) = found
    assert poisoned.isfinite().all()
    torch.testing.assert_close(poisoned, clean, rtol=1e-5, atol=1e-6)
    if max_prefix == 1000 or "linattn" not in type(agent).__module__:  # whose loss is nan with such a state in any case
        torch.testing.assert_close(poisoned_grad[kept], clean_grad[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 17, 64])
def test_gae_is_the_loop(backend, monkeypatch, steps):
    script = load_script("ppo_tbb_ffm")
    if backend == "blelloch_scan":
        monkeypatch.setattr(script, "linear_scan", None)
    rewards, values, next_values = torch.randn(3, steps)
    ends = torch.rand(steps) < 0.2
    ends[-1] = True
    expected, after = torch.zeros(steps), 0.0
    for t in reversed(range(steps)):
        delta = rewards[t] + 0.9 * next_values[t] - values[t]
        after = delta + (0 if ends[t] else 0.9 * 0.8 * after)
        expected[t] = after
    torch.testing.assert_close(script.gae(rewards, values, next_values, ends, 0.9, 0.8), expected, rtol=1e-5, atol=1e-6)


def test_a_policy_over_choices_of_several_sizes():
    """Log-probability, entropy, mode and samples of MultiDiscrete actions are those of each part alone."""
    agent = make("ppo_tbb_ffm")
    logits = torch.randn(6, 5)
    policy = agent.policy(logits)
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split([3, 2], -1)]
    actions = torch.stack([part.sample() for part in parts], -1)
    torch.testing.assert_close(policy.log_prob(actions), sum(p.log_prob(a) for p, a in zip(parts, actions.unbind(-1))))
    torch.testing.assert_close(policy.entropy(), sum(p.entropy() for p in parts))
    assert policy.mode.tolist() == torch.stack([part.probs.argmax(-1) for part in parts], -1).tolist()
    samples = torch.stack([policy.sample() for _ in range(200)])
    assert samples[..., 0].unique().tolist() == [0, 1, 2] and samples[..., 1].unique().tolist() == [0, 1]
    logits.requires_grad_()
    policy = agent.policy(logits)
    (policy.entropy().sum() + policy.log_prob(actions).sum()).backward()
    assert logits.grad.isfinite().all() and (logits.grad != 0).all()


def test_a_policy_over_one_choice_is_that_of_torch():
    """Log-probability, entropy and their gradients, mode, and the same sample from the same generator."""
    agent = make("ppo_tbb_ffm")
    agent.nvec = [5]
    logits = (5 * torch.randn(40, 5)).requires_grad_()
    found = []
    for policy in agent.policy(logits), torch.distributions.Categorical(logits=logits):
        torch.manual_seed(1)
        actions = policy.sample().flatten()
        log_prob = policy.log_prob(actions if found else actions[:, None])
        grads = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (log_prob, policy.entropy())]
        found.append((actions, policy.mode.flatten(), log_prob, policy.entropy(), *grads))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("inputs", [7, 16], ids=["few inputs, by a copy of the weight", "more, by the weight"])
def test_a_product_with_its_bias_is_that_of_torch(inputs):
    """`Linear` in values and gradients, for rows and for a lone one."""
    script = load_script("ppo_tbb_ffm")
    torch.manual_seed(0)
    ours, theirs = script.Linear(inputs, 5), torch.nn.Linear(inputs, 5)
    theirs.load_state_dict(ours.state_dict())
    for x in torch.randn(9, inputs), torch.randn(inputs):
        found = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            found.append((out, *torch.autograd.grad((out**2).sum(), [leaf, layer.weight, layer.bias])))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["ppo_tbb_ffm", "ppo_tbb_lru_continuous_action"])
def test_heads_begin_small_for_the_policy_and_at_one_for_the_value(name):
    script = load_script(name)
    agent = script.Agent(BoxSpaces if "continuous" in name else Spaces, script.Args(hidden_size=8))
    weight = agent.actor_critic.weight.detach()
    actor, critic = weight[:-1], weight[-1]
    torch.testing.assert_close(actor @ actor.T, 1e-4 * torch.eye(len(actor)), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(critic @ critic, torch.tensor(1.0))
    assert (agent.actor_critic.bias == 0).all()
