"""Several processes of one script, under torchrun, and copies of scripts that leave what a test wants to see."""

import os
import subprocess
import sys

from scripts import HELPERS, ROOT


def spied(folder, script, who, update=1):
    """A copy that takes the likeliest actions, and leaves the gradients of update number `update` and what it has at the end.

    who: in the names of the files, "{rank}" for the number of the process.
    """
    text = (ROOT / "single_files" / f"{script}.py").read_text()
    gradient = "                grad_norm = nn.utils"
    saved = f'torch.save([p.grad for p in agent.parameters() if p.grad is not None], f"gradient_{who}_{{len(clipfracs)}}.pt")'
    for old, new in {
        "(policy + noise[step]).argmax(-1)": "policy.argmax(-1)",
        gradient: f"                if global_step == {update} * batch_size:\n                    {saved}\n{gradient}",
        "    bar.close()\n": f'    torch.save([agent.state_dict(), obs, rng.random()], f"last_{who}.pt")\n    bar.close()\n',
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"{script}.py"
    path.write_text(text)
    return path


def torchrun(folder, script, *flags, processes=2, paths=(HELPERS,)):
    """Starts them in a session of their own, so that a test can kill them all. `paths`: where they find modules first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, script, *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(list(map(str, command)), cwd=folder, env=env, **pipes)


def finish(process):
    """What it printed; with its errors, should it have failed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out
