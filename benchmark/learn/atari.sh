#!/usr/bin/env bash
# Pong from single frames, DQN and PPO: docs/envpool.md and docs/ppo_envpool.md. bash benchmark/learn/atari.sh
# A run for its budget, and shorter looks at other seeds. Hours on one core.
WORKERS=${WORKERS:-1}
source "$(dirname "$0")/grid.sh"

{
    script="single_files/dqn_tbb_lru_atari_envpool.py --env-id Pong-v5 --cnn-channels 16 --train-frequency 64"
    echo "long: $script --seed 1 --total-timesteps 400000"
    echo "short: $script --seed 2 --total-timesteps 150000"
} | grid dqn_tbb_lru_atari_envpool "$@"

{ # a short prefix, as each of its rows costs a pass through the convolution
    script="single_files/ppo_tbb_lru_atari_envpool.py --env-id Pong-v5 --max-prefix 16"
    echo "long: $script --seed 1 --total-timesteps 1000000 --checkpoint-interval 100000"
    printf '%s\n' "short: $script --total-timesteps 250000 --checkpoint-interval 0 --seed "{2,3}
} | grid ppo_tbb_lru_atari_envpool "$@"
