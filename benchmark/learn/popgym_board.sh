#!/usr/bin/env bash
# POPGym's fifteen tasks at Easy, Medium and Hard, one set of flags per algorithm: bash benchmark/learn/popgym_board.sh
# SEEDS="1 2 3" and LEVELS="Easy Medium Hard" choose seeds and levels. In the order of the lines: seed 1 of everything first, task
# by task, those that say most about memory first, so that a grid that is cut short has whole rows.
source "$(dirname "$0")/grid.sh"
ppo="--num-steps 64 --total-timesteps 1000000"
dqn="--batch-size 1000 --train-frequency 32 --tau 0.05 --buffer-size 300000 --total-timesteps 300000"
# for all arms alike: 0.5 in the tasks whose actions change nothing that comes after, and each is rewarded at once
declare -A discount=([RepeatPrevious]=0.5 [RepeatFirst]=0.5 [CountRecall]=0.5 [Autoencode]=0.5 [HigherLower]=0.5)

for seed in ${SEEDS:-1 2 3}; do
    for env in RepeatPrevious RepeatFirst CountRecall Concentration Battleship Autoencode MultiarmedBandit MineSweeper \
        NoisyPositionOnlyCartPole PositionOnlyCartPole HigherLower LabyrinthEscape LabyrinthExplore; do
        for level in ${LEVELS:-Easy Medium Hard}; do
            flags="--env-id popgym-$env$level-v0 --seed $seed --gamma ${discount[$env]:-0.99}"
            echo "PPO, gated LRU: single_files/ppo_tbb_glru.py $flags $ppo"
            echo "DQN, FFM: single_files/dqn_tbb_ffm.py $flags $dqn"
            echo "PPO, LRU: single_files/ppo_tbb_lru.py $flags $ppo"
            echo "PPO, LSTM: single_files/ppo_sbb_lstm.py $flags $ppo"
        done
    done
    for env in PositionOnlyPendulum NoisyPositionOnlyPendulum; do # continuous actions: one script, at its own rollouts
        for level in ${LEVELS:-Easy Medium Hard}; do
            echo "PPO, LRU: single_files/ppo_tbb_lru_continuous_action.py --env-id popgym-$env$level-v0 --seed $seed" \
                "--total-timesteps 1000000"
        done
    done
done | grid popgym_board "$@"
