"""The learned optimisers of `benchmark/learn/optim4rl.sh` as CSV files, tables and a picture. report.py calls it.

The seconds in the tables are those of meta-training, which the script prints; cpu_seconds are those of the whole run.

benchmark/results/optim4rl gets tests.csv: the mean return of fresh agents after every fifth update, of each meta-trained cell,
and of the known optimisers that its run tested beside it; and summary.csv: return at the end, area under the curve (the mean
over all updates), and that of the worst agent.
"""

import json
import re

import numpy as np
from curves import begin, save
from records import portable_command, read_events
from tables import csv_link, each_seed, grouped, markdown, mean_and_spread, natural, number, read_rows, write_rows

GRID, EVERY = "optim4rl", 5
NAMES = {"optim4rl": "GRU adaptive, signlog", "optim4rl_lru": "memoroid"}  # of scripts, in the table of other tasks
SUMMARY = "return", "auc", "worst"
SHARE = "share_within_10_percent"
STRUCTURES, PROCESSINGS = ("adaptive", "linear", "momentum", "raw"), ("none", "signlog", "l2l", "asinh")
CROSSED = [f"GRU {structure}, {kind}" for structure in STRUCTURES for kind in PROCESSINGS]
UNTRAINED = {"memoroid": "memoroid, untrained", "GRU adaptive, signlog": "GRU adaptive, untrained (signSGD)"}  # by arm


def read_run(record, root):
    """(rows of the summary, rows of the test curves) of a finished run; "cell" is what its script is called there."""
    events = read_events(root / record["folder"])
    tags = events.Tags()["scalars"]
    own, key = record["script"].split("/")[-1].removesuffix(".py"), {"key": record["key"]}
    log = root / record["folder"] / ".." / ".." / "log.txt"
    seconds = re.findall(r"([0-9.]+) seconds of CPU", log.read_text() if log.exists() else "")
    summary, curves = [], []
    for tag in (tag for tag in tags if tag.startswith("test/")):
        name = tag.removeprefix("test/")
        row = key | {"arm": record["arm"], "seed": record["seed"], "optimiser": "cell" if name == own else name}
        row |= {what: f"{events.Scalars(f'test_{what}/{name}')[-1].value:.4f}" for what in SUMMARY}
        row |= {
            "meta_seconds": seconds[-1] if seconds else "",
            "cpu_seconds": f"{record['cpu_seconds']:.1f}",
            "commit": record["commit"],
            "dirty": record["dirty"],
        }
        summary.append(row | {"device": record["device"], "command": portable_command(record["command"], root)})
        points = [(e.step, e.value) for e in events.Scalars(tag) if e.step % EVERY == 0]
        curves += [key | {"optimiser": row["optimiser"], "update": step, "return": f"{value:.4f}"} for step, value in points]
    return summary, curves


def collect_optimizers(root, runs, results):
    """Writes summary.csv and tests.csv from the finished runs of the grid, over those that are committed."""
    found = [json.loads(path.read_text()) for path in sorted(runs.glob(f"grids/{GRID}/*/record.json"))]
    found = [read_run(record, root) for record in found if record["state"] == "done"]
    if not found:
        return
    for name, part in (("summary", 0), ("tests", 1)):
        path, new = results / GRID / f"{name}.csv", [row for run in found for row in run[part]]
        old = read_rows(path)[0] if path.exists() else []
        keys = {row["key"] for row in new}
        rows = new + [row for row in old if row["key"] not in keys]
        write_rows(
            path, sorted(rows, key=lambda row: [natural(row.get(c, "")) for c in ("arm", "key", "optimiser", "update")])
        )


def each(rows, column):
    values = [float(row[column]) for row in rows]
    return f"{number(np.mean(values), 2)} ({each_seed(values)})"


def seconds(runs):
    found = [float(row["meta_seconds"]) for row in runs if row["meta_seconds"]]
    return number(np.mean(found), 0) if found else ""


def cost(runs):
    """What the runs of the crossed table took, tests included: a line for each device."""
    lines = []
    for device, members in sorted(grouped(runs, lambda row: row["device"]).items()):
        minutes = sum(float(row["cpu_seconds"]) for row in members) / 60
        lines.append(f"{len(members)} runs: {number(minutes, 0)} minutes of one core, tests included ({device}).\n\n")
    return "".join(lines)


def transfer_table(rows):
    """Return on tasks that no cell was trained on: a row per task and optimiser, the mean over its runs at each step size."""
    table = []
    for (task, name), members in grouped(rows, lambda row: (row["task"], row["optimiser"])).items():
        sizes = grouped(members, lambda row: float(row["step_size"]))
        means = {size: np.mean([float(row["return"]) for row in sizes[size]]) for size in sorted(sizes)}
        shown = ", ".join(f"{size:g}: {mean:.3g}" for size, mean in means.items())
        runs = len({row["run"] for row in members})
        table.append({"task": task, "optimiser": NAMES.get(name, name), "runs": runs, "return at each step size": shown})
        table[-1]["at the best"] = f"{max(means.values()):.3g}"
    best = {row["task"]: float(row["at the best"]) for row in table if row["optimiser"] == "Adam"}
    for row in table:
        row["of Adam's best"] = f"{float(row['at the best']) / best[row['task']]:.2f}" if best.get(row["task"]) else ""
    return markdown(sorted(table, key=lambda row: natural(row["task"])), list(table[0]))


def identity_table(rows):
    """Share of coordinates that a network copies within 10 %: a row per processing, each seed in brackets."""
    shares = grouped(rows, lambda row: row["kind"])
    table = [
        {"the network sees": kind, "coordinates within 10 %": each(sorted(runs, key=lambda row: int(row["seed"])), SHARE)}
        for kind, runs in shares.items()
    ]
    return markdown(table, list(table[0]))


def optimizer_tables(results):
    """{marker: table} of the cells, of the known optimisers, and of structures crossed with what the network sees."""
    path = results / GRID / "summary.csv"
    if not path.exists():
        return {}
    rows = read_rows(path)[0]
    cells = grouped([row for row in rows if row["optimiser"] == "cell"], lambda row: row["arm"])
    untrained = [row for row in rows if row["optimiser"] == "untrained" and row["arm"] in UNTRAINED]
    shown = cells | grouped(untrained, lambda row: UNTRAINED[row["arm"]])
    for runs in shown.values():
        runs.sort(key=lambda row: int(row["seed"]))
    where = f"device: {', '.join(sorted({row['device'] for row in rows}))}; "
    where += f"code of {', '.join(sorted({row['commit'][:7] for row in rows}))}; each meta-seed in brackets"
    table = [
        {"cell": arm}
        | {name: each(runs, column) for name, column in (("return", "return"), ("area under the curve", "auc"))}
        | {"worst agent": number(min(float(row["worst"]) for row in runs), 2), "CPU s": seconds(runs) if arm in cells else ""}
        for arm, runs in shown.items()
        if arm == "GRU adaptive, signlog" or arm not in CROSSED
    ]
    tables = {GRID: f"{csv_link(path, 'every test')}: {where}\n\n{markdown(table, list(table[0]))}"}
    known = grouped(
        [row for row in rows if row["optimiser"] not in ("cell", "untrained")], lambda row: row["optimiser"].rsplit(" ", 1)[0]
    )
    lines = []
    for name, members in known.items():
        rates = grouped(members, lambda row: float(row["optimiser"].rsplit(" ", 1)[1]))
        areas = {rate: np.mean([float(row["auc"]) for row in rates[rate]]) for rate in sorted(rates)}
        best = rates[max(areas, key=areas.get)]
        lines.append(
            {
                "optimiser": name,
                "area at each rate": ", ".join(f"{rate:g}: {number(area, 2)}" for rate, area in areas.items()),
                "return at the best": number(np.mean([float(row["return"]) for row in best]), 2),
                "area": number(np.mean([float(row["auc"]) for row in best]), 2),
                "worst agent": number(min(float(row["worst"]) for row in best), 2),
            }
        )
    if lines:
        tables["optim4rl_known"] = markdown(lines, list(lines[0]))
    crossed = []
    for structure in STRUCTURES:
        row = {"structure": structure}
        for kind in PROCESSINGS:
            areas = [float(run["auc"]) for run in cells.get(f"GRU {structure}, {kind}", [])]
            row[kind] = f"{mean_and_spread(areas)} ({len(areas)})" if areas else ""
        crossed.append(row)
    took = cost([run for arm in CROSSED for run in cells.get(arm, [])])
    tables["optim4rl_crossed"] = took + markdown(crossed, list(crossed[0]))
    if (path := path.with_name("transfer.csv")).exists():
        tables["optim4rl_transfer"] = transfer_table(read_rows(path)[0])
    if (path := path.with_name("identity.csv")).exists():
        tables["optim4rl_identity"] = identity_table(read_rows(path)[0])
    return tables


def draw_optimizers(results):
    """Return of fresh agents against updates: every meta-seed of a few cells, Adam's rates behind them."""
    path = results / GRID / "tests.csv"
    if not path.exists():
        return
    arm_of = {row["key"]: row["arm"] for row in read_rows(results / GRID / "summary.csv")[0]}
    lines = grouped(read_rows(path)[0], lambda row: (arm_of[row["key"]], row["optimiser"], row["key"]))
    figure, axes = begin(1, 3, (10, 3), sharey=True)
    for axis, arm in zip(axes[0], ("memoroid", "GRU adaptive, signlog", "GRU linear, signlog")):
        for (name, optimiser, _), points in lines.items():
            xs, ys = ([float(point[c]) for point in points] for c in ("update", "return"))
            if name == "memoroid" and optimiser.startswith("Adam ") and optimiser.split()[1][0].isdigit():
                axis.plot(xs, ys, color="0.8", linewidth=0.7)
            if name == arm and optimiser == "cell":
                axis.plot(xs, ys, color="C3", linewidth=1.2, zorder=3)
        axis.set(title=arm, xlabel="updates of fresh agents")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("return (grey: Adam at five rates)")
    save(figure, results / GRID / "picture.svg")
