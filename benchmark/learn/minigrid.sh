#!/usr/bin/env bash
# MiniGrid's memory tasks: bash benchmark/minigrid.sh; then python benchmark/report.py; docs/ppo_envpool.md has the results.
# The short corridors with memory and without, and with another lambda; the long ones once, for a budget. 25 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
script="single_files/ppo_tbb_lru_minigrid_envpool.py"
flags="--eval-episodes 500 --checkpoint-interval 0"

{ # seeds innermost: a run's folder is named by its seed and the second of its start
    for task in "S7-v0" "S9-v0 --total-timesteps 800000"; do
        for arm in "$script $flags --exp-name minigrid.lru" "benchmark/memoryless.py $script $flags --exp-name minigrid.memoryless"; do
            for seed in 1 2 3; do
                echo "$arm --seed $seed --env-id MiniGrid-Memory$task"
            done
        done
    done
    for seed in 4 5 6 7 8; do # under two minutes each: more seeds
        echo "$script $flags --exp-name minigrid.lru --seed $seed --env-id MiniGrid-MemoryS7-v0"
    done
    for seed in 1 2 3 4 5 6 7 8; do # PPO's usual lambda
        echo "$script $flags --exp-name minigrid.lru-lambda-0.95 --gae-lambda 0.95 --seed $seed --env-id MiniGrid-MemoryS7-v0"
    done
    for task in S13 S17Random; do
        echo "$script $flags --exp-name minigrid.lru --total-timesteps 2000000 --env-id MiniGrid-Memory$task-v0"
    done
} | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 "$python"
