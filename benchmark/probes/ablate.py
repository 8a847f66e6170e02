"""Runs a script with a line of it changed, to see what that line is for. Everything else stays as it is, the flags too.

    python benchmark/probes/ablate.py memoryless single_files/ppo_tbb_lru_continuous_action.py --seed 1
    python benchmark/probes/ablate.py huber_of_mean lr_warmup=200 single_files/dqn_tbb_s5.py --seed 1

First the changes, then the script, then the script's own flags. The changes:
memoryless      PPO: the memory forgets before every step, in rollouts, on the tape and in evaluations: each row is an episode
                of its own. What memory buys on a task is the distance between the two
huber_of_mean   DQN: one Huber loss of the mean absolute error, as the code of Morad et al. (2024) has it for segments, and not
                the mean of the Huber losses
lr_warmup=200   DQN: the learning rate rises over the first 200 updates
no_resets       DQN: memory runs on from one episode into the next, on the tape and while it acts
reset_early     PPO: in updates, memory is reset one row before an episode's first; while it acts, in the right place
reset_late      PPO: the same, one row behind an episode's first
reset_late_everywhere    PPO: one row behind the first, in updates and while it acts
n_step=3        SAPG: values of own rows have returns of three steps as targets, as in the paper, and not those of GAE
optimizer=RUN   PPO: in place of Adam the optimiser of RUN/model.pt, which optim4rl_lru.py has learned; its step size is
                --learning-rate
"""

import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOVED = """def moved(tape, next_begins, by):
    begins, firsts = tape.begins.clone(), tape.starts
    lasts = F.pad(firsts[1:], (0, 1), value=len(begins)) - 1
    begins[firsts[0] :] = tape.begins[firsts[0] :].roll(by)
    begins[firsts] = tape.begins[firsts] | (begins[firsts] if by < 0 else False)  # no section has a row before its first
    begins[lasts] = torch.from_numpy(next_begins).to(begins.device) if by < 0 else begins[lasts]
    return tape._replace(begins=begins)
"""
CHANGES = {  # what stands in the script, what comes in its place; {} is what stands behind the `=`
    "memoryless": {
        "self.memory(tape, self.encoder(tape.obs))": (
            "self.memory(tape._replace(begins=torch.ones_like(tape.begins)), self.encoder(tape.obs))"
        ),
        "self.memory.step(self.encoder(obs), begins,": "self.memory.step(self.encoder(obs), torch.ones_like(begins),",
    },
    "huber_of_mean": {
        "loss = F.smooth_l1_loss(old_val, target)": (
            "mean_error = (old_val - target).abs().mean(); loss = F.smooth_l1_loss(mean_error, torch.zeros_like(mean_error))"
        ),
    },
    "lr_warmup": {
        '"lr"] = args.learning_rate * anneal': '"lr"] = args.learning_rate * anneal * min(1, (update + 1) / {})',
    },
    "no_resets": {
        "self.memory(self.encoder(obs), begins)": "self.memory(self.encoder(obs), torch.zeros_like(begins))",
        "self.memory.step(self.encoder(obs), begins,": "self.memory.step(self.encoder(obs), torch.zeros_like(begins),",
    },
    "reset_early": {
        'if __name__ == "__main__":\n    sys.path': f"{MOVED}\n\nif __name__ == '__main__':\n    sys.path",
        "agent(carried_tape.sections(mb_envs, args.num_steps))": (
            "agent(moved(carried_tape.sections(mb_envs, args.num_steps), next_begins[mb_envs], -1))"
        ),
    },
    "reset_late": {
        'if __name__ == "__main__":\n    sys.path': f"{MOVED}\n\nif __name__ == '__main__':\n    sys.path",
        "agent(carried_tape.sections(mb_envs, args.num_steps))": (
            "agent(moved(carried_tape.sections(mb_envs, args.num_steps), next_begins[mb_envs], 1))"
        ),
    },
    "reset_late_everywhere": {  # `late_begins` are those of one step before; an episode's end is where it was
        "    # ALGO Logic: Storage setup": "    late_begins = np.zeros(args.num_envs, bool)\n    # ALGO Logic: Storage setup",
        "obs[step], begins[step] = next_obs, next_begins": "obs[step], begins[step] = next_obs, late_begins",
        "policy, values[step], recurrent_state = agent.step(next_obs, next_begins, recurrent_state)": (
            "policy, values[step], recurrent_state = agent.step(next_obs, late_begins, recurrent_state)\n"
            "            late_begins = next_begins"
        ),
        "_, next_value, _ = agent.step(next_obs, next_begins,": "_, next_value, _ = agent.step(next_obs, late_begins,",
        "carried_tape.carry(next_begins,": "carried_tape.carry(late_begins,",
    },
    "n_step": {
        "        advantages = traced_gae(rewards, values, next_values, ended, args.gamma, args.gae_lambda)": """
        delta = advantages = rewards + args.gamma * next_values - values
        for _ in range({} - 1):  # A_n[t] = delta[t] + gamma A_(n-1)[t+1]; fewer steps before an end
            advantages = delta + args.gamma * F.pad(advantages[1:], (0, 0, 0, 1)).where(~ended, 0)""".lstrip("\n"),
    },
    "optimizer": {
        "    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)": f"""
    sys.path.append({str(ROOT / "single_files")!r})
    from optim4rl_lru import LearnedOptimizer

    optimizer = LearnedOptimizer(agent.parameters(), "{{}}/model.pt", lr=args.learning_rate)""",
    },
}


def ablated(text, change):
    """The script's text with a change, `memoryless` or `lr_warmup=200`. Raises ValueError if it lacks what would change."""
    name, _, value = change.partition("=")
    if name not in CHANGES:
        raise ValueError(f"{change}: expected one of {', '.join(CHANGES)}")
    for old, new in CHANGES[name].items():
        if text.count(old) != 1:
            raise ValueError(f"{change}: expected one `{old}` in the script, found {text.count(old)}; adapt {__file__}")
        text = text.replace(old, new.replace("{}", value))
    return text


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit()
    at = next((i for i, word in enumerate(sys.argv) if i and word.endswith(".py")), None)
    if at is None or not (ROOT / sys.argv[at]).is_file():
        sys.exit(f"{__doc__}\nexpected changes, then a script of single_files/, got {' '.join(sys.argv[1:]) or 'nothing'}")
    script = ROOT / sys.argv[at]
    text = script.read_text()
    try:
        for change in sys.argv[1:at]:
            text = ablated(text, change)
    except ValueError as error:
        sys.exit(f"{script.name}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, script.name)  # of the same name, which names the run
        path.write_text(text)
        sys.argv = [str(path), *sys.argv[at + 1 :]]
        runpy.run_path(str(path), run_name="__main__")
