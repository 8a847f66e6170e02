"""Every variant equals its parent but for what its header lists, and nobody can change the rest of one without the other.

    # Variant of single_files/PARENT.py. Changed: Args, LRU (was FFM), QNetwork.__init__, tape_buffer in __main__
    #   a long list goes on in a line that is indented by three blanks

`Args` stands for the memory specific arguments, `Class.method` for one method, `name in __main__` for the statements there
that assign the name, any other entry for a function or class; what is in brackets is the parent's.
"""

import ast
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import check_copies

SCRIPTS = Path(__file__).resolve().parents[1] / "single_files"
# every other dqn_*.py and ppo_*.py is a variant
ORIGINALS = ["dqn_tbb_ffm", "dqn_tbb_lru_atari_envpool", "ppo_tbb_ffm", "ppo_tbb_lru_atari_envpool"]
HEADER = re.compile(r"# Variant of single_files/(?P<parent>\w+)\.py\. Changed: (?P<changed>.+)")
BRACKETS = re.compile(r" \((?:was|were) ([\w.]+(?:, [\w.]+)*)\)")
ENTRY = re.compile(r"\w+(\.\w+| in __main__)?")
PARSED = {}
GROUP = "    # Memory specific arguments"


def read(path):
    """(script, its lines, its syntax tree), kept by content: a planted change leaves the other file as it was."""
    content = path.read_bytes()
    if content not in PARSED:
        script = check_copies.Script(path)
        PARSED[content] = script, check_copies.without_endings(script.lines), ast.parse(content)
    return PARSED[content]


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


def memory_group(lines, args):
    """Rows of Args from the memory group's title to the next comment on a line of its own, or the end of the class."""
    first = lines.index(GROUP, args.first, args.end)
    end = next((row for row in range(first + 1, args.end) if lines[row].lstrip().startswith("#")), args.end)
    return range(first, end)


def assignments(tree, name):
    """Rows of the statements under `if __name__ == "__main__"` that assign this name alone."""
    main = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")
    for node in (node for top in main for node in ast.walk(top)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if [ast.unparse(target) for target in targets] == [name]:
            yield range(node.lineno - 1, node.end_lineno)


def arguments(tree, name):
    """Rows of one argument of Args, up to the next one: its default and its docstring."""
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for node, text in zip(args.body, args.body[1:]):
        if isinstance(node, ast.AnnAssign) and node.target.id == name:
            yield range(node.lineno - 1, text.end_lineno)


def parts(path, entry):
    """The blocks of rows that an entry under Changed stands for; none if the script has nothing of that name."""
    script, lines, tree = read(path)
    if entry.endswith(" in __main__"):
        return list(assignments(tree, entry.removesuffix(" in __main__")))
    blocks = script.blocks.get(entry, [])
    if entry == "Args":
        return [memory_group(lines, block) for block in blocks]
    if entry.startswith("Args."):
        return list(arguments(tree, entry.removeprefix("Args.")))
    return [range(block.first, block.end) for block in blocks]


def rest(path, dropped):
    """[(line number, line)] without the header, the docstring, markers and the entries dropped.

    Of the blank lines above and below what is dropped, the longer run stays.
    """
    script, lines, tree = read(path)
    assert not script.mistakes, (path.name, script.mistakes)
    assert ast.get_docstring(tree), f"{path.name}: expected a docstring"
    regions = [block for name, blocks in script.blocks.items() if name.startswith("#") for block in blocks]
    markers = {row for row, *_ in script.copies} | {block.first - 1 for block in regions} | {block.end for block in regions}
    gone = {*range(tree.body[0].end_lineno), *(row for entry in dropped for block in parts(path, entry) for row in block)}
    kept, above, below = [], 0, None  # blank lines since the last line kept; since the last one dropped after it
    for row, line in enumerate(lines):
        if row in gone:
            above, below = max(above, below or 0), 0
        elif row in markers:
            continue
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
    for entry in changed:
        ours, theirs = ([[read(p)[1][row] for row in block] for block in parts(p, entry)] for p in (path, parent))
        if not ours:
            return f"{path.name}: it has no {entry}, which it lists as changed"
        if ours == theirs:
            return f"{path.name}: {entry} is listed as changed and is as in {parent.name}"
    for entry in old:
        if not parts(parent, entry) or parts(path, entry):
            return f"{path.name}: expected {entry} in {parent.name} and not here"
    end = ("end", "(nothing: the file has ended)")
    for ours, theirs in zip_longest(rest(path, changed), rest(parent, [*changed, *old]), fillvalue=end):
        if ours[1] != theirs[1]:
            places = (f"{file.name}:{number}: {line!r}" for file, (number, line) in ((path, ours), (parent, theirs)))
            return "\n".join([*places, "list it under Changed, or undo it"])
    return None


def is_variant(path):
    return header(path) is not None or path.stem.startswith(("dqn_", "ppo_")) and path.stem not in ORIGINALS


VARIANTS = sorted(path.stem for path in SCRIPTS.glob("*.py") if is_variant(path))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_its_parent_but_for_what_it_lists(name):
    assert header(SCRIPTS / f"{name}.py") is not None, (
        "expected `# Variant of single_files/PARENT.py. Changed: ...` at the top"
    )
    assert difference(SCRIPTS / f"{name}.py") is None


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("right", "planted"),
    [
        ("    seed: int = 1\n", "    seed: int = 2\n"),  # a default in Args
        ('"""the project name in Weights and Biases"""', '"""the project name"""'),  # a docstring in Args
        ("    # env setup\n", "    # envs\n"),  # a comment
        ("name, weights_only):", "name, weights_only=True):"),  # a default of a function
        ("optimizer.zero_grad()", "optimizer.zero_grad(True)"),
    ],
)
def test_a_planted_difference_in_a_variant_or_its_parent_is_caught(tmp_path, name, right, planted):
    parent = header(SCRIPTS / f"{name}.py")[0]
    for changed in (name, parent):
        for script in (name, parent):
            text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
            assert text.count(right) == 1
            (tmp_path / f"{script}.py").write_text(
                text.replace(right, planted) if script == changed else text, encoding="utf-8"
            )
        assert "\nlist it under Changed, or undo it" in difference(tmp_path / f"{name}.py")


PARENT = '''# docs: parent
"""Parent."""

import os


class Args:
    # region arguments
    seed: int = 1
    """the seed"""
    # endregion

    # Memory specific arguments
    size: int = 2
    """the size"""

    # what follows is computed
    rows: int = 0


def helper(x):
    return x  # as it is


class FFM:
    def scan(self):
        return 1


class Buffer:
    size = 1


class QNetwork:
    def __init__(self):
        self.memory = FFM()

    def forward(self):
        # one pass
        return self.memory.scan()

    def last(self):
        return 2


if __name__ == "__main__":
    # region setup
    args = Args()
    # endregion
    buffer = Buffer(
        args,
    )
    # region training
    if buffer:
        buffer = other = args
    # endregion
'''
VARIANT = '''# docs: variant
# Variant of single_files/parent.py. Changed: Args, start, LRU, StackedLRU (were FFM), Ring (was Buffer),
#   QNetwork.__init__, QNetwork.last, buffer in __main__
"""Variant,

another docstring.
"""

import os


class Args:
    # region arguments -- Copied from single_files/parent.py#arguments
    seed: int = 1
    """the seed"""
    # endregion

    # Memory specific arguments
    layers: int = 3
    """the layers"""
    size: int = 4

    # what follows is computed
    rows: int = 0


# Copied from single_files/parent.py:helper
def helper(x):
    return x  # as it is


class LRU:
    """LRU."""

    def scan(self):
        return 2
        # the last word


class StackedLRU:
    layers = LRU


class Ring:
    size = 2


class QNetwork:
    def __init__(self):
        # two of them
        self.memory = StackedLRU()

    # Copied from single_files/parent.py:QNetwork.forward
    def forward(self):
        # one pass
        return self.memory.scan()

    @staticmethod
    def last():
        return 3


def start():
    return 1


if __name__ == "__main__":
    # region setup -- Copied from single_files/parent.py#setup
    args = Args()
    # endregion
    buffer = Ring(args, 3)
    # region training -- Copied from single_files/parent.py#training
    if buffer:
        buffer = other = args
    # endregion
'''


@pytest.fixture
def pair(tmp_path):
    """A function that writes a parent and a variant and returns how they differ."""

    def write(variant=VARIANT, parent=PARENT):
        (tmp_path / "parent.py").write_text(parent)
        (tmp_path / "variant.py").write_text(variant)
        return difference(tmp_path / "variant.py")

    return write


def test_what_is_listed_may_differ(pair):
    assert pair() is None
    assert pair(VARIANT.replace("return 2\n        # the last word", "return 3")) is None
    assert pair(VARIANT.replace("size: int = 4", "width: float = 4")) is None
    assert pair(VARIANT, PARENT.replace("# docs: parent\n", "").replace("Parent.", "A parent")) is None


@pytest.mark.parametrize(
    ("right", "planted"),
    [
        ("import os\n", "import os\nimport re\n"),
        ("seed: int = 1", "seed: int = 2"),
        ("seed: int = 1", "seed: float = 1"),
        ("seed: int = 1", "seeds: int = 1"),
        ('"""the seed"""', '"""the seed;"""'),
        ("    # endregion\n\n    # Memory", "    more: int = 1\n    # endregion\n\n    # Memory"),
        ("rows: int = 0", "rows: int = 1"),  # in Args, behind the memory group
        ("    # what follows is computed\n", ""),
        ("return x  # as it is", "return x  # as  it is"),
        ("def helper(x):", "def helper(x=1):"),
        ("# one pass", "# two passes"),
        ("    def forward(self):\n        # one pass\n        return self.memory.scan()\n\n", ""),
        ("class QNetwork:", "class QNetwork(object):"),
        ("\n    @staticmethod", "\n    size = 3\n\n    @staticmethod"),  # between methods
        ("def start():\n", "x = 1\n\n\ndef start():\n"),
        ("    args = Args()\n", "    args = Args()\n    start()\n"),
        ("buffer = other = args", "buffer = other = 1"),  # assigns something else, too
        ("    # endregion\n$", "        start()\n    # endregion\n"),
        ("def helper(x):\n", "def helper(x):\n\n"),  # a blank line
    ],
)
def test_a_difference_that_is_not_listed_is_caught(pair, right, planted):
    text = VARIANT + "$"
    assert text.count(right) == 1
    assert "variant.py:" in pair(text.replace(right, planted).removesuffix("$"))


@pytest.mark.parametrize(
    ("right", "planted"),
    [
        ("seed: int = 1", "seed: int = 2"),
        ("# one pass", "# two passes"),
        ("rows: int = 0\n", "rows: int = 0\n    more: int = 0\n"),
        ("buffer = other = args", "buffer = other = 1"),
        ("def helper(x):", "def other():\n    return 1\n\n\ndef helper(x):"),
        ("    # endregion\n$", "        helper(1)\n    # endregion\n"),
    ],
)
def test_a_change_of_the_parent_alone_is_caught(pair, right, planted):
    text = PARENT + "$"
    assert text.count(right) == 1
    assert "parent.py:" in pair(parent=text.replace(right, planted).removesuffix("$"))


def test_the_message_names_both_lines(pair):
    lines = pair(VARIANT.replace("# one pass", "# two passes")).splitlines()
    ours, theirs = (t[: t.index("# one pass")].count("\n") + 1 for t in (VARIANT, PARENT))
    assert lines[0] == f"variant.py:{ours}: '        # two passes'"
    assert lines[1] == f"parent.py:{theirs}: '        # one pass'"


@pytest.mark.parametrize(
    ("right", "planted", "message"),
    [
        ("QNetwork.last, ", "", "def last"),
        ("buffer in __main__", "args in __main__", "args in __main__ is listed as changed and is as in parent.py"),
        ("buffer in __main__", "nothing in __main__", "it has no nothing in __main__"),
        ("QNetwork.last, ", "QNetwork.last, QNetwork.forward, ", "QNetwork.forward is listed as changed and is as in"),
        ("start, ", "start, stop, ", "it has no stop"),
        (" (were FFM)", "", "FFM"),
        (" (was Buffer)", " (was Ring)", "expected Ring in parent.py and not here"),
        ("parent.py. Changed", "none.py. Changed", "no such parent: none.py"),
    ],
)
def test_a_wrong_header_is_caught(pair, right, planted, message):
    assert message in pair(VARIANT.replace(right, planted, 1))


@pytest.mark.parametrize(
    "wrong", ["# A variant of single_files/parent.py. Changed: Args", "# Variant of single_files/parent.py."]
)
def test_a_script_without_a_header_is_found(tmp_path, wrong):
    path = tmp_path / "variant.py"
    path.write_text(f'{wrong}\n"""Text."""\n# Variant of single_files/parent.py. Changed: Args\n')
    assert header(path) is None
    path.write_text(VARIANT.replace("Ring (was Buffer)", "Ring (Buffer)"))
    with pytest.raises(ValueError, match="what does 'Ring .Buffer.' mean"):
        header(path)
