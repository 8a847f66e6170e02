#!/usr/bin/env bash
# MiniGrid's memory tasks: docs/ppo_envpool.md. bash benchmark/learn/minigrid.sh
# The short corridors with memory and without, and with another lambda; the long ones for a budget, with the gated LRU, too.
source "$(dirname "$0")/grid.sh"
script="single_files/ppo_tbb_lru_minigrid_envpool.py --eval-episodes 500 --checkpoint-interval 0 --env-kwargs action_max 2"

{
    for task in "S7-v0" "S9-v0 --total-timesteps 800000"; do
        for seed in 1 2 3; do
            echo "lru: $script --seed $seed --env-id MiniGrid-Memory$task"
            echo "memoryless: benchmark/probes/ablate.py memoryless $script --seed $seed --env-id MiniGrid-Memory$task"
        done
    done
    for seed in 4 5 6 7 8; do # under two minutes each: more seeds
        echo "lru: $script --seed $seed --env-id MiniGrid-MemoryS7-v0"
    done
    for seed in 1 2 3 4 5 6 7 8; do # PPO's usual lambda
        echo "lru-lambda-0.95: $script --gae-lambda 0.95 --seed $seed --env-id MiniGrid-MemoryS7-v0"
    done
    echo "lru: $script --seed 1 --total-timesteps 2000000 --env-id MiniGrid-MemoryS17Random-v0"
    for seed in 1 2 3; do
        for task in S11 S13; do
            for memory in glru lru; do
                echo "$memory: ${script/lru/$memory} --seed $seed --total-timesteps 2000000 --env-id MiniGrid-Memory$task-v0"
            done
        done
    done
} | grid minigrid "$@"
