"""Environment steps per second on Atari: LRU along a tape against an LSTM stepped through time as in CleanRL, one network.

    python benchmark/speed/atari_speed.py                 # one core; writes atari_speed.csv

All have the convolution, width and heads of the script and differ in the memory alone:
lru             the script's: one scan along the tape
lru, carried    PPO's default: a prefix of 128 rows to every rollout; the others are without, as CleanRL's
lru, compiled   with --compile, PPO: its convolution under torch.compile
lstm, 128 x 8   what CleanRL's ppo_atari_lstm.py does with a rollout: an LSTM of 128 units, one call per step of its games
lstm, tape      the same LSTM on DQN's tape, where a whole game is one sequence: one call per row
none            the network without memory: what frames cost in any case
For each: acting is a step of 8 games of envpool with the network's choice of actions. Training is, with DQN, Double DQN's
update on --rows rows (the online network's pass with its gradient, the target network's, the optimiser), every
--train-frequency steps; with PPO, 4 epochs of 4 minibatches, of 2 games each, on a rollout of 128 steps, as in CleanRL's
script. steps_per_s puts both together at that schedule.
Bar: the script makes as many steps per second as CleanRL's structure (128 x 8), at least.
"""

import importlib.metadata

from timing import ROOT, interleave, load_script, parser, print_bars, print_table, ratio, set_up, write_csv

ENVS, STEPS, MINIBATCHES, EPOCHS = 8, 128, 4, 4  # games side by side, PPO's rollouts and training, as in CleanRL
LOOP = "lstm, 128 x 8"


def parse_args():
    out = parser(__doc__.split("\n")[0], rounds=5, seconds=10.0)
    out.add_argument("--algorithms", nargs="+", choices=["dqn", "ppo"], default=["dqn", "ppo"], help="whose training")
    out.add_argument("--rows", type=int, default=1024, help="DQN: rows of a tape, a multiple of 8")
    out.add_argument("--train-frequency", type=int, default=64, help="DQN: environment steps per update")
    out.add_argument("--compile", action="store_true", help="PPO: also with torch.compile, which needs a C++ compiler")
    out.add_argument("--env-id", default="Pong-v5", help="game of envpool")
    out.add_argument("--hidden-size", type=int, default=512, help="width of the network, as in CleanRL (units)")
    return out.parse_args()


def memories(torch):
    """{name: a module with the interface of the scripts' memory}, made for width H; None: the script's own."""
    nn = torch.nn

    class SteppedLSTM(nn.Module):
        """CleanRL's structure: one call of nn.LSTM per step of time, the state masked where an episode begins."""

        def __init__(self, width, sequences):
            super().__init__()
            self.lstm, self.out, self.sequences = nn.LSTM(width, 128), nn.Linear(128, width), sequences

        def initial_state(self, num_envs):
            return torch.zeros(num_envs, 2, 128)

        def step(self, obs, begins, state):
            before = torch.where(begins[:, None, None], 0, state).transpose(0, 1)[:, None].contiguous()
            y, after = self.lstm(obs[None], tuple(before))
            return self.out(y[0]), torch.cat(after).transpose(0, 1)

        def forward(self, first, second):
            """DQN: the features and begins of equally long sequences; PPO: the sections of a tape, and their features."""
            ppo = isinstance(first, tuple)
            obs, begins = (second, first.begins) if ppo else (first, second)
            sequences = len(first.starts) if ppo else self.sequences
            state, found = first.state if ppo else self.initial_state(sequences), []
            for x, b in zip(obs.unflatten(0, (sequences, -1)).unbind(1), begins.unflatten(0, (sequences, -1)).unbind(1)):
                y, state = self.step(x, b, state)
                found.append(y)
            y = torch.stack(found, 1).flatten(0, 1)
            return (y, state) if ppo else y

    class NoMemory(nn.Module):
        def initial_state(self, num_envs):
            return torch.zeros(num_envs, 0)

        def step(self, obs, begins, state):
            return obs, state

        def forward(self, first, second):
            return (second, first.state) if isinstance(first, tuple) else first

    return {
        "lru": None,
        "lru, carried": None,
        LOOP: lambda width: SteppedLSTM(width, ENVS),
        "lstm, tape": lambda width: SteppedLSTM(width, 1),
        "none": lambda width: NoMemory(),
    }


def initial_state(network):
    """Of the script's own memory, or of one that was put in its place."""
    return getattr(network.memory, "initial_state", getattr(network, "initial_state", None))(ENVS)


def dqn_calls(script, torch, args):
    """{"act NAME" and "train NAME": call}, {NAME: number of parameters}."""
    own = script.Args(hidden_size=args.hidden_size, env_id=args.env_id)
    envs = script.make_env(own.env_id, ENVS, {})
    row = torch.arange(args.rows)
    tape = script.Tape(
        obs=torch.randint(0, 256, (args.rows, 84, 84), dtype=torch.uint8),
        begins=row == 0,
        actions=torch.randint(0, envs.single_action_space.n, (args.rows,)),
        rewards=torch.randn(args.rows),
        terminations=row < 0,
        final=row == args.rows - 1,
    )
    found, sizes = {}, {}

    def add(name, make):
        networks = [script.QNetwork(envs, own) for _ in range(2)]
        if make:
            for network in networks:
                network.memory = make(own.hidden_size)
        q_network, target_network = networks
        optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-6, fused=True)
        sizes[name] = sum(p.numel() for p in q_network.parameters() if p.requires_grad)
        obs, state = envs.reset(seed=0)[0], initial_state(q_network)

        def act():
            nonlocal obs, state
            with torch.no_grad():
                q_values, state = q_network.step(obs, np.zeros(ENVS, bool), state)
            obs, *_ = envs.step(q_values.argmax(dim=1).cpu().numpy())

        def train():
            q_values = q_network(tape.obs, tape.begins)
            with torch.no_grad():
                target = script.td_target(q_values, target_network(tape.obs, tape.begins), tape, 0.99)
            old_val = q_values.gather(1, tape.actions[:, None]).squeeze(1)[~tape.final]
            loss = torch.nn.functional.smooth_l1_loss(old_val, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(q_network.parameters(), 1.0)
            optimizer.step()

        found[f"act {name}"], found[f"train {name}"] = act, train

    for name, make in memories(torch).items():
        if name != "lru, carried":
            add(name, make)
    return found, sizes


def ppo_calls(script, torch, args):
    """As dqn_calls; a call of "train NAME" is one epoch."""
    from ppo_update import ppo_loss

    own = script.Args(hidden_size=args.hidden_size, env_id=args.env_id)
    envs = script.make_env(own.env_id, ENVS, {})
    rng = np.random.default_rng(0)
    obs = rng.integers(256, size=(STEPS, ENVS, 84, 84), dtype=np.uint8)
    begins = np.zeros((STEPS, ENVS), bool)
    most = envs.single_action_space.n
    batch = -torch.full((ENVS * STEPS,), float(most)).log(), *torch.randn(3, ENVS * STEPS)
    found, sizes = {}, {}

    def add(name, make):
        agent = script.Agent(envs, own)
        if make:
            agent.memory = make(own.hidden_size)
        if name == "lru, compiled":
            agent.encoder = torch.compile(agent.encoder)
        optimizer = torch.optim.Adam(agent.parameters(), lr=0.0, fused=True)
        sizes[name] = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        next_obs, state = envs.reset(seed=0)[0], initial_state(agent)
        carried_tape = script.CarriedTape(obs, state)
        for _ in range(1 + (name == "lru, carried")):
            carried_tape.add(obs, begins)
        no_begins = np.zeros(ENVS, bool)
        policy, _, _ = agent.step(next_obs, no_begins, state)
        b_actions = torch.randint(most, (ENVS * STEPS, *policy.shape[1:-1]))

        def act():
            nonlocal next_obs, state
            with torch.no_grad():
                policy, _, state = agent.step(next_obs, no_begins, state)
                actions = (policy + torch.from_numpy(rng.gumbel(size=policy.shape).astype(np.float32))).argmax(-1)
                policy.gather(-1, actions[:, None])
            next_obs, *_ = envs.step(actions.numpy())

        def train():
            for mb_envs in np.arange(ENVS).reshape(MINIBATCHES, -1):
                policy, value, _ = agent(carried_tape.sections(mb_envs, STEPS))
                mb_inds = torch.from_numpy((mb_envs[:, None] * STEPS + np.arange(STEPS)).flatten())
                newlogprob, entropy = policy.gather(-1, b_actions[mb_inds, None]).squeeze(-1), -(policy.exp() * policy).sum(-1)
                loss = ppo_loss(newlogprob, entropy, value, [rows[mb_inds] for rows in batch], own)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), own.max_grad_norm)
                optimizer.step()

        found[f"act {name}"], found[f"train {name}"] = act, train

    for name, make in (memories(torch) | ({"lru, compiled": None} if args.compile else {})).items():
        if name != "lstm, tape":
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

    rows, bars = [], []
    for algorithm in args.algorithms:
        script = load_script(ROOT / "single_files" / f"{algorithm}_tbb_lru_atari_envpool.py")
        found, sizes = (dqn_calls if algorithm == "dqn" else ppo_calls)(script, torch, args)
        times = interleave(found, args)
        steps, calls = (args.train_frequency, 1) if algorithm == "dqn" else (ENVS * STEPS, EPOCHS)

        def per_second(name, of, times=times, steps=steps, calls=calls):
            """Environment steps per second from medians or minima in milliseconds."""
            return 1000 * steps / (steps / ENVS * of(times[f"act {name}"]) + calls * of(times[f"train {name}"]))

        for name, size in sizes.items():
            row = {"algorithm": algorithm, "memory": name, "parameters": size}
            row |= {f"{part}_ms": float(np.median(times[f"{part} {name}"])) for part in ("act", "train")}
            row["train_vs_lru"] = ratio(times, f"train {name}", "train lru")[0]
            rows.append(row | {"steps_per_s": round(per_second(name, np.median)), "best": round(per_second(name, np.min))})
        gain = tuple(float(per_second("lru", of) / per_second(LOOP, of)) for of in (np.median, np.min))
        bars.append((f"{algorithm}: steps per second, lru / {LOOP}", ">=", 1, gain))
    title = f"{args.env_id}, {ENVS} games; DQN: {args.rows} rows, an update every {args.train_frequency} steps"
    print_table(rows, title)
    print_bars(bars)
    write_csv("atari_speed", f"{where}; {title}", rows, args)
