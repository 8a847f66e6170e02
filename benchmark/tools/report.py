"""Turns finished runs and measurements into the tables and the pictures of README.md and docs/.

    python benchmark/tools/report.py                    # from runs/grids and benchmark/results
    python benchmark/tools/report.py --runs ""          # from the committed benchmark/results alone

The runs of a grid (benchmark/tools/run.py: runs/grids/NAME) become benchmark/results/NAME: runs.csv (a row per run),
curves.csv (training returns in bins of steps) and intervals.csv (interquartile means over the seeds with bootstrap intervals).
From these files and no others come picture.svg, seconds.svg (the same curves over wall time), and the Markdown tables between
`<!-- results: NAME -->` and `<!-- end results -->`. A run that failed or has not ended is named, and is no part of any mean.
Returns are those of the agent at that time, never the best so far. Nothing is typed by hand.

Students of a policy and learned optimisers have figures of their own, which students.py and optimizers.py write.

What benchmark/speed measures lies in benchmark/results/machines/MACHINE; the markers are `<!-- results: MACHINE/NAME -->`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from curves import (
    arms_picture,
    board_picture,
    grid_picture,
    interval_rows,
    memory_length_picture,
    scan_picture,
    update_picture,
)
from distillation import in_context_picture, in_context_tables
from optimizers import collect_optimizers, draw_optimizers, optimizer_tables
from records import GOAL, WINDOW, read_grids
from students import collect_students, draw_students, student_tables
from tables import fill, grouped, markdown, natural, read_rows, task_name, write_rows


def mean_and_spread(values):
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def states(cell):
    """What became of a cell's runs, in words: "3 of 3 done", "1 of 3 done, 1 failed, 1 unfinished"."""
    done, failed = (sum(row["state"] == state for row in cell) for state in ("done", "failed"))
    counts = [f"{done} of {len(cell)} done", f"{failed} failed", f"{len(cell) - done - failed} unfinished"]
    return ", ".join(text for text in counts if not text.startswith("0 ") or text is counts[0])


def steps_text(rows):
    """The budget of some runs, which a table states: one number where all had the same."""
    steps = sorted({int(row["total_timesteps"]) for row in rows if row["total_timesteps"]})
    return " to ".join(f"{n:,}" for n in (steps[:1] + steps[-1:] if len(steps) > 1 else steps)) or "not known yet"


def final_return(row):
    """The greedy return of the final network; of a program that does not evaluate, of its last episodes in training."""
    return float(row["greedy_return"] or row["training_return"])


def cell_text(cell):
    """Mean ± standard deviation over a cell's finished runs, and how many those are where some are missing."""
    values = [final_return(row) for row in cell if row["state"] == "done"]
    text = "" if not values else f"{values[0]:.3f}" if len(values) == 1 else mean_and_spread(values)
    missing = "" if len(values) == len(cell) else states(cell)
    return f"{text} ({missing})" if text and missing else text or missing


def trouble(rows):
    """A list of the runs that failed, each with the last line of its log, and of those that have not ended; or ""."""
    lines = [
        f"- failed: {task_name(row)}, {row['arm']}, seed {row['seed']}: `{row['error'].replace('`', chr(39)) or 'no log'}`"
        for row in rows
        if row["state"] == "failed"
    ]
    unfinished = grouped((r for r in rows if r["state"] not in ("done", "failed")), lambda r: (task_name(r), r["arm"]))
    lines += [
        f"- unfinished: {task}, {arm}, seed {', '.join(str(row['seed']) for row in cell)}"
        for (task, arm), cell in unfinished.items()
    ]
    return "\n\n" + "\n".join(lines) if lines else ""


def evaluation_text(rows):
    """How the returns of a table were measured, from the rows."""
    done = [row for row in rows if row["state"] == "done"]
    greedy = sorted({int(row["episodes"]) for row in done if row["greedy_return"]})
    texts = [f"greedy return of the final network over {' or '.join(map(str, greedy))} episodes"] if greedy else []
    if any(not row["greedy_return"] for row in done):
        texts.append(f"of programs that do not evaluate: training return of the last {WINDOW} episodes")
    devices = {row["device"] for row in done if row["device"]}
    commits = {row["commit"][:7] + (" with changes" if str(row["dirty"]) == "True" else "") for row in done if row["commit"]}
    texts = texts or ["no run has ended yet"]
    texts += ["device: " + ", ".join(sorted(devices))] if devices else []
    texts += ["code of " + ", ".join(sorted(commits))] if commits else []
    return "; ".join([states(rows), *texts, "mean ± sd over seeds"])


def crossed_table(rows):
    """Arms as rows, environments as columns."""
    tasks, table = grouped(rows, task_name), []
    heads = {task: f"{task.removeprefix('popgym-')}, {steps_text(members)} steps" for task, members in tasks.items()}
    for arm, members in sorted(grouped(rows, lambda row: row["arm"]).items(), key=lambda item: natural(item[0])):
        cells = grouped(members, task_name)
        table.append({"arm": arm} | {heads[task]: cell_text(cells[task]) if task in cells else "" for task in tasks})
    return f"{evaluation_text(rows)}\n\n{markdown(table, ['arm', *heads.values()])}{trouble(rows)}"


def reference_table(rows, published, source):
    """Environments as rows, arms as columns, and beside them what others published: an env_id and columns of their own."""
    if published and "env_id" not in published[0]:
        raise ValueError(f"reference.csv: expected a column env_id, got {', '.join(published[0])}; rename one")
    table, arms, theirs = [], sorted({row["arm"] for row in rows}, key=natural), {row["env_id"]: row for row in published}
    columns = [name for name in (published[0] if published else {}) if name != "env_id"]
    for task, members in grouped(rows, task_name).items():
        cells = grouped(members, lambda row: row["arm"])
        row = {"environment": task.removeprefix("popgym-"), "steps": steps_text(members)}
        row |= {arm: cell_text(cells[arm]) if arm in cells else "" for arm in arms}
        table.append(row | {name: theirs.get(members[0]["env_id"], {}).get(name, "") for name in columns})
    text = ". ".join(part for part in (evaluation_text(rows), source) if part)
    return f"{text}\n\n{markdown(table, ['environment', 'steps', *arms, *columns])}{trouble(rows)}"


def reached_text(cell, column, digits):
    """When each finished run of a cell reached the goal. A run that went on after a stop has no clock of its own."""
    texts = []
    for row in cell:
        if row["state"] == "done":
            never = "stopped meanwhile" if row["steps_to_goal"] != "" and row[column] == "" else "never"
            texts.append(f"{float(row[column]):,.{digits}f}" if row[column] != "" else never)
    return ", ".join(texts)


def race_table(rows):
    """Who gets to GOAL first, by steps and by the clock: a row per environment and arm, every seed."""
    table = []
    for (task, arm), cell in grouped(rows, lambda row: (task_name(row), row["arm"])).items():
        seconds = [float(row["seconds"]) for row in cell if row["state"] == "done"]
        table.append(
            {
                "environment": task.removeprefix("popgym-"),
                "arm": arm,
                "budget (steps)": steps_text(cell),
                "runs": states(cell),
                f"steps to {GOAL}": reached_text(cell, "steps_to_goal", 0),
                f"seconds to {GOAL}": reached_text(cell, "seconds_to_goal", 1),
                "seconds per run": ", ".join(f"{value:.0f}" for value in seconds),
                f"last {WINDOW} in training": ", ".join(
                    f"{float(row['training_return']):.3f}" for row in cell if row["state"] == "done"
                ),
                "final return": cell_text([row for row in cell if row["state"] == "done"]),
            }
        )
    started = [float(row["start_up"]) for row in rows if row["start_up"]]
    start = f"to the first log {min(started):.1f} to {max(started):.1f} s" if started else "no start recorded"
    workers = " or ".join(sorted({str(row["workers"]) for row in rows if row["workers"]})) or "an unknown number of"
    text = (
        f"{evaluation_text(rows)}. The goal is reached at the first episode in training, exploration included, that brings "
        f"the mean return of the last {WINDOW} to {GOAL}. Seconds count from the start of the process ({start}), {workers} "
        "runs at a time; seeds stand in order."
    )
    return f"{text}\n\n{markdown(table, list(table[0]))}{trouble(rows)}"


def run_table(rows, name):
    """A row per environment, arm and budget: every seed's return, and when its mean training return was first 0.5."""
    table = []
    for cell in grouped(rows, lambda r: (task_name(r), r["arm"], steps_text([r]))).values():
        done = [row for row in cell if row["state"] == "done"]
        clock = "cpu_seconds" if any(row.get("cpu_seconds") for row in done) else "seconds"
        seconds = [float(row[clock]) for row in done if row.get(clock)]
        table.append(
            {
                "environment": task_name(cell[0]),
                "arm": "" if cell[0]["arm"] == name else cell[0]["arm"],  # a script's default arm is no arm
                "steps": steps_text(cell),
                "greedy return, mean ± sd": cell_text(cell),
                "each seed": ", ".join(f"{final_return(row):.3f}" for row in done),
                "trains at 0.5 from (thousand steps)": ", ".join(
                    f"{int(row['steps_to_half']) / 1000:.3g}" if row["steps_to_half"] else "never" for row in done
                ),
                "seconds per run": f"{min(seconds):.0f} to {max(seconds):.0f}{' of CPU' if clock == 'cpu_seconds' else ''}"
                if done
                else "",
            }
        )
    columns = [column for column in table[0] if column != "arm" or any(row["arm"] for row in table)]
    where = f"{evaluation_text(rows)}\n\n" if any(row["device"] for row in rows) else ""  # old results do not say
    return where + markdown(table, columns) + trouble(rows)


LEVELS = "Easy", "Medium", "Hard"
MAIN_ARMS = "PPO, gated LRU", "DQN, FFM"  # of the board, which other arms stand beside


def board_cells(rows, curve, published):
    """[{task, level, arm: (greedy returns, best of training), "gru", "best", "ours"}] of the board, a row per environment.

    Best of training: the largest mean return over a fortieth of the steps, of any seed. Ours: of the arm with the best mean
    greedy return; None while no run has ended.
    """
    best = {
        key: max(float(p["episodic_return"]) for p in points) for key, points in grouped(curve, lambda p: p["key"]).items()
    }
    theirs, cells = {row["env_id"]: row for row in published}, []
    for env_id, members in grouped(rows, lambda row: row["env_id"]).items():
        level = next(level for level in LEVELS if f"{level}-v" in env_id)
        cell = {"task": env_id.removeprefix("popgym-").split(":")[-1].split(level)[0], "level": level, "arms": {}}
        for arm, runs in grouped(members, lambda row: row["arm"]).items():
            done = sorted((row for row in runs if row["state"] == "done"), key=lambda row: int(row["seed"]))
            if done:
                cell["arms"][arm] = [final_return(row) for row in done], max(best.get(row["key"], np.nan) for row in done)
        means = [np.mean(greedy) for greedy, _ in cell["arms"].values()]
        cell |= {name: theirs.get(env_id, {}).get(name, "") for name in ("gru", "best", "best_memory")}
        cells.append(cell | {"ours": max(means, default=None)})
    return sorted(cells, key=lambda cell: (cell["task"], LEVELS.index(cell["level"])))


def board_table(rows, curve, published, source):
    """Environments as rows, arms as columns, and beside them the published GRU and the best of thirteen memories."""
    cells = board_cells(rows, curve, published)
    arms = sorted({row["arm"] for row in rows}, key=lambda arm: (arm not in MAIN_ARMS, natural(arm)))
    arms, table = [*MAIN_ARMS, *(arm for arm in arms if arm not in MAIN_ARMS)], []
    for cell in cells:
        row = {"environment": f"{cell['task']} {cell['level']}"}
        for arm in arms:
            greedy, best = cell["arms"].get(arm, ([], None))
            row[arm] = f"{', '.join(f'{value:.2f}' for value in greedy)} ({best:.2f})" if greedy else ""
        table.append(
            row | {"published GRU, best": f"{float(cell['gru']):.2f}, {float(cell['best']):.2f}" if cell["gru"] else ""}
        )
    both = [cell for cell in cells if cell["gru"] and cell["ours"] is not None]
    gru, best = (sum(cell["ours"] >= float(cell[name]) - 0.005 for cell in both) for name in ("gru", "best"))
    short = [f"{cell['task']} {cell['level']}" for cell in both if cell["ours"] < float(cell["best"]) - 0.005]
    seconds = {}
    for arm in arms:
        found = [float(row["cpu_seconds"]) for row in rows if row["arm"] == arm and row["state"] == "done"]
        seconds[arm] = f"{arm} {min(found):.0f} to {max(found):.0f}" if found else ""
    seconds = "; ".join(text for text in seconds.values() if text)
    reached = f"reaches GRU's in {gru} and the best of thirteen memories' in {best} (to 0.005, as exact as those numbers are)"
    text = (
        f"{evaluation_text(rows)}. Each seed has its greedy return, and in brackets is the best of training. Of {len(both)} "
        f"environments that have a published number and a run, the better of these arms {reached}. It stays below that best "
        f"on {', '.join(short) or 'none'}. CPU seconds per run: {seconds}. {source}"
    )
    waiting = sum(row["state"] not in ("done", "failed") for row in rows)
    failed = trouble([row for row in rows if row["state"] == "failed"])
    note = f"\n\n{waiting} runs of the grid are still to be done: an empty cell is one of them." if waiting else ""
    return f"{text}\n\n{markdown(table, list(table[0]))}{note}{failed}"


def in_order(rows, name):
    """Rows by their arms, in the order of the grid's lines: its first arm is what the others are compared with."""
    lines = (Path(__file__).parents[1] / "learn" / f"{name.split('_')[0]}.sh").read_text()
    return sorted(rows, key=lambda row: (lines.find(f"\n{row['arm']}:") % len(lines), natural(row["arm"]), int(row["seed"])))


def each_text(values):
    """Mean ± standard deviation, and every seed."""
    mean = f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if len(values) > 1 else "")
    return f"{mean} ({', '.join(f'{value:.2f}' for value in values)})" if values else ""


def sapg_table(rows, curve):
    """The leader's return of each arm at the end of training, greedily, and how soon; how far apart its policies are."""
    returns = {
        key: [float(p["episodic_return"]) for p in points] for key, points in grouped(curve, lambda p: p["key"]).items()
    }
    steps = {key: [int(p["global_step"]) for p in points] for key, points in grouped(curve, lambda p: p["key"]).items()}
    late = {key: float(np.mean(values[-max(1, len(values) // 10) :])) for key, values in returns.items()}
    arms = grouped([row for row in rows if row["state"] == "done"], lambda row: row["arm"])
    best, table = max(np.mean([late[row["key"]] for row in cell]) for cell in arms.values()), []
    for arm, cell in arms.items():
        metrics = [json.loads(row["metrics"] or "{}") for row in cell]
        soon = [
            next((s for s, value in zip(steps[row["key"]], returns[row["key"]]) if value >= 0.8 * best), None) for row in cell
        ]
        apart = []
        for name in ("coverage", "kl_between_policies", "effective_sample_size"):
            found = [m[f"sapg/{name}"] for m in metrics if f"sapg/{name}" in m]
            apart.append(f"{np.mean(found):.2f}" if found else "-")
        table.append(
            {
                "arm": arm,
                "last tenth of training": each_text([late[row["key"]] for row in cell]),
                "greedy": each_text([final_return(row) for row in cell]),
                "80 % of the best from (million steps)": ", ".join("never" if s is None else f"{s / 1e6:.2f}" for s in soon),
                "coverage, KL, ESS": ", ".join(apart),
                "CPU s": f"{np.mean([float(row['cpu_seconds']) for row in cell]):.0f}",
            }
        )
    return f"{evaluation_text(rows)}\n\n{markdown(table, list(table[0]))}{trouble(rows)}"


def grid_table(folder):
    """The table of a grid, from its folder of CSV files."""
    rows, _ = read_rows(folder / "runs.csv")
    if folder.name.split("_")[0] == "sapg":
        return sapg_table(in_order(rows, folder.name), read_rows(folder / "curves.csv")[0])
    if folder.name == "popgym_board":
        return board_table(rows, read_rows(folder / "curves.csv")[0], *read_rows(folder / "reference.csv"))
    if folder.name == "race":
        return race_table(rows)
    if folder.name == "dqn_popgym":
        return crossed_table(rows)
    if folder.name == "popgym_easy":
        path = folder / "reference.csv"
        return reference_table(rows, *(read_rows(path) if path.exists() else ([], "")))
    return run_table(rows, folder.name)


def measured_tables(results):
    """{marker: table} of the files of benchmark/speed, which are named MACHINE/FILE, and of benchmark/probes."""
    tables = {}
    for path in [*sorted(results.glob("machines/*/*.csv")), *results.glob("memory_length/summary.csv")]:
        rows, where = read_rows(path)
        name = path.parent.name if path.stem == "summary" else f"{path.parent.name}/{path.stem}"
        if path.stem == "update":  # every part of the parent's update, and of all others the whole and the parts that differ
            most = [row for row in rows if row["script"] != "dqn_tbb_ffm" and row["what"] in ("update", "scan", "jax paper")]
            tables[f"{name}_all"] = f"{where}\n\n{markdown(most, list(rows[0]))}" if most else where
            rows = [row for row in rows if row["script"] == "dqn_tbb_ffm"]
        tables[name] = f"{where}\n\n{markdown(rows, list(rows[0]))}" if rows else where
    return tables


def collect(root, runs, results, with_intervals=True):
    """Writes the CSV files of every grid below a folder of runs."""
    collect_students(root, runs, results)
    collect_optimizers(root, runs, results)
    for name, (rows, curve) in read_grids(runs, root, results).items():
        write_rows(results / name / "runs.csv", rows)
        if curve:
            write_rows(results / name / "curves.csv", curve)
            path = results / name / "intervals.csv"
            path.unlink(missing_ok=True)  # rather none than those of other curves
            if with_intervals:
                write_rows(path, interval_rows(rows, curve))


def draw(results):
    """Writes every picture, from the CSV files alone."""

    def rows(folder, name):
        return read_rows(path)[0] if (path := folder / f"{name}.csv").exists() else []

    for folder in sorted(path.parent for path in results.glob("*/intervals.csv")):
        found = [rows(folder, name) for name in ("runs", "curves", "intervals")]
        if folder.name.split("_")[0] == "sapg":
            arms_picture(in_order(found[0], folder.name), found[1], folder / "picture.svg")
            continue
        if folder.name == "popgym_board":
            board_picture(board_cells(found[0], found[1], rows(folder, "reference")), folder / "picture.svg")
            continue
        grid_picture(*found, folder / "picture.svg", "steps")
        if len({row["arm"] for row in found[0]}) > 1 and all(point["seconds"] for point in found[1]):  # arms to compare
            grid_picture(*found, folder / "seconds.svg", "seconds")
    for folder in sorted(results.glob("machines/*/")):
        for name in ("scan", "scan_cuda"):
            if found := rows(folder, name):
                scan_picture(found, folder / f"{name}.svg")
        if found := rows(folder, "update"):
            update_picture(found, rows(folder, "update_scan"), rows(folder, "ppo_update"), folder / "update.svg")
    draw_students(results)
    draw_optimizers(results)
    if found := rows(results / "memory_length", "curves"):
        memory_length_picture(found, rows(results / "memory_length", "summary"), results / "memory_length" / "picture.svg")
    if (results / "in_context" / "summary.csv").exists():
        in_context_picture(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="the repository")
    parser.add_argument("--runs", default="runs", help='folder of the runs below the root; "" leaves them out')
    parser.add_argument("--no-pictures", action="store_true", help="tables only; needs neither matplotlib nor rliable")
    args = parser.parse_args()
    results = args.root / "benchmark" / "results"
    if args.runs:
        collect(args.root, args.root / args.runs, results, with_intervals=not args.no_pictures)
    if not args.no_pictures:
        draw(results)
    tables = {path.parent.name: grid_table(path.parent) for path in sorted(results.glob("*/runs.csv"))}
    tables |= measured_tables(results) | student_tables(results) | optimizer_tables(results) | in_context_tables(results)
    fill(args.root, tables)


if __name__ == "__main__":
    main()
