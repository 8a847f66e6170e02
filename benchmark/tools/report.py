"""Turns finished runs and measurements into the tables and the pictures of README.md and docs/.

    python benchmark/tools/report.py                    # from runs/grids and benchmark/results
    python benchmark/tools/report.py --runs ""          # from the committed benchmark/results alone

The runs of a grid (benchmark/tools/run.py: runs/grids/NAME) become benchmark/results/NAME: runs.csv (a row per run),
curves.csv (training returns in bins of steps) and intervals.csv (interquartile means over the seeds with bootstrap intervals).
From these files and no others come picture.svg, seconds.svg (the same curves over wall time), and the Markdown tables between
`<!-- results: NAME -->` and `<!-- end results -->`. A run that failed or has not ended is named, and is no part of any mean.
Returns are those of the agent at that time, never the best so far. Nothing is typed by hand.

A table has six columns and three digits at most; the CSV files, which it links to, have all.

Students of a policy and learned optimisers have figures of their own, which students.py and optimizers.py write. What
benchmark/speed measures lies in benchmark/results/machines/MACHINE; measured.py makes tables of it, and the markers are
`<!-- results: MACHINE/NAME -->`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from board import MAIN_ARMS, board_cells
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
from measured import measured_tables
from optimizers import collect_optimizers, draw_optimizers, optimizer_tables
from probed import longer_picture, probed_tables
from records import GOAL, WINDOW, read_grids
from students import collect_students, draw_students, student_tables
from tables import (
    csv_link,
    each_seed,
    fill,
    final_return,
    grouped,
    markdown,
    mean_and_spread,
    natural,
    number,
    read_rows,
    short_name,
    task_name,
    with_seeds,
    write_rows,
)
from throughput import throughput_table


def states(cell):
    """What became of a cell's runs, in words: "3 of 3 done", "1 of 3 done, 1 failed, 1 unfinished"."""
    done, failed = (sum(row["state"] == state for row in cell) for state in ("done", "failed"))
    counts = [f"{done} of {len(cell)} done", f"{failed} failed", f"{len(cell) - done - failed} unfinished"]
    return ", ".join(text for text in counts if not text.startswith("0 ") or text is counts[0])


def steps_text(rows):
    """The budget of some runs, which a table states: one number where all had the same."""
    steps = sorted({int(row["total_timesteps"]) for row in rows if row["total_timesteps"]})
    return " to ".join(f"{n:,}" for n in (steps[:1] + steps[-1:] if len(steps) > 1 else steps)) or "not known yet"


def cell_text(cell):
    """Mean ± standard deviation over a cell's finished runs, and how many those are where some are missing."""
    text = mean_and_spread([final_return(row) for row in cell if row["state"] == "done"])
    missing = "" if all(row["state"] == "done" for row in cell) else states(cell)
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
    heads = {task: f"{short_name(members[0])}, {steps_text(members)} steps" for task, members in tasks.items()}
    for arm, members in sorted(grouped(rows, lambda row: row["arm"]).items(), key=lambda item: natural(item[0])):
        cells = grouped(members, task_name)
        table.append({"arm": arm} | {heads[task]: cell_text(cells[task]) if task in cells else "" for task in tasks})
    return f"{evaluation_text(rows)}\n\n{markdown(table, ['arm', *heads.values()])}{trouble(rows)}"


def reference_table(rows, published, source):
    """Environments as rows, arms as columns; one column more has what others published, of all columns of theirs."""
    if published and "env_id" not in published[0]:
        raise ValueError(f"reference.csv: expected a column env_id, got {', '.join(published[0])}; rename one")
    table, arms, theirs = [], sorted({row["arm"] for row in rows}, key=natural), {row["env_id"]: row for row in published}
    columns = [name for name in (published[0] if published else {}) if name != "env_id"]
    head = "; ".join(columns)
    for members in grouped(rows, task_name).values():
        cells = grouped(members, lambda row: row["arm"])
        row = {"environment": short_name(members[0])}
        row |= {arm: cell_text(cells[arm]) if arm in cells else "" for arm in arms}
        found = [theirs.get(members[0]["env_id"], {}).get(name, "") for name in columns]
        table.append(row | {head: "; ".join(number(value, 2) if value else "-" for value in found) if any(found) else ""})
    text = ". ".join(part for part in (f"{evaluation_text(rows)}; {steps_text(rows)} steps", source) if part)
    return f"{text}\n\n{markdown(table, ['environment', *arms, *([head] if head else [])])}{trouble(rows)}"


def listed(texts):
    """Texts with commas between them; if all are "never", the word once."""
    texts = list(texts)
    return "never" if set(texts) == {"never"} else ", ".join(texts)


def reached_text(cell, column, decimals=None, unit=1):
    """When each finished run of a cell reached the goal. A run that went on after a stop has no clock of its own."""
    texts = []
    for row in cell:
        if row["state"] == "done":
            never = "stopped meanwhile" if row["steps_to_goal"] != "" and row[column] == "" else "never"
            texts.append(number(float(row[column]) / unit, decimals) if row[column] != "" else never)
    return listed(texts)


def race_table(rows):
    """Who gets to GOAL first, by steps and by the clock: a row per environment and arm, every seed."""
    table = []
    for cell in grouped(rows, lambda row: (task_name(row), row["arm"])).values():
        table.append(
            {
                "environment": short_name(cell[0]),
                "arm": cell[0]["arm"],
                "budget (steps)": steps_text(cell),
                f"thousand steps to {GOAL}": reached_text(cell, "steps_to_goal", unit=1000),
                f"seconds to {GOAL}": reached_text(cell, "seconds_to_goal", 1),
                "final return": cell_text(cell),
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


def half_text(rows):
    """The thousand steps after which each run's mean training return was first 0.5."""
    return listed(number(int(row["steps_to_half"]) / 1000) if row["steps_to_half"] else "never" for row in rows)


def run_table(rows, name):
    """A row per environment, arm and budget: every seed's return, and when its mean training return was first 0.5."""
    table = []
    for cell in grouped(rows, lambda r: (task_name(r), r["arm"], steps_text([r]))).values():
        done = [row for row in cell if row["state"] == "done"]
        clock = "cpu_seconds" if any(row.get("cpu_seconds") for row in done) else "seconds"
        seconds = [float(row[clock]) for row in done if row.get(clock)]
        seconds = dict.fromkeys(number(value, 0) for value in (min(seconds), max(seconds))) if seconds else []
        table.append(
            {
                "environment": short_name(cell[0]),
                "arm": "" if cell[0]["arm"] == name else cell[0]["arm"],  # a script's default arm is no arm
                "steps": steps_text(cell),
                "greedy return (each seed)": with_seeds(
                    [final_return(row) for row in done], states(cell) if len(done) < len(cell) else ""
                ),
                "thousand steps until training returns 0.5": half_text(done),
                "seconds per run": " to ".join(seconds) + (" of CPU" if seconds and clock == "cpu_seconds" else ""),
            }
        )
    columns = [column for column in table[0] if column != "arm" or any(row["arm"] for row in table)]
    return f"{evaluation_text(rows)}\n\n{markdown(table, columns)}{trouble(rows)}"


TAPE_OR_SEGMENTS = ("segments_lru", "LRU"), ("segments_s5", "S5"), ("segments_s5_paper", "S5, the paper's settings")


def segments_table(results):
    """Tape and segments as rows, memories and losses as columns: the greedy return, and when training was first at 0.5."""
    table, rows = {}, []
    for grid, memory in TAPE_OR_SEGMENTS:
        found = read_rows(results / grid / "runs.csv")[0]
        rows += found
        for arm, cell in grouped(found, lambda row: row["arm"]).items():
            batching, loss = arm.rsplit(" ", 1)
            batching = batching.replace("segment_length=", "segments of ")
            line = table.setdefault((memory, batching), {"memory": memory, "batches": batching})
            done = [row for row in cell if row["state"] == "done"]
            line[loss.removeprefix("loss_reduction=")] = f"{cell_text(cell)} ({half_text(done)})"
    lines = [table[key] for key in sorted(table, key=lambda key: (key[0], key[1] != "tape", natural(key[1])))]
    links = ", ".join(csv_link(results / grid / "runs.csv", memory) for grid, memory in TAPE_OR_SEGMENTS)
    text = f"{evaluation_text(rows)}; in brackets, the thousand steps after which each seed trains at 0.5; every run: {links}"
    return f"{text}\n\n{markdown(lines, ['memory', 'batches', 'mean_of_huber', 'huber_of_mean'])}{trouble(rows)}"


PPO = "ppo_tbb_ffm", "ppo_tbb_lru", "ppo_tbb_s5", "ppo_tbb_linattn", "ppo_tbb_glru", "ppo_tbb_mingru", "ppo_sbb_lstm"
CONTINUOUS = {"lru": "ppo_tbb_lru_continuous_action", "memoryless": "the same without memory"}


def ppo_table(results):
    """One table of PPO with each memory, and with continuous actions."""
    rows = [row | {"arm": name} for name in PPO for row in read_rows(results / name / "runs.csv")[0]]
    rows += [row | {"arm": CONTINUOUS[row["arm"]]} for row in read_rows(results / "pendulum" / "runs.csv")[0]]
    links = ", ".join(csv_link(results / name / "runs.csv", name) for name in (*PPO, "pendulum"))
    first = "popgym-RepeatFirstEasy-v0"  # which all have been trained on
    return f"Every run: {links}. {run_table(sorted(rows, key=lambda row: row['env_id'] != first), '')}"


def board_table(rows, curve, published, source):
    """Environments as rows, arms as columns, and beside them the published GRU and the best of thirteen memories."""
    cells = board_cells(rows, curve, published)
    arms = sorted({row["arm"] for row in rows}, key=lambda arm: (arm not in MAIN_ARMS, natural(arm)))
    arms, table = [*MAIN_ARMS, *(arm for arm in arms if arm not in MAIN_ARMS)], []
    for cell in cells:
        row = {"environment": f"{cell['task']} {cell['level']}"}
        for arm in arms:
            greedy, best = cell["arms"].get(arm, ([], None))
            row[arm] = f"{each_seed(greedy)} ({number(best, 2)})" if greedy else ""
        table.append(row | {"published GRU, best": each_seed((cell["gru"], cell["best"])) if cell["gru"] else ""})
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


def last_tenth(curve):
    """{key of a run: its mean training return over the last tenth of its curve}"""
    runs = grouped(curve, lambda point: point["key"])
    returns = {key: [float(point["episodic_return"]) for point in points] for key, points in runs.items()}
    return {key: float(np.mean(values[-max(1, len(values) // 10) :])) for key, values in returns.items()}


def pixels_table(rows, curve):
    """Atari on a tape and in segments: how much of a batch is real, what each seed returns at the end, and what it costs."""
    late, table = last_tenth(curve), []
    rows = sorted(rows, key=lambda row: (natural(row["env_id"]), row["arm"] != "tape", natural(row["arm"]), int(row["seed"])))
    for cell in grouped(rows, lambda row: (task_name(row), row["arm"])).values():
        done = [row for row in cell if row["state"] == "done"]
        seconds = dict.fromkeys(number(value, 0) for value in sorted(float(row["cpu_seconds"]) for row in done))
        table.append(
            {
                "environment": f"{short_name(cell[0])}, {steps_text(cell)} steps",
                "batches": cell[0]["arm"],
                "transitions per update": number(np.mean([float(row["transitions"]) for row in done])) if done else "",
                "greedy return (each seed)": with_seeds(
                    [final_return(row) for row in done], states(cell) if len(done) < len(cell) else ""
                ),
                "last tenth of training": with_seeds([late[row["key"]] for row in done]),
                "CPU seconds": " to ".join([*seconds][:1] + [*seconds][1:][-1:]),
            }
        )
    return f"{evaluation_text(rows)}\n\n{markdown(table, list(table[0]))}{trouble(rows)}"


def sapg_table(rows, curve):
    """The leader's return of each arm at the end of training, greedily, and how soon; how far apart its policies are."""
    returns = {
        key: [float(p["episodic_return"]) for p in points] for key, points in grouped(curve, lambda p: p["key"]).items()
    }
    steps = {key: [int(p["global_step"]) for p in points] for key, points in grouped(curve, lambda p: p["key"]).items()}
    late = last_tenth(curve)
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
            apart.append(number(np.mean(found), 2) if found else "-")
        table.append(
            {
                "arm": arm,
                "last tenth of training": with_seeds([late[row["key"]] for row in cell]),
                "greedy": with_seeds([final_return(row) for row in cell]),
                "80 % of the best from (million steps)": listed("never" if s is None else number(s / 1e6, 2) for s in soon),
                "coverage, KL, ESS": ", ".join(apart),
                "CPU s": number(np.mean([float(row["cpu_seconds"]) for row in cell]), 0),
            }
        )
    return f"{evaluation_text(rows)}\n\n{markdown(table, list(table[0]))}{trouble(rows)}"


def grid_table(folder):
    """The table of a grid, from its folder of CSV files."""
    rows, _ = read_rows(folder / "runs.csv")
    if folder.name.split("_")[0] == "sapg":
        table = sapg_table(in_order(rows, folder.name), read_rows(folder / "curves.csv")[0])
    elif folder.name == "atari_segments":
        table = pixels_table(rows, read_rows(folder / "curves.csv")[0] if (folder / "curves.csv").exists() else [])
    elif folder.name == "popgym_board":
        table = board_table(rows, read_rows(folder / "curves.csv")[0], *read_rows(folder / "reference.csv"))
    elif folder.name == "race":
        table = race_table(rows)
    elif folder.name == "dqn_popgym":
        table = crossed_table(rows)
    elif folder.name in ("popgym_easy", "popgym_easy_1000"):
        path = folder / "reference.csv"
        table = reference_table(rows, *(read_rows(path) if path.exists() else ([], "")))
    else:
        table = run_table(rows, folder.name)
    return f"{csv_link(folder / 'runs.csv', 'every run')}: {table}"


def joined_tables(results):
    """{marker: table} of the tables that put several grids together, as far as all of them are there."""

    def there(grids):
        return all((results / grid / "runs.csv").exists() for grid in grids)

    tables = {"segments": segments_table(results)} if there(grid for grid, _ in TAPE_OR_SEGMENTS) else {}
    return tables | ({"ppo": ppo_table(results)} if there((*PPO, "pendulum")) else {})


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
    if any(row["state"] == "done" for row in rows(results / "longer", "networks")):
        longer_picture(results)


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
    tables |= joined_tables(results) | measured_tables(results)
    tables |= student_tables(results) | optimizer_tables(results) | in_context_tables(results) | probed_tables(results)
    fill(args.root, tables | {"throughput": throughput_table(results)})


if __name__ == "__main__":
    main()
