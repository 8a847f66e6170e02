"""How a script differs from the parent that its header names, beyond what the header lists.

    # Variant of single_files/PARENT.py. Changed: Args, LRU (was FFM), QNetwork.__init__, tape_buffer in __main__
    #   a long list goes on in a line that is indented by three blanks

`Args` stands for the memory specific arguments, `Args.name` for one argument, `Class.method` for one method, `imports` for all
imports, `name in __main__` for the statements there that assign the name, `__main__` for all that is under
`if __name__ == "__main__"`, any other entry for a function or class; what is in brackets is the parent's.
"""

import ast
import re
from itertools import zip_longest
from pathlib import Path

HEADER = re.compile(r"# Variant of single_files/(?P<parent>\w+)\.py\. Changed: (?P<changed>.+)")
BRACKETS = re.compile(r" \((?:was|were) ([\w.]+(?:, [\w.]+)*)\)")
ENTRY = re.compile(r"\w+(\.\w+| in __main__)?")
GROUP = "    # Memory specific arguments"
DEFS = (ast.FunctionDef, ast.ClassDef)


def header(path):
    """(parent, names changed, names that only the parent has) of a script, None if it has no such header."""
    text = path.read_text(encoding="utf-8")
    top = text[: re.search(r"^(?!#)|\Z", text, re.MULTILINE).start()]
    found = HEADER.search(top.replace("\n#   ", " "))
    if found is None:
        return None
    old = [name for names in BRACKETS.findall(found["changed"]) for name in names.split(", ")]
    changed = BRACKETS.sub("", found["changed"]).split(", ")
    if odd := [entry for entry in changed if not ENTRY.fullmatch(entry)]:
        raise ValueError(f"{path.name}: what does {odd[0]!r} mean under Changed?")
    return found["parent"], changed, old


class Script:
    """A file's lines, and the rows of each of its blocks by name: "FFM", "FFM.step", "Args.seed", "rng in __main__", ..."""

    def __init__(self, path):
        self.lines, self.blocks = path.read_text(encoding="utf-8").split("\n"), {}
        self.tree = ast.parse("\n".join(self.lines))
        self.top = range(self.tree.body[0].end_lineno)  # the header and the docstring
        imports = [n for n in self.tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.Try))]
        self.add("imports", range(self.top.stop, imports[-1].end_lineno))  # below the docstring: the dependencies, too
        for node in self.tree.body:
            if isinstance(node, DEFS):
                self.add(node.name, self.rows(node))
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if isinstance(child, DEFS):
                        self.add(f"{node.name}.{child.name}", self.rows(child))
                    elif isinstance(child, ast.AnnAssign):
                        self.add(f"{node.name}.{child.target.id}", self.rows(child))
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                self.add("__main__", self.rows(node))
                for child in ast.walk(node):
                    targets = child.targets if isinstance(child, ast.Assign) else []
                    if len(targets) == 1 and isinstance(targets[0], ast.Name):
                        self.add(f"{targets[0].id} in __main__", self.rows(child))
        if "Args" in self.blocks:  # the entry means its last group alone
            (args,) = self.blocks["Args"]
            first = self.lines.index(GROUP, args.start, args.stop)
            self.blocks["Args"] = [range(first, args.stop)]

    def add(self, name, rows):
        self.blocks.setdefault(name, []).append(rows)

    def rows(self, node):
        """From the first decorator to the last line, with comments below it that are indented like its body."""
        end = row = node.end_lineno
        while row < len(self.lines) and re.match(rf"\s*$| {{{node.col_offset + 1},}}#", self.lines[row]):
            row += 1
            end = row if self.lines[row - 1].strip() else end
        return range(min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1, end)

    def text(self, name):
        """The lines of every block of that name."""
        return [[self.lines[row] for row in rows] for rows in self.blocks.get(name, [])]

    def rest(self, dropped):
        """[(line number, line)] without header, docstring and the blocks dropped, of whose blank lines one run stays."""
        gone = {*self.top, *(row for name in dropped for rows in self.blocks.get(name, []) for row in rows)}
        kept, above, below = [], 0, None  # blank lines since the last line kept; since the last one dropped after it
        for row, line in enumerate(self.lines):
            if row in gone:
                above, below = max(above, below or 0), 0
            elif line:
                kept += [(row, "")] * max(above, below or 0) + [(row + 1, line)]
                above, below = 0, None
            elif below is None:
                above += 1
            else:
                below += 1
        return kept


def difference(path):
    """None, or how a variant differs from its parent beyond what it says."""
    parent, changed, old = header(path)
    parent = path.with_name(f"{parent}.py")
    if not parent.exists():
        return f"{path.name}: no such parent: {parent.name}"
    ours, theirs = Script(path), Script(parent)
    for name in changed:
        if name not in ours.blocks:
            return f"{path.name}: it has no {name}, which it lists as changed"
        if ours.text(name) == theirs.text(name):
            return f"{path.name}: {name} is listed as changed and is as in {parent.name}"
    for name in old:
        if name not in theirs.blocks or name in ours.blocks:
            return f"{path.name}: expected {name} in {parent.name} and not here"
    end = ("end", "(nothing: the file has ended)")
    for one, other in zip_longest(ours.rest(changed), theirs.rest([*changed, *old]), fillvalue=end):
        if one[1] != other[1]:
            places = (f"{file.name}:{number}: {line!r}" for file, (number, line) in ((path, one), (parent, other)))
            return "\n".join([*places, "list it under Changed, or run `python tests/sync_variants.py`"])
    return None


def variants(folder):
    """The scripts with a header, parents before their variants."""
    parents = {path.stem: found[0] for path in sorted(Path(folder).glob("*.py")) if (found := header(path))}
    ordered = []
    while len(ordered) < len(parents):
        ready = [
            name for name in parents if name not in ordered and (parents[name] not in parents or parents[name] in ordered)
        ]
        if not ready:
            raise ValueError(f"variants of each other: {', '.join(sorted(set(parents) - set(ordered)))}")
        ordered += ready
    return {name: parents[name] for name in ordered}
