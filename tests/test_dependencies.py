"""A copied script brings its dependencies along: `uv run dqn_tbb_ffm.py` and `pipx run ./dqn_tbb_ffm.py` install them."""

import ast
import re
import sys

import pytest
from conftest import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

BLOCK = re.compile(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)^# ///$")  # PEP 723
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ON_USE = {"wandb", "cleanrl_memoroid"}  # --track asks for the one; the other is optional and only makes a script faster


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0]


def imported(text):
    """The packages that a script imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(text)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    tensorboard = {"tensorboard"} if "torch.utils.tensorboard" in modules else set()
    return ({module.split(".")[0] for module in modules} | tensorboard) - set(sys.stdlib_module_names) - ON_USE


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "single_files").glob("*.py")))
def test_a_script_names_what_it_imports_as_pyproject_does(script):
    text = (ROOT / "single_files" / f"{script}.py").read_text(encoding="utf-8")
    (block,) = BLOCK.findall(text)
    block, used = tomllib.loads(re.sub(r"(?m)^# ?", "", block)), imported(text)
    known = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["envpool"]
    assert {name_of(requirement) for requirement in known} >= used
    envpool = next(other for other in PROJECT["optional-dependencies"]["test"] if name_of(other) == "envpool")
    python = re.search(r"python_version >= '([\d.]+)'", envpool)[1]  # envpool needs a later one
    assert block == {
        "requires-python": f">={python}" if "envpool" in used else PROJECT["requires-python"],
        "dependencies": [requirement for requirement in known if name_of(requirement) in used],
    }
