"""Tables and picture of benchmark/results/in_context, which benchmark/probes/in_context.py measures."""

import numpy as np
from curves import begin, save
from tables import grouped, markdown, number, read_rows

MEMORIES = "minGRU", "ED", "ED, 600 updates", "full context", "linear attention", "XL", "reduced context", "LRU"
CONTROLS = "minGRU, reset at episodes", "no cache", "ED, early greed"
ED = "ED", "ED, scale 0.5", "ED, scale 1", "ED, pre-norm", "ED, smoothed labels"
SCALES = [f"{arm}, scale {scale}" for arm in ("ED, short cache", "minGRU, window") for scale in ("0", "0.5", "1")]


def numbers(rows, name):
    return np.array([float(row[name]) for row in rows if row[name] not in ("", "nan")])


def spread(rows, name, digits=2):
    """Mean ± standard deviation over seeds; of one seed its figure, of none "-"."""
    found = numbers(rows, name)
    if len(found) < 2:
        return f"{found[0]:.{digits}f}" if len(found) else "-"
    return f"{found.mean():.{digits}f} ± {found.std():.{digits}f}"


def each(rows, name, digits=2):
    """The figure of every seed, in their order."""
    return ", ".join(f"{float(row[name]):.{digits}f}" if row[name] else "never" for row in rows)


def mean(rows, name, digits=3):
    """Of the seeds, to so many digits in all."""
    found = numbers(rows, name)
    return number(f"{found.mean():.{digits}g}") if len(found) else "-"


def learning(rows):
    return {
        "ICL, T = 1": spread(rows, "icl_1"),
        "ICL, T = 0.5": spread(rows, "icl_0.5"),
        "worst task, T = 0.5, each seed": each(rows, "worst_0.5"),
        "CPU seconds": mean(rows, "train_seconds"),
    }


def cost(rows):
    return {
        "thousand weights": f"{numbers(rows, 'weights').mean() / 1000:.3g}",
        "ms per step of 24 runs": mean(rows, "step_ms", 2),
        "kB kept per row": mean(rows, "saved_row_kb"),
        "MB kept per update": mean(rows, "saved_mb"),
        "training tasks, T = 0.5": spread(rows, "icl_train_0.5"),
    }


def convergence(rows):
    return {
        "ICL, T = 0.5": spread(rows, "icl_0.5"),
        "above the floor": spread(rows, "above_floor", 3),
        "updates until 0.1 above, each seed": ", ".join(row["updates_to_floor"] or "never" for row in rows),
        "gradient's norm: 50, 95, 99, 100 %; spikes": ", ".join(mean(rows, f"grad_{p}", 2) for p in (50, 95, 99, 100))
        + f"; {numbers(rows, 'spikes').sum():.0f}",
    }


def table(rows, arms, columns):
    """A row for each arm that has been measured, with how many seeds where those are not five."""
    found = []
    for arm in arms:
        if cell := sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["seed"])):
            number = "" if len(cell) == 5 else f" ({len(cell)} seed{'s' * (len(cell) > 1)})"
            found.append({"arm": arm + number} | columns(cell))
    return markdown(found, list(found[0])) if found else "not measured"


def in_context_tables(results):
    """{marker: table} of the folder, {} if it is not there."""
    folder = results / "in_context"
    if not (folder / "summary.csv").exists():
        return {}
    rows = read_rows(folder / "summary.csv")[0]
    kept = read_rows(folder / "retention.csv")[0]
    small = [row for row in rows if row["env_id"] == "DarkRoom" and row["room_size"] == "5"]

    def share(cell, gap):
        keys = {row["key"] for row in cell}
        return spread([row for row in kept if row["key"] in keys and row["gap"] == gap], "share")

    def retention(cell, *gaps):
        return {f"retention, J = {', '.join(gaps)}": "; ".join(share(cell, gap) for gap in gaps)}

    arms = list(MEMORIES)
    for row in rows:  # those of other rooms stand below
        if row not in small:
            where = row["env_id"] if row["room_size"] == "5" else f"{row['env_id']}, {row['room_size']} x {row['room_size']}"
            row["arm"] = f"{where}: {row['arm']}"
            arms.append(row["arm"])
    return {
        "in_context/memories": table(rows, dict.fromkeys(arms), lambda cell: learning(cell) | retention(cell, "3", "12")),
        "in_context/cost": table(small, MEMORIES, cost),
        "in_context/gradient": table(
            small, [*ED, *SCALES, *CONTROLS], lambda cell: convergence(cell) | retention(cell, "1", "3")
        ),
    }


def in_context_picture(results):
    """Share of the optimum over in-context episodes, and what is left of it after J episodes without reward."""
    folder = results / "in_context"
    curves, kept = (read_rows(folder / f"{name}.csv")[0] for name in ("curves", "retention"))
    figure, axes = begin(2, 2, (12, 8))
    arms = [*MEMORIES, CONTROLS[0]]  # who forgets at each episode has found no goal that could be retained
    for line, env_id in zip(axes, ("DarkRoom", "DarkKeyToDoor")):
        here = [row for row in curves if row["env_id"] == env_id and row["room_size"] == "5" and row["temperature"] == "0.5"]
        gone = [row for row in kept if row["env_id"] == env_id and row["room_size"] == "5"]
        panels = (here, "episode", "share of the optimum, T = 0.5"), (gone, "gap", "after J episodes without reward")
        for axis, (rows, x, title) in zip(line, panels):
            for i, arm in enumerate(arms):
                points = grouped(
                    (r for r in rows if r["arm"] == arm and (x == "episode" or arm in MEMORIES)), lambda row, x=x: int(row[x])
                )
                if points:
                    values = {place: numbers(cell, "share") for place, cell in points.items()}
                    values = {place: found for place, found in values.items() if len(found)}
                    axis.plot(list(values), [v.mean() for v in values.values()], color=f"C{i}", label=arm)
                    low, high = ([f(v) for v in values.values()] for f in (np.min, np.max))
                    axis.fill_between(list(values), low, high, color=f"C{i}", alpha=0.12, lw=0)
            axis.set(title=f"{env_id}: {title}", xlabel="episode in context" if x == "episode" else "J", ylim=(0, 1.05))
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    save(figure, folder / "picture.svg")
