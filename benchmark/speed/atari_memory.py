"""Memory of the tape of frames: what 100,000 Atari frames take, counted in arrays and seen from outside the process.

    python benchmark/speed/atari_memory.py                # writes atari_memory.csv

The tape of single_files/dqn_tbb_lru_atari_envpool.py is filled from envpool, random actions in 8 games, until every row was
written and old ones are overwritten. resident is what the process grew by while it was filled, games and all.
Then one update on a tape of --rows rows is made in a process of its own: what it adds at its peak.
Bar: the tape takes at most 5% more than its frames, 7,056 bytes each.
"""

import importlib.metadata
import multiprocessing
import resource

import numpy as np
from timing import ROOT, load_script, parser, print_bars, print_table, set_up, write_csv

SCRIPT = ROOT / "single_files" / "dqn_tbb_lru_atari_envpool.py"


def resident():
    """Bytes of this process in memory. On Linux only."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def fill(script, rows, env_id):
    """A full tape, and how many bytes the process grew by."""
    envs = script.make_env(env_id, 8, {"max_episode_steps": rows // 20})
    rng, obs = np.random.default_rng(0), envs.reset(0)[0]
    for _ in range(50):  # what the games themselves come to need
        obs = envs.step(rng.integers(envs.single_action_space.n, size=8))[0]
    before = resident()
    tape, written = script.FrameTape(rows, 8, []), 0
    while written < 1.1 * rows:
        written += 8
        actions = rng.integers(envs.single_action_space.n, size=8)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        tape.add(obs, actions, rewards)
        for i in np.flatnonzero(terminations | truncations):
            tape.finish(i, infos["final_obs"][i], terminations[i])
        obs = next_obs
    return tape, resident() - before


def update_peak(pipe, rows):
    """Sends how many bytes an update on `rows` rows adds at its peak."""
    import torch

    from cleanrl_memoroid.scan import tune_cpu

    script = load_script(SCRIPT)
    tune_cpu()  # freed memory stays with the process, so that the peak counts what is used again once
    box = script.gym.spaces.Box(0, 255, (84, 84), np.uint8)
    spaces = type("Env", (), {"single_action_space": script.gym.spaces.Discrete(6), "single_observation_space": box})
    q_network = script.QNetwork(spaces, script.Args())
    frames, begins = torch.zeros(256, 84, 84, dtype=torch.uint8), torch.zeros(rows, dtype=torch.bool)
    q_network(frames, begins[:256]).sum().backward()  # what PyTorch needs once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    frames = torch.zeros(rows, 84, 84, dtype=torch.uint8) + 1
    q_network(frames, begins).sum().backward()
    with torch.no_grad():
        q_network(frames, begins)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(after - before)


if __name__ == "__main__":
    out = parser(__doc__.split("\n")[0])
    out.add_argument("--frames", type=int, default=100_000, help="rows of the tape")
    out.add_argument("--rows", type=int, nargs="*", default=[2_000, 8_000], help="rows of the updates' tapes")
    out.add_argument("--env-id", default="Pong-v5", help="game of envpool")
    args = out.parse_args()
    where = f"{set_up(args)}, envpool {importlib.metadata.version('envpool')}"
    print(where)
    context, rows, bare = multiprocessing.get_context("spawn"), [], args.frames * 84 * 84
    for length in args.rows:
        ours, theirs = context.Pipe()
        process = context.Process(target=update_peak, args=(theirs, length))
        process.start()
        peak = ours.recv()
        process.join()
        rows.append({"what": f"an update on {length:,} rows", "MB": peak / 1e6, "ratio": peak / (length * 84 * 84)})
    script = load_script(SCRIPT)
    tape, grown = fill(script, args.frames, args.env_id)
    whole = sum(column.nbytes for episode in tape.episodes for column in episode)
    running = sum(frame.nbytes for episode in tape.running for frame, *_ in episode)
    for what, size in (("frames", bare), ("arrays", whole + running), ("resident", grown)):
        rows.insert(0, {"what": f"tape: {what}", "MB": size / 1e6, "ratio": size / bare})
    print_table(rows, f"{args.env_id}, {args.frames:,} rows; ratio: over the frames alone")
    sizes = (whole + running) / bare, grown / bare
    print_bars([("bytes of the tape over those of its frames: arrays; resident", "<=", 1.05, sizes)])
    write_csv("atari_memory", f"{where}; {args.env_id}, {args.frames} rows", rows, args)
