#!/usr/bin/env bash
# Tape against segments, and what the loss reduction does: bash benchmark/segments.sh; then python benchmark/report.py
# Equal rows per update, equal environment steps, equal updates; docs/sbb.md has the results. 48 runs, then 12 at the paper's
# optimiser settings, width, exploration and one update per episode: an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
paper='{"k":10,"num_decks":2}' # what Morad et al. (2024) call RepeatPreviousEasy
task="--env-id popgym-RepeatPreviousEasy-v0 --env-kwargs '$paper' --gamma 0.5" # xargs takes the inner quotes away
flags="$task --total-timesteps 50000 --batch-size 1000 --train-frequency 64 --learning-rate 5e-4 --no-anneal-lr --tau 0.05"

slow="$task --no-prev-action --total-timesteps 120000 --learning-starts 20000 --train-frequency 103 --batch-size 1000
    --hidden-size 256 --state-size 128 --learning-rate 1e-4 --lr-warmup 200 --no-anneal-lr --max-grad-norm 0.01 --tau 0.005
    --start-e 0.2 --end-e 0.1"

runs() { # name, memory, batching, flags; seeds innermost: runs are named by seed and second, two of one seed never start together
    local kind length
    read -r kind length <<<"$3"
    for reduction in mean_of_huber huber_of_mean; do
        for seed in 1 2 3; do
            echo "single_files/dqn_${kind}_$2.py" $4 ${length:+--segment-length $length} \
                --loss-reduction $reduction --exp-name "$1" --seed $seed
        done
    done
}

{
    for memory in lru s5; do
        for batching in tbb "sbb 10" "sbb 50" "sbb 100"; do
            runs segments_$memory $memory "$batching" "$flags"
        done
    done
    for batching in tbb "sbb 100"; do
        runs segments_s5_paper s5 "$batching" "$slow"
    done
} | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 "$python"
