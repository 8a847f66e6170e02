"""Turns finished runs and benchmark files into the tables and the picture of README.md and docs/.

    python benchmark/report.py                    # from runs/ and benchmark/results/*.csv
    python benchmark/report.py --runs ""          # from the committed benchmark/results/*.csv alone

Runs of one name (a script's, or what --exp-name says) become benchmark/results/NAME.csv (a row per run: the greedy return of
its final network) and NAME_curves.csv (training returns in bins of steps); these become NAME.png and the Markdown tables
between `<!-- results: NAME -->` and `<!-- end results -->`. Where runs in one environment were given different flags, those
that differ stand in the column `flags`. Nothing is typed by hand.
"""

import argparse
import csv
import io
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

BINS = 40  # points of a curve
NOT_COMPARED = {"exp_name", "seed", "env_id", "env_kwargs", "total_timesteps", "torch_threads", "track", "checkpoint_interval"}
NOT_COMPARED |= {"eval_episodes", "minibatch_size", "num_iterations"}


def read_run(folder):
    """(row of results, rows of the curve, arguments) of a finished run, or None."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    models = list(folder.glob("*.cleanrl_model"))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    if not models or "eval/episodic_return" not in events.Tags()["scalars"]:
        return None
    args = torch.load(models[0], weights_only=True)["args"]
    evaluation, training = events.Scalars("eval/episodic_return"), events.Scalars("charts/episodic_return")
    returns = [e.value for e in evaluation]
    name, _, arm = args["exp_name"].partition(".")
    run = {"name": name, "env_id": args["env_id"], "env_kwargs": args["env_kwargs"], "flags": arm}
    run["seed"] = args["seed"]
    result = run | {
        "total_timesteps": args["total_timesteps"],
        "greedy_return": f"{np.mean(returns):.4f}",
        "lowest": f"{min(returns):.4f}",
        "episodes": len(returns),
        "seconds": f"{evaluation[-1].wall_time - events.FirstEventTimestamp():.1f}",  # from the first log to the last
    }
    edges = np.linspace(0, args["total_timesteps"], BINS + 1)
    which = np.digitize([e.step for e in training], edges)
    values = np.array([e.value for e in training])
    curve = [
        run | {"global_step": int(edges[i]), "episodic_return": f"{values[which == i].mean():.4f}"}
        for i in range(1, BINS + 1)
        if (which == i).any()
    ]
    result["steps_to_half"] = next((row["global_step"] for row in curve if float(row["episodic_return"]) >= 0.5), "")
    return result, curve, args


def flag_differences(found):
    """Fills in `flags` for runs of one name: what differs between those in one environment. A tape has no segment_length."""
    groups = defaultdict(list)
    for result, curve, args in found:
        if not result["flags"]:  # no arm
            groups[result["env_id"], result["env_kwargs"]].append((result, curve, args))
    for members in groups.values():
        names = dict.fromkeys(name for *_, args in members for name in args if name not in NOT_COMPARED)
        values = {name: {str(args[name]) for *_, args in members if name in args} for name in names}
        both = len({"segment_length" in args for *_, args in members}) > 1  # tapes and segments
        differ = [name for name in names if len(values[name]) > 1 or (name == "segment_length" and both)]
        for result, curve, args in members:
            flags = [f"{name}={args[name]}" for name in differ if name in args and name != "segment_length"]
            if "segment_length" in differ:
                flags.insert(0, f"segment_length={args['segment_length']}" if "segment_length" in args else "tape")
            for row in (result, *curve):
                row["flags"] = " ".join(flags)


def natural(value):
    """A key to sort texts by that takes numbers in them as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(value))]


def write(path, text):
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text if isinstance(text, bytes) else text.encode())
    partial.replace(path)
    print(f"wrote {path}")


def write_rows(path, rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, out.getvalue())


def read_rows(path):
    """Rows of a CSV file as dicts, and its leading comment."""
    lines = path.read_text().splitlines()
    comment = [line[1:].strip() for line in lines if line.startswith("#")]
    return list(csv.DictReader(line for line in lines if not line.startswith("#"))), " ".join(comment)


def markdown(rows, columns):
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_table(rows):
    """One row per environment and set of flags; every seed's return, and when its mean training return first was 0.5."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["env_id"], row["env_kwargs"], row["flags"], row["total_timesteps"]].append(row)
    table = []
    for (env_id, env_kwargs, flags, steps), members in groups.items():
        returns = np.array([float(m["greedy_return"]) for m in members])
        seconds = [float(m["seconds"]) for m in members]
        table.append(
            {
                "environment": env_id + ("" if env_kwargs == "{}" else f" {env_kwargs}"),
                "flags": flags,
                "steps": f"{int(steps):,}",
                "greedy return, mean ± sd": f"{returns.mean():.3f} ± {returns.std():.3f}",
                "each seed": ", ".join(f"{r:.3f}" for r in returns),
                "trains at 0.5 from (thousand steps)": ", ".join(
                    f"{int(m['steps_to_half']) / 1000:.3g}" if m["steps_to_half"] else "never" for m in members
                ),
                "seconds per run": f"{min(seconds):.0f} to {max(seconds):.0f}",
            }
        )
    return markdown(table, [name for name in table[0] if name != "flags" or any(row["flags"] for row in table)])


def picture(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "0"
    import matplotlib.pyplot as plt

    environments = list(dict.fromkeys((row["env_id"], row["env_kwargs"]) for row in curves))
    width = 8 if any(row["flags"] for row in curves) else 5  # inches, with room for a legend
    figure, axes = plt.subplots(
        1, len(environments), figsize=(width * len(environments), 3), squeeze=False, layout="constrained"
    )
    for axis, (env_id, env_kwargs) in zip(axes[0], environments):
        lines = defaultdict(list)
        for row in curves:
            if (row["env_id"], row["env_kwargs"]) == (env_id, env_kwargs):
                lines[row["flags"], row["seed"]].append((int(row["global_step"]) / 1000, float(row["episodic_return"])))
        colors = {flags: f"C{i}" for i, flags in enumerate(dict.fromkeys(flags for flags, _ in lines))}
        seeds = {seed for _, seed in lines}
        for (flags, _), points in lines.items():
            axis.plot(*np.array(points).T, color=colors[flags], alpha=0.6)
        if len(colors) > 1:
            for flags, color in colors.items():
                axis.plot([], [], color=color, label=flags)
            axis.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        small = all(abs(y) <= 1.05 for points in lines.values() for _, y in points)  # POPGym's returns; a game's are in points
        axis.set(
            title=f"{env_id}{'' if env_kwargs == '{}' else chr(10) + env_kwargs}, {len(seeds)} seeds",
            xlabel="thousand environment steps",
            ylabel="training return",
            ylim=(-1.05, 1.05) if small else None,
        )
        axis.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    write(path, out.getvalue())


def fill(root, tables):
    """Puts each table between its markers in README.md and docs/."""
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- results: {name} -->\n", "<!-- end results -->"
            if begin in text:
                head, rest = text.split(begin, 1)
                text = head + begin + table + "\n" + rest[rest.index(end) :]
        if text != page.read_text():
            write(page, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    parser.add_argument("--runs", default="runs", help='folder of the runs below the root; "" leaves them out')
    parser.add_argument("--no-pictures", action="store_true", help="tables only; needs no matplotlib")
    args = parser.parse_args()
    results = args.root / "benchmark" / "results"
    names = defaultdict(list)
    for folder in sorted((args.root / args.runs).glob("*/")) if args.runs else []:
        if (found := read_run(folder)) is not None:
            names[found[0]["name"]].append(found)
        else:
            print(f"{folder.name}: not finished, left out")
    for name, found in names.items():
        flag_differences(found)
        found.sort(key=lambda run: [natural(run[0][column]) for column in ("env_id", "env_kwargs", "flags", "seed")])
        write_rows(results / f"{name}.csv", [result for result, *_ in found])
        write_rows(results / f"{name}_curves.csv", [row for _, curve, _ in found for row in curve])

    tables = {}
    for path in sorted(results.glob("*_curves.csv")):
        name = path.stem.removesuffix("_curves")
        if not args.no_pictures:
            picture(read_rows(path)[0], results / f"{name}.png")
        tables[name] = run_table(read_rows(results / f"{name}.csv")[0])
    measured = "scan update update_scan collect scan_cuda memory_length_summary ppo_update atari_memory atari_speed"
    for name in measured.split():
        if (path := results / f"{name}.csv").exists():
            rows, where = read_rows(path)
            if name == "update":  # every part of the parent's update, and of all others the whole and the parts that differ
                most = [
                    row for row in rows if row["script"] != "dqn_tbb_ffm" and row["what"] in ("update", "scan", "jax paper")
                ]
                tables["update_all"] = f"{where}\n\n{markdown(most, list(rows[0]))}" if most else where
                rows = [row for row in rows if row["script"] == "dqn_tbb_ffm"]
            tables[name] = f"{where}\n\n{markdown(rows, list(rows[0]))}"
    fill(args.root, tables)
