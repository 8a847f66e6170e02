#!/usr/bin/env bash
# The runs behind docs/envpool.md, DQN: bash benchmark/dqn_tbb_lru_atari_envpool.sh; then python benchmark/report.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

script="single_files/dqn_tbb_lru_atari_envpool.py --cnn-channels 16 --train-frequency 64"
"$python" $script --seed 1 --total-timesteps 400000
"$python" $script --seed 2 --total-timesteps 150000 # a shorter look at another seed
