#!/usr/bin/env bash
# Recall at a distance: POPGym's RepeatPrevious at Medium (32 steps back) and Hard (64), by PPO with the gated LRU, LRU and the LSTM,
# and by DQN; then RepeatFirst, whose episodes have 415 steps at Medium and 831 at Hard: bash benchmark/learn/recall.sh
source "$(dirname "$0")/grid.sh"
dqn="--batch-size 1000 --train-frequency 32 --tau 0.05 --buffer-size 300000"

{
    for arm in "gated LRU:ppo_tbb_glru" "LRU:ppo_tbb_lru" "LSTM:ppo_sbb_lstm"; do
        for seed in 1 2 3 4 5; do
            for task in "Medium-v0 --total-timesteps 300000" "Hard-v0 --total-timesteps 600000"; do
                echo "PPO, ${arm%%:*}: single_files/${arm##*:}.py --seed $seed --gamma 0.5 --env-id popgym-RepeatPrevious$task"
            done
        done
    done
    for seed in 1 2 3 4 5; do
        for task in FirstMedium FirstHard; do
            echo "PPO, gated LRU: single_files/ppo_tbb_glru.py --seed $seed --gamma 0.5 --num-steps 128" \
                "--env-id popgym-Repeat$task-v0 --total-timesteps 1200000"
        done
        for task in "Medium-v0 --total-timesteps 300000" "Hard-v0 --total-timesteps 600000"; do
            echo "DQN, gated LRU: single_files/dqn_tbb_glru.py --seed $seed --gamma 0.5 --env-id popgym-RepeatPrevious$task $dqn"
        done
    done
} | grid recall "$@"
