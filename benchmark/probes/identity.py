"""How well a network copies gradients that it sees processed, for each processing and seed: the experiment of `--identity`.

    python benchmark/probes/identity.py          # 25 networks of about ten seconds each

Writes benchmark/results/optim4rl/identity.csv after every network. What it holds is not measured again.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark" / "tools"), str(Path(__file__).resolve().parent)]
from tables import read_rows, write_rows  # noqa: E402
from transfer import load_script  # noqa: E402

KINDS = "none", "scaled", "signlog", "l2l", "asinh"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="seeds of network and gradients")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "optim4rl", help="folder of identity.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    script, path = load_script("optim4rl"), args.out / "identity.csv"
    rows = read_rows(path)[0] if path.exists() else []
    measured = {(row["kind"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        for kind in KINDS:
            if (kind, seed) not in measured:
                share = script.identity(script.Args(), kind, seed)
                rows.append({"kind": kind, "seed": seed, "share_within_10_percent": f"{share:.4f}"})
                write_rows(path, rows)


if __name__ == "__main__":
    main()
