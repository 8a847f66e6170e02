#!/usr/bin/env bash
# Tape against segments, and what the loss reduction does: docs/sbb.md. bash benchmark/learn/segments.sh
# Equal rows per update, equal environment steps, equal updates. 48 runs, then 12 at the paper's optimiser settings, width,
# exploration and one update per episode: an hour on two cores.
source "$(dirname "$0")/grid.sh"
# what Morad et al. (2024) call RepeatPreviousEasy
task="--env-id popgym-RepeatPreviousEasy-v0 --env-kwargs k 10 num_decks 2 --gamma 0.5 --batch-size 1000 --no-anneal-lr"
flags="$task --total-timesteps 50000 --train-frequency 64 --learning-rate 5e-4 --tau 0.05"
slow="$task --no-prev-action --total-timesteps 120000 --learning-starts 20000 --train-frequency 103 --hidden-size 256
    --state-size 128 --learning-rate 1e-4 --max-grad-norm 0.01 --tau 0.005 --start-e 0.2 --end-e 0.1"

runs() { # memory, segment length or nothing, flags, changes of benchmark/probes/ablate.py
    local script="single_files/dqn_tbb_$1.py" arm=tape
    [ -z "$2" ] || script="single_files/dqn_sbb_$1.py --segment-length $2" arm="segment_length=$2"
    for seed in 1 2 3; do
        echo $arm "loss_reduction=mean_of_huber:" ${4:+benchmark/probes/ablate.py $4} $script $3 --seed $seed
        echo $arm "loss_reduction=huber_of_mean:" benchmark/probes/ablate.py huber_of_mean $4 $script $3 --seed $seed
    done
}

for memory in lru s5; do
    for length in "" 10 50 100; do
        runs $memory "$length" "$flags" ""
    done | grid segments_$memory "$@"
done

for length in "" 100; do
    runs s5 "$length" "$slow" lr_warmup=200
done | grid segments_s5_paper "$@"
