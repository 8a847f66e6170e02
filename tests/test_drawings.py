"""The drawings of README.md and docs/idea.md: they are what benchmark/tools/drawings.py draws, and a person can read them."""

import re
import sys
from itertools import combinations

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark" / "tools"))
import drawings  # noqa: E402

NAMES = ["merge", "scan", "reset", "tape", "carried", "which_file", "competitors", "board"]


@pytest.fixture(scope="module")
def drawn():
    return drawings.draw(ROOT / "benchmark" / "results")


def test_every_drawing_is_drawn_and_no_other_lies_there(drawn):
    assert list(drawn) == NAMES
    assert {path.name for path in (ROOT / "docs" / "drawings").iterdir()} == {f"{name}.svg" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_drawing_is_the_one_that_the_script_draws(drawn, name):
    assert (ROOT / "docs" / "drawings" / f"{name}.svg").read_text() == drawn[name].svg()


@pytest.mark.parametrize("name", NAMES)
def test_texts_stay_inside_and_apart_and_are_large_enough(drawn, name):
    width, height = (drawn[name].size[side] for side in ("width", "height"))
    for left, top, right, bottom, words in drawn[name].texts:
        assert 8 <= left and right <= width - 8 and 8 <= top and bottom <= height - 8, words
        assert bottom - top >= 13, words
    for one, other in combinations(drawn[name].texts, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{one[4]} lies on {other[4]}"


def test_a_drawing_has_a_background_of_its_own(drawn):
    """So that dark ink can be read on a dark page."""
    for drawing in drawn.values():
        assert re.search(r'<rect x="1" y="1" [^>]*fill="#ffffff"', drawing.svg())


def test_the_files_that_the_last_drawing_names_exist():
    assert [answer for _, answer in drawings.CHOICES if not (ROOT / "single_files" / answer).exists()] == []


def test_no_equation_stands_before_the_fifth_drawing():
    page = (ROOT / "docs" / "idea.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(drawings/(\w+)\.svg\)", page)
    assert shown == NAMES[:6]
    assert not re.search(r"[=•∘∂Σ]", page[: page.index("drawings/carried.svg")])
