"""What the runs of a grid logged, as rows of tables.

Each has a record, runs/grids/NAME/KEY/record.json, which also tells of runs that failed, did not end, or never started.
"""

import json
import re
import shlex
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
from tables import natural, read_rows

BINS = 40  # points of a curve
WINDOW = 100  # recent episodes whose mean return says what an agent in training can do
GOAL = 0.95  # of 1, the largest return of a task of POPGym
RESULTS = (
    "greedy_return lowest episodes training_return steps_to_goal seconds_to_goal steps_to_half transitions metrics".split()
)
COMMON = "charts", "losses", "eval"  # what every script logs; what else one logs is in the column `metrics`


def read_events(folder):
    """TensorBoard's events in a folder, all of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def learning_curve(training, total_timesteps, start):
    """Mean training return per bin of steps, and the time of the bin's last episode (seconds since `start`)."""
    edges = np.linspace(0, total_timesteps, BINS + 1)
    which = np.minimum(np.digitize([e.step for e in training], edges), BINS)  # the very last step is in the last bin
    values, times = np.array([e.value for e in training]), np.array([e.wall_time for e in training])
    return [
        {
            "global_step": int(edges[i]),
            "seconds": f"{times[which == i].max() - start:.2f}",
            "episodic_return": f"{values[which == i].mean():.4f}",
        }
        for i in range(1, BINS + 1)
        if (which == i).any()
    ]


def reached(training, goal, start):
    """(steps, seconds) at the first episode that, with the WINDOW - 1 before it, returned `goal` on average; or ("", "")."""
    values = np.array([e.value for e in training])
    if len(values) < WINDOW:
        return "", ""
    means = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
    if not (means >= goal - 1e-9).any():  # a sum of a hundred float64 is off by less
        return "", ""
    event = training[WINDOW - 1 + int(np.argmax(means >= goal - 1e-9))]
    return event.step, f"{event.wall_time - start:.1f}"


def own_metrics(events, total_timesteps):
    """{name: its mean over the last tenth of the steps} of what only this kind of script logs, as JSON; or ""."""
    tags = [tag for tag in events.Tags()["scalars"] if tag.split("/")[0] not in COMMON]
    late = {tag: [e.value for e in events.Scalars(tag) if e.step > 0.9 * total_timesteps] for tag in tags}
    return json.dumps({tag: round(float(np.mean(values)), 4) for tag, values in late.items() if values}) if tags else ""


def portable(text, root):
    """A text without what names a machine's folders: this one's, or that on which a run took place."""
    text = text.replace(f"{root.resolve()}/", "").replace(str(root.resolve()), ".")
    return re.sub(r"(?<![\w.])/[^\s'\":]*/(?=(?:site-packages|single_files|benchmark|tests|cleanrl_memoroid|runs)/)", "", text)


def portable_command(command, root):
    """A recorded command as a reader would type it in the repository."""
    first = Path(command[0]).name
    parts = ["python" if first.startswith("python") else command[0], *command[1:]]
    return " ".join(shlex.quote(portable(str(part), root)) for part in parts)


def batching(record):
    """(memory, batching) of a DQN script of this project and its flags, or ("", "")."""
    found = re.fullmatch(r"dqn_(tbb|sbb)_(\w+)", Path(record["script"]).stem)
    if found is None or found[1] == "tbb":
        return (found[2], "tape") if found else ("", "")
    length = re.search(r"--segment-length[ =](\d+)", " ".join(map(str, record["flags"])))
    return found[2], f"segments of {length[1]}" if length else "segments"


def error_line(text, root):
    """The last line that a failed run printed, and how it ended."""
    lines = [line.strip() for line in portable(text, root).splitlines() if line.strip()]
    if len(lines) > 1 and lines[-1].startswith(("exit status", "killed by")):
        return f"{lines[-2]} ({lines[-1]})"
    return lines[-1] if lines else ""


def read_record(path, root):
    """(row of results, rows of the curve) of one run of a grid: of whatever state, and with a curve only if it is done.

    Seconds count from the start of the process, imports and compilation included. A run that was stopped and went on has none
    on its curve: its clock also counts the time between. A record without a time of start: from the first event.
    """
    record = json.loads(path.read_text())
    memory, batches = batching(record)
    row = {name: record[name] for name in ("key", "arm")} | {"memory": memory, "batching": batches}
    row |= {name: record[name] for name in ("env_id", "env_kwargs", "seed", "total_timesteps", "state")}
    row |= dict.fromkeys(RESULTS, "")
    row |= {name: f"{record[name]:.1f}" if record.get(name) else "" for name in ("seconds", "cpu_seconds")} | {"start_up": ""}
    row |= {name: record.get(name) for name in ("exit_status", "device", "workers", "started", "resumed", "commit", "dirty")}
    row["versions"] = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    row["command"] = portable_command(record["command"], root) if record.get("command") else ""
    row["error"] = error_line(record.get("error") or "", root)
    row = {name: "" if value is None else value for name, value in row.items()}
    if record["state"] != "done":
        return row, []
    folder = root / record["folder"] if record["folder"] else None
    if folder is None or not folder.is_dir():
        return row | {"state": "failed", "error": f"ended well, but its TensorBoard folder is missing: {record['folder']}"}, []
    events = read_events(folder)
    tags = events.Tags()["scalars"]
    if "charts/episodic_return" not in tags:
        return row | {"state": "failed", "error": f"ended well, but logged no charts/episodic_return: {record['folder']}"}, []
    training, start = events.Scalars("charts/episodic_return"), events.FirstEventTimestamp()
    if record.get("started") and not record.get("resumed"):
        launch = datetime.fromisoformat(record["started"]).timestamp()
        start, row["start_up"] = launch, f"{start - launch:.1f}"
    if "eval/episodic_return" in tags:
        returns = [e.value for e in events.Scalars("eval/episodic_return")]
        row |= {"greedy_return": f"{np.mean(returns):.4f}", "lowest": f"{min(returns):.4f}", "episodes": len(returns)}
    row["training_return"] = f"{np.mean([e.value for e in training[-WINDOW:]]):.4f}"
    if "losses/transitions" in tags:  # of an update of DQN, without padding; mean over the run
        row["transitions"] = f"{np.mean([e.value for e in events.Scalars('losses/transitions')]):.1f}"
    row["steps_to_goal"], row["seconds_to_goal"] = reached(training, GOAL, start)
    row["total_timesteps"] = total = record["total_timesteps"] or saved_timesteps(folder) or max(e.step for e in training)
    row["metrics"] = own_metrics(events, total)
    curve = learning_curve(training, total, start)
    row["steps_to_half"] = next((point["global_step"] for point in curve if float(point["episodic_return"]) >= 0.5), "")
    if record.get("resumed"):
        row["seconds_to_goal"], curve = "", [point | {"seconds": ""} for point in curve]
    return row, [{"key": record["key"]} | point for point in curve]


def saved_timesteps(folder):
    """A script's own default, from the model that it saved; None without one."""
    import torch

    model = folder / "model.pt"
    return torch.load(model, map_location="cpu", weights_only=True)["args"].get("total_timesteps") if model.exists() else None


def merge(rows, curve, old_rows, old_curve):
    """New rows over those of the committed CSV files: a grid may be run on several machines, a few runs on each.

    A run that has not ended here may have ended there, and replaces no result. To forget a run, delete the CSV files.
    """
    ended, old = ("done", "failed"), {row["key"]: row for row in old_rows}
    new = {row["key"]: row for row in rows if row["state"] in ended or old.get(row["key"], {}).get("state") not in ended}
    merged = sorted(
        (old | new).values(),
        key=lambda row: [natural(row[column]) for column in ("env_id", "env_kwargs", "arm", "seed", "key")],
    )
    points = defaultdict(list)
    for point in [point for point in old_curve if point["key"] not in new] + [p for p in curve if p["key"] in new]:
        points[point["key"]].append(point)
    return merged, [point for row in merged for point in points[row["key"]]]


def read_grids(folder, root, results):
    """{name of a grid: (rows, curve)} of the runs below a folder, put over those of the committed CSV files."""
    grids = {}
    for grid in sorted(folder.glob("grids/*/")):
        if next(grid.glob("*/runs/*/report.json"), None) or grid.name == "optim4rl":
            continue  # no learning curves of agents: students.py, optimizers.py
        if found := [read_record(path, root) for path in sorted(grid.glob("*/record.json"))]:
            rows, curve = [row for row, _ in found], [point for _, points in found for point in points]
            files = results / grid.name / "runs.csv", results / grid.name / "curves.csv"
            grids[grid.name] = merge(rows, curve, *(read_rows(file)[0] if file.exists() else [] for file in files))
    return grids
