#!/usr/bin/env bash
# The runs behind docs/envpool.md, DQN: bash benchmark/dqn_tbb_lru_atari_envpool.sh; then python benchmark/report.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" single_files/dqn_tbb_lru_atari_envpool.py --seed 1 --total-timesteps 400000 --cnn-channels 16 --train-frequency 64
