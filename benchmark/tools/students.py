"""The students of `benchmark/learn/bpd.sh` as CSV files, tables and a picture. report.py calls it.

A run's figures are in its report.json, which the script writes; benchmark/results/bpd gets students.csv (a row per cut),
sweep.csv (a row per threshold, without fine-tuning) and, from benchmark/speed/policy.py, policy.csv.
"""

import json

import numpy as np
from curves import begin, save
from records import portable_command
from tables import csv_link, each_seed, grouped, markdown, natural, number, read_rows, write_rows

GRID = "bpd"
SHARES = ("95", "97", "98")  # of weights dropped, in percent
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t: 97.5 % of n - 1 degrees of freedom lie below


def collect_students(root, runs, results):
    """Writes students.csv and sweep.csv from the finished runs of the grid, if there are any."""
    students, sweeps = [], []
    for path in sorted(runs.glob(f"grids/{GRID}/*/record.json")):
        record = json.loads(path.read_text())
        reports = sorted(path.parent.glob("runs/*/report.json"))
        if record["state"] != "done" or not reports:
            continue
        report = json.loads(reports[-1].read_text())
        run = {"arm": record["arm"], "seed": record["seed"]}
        about = {"updates": report["args"]["updates"], "fine_tune_updates": report["args"]["fine_tune_updates"]}
        about |= {"cpu_seconds": f"{record['cpu_seconds']:.0f}", "teacher_return": f"{report['returns']['teacher']:.4f}"}
        about |= {name: record[name] for name in ("commit", "dirty", "device")}
        about["command"] = portable_command(record["command"], root)
        for cut in report["cuts"]:
            row = run | {"cut": cut["cut"], "worst_of_last_fifth": f"{min(report['last_fifth']):.2f}"}
            row |= {name: f"{cut[name]:.2f}" for name in ("sparsity", "performance", "before_fine_tuning")}
            row |= {"weights": cut["weights"], "share_of_teacher": f"{cut['share_of_teacher']:.3f}"}
            row |= {"heldout_error": f"{cut['heldout_error']:.5f}", "units": " ".join(map(str, cut["units"]))}
            row |= {name: cut[name] for name in ("numbers", "bytes_sparse", "bytes_dense", "bytes_state", "multiply_adds")}
            row |= {f"sparsity_{name.removeprefix('memory.')}": f"{value:.1f}" for name, value in cut["layers"].items()}
            students.append(row | {"torch_us": cut["latency"][1]} | about)
        for row in report["sweep"]:
            sweeps.append(run | {"threshold": row["threshold"]} | {k: f"{row[k]:.2f}" for k in ("sparsity", "performance")})
    if students:
        key = lambda row: [natural(row[name]) for name in ("arm", "cut", "seed")]  # noqa: E731
        write_rows(results / GRID / "students.csv", sorted(students, key=key))
        write_rows(results / GRID / "sweep.csv", sorted(sweeps, key=lambda row: [natural(row["arm"]), row["seed"]]))


def share_of(row):
    """The share of weights that a row was told to drop, in percent, or "" if a threshold decided."""
    kind, value = row["cut"].split()
    return f"{100 * float(value):.3g}" if kind == "sparsity" else ""


def each(rows, column, digits=1):
    return each_seed([row[column] for row in rows], digits)


def signed(value):
    return ("+" if value >= 0 else "-") + number(abs(value), 1)


def interval(differences):
    """Mean and 95 % interval of paired differences, by Student's t."""
    n = len(differences)
    if n not in T:
        return "one pair" if n == 1 else ""
    half = T[n] * np.std(differences, ddof=1) / n**0.5
    mean = np.mean(differences)
    return f"{signed(mean)} ({signed(mean - half)} to {signed(mean + half)})"


def cells_of(rows):
    """{arm: {share: rows}} of the cuts to a given share, the full method first."""
    arms = grouped([row for row in rows if share_of(row) in SHARES], lambda row: row["arm"])
    return {arm: grouped(arms[arm], share_of) for arm in sorted(arms, key=lambda name: (name != "svd", name.lower()))}


def method_table(rows):
    """Performance at equal sparsity: a row per arm, a column per share; the mean, and each seed in brackets."""
    table = []
    for arm, shares in cells_of(rows).items():
        cell = {share: [float(row["performance"]) for row in shares.get(share, [])] for share in SHARES}
        shown = {s: f"{number(np.mean(values), 1)} ({each_seed(values, 1)})" if values else "" for s, values in cell.items()}
        table.append({"arm": arm} | {f"{share} %": shown[share] for share in SHARES})
    return markdown(table, list(table[0])) if table else "no run has ended yet"


def ahead_table(rows):
    """By how much the full method is ahead of each other arm at equal sparsity: means and intervals of paired differences."""
    table, cells = [], cells_of(rows)
    ours = {(row["seed"], share): float(row["performance"]) for share in SHARES for row in cells.get("svd", {}).get(share, [])}
    for arm, shares in cells.items():
        row = {"svd is ahead of": arm}
        for share in SHARES:
            members = [r for r in shares.get(share, []) if (r["seed"], share) in ours]
            row[f"at {share} %"] = interval([ours[r["seed"], share] - float(r["performance"]) for r in members])
        table += [] if arm == "svd" else [row]
    return markdown(table, list(table[0])) if table else "no run has ended yet"


def arm_table(rows):
    """Arms at the sparsity that they choose: a threshold of 0 decides; a dense student is whole."""
    table = []
    for arm, members in grouped(rows, lambda row: row["arm"]).items():
        cell = [row for row in members if row["cut"] in ("threshold 0", "sparsity 0")]
        if cell:
            row = {"arm": arm, "sparsity, %": each(cell, "sparsity"), "performance": each(cell, "performance")}
            row |= {"worst of the last fifth": each(cell, "worst_of_last_fifth"), "CPU seconds": each(cell, "cpu_seconds", 0)}
            table.append(row)
    return markdown(table, list(table[0])) if table else "no run has ended yet"


def layer_table(rows):
    """What is left of svd's students, by cut; the CSV file has all cuts."""
    table = []
    ours = [row for row in rows if row["arm"] == "svd" and row["cut"] in ("threshold 0", "sparsity 0.97", "sparsity 0.98")]
    for cut, cell in grouped(ours, lambda row: row["cut"]).items():
        layers = ", ".join(f"{np.mean([float(row[f'sparsity_{name}']) for row in cell]):.0f}" for name in "EBRV")
        table.append(
            {
                "cut": cut,
                "weights, each seed": ", ".join(row["weights"] for row in cell),
                "of the teacher, %": each(cell, "share_of_teacher", 2),
                "sparsity of E, B, R, V, %": layers,
                "live z, channels, y": "; ".join(row["units"] for row in cell),
                "performance": each(cell, "performance"),
            }
        )
    return markdown(table, list(table[0])) if table else "no run has ended yet"


def sweep_table(rows):
    """Thresholds without fine-tuning."""
    table = []
    shown = [row for row in rows if row["arm"] == "svd" and int(row["threshold"]) < 5]  # the CSV file has more
    cells = grouped(shown, lambda row: int(row["threshold"]))
    for threshold, cell in sorted(cells.items(), reverse=True):
        row = {"C": threshold, "dropout rate": f"{1 / (1 + np.exp(-threshold)):.2f}", "sparsity, %": each(cell, "sparsity")}
        table.append(row | {"performance before fine-tuning": each(cell, "performance")})
    return markdown(table, list(table[0])) if table else "no run has ended yet"


def where(rows):
    """Device, code and training of the rows, in words."""
    devices, commits = sorted({row["device"] for row in rows}), sorted({row["commit"][:7] for row in rows})
    updates = sorted({f"{int(row['updates']):,} + {int(row['fine_tune_updates']):,}" for row in rows})
    runs = len({(row["arm"], row["cut"], row["seed"]) for row in rows})
    return f"{runs} students; updates: {', '.join(updates)}; device: {', '.join(devices)}; code of {', '.join(commits)}"


def student_tables(results):
    """{marker: table} of the committed CSV files."""
    folder, tables = results / GRID, {}
    if (folder / "students.csv").exists():
        rows, _ = read_rows(folder / "students.csv")
        tables[f"{GRID}_methods"] = (
            f"{csv_link(folder / 'students.csv', 'every student')}: {where(rows)}\n\n{method_table(rows)}"
        )
        tables[f"{GRID}_ahead"] = ahead_table(rows)
        tables[f"{GRID}_arms"] = arm_table(rows)
        tables[f"{GRID}_layers"] = layer_table(rows)
        tables[f"{GRID}_sweep"] = sweep_table(read_rows(folder / "sweep.csv")[0])
    if (folder / "policy.csv").exists():
        rows, about = read_rows(folder / "policy.csv")
        tables[f"{GRID}_policy"] = f"{about}\n\n{markdown(rows, list(rows[0]))}"
    return tables


def student_picture(rows, path):
    """Performance against sparsity: a line per method, a point per student."""
    figure, axes = begin(1, 2, (9, 3.4))
    arms = [arm for arm in ("svd", "magnitude", "L1") if any(row["arm"] == arm for row in rows)]
    for i, arm in enumerate(arms):
        cells = grouped([row for row in rows if row["arm"] == arm and share_of(row) in SHARES], share_of)
        xs = sorted(cells, key=float)
        for axis, column in zip(axes[0], ("performance", "heldout_error")):
            means = [np.mean([float(row[column]) for row in cells[x]]) for x in xs]
            axis.plot([float(x) for x in xs], means, "-", color=f"C{i}", label=arm)
            for x in xs:
                values = [float(row[column]) for row in cells[x]]
                places = float(x) + 0.06 * (i - 1) + np.zeros(len(values))
                axis.plot(places, values, "o", color=f"C{i}", alpha=0.6, markersize=4)
    axes[0, 0].set(ylabel="performance (teacher = 100)", xlabel="weights dropped (%)")
    axes[0, 1].set(ylabel="cloning error on held-out episodes", xlabel="weights dropped (%)")
    for axis in axes[0]:
        axis.set_xticks([95, 97, 98])
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    save(figure, path)


def draw_students(results):
    path = results / GRID / "students.csv"
    if path.exists():
        student_picture(read_rows(path)[0], path.with_name("picture.svg"))
