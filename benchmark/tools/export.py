"""Writes finished runs in the form in which openrlbenchmark keeps them, so that its commands plot them without an account.

    python benchmark/tools/export.py                                  # runs/ as openrlbenchmark/
    cp -r openrlbenchmark/. "$(python -c 'import openrlbenchmark as o; print(o.__path__[0])')/dataset/"
    python -m openrlbenchmark.rlops --offline --scan-history --env-ids popgym-RepeatFirstEasy-v0 \\
        --filters '?we=local&wpn=cleanrl-memoroid&ceik=task&cen=exp_name&metric=charts/episodic_return' dqn_tbb_ffm ppo_tbb_ffm

That is one folder per run (run_df.csv: an episode per row; run.json: its configuration) and a database that lists them
(offline.sqlite), below ENTITY/PROJECT. A run is found by its environment and by `exp_name`: a script's name, or GRID.ARM for a
run of a grid. `task` is the environment with its arguments; two tasks may share an `env_id`. Unfinished and failed runs are
left out. Runs made with --track are at wandb in the same form, with `ceik=env_id`.
"""

import argparse
import csv
import io
import json
import re
import sqlite3
from pathlib import Path

from records import read_events
from tables import task_name, write

# as openrlbenchmark/offline_db.py declares them through peewee
SCHEMA = """
CREATE TABLE "offlinerun" ("id" VARCHAR(255) NOT NULL, "name" VARCHAR(255) NOT NULL, "state" VARCHAR(255) NOT NULL,
    "url" VARCHAR(255) NOT NULL, "path" TEXT NOT NULL, "username" VARCHAR(255) NOT NULL, "project" VARCHAR(255) NOT NULL,
    "entity" VARCHAR(255) NOT NULL, "config" TEXT NOT NULL);
CREATE TABLE "tag" ("id" INTEGER NOT NULL PRIMARY KEY, "name" VARCHAR(255) NOT NULL);
CREATE TABLE "tag_offlinerun_through" ("id" INTEGER NOT NULL PRIMARY KEY,
    "tag_id" INTEGER NOT NULL REFERENCES "tag" ("id"), "offlinerun_id" INTEGER NOT NULL REFERENCES "offlinerun" ("id"));
"""


def configurations(runs, root):
    """(name, TensorBoard folder, configuration) of each finished run below a folder, plain or of a grid."""
    import torch

    for path in sorted(runs.glob("grids/*/*/record.json")):
        record = json.loads(path.read_text())
        if record["state"] == "done":
            arm = re.sub(r"[^\w.=-]+", "-", record["arm"])
            config = {name: record[name] for name in ("env_id", "env_kwargs", "seed", "total_timesteps", "flags")}
            config |= {"exp_name": f"{record['grid']}.{arm}", "commit": record["commit"]}
            yield f"{record['grid']}.{record['key']}", root / record["folder"], config
    for model in sorted(runs.glob("*/model.pt")):
        args = torch.load(model, map_location="cpu", weights_only=True)["args"]
        yield model.parent.name, model.parent, args | {"env_kwargs": json.dumps(args["env_kwargs"], separators=(",", ":"))}


def history(events):
    """An episode per row, as a run's history at wandb: [{global_step, _runtime (seconds), charts/episodic_return}]."""
    start = events.FirstEventTimestamp()
    return [
        {"global_step": e.step, "_runtime": round(e.wall_time - start, 3), "charts/episodic_return": e.value}
        for e in events.Scalars("charts/episodic_return")
    ]


def export(runs, root, out, entity, project):
    """Writes every finished run below `runs` into `out`; returns how many."""
    below, entries = out / entity / project, []
    for name, folder, config in configurations(runs, root):
        events = read_events(folder)
        if "charts/episodic_return" not in events.Tags()["scalars"]:
            continue
        rows, text = history(events), io.StringIO()
        config |= {"task": task_name(config)}
        entry = {"id": name, "name": name, "state": "finished", "url": "", "project": project, "entity": entity}
        entry |= {"config": config, "path": [entity, project, name], "tags": [], "user": {"username": entity, "name": entity}}
        (below / name).mkdir(parents=True, exist_ok=True)
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(below / name / "run_df.csv", text.getvalue())
        write(below / name / "run.json", json.dumps(entry))
        entries.append(entry)
    if entries:
        partial = below / "offline.sqlite.partial"
        partial.unlink(missing_ok=True)
        with sqlite3.connect(partial) as database:
            database.executescript(SCHEMA)
            for e in entries:
                values = (e["id"], e["name"], e["state"], e["url"], json.dumps(e["path"]), entity, project, entity)
                database.execute(
                    "INSERT INTO offlinerun VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, json.dumps(e["config"]))
                )
        database.close()
        partial.replace(below / "offline.sqlite")
    return len(entries)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="the repository")
    parser.add_argument("--runs", default="runs", help="folder of the runs below the root")
    parser.add_argument("--out", type=Path, default=Path("openrlbenchmark"), help="folder to write")
    parser.add_argument("--entity", default="local", help="who has the runs, openrlbenchmark's `we`")
    parser.add_argument("--project", default="cleanrl-memoroid", help="openrlbenchmark's `wpn`")
    args = parser.parse_args()
    count = export(args.root / args.runs, args.root, args.out, args.entity, args.project)
    if not count:
        raise SystemExit(f"--runs: expected finished runs in {args.root / args.runs}, found none; run a script first")
    print(f"{count} runs in {args.out / args.entity / args.project}")


if __name__ == "__main__":
    main()
