#!/usr/bin/env bash
# A race to a mean return of 0.95 against what people use today: bash benchmark/learn/race.sh
# 54 runs, all on one machine, by one runner, one thread each. An arm stops at its budget of steps, whatever it has reached by
# then; each has the flags under which it is known to learn the task, from its own page or its authors. RecurrentPPO has fewer
# steps, which take it longer.
WORKERS=${WORKERS:-1}
source "$(dirname "$0")/grid.sh"
first=popgym-RepeatFirstEasy-v0 previous=popgym-RepeatPreviousEasy-v0 cartpole=popgym-PositionOnlyCartPoleEasy-v0
explore="--end-e 0.01" # the goal is a return in training: with the default, one action in twenty is random, and 0.93 the most
replay="--learning-starts 1000 --batch-size 200 --tau 0.1 --no-anneal-lr"
control="--buffer-size 200000 --exploration-fraction 0.1 --learning-rate 3e-4 --batch-size 2000 --train-frequency 64 --tau 0.03"
# RL Baselines3 Zoo, hyperparams/ppo_lstm.yml, CartPoleNoVel-v1
zoo="--num-steps 32 --batch-size 256 --gae-lambda 0.8 --gamma 0.98 --update-epochs 20 --learning-rate 1e-3 --anneal"

for seed in 1 2 3; do
    for memory in ffm lru; do
        echo "single_files/dqn_tbb_$memory.py --seed $seed --env-id $first --total-timesteps 75000 $explore"
        echo "single_files/dqn_tbb_$memory.py --seed $seed --env-id $previous --total-timesteps 40000 --gamma 0.5 $replay $explore"
        echo "single_files/dqn_tbb_$memory.py --seed $seed --env-id $cartpole --total-timesteps 150000 $control $explore"
    done
    for script in ppo_tbb_ffm ppo_tbb_lru ppo_sbb_lstm; do
        echo "single_files/$script.py --seed $seed --env-id $first --total-timesteps 300000"
        echo "single_files/$script.py --seed $seed --env-id $previous --total-timesteps 200000 --gamma 0.5"
        echo "single_files/$script.py --seed $seed --env-id $cartpole --total-timesteps 200000 --num-steps 64"
    done
    echo "benchmark/probes/sb3_recurrent_ppo.py --seed $seed --env-id $first --total-timesteps 60000"
    echo "benchmark/probes/sb3_recurrent_ppo.py --seed $seed --env-id $previous --total-timesteps 60000 --gamma 0.5"
    echo "benchmark/probes/sb3_recurrent_ppo.py --seed $seed --env-id $cartpole --total-timesteps 100000 $zoo"
done | grid race "$@"
