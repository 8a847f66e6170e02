"""CSV files and Markdown tables: what the modules of the report share."""

import csv
import io
import re


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
    """A table of dicts; a bar in a cell would start a cell."""
    lines = [columns, ["---"] * len(columns), *([str(row[c]).replace("|", "\\|") for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def task_name(row):
    """An environment and its arguments, as tables and pictures call it."""
    return row["env_id"] + ("" if row["env_kwargs"] == "{}" else f" {row['env_kwargs']}")


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
                text = head + begin + table + "\n" + rest[rest.index(end) :]
        if text != page.read_text():
            write(page, text)
