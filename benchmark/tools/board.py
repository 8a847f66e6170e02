"""The cells of POPGym's board (benchmark/learn/popgym_board.sh): ours beside what was published. For tables and pictures."""

import numpy as np
from tables import final_return, grouped

LEVELS = "Easy", "Medium", "Hard"
MAIN_ARMS = "PPO, gated LRU", "DQN, FFM"  # of the board, which other arms stand beside


def board_cells(rows, curve, published):
    """[{task, level, arm: (greedy returns, best of training), "gru", "best", "ours"}] of the board, a row per environment.

    Best of training: the largest mean return over a fortieth of the steps, of any seed. Ours: of the arm with the best mean
    greedy return; None while no run has ended.
    """
    best = {
        key: max(float(p["episodic_return"]) for p in points) for key, points in grouped(curve, lambda p: p["key"]).items()
    }
    theirs, cells = {row["env_id"]: row for row in published}, []
    for env_id, members in grouped(rows, lambda row: row["env_id"]).items():
        level = next(level for level in LEVELS if f"{level}-v" in env_id)
        cell = {"task": env_id.removeprefix("popgym-").split(":")[-1].split(level)[0], "level": level, "arms": {}}
        for arm, runs in grouped(members, lambda row: row["arm"]).items():
            done = sorted((row for row in runs if row["state"] == "done"), key=lambda row: int(row["seed"]))
            if done:
                cell["arms"][arm] = [final_return(row) for row in done], max(best.get(row["key"], np.nan) for row in done)
        means = [np.mean(greedy) for greedy, _ in cell["arms"].values()]
        cell |= {name: theirs.get(env_id, {}).get(name, "") for name in ("gru", "best", "best_memory")}
        cells.append(cell | {"ours": max(means, default=None)})
    return sorted(cells, key=lambda cell: (cell["task"], LEVELS.index(cell["level"])))
