#!/usr/bin/env bash
# The runs behind docs/lru.md: bash benchmark/dqn_tbb_lru.sh; then python benchmark/report.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
previous="--env-id popgym-RepeatPreviousEasy-v0 --gamma 0.5 --learning-starts 1000 --batch-size 200
    --tau 0.1 --no-anneal-lr"
paper='{"k":10,"num_decks":2}' # what Morad et al. (2024) call RepeatPreviousEasy; as registered it has k = 4 and one deck

for seed in 1 2 3 4 5; do
    "$python" single_files/dqn_tbb_lru.py --seed "$seed"
    for kwargs in '{}' "$paper"; do
        "$python" single_files/dqn_tbb_lru.py --seed "$seed" $previous --env-kwargs "$kwargs" --total-timesteps 16000
        "$python" single_files/dqn_tbb_lru.py --seed "$seed" $previous --env-kwargs "$kwargs" --total-timesteps 12000 \
            --hidden-size 256 --state-size 128 --learning-rate 7e-4
    done
done
