"""The pictures of the report, and the intervals that they show: drawn from rows of CSV files and from nothing else.

A picture carries a line that says what drew it and, as a digest, what was drawn: matplotlib of another version puts the same
data into other bytes, so a test compares bytes where the drawing library is the same, and the digest where it is not.
"""

import hashlib
import io
import json
import platform
import re

import numpy as np
from tables import grouped, natural, task_name, write

POINTS, REPETITIONS = 40, 2000  # of a curve over seconds; of the bootstrap
COLUMNS = 5  # of panels, where there is one panel per environment
GOLDEN = {"svg.hashsalt": "0", "svg.fonttype": "none"}  # the same ids each time; text as text, small and searchable


def interquartile_means(scores):
    """(IQM, low, high), each [points]: interquartile mean of scores [runs, points], 95 % bootstrap interval, by rliable.

    With fewer than four runs no quartile is left out, and the IQM is the mean; one run has no interval (nan).
    """

    def aggregate(scores):  # rliable's aggregate_iqm for each point at once; it takes [runs, tasks] of one point
        return trim_mean(scores[:, 0], 0.25, axis=0)

    if len(scores) == 1:
        return scores[0], np.full_like(scores[0], np.nan), np.full_like(scores[0], np.nan)
    try:
        from rliable.library import get_interval_estimates
        from scipy.stats import trim_mean
    except ImportError as error:
        raise SystemExit(f"intervals of grids need rliable ({error}); install it: pip install -e '.[bench]'") from error
    state = np.random.get_state()
    np.random.seed(0)  # rliable resamples from numpy's global generator, whatever its argument random_state is
    iqm, interval = get_interval_estimates({"": scores[:, None]}, aggregate, reps=REPETITIONS)
    np.random.set_state(state)
    return iqm[""], *interval[""]


def line_of(points, x_name):
    """[2, points]: a run's curve over steps or seconds, or an empty array where it has none."""
    return np.array([(float(p[x_name]), float(p["episodic_return"])) for p in points if p.get(x_name, "") != ""]).T


def interval_rows(rows, curve):
    """IQM curves of a grid, per environment and arm: over steps where every finished run has a point, and over seconds."""
    points = grouped(curve, lambda point: point["key"])
    done = [row for row in rows if row["state"] == "done" and row["key"] in points]
    out = []
    for members in grouped(done, lambda row: (row["env_id"], row["env_kwargs"], row["arm"])).values():
        lines = [{int(p["global_step"]): float(p["episodic_return"]) for p in points[row["key"]]} for row in members]
        steps = sorted(set.intersection(*(set(line) for line in lines)))
        timed = [line for row in members if len(line := line_of(points[row["key"]], "seconds"))]
        low, high = max((line[0, 0] for line in timed), default=0), min((line[0, -1] for line in timed), default=0)
        seconds = np.linspace(low, high, POINTS) if high > low else np.array([])
        axes = {
            "steps": (steps, np.array([[line[step] for step in steps] for line in lines])),
            "seconds": (seconds, np.array([np.interp(seconds, *line) for line in timed])),
        }
        names = {name: members[0][name] for name in ("env_id", "env_kwargs", "arm")}
        for axis, (xs, scores) in axes.items():
            for x, *estimate in zip(xs, *interquartile_means(scores)) if len(xs) else []:
                row = names | {"axis": axis, "runs": len(scores), "x": f"{x:.0f}" if axis == "steps" else f"{x:.2f}"}
                out.append(row | dict(zip(("iqm", "low", "high"), ("" if np.isnan(e) else f"{e:.4f}" for e in estimate))))
    return out


def begin(rows, columns, size, **options):
    """A figure and its axes [rows, columns], of matplotlib's own style, whatever the machine's settings are."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(GOLDEN)
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def numbers(array):
    """Numbers of a line or a surface as text; 6 digits hide what compilers do with the last bits."""
    return [[f"{float(value):.6g}" for value in row] for row in array]


def drawn(figure):
    """A digest of what a figure shows: data, colours, texts, scales; not where they lie on the page."""
    content = []
    for axis in figure.axes:
        lines = [(line.get_label(), str(line.get_color()), numbers(line.get_xydata())) for line in axis.get_lines()]
        areas = [numbers(path.vertices) for area in axis.collections for path in area.get_paths()]
        bars = [numbers([bar.get_bbox().bounds]) for bar in axis.patches]
        texts = [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(text.get_text() for text in axis.texts)]
        content.append([texts, axis.get_xscale(), axis.get_yscale(), lines, areas, bars])
    labels = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    return hashlib.sha256(json.dumps([content, labels]).encode()).hexdigest()


def drawn_by():
    """What decides how data become bytes."""
    import matplotlib

    return f"matplotlib {matplotlib.__version__}, freetype {matplotlib.ft2font.__freetype_version__}, {platform.machine()}"


def save(figure, path):
    """An SVG file with what drew it and what was drawn, without a date, and to a tenth of a point: a third smaller."""
    import matplotlib.pyplot as plt

    out, note = io.BytesIO(), f"drawn by {drawn_by()}; data {drawn(figure)}"
    figure.savefig(out, format="svg", metadata={"Date": None, "Description": note})
    head, body = out.getvalue().decode().split("</metadata>")
    write(path, head + "</metadata>" + re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", body))
    plt.close(figure)


def panel_and_color(rows):
    """Functions of a row: which line of panels, which colour. Memories against batchings where a grid crosses them."""
    memories, batchings = {row["memory"] for row in rows}, {row["batching"] for row in rows}
    if "" not in memories and len(memories) > 1 and len(batchings) > 1:
        return (lambda row: row["memory"]), (lambda row: row["batching"])
    return (lambda row: ""), (lambda row: row["arm"])


def grid_picture(rows, curve, intervals, path, axis_name):
    """Training return against steps or seconds: environments as columns; every seed faint, the IQM and its interval over them.

    A panel says which runs it lacks.
    """
    panel_of, color_of = panel_and_color(rows)
    tasks = grouped(rows, lambda row: (row["env_id"], row["env_kwargs"]))
    panels = list(dict.fromkeys(panel_of(row) for row in sorted(rows, key=lambda row: natural(panel_of(row)))))
    names = sorted({color_of(row) for row in rows}, key=lambda name: (name != "tape", natural(name)))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    points = grouped(curve, lambda point: point["key"])
    small = all(abs(float(point["episodic_return"])) <= 1.05 for point in curve)  # POPGym's returns; a game's are in points
    bands = grouped(intervals, lambda row: (row["env_id"], row["env_kwargs"]))
    unit, x_name = (1000, "global_step") if axis_name == "steps" else (1, "seconds")
    # a column per environment; without memories to tell apart, rows of a few environments each
    columns = len(tasks) if len(panels) > 1 else min(len(tasks), COLUMNS)
    lines = len(panels) if len(panels) > 1 else -(-len(tasks) // columns)
    letters = sum(6 + len(name) for name in names[:6])
    wide = (
        0 if letters < 40 * columns else 0.08 * max(map(len, names)) + 0.6
    )  # inches of a legend beside the panels, not below
    size = (3.4 * columns + 0.6 + wide, 2.2 * lines + 0.8)
    figure, axes = begin(lines, columns, size, sharey=small, sharex="col" if len(panels) > 1 else "none")
    for i, (task, members) in enumerate(tasks.items()):
        under = axes[:, i] if len(panels) > 1 else axes.flat[i : i + 1]
        for axis, panel in zip(under, panels):
            here = [row for row in members if panel_of(row) == panel]
            for row in here:
                if row["state"] == "done" and row["key"] in points:
                    if len(line := line_of(points[row["key"]], x_name)):
                        axis.plot(line[0] / unit, line[1], color=colors[color_of(row)], alpha=0.25, linewidth=0.8)
            for arm, cell in grouped(here, lambda row: row["arm"]).items():
                band = [row for row in bands.get(task, []) if (row["arm"], row["axis"]) == (arm, axis_name)]
                xs, color = [float(row["x"]) / unit for row in band], colors[color_of(cell[0])]
                axis.plot(xs, [float(row["iqm"]) for row in band], color=color, linewidth=1.6)
                area = [(x, float(row["low"]), float(row["high"])) for x, row in zip(xs, band) if row["low"]]
                if area:
                    axis.fill_between(*np.array(area).T, color=color, alpha=0.15, linewidth=0)
            lacks = [lacking(cell, color_of(cell[0])) for cell in grouped(here, lambda row: row["arm"]).values()]
            note = "\n".join(text for text in lacks if text) if here else "not in the grid"
            axis.text(0.02, 0.03, note, transform=axis.transAxes, fontsize=6, va="bottom")
            if small:
                axis.set_ylim(-1.05, 1.05)
            axis.grid(alpha=0.3)
        under[0].set_title(task_name(members[0]).removeprefix("popgym-").replace(" {", "\n{"), fontsize=9)
        under[-1].set_xlabel("thousand environment steps" if axis_name == "steps" else "seconds")
    for axis, panel in zip(axes[:, 0], panels * lines):
        axis.set_ylabel(f"{panel}\ntraining return" if panel else "training return")
    for axis in axes.flat[len(tasks) :] if len(panels) == 1 else []:
        axis.remove()
    if len(colors) > 1:
        for name, color in colors.items():
            axes[0, 0].plot([], [], color=color, label=name)
        place = ("outside lower center", min(len(colors), 6)) if wide == 0 else ("outside right center", 1)
        figure.legend(loc=place[0], ncols=place[1], fontsize="small")
    save(figure, path)


def arms_picture(rows, curve, path):
    """Training return against steps: a panel per arm, every seed; the first arm's lie in grey behind the others'."""
    points = grouped(curve, lambda point: point["key"])
    arms = grouped([row for row in rows if row["key"] in points], lambda row: row["arm"])
    columns = min(len(arms), COLUMNS)
    lines = -(-len(arms) // columns)
    figure, axes = begin(lines, columns, (2.4 * columns, 1.8 * lines + 0.4), sharex=True, sharey=True)
    first = next(iter(arms))
    for axis, (arm, cell) in zip(axes.flat, arms.items()):
        behind = [] if arm == first else arms[first]
        for row in [*behind, *cell]:
            line = line_of(points[row["key"]], "global_step")
            color, width = ("0.75", 0.8) if row["arm"] != arm else ("C0" if arm == first else "C3", 1.2)
            axis.plot(line[0] / 1e6, line[1], color=color, linewidth=width)
        axis.set_title(arm, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("million steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("training return")
    for axis in axes.flat[len(arms) :]:
        axis.remove()
    save(figure, path)


def board_picture(cells, path):
    """Our return minus the best published one, a bar per task and level; a mark where the published GRU is."""
    cells = [cell for cell in cells if cell["best"]]
    figure, axes = begin(1, 1, (7, 0.19 * len(cells) + 0.9))
    axis, names = axes[0, 0], [f"{cell['task']} {cell['level']}" for cell in cells]
    for place, cell in enumerate(cells):
        if cell["ours"] is None:
            axis.text(0.01, place, "not run yet", fontsize=6, va="center")
            continue
        ahead = cell["ours"] - float(cell["best"])
        axis.barh(place, ahead, color="C0" if ahead >= -0.005 else "C3", height=0.7)
        axis.plot(float(cell["gru"]) - float(cell["best"]), place, "|", color="black", markersize=9)
    axis.set_yticks(range(len(cells)), names, fontsize=7)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_title("greedy return minus the best of 13 memories after 15 million steps (|: GRU after 15 million)", fontsize=8)
    axis.grid(alpha=0.3, axis="x")
    save(figure, path)


def lacking(cell, name):
    """What a cell of a grid lacks, in words: "tape: 1 of 3 runs done, 1 failed", or "" if nothing."""
    done, failed = (sum(row["state"] == state for row in cell) for state in ("done", "failed"))
    if done == len(cell):
        return ""
    return f"{name}: {done} of {len(cell)} runs done" + (f", {failed} failed" if failed else "")


def memory_length_picture(curves, summary, path):
    """A column per environment, a row per set of rows n, a colour per script and segment length, a line per model."""

    def label(row):
        return row["script"] + (f", segments of {row['segment_length']}" if row["segment_length"] else ", tape")

    tasks, places = grouped(summary, task_name), grouped(summary, lambda row: row["at"])
    colors = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(map(label, summary)))}
    models = grouped(curves, lambda row: (row["at"], task_name(row), label(row), row["seed"], row["gamma"]))
    figure, axes = begin(len(places), len(tasks), (6 * len(tasks), 3.2 * len(places)))
    for line, at in zip(axes, places):
        for axis, (task, members) in zip(line, tasks.items()):
            named = set()
            for (here, of, name, *_), rows in models.items():
                if (here, of) == (at, task):
                    shares = [float(row["share"]) or np.nan for row in rows]  # a logarithm has no place for zero
                    axis.plot(shares, color=colors[name], alpha=0.7, lw=1, label=None if name in named else name)
                    named.add(name)
            lengths = {row["reward_memory_length"] for row in members}
            for length in lengths - {"", "episode"}:
                axis.axvline(int(length) - 0.5, color="black", ls="--", lw=1, label=f"RML = {length}, not needed to the right")
            title = f"{task}, RML: the whole episode" if "episode" in lengths else task
            axis.set(
                title=f"{title}\n{at}", xlabel="age of the observation (steps)", ylabel="share of |dQ / do|", yscale="log"
            )
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    save(figure, path)


def scan_picture(rows, path):
    """Time against T, forward and with the backward pass, and the error against float64, of every backend in the file."""
    figure, axes = begin(1, 3, (13, 3.6))
    names = list(dict.fromkeys(row["backend"] for row in rows))
    for axis, (what, title) in zip(axes[0], (("forward", "forward"), ("fwd+bwd", "forward and backward"))):
        for i, name in enumerate(names):
            line = [(int(r["T"]), float(r["median_ms"])) for r in rows if (r["what"], r["backend"]) == (what, name)]
            if line:
                axis.plot(*np.array(line).T, "o-", color="0.6" if name == "copy" else f"C{i}", label=name, markersize=3)
        axis.set(title=title, xlabel="T (rows)", ylabel="milliseconds, median", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    errors = [row for row in rows if row.get("error")]
    cases = list(dict.fromkeys(row["what"].removeprefix("accuracy, ") for row in errors))
    axis = axes[0, 2]
    for i, name in enumerate(names):
        line = [(cases.index(r["what"].removeprefix("accuracy, ")), float(r["error"])) for r in errors if r["backend"] == name]
        if line:
            axis.plot(*np.array(line).T, "o", color=f"C{i}", label=name)
    axis.set_xticks(range(len(cases)), cases, fontsize="x-small", rotation=15)
    rows_of_error = f", T = {errors[0]['T']}" if errors else ""
    axis.set(yscale="log", ylabel="relative to the largest |h|")
    axis.set_title(f"largest error against a loop in complex128{rows_of_error}", fontsize=9)
    axis.grid(alpha=0.3)
    if errors:
        axis.legend(fontsize="x-small")
    save(figure, path)


def update_picture(updates, pieces, ppo, path):
    """Milliseconds of DQN's update on a tape, beside the paper's in jax; of a scan cut to segments; of PPO's training part."""
    figure, axes = begin(1, 3, (14, 3.8))
    axis = axes[0, 0]
    tapes = [row for row in updates if row["script"].startswith("dqn_tbb_")]
    for i, script in enumerate(dict.fromkeys(row["script"] for row in tapes)):
        for what, style in (("update", "o-"), ("jax paper", "x--")):
            line = [(int(r["T"]), float(r["median_ms"])) for r in tapes if (r["script"], r["what"]) == (script, what)]
            if line:
                label = script if what == "update" else f"{script}: jax paper"
                axis.plot(*np.array(line).T, style, color=f"C{i}", label=label, markersize=4)
    axis.set(title="DQN: one update", xlabel="T (rows)", ylabel="milliseconds, median", xscale="log", yscale="log")
    axis = axes[0, 1]
    scans = [row for row in pieces if row["script"] == "scan"]
    lengths = list(dict.fromkeys(row["what"].split(", ")[1] for row in scans))
    for i, (backend, steps) in enumerate(dict.fromkeys((row["what"].split(", ")[0], row["T"]) for row in scans)):
        found = [row for row in scans if row["what"].startswith(f"{backend}, ") and row["T"] == steps]
        line = [(lengths.index(row["what"].split(", ")[1]), float(row["median_ms"])) for row in found]
        axis.plot(*np.array(line).T, "o-", color=f"C{i}", label=f"{backend}, T = {steps}", markersize=4)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set(title="scan, forward and backward: a tape, or segments", ylabel="milliseconds, median", yscale="log")
    axis = axes[0, 2]
    sizes = list(dict.fromkeys((row["steps"], row["minibatches"]) for row in ppo))
    for i, name in enumerate(dict.fromkeys(row["contender"] for row in ppo)):
        line = [(sizes.index((r["steps"], r["minibatches"])), float(r["median_ms"])) for r in ppo if r["contender"] == name]
        axis.plot(*np.array(line).T, "o-" if name.startswith("ppo_") else "x--", color=f"C{i}", label=name, markersize=4)
    axis.set_xticks(range(len(sizes)), [f"{steps} x 16\n1/{parts}" for steps, parts in sizes])
    axis.set(title="PPO: one epoch", xlabel="steps x environments; a minibatch", yscale="log")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        if axis.get_lines():
            axis.legend(fontsize=6)
    save(figure, path)
