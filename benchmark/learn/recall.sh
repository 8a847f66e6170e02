#!/usr/bin/env bash
# Recall at a distance: POPGym's RepeatPrevious at Medium (32 steps back) and Hard (64), with the gated LRU, LRU and the LSTM.
# bash benchmark/learn/recall.sh
source "$(dirname "$0")/grid.sh"

for arm in "gated LRU:ppo_tbb_glru" "LRU:ppo_tbb_lru" "LSTM:ppo_sbb_lstm"; do
    for seed in 1 2 3 4 5; do
        for task in "Medium-v0 --total-timesteps 300000" "Hard-v0 --total-timesteps 600000"; do
            echo "PPO, ${arm%%:*}: single_files/${arm##*:}.py --seed $seed --gamma 0.5 --env-id popgym-RepeatPrevious$task"
        done
    done
done | grid recall "$@"
