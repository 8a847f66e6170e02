#!/usr/bin/env bash
# The runs behind docs/ppo_envpool.md, Atari: bash benchmark/ppo_tbb_lru_atari_envpool.sh; then python benchmark/report.py.
# A short prefix, as each of its rows costs a pass through the convolution. About an hour and a half on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" single_files/ppo_tbb_lru_atari_envpool.py --seed 1 --total-timesteps 1000000 --max-prefix 16 --checkpoint-interval 100000
for seed in 2 3; do
    "$python" single_files/ppo_tbb_lru_atari_envpool.py --seed "$seed" --total-timesteps 250000 --max-prefix 16 --checkpoint-interval 0
done
