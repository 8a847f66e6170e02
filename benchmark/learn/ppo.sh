#!/usr/bin/env bash
# PPO with each memory and with an LSTM, a grid per script, and a pendulum with and without memory: docs/ppo.md.
# bash benchmark/learn/ppo.sh
source "$(dirname "$0")/grid.sh"
first="--env-id popgym-RepeatFirstEasy-v0"

for script in ppo_tbb_ffm ppo_tbb_glru ppo_tbb_mingru ppo_tbb_s5 ppo_tbb_linattn ppo_sbb_lstm; do
    printf '%s\n' "single_files/$script.py $first --seed "{1,2,3,4,5} | grid $script "$@"
done

for seed in 1 2 3 4 5; do
    script="single_files/ppo_tbb_lru.py --seed $seed"
    echo "$script $first"
    echo "$script --env-id popgym-RepeatPreviousEasy-v0 --gamma 0.5 --total-timesteps 200000"
    # what Morad et al. (2024) call RepeatPreviousEasy; as registered it has k = 4 and one deck
    echo "$script --env-id popgym-RepeatPreviousEasy-v0 --gamma 0.5 --total-timesteps 300000 --num-envs 32" \
        "--env-kwargs k 10 num_decks 2"
    echo "$script --env-id popgym-PositionOnlyCartPoleEasy-v0 --num-steps 64 --total-timesteps 400000"
done | grid ppo_tbb_lru "$@"

for seed in 1 2 3 4 5; do
    script="single_files/ppo_tbb_lru_continuous_action.py --seed $seed --env-id popgym-PositionOnlyPendulumEasy-v0"
    echo "lru: $script"
    echo "memoryless: benchmark/probes/ablate.py memoryless $script"
done | grid pendulum "$@"
