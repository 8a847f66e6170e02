#!/usr/bin/env bash
# The runs behind docs/dqn.md: bash benchmark/dqn_tbb_ffm.sh; then python benchmark/report.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

for seed in 1 2 3 4 5; do
    "$python" single_files/dqn_tbb_ffm.py --seed "$seed"
done

for seed in 1 2 3; do
    "$python" single_files/dqn_tbb_ffm.py --seed "$seed" --env-id popgym-PositionOnlyCartPoleEasy-v0 --total-timesteps 400000 \
        --buffer-size 400000 --exploration-fraction 0.1 --learning-rate 3e-4 --batch-size 2000 --train-frequency 64 --tau 0.03
done

# The settings of Morad et al. (2024), as in their experiments' files, for RepeatFirstEasy: 5,000 random episodes of 51 steps, then
# 5,000 episodes with one update each. Add `paper` to run it; it takes about an hour.
if [ "${1:-}" = paper ]; then
    "$python" single_files/dqn_tbb_ffm.py --exp-name dqn_tbb_ffm_paper --no-prev-action --num-envs 1 --total-timesteps 510000 \
        --learning-starts 255000 --train-frequency 51 --batch-size 1000 --buffer-size 4000000 --hidden-size 256 --trace-size 64 \
        --context-size 4 --learning-rate 1e-4 --no-anneal-lr --lr-warmup 200 --max-grad-norm 0.01 --tau 0.005 --gamma 0.99 \
        --start-e 0.2 --end-e 0.01 --exploration-fraction 0.5
fi
