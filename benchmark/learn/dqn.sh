#!/usr/bin/env bash
# DQN on the tape, a grid per script, as docs/{ffm,lru,s5,linattn}.md show them. bash benchmark/learn/dqn.sh
# PAPER=1 adds the settings of Morad et al. (2024), as in their experiments' files: an hour more.
source "$(dirname "$0")/grid.sh"
first="--env-id popgym-RepeatFirstEasy-v0"
previous="--env-id popgym-RepeatPreviousEasy-v0 --gamma 0.5 --batch-size 200 --tau 0.1 --no-anneal-lr"
# what Morad et al. (2024) call RepeatPreviousEasy; as registered it has k = 4 and one deck
paper="--env-kwargs k 10 num_decks 2"
small="learning_rate=0.001 hidden_size=128 state_size=64" # the scripts' defaults
large="learning_rate=0.0007 hidden_size=256 state_size=128"
large_flags="--learning-rate 7e-4 --hidden-size 256 --state-size 128"

for seed in 1 2 3 4 5; do
    echo "single_files/dqn_tbb_ffm.py --seed $seed $first"
    if [ $seed -le 3 ]; then
        echo "single_files/dqn_tbb_ffm.py --seed $seed --env-id popgym-PositionOnlyCartPoleEasy-v0 --total-timesteps 400000" \
            "--buffer-size 400000 --exploration-fraction 0.1 --learning-rate 3e-4 --batch-size 2000" \
            "--train-frequency 64 --tau 0.03"
    fi
done | grid dqn_tbb_ffm "$@"

for script in dqn_tbb_linattn dqn_tbb_glru dqn_tbb_mingru; do
    printf '%s\n' "single_files/$script.py $first --seed "{1,2,3,4,5} | grid $script "$@"
done

for seed in 1 2 3 4 5; do
    script="single_files/dqn_tbb_lru.py --seed $seed"
    echo "$script $first"
    for kwargs in "" "$paper"; do
        echo "$small: $script $previous --learning-starts 1000 --total-timesteps 16000 $kwargs"
        echo "$large: $script $previous --learning-starts 1000 --total-timesteps 12000 $large_flags $kwargs"
    done
done | grid dqn_tbb_lru "$@"

for seed in 1 2 3 4 5; do
    script="single_files/dqn_tbb_s5.py --seed $seed"
    echo "$script $first"
    for kwargs in "" "$paper"; do
        flags="--learning-starts 2000 --total-timesteps 40000 --train-frequency 32"
        echo "$small: $script $previous $flags $kwargs"
        echo "$large: $script $previous $flags $large_flags $kwargs"
    done
done | grid dqn_tbb_s5 "$@"

if [ "${PAPER:-}" ]; then # 5,000 random episodes of 51 steps, then 5,000 episodes with one update each
    echo "benchmark/probes/ablate.py lr_warmup=200 single_files/dqn_tbb_ffm.py --seed 1 $first --no-prev-action --num-envs 1" \
        "--total-timesteps 510000 --learning-starts 255000 --train-frequency 51 --batch-size 1000 --buffer-size 4000000" \
        "--hidden-size 256 --trace-size 64 --context-size 4 --learning-rate 1e-4 --no-anneal-lr --max-grad-norm 0.01" \
        "--tau 0.005 --gamma 0.99 --start-e 0.2 --end-e 0.01 --exploration-fraction 0.5" | grid dqn_tbb_ffm_paper "$@"
fi
