"""Sparse students: the mathematics of their training, compaction, and the life of the scripts as in test_scripts.py."""

import functools
import json
import os
import re
import shutil
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scripts import (
    ROOT,
    assert_equal_runs,
    assert_keeps_its_source,
    fails,
    kill_and_resume,
    last_return,
    load_script,
    model,
    run,
    run_folder,
    scalars,
    start,
)

from cleanrl_memoroid import export as exporting
from cleanrl_memoroid.export_c import compiled, write_c
from cleanrl_memoroid.students import compact, costs
from cleanrl_memoroid.trace import trace

FLAGS = """--updates 100 --fine-tune-updates 100 --data-episodes 6 --heldout-episodes 2 --batch-episodes 2 --hidden-size 8
    --state-size 4 --eval-episodes 4 --checkpoint-interval 25"""
LOGS = """charts/teacher_return charts/data_return charts/random_return charts/learning_rate charts/eta charts/sparsity
    charts/pruned_performance losses/clone_loss losses/kl losses/grad_norm losses/fine_tuned_clone_loss eval/episodic_return
    eval/normalised_performance"""


class Script(NamedTuple):
    teacher: str  # the script of its teacher
    flags: str  # of a teacher of a second or two


SCRIPTS = {
    "bpd_tbb_lru_continuous_action": Script(
        "ppo_tbb_lru_continuous_action",
        """--total-timesteps 1024 --num-envs 8 --num-steps 16 --num-minibatches 2 --update-epochs 1 --hidden-size 16
        --state-size 4 --env-kwargs max_episode_length 20""",
    ),
    "bpd_tbb_lru": Script(
        "dqn_tbb_lru",
        "--total-timesteps 600 --num-envs 10 --learning-starts 520 --train-frequency 16 --hidden-size 16 --state-size 4",
    ),
}
CONTINUOUS, CRITICS = "bpd_tbb_lru_continuous_action", "bpd_q_tbb_lru_continuous_action"
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def bpd():
    return load_script(CONTINUOUS)


@pytest.fixture(scope="module")
def bpd_q():
    return load_script(CRITICS)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """script -> the run directory of a teacher that has hardly learned."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp("teacher")
        flags = f"{SCRIPTS[script].flags} --eval-episodes 0 --checkpoint-interval 0"
        run(folder, *flags.split(), script=SCRIPTS[script].teacher)
        return run_folder(folder)

    return of


@pytest.fixture(scope="session")
def finished(tmp_path_factory, teacher):
    """script -> (folder, lines of output) of a finished run."""

    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp(script)
        flags = [*FLAGS.split(), "--teacher", str(teacher(script))]
        return folder, run(folder, *flags, script=script).splitlines()

    return of


def test_the_divergence_is_that_of_molchanov(bpd):
    """KL + constant = -0.5 log alpha + E log |N(1, alpha)| + 0.63518, by numerical integration."""
    log_alpha = np.linspace(-7, 3, 21)
    draws = np.linspace(-9, 9, 400_001)
    density = np.exp(-(draws**2) / 2) / np.sqrt(2 * np.pi) * (draws[1] - draws[0])
    expected = [np.sum(density * np.log(np.abs(1 + np.exp(a / 2) * draws) + 1e-12)) - 0.5 * a + 0.63518 for a in log_alpha]
    found = [bpd.kl_divergence(torch.tensor([a])).item() for a in log_alpha]
    np.testing.assert_allclose(found, expected, atol=0.012)
    assert bpd.kl_divergence(torch.tensor([20.0])).item() == pytest.approx(0, abs=1e-4)
    assert bpd.kl_divergence(torch.tensor([1.0, 2.0])).item() == pytest.approx(
        sum(bpd.kl_divergence(torch.tensor([a])).item() for a in (1.0, 2.0)), rel=1e-5
    )


def test_the_noise_of_outputs_is_that_of_weights(bpd):
    """Mean and variance of the local reparametrisation against draws of the weights themselves."""
    layer, rng = bpd.SparseLinear(3, 2, 1.0), np.random.default_rng(0)
    layer.log_sigma2.data = torch.linspace(-3, 0.5, 6).view(2, 3)
    layer.bias.data = torch.tensor([0.3, -1.0])
    x = torch.tensor([[0.5, -2.0, 1.5]])
    found = layer(x.expand(200_000, 3), rng).detach()
    weights = layer.weight + (0.5 * layer.log_sigma2).exp() * torch.randn(200_000, 2, 3)
    drawn = (torch.einsum("noi,i->no", weights, x[0]) + layer.bias).detach()
    torch.testing.assert_close(found.mean(0), drawn.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(found.var(0), drawn.var(0), atol=0.03, rtol=0.02)
    assert abs(torch.corrcoef(torch.stack([found[:-1, 0], found[1:, 0]]))[0, 1]) < 0.01  # anew for each row


def test_a_weight_at_zero_has_a_finite_gradient(bpd):
    layer = bpd.SparseLinear(3, 2, 0.0)
    loss = bpd.kl_divergence(layer.log_alpha()) + layer(torch.zeros(4, 3), np.random.default_rng(0)).square().sum()
    loss.backward()
    for parameter in (layer.weight, layer.log_sigma2):
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(
    "schedule, values", [("linear", [0, 0, 1, 2, 2]), ("exp", [2e-3, None, None, 2, 2]), ("constant", [2, 2, 2, 2, 2])]
)
def test_schedules(bpd, schedule, values):
    args = bpd.Args(eta_schedule=schedule, eta_max=2.0, eta_start=0.2, eta_end=0.6)
    found = [bpd.kl_weight(done, args) for done in (0, 0.2, 0.4, 0.6, 1)]
    assert found == sorted(found)
    for value, expected in zip(found, values):
        assert expected is None or value == pytest.approx(expected)


def test_pruning_takes_the_least(bpd):
    student = bpd.Student(3, 2, 4, 5, 6)
    for i, layer in enumerate(student.layers().values()):
        layer.log_sigma2.data += i + torch.rand_like(layer.log_sigma2)
    total = sum(layer.weight.numel() for layer in student.layers().values())
    for by in ("log_alpha", "weight"):
        assert bpd.prune(student, by, "sparsity", 0.8) is student
        score = [layer.log_alpha() if by == "log_alpha" else -layer.weight.abs() for layer in student.layers().values()]
        kept, dropped = (
            torch.cat([s[layer.mask == value] for s, layer in zip(score, student.layers().values())]) for value in (1, 0)
        )
        assert len(dropped) == round(0.8 * total) and dropped.min() >= kept.max()
    bpd.prune(student, "log_alpha", "threshold", -6.0)
    for layer in student.layers().values():
        assert torch.equal(layer.mask == 1, layer.log_alpha() < -6)
    bpd.prune(student, "weight", "sparsity", 0.0)
    assert all(layer.mask.all() for layer in student.layers().values())


def planted(bpd):
    """A sparse student with constant units, channels that a bias alone or nobody writes, and units that nobody reads."""
    student = bpd.Student(3, 2, 8, 6, 9)
    for layer in student.layers().values():
        layer.bias.data += 0.5 * torch.randn_like(layer.bias)
        layer.mask.copy_(torch.rand_like(layer.mask) < 0.4)
    E, B, R, V = student.layers().values()
    B.bias.data.zero_()
    E.mask[[1, 4]] = 0  # constants
    B.mask[[2, 8]] = 0  # the channel 2, of the constant unit 1 alone
    B.mask[2, 1] = 1
    B.mask[[3, 9]] = 0  # nobody writes
    R.mask[:, [5, 11]] = 0  # nobody reads
    R.mask[:, [2, 3]] = 1
    R.mask[[3, 4]] = 0  # constants, one of them cut off by relu
    R.bias.data[[3, 4]] = torch.tensor([-0.7, 0.6])
    V.mask[:, [3, 4, 5, 6]] = torch.tensor([1.0, 1.0, 0.0, 0.0])  # nobody reads 5 and 6
    E.mask[6], B.mask[:, 6], R.mask[:, 12 + 6] = 1, 0, 0  # nobody reads unit 6
    return student


def test_a_compacted_student_acts_the_same(bpd, tmp_path):
    """Masked along a tape, masked step by step, compacted, in NumPy and in C; two episodes."""
    student = planted(bpd)
    obs, begins = torch.randn(40, 3), torch.zeros(40, dtype=torch.bool)
    begins[[0, 23]] = True
    expected = student(obs, begins).detach()
    small = compact(bpd.deployed(student))
    units = costs(small)["units"]
    assert units[0] <= 5 and units[1] <= 4 and units[2] <= 5, units
    agent = bpd.student_of(small)
    torch.testing.assert_close(agent(obs, begins), expected, atol=1e-5, rtol=1e-5)
    program = trace(agent, 3, agent.initial_state(1))
    exporting.write_npz(program, tmp_path / "policy.npz")
    steps = [exporting.NumpyPolicy(tmp_path / "policy.npz").step]
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        for sparse in (0, 1):
            folder = tmp_path / str(sparse)
            folder.mkdir()
            write_c(program, folder / "policy.h", "a test", sparse)
            steps.append(compiled(folder / "policy.h", folder))
    for step in steps:
        state = exporting.flat(agent.initial_state(1))
        for t in range(40):
            action, state = step(obs[t].numpy(), bool(begins[t]), state)
            np.testing.assert_allclose(action, expected[t], atol=1e-5)
    for one in (student, agent):
        state = one.initial_state(1)
        for t in range(40):
            action, state = one.step(obs[t : t + 1].numpy(), begins[t : t + 1].numpy(), state)
            torch.testing.assert_close(action[0], expected[t], atol=1e-5, rtol=1e-5)


def test_nothing_may_be_left(bpd):
    student = bpd.Student(3, 2, 4, 5, 6)
    student.V.bias.data = torch.tensor([0.2, -0.4])
    bpd.prune(student, "weight", "sparsity", 0.999)
    for layer in student.layers().values():
        layer.mask.zero_()
    small = bpd.student_of(compact(bpd.deployed(student)))
    obs, begins = torch.randn(5, 3), torch.tensor([True, False, False, True, False])
    torch.testing.assert_close(small(obs, begins), torch.tanh(torch.tensor([0.2, -0.4])).expand(5, 2))
    assert costs(bpd.deployed(small))["units"] == [1, 1, 1]
    program = trace(small, 3, small.initial_state(1))
    assert program.code[program.outputs["action"]].size == 2


def test_the_loop_of_the_file_is_the_scan(bpd, monkeypatch):
    memory = bpd.SparseLRU(3, 8, 6, 9)
    obs, begins = torch.randn(30, 3), torch.rand(30) < 0.2
    begins[0] = True
    expected = memory(obs, begins)
    monkeypatch.setattr(bpd, "linear_scan", None)
    torch.testing.assert_close(memory(obs, begins), expected, atol=1e-5, rtol=1e-5)


def tape_of(bpd_q):
    """Episodes of two and three transitions, the first terminated, the second cut off."""
    begins, final = torch.tensor([1, 0, 0, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 1, 0, 0, 0, 1]).bool()
    terminations = torch.tensor([0, 1, 0, 0, 0, 0, 0]).bool()
    numbers = torch.arange(7.0)
    return bpd_q.Tape(numbers[:, None], begins, final, numbers[:, None], numbers[:, None], numbers, terminations)


def test_targets_of_the_critics(bpd_q):
    values = torch.stack([10.0 * torch.arange(7), 10.0 * torch.arange(7) + torch.tensor([1, -1, 1, -1, 1, -1, 1])])
    found = bpd_q.critic_target(tape_of(bpd_q), values, 0.5)
    # transitions 0, 1, 3, 4, 5; the next rows' smaller values are 9 at row 1, 40 at 4, 49 at 5, 60 at 6
    torch.testing.assert_close(found, torch.tensor([0 + 4.5, 1.0, 3 + 20.0, 4 + 24.5, 5 + 30.0]))


def test_slow_copies_follow_and_the_pair_learns_when_it_is_due(bpd_q):
    args, rng = bpd_q.Args(tau=0.25, critic_frequency=2), np.random.default_rng(0)
    student, tape = bpd_q.Student(1, 1, 4, 3, 4), tape_of(bpd_q)
    critics = bpd_q.Critics(student, 1, 1, args)
    slow, before = critics.slow_student.V.bias.clone(), critics.pair.heads[0][0].bias.clone()
    student.V.bias.data += 1
    assert set(critics.learn(tape, student, 2, rng, args)) == {"qf_loss"}
    torch.testing.assert_close(critics.slow_student.V.bias, slow + 0.25)
    after = critics.pair.heads[0][0].bias.clone()
    assert not torch.equal(after, before) and torch.equal(critics.slow.heads[0][0].bias, before)
    assert critics.learn(tape, student, 3, rng, args) == {}  # not due
    torch.testing.assert_close(critics.slow.heads[0][0].bias, before + 0.25 * (after - before))
    assert torch.equal(critics.pair.heads[0][0].bias, after)
    losses = {}
    loss = bpd_q.student_loss(student, critics, tape, losses, args)
    torch.testing.assert_close(loss, losses["clone_loss"] - losses["lambda"] * losses["q_values"])
    torch.testing.assert_close(losses["clone_loss"], bpd_q.clone_loss(student, tape))


def test_samples_are_whole_episodes(bpd_q):
    tape = tape_of(bpd_q)
    sample = tape.sample(50, np.random.default_rng(0), "cpu")
    starts = [*sample.begins.nonzero().flatten().tolist(), len(sample.obs)]
    found = {tuple(sample.rewards[a:b].tolist()) for a, b in zip(starts, starts[1:])}
    assert found == {(0, 1, 2), (3, 4, 5, 6)} and len(starts) == 51
    torch.testing.assert_close(tape.episodes([1, 0]).obs.flatten(), torch.tensor([3.0, 4, 5, 6, 0, 1, 2]))


class Counter:
    """A teacher whose action is what its memory holds: the steps since its episode began, over ten."""

    def initial_state(self, num_envs):
        return torch.zeros(num_envs, 1)

    def step(self, obs, begins, state):
        state = torch.where(torch.as_tensor(begins)[:, None], 0, state) + 1
        return (state / 10).expand(-1, 2).clone(), state


def test_the_data_are_the_teachers_episodes(bpd, bpd_q):
    args, make = bpd_q.Args(data_noise=0.01, gamma=0.5), [bpd.make_env("counting_env:CountingBox-v0", {})] * 7
    tape, returns = bpd_q.collect(Counter(), make, args, np.random.default_rng(0))
    less, same = bpd.collect(Counter(), make, args, np.random.default_rng(0))
    assert returns == same  # without actions, rewards and ends, of which only critics learn
    assert all(torch.equal(getattr(less, name), getattr(tape, name)) for name in less._fields)
    starts = [*tape.begins.nonzero().flatten().tolist(), len(tape.obs)]
    assert len(starts) == 8
    unit = None
    for i, (a, b) in enumerate(zip(starts, starts[1:])):
        rows = tape.episodes([i])
        assert rows.obs[:, 2].tolist() == list(range(b - a))  # steps of the episode, the final observation included
        assert rows.final.tolist() == [False] * (b - a - 1) + [True]
        torch.testing.assert_close(rows.labels[:-1, 0], torch.arange(1, b - a) / 10)
        noise = (rows.actions - rows.labels)[:-1]
        assert 0 < noise.abs().max() < 0.06
        unit = unit or rows.rewards[0].item()
        torch.testing.assert_close(rows.rewards[:-1] / unit, torch.arange(1.0, b - a))
        assert rows.terminations[-2] == (rows.obs[0, 1] % 2 == 0) and not rows.terminations[:-2].any()
        assert returns[i] == sum(range(1, b - a))


def test_noise_lasts_as_it_is_told(bpd, bpd_q):
    for memory in (0.0, 0.8):
        args, make = bpd_q.Args(data_noise=0.1, noise_memory=memory), [bpd.make_env("counting_env:CountingBox-v0", {})] * 300
        tape, _ = bpd_q.collect(Counter(), make, args, np.random.default_rng(0))
        noise = (tape.actions - tape.labels)[:, 0]
        pairs = ~tape.final[:-1] & ~tape.final[1:]
        together = torch.stack([noise[:-1][pairs], noise[1:][pairs]])
        assert torch.corrcoef(together)[0, 1].item() == pytest.approx(memory, abs=0.08)
        assert noise[~tape.final].std().item() == pytest.approx(0.1, rel=0.1)


def test_finite_actions(bpd):
    """One-hot actions of the largest sum, numbers from where the space starts, cross entropy."""
    import counting_env
    import gymnasium as gym

    finite = load_script("bpd_tbb_lru")
    labels = np.float32([[0.9, 0.1, 0], [0.2, 0.3, 0.5]])
    np.testing.assert_array_equal(finite.execute(labels, np.float32([[0, 0, 0.2], [0, 0.3, 0]])), [[1, 0, 0], [0, 1, 0]])
    envs = gym.vector.SyncVectorEnv([counting_env.Counting] * 2)  # its actions are 5, 6 and 7
    np.testing.assert_array_equal(finite.env_actions(envs, labels), [5, 7])
    scores, labels = torch.randn(3, 3), torch.from_numpy(np.vstack([labels, labels[:1]]))
    tape = finite.Tape(torch.zeros(3, 1), torch.zeros(3).bool(), torch.tensor([False, False, True]), labels)
    found = finite.clone_loss(lambda obs, begins, rng: torch.softmax(scores, -1), tape)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(scores[:2], labels[:2]))


@every_script
def test_a_run_logs_saves_reports_and_evaluates(finished, script):
    folder, out = finished(script)
    assert out[0].startswith(f"{script}: popgym-") and out[1].endswith(f"; runs/{run_folder(folder).name}")
    assert re.fullmatch(r"evaluation: episodic_return=-?\d\.\d{4}, the mean of 4 greedy episodes of popgym\S+", out[-1])
    logged = scalars(run_folder(folder))
    assert set(logged) == set(LOGS.split())
    assert [step for step, _ in logged["eval/episodic_return"]] == list(range(200, 204))
    again = run(folder, "--evaluate", run_folder(folder), script=script)
    assert again.splitlines()[-1] == out[-1]
    report = json.loads((run_folder(folder) / "report.json").read_text())
    (cut,) = report["cuts"]
    assert {*cut["layers"]} == {"memory.E", "memory.B", "memory.R", "V"} and 0 <= cut["sparsity"] <= 100
    assert report["transitions"] == 6 * (20 if script == CONTINUOUS else 51)
    assert not list(folder.glob("runs/*/*.partial"))
    assert_keeps_its_source(run_folder(folder), script)


def test_equal_seeds_give_equal_runs_and_others_do_not(finished, teacher, tmp_path):
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        flags = [*FLAGS.split(), "--teacher", str(teacher(CONTINUOUS)), "--seed", seed]
        run(tmp_path / seed, *flags, script=CONTINUOUS)
    assert_equal_runs(finished(CONTINUOUS)[0], tmp_path / "1", CONTINUOUS)
    one, other = (model(tmp_path / seed) for seed in ("1", "2"))
    assert [k for k in one if one[k].shape != other[k].shape or not torch.equal(one[k], other[k])]


def test_a_killed_run_resumes_exactly(finished, teacher, tmp_path):
    flags = [*FLAGS.split(), "--teacher", str(teacher(CONTINUOUS))]
    kill_and_resume(finished(CONTINUOUS)[0], tmp_path, flags, [(2, 3)], CONTINUOUS)


@every_script
def test_a_finished_run_that_is_resumed_is_logged_once(finished, tmp_path, script):
    shutil.copytree(finished(script)[0] / "runs", tmp_path / "runs")
    run(tmp_path, "--resume", run_folder(tmp_path), script=script)
    assert_equal_runs(finished(script)[0], tmp_path, script)


@pytest.mark.slow
def test_a_stopped_run_saves_and_says_how_to_go_on(finished, teacher, tmp_path):
    flags = [*FLAGS.split(), "--updates", "100000", "--teacher", str(teacher(CONTINUOUS))]
    process = start(tmp_path, *flags, script=CONTINUOUS)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert re.search(r"stopped; --resume runs/\S+ goes on from update [\d,]+", out)


@every_script
def test_the_file_alone_runs(finished, teacher, tmp_path, script):
    copy = tmp_path / "my_student.py"
    shutil.copy(ROOT / "single_files" / f"{script}.py", copy)
    teacher_script = ROOT / "single_files" / f"{SCRIPTS[script].teacher}.py"
    flags = [*FLAGS.split(), "--updates", "20", "--teacher", str(teacher(script)), "--teacher-script", str(teacher_script)]
    out = run(tmp_path, *flags, script=copy, alone=True)
    assert out.startswith("my_student: popgym-") and "this file's own loop" in out
    shown = last_return(out)
    assert shown == last_return(run(tmp_path, "--evaluate", run_folder(tmp_path), script=copy, alone=True))


@pytest.mark.parametrize(
    "flags, made",
    [
        ("--student dense --label executed", "sparsity 0"),
        ("--student magnitude --target-sparsity 0.9", "sparsity 0.9"),
        ("--student l1 --target-sparsity 0.8 0.9 --l1-coef 0.01", "sparsity 0.9"),
        ("--eta-schedule constant --c-threshold 1 3", "threshold 3"),
        ("--no-bc --q-coef 1 --c-threshold 1 3 --eta-schedule exp", "threshold 3"),
    ],
)
def test_arms(teacher, tmp_path, flags, made):
    script = CRITICS if "q-coef" in flags else CONTINUOUS
    out = run(tmp_path, *FLAGS.split(), *flags.split(), "--teacher", str(teacher(CONTINUOUS)), script=script)
    report = json.loads((run_folder(tmp_path) / "report.json").read_text())
    assert report["cuts"][-1]["cut"] == made and "evaluation: episodic_return=" in out
    if "sparsity 0." in made:
        assert report["cuts"][-1]["sparsity"] == pytest.approx(100 * float(made.split()[1]), abs=0.2)
    logged = scalars(run_folder(tmp_path))
    assert np.isfinite([value for name in logged if name.startswith("losses") for _, value in logged[name]]).all()


ERRORS = [
    (CONTINUOUS, "", "--teacher: expected a run directory, got none, .*python single_files/ppo_tbb_lru_continuous_action.py"),
    (CONTINUOUS, "--teacher nowhere", "--teacher: expected a file nowhere/model.pt, got none; see `ls runs`"),
    (
        CONTINUOUS,
        "--teacher TEACHER --teacher-script no.py",
        "--teacher-script: expected the file ppo_tbb_lru_cont.*none at no.py",
    ),
    (CONTINUOUS, "--target-sparsity 1.5", "--target-sparsity: expected shares below 1, got .*1.5.*; 0.97 leaves"),
    (CONTINUOUS, "--student magnitude", "--target-sparsity: magnitude prunes as it trains, to one, got .*; name one"),
    (CONTINUOUS, "--student dense --c-threshold 3", "--c-threshold: expected --student svd, got dense"),
    (CRITICS, "--teacher TEACHER --no-bc --q-coef 0", "--no-bc: expected a --q-coef above 0"),
    (CONTINUOUS, "--updates 0", "--updates: expected at least 1, got 0"),
    (CONTINUOUS, "--resume nowhere", "--resume: expected a file nowhere/checkpoint.pt, got none"),
    (CONTINUOUS, "--teacher TEACHER --r-min 2", "--r-min, --r-max: expected 0 <= r_min <= r_max <= 1, got 2"),
    (CONTINUOUS, "--teacher OTHER", "--teacher: expected Box actions, got Discrete.*bpd_tbb_lru.py"),
    ("bpd_tbb_lru", "--teacher OTHER", "--teacher: expected one finite choice, got Box.*bpd_tbb_lru_continuous_action.py"),
]


@pytest.mark.parametrize("script, flags, message", ERRORS)
def test_errors_say_what_to_do(teacher, tmp_path, script, flags, message):
    own = CONTINUOUS if script == CRITICS else script
    other = next(name for name in SCRIPTS if name != own)
    if "OTHER" in flags:
        flags = flags.replace("OTHER", str(teacher(other)))
    flags = flags.replace("TEACHER", str(teacher(own))) if "TEACHER" in flags else flags
    small = "--data-episodes 1 --heldout-episodes 1 --eval-episodes 1" if "--no-bc" in flags else ""
    found = fails(tmp_path, *flags.split(), *small.split(), script=script)
    assert re.search(message, found), found


@every_script
def test_students_are_exported(finished, tmp_path, script):
    for to in ("c", "npz"):
        path, error = exporting.export(run_folder(finished(script)[0]), to, tmp_path, steps=100)
        assert os.path.exists(path) and (error is None or error < exporting.TOLERANCE)


@pytest.mark.slow
@every_script
def test_a_student_of_a_trained_teacher_is_small_and_as_good(tmp_path, script):
    """The scripts as they come: teacher, then student."""
    run(tmp_path, script=SCRIPTS[script].teacher)
    run(tmp_path, script=script)
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/report.json"))
    assert report["cuts"][0]["sparsity"] >= 95 and report["cuts"][0]["performance"] >= 95
