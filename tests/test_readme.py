"""What README.md and docs/ tell a reader to type exists, and the Python they show runs."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language):
    return [(page.name, code) for page in PAGES for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def test_ci_runs_the_very_test_command_of_the_readme():
    (command,) = (code.strip() for name, code in blocks("bash") if name == "README.md" and "pytest" in code)
    assert command.replace("pip install -e", "pip install -q -e") in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = page.parent / name
            assert path.exists(), target
            headings = re.findall(r"(?m)^#+ (.+)$", path.read_text()) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target
    for path in re.findall(r"\b(?:single_files|benchmark|tests|cleanrl_memoroid)/[\w/-]+\.\w+", page.read_text()):
        assert (ROOT / path).exists(), path


def test_commands_use_flags_that_the_scripts_have():
    """Every `python some/script.py --flag` in the pages and in benchmark/learn/*.sh."""
    texts = [code for _, code in blocks("bash")] + [path.read_text() for path in (ROOT / "benchmark" / "learn").glob("*.sh")]
    used = {}
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        line = re.sub(r"benchmark/probes/ablate\.py [\w= ]*", "", line)  # the flags are the other script's
        for found in re.findall(r"((?:single_files|benchmark/\w+)/\w+\.py|my_agent\.py)", line)[
            :1
        ]:  # others are its arguments
            script = found.replace("my_agent.py", "single_files/dqn_tbb_ffm.py")
            flags = line.split("#")[0].partition(found)[2]  # those before it are torchrun's
            used.setdefault(script, set()).update(re.findall(r"\s--([a-z-]+)", flags))
    assert "resume" in used["single_files/dqn_tbb_ffm.py"]
    for script, flags in used.items():
        shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        for flag in flags:
            assert f"--{flag}" in shown.stdout, f"{script} --{flag}"


@pytest.mark.parametrize("name, code", blocks("python"))
def test_python_of_the_pages_runs(tmp_path, name, code):
    """In a folder with the scripts that the page says to copy there, and no others."""
    page = "".join(page.read_text() for page in PAGES if page.name == name)
    for script in re.findall(r"`cp (single_files/\w+\.py) ", page):
        shutil.copy(ROOT / script, tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_report_reproduces_the_pages(tmp_path):
    """The tables of README.md and docs/ are what benchmark/tools/report.py writes from the committed CSV files."""
    for part in ("docs", "benchmark/results"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "README.md", tmp_path)
    for page in PAGES:  # the copy starts with empty tables
        text = re.sub(r"(<!-- results: [\w/-]+ -->\n).*?(?=<!-- end)", r"\1", page.read_text(), flags=re.DOTALL)
        (tmp_path / page.relative_to(ROOT)).write_text(text)
    report = [sys.executable, ROOT / "benchmark" / "tools" / "report.py", "--runs", "", "--no-pictures", "--root", tmp_path]
    subprocess.run(report, check=True)
    for page in PAGES:
        assert page.read_text() == (tmp_path / page.relative_to(ROOT)).read_text(), page.name
