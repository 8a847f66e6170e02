#!/usr/bin/env bash
# POPGym Easy: LRU, gated or not, and beside it the LSTM that people use today, one set of flags per algorithm.
# bash benchmark/learn/popgym_easy.sh
# Nothing is tuned to a task, and 150,000 steps are little: the script of POPGym's own baselines stops at ten million. So PPO has
# short rollouts: twice as many updates as with 64 steps and four minibatches, each from fresher rows, and half as large
source "$(dirname "$0")/grid.sh"
tasks="Autoencode Battleship Concentration CountRecall HigherLower MineSweeper MultiarmedBandit NoisyPositionOnlyCartPole"
tasks="$tasks PositionOnlyCartPole RepeatFirst RepeatPrevious VelocityOnlyCartpole LabyrinthEscape LabyrinthExplore"
budget="--total-timesteps 150000"
ppo="$budget --num-steps 16 --num-minibatches 2 --eval-episodes 1000" # where arms lie close, 100 episodes cannot tell them apart

for seed in 1 2 3; do
    for env in $tasks; do
        for arm in "LRU:ppo_tbb_lru" "LSTM:ppo_sbb_lstm" "gated LRU:ppo_tbb_glru"; do
            echo "PPO, ${arm%%:*}: single_files/${arm##*:}.py --env-id popgym-${env}Easy-v0 --seed $seed $ppo"
        done
        [ $seed = 3 ] || echo "DQN, LRU: single_files/dqn_tbb_lru.py --env-id popgym-${env}Easy-v0 --seed $seed $budget --batch-size 1000" \
            "--train-frequency 64 --tau 0.03 --buffer-size 200000"
    done
    for env in NoisyPositionOnlyPendulum PositionOnlyPendulum; do # continuous actions: PPO alone
        echo "PPO, LRU: single_files/ppo_tbb_lru_continuous_action.py --env-id popgym-${env}Easy-v0 --seed $seed $budget"
    done
done | grid popgym_easy "$@"

# The same with rollouts of 64 steps, on five tasks
for env in HigherLower MineSweeper NoisyPositionOnlyCartPole RepeatPrevious LabyrinthEscape; do
    for seed in 1 2 3; do
        for arm in "LRU:ppo_tbb_lru" "LSTM:ppo_sbb_lstm" "gated LRU:ppo_tbb_glru"; do
            echo "PPO, ${arm%%:*}: single_files/${arm##*:}.py --env-id popgym-${env}Easy-v0 --seed $seed $budget --num-steps 64" \
                "--eval-episodes 1000"
        done
    done
done | grid popgym_easy_1000 "$@"

# The same rows in an update, from 16 environments in place of 16 steps
ppo="$budget --num-envs 16 --num-steps 64 --num-minibatches 2 --eval-episodes 1000"
for env in $tasks; do
    for seed in 1 2 3; do
        for arm in "LRU:ppo_tbb_lru" "LSTM:ppo_sbb_lstm" "gated LRU:ppo_tbb_glru"; do
            echo "PPO, ${arm%%:*}: single_files/${arm##*:}.py --env-id popgym-${env}Easy-v0 --seed $seed $ppo"
        done
    done
done | grid popgym_easy_16 "$@"
