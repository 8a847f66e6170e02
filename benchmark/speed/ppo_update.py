"""Times the training part of the PPO scripts on a rollout, beside the LSTM of CleanRL's ppo_atari_lstm.py.

    python benchmark/speed/ppo_update.py                             # one core, minutes; writes ppo_update.csv
    python benchmark/speed/ppo_update.py --steps 128 --profile       # also where the time goes, by torch.profiler

A rollout is --steps of 16 environments with a begin in one row of 50, and no prefix. What is timed is one epoch of training on
it, cut by environments into --minibatches, 4 as in the scripts and in CleanRL's, or one. For each: gather its rows, forward,
loss, backward, clip, Adam. 10 observations, 4 actions, layers of 256 units, and the memories of SIZES below. Collecting the
rollout and its advantages are no part of it. Contenders:
ppo_tbb_*                    the scripts' Agent on the tape of their CarriedTape
ppo_sbb_lstm                 our baseline: oneDNN runs over the pieces between resets side by side, in groups of like lengths
LSTM step by step            the loop of CleanRL's script: nn.LSTM is called once per time step, after each reset by a product
LSTM fused, without resets   nn.LSTM is called once for all steps: memory leaks from episode to episode, so it cannot replace
                             the loop; it shows what is left to win
LSTM step by step, untuned   the loop in a process of its own without tune_cpu, as CleanRL's users run it
The LSTMs have the baseline's encoder, weights, heads and loss; the two of CleanRL's kind take log-probabilities and entropies
from torch.distributions, as its script does. All update with fused Adam and, but for the last, under tune_cpu. `vs_lstm_loop`
and `vs_lstm_fused` say how many times faster than the first of the two loops a contender is, and than the fused LSTM, in the
same run; medians are over several --builds of each contender, since two of one differ by a hundredth. Bars, at any length: FFM
at least 5 times faster than the loop and no slower than fused, LRU 3 times faster than the loop.
"""

import argparse
import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from timing import ROOT, OwnProcess, interleave, load_script, parser, print_bars, print_table, ratio, set_up, write_csv
from torch import nn

OBS_SIZE, ACTIONS, ENVS, EPISODE = 10, 4, 16, 50
SIZES = {
    "ppo_tbb_ffm": {"trace_size": 64, "context_size": 4},
    "ppo_tbb_lru": {"state_size": 128, "num_layers": 2},
    "ppo_tbb_glru": {"state_size": 128, "num_layers": 2},
    "ppo_tbb_mingru": {},
    "ppo_tbb_s5": {"state_size": 128, "num_layers": 2},
    "ppo_tbb_linattn": {"key_size": 64, "value_size": 64},
    "ppo_sbb_lstm": {},
}
LOOP, FUSED = "LSTM step by step", "LSTM fused, without resets"
UNTUNED = f"{LOOP}, untuned"
FASTER = {  # than the LSTM step by step, than the fused one
    "ppo_tbb_ffm": (5, 1),
    "ppo_tbb_lru": (3, None),
}
PARTS = {  # operators by their names in torch.profiler
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "scan": ("_LinearScan", "_LinearScanBackward"),
    "LSTM": ("aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward"),
    "clipping, Adam": ("clip", "Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"),
}


def parse_args():
    out = parser(__doc__.split("\n")[0])
    out.add_argument("--steps", type=int, nargs="+", default=[128, 1024], help="length of a rollout; long ones: fewer rounds")
    out.add_argument(
        "--minibatches", type=int, nargs="+", default=[4, 1], help="minibatches that 16 environments are cut into"
    )
    names = [*SIZES, LOOP, FUSED, UNTUNED]
    out.add_argument("--only", nargs="+", default=names, choices=names, metavar="CONTENDER", help="contenders to time")
    out.add_argument(
        "--builds", type=int, default=3, help="times that all contenders are built anew, to be timed for --rounds each"
    )
    out.add_argument("--hidden-size", type=int, default=256, help="width of every layer, the LSTM's too")
    out.add_argument("--profile", action="store_true", help="also print where the time of each contender goes")
    args = out.parse_args()
    if args.builds < 1:
        out.error(f"--builds: expected at least 1, got {args.builds}; raise it")
    return args


def step_by_step(lstm, x, begins):
    """x [S, N, H], begins [S, N] -> [S, N, H]; hidden and cell are multiplied by 0 where an episode begins.

    Operator for operator what CleanRL's script does in a step.
    """
    state, out = x.new_zeros(2, 1, x.shape[1], lstm.hidden_size), []
    for row, begin in zip(x, begins.to(x.dtype)):
        h, state = lstm(row[None], ((1 - begin).view(1, -1, 1) * state[0], (1 - begin).view(1, -1, 1) * state[1]))
        out.append(h)
    return torch.cat(out)


def fused(lstm, x, begins):
    return lstm(x)[0]


def time_major(agent, memory, obs, begins):
    """Policy and value of a rollout, row after row as CleanRL flattens it. [S, N, O], [S, N] -> [S * N]"""
    x = agent.encoder(obs.flatten(0, 1)).unflatten(0, begins.shape)
    hidden = agent.norm(memory(agent.memory.lstm, x, begins).flatten(0, 1))
    return torch.distributions.Categorical(logits=agent.actor(hidden)), agent.critic(hidden).squeeze(-1)


def rollout(steps, envs=ENVS, seed=0):
    """obs [S, N, O] and begins [S, N]; as there is no prefix, every environment begins an episode with the rollout."""
    rng = np.random.default_rng(seed)
    begins = rng.random((steps, envs)) < 1 / EPISODE
    begins[0] = True
    return rng.standard_normal((steps, envs, OBS_SIZE)).astype(np.float32), begins


def ppo_loss(newlogprob, entropy, newvalue, rows, args):
    """The loss of a minibatch, as the loop over minibatches of single_files/ppo_tbb_ffm.py has it, without logging.

    rows: log-probabilities, values, advantages and returns of the rollout; all [B].
    """
    mb_logprobs, mb_values, mb_advantages, mb_returns = rows
    logratio = newlogprob - mb_logprobs
    ratio = logratio.exp()
    with torch.no_grad():
        (-logratio).mean(), ((ratio - 1) - logratio).mean()
        ((ratio - 1.0).abs() > args.clip_coef).float().mean().item()
    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    pg_loss1 = -mb_advantages * ratio
    pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    v_clipped = mb_values + torch.clamp(newvalue - mb_values, -args.clip_coef, args.clip_coef)
    v_loss = 0.5 * torch.max((newvalue - mb_returns) ** 2, (v_clipped - mb_returns) ** 2).mean()
    return pg_loss - args.ent_coef * entropy.mean() + v_loss * args.vf_coef


def contender(name, obs, begins, hidden_size=256, minibatches=1):
    """(epoch, forward, agent): `epoch` trains on a rollout once, as a script's loop does; `forward` is one pass over it."""
    script_name = "ppo_sbb_lstm" if name in (LOOP, FUSED) else name
    script = load_script(ROOT / "single_files" / f"{script_name}.py")
    args = script.Args(hidden_size=hidden_size, **SIZES[script_name])
    (steps, num_envs), spaces = begins.shape, (gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,)), gym.spaces.Discrete(ACTIONS))
    torch.manual_seed(0)
    agent = script.Agent(SimpleNamespace(single_observation_space=spaces[0], single_action_space=spaces[1]), args)
    # a rate of 0 does the same work, and thousands of updates with one rollout stay where they are
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)
    carried_tape = script.CarriedTape(obs, agent.memory.initial_state(num_envs))
    carried_tape.add(obs, begins)
    all_envs, (b_obs, b_begins) = np.arange(num_envs), map(torch.from_numpy, (obs, begins))

    # of every environment in turn, [N * S], as the scripts flatten the batch; the same for every contender
    draws = torch.Generator().manual_seed(0)
    b_actions = torch.randint(ACTIONS, (num_envs * steps, 1), generator=draws)
    b_logprobs = torch.full((num_envs * steps,), -np.log(ACTIONS), dtype=torch.float32)
    b_values, b_advantages = torch.randn(2, num_envs * steps, generator=draws)
    batch = b_logprobs, b_values, b_advantages, b_advantages + b_values

    def forward(mb_envs=all_envs):
        """Policy and value of a minibatch, and the places of its rows in the batch."""
        places = mb_envs[:, None] * steps + np.arange(steps)
        if name in (LOOP, FUSED):
            memory = step_by_step if name == LOOP else fused
            found = time_major(agent, memory, b_obs[:, mb_envs], b_begins[:, mb_envs])
            return *found, torch.from_numpy(places.T.flatten())
        return *agent(carried_tape.sections(mb_envs, steps))[:2], torch.from_numpy(places.flatten())

    def update(mb_envs):
        policy, newvalue, mb_inds = forward(mb_envs)
        if name in (LOOP, FUSED):
            newlogprob, entropy = policy.log_prob(b_actions[mb_inds].squeeze(-1)), policy.entropy()
        else:  # log-probabilities of the choices, [B, D, choices]
            newlogprob, entropy = script.log_prob(policy, b_actions[mb_inds]), -(policy.exp() * policy).sum((-2, -1))
        loss = ppo_loss(newlogprob, entropy, newvalue, [rows[mb_inds] for rows in batch], args)
        optimizer.zero_grad()
        loss.backward()
        with torch.profiler.record_function("clip"):
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        return loss.item()

    def epoch():
        """The loss of its last minibatch."""
        return [update(mb_envs) for mb_envs in np.split(all_envs, minibatches)][-1]

    return epoch, forward, agent


def epoch_of(name, steps, minibatches, hidden_size):
    """What OwnProcess times."""
    epoch = contender(name, *rollout(steps), hidden_size, minibatches)[0]
    epoch()
    return epoch


def time_rollout(steps, minibatches, args):
    """Rows of the table for rollouts of one length, and its bars."""
    own = [name for name in args.only if name == UNTUNED]
    how = args.hidden_size, minibatches
    turns = argparse.Namespace(**vars(args))
    turns.rounds = max(min(args.rounds, 5), args.rounds * 128 // steps)  # seconds per call: the loop over 1,024 steps
    timed, rows = [], []
    for _ in range(args.builds):  # where the memory of two equal contenders lies makes a hundredth of difference
        found = {name: contender(name, *rollout(steps), *how) for name in args.only if name not in own}
        calls = {name: epoch for name, (epoch, _, _) in found.items()}
        calls |= {name: OwnProcess("ppo_update", "epoch_of", LOOP, steps, minibatches, args.hidden_size) for name in own}
        timed.append(interleave(calls, turns))
        for name in own:
            calls.pop(name).close()
    times = {name: np.concatenate([each[name] for each in timed]) for name in args.only}
    parameters = {name: sum(p.numel() for p in agent.parameters() if p.requires_grad) for name, (_, _, agent) in found.items()}
    for name, values in times.items():
        memory = " ".join(f"{key} {size}" for key, size in SIZES.get(name, {}).items())
        row = {"contender": name, "memory": memory, "parameters": parameters.get(name, ""), "steps": steps}
        row["minibatches"] = minibatches
        row |= {"calls": len(values), "median_ms": float(np.median(values)), "min_ms": float(values.min())}
        row["rows_per_second"] = float(1000 * steps * ENVS / np.median(values))
        row["vs_lstm_loop"], row["vs_lstm_loop_min"] = ratio(times, LOOP, name)
        row["vs_lstm_fused"], row["vs_lstm_fused_min"] = ratio(times, FUSED, name)
        rows.append(row)
    print_table(rows)
    bars = []
    if args.hidden_size == 256:
        for name, wanted in FASTER.items():
            for baseline, figure in zip((LOOP, FUSED), wanted):
                if figure:
                    text = f"{name}, {steps} x {ENVS}, minibatches {minibatches}: times faster than {baseline}"
                    bars.append((text, ">=", figure, ratio(times, baseline, name)))
    if args.profile:
        for name in found:
            profile(
                f"{name}, {steps} x {ENVS}, minibatches {minibatches}",
                calls[name],
                updates=2 if np.median(times[name]) > 500 else 10,
            )
    return rows, bars


def profile(title, call, updates):
    """Prints an update's parts, then the operators that take most time."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(updates):
            call()
    events, rows = found.key_averages(), []
    whole = sum(event.self_cpu_time_total for event in events)
    for part, names in PARTS.items():
        spent = sum(event.cpu_time_total for event in events if event.key in names)
        rows.append({"part": part, "ms": spent / 1000 / updates, "share": spent / whole})
    rest = 1 - sum(row["share"] for row in rows)
    rows.append({"part": "rest: elementwise work, autograd", "ms": rest * whole / 1000 / updates, "share": rest})
    print_table(rows, f"{title}: torch.profiler, {updates} updates; Python between operators is not in it")
    print(events.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48))


if __name__ == "__main__":
    args = parse_args()
    where = set_up(args)
    print(where)
    rows, bars = [], []
    for steps, minibatches in itertools.product(args.steps, args.minibatches):
        found, wanted = time_rollout(steps, minibatches, args)
        rows, bars = rows + found, bars + wanted
        write_csv("ppo_update", where, rows, args)  # minutes of work: a run cut short leaves what it has
    print_bars(bars)
