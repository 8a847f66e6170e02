"""Algorithm distillation: rooms, histories, what each memory lets through, acting as in training, and the life of a run."""

import copy
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from scripts import assert_keeps_its_source, fails, model, path_of, run, run_folder, scalars, start

SCRIPTS = "ad_ed ad_full ad_mingru ad_linattn ad_lru".split()
MEMOROIDS = SCRIPTS[2:]
ARMS = [  # script, flags: all that changes what a model computes
    ("ad_ed", {}),
    ("ad_ed", {"norm": "pre", "mem_grad_scale": 0.5}),
    ("ad_ed", {"cache": "input", "mem_len": 4}),
    ("ad_ed", {"cache": "none"}),
    ("ad_full", {}),
    ("ad_full", {"context_length": 4, "norm": "pre"}),
    ("ad_mingru", {}),
    ("ad_mingru", {"chunk_length": 4, "bptt_chunks": 2, "mem_grad_scale": 0.5}),
    ("ad_mingru", {"reset_on": "episode"}),
    ("ad_linattn", {}),
    ("ad_linattn", {"chunk_length": 8, "bptt_chunks": 2}),
    ("ad_lru", {}),
    ("ad_lru", {"chunk_length": 8, "bptt_chunks": 2}),
    ("ad_lru", {"chunk_length": 4, "bptt_chunks": 4, "reset_on": "episode"}),
]
TINY = "--room-size 3 --episode-length 3 --episodes 8 --test-tasks 2 --histories-per-task 2 --total-updates 12".split()
TINY += "--batch-rows 64 --hidden-size 16 --warmup-updates 2 --checkpoint-interval 1 --eval-runs 2".split()
CHUNKS = "--chunk-length 4 --mem-len 8 --bptt-chunks 2".split()
FLAGS = dict.fromkeys(SCRIPTS, TINY) | {"ad_ed": TINY + CHUNKS}
LOGS = {"losses/cross_entropy", "losses/above_floor", "losses/grad_norm", "charts/learning_rate"}
LOGS |= {f"eval/episodic_return_temperature_{t}" for t in ("1", "0.5", "0")}


def tiny(script, **flags):
    """The script's module, and an agent whose head is not zero, for histories of 8 episodes of 4 rows."""
    module = load_script(script)
    sizes = {"room_size": 3, "episode_length": 3, "episodes": 8, "test_tasks": 2, "hidden_size": 16}
    sizes |= {"chunk_length": 4, "mem_len": 8, "bptt_chunks": 2} if script == "ad_ed" else {}
    args = module.Args(**(sizes | flags))
    agent = module.Agent(args)
    torch.nn.init.normal_(agent.head.weight, std=0.1)
    return module, args, agent


def some_histories(module, args, number=3):
    tasks = module.make_tasks(args)[0][:number]
    rows = module.learning_histories(args, tasks, np.random.default_rng(0))[0]
    return rows._replace(reward=rows.reward.to(torch.get_default_dtype()))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def logits_of(module, args, agent, rows):
    """Logits of whole histories, read as training reads them: window by window, the memory carried on. [B, L, A]"""
    window, memory, found = module.check_memory(args), agent.initial_memory(len(rows.cell)), []
    for first in range(0, rows.cell.shape[1], window):
        piece = module.Rows(*(column[:, first : first + window] for column in rows))
        begins = torch.full((len(rows.cell),), first == 0 or script_is_full(module))
        logits, memory = agent(piece, begins, memory)
        found.append(logits)
    return torch.cat(found, 1)


def script_is_full(module):
    return module.__name__ == "ad_full"


@pytest.mark.parametrize("script, flags", ARMS)
def test_acting_equals_training(script, flags):
    module, args, agent = tiny(script, **flags)
    rows = some_histories(module, args)
    with torch.no_grad():
        state, acted = agent.initial_state(3), []
        for t in range(rows.cell.shape[1]):
            logits, state = agent.step(module.Rows(*(column[:, t] for column in rows)), state)
            acted.append(logits)
        acted = torch.stack(acted, 1)
        if context := getattr(args, "context_length", 0):  # training reads each window of so many rows by itself
            windows = [module.Rows(*(c[:, t - context : t] for c in rows)) for t in range(context, rows.cell.shape[1] + 1)]
            trained = torch.stack([agent(window, None, ())[0][:, -1] for window in windows], 1)
            acted = acted[:, context - 1 :]
        else:
            trained = logits_of(module, args, agent, rows)
    torch.testing.assert_close(acted, trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("script, flags", ARMS)
def test_no_row_sees_a_later_one(script, flags):
    module, args, agent = tiny(script, **flags)
    rows = some_histories(module, args)
    with torch.no_grad():
        before = logits_of(module, args, agent, rows)
        for t in (1, 6, 13):
            reward = rows.reward.clone()
            reward[:, t] += 1
            after = logits_of(module, args, agent, rows._replace(reward=reward))
            assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


def reach(script, row, **flags):
    """The rows whose logits depend on that row of a history."""
    module, args, agent = tiny(script, **flags)
    rows = some_histories(module, args)
    with torch.no_grad():
        before = logits_of(module, args, agent, rows)
        reward = rows.reward.clone()
        reward[:, row] += 1
        changed = logits_of(module, args, agent, rows._replace(reward=reward)) != before
    return set(changed.any(2).any(0).nonzero()[:, 0].tolist())


def test_what_each_memory_lets_through():
    """A layer of XL looks M rows back from its chunk; what ED's cache holds has come through caches itself."""
    assert reach("ad_ed", 1, cache="none") == {1, 2, 3}
    assert reach("ad_ed", 1, cache="input", mem_len=4, num_layers=1) == set(range(1, 8))
    assert reach("ad_ed", 1, cache="input", mem_len=4, num_layers=2) == set(range(1, 12))
    assert reach("ad_ed", 1, cache="output", mem_len=4, num_layers=1) == set(range(1, 32))
    assert reach("ad_full", 1) == set(range(1, 32))
    assert reach("ad_full", 1, context_length=4) == {1, 2, 3}
    for script in MEMOROIDS:
        assert reach(script, 1) == set(range(1, 32))
        assert reach(script, 1, reset_on="episode") == {1, 2, 3}


@pytest.mark.parametrize("script", ["ad_ed", *MEMOROIDS])
def test_a_stream_that_begins_anew_sees_nothing_of_the_old_history(script):
    module, args, agent = tiny(script)
    rows = some_histories(module, args)
    rows = module.Rows(*(column[:, : module.check_memory(args)] for column in rows))
    begins, memory = torch.tensor([True, False, True]), agent.initial_memory(3)
    old = 1e3 if script == "ad_linattn" else torch.nan  # whose masks multiply, see cleanrl_memoroid.scan.linear_attention
    if script == "ad_ed":
        memory = [torch.full_like(cache, old) for cache in memory[0]], memory[1] + 8
    else:
        memory = [torch.full_like(state, old) for state in memory]
    with torch.no_grad():
        logits, _ = agent(rows, begins, memory)
        fresh, _ = agent(rows, torch.ones(3, dtype=torch.bool), agent.initial_memory(3))
    assert not torch.allclose(logits[1], fresh[1])
    assert torch.equal(logits[[0, 2]], fresh[[0, 2]])


def gradients(module, agent, rows, windows):
    """Of the summed loss of some windows, memory carried on from each to the next."""
    agent.zero_grad()
    memory, begins = agent.initial_memory(len(rows.cell)), torch.ones(len(rows.cell), dtype=torch.bool)
    for window in windows:
        piece = module.Rows(*(column[:, window] for column in rows))
        logits, memory = agent(piece, begins, memory)
        begins = torch.zeros_like(begins)
        F.cross_entropy(logits.flatten(0, 1), piece.target.flatten(), ignore_index=-1, reduction="sum").backward()
    return torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])


@pytest.mark.parametrize("script", ["ad_ed", *MEMOROIDS])
def test_a_scale_of_zero_equals_separate_passes_and_one_equals_none(double, script):
    flags = {"chunk_length": 4, "bptt_chunks": 2}
    module, args, agent = tiny(script, mem_grad_scale=0.0, **flags)
    rows = some_histories(module, args)
    found = {}
    for scale in (0.0, 0.5, 1.0):
        agent.args.mem_grad_scale = scale
        found[scale] = gradients(module, agent, rows, [slice(0, 8)])
    separate = gradients(module, agent, rows, [slice(0, 4), slice(4, 8)])
    torch.testing.assert_close(found[0.0], separate)
    # one boundary: what crosses it is halved, and the rest stays
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2)
    assert (found[1.0] - found[0.0]).norm() > 1e-3 * found[0.0].norm()
    if script != "ad_ed":  # without a boundary, the same
        agent.args.chunk_length = 8
        torch.testing.assert_close(found[1.0], gradients(module, agent, rows, [slice(0, 8)]))


def test_a_gradient_that_crosses_more_boundaries_is_scaled_as_often():
    module, args, agent = tiny("ad_ed", cache="input", mem_len=16, bptt_chunks=4, num_layers=1)
    rows = some_histories(module, args)
    rows = module.Rows(*(column[:, :16] for column in rows))
    tokens, found = agent.tokens(rows).detach(), []
    del agent.tokens  # a function takes the module's place
    for scale in (0.5, 1.0):
        leaf = tokens.clone().requires_grad_()
        agent.tokens, agent.args.mem_grad_scale = (lambda rows, leaf=leaf: leaf), scale
        logits, _ = agent(rows, torch.ones(3, dtype=torch.bool), agent.initial_memory(3))
        found.append(torch.autograd.grad(logits[:, 12:].square().sum(), leaf)[0])
    for boundaries, chunk in ((3, slice(0, 4)), (2, slice(4, 8)), (1, slice(8, 12)), (0, slice(12, 16))):
        torch.testing.assert_close(found[0][:, chunk], 0.5**boundaries * found[1][:, chunk])


@pytest.mark.parametrize("script", ["ad_ed", "ad_mingru"])
def test_a_scale_of_one_agrees_with_finite_differences(double, script):
    module, args, agent = tiny(script, mem_grad_scale=1.0, chunk_length=4, bptt_chunks=4)
    rows = some_histories(module, args)
    rows = module.Rows(*(column[:, :16] for column in rows))
    place = agent.tokens.place.weight

    def loss():
        logits, _ = agent(rows, torch.ones(3, dtype=torch.bool), agent.initial_memory(3))
        return logits[:, 12:].square().sum()  # of the last chunk, so through caches alone

    (found,) = torch.autograd.grad(loss(), place)
    with torch.no_grad():
        for i in range(3):
            values = []
            for step in (1e-5, -2e-5):
                place[i, 0] += step
                values.append(loss().item())
            place[i, 0] += 1e-5
            assert abs((values[0] - values[1]) / 2e-5 - found[i, 0].item()) < 1e-4 * max(1, abs(found[i, 0].item()))


def test_pre_norm_is_invariant_to_the_scale_of_the_cached_rows():
    """Its sublayers normalise what they read, the cache included; post-norm has normalised rows there already."""
    for norm, invariant in (("pre", True), ("post", False)):
        module, args, agent = tiny("ad_ed", norm=norm)
        rows = module.Rows(*(column[:, :8] for column in some_histories(module, args)))
        caches, age = [torch.randn(3, 8, 16) * 3 for _ in agent.blocks], torch.full((3, 1), 8.0)
        with torch.no_grad():
            logits = [agent(rows, torch.zeros(3, dtype=torch.bool), ([c * k for c in caches], age))[0] for k in (1, 10)]
        first = [v[:, :4] for v in logits]  # the second chunk's cache holds rows of the first
        assert torch.allclose(*first, atol=1e-3) == invariant


def test_rows_stand_beside_what_they_mean():
    module, args, _ = tiny("ad_ed", episode_length=5, episodes=6)
    tasks = module.make_tasks(args)[0]
    rows, returns, floor = module.learning_histories(args, tasks, np.random.default_rng(0))
    shape = (len(tasks), 6, 6)
    cell, action, reward, step, episode, target = (column.reshape(shape) for column in rows)
    assert (cell[:, :, 0] == 4).all() and (action[:, :, 0] == 5).all() and not reward[:, :, 0].any()
    assert torch.equal(action[:, :, 1:], target[:, :, :-1]) and (target[:, :, -1] == -1).all()
    assert torch.equal(reward, (cell == torch.tensor(tasks)[:, :, None]).float() * (step > 0))  # a reward beside its cell
    assert torch.equal(step[0, 0], torch.arange(6)) and torch.equal(episode[0, :, 0], torch.arange(6))
    assert np.array_equal(returns, reward.sum(2).numpy()) and 0 < floor < np.log(5)


@pytest.mark.parametrize("env_id, best", [("DarkRoom", {1: 5, 2: 4}), ("DarkKeyToDoor", {2: 2})])
def test_the_optimum_is_what_the_best_plan_gets(env_id, best):
    """DarkRoom: steps - distance + 1. Plans of five steps, all of them."""
    module, args, _ = tiny("ad_ed", env_id=env_id, episode_length=5)
    tasks = np.concatenate(module.make_tasks(args))
    rooms = module.Rooms(args, tasks)
    plans = np.stack(np.meshgrid(*[np.arange(5)] * 5), -1).reshape(-1, 5)
    every = module.Rooms(args, np.repeat(tasks, len(plans), 0))
    state, total = np.full(len(every.tasks), every.start), 0
    for actions in np.tile(plans, (len(tasks), 1)).T:
        state, reward = every.step(state, actions)
        total += reward
    total = total.reshape(len(tasks), -1)
    np.testing.assert_allclose(rooms.expected_returns(np.max), total.max(1))
    np.testing.assert_allclose(rooms.expected_returns(np.mean), total.mean(1), rtol=1e-5)
    if env_id == "DarkRoom":
        distance = np.abs(np.stack(np.divmod(tasks[:, 0], 3)) - 1).sum(0)
        np.testing.assert_allclose(total.max(1), 5 - distance + 1)


@pytest.mark.parametrize("env_id", ["DarkRoom", "DarkKeyToDoor"])
def test_rooms_do_as_their_rules_say(env_id):
    """Walked by hand: the rules in coordinates, without tables."""
    module, args, _ = tiny("ad_ed", env_id=env_id)
    tasks = np.concatenate(module.make_tasks(args))
    rooms, rng = module.Rooms(args, tasks), np.random.default_rng(0)
    state, places, found, hits = np.full(len(tasks), rooms.start), np.ones((len(tasks), 2), int), np.zeros(len(tasks), int), 0
    for _ in range(60):
        actions = rng.integers(5, size=len(tasks))
        state, rewards = rooms.step(state, actions)
        for i, (task, action) in enumerate(zip(tasks, actions)):
            places[i] = np.clip(places[i] + [(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)][action], 0, 2)
            cell = 3 * places[i][0] + places[i][1]
            hit = cell == task[0] if env_id == "DarkRoom" else found[i] < 2 and cell == task[found[i]]
            found[i] += hit
            assert rewards[i] == hit and state[i] % 9 == cell
        hits += rewards.sum()
    assert hits > 50 and (env_id == "DarkRoom" or found.max() == 2)


def test_the_source_learns_and_its_floor_is_that_of_its_probabilities():
    module = load_script("ad_ed")
    args = module.Args()
    tasks = np.repeat(module.make_tasks(args)[0], 10, 0)
    _, returns, floor = module.learning_histories(args, tasks, np.random.default_rng(0))
    optimum = module.Rooms(args, tasks).expected_returns(np.max).mean()
    assert returns[:, :2].mean() < 1 and returns[:, -3:].mean() > 0.9 * optimum
    args.exploration_fraction = 1e-9  # greedy from the start: once it has found the goal, all is certain but ties
    assert module.learning_histories(args, tasks, np.random.default_rng(0))[2] < floor
    args.exploration_fraction = 1e9  # random all along
    assert abs(module.learning_histories(args, tasks, np.random.default_rng(0))[2] - np.log(5)) < 1e-6


def test_tasks_that_are_held_out_are_held_out():
    module = load_script("ad_ed")
    for env_id, number in (("DarkRoom", 24), ("DarkKeyToDoor", 24 * 23)):
        splits = [module.make_tasks(module.Args(env_id=env_id, seed=seed)) for seed in (1, 2)]
        for train, test in splits:
            every = {tuple(task) for task in [*train, *test]}
            assert len(every) == number == len(train) + len(test) and len(test) == 6
        assert {tuple(t) for t in splits[0][1]} != {tuple(t) for t in splits[1][1]}


def test_streams_read_every_row_in_order_and_begin_at_the_first():
    module, rng = load_script("ad_ed"), np.random.default_rng(0)
    streams = module.Streams(7, 4, 6, rng)
    before, seen = None, 0
    for _ in range(30):
        history, rows, begins = streams.next(5, rng)
        assert np.array_equal(begins.numpy(), rows[:, 0] == 0)
        if before is not None:
            goes_on = ~begins.numpy()
            assert np.array_equal(history[goes_on], before[0][goes_on]) and (before[1][~goes_on, -1] == 19).all()
            assert np.array_equal(rows[goes_on, 0], before[1][goes_on, -1] + 1)
        before, seen = (history, rows), seen + begins.sum()
    assert 40 <= seen <= 50 and len(set(streams.window)) == 4  # staggered


def test_still_episodes_earn_nothing_and_memory_is_carried_on():
    module, args, agent = tiny("ad_mingru")
    rooms = module.Rooms(args, np.repeat(module.make_tasks(args)[0], 3, 0))
    temperature, state = torch.ones(len(rooms.tasks)), agent.initial_state(len(rooms.tasks))
    returns, state = module.play(agent, rooms, state, range(2), temperature, torch.Generator().manual_seed(0))
    again = module.play(agent, rooms, copy.deepcopy(state), range(2, 4), temperature, torch.Generator(), still=True)
    assert returns.any() and not again[0].any()
    assert all(torch.isfinite(s).all() and not torch.equal(s, t) for s, t in zip(again[1], state))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """script -> (folder, lines of output) of a finished run."""
    made = {}

    def of(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            made[script] = folder, run(folder, *FLAGS[script], script=script).splitlines()
        return made[script]

    return of


def assert_equal(one, other):
    ours, theirs = model(one), model(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert scalars(run_folder(one)) == scalars(run_folder(other))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_logs_saves_and_evaluates(finished, script):
    folder, out = finished(script)
    assert out[0].startswith(f"{script}: DarkRoom, 12 updates") and out[2].endswith(f"; runs/{run_folder(folder).name}")
    assert any(line.startswith("trained for 12 updates") and line.endswith("/model.pt") for line in out)
    assert sum(line.startswith("held-out task (") for line in out) == 2
    logged = scalars(run_folder(folder))
    assert set(logged) == LOGS and [step for step, _ in logged["losses/grad_norm"]] == list(range(12))
    assert [step for step, _ in logged["eval/episodic_return_temperature_1"]] == list(range(12, 20))
    again = run(folder, "--evaluate", run_folder(folder), script=script).splitlines()
    assert again == out[-len(again) :] and again[-1].startswith("evaluation: episodic_return=")
    assert not list(folder.glob("runs/*/*.partial"))
    assert_keeps_its_source(run_folder(folder), script)


@pytest.mark.parametrize("script", ["ad_ed", "ad_mingru"])
def test_equal_seeds_give_equal_runs_and_a_finished_run_is_logged_once(finished, tmp_path, script):
    run(tmp_path, *FLAGS[script], script=script)
    assert_equal(finished(script)[0], tmp_path)
    run(tmp_path, "--resume", run_folder(tmp_path), script=script)
    assert_equal(finished(script)[0], tmp_path)


@pytest.mark.parametrize(
    "script, stop", [("ad_ed", signal.SIGKILL), pytest.param("ad_mingru", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_resumes_exactly(finished, tmp_path, script, stop):
    more = ["--total-updates", 250, "--eval-runs", 1, "--checkpoint-interval", 3]
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    for place in (whole, folder):
        place.mkdir()
    run(whole, *FLAGS[script], *more, script=script)
    process = start(folder, *FLAGS[script], *more, script=script, paths=(ROOT,))
    while not list(folder.glob("runs/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(stop)
    out, _ = process.communicate()
    assert process.returncode == (-stop if stop == signal.SIGKILL else 128 + stop)
    assert stop == signal.SIGKILL or f"stopped; --resume {run_folder(folder).relative_to(folder)} goes on from" in out
    run(folder, "--resume", run_folder(folder), script=script)
    assert_equal(whole, folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_alone_computes_the_same(finished, tmp_path, script):
    copied = tmp_path / "my_agent.py"
    shutil.copy(path_of(script), copied)
    (tmp_path / "runs").mkdir()
    out = run(tmp_path, *FLAGS[script], script=copied, alone=True)
    assert out.startswith("my_agent: DarkRoom") and "evaluation: episodic_return=" in out
    losses = [[v for _, v in scalars(run_folder(f))["losses/cross_entropy"]] for f in (finished(script)[0], tmp_path)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


ERRORS = [
    (
        "ad_ed",
        "--chunk-length 7",
        r"--chunk-length 7 times --bptt-chunks 4: expected a divisor of a history's 352 rows, got 28",
    ),
    ("ad_ed", "--num-heads 3", r"--num-heads 3: expected a divisor of --hidden-size 64; change it"),
    ("ad_ed", "--room-size 4", r"--room-size 4: expected an odd number from 3.*raise it by one"),
    ("ad_ed", "--test-tasks 13", r"--test-tasks 13: expected at most half of the room's 24 tasks; lower it"),
    ("ad_ed", "--batch-rows 43", r"--batch-rows 43: expected at least one window, 44 rows; raise it"),
    ("ad_ed", "--mem-grad-scale 2", r"--mem-grad-scale: expected at most 1, got 2.0; lower it"),
    ("ad_ed", "--eval-temperatures -1", r"--eval-temperatures \(-1.0,\): expected numbers from 0 to 100; give 1 0.5"),
    ("ad_ed", "--resume nowhere", r"--resume: expected a file nowhere/checkpoint.pt, got none; see `ls runs`"),
    ("ad_full", "--context-length 5", r"--context-length 5: expected a divisor of a history's 352 rows, or 0 for all"),
    ("ad_mingru", "--chunk-length 11 --bptt-chunks 5", r"--chunk-length 11 times --bptt-chunks 5: expected a divisor"),
    ("ad_mingru", "--evaluate nowhere", r"--evaluate: expected a file nowhere/model.pt, got none"),
    ("ad_lru", "--r-min 2", r"--r-min, --r-max: expected 0 <= r_min <= r_max <= 1, got 2"),
]


@pytest.mark.parametrize("script, flags, message", ERRORS)
def test_errors_say_what_to_do(tmp_path, script, flags, message):
    found = fails(tmp_path, *flags.split(), script=script)
    assert re.search(message, found), found
    assert not list(tmp_path.iterdir())  # before anything is written


def test_a_resumed_run_keeps_its_data_and_takes_other_flags(finished, tmp_path):
    shutil.copytree(finished("ad_ed")[0] / "runs", tmp_path / "runs")
    folder = run_folder(tmp_path)
    found = fails(tmp_path, "--resume", folder, "--episodes", "6", script="ad_ed")
    assert "--episodes: this run keeps 8, got 6; leave it out, or start a new run" in found
    out = run(tmp_path, "--resume", folder, "--total-updates", "14", "--learning-rate", "1e-4", script="ad_ed")
    assert "trained for 14 updates" in out
    assert torch.load(folder / "model.pt", weights_only=True)["args"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_reads_like_documentation(script):
    text = " ".join(run(".", "--help", script=script).replace("│", " ").split())
    assert "A model learns to predict the actions of an agent that is itself learning" in text
    assert "find a hidden goal; or a hidden key, then a hidden door" in text and "(default: DarkRoom)" in text


@pytest.fixture
def probe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark" / "probes")
    import in_context

    return in_context


class Walker:
    """Walks at random until it is rewarded, then to that cell; it forgets the cell after so many episodes without a reward."""

    def __init__(self, room_size, patience):
        self.size, self.patience, self.head = room_size, patience, torch.nn.Linear(1, 1)

    def initial_state(self, number):
        return torch.full((number,), -1), torch.zeros(number)

    def step(self, rows, state):
        goal, without = state
        found = rows.reward > 0
        goal, without = torch.where(found, rows.cell, goal), torch.where(found, 0, without + (rows.step == 0))
        goal = torch.where(without > self.patience, -1, goal)
        (y, x), (to_y, to_x) = ((cell // self.size, cell % self.size) for cell in (rows.cell, goal))
        towards = torch.stack([goal == rows.cell, y > to_y, x < to_x, y < to_y, x > to_x], 1)  # stay, up, right, down, left
        return torch.where((goal >= 0)[:, None], towards * 100.0, 0), (goal, without)


@pytest.mark.parametrize("patience, lasts", [(1000, 12), (4, 3), (1, 0)])
def test_retention_is_how_long_a_memory_lasts(probe, patience, lasts):
    """The patience counts the episode of the test itself."""
    module, args, _ = tiny("ad_ed", episode_length=6, episodes=32)
    tasks = module.make_tasks(args)[0]
    for gap, (share, runs) in probe.retention(module, args, Walker(3, patience), 20, tasks).items():
        assert runs > 60
        assert share > 0.95 if gap <= lasts else share < 0.75, (gap, share)


def test_retention_is_that_of_the_runs_that_have_learned(probe):
    """In a large room some never find the goal."""
    module, args, _ = tiny("ad_ed", room_size=7, episode_length=6, episodes=32)
    tasks = module.make_tasks(args)[0]
    tasks = tasks[np.abs(np.stack(np.divmod(tasks[:, 0], 7)) - 3).sum(0) <= 4]
    found = probe.retention(module, args, Walker(7, 1000), 4, tasks)
    assert all(share > 0.99 and 10 < runs < 3 * len(tasks) for share, runs in found.values()), found


def test_the_probe_measures_a_run(probe, finished):
    for script in ("ad_ed", "ad_mingru"):
        run_dir = run_folder(finished(script)[0])
        figures, curves, kept = probe.measure(run_dir)
        assert figures["weights"] == sum(v.numel() for v in model(finished(script)[0]).values())
        assert len(curves[1]) == 8 and list(kept) == [0, 1, 2, 3] and figures["step_ms"] > 0
        assert figures["updates_to_floor"] == "" and figures["grad_50"] <= figures["grad_100"]
        rows = 64  # each row keeps its tokens at least
        assert 1e6 * figures["saved_mb"] > rows * 16 * 4 and figures["saved_row_kb"] > 0.064


@pytest.mark.slow
@pytest.mark.parametrize("script, least", [("ad_ed", 0.7), ("ad_mingru", 0.8), ("ad_linattn", 0.5)])
def test_in_context_learning_is_learned(tmp_path, script, least):
    out = run(tmp_path, script=script)
    line = next(line for line in out.splitlines() if line.startswith("temperature 0.5"))
    assert float(line.split("in-context learning ")[1].split(",")[0]) >= least, out
