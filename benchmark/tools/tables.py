"""CSV files and Markdown tables: what the modules of the report share."""

import csv
import io
import math
import re
import statistics


def natural(value):
    """A key to sort texts by that takes numbers in them as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(value))]


def write(path, content):
    """Text or bytes into a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    partial.replace(path)
    print(f"wrote {path}")


def write_rows(path, rows):
    """Dicts as a CSV file with a head: their keys in the order of the first appearance."""
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(name for row in rows for name in row), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, out.getvalue())


def read_rows(path):
    """Rows of a CSV file as dicts, and its leading comment."""
    lines = path.read_text().splitlines()
    comment = [line[1:].strip() for line in lines if line.startswith("#")]
    return list(csv.DictReader(line for line in lines if not line.startswith("#"))), " ".join(comment)


def markdown(rows, columns):
    """A table of dicts; what a row does not have is empty. A bar in a cell would start a cell."""
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")).replace("|", "\\|") for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def final_return(row):
    """The greedy return of the final network; of a program that does not evaluate, of its last episodes in training."""
    return float(row["greedy_return"] or row["training_return"])


def number(value, decimals=None):
    """A number as tables show it, with three digits at most: 0.0677, 1.5, 12,000.

    `decimals`: in a column of like numbers, as many digits stand behind the point, or fewer if that would be more than three.
    """
    value = float(value)
    if not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.3g}")
    if decimals is None and 0 < abs(rounded) < 1e-4:
        return f"{value:.1e}"
    places = 2 - math.floor(math.log10(abs(rounded))) if rounded else 2
    if decimals is None:
        text = f"{rounded:,.{max(0, places)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    rounded = rounded if places < 0 else round(value, min(places, decimals))
    return f"{rounded + 0.0:,.{max(0, min(places, decimals))}f}"  # + 0.0: no "-0.00"


def mean_and_spread(values, decimals=2):
    """Mean ± standard deviation of the seeds, with three digits at most; the mean alone of one seed, and "" of none."""
    values = [float(value) for value in values]
    if not values:
        return ""
    mean = number(sum(values) / len(values), decimals)
    places = len(mean.partition(".")[2])
    return f"{mean} ± {statistics.pstdev(values):,.{places}f}" if len(values) > 1 else mean


def each_seed(values, decimals=2):
    """Every seed's number, in their order."""
    return ", ".join(number(value, decimals) for value in values)


def with_seeds(values, more=""):
    """Mean ± standard deviation, and in brackets every seed, or how many there are if they look alike."""
    texts = each_seed(values).split(", ")
    seeds = f"{len(values)} seeds" if len(set(texts)) == 1 else ", ".join(texts)
    about = "; ".join(text for text in (seeds if len(values) > 1 else "", more) if text)
    return f"{mean_and_spread(values)} ({about})".strip() if about else mean_and_spread(values)


def csv_link(path, text):
    """A link to a file of benchmark/results. fill() makes it relative to the page."""
    return f"[{text}](/benchmark/results/{path.as_posix().rpartition('/benchmark/results/')[2]})"


def task_name(row):
    """An environment and its arguments, as pictures call it."""
    return row["env_id"] + ("" if row["env_kwargs"] == "{}" else f" {row['env_kwargs']}")


def short_name(row):
    """The same for tables, without the prefix that most have in common."""
    return task_name(row).removeprefix("popgym-")


def grouped(rows, key):
    """{key of a row: its rows}, in the order in which the keys come."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def fill(root, tables):
    """Puts each table between its markers in README.md and docs/."""
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- results: {name} -->\n", "<!-- end results -->"
            if begin in text:
                head, rest = text.split(begin, 1)
                table_here = table.replace("](/", "](" + "../" * len(page.relative_to(root).parts[:-1]))
                text = head + begin + table_here + "\n" + rest[rest.index(end) :]
        if text != page.read_text():
            write(page, text)
