#!/usr/bin/env bash
# The optimiser that seed 1 of benchmark/learn/optim4rl.sh learned on Catch, in PPO in place of Adam, each at several step sizes:
# bash benchmark/learn/optim4rl_ppo.sh, a quarter of an hour of one core.
source "$(dirname "$0")/grid.sh"
learned=$(ls -d runs/grids/optim4rl/optim4rl_lru__catch__memoroid__1__*/runs/* 2>/dev/null | head -n 1)
[ -n "$learned" ] || { echo "expected a run of benchmark/learn/optim4rl.sh, found none: run it first" >&2 && exit 2; }
ppo="single_files/ppo_tbb_lru.py --env-id popgym-RepeatFirstEasy-v0 --total-timesteps 100000"

for seed in 1 2 3; do
    for rate in 1e-3 3e-3 1e-2; do
        echo "Adam, $rate: $ppo --seed $seed --learning-rate $rate"
    done
    for rate in 1e-5 3e-5 1e-4 3e-4; do
        echo "learned, $rate: benchmark/probes/ablate.py optimizer=../../../../$learned $ppo --seed $seed --learning-rate $rate"
    done
done | grid optim4rl_ppo "$@"
