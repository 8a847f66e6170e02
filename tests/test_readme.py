"""What README.md and docs/ tell a reader to type exists, and the Python they show runs."""

import re
import shutil
import subprocess
import sys
from unittest import mock

import gymnasium as gym
import pytest
from scripts import ROOT, run

PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language):
    return [(page.name, code) for page in PAGES for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def test_ci_runs_the_very_test_command_of_the_readme():
    (command,) = (code.strip() for name, code in blocks("bash") if name == "README.md" and "pytest" in code)
    assert command.replace("pip install -e", "pip install -q -e") in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(r"\b(?:single_files|benchmark|tests|cleanrl_memoroid)/[\w/-]+\.\w+", page.read_text()):
        assert (ROOT / path).exists(), path


def test_commands_use_flags_that_the_scripts_have(tmp_path, monkeypatch):
    """Every `python some/script.py --flag` in the pages and in benchmark/learn/*.sh."""
    texts = [code for _, code in blocks("bash")] + [path.read_text() for path in (ROOT / "benchmark" / "learn").glob("*.sh")]
    used = {}
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        line = re.sub(r"benchmark/probes/ablate\.py (?:[\w=]+ )+", "", line)  # the flags are the other script's
        scripts = re.findall(r"((?:single_files|benchmark/\w+)/\w+\.py|my_agent\.py)", line)
        if scripts:  # others are its arguments
            script = scripts[0].replace("my_agent.py", "single_files/dqn_tbb_ffm.py")
            flags = line.split("#")[0].partition(scripts[0])[2]  # those before it are torchrun's
            used.setdefault(script, set()).update(re.findall(r"\s--([a-z-]+)", flags))
    assert "resume" in used["single_files/dqn_tbb_ffm.py"]
    for script, flags in used.items():
        monkeypatch.syspath_prepend((ROOT / script).parent)  # as `python some/script.py` does
        shown = run(tmp_path, "--help", script=ROOT / script)
        assert shown, script
        for flag in flags:
            assert f"--{flag}" in shown, f"{script} --{flag}"


@pytest.mark.parametrize("name, code", blocks("python"))
def test_python_of_the_pages_runs(tmp_path, monkeypatch, name, code):
    """In a folder with the scripts that the page says to copy there, and no others."""
    page = "".join(page.read_text() for page in PAGES if page.name == name)
    for script in re.findall(r"`cp (single_files/\w+\.py) ", page):
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(gym.registry):  # forgets the environments that the page registers
        run(tmp_path, script=tmp_path / "page.py")


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
