"""Runs a PPO script with a memory that forgets before every step: the same network, weights and flags, without memory.

    python benchmark/memoryless.py single_files/ppo_tbb_lru_continuous_action.py --seed 1

What follows the script's path are the script's own flags: --seed, --exp-name and so on. What memory buys on a task is the
distance between the two. Every begin that the memory sees is set, in rollouts, on the tape and in evaluations: each row is an
episode of its own. Nothing else changes.
"""

import runpy
import sys
import tempfile
from pathlib import Path

CHANGES = {
    "self.memory(self.encoder(obs), begins,": "self.memory(self.encoder(obs), torch.ones_like(begins),",
    "self.memory.step(self.encoder(obs), begins,": "self.memory.step(self.encoder(obs), torch.ones_like(begins),",
}

if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit()
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"{__doc__}\nexpected a PPO script of single_files/ first, got {' '.join(sys.argv[1:]) or 'nothing'}")
    script = Path(sys.argv[1])
    text = script.read_text()
    for old, new in CHANGES.items():
        if text.count(old) != 1:
            sys.exit(f"{script}: expected one line with `{old}`, found {text.count(old)}; adapt CHANGES in {__file__}")
        text = text.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, script.name)
        path.write_text(text)
        sys.argv = [str(path), *sys.argv[2:]]
        runpy.run_path(str(path), run_name="__main__")
