"""Checks that every marked copy equals its source; with --fix, rewrites the copies from their sources, never the reverse.

    python tests/check_copies.py
    python tests/check_copies.py --fix

A copy carries a marker on the line above it, in any .py file of single_files/, cleanrl_memoroid/, benchmark/ and tests/:

    # Copied from single_files/dqn_tbb_ffm.py:TapeBuffer                                 a top-level def or class
    # Copied from single_files/dqn_tbb_ffm.py:QNetwork.forward with FFM->LRU, ffm->lru   a method; whole names, left to right
    # region collect -- Copied from single_files/dqn_tbb_ffm.py#collect                  lines up to `# endregion`; the source
                                                                                         has `# region collect`, `# endregion`

A block is a def or class with its decorators and all comments inside; it is compared as text, at whatever level it stands.
A source is never itself a copy, nor part of one, nor holds one. A comment that looks like a marker and is none fails too.
"""

import argparse
import ast
import difflib
import io
import os
import re
import shutil
import sys
import tokenize
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("single_files", "cleanrl_memoroid", "benchmark", "tests")
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SOURCE = r"Copied from (?P<path>[\w/-]+\.py){}(?P<name>{}[\w.-]+)(?: with (?P<swaps>\w+->\w+(?:, \w+->\w+)*))?"
COPY = re.compile("# " + SOURCE.format(":", ""))
REGION = re.compile(r"# region (?P<region>[\w-]+)(?: -- " + SOURCE.format("", "#") + ")?")
ATTEMPT = re.compile(r"#\W*(end\W*)?region\b|#.*\bcop(y|ied)\b.*\.py[:#]\w", re.IGNORECASE)


class Block(NamedTuple):
    first: int  # index of its first line
    end: int  # index of the line after its last
    indent: int  # columns

    def overlaps(self, other):
        return self.first < other.end and other.first < self.end


class Script:
    """A file's lines with their endings, blocks by name ("TapeBuffer", "QNetwork.forward", "#collect"), copies, mistakes."""

    def __init__(self, path):
        self.lines, self.blocks = [], {}
        self.copies = []  # (index of the marker's line, its match, its block)
        self.mistakes = []  # (index of a line, what is wrong there)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                self.lines = file.readlines()
            tree = ast.parse("".join(self.lines))
        except (SyntaxError, ValueError) as error:
            self.mistakes.append(((getattr(error, "lineno", None) or 1) - 1, f"not readable as Python: {error}"))
            return
        for node in (node for node in tree.body if isinstance(node, DEFS)):
            self.blocks.setdefault(node.name, []).append(self.block(node))
            for method in (child for child in node.body if isinstance(node, ast.ClassDef) and isinstance(child, DEFS)):
                self.blocks.setdefault(f"{node.name}.{method.name}", []).append(self.block(method))
        below = {block.first: block for block in (self.block(node) for node in ast.walk(tree) if isinstance(node, DEFS))}
        regions = []  # those still open: (index of the line, match, indent)
        for token in tokenize.generate_tokens(io.StringIO("".join(self.lines), newline="").readline):
            if token.type == tokenize.COMMENT:
                self.comment(token.start[0] - 1, token.start[1], token.string.rstrip(), below, regions)
        self.mistakes += [(row, "a region without its `# endregion`") for row, *_ in regions]

    def block(self, node):
        """Comments below the last statement belong to a block if they are indented like its body."""
        end = row = node.end_lineno
        while row < len(self.lines) and re.match(rf"\s*$| {{{node.col_offset + 1},}}#", self.lines[row]):
            row += 1
            end = row if self.lines[row - 1].strip() else end
        return Block(min(n.lineno for n in (node, *node.decorator_list)) - 1, end, node.col_offset)

    def comment(self, row, column, text, below, regions):
        alone = not self.lines[row][:column].strip()
        letters = re.sub("[^a-z]", "", text.lower())[: len("copiedfrom")]
        if alone and (match := COPY.fullmatch(text)) and row + 1 in below:
            self.copies.append((row, match, below[row + 1]))
        elif alone and (match := REGION.fullmatch(text)):
            regions.append((row, match, column))
        elif alone and text == "# endregion" and regions:
            start, match, indent = regions.pop()
            self.blocks.setdefault(f"#{match['region']}", []).append(Block(start + 1, row, indent))
            if match["path"]:
                self.copies.append((start, match, Block(start + 1, row, indent)))
        elif COPY.fullmatch(text):
            self.mistakes.append((row, "no block below this marker; it stands above a def, a class or its first decorator"))
        elif ATTEMPT.match(text) or difflib.SequenceMatcher(None, letters, "copiedfrom").ratio() >= 0.8:
            self.mistakes.append((row, f"not a marker: {text!r}; tests/check_copies.py shows the three forms at its top"))


def without_endings(lines):
    return [line.rstrip("\r\n") for line in lines]


def expected(lines, block, indent, swaps):
    """The source's lines as they should stand in the copy."""
    lines, shift = without_endings(lines[block.first : block.end]), indent - block.indent
    for old, new in re.findall(r"(\w+)->(\w+)", swaps or ""):
        lines = [re.sub(rf"\b{old}\b", new, line) for line in lines]
    if shift > 0:
        return [" " * shift + line if line.strip() else line for line in lines]
    return [re.sub(f"^ {{0,{-shift}}}", "", line) for line in lines]


def load(root):
    """Path in the repository -> Script."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return {path.relative_to(root).as_posix(): Script(path) for path in paths}


def compare(files, name, row, match, block):
    """What is wrong with one copy, None if nothing: (line, message, the lines that would repair it or None)."""
    path, wanted = match["path"], f"{match['path']}, {match['name']}"
    blocks = files[path].blocks.get(match["name"], []) if path in files else []
    if any(line != row and other.overlaps(block) for line, _, other in files[name].copies):
        return row + 1, "this copy lies inside another copy, or around one; keep one of the markers", None
    if len(blocks) != 1:
        reason = f"{len(blocks)} of that name" if blocks else "no such name" if path in files else "no such file"
        return row + 1, f"unknown source: {wanted}: {reason}; correct the marker", None
    if markers := [line + 1 for line, _, other in files[path].copies if other.overlaps(blocks[0])]:
        return row + 1, f"the source, {wanted}, is or holds a copy: {path}:{markers[0]}; name the original", None
    new = expected(files[path].lines, blocks[0], block.indent, match["swaps"])
    old = without_endings(files[name].lines[block.first : block.end])
    for i, (a, b) in enumerate(zip_longest(old, new, fillvalue="(nothing: the block has ended)")):
        if a != b:
            lines = f"\n    copy    {a!r}\n    source  {b!r}\n    run     python tests/check_copies.py --fix"
            return block.first + i + 1, f"differs from {path}:{blocks[0].first + i + 1}{lines}", new
    return None


def check(files):
    """Failures [(file, line, message)], and what would repair them: file -> [(block, its lines)]."""
    failures, repairs = [], {}
    for name, file in files.items():
        failures += [(name, row + 1, message) for row, message in file.mistakes]
        for row, match, block in file.copies:
            if problem := compare(files, name, row, match, block):
                line, message, new = problem
                failures.append((name, line, message))
                if new is not None:
                    repairs.setdefault(name, []).append((block, new))
    return sorted(failures), repairs


def repair(path, lines, blocks):
    newline, closed = "\r\n" if lines[0].endswith("\r\n") else "\n", lines[-1].endswith("\n")
    for block, new in sorted(blocks, reverse=True):
        lines[block.first : block.end] = [line + newline for line in new]
    text = "".join(lines)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes((text if closed else text.removesuffix(newline)).encode())
    shutil.copymode(path, partial)
    os.replace(partial, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="rewrite the copies that differ")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    args = parser.parse_args(argv)
    files = load(args.root)
    failures, repairs = check(files)
    if args.fix and repairs:
        for name, blocks in repairs.items():
            repair(args.root / name, files[name].lines, blocks)
            print(f"{name}: {len(blocks)} rewritten")
        files = load(args.root)
        failures, _ = check(files)
    for name, line, message in failures:
        print(f"{name}:{line}: {message}")
    if not failures:
        print(f"{sum(len(file.copies) for file in files.values())} copies in {len(files)} files equal their sources")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
