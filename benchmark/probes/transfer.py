"""Learned optimisers on tasks that they have not seen, weights frozen, at several step sizes, beside Adam at several rates.

    python benchmark/probes/transfer.py runs/grids/optim4rl/*/runs/*     # finished runs of optim4rl.py and optim4rl_lru.py

Writes benchmark/results/optim4rl/transfer.csv: the mean return of fresh agents in their last 20 updates of 200, for each run,
task and factor of the step size that it was trained with; for Adam, with and without momentum, at each of six rates.
"""

import argparse
import csv
import importlib.util
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
FACTORS, RATES = (0.1, 0.3, 1.0, 3.0), (1e-3, 3e-3, 1e-2, 3e-2, 5e-2, 1e-1)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "single_files" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a model.pt")
    parser.add_argument("--tasks", nargs="*", default=["grid", "cartpole"], help="environments of optim4rl.py")
    parser.add_argument("--agents", type=int, default=6, help="fresh agents of each test")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "optim4rl", help="folder of transfer.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, seed = [], 10**8

    def add(optimiser, run, task, step_size, returns):
        row = {"optimiser": optimiser, "run": run, "task": task, "step_size": f"{step_size:g}"}
        rows.append(row | {"return": f"{returns[-20:].mean().item():.4f}", "auc": f"{returns.mean().item():.4f}"})

    known = load_script("optim4rl")
    known.RATES = RATES
    for task in args.tasks:
        for name in ("Adam", "Adam, beta1 = 0"):
            returns = known.test_baseline(name, task, args.agents, known.Args(), seed)
            for rate, found in zip(RATES, returns.unbind(1)):
                add(name, "", task, rate, found)
    for folder in tqdm([path for path in args.runs if (path / "model.pt").exists()]):
        saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        script = load_script(saved["script"].removesuffix(".py"))
        flags = script.Args(**saved["args"])
        cell = script.make_cell(flags)
        cell.load_state_dict(saved["cell"])
        for task in args.tasks:
            for factor in FACTORS:
                returns = script.test_cell(cell, task, args.agents, flags, seed, alpha=factor * flags.alpha)
                add(flags.exp_name, f"{folder.parts[-3] if len(folder.parts) > 2 else folder.name}", task, factor, returns)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "transfer.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out / 'transfer.csv'}, {len(rows)} rows")


if __name__ == "__main__":
    main()
