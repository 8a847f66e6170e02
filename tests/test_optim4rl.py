"""A learned optimiser: its gradient, its cells, the agents that it trains, and its life as a script."""

import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from scripts import assert_keeps_its_source, fails, load_script, run, run_folder, scalars

SCRIPTS = ["optim4rl", "optim4rl_lru"]
optim4rl = load_script("optim4rl")
SHORT = """--num-windows 6 --num-updates 3 --life 4 --num-agents 2 --num-envs 2 --num-steps 5 --sample 64 --num-validations 2
    --valid-agents 1 --test-agents 2 --test-updates 3 --checkpoint-interval 1"""
ARMS = [
    *(
        ("optim4rl", {"structure": s, "grad_proc": g})
        for s in ("adaptive", "linear", "momentum", "raw")
        for g in ("none", "signlog")
    ),
    *(("optim4rl", {"grad_proc": g}) for g in ("l2l", "asinh")),
    *(("optim4rl_lru", {"init": init}) for init in ("zero", "adam")),
]


def make_cell(script, **flags):
    """In double, with weights that are not those of the start, where much is zero."""
    torch.manual_seed(0)
    module = load_script(script)
    cell = module.make_cell(module.Args(**flags)).double()
    for p in cell.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module, cell


def make_tape(updates, coordinates, seed=0):
    rng = torch.Generator().manual_seed(seed)
    tape = 0.1 * torch.randn(updates, coordinates, generator=rng, dtype=torch.float64)
    begins = torch.rand(updates, coordinates, generator=rng) < 0.2
    begins[0, 0], begins[-1, 1] = True, True  # at both edges
    return tape, begins


# ---- the gradient of the optimiser


@pytest.mark.parametrize("script, flags", ARMS)
@pytest.mark.parametrize("how", ["final", "every"])
def test_the_surrogate_is_what_autograd_says(script, flags, how):
    """Two agents on quadratic losses; one begins anew inside the window. Each gradient is detached, all else is not."""
    module, cell = make_cell(script, **flags)
    target = torch.randn(8, 6, dtype=torch.float64)
    theta = torch.randn(8, dtype=torch.float64)
    begins = torch.zeros(5, 8, dtype=torch.bool)
    begins[2, 4:] = True
    state, alpha, fresh = cell.initial_state(8).double(), 0.01, torch.randn(8, dtype=torch.float64)

    def grad_at(theta, n):
        return 0.1 * (theta.detach() - target[:, n])

    tape, thetas, memory = [], [], state
    for n in range(5):  # a graph through all of the window
        theta = torch.where(begins[n], fresh, theta)
        g = grad_at(theta, n)
        update, memory = cell.step(g, memory, begins[n])
        theta = theta + alpha * update
        tape, thetas = [*tape, g], [*thetas, theta]
    following = grad_at(theta, 5)
    tape = torch.stack(tape)
    if how == "final":
        true = (following * theta).sum()
    else:  # what an agent's losses after each update say about its weights then
        later = [*tape[1:], following]
        alive = [torch.ones(8, dtype=torch.bool) if n == 4 else ~begins[n + 1] for n in range(5)]
        true = sum((g * theta * on).sum() for g, theta, on in zip(later, thetas, alive)) / 5
    wanted = torch.autograd.grad(true, list(cell.parameters()), allow_unused=True)
    credit = module.credit_of(tape, following, begins, how)
    idx = torch.randperm(8)
    found = torch.autograd.grad(
        module.meta_loss(cell, tape, begins, state, credit, idx, alpha), list(cell.parameters()), allow_unused=True
    )
    assert any(w is not None and w.abs().max() > 1e-9 for w in wanted)
    for f, w in zip(found, wanted):
        if w is not None:
            torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-12)


def test_sampled_coordinates_average_to_the_whole():
    module, cell = make_cell("optim4rl_lru")
    tape, begins = make_tape(4, 30)
    credit, state = torch.randn(4, 30, dtype=torch.float64), cell.initial_state(30).double()
    loss = [module.meta_loss(cell, tape, begins, state, credit, idx, 0.1).item() for idx in torch.arange(30).chunk(6)]
    assert np.mean(loss) == pytest.approx(module.meta_loss(cell, tape, begins, state, credit, torch.arange(30), 0.1).item())


@pytest.mark.parametrize("how", ["final", "every"])
def test_credit_is_that_of_a_plain_loop(how):
    tape, begins = make_tape(6, 9)
    following = torch.randn(9, dtype=torch.float64)
    found, rows = optim4rl.credit_of(tape, following, begins, how), [*tape, following]
    for n in range(6):
        for i in range(9):
            end = next((k for k in range(n + 1, 6) if begins[k, i]), None)  # where the next life begins
            later = [rows[k][i].item() for k in range(n + 1, 7 if end is None else end)]
            wanted = (rows[6][i].item() if end is None else 0) if how == "final" else sum(later) / 6
            assert found[n, i].item() == pytest.approx(wanted, abs=1e-12)


# ---- cells


@pytest.mark.parametrize("script, flags", ARMS)
@pytest.mark.parametrize("alone", [False, True])
def test_a_window_is_step_by_step_and_a_begin_forgets(script, flags, alone, monkeypatch):
    module, cell = make_cell(script, **flags)
    if alone:
        monkeypatch.setattr(module, "linear_scan", None)
    tape, begins = make_tape(7, 12)
    state = cell.step(tape[3], cell.initial_state(12).double(), begins[0] | True)[1]
    stepped, memory = [], state
    for g, begin in zip(tape, begins):
        update, memory = cell.step(g, memory, begin)
        stepped.append(update)
    torch.testing.assert_close(cell.unroll(tape, begins, state), torch.stack(stepped), rtol=1e-10, atol=1e-12)
    state = torch.where(begins[0, :, None], torch.nan, state)  # before a begin anything may stand
    assert cell.unroll(tape, begins, state).isfinite().all()


def test_the_memoroid_is_odd_in_the_gradient_and_adam_is_a_point_in_it():
    module, cell = make_cell("optim4rl_lru")
    tape, begins = make_tape(9, 7)
    state = cell.initial_state(7).double()
    begins[0] = True
    torch.testing.assert_close(cell.unroll(-tape, begins, state), -cell.unroll(tape, begins, state))
    adam, p = module.make_cell(module.Args(init="adam")).double(), nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer, begin, found = torch.optim.Adam([p], lr=0.1), torch.ones(7, dtype=torch.bool), torch.zeros(7).double()
    for g in tape:
        update, state = adam.step(g, state, begin)
        found, begin, p.grad = found + 0.1 * update, begin & False, g
        optimizer.step()
        torch.testing.assert_close(found, p.data, rtol=1e-5, atol=1e-6)


def test_untrained_the_gru_is_sign_sgd_and_the_memoroid_does_nothing():
    torch.manual_seed(0)
    g = torch.randn(50)
    for script, wanted in (("optim4rl", -g.sign()), ("optim4rl_lru", 0 * g)):
        module = load_script(script)
        cell = module.make_cell(module.Args())
        for head in getattr(cell, "heads", []):
            nn.init.zeros_(head.weight)
        update, _ = cell.step(g, cell.initial_state(50), torch.ones(50, dtype=torch.bool))
        torch.testing.assert_close(update, wanted)
    assert sum(p.numel() for p in cell.parameters()) == 373


@pytest.mark.parametrize("kind", ["none", "signlog", "l2l", "asinh"])
def test_gradients_are_processed_by_their_formulas(kind):
    for value in (0.5, -3e-3, 1e-6, 0.0, -1.0):
        g, sign, size = torch.tensor([value], dtype=torch.float64), np.sign(value), abs(value)
        first, second = (x[0].tolist() for x in optim4rl.process(g, kind))
        if kind == "none":
            wanted = [value], [value**2]
        elif kind == "signlog":
            wanted = [sign, np.log(size + 1e-18)], [2 * np.log(size + 1e-18)]
        elif kind == "asinh":
            y = np.log(1 + size / 1e-8) / np.log(1e8)
            wanted = [sign * y], [2 * y]
        else:
            log = np.log(size) / 10 if size else -np.inf
            wanted = ([log, sign] if log >= -1 else [-1, np.exp(10) * value]), [2 * max(log, -1)]
        assert first == pytest.approx(wanted[0], rel=1e-6) and second == pytest.approx(wanted[1], rel=1e-6)


# ---- agents and environments


def play(envs, steps=60):
    """Observations, actions, rewards and ends under random actions."""
    for _ in range(steps):
        obs, actions = envs.observe(), torch.randint(envs.num_actions, envs.shape)
        yield obs, actions, *envs.step(actions)


def test_catch_by_hand():
    torch.manual_seed(0)
    envs, seen, paddle = optim4rl.Catch(2, 3), [], torch.full((2, 3), 2)
    for n, (obs, actions, reward, ended) in enumerate(play(envs)):
        assert (obs.sum(-1) == 2).all() and (obs[..., 45:].argmax(-1) == paddle).all()
        row = n % 9
        assert (obs.argmax(-1) // 5 == row).all()
        column = obs.argmax(-1) % 5
        paddle = (paddle + actions - 1).clamp(0, 4)
        assert (ended == (row == 8)).all()
        assert (reward == torch.where(paddle == column, 1.0, -1.0) * (row == 8)).all()
        seen.append(column)
        if row == 8:
            paddle = torch.full((2, 3), 2)
    assert len({int(c) for c in seen[0].flatten()} | {int(c) for c in seen[-1].flatten()}) > 2


def test_grid_pays_for_what_it_shows():
    torch.manual_seed(0)
    envs, ends, back = optim4rl.Grid(4, 50), [], 0
    age = torch.zeros(4, 50, dtype=torch.long)
    before = None
    for obs, actions, reward, ended in play(envs, 300):
        at, good, bad = obs.view(4, 50, 3, 24).unbind(2)
        assert (at.sum(-1) == 1).all() and (good.sum(-1) <= 1).all()
        place = at.argmax(-1)
        place = 6 * (place // 6 + actions // 3 - 1).clamp(0, 3) + (place % 6 + actions % 3 - 1).clamp(0, 5)
        hit = [m.gather(-1, place[..., None])[..., 0] for m in (good, bad)]
        assert (reward == hit[0] - hit[1]).all()
        age = age + 1
        assert (ended | (age < 50)).all() and (hit[1].bool() | (age == 50))[ended].all()
        ends.append(ended[hit[1].bool() & (age < 50)])
        if before is not None:
            back += ((before == 0) & (good.sum(-1) == 1)).sum()
        before, age = good.sum(-1), torch.where(ended, 0, age)
    assert 0.4 < torch.cat(ends).float().mean() < 0.6 and back > 100


def test_cart_pole_is_gymnasiums():
    import gymnasium as gym

    torch.manual_seed(0)
    envs, theirs = optim4rl.CartPole(1, 1), gym.make("CartPole-v1").unwrapped
    theirs.reset(seed=0)
    for obs, actions, reward, ended in play(envs, 200):
        theirs.state, theirs.steps_beyond_terminated = obs[0, 0].double().numpy(), None
        state, _, terminated, *_ = theirs.step(int(actions))
        assert bool(ended) == terminated and reward.item() == 1
        assert terminated or np.abs(envs.state[0, 0].numpy() - state).max() < 1e-5


def test_a_stacked_agent_learns_as_one_alone_does():
    """The gradient of each by a network of torch.nn, from the same rollout."""
    args = optim4rl.Args(num_envs=3)
    torch.manual_seed(1)
    agents = optim4rl.Agents("catch", 2, args)
    rng = torch.get_rng_state()
    theta = agents.theta.clone()
    found = agents.gradient()
    torch.set_rng_state(rng)
    again = optim4rl.Agents.__new__(optim4rl.Agents)
    torch.manual_seed(1)
    again = optim4rl.Agents("catch", 2, args)
    torch.set_rng_state(rng)
    seen, taken, rewards, ends = [], [], [], []
    for exponential in torch.empty(args.num_steps, 2, 3, 3).exponential_():
        obs = again.envs.observe()
        logits, _ = again.network(again.layers(theta), obs)
        action = (logits - exponential.log()).argmax(-1)
        reward, ended = again.envs.step(action)
        seen, taken, rewards, ends = [*seen, obs], [*taken, action], [*rewards, reward], [*ends, ended]
    seen.append(again.envs.observe())
    for k in range(2):
        w1, b1, w2, b2 = theta[k].split([50 * 32, 32, 32 * 4, 4])
        net = nn.Sequential(nn.Linear(50, 32), nn.ReLU(), nn.Linear(32, 4))
        for layer, weight, bias in ((net[0], w1, b1), (net[2], w2, b2)):
            layer.weight.data, layer.bias.data = weight.view(-1, len(bias)).T.clone(), bias.clone()
        out = net(torch.stack(seen)[:, k])
        value, policy = out[..., -1], torch.distributions.Categorical(logits=out[:-1, :, :-1])
        err, following = torch.zeros(20, 3), torch.zeros(3)
        for t in range(19, -1, -1):
            on = (~ends[t][k]).float()
            delta = rewards[t][k] + 0.995 * on * value[t + 1] - value[t]
            following = delta.detach() + 0.995 * 0.95 * on * following
            err[t] = following
        loss = -policy.log_prob(torch.stack(taken)[:, k]) * err + 0.5 * (err + value[:-1].detach() - value[:-1]) ** 2
        (loss - 0.01 * policy.entropy()).mean().backward()
        grad = torch.cat([p.grad.T.flatten() if p.dim() > 1 else p.grad for p in net.parameters()])
        torch.testing.assert_close(found[k], grad.clamp(-1, 1), rtol=1e-4, atol=1e-6)


def test_agents_that_begin_anew_leave_the_others_alone():
    agents = optim4rl.Agents("catch", 3, optim4rl.Args(num_envs=2))
    agents.gradient()
    theta, ball = agents.theta.clone(), agents.envs.ball.clone()
    agents.begin(torch.tensor([False, True, False]))
    assert torch.equal(agents.theta[[0, 2]], theta[[0, 2]]) and not torch.equal(agents.theta[1], theta[1])
    assert torch.equal(agents.envs.ball[[0, 2]], ball[[0, 2]]) and (agents.envs.ball[1] < 5).all()


def test_returns_are_those_of_whole_episodes():
    agents = optim4rl.Agents("grid", 3, optim4rl.Args(num_envs=2, num_steps=40))  # episodes of up to 50 steps cross rollouts
    sums, seen, step = torch.zeros(3, 2), [], agents.envs.step

    def record(actions):
        reward, ended = step(actions)
        sums.add_(reward)
        seen.append(torch.where(ended, sums, torch.nan))
        sums.masked_fill_(ended, 0)
        return reward, ended

    agents.envs.step = record
    agents.gradient()
    agents.begin(which := torch.tensor([False, True, False]))
    sums[which] = 0
    assert agents.recent[1].isnan()
    for _ in range(3):
        seen.clear()
        before = agents.recent
        agents.gradient()
        mean = torch.stack(seen).transpose(0, 1).flatten(1).nanmean(1)
        assert torch.equal(agents.recent.nan_to_num(99), torch.where(mean.isnan(), before, mean).nan_to_num(99))


# ---- the optimiser for others


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_optimiser_has_the_interface_of_torch(tmp_path, script):
    run(tmp_path, *SHORT.split(), script=script)
    module, path = load_script(script), run_folder(tmp_path) / "model.pt"
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = module.LearnedOptimizer(net.parameters(), path, lr=0.01)
    cell = optimizer.cell
    wanted, memory = net.weight.detach().clone(), None
    for n in range(3):
        optimizer.zero_grad()
        (net(x) ** 2).mean().backward()
        g, begins = net.weight.grad.flatten().clamp(-1, 1), torch.full((6,), n == 0)
        with torch.no_grad():
            update, memory = cell.step(g, cell.initial_state(6) if memory is None else memory, begins)
        wanted = wanted + 0.01 * update.view(2, 3)
        optimizer.step()
        torch.testing.assert_close(net.weight.data, wanted)
    twin = module.LearnedOptimizer(net.parameters(), path, lr=0.01)
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(twin.state[net.weight]["memory"], optimizer.state[net.weight]["memory"])


# ---- the script


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_logs_saves_tests_and_repeats(tmp_path, script):
    for name in ("one", "two", "alone"):
        (tmp_path / name).mkdir()
        out = run(tmp_path / name, *SHORT.split(), script=script, alone=name == "alone").splitlines()
        assert out[0].startswith(f"{script}: catch, 6 windows") and out[1].endswith(f"runs/{run_folder(tmp_path / name).name}")
        assert sum(line.startswith("evaluation: ") for line in out) == 22
        assert ("this file's own scan" in out[0]) == (name == "alone")
    one, two = (scalars(run_folder(tmp_path / name)) for name in ("one", "two"))
    assert one == two and len(one["meta/meta_loss"]) == 6
    assert [window for window, _ in one["meta/validation_auc"]] == [5, 6]
    assert len(one[f"test/{script}"]) == 3
    again = run(tmp_path, "--evaluate", run_folder(tmp_path / "one"), script=script).splitlines()
    assert again[-22:] == [
        line for line in run(tmp_path, "--evaluate", run_folder(tmp_path / "two"), script=script).splitlines()
    ]
    assert not list(tmp_path.glob("*/runs/*/*.partial"))
    assert_keeps_its_source(run_folder(tmp_path / "alone"), script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_run_resumes_exactly(tmp_path, script):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    run(whole, *SHORT.split(), script=script)
    run(part, *SHORT.split(), "--num-windows", 4, "--test-agents", 0, script=script)  # its last checkpoint is of window 3
    time.sleep(1.1)  # the names of TensorBoard's files hold the second, and are read in order
    run(part, "--resume", run_folder(part), "--num-windows", 6, "--test-agents", 2, script=script)
    one, two = (scalars(run_folder(folder)) for folder in (whole, part))
    assert one["meta/meta_loss"] == two["meta/meta_loss"] and one[f"test/{script}"] == two[f"test/{script}"]


def test_flags_out_of_range_are_refused(tmp_path):
    for flags, message in [
        ("--meta-lr 2", "--meta-lr: expected at most 1, got 2.0; lower it"),
        ("--num-updates 0", "--num-updates: expected at least 1, got 0"),
        ("--resume nowhere", "--resume: expected a file nowhere/checkpoint.pt, got none"),
    ]:
        assert message in fails(tmp_path, *flags.split(), script="optim4rl")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script, auc", [("optim4rl", 0.3), ("optim4rl_lru", 0.7)])
def test_an_optimiser_is_learned(tmp_path, script, auc):
    out = run(tmp_path, script=script)
    found = [line for line in out.splitlines() if line.startswith(f"evaluation: {script} ")]
    assert float(found[0].split("auc=")[1].split(",")[0]) > auc, out
