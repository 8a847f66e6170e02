#!/usr/bin/env bash
# Tape against segments, and what the loss reduction does: bash benchmark/segments.sh; then python benchmark/report.py
# Equal rows per update, equal environment steps, equal updates; docs/sbb.md has the results. 48 runs on two cores: half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
paper='{"k":10,"num_decks":2}' # what Morad et al. (2024) call RepeatPreviousEasy
task="--env-id popgym-RepeatPreviousEasy-v0 --env-kwargs '$paper' --gamma 0.5" # xargs takes the inner quotes away
flags="$task --total-timesteps 50000 --batch-size 1000 --train-frequency 64 --learning-rate 5e-4 --no-anneal-lr --tau 0.05"

# seeds innermost: runs are named by seed and second, and two of one seed never start together
for memory in lru s5; do
    for reduction in mean_of_huber huber_of_mean; do
        for batching in tbb "sbb 10" "sbb 50" "sbb 100"; do
            read -r kind length <<<"$batching"
            for seed in 1 2 3; do
                echo "single_files/dqn_${kind}_$memory.py $flags ${length:+--segment-length $length}" \
                    "--loss-reduction $reduction --exp-name segments_$memory --seed $seed"
            done
        done
    done
done | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 "$python"
