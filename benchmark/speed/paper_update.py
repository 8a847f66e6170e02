"""One training update of the paper's own JAX code, as the time to beat. Needs `pip install "cleanrl-memoroid[bench]"`.

The code is imported from a clone of github.com/proroklab/memory-monoids (Morad et al. 2024), which stays unedited. Names
that later JAX and Equinox releases dropped are put back at run time, and its environment packages are replaced by empty
modules while it is imported, so popgym is not needed. One update is its `tape_update` under `eqx.filter_jit`: the Double
DQN loss with three passes over the tape (Q of obs; Q and target Q of next_obs), gradients, zero_nans, clipping, AdamW with
its warm-up schedule, and the Polyak step of the target network.

    git clone https://github.com/proroklab/memory-monoids && git -C memory-monoids checkout fbdda1f
    python benchmark/speed/paper_update.py --repo memory-monoids --memory ffm --rows 1000

XLA takes every core. For one core: `taskset -c 0`, with
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".
"""

import argparse
import contextlib
import importlib
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np

try:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    raise ImportError('the paper\'s update needs jax, equinox and optax: pip install "cleanrl-memoroid[bench]"') from error

# name: (its module, its class, its arguments), as in experiments/*/tape_*.yaml; ffm16 is repeat_previous_easy's.
# Each reads and writes 256 features.
MEMORIES = {
    "ffm": ("memory.ffm", "FFM", dict(trace_size=64, context_size=4, output_size=256)),
    "ffm16": ("memory.ffm", "FFM", dict(trace_size=16, context_size=16, output_size=256)),
    "lru": ("memory.lru", "StackedLRU", dict(d_model=256, d_hidden=128, n_layers=2)),
    "s5": ("memory.s5", "StackedS5", dict(n_layers=2, d_model=256, ssm_size=256, blocks=1)),
    "linear_transformer": ("memory.linear_transformer", "LinearAttention", dict(key_size=16, value_size=16)),
}
HIDDEN = 256  # mlp_size and recurrent_size
NETWORK = dict(mlp_size=HIDDEN, recurrent_size=HIDDEN, dropout=0.0, ensemble_size=1)
UPDATES = 5000  # of a whole run, which sets the length of the learning rate schedule


@contextlib.contextmanager
def import_from(repo):
    """Import the repository's top-level modules (`memory`, `losses`, ...) as if alone: empty stand-ins for what its utils.py
    imports, and sys.path and sys.modules afterwards as they were. Yields a function from a module's name to the module."""
    stand_ins = {name: types.ModuleType(name) for name in ("gymnasium", "popgym", "popgym.wrappers", "memory")}
    for name in ("Antialias", "PreviousAction", "Flatten", "DiscreteAction"):
        setattr(stand_ins["popgym.wrappers"], name, None)
    stand_ins["memory"].__path__ = [str(repo / "memory")]  # it has no __init__.py, so an installed `memory` would win
    roots = {path.stem for path in repo.glob("*.py")} | {name.partition(".")[0] for name in stand_ins}

    def take_out():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in roots}

    others, path = take_out(), list(sys.path)
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(repo))
    try:
        yield importlib.import_module
    finally:
        take_out()
        sys.modules.update(others)
        sys.path[:] = path


def restore_names():
    """Put back the function names of JAX 0.4.19 and Equinox of that time, where this installation lacks them."""
    dropped = ((jax, "tree_map", jax.tree_util.tree_map), (eqx, "tree_inference", eqx.nn.inference_mode))
    for owner, name, replacement in dropped:
        with warnings.catch_warnings():  # a release between the two warns on lookup
            warnings.simplefilter("ignore", DeprecationWarning)
            if not hasattr(owner, name):
                setattr(owner, name, replacement)


def check_repository(repo_path):
    """The path as a resolved `Path`; ValueError if the paper's repository is not there."""
    repo = Path(repo_path).expanduser().resolve()
    missing = [name for name in ("losses.py", "modules.py", "memory/ffm.py") if not (repo / name).is_file()]
    if missing or "def tape_update(" not in (repo / "losses.py").read_text():
        raise ValueError(
            f"repo_path: expected a clone of proroklab/memory-monoids, got {repo}, which lacks "
            f"{', '.join(missing) or 'tape_update in losses.py'}. To get it:\n"
            "  git clone https://github.com/proroklab/memory-monoids && git -C memory-monoids checkout fbdda1f"
        )
    return repo


def synthetic_tape(rows, obs_size, actions, episode, seed):
    """A tape in the format of the paper's `TapeBuffer.sample`: dict of numpy arrays [rows, ...], whole episodes of
    0.8 to 1.2 times `episode` steps except the last, which is cut. Episodes terminate; none is truncated."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(int(0.8 * episode), int(1.2 * episode) + 1, size=2 + rows // int(0.8 * episode))
    observations = [rng.standard_normal((n + 1, obs_size)).astype(np.float32) for n in lengths]
    last = np.concatenate([np.arange(n) == n - 1 for n in lengths])
    tape = {
        "observation": np.concatenate([o[:-1] for o in observations]),
        "action": rng.integers(actions, size=len(last), dtype=np.int32),
        "next_reward": rng.standard_normal(len(last)).astype(np.float32),
        "next_observation": np.concatenate([o[1:] for o in observations]),
        "start": np.concatenate([np.arange(n) == 0 for n in lengths]),
        "next_terminated": last,
        "next_truncated": np.zeros_like(last),
        "next_done": last,
        "episode_id": np.repeat(np.arange(len(lengths)), lengths),
    }
    return {name: values[:rows] for name, values in tape.items()}


def paper_update(
    repo_path,
    memory="ffm",
    rows=1000,
    obs_size=8,
    actions=4,
    gamma=0.99,
    target_delay=200,
    clip=0.01,
    learning_rate=1e-4,
    warmup=200,
    episode=100,
    seed=0,
):
    """Build the paper's network, target, optimiser and a synthetic tape, and compile one update.

    Args:
        repo_path: clone of the paper's repository; read only.
        memory: a key of `MEMORIES`.
        rows, obs_size, actions: tape length (transitions); observation size; number of actions.
        gamma: discount. target_delay: updates; the target moves by 1 / target_delay per update.
        clip: global gradient norm. learning_rate: peak, reached after `warmup` updates.
        episode: average episode length (steps). seed: of the weights and the tape.
    Returns: callable without arguments. Each call makes one update, which the next one continues from, waits until the
        networks and the optimiser state are computed, and returns the loss (float). It carries `compile_seconds`,
        `parameters` (count) and `tape` (dict of numpy arrays [rows, ...]).
    Raises: ValueError if `repo_path` is not the paper's repository, or `memory` is unknown.
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory: expected one of {', '.join(MEMORIES)}, got {memory!r}")
    repo = check_repository(repo_path)
    restore_names()
    module, name, sizes = MEMORIES[memory]
    with import_from(repo) as load:
        update, network_class, memory_class = load("losses").tape_update, load("modules").RecurrentQNetwork, load(module)
    memory_class = getattr(memory_class, name)

    model_key, memory_key, loss_key = jax.random.split(jax.random.PRNGKey(seed), 3)

    def network():
        return network_class((obs_size,), actions, memory_class(HIDDEN, **sizes, key=memory_key), NETWORK, model_key)

    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, warmup, UPDATES, end_value=learning_rate)
    optimizer = optax.chain(
        optax.zero_nans(), optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=0.0, eps=1e-8)
    )
    q_network, q_target = network(), eqx.tree_inference(network(), True)
    opt_state = optimizer.init(eqx.filter(q_network, eqx.is_inexact_array))
    tape, discount, jitted = synthetic_tape(rows, obs_size, actions, episode, seed), jnp.array([gamma]), eqx.filter_jit(update)

    def call():
        nonlocal q_network, q_target, opt_state
        out = jitted(q_network, q_target, tape, optimizer, opt_state, discount, 1 / target_delay, loss_key)
        q_network, q_target, opt_state, *_, loss, _ = jax.block_until_ready(out)
        return float(loss)

    begin = time.perf_counter()
    call()
    call.compile_seconds, call.tape = time.perf_counter() - begin, tape
    call.parameters = sum(leaf.size for leaf in jax.tree_util.tree_leaves(eqx.filter(q_network, eqx.is_inexact_array)))
    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time one update of the paper's JAX code.")
    parser.add_argument("--repo", required=True, help="clone of github.com/proroklab/memory-monoids at fbdda1f")
    parser.add_argument("--memory", nargs="+", default=["ffm"], choices=list(MEMORIES), help="memory models to time")
    parser.add_argument("--rows", type=int, default=1000, help="tape length (transitions)")
    parser.add_argument("--repeats", type=int, default=30, help="timed updates, after the compiling one and two more")
    args = parser.parse_args()
    for memory in args.memory:
        try:
            call = paper_update(args.repo, memory, args.rows)
        except ValueError as error:
            parser.error(str(error))
        times = []
        for _ in range(2 + args.repeats):
            begin = time.perf_counter()
            loss = call()
            times.append(1e3 * (time.perf_counter() - begin))
        times = times[2:]
        print(
            f"{memory} rows {args.rows} parameters {call.parameters} compile_s {call.compile_seconds:.1f} "
            f"median_ms {np.median(times):.1f} min_ms {min(times):.1f} loss {loss:.4f}",
            flush=True,
        )
