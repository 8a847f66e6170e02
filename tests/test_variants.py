"""Variants equal their parents but for what their headers list; what has one name in several scripts is one text."""

import subprocess
from collections import defaultdict

import pytest
import sync_variants
from conftest import ROOT
from variants import Script, difference, header, variants

SCRIPTS = ROOT / "single_files"
# all others are variants
ORIGINALS = {
    "ad_ed",
    "dqn_tbb_ffm",
    "ppo_tbb_ffm",
    "optim4rl",
    "bpd_tbb_lru_continuous_action",
    *(f"{name}_envpool" for name in ("dqn_tbb_lru_atari", "ppo_tbb_lru_atari", "ppo_tbb_lru_minigrid")),
}
VARIANTS = variants(SCRIPTS)


def test_every_script_but_the_originals_names_its_parent():
    assert {path.stem for path in SCRIPTS.glob("*.py")} - set(VARIANTS) == ORIGINALS


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_its_parent_but_for_what_it_lists(name):
    assert difference(SCRIPTS / f"{name}.py") is None


@pytest.mark.parametrize("name", ["dqn_tbb_lru", "dqn_sbb_s5", "ppo_tbb_linattn", "ppo_tbb_lru_continuous_action"])
@pytest.mark.parametrize(
    "right, planted",
    [
        ("    seed: int = 1 ", "    seed: int = 2 "),  # a default in Args
        ("# the name of this experiment", "# its name"),  # a help text
        ("    # env setup\n", "    # envs\n"),  # a comment
        ("def resettable(operator, identity):", "def resettable(operator, identity=None):"),
        ("optimizer.zero_grad()", "optimizer.zero_grad(True)"),
    ],
)
def test_a_planted_difference_in_a_variant_or_its_parent_is_caught(tmp_path, name, right, planted):
    for changed in (name, VARIANTS[name]):
        for script in (name, VARIANTS[name]):
            text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
            assert text.count(right) == 1
            (tmp_path / f"{script}.py").write_text(text.replace(right, planted) if script == changed else text)
        assert "list it under Changed" in difference(tmp_path / f"{name}.py")


MEMORIES = "FFM LRU StackedLRU GatedLRU StackedGatedLRU MinGRU S5 StackedS5 LinearAttention".split()
SHARED = "resettable associative_scan hippo_n SegmentBuffer Sections CarriedTape EnvPool gae td_target".split() + MEMORIES
# what differs on purpose: DQN's tape holds final observations, PPO's goes on from a state, and frames are bytes
APART = {f"{memory}.forward" for memory in MEMORIES}


def test_what_has_one_name_is_one_text():
    """A method, function or field of these names, wherever it stands; where it differs on purpose, APART says so."""
    texts = defaultdict(lambda: defaultdict(list))
    for path in sorted(SCRIPTS.glob("*.py")):
        script = Script(path)
        for name in script.blocks.keys() - APART:
            whole = not any(other.startswith(f"{name}.") for other in script.blocks)  # a function, a method or a field
            if name.split(".")[0] in SHARED and whole:
                texts[name]["\n".join(*script.text(name))].append(f"{path.name}:{script.blocks[name][0].start + 1}")
    assert len(texts) > 40
    different = {name: list(places.values()) for name, places in texts.items() if len(places) > 1}
    assert not different


def test_the_diff_of_two_memories_is_short():
    files = [SCRIPTS / f"dqn_tbb_{memory}.py" for memory in ("ffm", "lru")]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    assert sum(line[0].isdigit() for line in diff.splitlines()) <= 20


PARENT = '''# docs: parent
"""Parent."""

import os


class Args:
    seed: int = 1  # the seed

    # Memory specific arguments
    size: int = 2  # the size


def helper(x):
    return x  # as it is


class FFM:
    def scan(self):
        return 1


class QNetwork:
    def __init__(self):
        self.memory = FFM()

    def forward(self):
        # one pass
        return self.memory.scan()


if __name__ == "__main__":
    args = Args()
    buffer = [
        args,
    ]
    if buffer:
        other = args
'''
VARIANT = (
    PARENT.replace(
        "# docs: parent\n", "# docs: variant\n# Variant of single_files/parent.py. Changed: Args, LRU (was FFM),\n#   HEAD"
    )
    .replace("HEAD", "QNetwork.__init__, buffer in __main__\n")
    .replace("Parent.", "Variant,\n\nanother docstring.\n")
    .replace("    size: int = 2  # the size\n", "    layers: int = 3  # the layers\n    size: int = 4\n")
    .replace(
        "class FFM:\n    def scan(self):\n        return 1\n",
        "class LRU:\n    def scan(self):\n        return 2\n        # the last word\n",
    )
    .replace("self.memory = FFM()", "self.memory = LRU()")
    .replace("buffer = [\n        args,\n    ]", "buffer = [args]")
)


@pytest.fixture
def pair(tmp_path):
    """A function that writes a parent and a variant and returns how they differ."""

    def write(variant=VARIANT, parent=PARENT):
        (tmp_path / "parent.py").write_text(parent)
        (tmp_path / "variant.py").write_text(variant)
        return difference(tmp_path / "variant.py")

    return write


@pytest.mark.parametrize(
    "right, planted, caught",
    [
        ("return 2\n", "return 3\n", False),  # within what the header lists
        ("size: int = 4", "width: float = 4", False),
        ("import os\n", "import os\nimport re\n", True),
        ("seed: int = 1", "seed: float = 1", True),
        ("# the seed", "# the seed;", True),
        ("return x  # as it is", "return x  # as  it is", True),
        ("# one pass", "# two passes", True),
        ("class QNetwork:", "class QNetwork(object):", True),
        ("    def forward(self):", "    size = 3\n\n    def forward(self):", True),  # between methods
        ("    args = Args()\n", "    args = Args()\n    helper(1)\n", True),
        ("other = args", "other = buffer = args", True),  # assigns something else, too
        ("def helper(x):\n", "def helper(x):\n\n", True),  # a blank line
    ],
)
def test_a_difference_is_caught_unless_it_is_listed(pair, right, planted, caught):
    assert pair() is None and VARIANT.count(right) == 1
    found = pair(VARIANT.replace(right, planted))
    assert (found is not None) == caught
    assert not caught or found.startswith("variant.py:") and "parent.py:" in found


def test_a_change_of_the_parent_alone_is_caught(pair):
    assert "parent.py:" in pair(parent=PARENT.replace("# one pass", "# two passes"))


@pytest.mark.parametrize(
    "right, planted, message",
    [
        ("QNetwork.__init__, ", "", "self.memory = LRU()"),
        ("buffer in __main__", "args in __main__", "args in __main__ is listed as changed and is as in parent.py"),
        ("buffer in __main__", "nothing in __main__", "it has no nothing in __main__"),
        ("LRU (was FFM)", "LRU", "FFM"),
        ("LRU (was FFM)", "LRU (was GRU)", "expected GRU in parent.py and not here"),
        ("parent.py. Changed", "none.py. Changed", "no such parent: none.py"),
    ],
)
def test_a_wrong_header_is_caught(pair, right, planted, message):
    assert message in pair(VARIANT.replace(right, planted, 1))


def test_a_header_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "variant.py").write_text(VARIANT.replace("LRU (was FFM)", "LRU (FFM)"))
    with pytest.raises(ValueError, match="what does 'LRU .FFM.' mean"):
        header(tmp_path / "variant.py")


@pytest.fixture
def repository(tmp_path):
    """A parent, its variant and the variant's variant, committed."""
    folder = tmp_path / "single_files"
    folder.mkdir()
    (folder / "parent.py").write_text(PARENT)
    (folder / "variant.py").write_text(VARIANT)
    second = VARIANT.replace(
        "# Variant of single_files/parent.py. Changed: Args, LRU (was FFM),\n#   ",
        "# Variant of single_files/variant.py. Changed: ",
    )
    second = second.replace("Changed: QNetwork.__init__, buffer in __main__", "Changed: helper").replace(
        "return x  # as it is", "return -x"
    )
    (folder / "a_second.py").write_text(second)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "scripts"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return folder


def test_a_change_of_a_parent_is_carried_to_its_variants_and_theirs(repository, capsys):
    changed = PARENT.replace("# one pass", "# one pass over\n        # the tape").replace("seed: int = 1", "seed: int = 7")
    (repository / "parent.py").write_text(changed)
    for _ in range(2):  # the second time finds nothing to do
        assert sync_variants.main(["--root", str(repository.parent)]) == 0
        for name in ("variant", "a_second"):
            text = (repository / f"{name}.py").read_text()
            assert text.count("# the tape") == 1 and "seed: int = 7" in text and "LRU()" in text


def test_a_change_next_to_what_a_variant_changed_is_left_to_its_author(repository, capsys):
    (repository / "parent.py").write_text(PARENT.replace("return 1", "return 5"))
    assert sync_variants.main(["--root", str(repository.parent)]) == 1
    assert "variant.py: merged with parent.py, 1 conflicts" in capsys.readouterr().out
    text = (repository / "variant.py").read_text()
    assert "<<<<<<<" in text and "<<<<<<<" not in (repository / "a_second.py").read_text()
