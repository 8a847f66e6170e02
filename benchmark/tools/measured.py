"""Tables of what benchmark/speed and benchmark/probes measure, for the pages. report.py calls it.

A CSV file of benchmark/results/machines has every figure; a table has the few that its page speaks of.
"""

import functools

from tables import csv_link, grouped, markdown, mean_and_spread, number, read_rows

MEMORIES = {"dqn_tbb_ffm": "FFM", "dqn_tbb_lru": "LRU", "dqn_tbb_s5": "S5", "dqn_tbb_linattn": "linear transformer"}
SHOWN = {  # {file: {column: its head}}; a file that is not named here is shown as it is
    "collect": {
        "what": "what",
        "median_us_per_step": "microseconds per step",
        "steps_per_s": "steps per second",
        "share_of_script": "share of the script",
    },
    "atari_memory": {"what": "what", "MB": "MB", "announced_MB": "MB, as announced", "ratio": "ratio"},
    "atari_speed": {
        "algorithm": "algorithm",
        "memory": "memory",
        "act_ms": "acting (ms)",
        "train_ms": "training (ms)",
        "train_vs_lru": "training, times LRU's",
        "steps_per_s": "steps per second",
    },
}


def rounded(text):
    """A cell with three digits at most, if it is a number."""
    try:
        return number(text)
    except ValueError:
        return text


def plain_table(rows, columns=None):
    """Some columns under heads of their own, or all as they are."""
    columns = columns or {name: name for name in rows[0]}
    return markdown([{head: rounded(row[name]) for name, head in columns.items()} for row in rows], list(columns.values()))


def scan_table(rows):
    """Backends as columns: the milliseconds of a copy, and how many copies' time a scan takes."""
    table, backends = [], ("numba", "torch", "jax paper", "jax lax.scan")
    for (T, what), members in grouped(rows, lambda row: (row["T"], row["what"])).items():
        copies = {row["backend"]: row["copies"] for row in members if row["copies"]}
        if copies:
            line = {"rows": f"{int(T):,} {what}"}
            line["copy (ms)"] = next(number(row["median_ms"]) for row in members if row["backend"] == "copy")
            table.append(line | {f"{name} (copies)": number(copies[name]) if name in copies else "" for name in backends})
    return markdown(table, list(table[0]))


def parts_table(rows, script):
    """The parts of one script's update as rows, the lengths of its tape as columns: milliseconds."""
    table = {}
    for row in (row for row in rows if row["script"] == script):
        line = table.setdefault(
            row["what"], {"part of an update": row["what"].replace("jax paper", "the paper's update, jitted")}
        )
        line[f"{int(row['rows']):,} rows (ms)"] = number(row["median_ms"])
        line[f"{int(row['rows']):,} rows, times the matrix products"] = rounded(row["vs_products"])
    return markdown(list(table.values()), list(next(iter(table.values()))))


def whole_table(rows):
    """Whole updates of each memory beside the paper's: milliseconds, and how many times faster."""
    table = {}
    for row in (row for row in rows if row["script"] in MEMORIES and row["what"] == "update"):
        line = table.setdefault(row["script"], {"memory": MEMORIES[row["script"]]})
        line[f"{int(row['rows']):,} rows (ms)"] = number(row["median_ms"])
        line[f"{int(row['rows']):,} rows, times as fast as the paper's"] = rounded(row["vs_paper"])
    lines = [table[script] for script in MEMORIES if script in table]
    return markdown(lines, list(lines[0]))


def ppo_update_table(rows):
    """Contenders as rows, rollouts as columns: milliseconds, and how many times faster than the loop over steps."""
    table = {}
    for row in (row for row in rows if not row["contender"].endswith(", untuned")):
        head = f"{int(row['steps']):,} steps, {row['minibatches']} minibatch{'es' * (row['minibatches'] != '1')}"
        line = table.setdefault(row["contender"], {"contender": row["contender"]})
        line[head] = f"{number(row['median_ms'])} ({number(row['vs_lstm_loop'])})"
    return markdown(list(table.values()), list(next(iter(table.values()))))


def memory_length_table(rows):
    """Tape and segments as rows, over the seeds: how much of a Q value's sensitivity goes to what the task needs."""
    table = []
    for (length, at), cell in grouped(rows, lambda row: (row["segment_length"], row["at"])).items():
        line = {"trained on": f"segments of {length}" if length else "the tape", "rows": at}
        for name, head in (
            ("greedy_return", "greedy return"),
            ("share_inside", "share inside the RML"),
            ("share_oldest_needed", "of the oldest needed"),
        ):
            line[head] = mean_and_spread([float(row[name]) for row in cell])
        table.append(line | {"90 % up to age": ", ".join(row["age_90"] for row in cell)})
    return markdown(table, list(table[0]))


TABLES = {
    "scan": {"": scan_table},
    "update": {"": functools.partial(parts_table, script="dqn_tbb_ffm"), "_all": whole_table},
    "ppo_update": {"": ppo_update_table},
    "summary": {"": memory_length_table},
}


def measured_tables(results):
    """{marker: table} of the files of benchmark/speed, which are named MACHINE/FILE, and of benchmark/probes."""
    tables = {}
    for path in [*sorted(results.glob("machines/*/*.csv")), *results.glob("memory_length/summary.csv")]:
        rows, where = read_rows(path)
        name = path.parent.name if path.stem == "summary" else f"{path.parent.name}/{path.stem}"
        about = f"{csv_link(path, 'all figures')}; {where}"
        makers = TABLES.get(path.stem, {"": functools.partial(plain_table, columns=SHOWN.get(path.stem))})
        for suffix, maker in makers.items():
            tables[name + suffix] = f"{about}\n\n{maker(rows)}" if rows else about
    return tables
