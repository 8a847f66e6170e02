#!/usr/bin/env bash
# The paper's figure: four tasks x four memories x tape and segments of 10 and 50. bash benchmark/learn/dqn_popgym.sh
# 72 runs, started so that a grid that is cut short has whole cells. In a task, all arms have the same flags, and stop at the
# same number of steps; --batch-size makes their updates equally large.
source "$(dirname "$0")/grid.sh"
common="--batch-size 1000 --checkpoint-interval 20000"
# what Morad et al. (2024) call RepeatPreviousEasy has k = 10 and two decks; as registered it has k = 4 and one deck
declare -A tasks=(
    [previous]="popgym-RepeatPreviousEasy-v0 --env-kwargs k 10 num_decks 2 --total-timesteps 50000 --gamma 0.5
        --train-frequency 64 --learning-rate 5e-4 --no-anneal-lr --tau 0.05"
    [count]="popgym-CountRecallEasy-v0 --total-timesteps 100000 --gamma 0.5 --train-frequency 32 --tau 0.05"
    [cartpole]="popgym-PositionOnlyCartPoleEasy-v0 --total-timesteps 150000 --buffer-size 200000 --exploration-fraction 0.1
        --train-frequency 64 --learning-rate 3e-4 --tau 0.03"
    [first]="popgym-RepeatFirstEasy-v0 --total-timesteps 120000 --gamma 0.5 --train-frequency 32 --tau 0.02"
)

runs() { # a task's name, seed
    for memory in lru ffm s5 linattn; do
        for arm in "tape: single_files/dqn_tbb_$memory.py" "segments of 10: single_files/dqn_sbb_$memory.py --segment-length 10" \
            "segments of 50: single_files/dqn_sbb_$memory.py --segment-length 50"; do
            echo $memory $arm --env-id ${tasks[$1]} $common --seed "$2"
        done
    done
}

for round in "previous 1" "first 1" "cartpole 1" "count 1" "previous 2" "first 2"; do
    runs $round
done | grid dqn_popgym "$@"
