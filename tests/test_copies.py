"""check_copies.py on this repository and, with planted mistakes, on a made-up one; no block is repeated without a marker."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import check_copies

ROOT = Path(__file__).resolve().parents[1]
# what scripts have under one name in versions of their own
OWN = ("Args", "make_env", "vector_env", "check_spaces", "QNetwork", "Agent")

SOURCE = '''"""A source."""
import functools


class FFM:
    """FFM's doc."""

    def lift(self, obs, size=2):
        # twice, FFM's way

        FFM_size = FFM.size * size  # ffm -> FFM
        return obs * FFM_size
        # the last word


@functools.cache
def scale(x):
    """Doubles • x."""
    # twice
    return 2 * x


if __name__ == "__main__":
    # region collect
    obs = scale(1)
    if obs:
        print(obs)  # say so

    # endregion
'''
COPY = '''"""A copy,  oddly   laid out."""
import functools
ODD = {  1:2 }


# Copied from single_files/source.py:scale
@functools.cache
def scale(x):
    """Doubles • x."""
    # twice
    return 2 * x
class LRU :
    # Copied from single_files/source.py:FFM.lift with FFM->LRU, ffm->lru
    def lift(self, obs, size=2):
        # twice, LRU's way

        FFM_size = LRU.size * size  # lru -> LRU
        return obs * FFM_size
        # the last word

    # what follows is not copied
    other = [ 1 ]

# Copied from single_files/source.py:FFM.lift with FFM->S5
def lift(self, obs, size=2):
    # twice, S5's way

    FFM_size = S5.size * size  # ffm -> S5
    return obs * FFM_size
    # the last word

def lift_alone():
    # Copied from single_files/source.py:FFM.lift with FFM->GRU, GRU->LRU
    def lift(self, obs, size=2):
        # twice, LRU's way

        FFM_size = LRU.size * size  # ffm -> LRU
        return obs * FFM_size
        # the last word
    return lift

def loop(steps):
    for _ in range(steps) :
        # region gather -- Copied from single_files/source.py#collect with obs->seen
        seen = scale(1)
        if seen:
            print(seen)  # say so

        # endregion
    return  [ steps ]

# Copied from single_files/source.py:FFM
class FFM:
    """FFM's doc."""

    def lift(self, obs, size=2):
        # twice, FFM's way

        FFM_size = FFM.size * size  # ffm -> FFM
        return obs * FFM_size
        # the last word'''


@pytest.fixture
def repository(tmp_path):
    """A function that writes {path: text} into a made-up repository, which passes the check as it is, and returns its root."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(text.encode())
        return tmp_path

    write({"single_files/source.py": SOURCE, "benchmark/copy.py": COPY})
    return write


def line_of(text, part):
    assert text.count(part) == 1, part
    return text[: text.index(part)].count("\n") + 1


def test_this_repository():
    run = subprocess.run([sys.executable, "tests/check_copies.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "equal their sources" in run.stdout and run.stdout.count("\n") == 1


def test_equal_copies_pass_and_fix_leaves_them(repository, capsys):
    root = repository({})
    for argv in ([], ["--fix"]):
        assert check_copies.main(["--root", str(root), *argv]) == 0
        assert capsys.readouterr().out == "6 copies in 2 files equal their sources\n"
        assert (root / "benchmark/copy.py").read_bytes() == COPY.encode()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("right", "planted"),
    [
        ("    return 2 * x\nclass", "    return 3 * x\nclass"),  # code
        ("    # twice\n", "    # twicf\n"),  # a comment
        ('"""Doubles • x."""', '"""Doubles  x."""'),  # a docstring
        ("@functools.cache", "@functools.cach"),  # a decorator
        ("# lru -> LRU", "# ffm -> LRU"),  # the second replacement of a method
        ("# the last word\n\n    # what", "# the last ward\n\n    # what"),  # a comment below the last statement
        (
            "        # twice, LRU's way\n\n        FFM_size = LRU.size * size  # lru",
            "        FFM_size = LRU.size * size  # lru",
        ),
        (
            "        # the last word\n    return lift",
            "        # the last word\n        x = 1\n    return lift",
        ),  # a line too many
        ("FFM_size = S5.size", "FFM_size = FFM.size"),  # a method as a function
        ("print(seen)  # say", "print(seen) # say"),  # a region, one blank
        ("        seen = scale(1)\n", ""),  # a region, a line missing
        ("        if seen:\n", "        if  seen:\n"),
        (
            "        return obs * FFM_size\n        # the last word" + "$",
            "        return obs * FFM_size" + "$",
        ),  # the file's last line
    ],
)
def test_a_planted_difference_is_caught_and_repaired(repository, capsys, right, planted, newline):
    clean = (COPY + "$").replace("\n", newline)
    right, planted = right.replace("\n", newline), planted.replace("\n", newline)
    assert clean.count(right) == 1
    broken = clean.replace(right, planted).removesuffix("$").encode()
    clean = clean.removesuffix("$").encode()
    root = repository({"single_files/source.py": SOURCE.replace("\n", newline)})
    copy = root / "benchmark/copy.py"
    copy.write_bytes(broken)
    assert check_copies.main(["--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("benchmark/copy.py:") and out.count("differs from") == 1
    assert "python tests/check_copies.py --fix" in out
    assert copy.read_bytes() == broken  # without --fix nothing is written

    copy.chmod(0o755)
    assert check_copies.main(["--root", str(root), "--fix"]) == 0
    assert copy.read_bytes() == clean
    assert copy.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in root.rglob("*.py*")) == ["copy.py", "source.py"]
    assert (root / "single_files/source.py").read_bytes() == SOURCE.replace("\n", newline).encode()


def test_the_message_names_both_lines(repository, capsys):
    root = repository({"benchmark/copy.py": COPY.replace("print(seen)", "print(sean)")})
    copy_line, source_line = line_of(COPY, "print(seen)"), line_of(SOURCE, "print(obs)")
    assert check_copies.main(["--root", str(root)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"benchmark/copy.py:{copy_line}: differs from single_files/source.py:{source_line}",
        "    copy    '            print(sean)  # say so'",
        "    source  '            print(seen)  # say so'",
        "    run     python tests/check_copies.py --fix",
    ]


def test_a_change_of_the_source_reaches_every_copy(repository):
    """Also where a block grows, so that the ones below it move; never the other way."""
    changed = SOURCE.replace("    # twice\n", "    # twice\n    # or thrice\n").replace("obs * FFM_size", "FFM_size * obs")
    root = repository({"single_files/source.py": changed})
    assert check_copies.main(["--root", str(root), "--fix"]) == 0
    expected = COPY.replace("    # twice\n", "    # twice\n    # or thrice\n").replace("obs * FFM_size", "FFM_size * obs")
    assert (root / "benchmark/copy.py").read_text() == expected
    assert (root / "single_files/source.py").read_text() == changed


BLOCK = "def scale(x):\n    return 2 * x\n"
REGION = "x = 1\n# endregion\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Copied from single_files/none.py:scale\n" + BLOCK, "no such file"),
        ("# Copied from single_files/source.py:scales\n" + BLOCK, "no such name"),
        ("# Copied from single_files/source.py:FFM.drop\n" + BLOCK, "no such name"),
        ("# Copied from single_files/source.py:functools\n" + BLOCK, "no such name"),
        ("# region a -- Copied from single_files/source.py#collects\n" + REGION, "no such name"),
        ("# Copied from single_files/twice.py:scale\n" + BLOCK, "2 of that name"),
        ("# Copied form single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("#Copied from single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("# copied from single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("# COPIED FROM the source\n" + BLOCK, "not a marker"),
        ("# Coppied from single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("# Cpoied  frm single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("# Copy of single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("# Copied from single_files/source.py scale\n" + BLOCK, "not a marker"),
        ("# Copied from single_files/source.py: scale\n" + BLOCK, "not a marker"),
        ("# Copied from single_files/source.py#collect\n" + BLOCK, "not a marker"),
        ("# Copied from ../single_files/source.py:scale\n" + BLOCK, "not a marker"),
        ("# Copied from single_files/source.py:scale, mostly\n" + BLOCK, "not a marker"),
        ("# Copied from single_files/source.py:scale with x-> y\n" + BLOCK, "not a marker"),
        ("# Copied from single_files/source.py:scale with x->y z->w\n" + BLOCK, "not a marker"),
        ("y = 1  # Copied from single_files/source.py:collect\n", "no block below"),
        ("# Copied from single_files/source.py:scale\n\n" + BLOCK, "no block below"),
        ("# Copied from single_files/source.py:scale\nscale = 1\n", "no block below"),
        ("# region a - Copied from single_files/source.py#collect\n" + REGION, "not a marker"),
        ("# region a -- Copied from single_files/source.py:collect\n" + REGION, "not a marker"),
        ("# Region a -- Copied from single_files/source.py#collect\n" + REGION, "not a marker"),
        ("# regoin a -- Copied from single_files/source.py#collect\nx = 1\n", "not a marker"),
        ("# region a -- Copied from single_files/source.py#collect\nx = 1\n# end region\n", "without its `# endregion`"),
        ("# endregion\n", "not a marker"),
        ("# Copied from benchmark/copy.py:scale\n" + BLOCK, "is or holds a copy"),
        ("# Copied from benchmark/copy.py:LRU\n" + BLOCK, "is or holds a copy"),
        ("# Copied from benchmark/copy.py:FFM.lift\n" + BLOCK, "is or holds a copy"),
        ("# region a -- Copied from benchmark/copy.py#gather\n" + REGION, "is or holds a copy"),
        ("# Copied from tests/wrong.py:scale\n" + BLOCK, "is or holds a copy: tests/wrong.py:3"),
        (
            "# Copied from single_files/source.py:FFM\nclass A:\n"
            "    # Copied from single_files/source.py:FFM.lift\n    def f(): ...\n",
            "inside another copy",
        ),
        ("def broken(:\n", "not readable"),
    ],
)
def test_a_wrong_marker_fails_and_nothing_is_rewritten(repository, capsys, text, message):
    text = "import os\n\n" + text
    root = repository({"tests/wrong.py": text, "single_files/twice.py": BLOCK + BLOCK})
    for argv in ([], ["--fix"]):
        assert check_copies.main(["--root", str(root), *argv]) == 1
        out = capsys.readouterr().out
        assert out.startswith("tests/wrong.py:3: ") and message in out
        assert (root / "tests/wrong.py").read_text() == text


def test_prose_and_strings_are_no_markers(repository):
    text = '"""\n# Copied from nowhere\n"""\n# a copy of what is in scan.py: see there\n# copies are cheap\nx = "# region a"\n'
    assert check_copies.main(["--root", str(repository({"tests/prose.py": text}))]) == 0


def unmarked_twice(root):
    """Top-level names of single_files/ that have a body without a marker in several files: {name: files}.

    A class is marked by one marker above it, or by one above each of its methods, where it puts several sources together.
    Two algorithms (dqn_*, ppo_*) may each have a version under one name, but not the same one twice.
    """
    found = {}
    for path, file in check_copies.load(root).items():
        marked = {block.first for _, _, block in file.copies}
        algorithm = re.match("(dqn_|ppo_)?", Path(path).name)[0]
        for name, blocks in file.blocks.items():
            methods = [b for method, blocks_ in file.blocks.items() if method.startswith(f"{name}.") for b in blocks_]
            own = [b for b in methods or blocks if b.first not in marked]
            whole = any(b.first not in marked for b in blocks) and own
            if path.startswith("single_files/") and name.isidentifier() and whole:
                texts = {"".join(file.lines[b.first : b.end]) for b in own}
                found.setdefault(name, []).append((path, algorithm, texts))
    twice = {}
    for name, places in found.items():
        for path, algorithm, texts in places:
            others = [other for other in places if other[0] != path]
            if name not in OWN and any(algorithm == other[1] or texts & other[2] for other in others):
                twice.setdefault(name, []).append(path)
    return twice


def test_no_block_is_repeated_without_a_marker():
    assert unmarked_twice(ROOT) == {}, "put a marker above the copies, or rename the block and say in one line why it differs"


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        (BLOCK, ["scale"]),  # another body under the same name
        (SOURCE, ["FFM", "scale"]),  # the same bodies
        ("# a comment\nclass FFM: ...\n", ["FFM"]),
        ("async def scale(): ...\n", ["scale"]),
        ("# Copied from single_files/source.py:scale\n" + BLOCK, []),
        ("class Args: ...\ndef make_env(): ...\nclass QNetwork: ...\nclass Agent: ...\n", []),
        ("class Network: ...\n", ["Network"]),
        ("class FFM:\n    # Copied from single_files/source.py:FFM.lift\n    def lift(): ...\n", []),
        ("class FFM:\n    # Copied from single_files/source.py:FFM.lift\n    def lift(): ...\n    def own(): ...\n", ["FFM"]),
        ("def other():\n    def scale(): ...\nclass Other:\n    def lift(): ...\n", []),
    ],
)
def test_a_repeated_name_is_found(repository, text, repeated):
    own = "\nclass Args: x = 1\ndef make_env(): return 1\nclass QNetwork: x = 1\nclass Agent: x = 1\nclass Network: x = 1\n"
    elsewhere = {"tests/same.py": "def scale(): ...\n", "single_files/notes.txt": BLOCK}
    root = repository({"single_files/source.py": SOURCE + own, "single_files/variant.py": text, **elsewhere})
    assert sorted(unmarked_twice(root)) == repeated
    assert all(paths == ["single_files/source.py", "single_files/variant.py"] for paths in unmarked_twice(root).values())


def test_two_algorithms_may_differ_under_one_name_but_not_repeat_it(repository):
    other = SOURCE.replace("2 * x", "x").replace("size=2", "size")
    files = {"single_files/source.py": "", "single_files/dqn_a.py": SOURCE, "single_files/ppo_a.py": other}
    assert unmarked_twice(repository(files)) == {}
    repeated = {**files, "single_files/ppo_a.py": SOURCE.replace("2 * x", "x")}
    assert sorted(unmarked_twice(repository(repeated))) == ["FFM"]
