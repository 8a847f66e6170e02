#!/usr/bin/env bash
# Tape against segments, and what the loss reduction does: bash benchmark/segments.sh; then python benchmark/report.py
# Equal rows per update, equal environment steps, equal updates; docs/sbb.md has the results. 48 runs on two cores: half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
paper='{"k":10,"num_decks":2}' # what Morad et al. (2024) call RepeatPreviousEasy
task="--env-id popgym-RepeatPreviousEasy-v0 --env-kwargs '$paper' --gamma 0.5" # xargs takes the inner quotes away
flags="$task --total-timesteps 50000 --batch-size 1000 --train-frequency 64 --learning-rate 5e-4 --no-anneal-lr --tau 0.05"

for memory in lru s5; do
    for reduction in mean_of_huber huber_of_mean; do
        for seed in 1 2 3; do
            common="$flags --seed $seed --loss-reduction $reduction --exp-name segments_$memory"
            echo "single_files/dqn_tbb_$memory.py $common"
            for length in 10 50 100; do
                echo "single_files/dqn_sbb_$memory.py $common --segment-length $length"
            done
        done
    done
done | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 "$python"
