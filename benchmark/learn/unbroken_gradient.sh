#!/usr/bin/env bash
# What an unbroken gradient buys: docs/unbroken_gradient.md. bash benchmark/learn/unbroken_gradient.sh
# Both tasks ask for the first observation of an episode that spans three to four rollouts. 30 runs: half an hour on two cores.
source "$(dirname "$0")/grid.sh"
export PYTHONPATH=benchmark/probes # for the T-maze
# without the previous action, which would let a policy copy what it did before instead of remembering
medium="--env-id popgym-RepeatFirstMedium-v0 --no-prev-action --num-steps 128 --total-timesteps 1500000"
# At the default rate of 1e-3, or with normalised advantages, LRU finds the cue and may lose it again: all environments walk in
# step, so most rollouts hold no reward, and what is normalised there is noise.
maze="--env-id t_maze:TMaze-v0 --num-steps 64 --total-timesteps 1000000 --learning-rate 5e-4 --no-norm-adv"

for task in "$maze" "$medium"; do
    flags="$task --gamma 0.5 --checkpoint-interval 0" # rewards of a step depend on its action alone
    for seed in 1 2 3; do
        for memory in lru ffm; do
            echo "$memory-carried: single_files/ppo_tbb_$memory.py $flags --seed $seed"
            echo "$memory-stored: single_files/ppo_tbb_$memory.py $flags --seed $seed --max-prefix 0"
        done
        echo "lstm-stored: single_files/ppo_sbb_lstm.py $flags --seed $seed"
    done
done | grid unbroken_gradient "$@"
