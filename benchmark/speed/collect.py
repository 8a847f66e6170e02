"""Environment steps per second of single_files/dqn_tbb_ffm.py, acting but not learning, and what limits them.

    python benchmark/speed/collect.py                     # two cores; writes collect.csv
    python benchmark/speed/collect.py --threads 1 --env-id CartPole-v1

The script runs as it is, with --learning-starts beyond its last step, and reports its own time. Its parts are then timed by
themselves, in turn with it:
script         the whole loop: network, environments, storing of episodes, logging; on several cores also with one thread of
               PyTorch, since threads cost more than they bring where the network is small or others use the cores
environments   SyncVectorEnv.step with random actions, as the script makes it
one, wrapped   one environment's step and resets, with the script's wrappers, outside the vector environment
one, bare      the same without wrappers
network        the script's acting: QNetwork.step for all environments, greedy actions, random draws
rest           what environments and network leave of the script: storing, logging, Python
Bar: the script makes 20000 steps per second on two cores.
"""

import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from timing import ROOT, load_script, parser, print_bars, print_table, set_up, write_csv


def parse_args():
    out = parser(__doc__.split("\n")[0], threads=2, rounds=3, seconds=1.0)
    out.add_argument("--steps", type=int, default=100_000, help="environment steps of the script per turn")
    out.add_argument("--num-envs", type=int, help="parallel environments; left out, the script's default")
    out.add_argument("--env-id", help="environment; left out, the script's default")
    out.add_argument("--script", default=str(ROOT / "single_files" / "dqn_tbb_ffm.py"), help="the training script")
    return out.parse_args()


def run_script(args, options, threads):
    """Seconds per environment step, by the script's own clock, which leaves out its start."""
    flags = {
        "total-timesteps": args.steps,
        "learning-starts": 2 * args.steps,
        "eval-episodes": 0,
        "checkpoint-interval": 0,
        **options,
    }
    command = [sys.executable, args.script, *(f"--{name}={value}" for name, value in flags.items())]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:  # for its runs/
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.search(r"trained for ([\d,]+) steps, ([\d,]+) updates, ([\d.]+) seconds", done.stdout)
    if done.returncode or not found or found.group(2) != "0":
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return float(found.group(3)) / int(found.group(1).replace(",", ""))


def per_step(call, steps, seconds):
    """Seconds per environment step of a call that makes `steps` of them, over about `seconds`."""
    call()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        call()
        calls += 1
    return (time.perf_counter() - begin) / (calls * steps)


def stepper(env, actions):
    """A call that makes one step of one environment per action, and resets where an episode ends."""
    env.reset(seed=0)

    def call():
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return call


def parts(script, options):
    """{part: (call, environment steps that it makes)}."""
    own = script.Args(**{name.replace("-", "_"): value for name, value in options.items()})
    make, rng = script.make_env(own.env_id, own.env_kwargs, own.prev_action), np.random.default_rng(0)
    envs = gym.vector.SyncVectorEnv([make] * own.num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    begins, count = np.ones(own.num_envs, bool), envs.single_action_space.n
    q_network = script.QNetwork(envs, own)
    state = q_network.memory.initial_state(own.num_envs)
    actions = rng.integers(count, size=(64, own.num_envs)) + envs.single_action_space.start
    turn = 0

    def step():
        nonlocal turn
        envs.step(actions[turn % len(actions)])
        turn += 1

    def act():
        nonlocal state
        with torch.no_grad():
            q_values, state = q_network.step(obs, begins, state)
        random_actions = rng.integers(count, size=own.num_envs)
        return np.where(rng.random(own.num_envs) < 0.5, random_actions, q_values.argmax(dim=1).cpu().numpy())

    bare = make().unwrapped
    bare_actions = [bare.action_space.sample() for _ in range(64)]
    return own, {
        "environments": (step, own.num_envs),
        "one, wrapped": (stepper(make(), actions[:, 0].tolist()), len(actions)),
        "one, bare": (stepper(bare, bare_actions), len(bare_actions)),
        "network": (act, own.num_envs),
    }


if __name__ == "__main__":
    args = parse_args()
    if args.cpu_time:
        raise SystemExit("--cpu-time: the script reports time on the wall; drop the flag")
    where = set_up(args)
    print(where)
    import gymnasium as gym
    import torch

    options = {name: value for name, value in (("env-id", args.env_id), ("num-envs", args.num_envs)) if value}
    own, calls = parts(load_script(args.script), options)
    runs = {"script": args.threads, "script, one thread": 1} if args.threads > 1 else {"script": 1}
    found = {name: [] for name in (*runs, *calls)}
    for _ in range(args.rounds):
        for name, threads in runs.items():
            found[name].append(run_script(args, options, threads))
        for name, (call, steps) in calls.items():
            found[name].append(per_step(call, steps, args.seconds))

    rows, whole = [], np.array(found["script"])
    found["rest"] = whole - np.array(found["environments"]) - np.array(found["network"])
    for name, values in found.items():
        median, least = float(np.median(values)), float(np.min(values))
        row = {"what": name, "median_us_per_step": 1e6 * median, "min_us_per_step": 1e6 * least}
        row |= {"steps_per_s": int(1 / median)} if name != "rest" else {}
        row |= {"share_of_script": median / float(np.median(whole)), "share_min": least / float(whole.min())}
        rows.append(row)
    print_table(rows, f"{own.env_id}, {own.num_envs} environments")
    bar = f"{own.env_id}: thousand steps per second on {args.threads} cores"
    print_bars([(bar, ">=", 20, (1e-3 / float(np.median(whole)), 1e-3 / float(whole.min())))])
    write_csv("collect", f"{where}; {own.env_id}, {own.num_envs} environments", rows, args)
