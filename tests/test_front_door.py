"""What the first pages say about this project is so: sizes, files, flags, seconds; and no page is missing from the list."""

import csv
import re
from dataclasses import fields

from conftest import ROOT, load_script

README, DOCS = (ROOT / "README.md").read_text(), ROOT / "docs"
LINK = re.compile(r"\]\(([\w./-]+?)(?:#[\w-]*)?\)")


def section(name):
    return README.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]


def test_the_readme_is_short_and_says_how_long_a_file_is():
    assert len(README.splitlines()) <= 90
    said = int(re.search(r"one Python file of about (\d+) lines", README)[1])
    for script in ("dqn_tbb_ffm", "ppo_tbb_ffm"):
        assert abs(len((ROOT / "single_files" / f"{script}.py").read_text().splitlines()) - said) <= 100, script


def test_the_readme_links_every_script_and_shows_three_drawings():
    linked = {path.removeprefix("single_files/") for path in LINK.findall(section("Scripts"))}
    assert {path.name for path in (ROOT / "single_files").glob("*.py")} <= linked
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert shown == [f"docs/drawings/{name}.svg" for name in ("board", "competitors", "tape")]


def test_the_index_names_every_page_once():
    named = LINK.findall((DOCS / "index.md").read_text())
    pages = {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    assert sorted(name for name in named if "/" not in name) == sorted(pages)


def test_seconds_of_the_readme_are_those_of_the_race():
    with open(ROOT / "benchmark" / "results" / "race" / "runs.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["env_id"] == "popgym-RepeatPreviousEasy-v0"]
    (line,) = (line for line in README.splitlines() if line.startswith("| [seconds to recall"))
    cells = line.split(" | ")
    for arms, cell in ((("ppo_tbb_lru", "dqn_tbb_lru"), cells[1]), (("sb3_recurrent_ppo",), cells[3])):
        seconds = [float(row["seconds_to_goal"]) for row in rows if row["arm"] in arms]
        assert cell == f"{min(seconds):.0f} to {max(seconds):.0f}" and len(seconds) == 3 * len(arms)


def test_flags_that_the_pages_advise_exist():
    """Those of docs/tuning.md and docs/your_own.md that stand in the text: other tests try what stands in blocks."""
    known = {"resume", "evaluate", "help"}
    for script in ("dqn_tbb_ffm", "ppo_tbb_lru"):
        for field in fields(load_script(script).Args):
            known |= {field.name.replace("_", "-"), "no-" + field.name.replace("_", "-")}
    for page in ("tuning", "your_own"):
        used = set(re.findall(r"`--([a-z-]+)", (DOCS / f"{page}.md").read_text()))
        assert used and used <= known, used - known


def test_comparisons_have_sources():
    """Each program in the table has a link to what was read."""
    rows = [line.strip("| ").split(" | ") for line in section("Beside others").splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows[1:]} == {6}
    assert all(any("](http" in row[column] for row in rows[1:]) for column in (2, 3, 4, 5))
