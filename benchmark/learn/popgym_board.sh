#!/usr/bin/env bash
# POPGym's fifteen tasks at Easy, Medium and Hard, one set of flags per algorithm: bash benchmark/learn/popgym_board.sh
# SEEDS="1 2 3" and LEVELS="Easy Medium Hard" choose seeds and levels. A seed is about 14 hours of one core. In the order of the
# lines, a grid that is cut short has whole rows: of each seed first the gated LRU and DQN on the tasks with a published number,
# then the other tasks, then LRU and the LSTM.
source "$(dirname "$0")/grid.sh"
export PYTHONPATH=benchmark/probes${PYTHONPATH:+:$PYTHONPATH} # for CountRecall as it was
ppo="--num-steps 128 --total-timesteps 1000000"
dqn="--batch-size 1000 --train-frequency 32 --tau 0.05 --buffer-size 300000 --total-timesteps 300000"
published="RepeatPrevious CountRecall RepeatFirst Autoencode NoisyPositionOnlyCartPole MultiarmedBandit HigherLower PositionOnlyCartPole"
others="Concentration Battleship MineSweeper LabyrinthEscape LabyrinthExplore"
# for all arms alike: 0.5 in the tasks whose actions change nothing that comes after, and each is rewarded at once; 0.9 in the
# bandits, where what a pull tells pays within some steps
declare -A discount=([RepeatPrevious]=0.5 [RepeatFirst]=0.5 [CountRecall]=0.5 [Autoencode]=0.5 [HigherLower]=0.5 [MultiarmedBandit]=0.9)

lines() { # ARM SCRIPT FLAGS: a line for each level of $env
    for level in ${LEVELS:-Easy Medium Hard}; do
        echo "$1: single_files/$2.py --env-id popgym-$env$level-v0 --seed $seed --gamma ${discount[$env]:-0.99} $3"
    done
}

for seed in ${SEEDS:-1 2 3}; do
    for env in $published $others; do
        lines "PPO, gated LRU" ppo_tbb_glru "$ppo"
        lines "DQN, FFM" dqn_tbb_ffm "$dqn"
    done
    for env in PositionOnlyPendulum NoisyPositionOnlyPendulum; do # continuous actions: one script, at its own rollouts
        for level in ${LEVELS:-Easy Medium Hard}; do
            echo "PPO, LRU: single_files/ppo_tbb_lru_continuous_action.py --env-id popgym-$env$level-v0 --seed $seed" \
                "--total-timesteps 1000000"
        done
    done
    for level in ${LEVELS:-Easy Medium Hard}; do # with the action space of the published runs
        old="--env-id old_count_recall:OldCountRecall$level-v0 --seed $seed --gamma 0.5"
        echo "PPO, gated LRU: single_files/ppo_tbb_glru.py $old $ppo"
        echo "DQN, FFM: single_files/dqn_tbb_ffm.py $old $dqn"
    done
    for env in $published $others; do
        lines "PPO, LRU" ppo_tbb_lru "$ppo"
        lines "PPO, LSTM" ppo_sbb_lstm "$ppo"
    done
done | grid popgym_board "$@"

seed=1 # the bandits with the discount of most tasks
for level in ${LEVELS:-Easy Medium Hard}; do
    env="--env-id popgym-MultiarmedBandit$level-v0 --seed $seed --gamma 0.99"
    echo "PPO, gated LRU: single_files/ppo_tbb_glru.py $env $ppo"
    echo "DQN, FFM: single_files/dqn_tbb_ffm.py $env $dqn"
done | grid popgym_discount "$@"

for env in MultiarmedBandit NoisyPositionOnlyCartPole; do # the published reading of a time limit
    lines "PPO, gated LRU, a limit is terminal" ppo_tbb_glru "$ppo --truncation-is-terminal"
done | grid popgym_limit "$@"
