"""What the pages promise their readers: short pages, narrow tables, numbers of three digits, and links that lead somewhere."""

import re
from collections import Counter

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINES, README_LINES, COLUMNS, DIGITS = 150, 90, 6, 3

# Years may have four digits, and so may whole numbers in a column whose head says what is counted.
YEAR, COUNTED = re.compile(r"(?:19|20)\d\d"), re.compile(r"\b(?:steps|rows|updates|seeds?|parameters|weights|bytes)\b")


def tables(text):
    """[(head, rows)] of the tables of a page, each row a list of cells; what stands in code blocks is no table."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    found = []
    for block in re.findall(r"(?m)(?:^\|.*\|$\n?)+", text):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        if len(lines) > 1 and set("".join(lines[1])) <= set("-: "):
            found.append((lines[0], lines[2:]))
    return found


def numbers(cell):
    """The numbers that a cell shows: not those in code, in a link's address or in a name such as v0 or Zen3."""
    cell = re.sub(r"`[^`]*`|\]\([^)]*\)|\{[^}]*\}", " ", cell)
    return re.findall(r"(?<![\w.,/:])((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?:e[-+]?\d+)?(?![\w/:]|[.,]\d)", cell)


def digits(number):
    """How many digits say something: 0.0677 has three, and so has 12,300."""
    whole, _, part = number.replace(",", "").partition(".")
    shown = (whole + part).lstrip("0")
    return len(shown) if part else len(shown.rstrip("0"))


def too_exact(text):
    """[(head, number)] of the numbers with too many digits."""

    def allowed(head, number):
        return YEAR.fullmatch(number) or "." not in number and COUNTED.search(head)

    cells = [(name, cell) for head, rows in tables(text) for row in rows for name, cell in zip(head, row)]
    shown = [(name, number) for name, cell in cells for number in numbers(cell)]
    return [(name, number) for name, number in shown if digits(number) > DIGITS and not allowed(name, number)]


def limit(name):
    return README_LINES if name == "README.md" else LINES


@pytest.mark.parametrize("name", NAMES)
def test_page_is_short_and_its_tables_are_small(name):
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= limit(name)
    for head, rows in tables(text):
        assert len(head) <= COLUMNS, head
        assert all(len(row) == len(head) for row in rows), head
    assert not too_exact(text)


def test_what_counts_as_a_digit():
    page = "| arm | seconds | steps | id |\n| --- | --- | --- | --- |\n| a | 1.234 ± 0.0123 | 123,456 | `0.12345` A-v0 |\n"
    assert tables(page) == [(["arm", "seconds", "steps", "id"], [["a", "1.234 ± 0.0123", "123,456", "`0.12345` A-v0"]])]
    assert too_exact(page) == [("seconds", "1.234")]
    assert too_exact(page.replace("steps", "points")) == [("seconds", "1.234"), ("points", "123,456")]
    assert [digits(n) for n in ("12,000", "0.0677", "1.00", "9.999", "0", "2024")] == [2, 3, 3, 4, 0, 4]
    assert numbers("in 2024, of -1.5e-3 and 1,024 rows, [one](/a/1234) of `5678`") == ["2024", "1.5", "1,024"]
    assert tables("```\n| a |\n| --- |\n| 1.2345 |\n```\n") == []


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them: a heading that comes again gets a number."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    seen, found = Counter(), set()
    for heading in re.findall(r"(?m)^#+ (.+)$", text):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`\n]*`", "", page.read_text())
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert ROOT in linked.resolve().parents, f"{target} leads out of the repository"
            assert not anchor or anchor in anchors(linked.read_text()), target
