"""Tables and a picture of benchmark/results/reset_audit and longer. report.py calls it."""

import numpy as np
from curves import begin, save
from tables import csv_link, grouped, markdown, number, read_rows

FACTORS = "1", "2", "4", "16"
COLORS = {"LRU": "C0", "FFM": "C1", "gated LRU": "C2"}
STYLES = {"tape": "-", "segments of 10": ":", "segments of 50": "-.", "tape, no resets": "--"}
MARKS = {"tape": "o", "segments of 10": "v", "segments of 50": "s", "tape, no resets": "x"}


def training_table(rows):
    """A row per library and finding: the ways of use that share it stand in one cell."""
    figures = lambda row: tuple(row[name] for name in ("value", "gradient", "reset"))  # noqa: E731
    table = []
    for (library, version, shown_by, *found), members in grouped(
        rows, lambda row: (row["library"], row["version"], row["shown by"], *figures(row))
    ).items():
        ours = library == "this project"
        kinds = grouped([row["use"] for row in members], lambda use: "_".join(use.split("_")[:2])) if ours else {}
        uses = [f"{kind}: {', '.join(use.removeprefix(kind + '_') for use in names)}" for kind, names in kinds.items()]
        use = "; ".join(uses if ours else [row["use"] for row in members])
        table.append(dict(zip(("library", "use", "shown by"), (f"{library} {version}".strip(), use, shown_by))))
        table[-1] |= dict(zip(("value passes", "gradient passes", "reset falls at"), found))
    order = {name: i for i, name in enumerate(dict.fromkeys(row["library"] for row in table))}
    table.sort(key=lambda row: order[row["library"]])
    return markdown(table, list(table[0]))


def autoreset_table(rows):
    table = [
        {"rows from": f"{r['library']} {r['version']}", "autoreset": r["mode"], "reset falls at": r["reset"]} for r in rows
    ]
    return markdown(table, list(table[0]))


def arms(rows):
    return grouped(rows, lambda row: (row["task"], row["memory"], row["batching"]))


def longer_table(rows):
    """A row per task, memory and batching with a network that is done: returns by length, and each seed's drop."""
    table = []
    for (task, memory, batching), cell in arms(rows).items():
        done = [row for row in cell if row["state"] == "done"]
        if not done:
            continue
        means = [number(np.mean([float(row[f"return_x{factor}"]) for row in done]), 2) for factor in FACTORS]
        table.append(
            {
                "task": task,
                "memory, batching": f"{memory}, {batching}",
                "seeds": f"{len(done)} of {len(cell)}",
                f"return at {', '.join(FACTORS)} times the length": ", ".join(means),
                "drop, each seed": ", ".join(number(float(row["drop"]), 2) for row in done),
                "outside share": number(np.mean([float(row["share_outside"]) for row in done]), 2),
            }
        )
    unfinished = sum(row["state"] != "done" for row in rows)
    text = f"{len(rows) - unfinished} of {len(rows)} networks are done, {unfinished} unfinished"
    return f"{text}\n\n{markdown(table, list(table[0]))}" if table else text


def interval_text(row):
    """A correlation with its interval, or why there is none."""
    if row["correlation"] == "":
        return "too few" if int(row["networks"]) < 10 else "all drops alike"
    return f"{float(row['correlation']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})"


def correlation_table(rows):
    """A row per task, a column per memory."""
    table = []
    for task, members in grouped(rows, lambda row: row["task"]).items():
        cells = {row["memory"]: f"{interval_text(row)}, {row['networks']} networks" for row in members}
        table.append({"task": task} | cells)
    return markdown(table, list(table[0]))


def probed_tables(results):
    """{marker: table} of both folders, as far as they are there."""
    makers = {
        "reset_audit/training": training_table,
        "reset_audit/autoreset": autoreset_table,
        "longer/networks": longer_table,
        "longer/correlations": correlation_table,
    }
    tables = {}
    for name, maker in makers.items():
        if (path := results / f"{name}.csv").exists():
            rows, where = read_rows(path)
            tables[name] = f"{csv_link(path, 'all figures')}; {where}\n\n{maker(rows)}"
    return tables


def longer_picture(results):
    """Above: return against length, a line per arm and the seeds behind it. Below: the drop against the outside share."""
    rows, correlations = (read_rows(results / "longer" / f"{name}.csv")[0] for name in ("networks", "correlations"))
    done = [row for row in rows if row["state"] == "done"]
    tasks = list(dict.fromkeys(row["task"] for row in done))
    figure, axes = begin(2, len(tasks), (5 * len(tasks), 7))
    factors = [int(factor) for factor in FACTORS]
    for i, task in enumerate(tasks):
        above, below = axes[:, i]
        for (_, memory, batching), cell in arms([row for row in done if row["task"] == task]).items():
            lines = np.array([[float(row[f"return_x{factor}"]) for factor in FACTORS] for row in cell])
            look = {"color": COLORS[memory], "ls": STYLES[batching]}
            for line in lines:
                above.plot(factors, line, **look, lw=0.5, alpha=0.4)
            above.plot(factors, lines.mean(0), **look, lw=2, label=f"{memory}, {batching}")
            points = np.array([(float(row["share_outside"]), float(row["drop"])) for row in cell])
            below.plot(*points.T, MARKS[batching], color=COLORS[memory], label=f"{memory}, {batching}")
        (found,) = (row for row in correlations if (row["task"], row["memory"]) == (task, "all"))
        above.set(title=task, xscale="log", xlabel="length, times that of the training", ylabel="greedy return")
        above.set_xticks(factors, FACTORS)
        above.minorticks_off()
        title = f"rank correlation: {interval_text(found)}"
        below.set(title=title, xlabel="share of sensitivity on observations not needed", ylabel="drop: short less longest")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    named = {}
    for axis in axes[0]:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize="small")
    save(figure, results / "longer" / "picture.svg")
