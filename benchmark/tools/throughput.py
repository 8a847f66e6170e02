"""The table of docs/tuning.md: environment steps per second of each script on each machine, from the runs of all grids."""

import re

import numpy as np
from tables import grouped, markdown, read_rows

MACHINES = {  # AMD EPYC of three kinds, and an Intel Xeon
    "family 25, model 1)": "Zen 3",
    "family 25, model 17)": "Zen 4",
    "family 26, model 2)": "Zen 5",
    "family 6, model 207)": "Xeon",
}
TASK = "popgym-RepeatFirstEasy-v0"  # what most scripts train on at their defaults
FREE = {"env-id", "seed", "total-timesteps", "end-e"}  # flags that leave the cost of a step as it is


def runs_of(results):
    """(script, task, machine, steps per second, are the flags its own?) of every finished run that says where it ran."""
    for path in sorted(results.glob("*/runs.csv")):
        for row in read_rows(path)[0] if path.parent.name != "dqn_popgym" else []:  # whose runs shared their cores with others
            script = re.search(r"single_files/(\w+)\.py", row.get("command") or "")
            machine = next((name for text, name in MACHINES.items() if text in (row.get("device") or "")), None)
            if script and machine and row["state"] == "done" and "ablate.py" not in row["command"]:
                flags = set(re.findall(r"--([a-z-]+)", row["command"]))
                rate = int(row["total_timesteps"]) / float(row.get("cpu_seconds") or row["seconds"])
                yield script[1], row["env_id"], machine, rate, flags <= FREE


def three_digits(value):
    return f"{float(f'{value:.3g}'):,.0f}"


def throughput_table(results):
    """A row per script: its task, and the median of its runs on each machine; at other flags if none has its own."""
    table = []
    for script, runs in sorted(grouped(list(runs_of(results)), lambda run: run[0]).items()):
        tasks = grouped(runs, lambda run: run[1])
        task = TASK if TASK in tasks else max(tasks, key=lambda name: (len(tasks[name]), name))
        own = [run for run in tasks[task] if run[4]]
        row = {"script": f"`{script}.py`", "task": task.removeprefix("popgym-") + ("" if own else ", other flags")}
        for name in MACHINES.values():
            found = [rate for _, _, machine, rate, _ in own or tasks[task] if machine == name]
            row[name] = three_digits(np.median(found)) if found else ""
        table.append(row)
    for path in sorted(results.glob("machines/*/atari_speed.csv")):  # Atari has no runs that say where they ran
        machine = path.parent.name.split("-")[0].replace("zen", "Zen ")
        for row in read_rows(path)[0]:
            script = {("dqn", "lru"): "dqn_tbb_lru_atari_envpool", ("ppo", "lru, carried"): "ppo_tbb_lru_atari_envpool"}
            if name := script.get((row["algorithm"], row["memory"])):
                rates = dict.fromkeys(MACHINES.values(), "") | {machine: three_digits(float(row["steps_per_s"]))}
                table.append({"script": f"`{name}.py`", "task": "Pong-v5"} | rates)
    return markdown(table, ["script", "task", *MACHINES.values()])
