"""benchmark/probes/reset_audit.py: a planted mistake is found, the scripts pass, and the page's reproductions run."""

import importlib.metadata
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark" / "probes"))
import reset_audit  # noqa: E402
from ablate import ablated  # noqa: E402

PAGE = (ROOT / "docs" / "reset_reproductions.md").read_text()
BLOCKS = [(code.split("\n")[0].removeprefix("# "), code) for code in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)]


@pytest.mark.parametrize("moved, reset", [(0, "0"), (-1, "-1"), (1, "1"), (None, "none")])
def test_a_reset_in_the_wrong_row_is_found(moved, reset):
    """The same network on the same rows, with the begins moved."""
    script, spaces = reset_audit.script_and_spaces("dqn_tbb_lru")
    network = reset_audit.shake(script.QNetwork(spaces, script.Args(hidden_size=16)))
    obs, begins = reset_audit.rollout()
    begins = np.zeros_like(begins) if moved is None else np.roll(begins, moved)
    found = reset_audit.audit(lambda obs: network(obs, torch.from_numpy(begins[: len(obs)])), obs)
    assert (found["reset"], found["remembers"]) == (reset, "yes")
    assert {found["value"], found["gradient"]} == {"no" if moved == 0 else "yes"}


@pytest.mark.parametrize(
    "subject, name", [("ours_dqn", "dqn_tbb_ffm"), ("ours_dqn", "dqn_sbb_s5"), ("ours_ppo", "ppo_tbb_mingru")]
)
def test_nothing_passes_in_the_scripts(subject, name):
    """One of each kind; the program looks at all of them."""
    found = reset_audit.audit(*getattr(reset_audit, subject)(name))
    assert [found[key] for key in ("value", "gradient", "reset", "remembers")] == ["no", "no", "0", "yes"]


@pytest.mark.parametrize("change, reset", [("reset_early", "-1"), ("reset_late", "1")])
def test_a_moved_reset_is_moved_by_one_row(change, reset, tmp_path):
    """What `ablate.py` does to a script of PPO, seen by the audit."""
    text = ablated((ROOT / "single_files" / "ppo_tbb_mingru.py").read_text(), change)
    path = tmp_path / "moved.py"
    path.write_text(text.replace('__name__ == "__main__"', "False").replace("__name__ == '__main__'", "False"))
    script = reset_audit.load_script(path)
    _, spaces = reset_audit.script_and_spaces("ppo_tbb_mingru")
    agent = reset_audit.shake(script.Agent(spaces, script.Args(hidden_size=16)))
    obs, begins = reset_audit.rollout()
    tape = script.CarriedTape(np.zeros((1, 1, reset_audit.WIDTH), np.float32), agent.memory.initial_state(1))
    tape.add(obs[:, None], begins[:, None])
    sections = script.moved(tape.sections([0], len(obs)), np.zeros(1, bool), {"reset_early": -1, "reset_late": 1}[change])
    pad = int(sections.starts[0])

    def outputs(obs):
        rows = torch.cat([sections.obs[:pad], obs, sections.obs[pad + len(obs) :]])
        return agent(sections._replace(obs=rows))[1][: len(obs), None]

    assert reset_audit.audit(outputs, obs)["reset"] == reset


def test_where_done_of_the_step_before_falls():
    rows = {(row["library"], row["mode"].split(",")[0]): row["reset"] for row in reset_audit.autoreset()}
    assert rows["gymnasium", "same step"] == "0" and rows["gymnasium", "next step"] == "-1"
    if reset_audit.installed("envpool"):
        assert rows["envpool", "next step"] == "-1" and rows["envpool", "inside this project's EnvPool class"] == "0"


@pytest.mark.parametrize("library, code", BLOCKS, ids=[library for library, _ in BLOCKS])
def test_the_pages_reproductions_run(library, code):
    try:
        importlib.metadata.version("sb3_contrib" if library == "sb3-contrib" else library)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    exec(compile(code, "docs/reset_reproductions.md", "exec"), {})
