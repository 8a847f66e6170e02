"""Environment steps per second on Atari: LRU along a tape against an LSTM stepped through time as in CleanRL, one network.

    python benchmark/atari_speed.py                 # one core; writes benchmark/results/atari_speed.csv

All have the convolution, width and heads of single_files/dqn_tbb_lru_atari_envpool.py and differ in the memory alone:
lru             the script's: one scan along the tape
lstm, 128 x 8   what CleanRL's ppo_atari_lstm.py does with a rollout: an LSTM of 128 units, one call per step of 8 games
lstm, tape      the same LSTM on the script's tape, where a whole game is one sequence: one call per row
none            the network without memory: what frames cost in any case
For each: acting is a step of 8 games of envpool with the network's choice of actions; an update is Double DQN's on --rows
rows: the online network's pass with its gradient, the target network's, the optimiser. steps_per_s puts both together at the
script's schedule, an update every --train-frequency steps.
Bar: the script makes as many steps per second as CleanRL's structure (128 x 8), at least.
"""

import importlib.metadata

from timing import ROOT, interleave, load_script, parser, print_bars, print_table, ratio, set_up, write_csv

ENVS = 8  # games side by side, as in CleanRL


def parse_args():
    out = parser(__doc__.split("\n")[0], rounds=5, seconds=10.0)
    out.add_argument("--rows", type=int, default=1024, help="rows of a tape, a multiple of 8")
    out.add_argument("--train-frequency", type=int, default=64, help="environment steps per update")
    out.add_argument("--env-id", default="Pong-v5", help="game of envpool")
    out.add_argument("--hidden-size", type=int, default=512, help="width of the network, as in CleanRL (units)")
    return out.parse_args()


def memories(torch):
    """{name: a module with the interface of the script's memory}, made for width H."""
    nn = torch.nn

    class SteppedLSTM(nn.Module):
        """CleanRL's structure: one call of nn.LSTM per step of time, the state masked where an episode begins."""

        def __init__(self, width, sequences):
            super().__init__()
            self.lstm, self.out, self.sequences = nn.LSTM(width, 128), nn.Linear(128, width), sequences

        def initial_state(self, num_envs):
            return torch.zeros(2, 1, num_envs, 128)

        def step(self, obs, begins, state):
            h, c = torch.where(begins[:, None], 0, state)
            y, (h, c) = self.lstm(obs[None], (h.contiguous(), c.contiguous()))
            return self.out(y[0]), torch.stack([h, c])

        def forward(self, obs, begins):
            state, found = self.initial_state(self.sequences), []
            for x, b in zip(obs.unflatten(0, (-1, self.sequences)), begins.unflatten(0, (-1, self.sequences))):
                y, state = self.step(x, b, state)
                found.append(y)
            return torch.cat(found)

    class NoMemory(nn.Module):
        def initial_state(self, num_envs):
            return torch.zeros(num_envs, 0)

        def step(self, obs, begins, state):
            return obs, state

        def forward(self, obs, begins):
            return obs

    return {
        "lru": None,
        "lstm, 128 x 8": lambda width: SteppedLSTM(width, ENVS),
        "lstm, tape": lambda width: SteppedLSTM(width, 1),
        "none": lambda width: NoMemory(),
    }


def calls(script, torch, args):
    """{"act NAME" and "update NAME": call}, {NAME: number of parameters}."""
    own = script.Args(hidden_size=args.hidden_size, env_id=args.env_id)
    envs = script.EnvPool(own.env_id, ENVS, range(ENVS))
    begins = torch.zeros(args.rows, dtype=torch.bool)
    begins[0] = True
    frames = torch.randint(0, 256, (args.rows, 1, 84, 84), dtype=torch.uint8)
    actions = torch.randint(0, envs.single_action_space.n, (args.rows - 1,))
    transitions, rewards = torch.arange(args.rows - 1), torch.randn(args.rows)
    tape = script.Tape(frames, begins, actions, rewards, torch.zeros(args.rows, dtype=torch.bool), transitions)
    found, sizes = {}, {}

    def add(name, make):
        networks = [script.QNetwork(envs, own) for _ in range(2)]
        if make:
            for network in networks:
                network.memory = make(own.hidden_size)
        q_network, target_network = networks
        optimizer = torch.optim.AdamW(q_network.parameters(), lr=1e-6, weight_decay=0, fused=True)
        sizes[name] = sum(p.numel() for p in q_network.parameters() if p.requires_grad)
        obs, state = envs.reset()[0], q_network.memory.initial_state(ENVS)
        no_begins = torch.zeros(ENVS, dtype=torch.bool)

        def act():
            nonlocal obs, state
            with torch.no_grad():
                q_values, state = q_network.step(torch.as_tensor(obs), no_begins, state)
            obs, *_ = envs.step(q_values.argmax(dim=1).cpu().numpy())

        def update():
            q_values = q_network(frames, begins)
            with torch.no_grad():
                target = script.td_target(q_values, target_network(frames, begins), tape, 0.99)
            loss = torch.nn.functional.smooth_l1_loss(q_values[transitions, actions], target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(q_network.parameters(), 1.0, foreach=True)
            optimizer.step()

        found[f"act {name}"], found[f"update {name}"] = act, update

    for name, make in memories(torch).items():
        add(name, make)
    return found, sizes


if __name__ == "__main__":
    args = parse_args()
    if args.rows % ENVS:
        raise SystemExit(f"--rows: expected a multiple of {ENVS}, got {args.rows}")
    where = f"{set_up(args)}, envpool {importlib.metadata.version('envpool')}"
    print(where)
    import numpy as np
    import torch

    found, sizes = calls(load_script(ROOT / "single_files" / "dqn_tbb_lru_atari_envpool.py"), torch, args)
    times = interleave(found, args)

    def per_second(name, of):
        """Environment steps per second from medians or minima in milliseconds."""
        steps = args.train_frequency
        return 1000 * steps / (steps / ENVS * of(times[f"act {name}"]) + of(times[f"update {name}"]))

    rows = []
    for name, size in sizes.items():
        row = {"memory": name, "parameters": size}
        row |= {f"{part}_ms": float(np.median(times[f"{part} {name}"])) for part in ("act", "update")}
        row["update_vs_lru"] = ratio(times, f"update {name}", "update lru")[0]
        rows.append(row | {"steps_per_s": round(per_second(name, np.median)), "best": round(per_second(name, np.min))})
    print_table(rows, f"{args.env_id}, {ENVS} games, {args.rows} rows, an update every {args.train_frequency} steps")
    gain = tuple(float(per_second("lru", of) / per_second("lstm, 128 x 8", of)) for of in (np.median, np.min))
    print_bars([("steps per second, lru / lstm, 128 x 8", ">=", 1, gain)])
    title = f"{args.env_id}, {ENVS} games, {args.rows} rows, an update every {args.train_frequency} steps"
    write_csv("atari_speed", f"{where}; {title}", rows, args)
