"""mkdocs.yml shows every page, pages read alike on the site and in the repository, and the workflow runs .ci/run."""

import re

from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = {
    "README.md": "README.md",
    "benchmark/README.md": "commands.md",
    "docs/index.md": "pages.md",
}  # site_links.py


def test_the_navigation_has_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = re.findall(r"(?m)^ +- .+: (\S+\.md)$", text)
    paths = [path.relative_to(ROOT).as_posix() for path in PAGES] + ["README.md", "benchmark/README.md"]
    assert sorted(shown) == sorted(ELSEWHERE.get(path, path.removeprefix("docs/")) for path in paths)


def test_the_index_links_to_every_page():
    links = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert links == {path.name for path in PAGES} - {"index.md"}


def test_a_blank_line_stands_before_every_list():
    """Else it is a list in the repository, and one long line on the site."""
    for page in (*PAGES, ROOT / "README.md", ROOT / "benchmark" / "README.md"):
        text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
        assert not re.findall(r"(?m)^(?![-*] |\d+\. )\S.*\n(?=[-*] |\d+\. )", text), page.name


def test_the_workflow_runs_what_ci_runs_on_every_python_of_pyproject():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (versions,) = re.findall(r"python: \[(.*)\]", workflow)
    first = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert [int(version) for version in re.findall(r'"3\.(\d+)"', versions)] == list(range(int(first), 15))
    assert re.search(r"(?m)^ +- run: \.ci/run$", workflow)
    assert "mkdocs build -q --strict" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
