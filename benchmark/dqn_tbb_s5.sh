#!/usr/bin/env bash
# The runs behind docs/s5.md: bash benchmark/dqn_tbb_s5.sh; then python benchmark/report.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
previous="--env-id popgym-RepeatPreviousEasy-v0 --total-timesteps 40000 --gamma 0.5 --learning-starts 2000 --batch-size 200
    --train-frequency 32 --tau 0.1 --no-anneal-lr"
paper='{"k":10,"num_decks":2}' # what Morad et al. (2024) call RepeatPreviousEasy; as registered it has k = 4 and one deck

for seed in 1 2 3 4 5; do
    "$python" single_files/dqn_tbb_s5.py --seed "$seed"
    for kwargs in '{}' "$paper"; do
        "$python" single_files/dqn_tbb_s5.py --seed "$seed" $previous --env-kwargs "$kwargs"
        "$python" single_files/dqn_tbb_s5.py --seed "$seed" $previous --env-kwargs "$kwargs" \
            --hidden-size 256 --state-size 128 --learning-rate 7e-4
    done
done
