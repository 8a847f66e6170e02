"""The tape that PPO carries from rollout to rollout: the policy that acted, under any weights, with an unbroken gradient."""

import ast
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script
from test_memoroid import ROADS, take

SIZES = {
    "ppo_tbb_ffm": {"trace_size": 3},
    "ppo_tbb_lru": {"state_size": 4, "r_min": 0.5},
    "ppo_tbb_glru": {"state_size": 4, "r_min": 0.5},
    "ppo_tbb_mingru": {},
    "ppo_tbb_s5": {"state_size": 4, "dt_min": 0.05},
    "ppo_tbb_linattn": {"key_size": 4, "value_size": 3},
    "ppo_sbb_lstm": {},
    "ppo_tbb_lru_continuous_action": {"state_size": 4, "r_min": 0.5},
}
CARRYING = [name for name in SIZES if name != "ppo_sbb_lstm"]
OBS, STEPS, ENVS = 5, 9, 4


def make(name, space=None):
    script = load_script(name)
    space = space or (gym.spaces.Box(-1, 1, (2,)) if "continuous" in name else gym.spaces.MultiDiscrete([3, 2]))
    spaces = SimpleNamespace(single_observation_space=gym.spaces.Box(-1, 1, (OBS,)), single_action_space=space)
    agent = script.Agent(spaces, script.Args(hidden_size=8, **SIZES[name]))
    with torch.no_grad():
        for parameter in agent.parameters():  # heads this small would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
        if name == "ppo_tbb_mingru":
            agent.memory.inputs.bias[:8] -= 2  # z; as it begins, half of the memory is gone after a step
    return agent


@pytest.fixture(params=ROADS)
def road(request):
    return request.param


@pytest.fixture(params=SIZES)
def agent(request, road, monkeypatch):
    take(road, load_script(request.param), monkeypatch)
    return make(request.param)


def only(names):
    return pytest.mark.parametrize("agent", names, indirect=True)


def script_of(agent):
    return load_script(type(agent).__module__)


def training_loop(script, *names, **variables):
    """What the script's own assignments to `names` in its training loop compute of these variables."""
    loop = ast.parse(Path(script.__file__).read_text()).body[-1]
    lines = [line for line in ast.walk(loop) if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) in names]
    assert len(lines) == len(names)
    scope = vars(script) | variables
    exec(compile(ast.Module(lines, []), script.__file__, "exec"), scope)
    return [scope[name] for name in names]


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
    told = policy[0] if isinstance(policy, tuple) else policy.exp()
    return torch.cat([told.flatten(1), value[:, None]], 1)


def act(agent, obs, begins, state):
    """A rollout step by step: outputs [N * S, ...], environment by environment, and the state after it."""
    found = []
    for row, begin in zip(obs, begins):
        policy, value, state = agent.step(row, begin, state)
        found.append(outputs(policy, value))
    assert not found[0].requires_grad and not state.requires_grad
    return torch.stack(found, 1).flatten(0, 1), state


@pytest.mark.parametrize("max_prefix", [0, 1, 5, STEPS, 1000])
def test_the_tape_is_the_policy_that_acted(agent, max_prefix):
    """Rollout after rollout, wherever the prefix is cut, and for every choice and order of environments."""
    if max_prefix and "lstm" in type(agent).__module__:
        pytest.skip("the baseline carries no rows")
    state = agent.memory.initial_state(ENVS)
    tape = script_of(agent).CarriedTape(np.zeros((STEPS, ENVS, OBS), np.float32), state)
    lengths = [0] * ENVS
    for obs, begins, next_begins in random_rollouts(4):
        acted, state = act(agent, obs, begins, state)
        tape.add(obs, begins)
        for envs in ([0, 1, 2, 3], [2, 0]):
            sections = tape.sections(envs, STEPS)
            assert len(sections.obs) % 64 == 0 and len(sections.loss_rows) == STEPS * len(envs)
            with torch.no_grad():
                policy, value, after = agent(sections)
            rows = np.concatenate([np.arange(i * STEPS, (i + 1) * STEPS) for i in envs])
            torch.testing.assert_close(outputs(policy, value), acted[rows], rtol=1e-5, atol=1e-5)
            if after is not None:  # the baseline has no use for it
                torch.testing.assert_close(after, state[envs], rtol=1e-5, atol=1e-5)
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
    actions = torch.ones(1, 2) if isinstance(policy, tuple) else torch.ones(1, 2, dtype=torch.int64)
    agent.zero_grad()
    script_of(agent).log_prob(policy, actions).sum().backward()
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
def test_nothing_leaks_between_environments_or_episodes(agent, road, max_prefix):
    """Poison in one environment, and in an earlier episode of another: what follows is as without, in value and gradient."""
    if max_prefix and "lstm" in type(agent).__module__:
        pytest.skip("the baseline carries no rows")
    if "linattn" in type(agent).__module__ and road == "package":
        pytest.skip("nan spreads in the masked products of linear_attention; the scripts stop at a loss that is not finite")
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


@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 17, 64])
def test_gae_is_the_loop(road, monkeypatch, steps, envs):
    script = load_script("ppo_tbb_ffm")
    take(road, script, monkeypatch)
    rewards, values, next_values = torch.randn(3, steps, envs)
    ended = torch.rand(steps, envs) < 0.2
    ended[[0, -1], 0] = True  # in one environment with the first step and with the last, in another with neither
    ended[[0, -1], -1] = envs == 1
    expected, after = torch.zeros(steps, envs), torch.zeros(envs)
    for t in reversed(range(steps)):
        delta = rewards[t] + 0.9 * next_values[t] - values[t]
        expected[t] = after = delta + torch.where(ended[t], 0, 0.9 * 0.8 * after)
    torch.testing.assert_close(script.gae(rewards, values, next_values, ended, 0.9, 0.8), expected, rtol=1e-5, atol=1e-6)


CHOICES = {"three and two": gym.spaces.MultiDiscrete([3, 2]), "three parts": gym.spaces.MultiDiscrete([2, 4, 3])}
CHOICES["one part"] = gym.spaces.Discrete(5)


@pytest.mark.parametrize("space", CHOICES)
def test_a_policy_over_choices_is_that_of_its_parts(space):
    """Log-probability, entropy, their gradients, and mode are those of torch's Categorical for each part alone."""
    agent = make("ppo_tbb_ffm", CHOICES[space])
    markov_state = torch.randn(6, 8)
    policy, values = agent.heads(markov_state)
    assert values.shape == (6,)
    parts = [torch.distributions.Categorical(logits=p) for p in agent.actor(agent.norm(markov_state)).split(agent.nvec, -1)]
    actions = torch.stack([part.sample() for part in parts], -1)
    log_prob = script_of(agent).log_prob(policy, actions)
    expected_log_prob = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(-1)))
    (entropy,) = training_loop(script_of(agent), "entropy_loss", policy=policy)
    expected_entropy = sum(part.entropy() for part in parts).mean()
    torch.testing.assert_close(log_prob, expected_log_prob)
    torch.testing.assert_close(entropy, expected_entropy)
    assert policy.argmax(-1).tolist() == torch.stack([part.probs.argmax(-1) for part in parts], -1).tolist()
    for ours, theirs in ((log_prob.sum(), expected_log_prob.sum()), (entropy, expected_entropy)):
        grads = (torch.autograd.grad(v, agent.actor.parameters(), retain_graph=True) for v in (ours, theirs))
        torch.testing.assert_close(*grads)


@torch.no_grad()
def test_actions_are_drawn_with_the_probabilities_of_the_policy():
    """Each pair of choices as often as its two probabilities say, and no choice that a part lacks."""
    agent, draws = make("ppo_tbb_ffm", gym.spaces.MultiDiscrete([5, 2])), 100_000
    agent.actor.weight.mul_(10)
    policy, _ = agent.heads(torch.randn(1, 8).expand(draws, -1))
    variables = {"agent": agent, "begins": np.zeros((1, draws)), "step": 0, "rng": np.random.default_rng(0), "device": "cpu"}
    *_, action = training_loop(script_of(agent), "noise", "noise", "action", policy=policy, **variables)
    assert action.shape == (draws, 2)
    probability = policy[0, 0].exp()[:, None] * policy[0, 1].exp()  # of the pairs; the second part has two choices of five
    counts = torch.bincount(action[:, 0] * 5 + action[:, 1], minlength=25).view(5, 5)
    assert (counts[:, 2:] == 0).all() and probability.max() > 2 * probability[:, :2].min()
    torch.testing.assert_close(counts / draws, probability, rtol=0, atol=0.005)


def test_a_gaussian_policy_is_that_of_torch():
    """Log-probability, entropy and their gradients are those of Normal, and so are mean and spread of what is drawn."""
    agent = make("ppo_tbb_lru_continuous_action")
    script = script_of(agent)
    with torch.no_grad():
        agent.actor_logstd.copy_(torch.tensor([-1.0, 0.7]))  # otherwise it begins at zero
    policy, values = agent.heads(torch.randn(6, 8))
    mean, logstd = policy
    assert values.shape == (6,) and mean.shape == logstd.shape == (6, 2)
    normal, actions = torch.distributions.Normal(mean, logstd.exp()), torch.randn(6, 2)
    (entropy,) = training_loop(script, "entropy_loss", policy=policy)
    pairs = [(script.log_prob(policy, actions), normal.log_prob(actions).sum(-1)), (entropy, normal.entropy().sum(-1).mean())]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        grads = (torch.autograd.grad(v.sum(), agent.actor_logstd, retain_graph=True) for v in (ours, theirs))
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        many = mean[:1].expand(100_000, -1), logstd[:1].expand(100_000, -1)
        variables = {"agent": agent, "begins": np.zeros((1, 100_000)), "step": 0, "rng": np.random.default_rng(0)}
        *_, action = training_loop(script, "noise", "noise", "action", policy=many, device="cpu", **variables)
        assert action.dtype == torch.float32
        torch.testing.assert_close(action.mean(0), mean[0], rtol=0, atol=0.03)
        torch.testing.assert_close(action.std(0), logstd[0].exp(), rtol=0.02, atol=0)
        assert abs(torch.corrcoef(action.T)[0, 1]) < 0.02


@pytest.mark.parametrize("name", SIZES)
def test_actions_are_what_environments_take(name):
    discrete = [gym.spaces.Discrete(5, start=-2), gym.spaces.MultiDiscrete([3, 2], start=np.array([1, -1]))]
    boxes = [gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (2, 3)), gym.spaces.Box(-1, 1, ())]
    for space in boxes if "continuous" in name else discrete:
        start = getattr(space, "start", np.zeros(space.shape))
        number = max(1, int(np.prod(space.shape)))
        actions = torch.tensor([0, 1, 1, 0]).repeat_interleave(number).view(4, number)
        envs = SimpleNamespace(single_action_space=space, action_space=gym.vector.utils.batch_space(space, 4))
        actions = actions.float() if "continuous" in name else actions
        taken = load_script(name).env_actions(envs, actions)
        assert envs.action_space.contains(taken)
        assert np.array_equal(taken, np.stack([start + i for i in (0, 1, 1, 0)]))


@pytest.mark.parametrize("name", ["ppo_tbb_ffm", "ppo_tbb_lru_continuous_action"])
def test_heads_begin_small_for_the_policy_and_at_one_for_the_value(name, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # as they are made
    agent = make(name)
    actor, critic = agent.actor.weight.detach(), agent.critic.weight[0].detach()
    torch.testing.assert_close(actor @ actor.T, 1e-4 * torch.eye(len(actor)), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(critic @ critic, torch.tensor(1.0))
    assert (agent.actor.bias == 0).all() and (agent.critic.bias == 0).all()
