#!/usr/bin/env bash
# What a reset that is one row early or late costs: docs/reset_audit.md. bash benchmark/learn/reset_cost.sh
# 24 runs of five to fifteen seconds. A reset that is moved in updates alone is in the right place while the agent acts.
source "$(dirname "$0")/grid.sh"
export PYTHONPATH="benchmark/probes${PYTHONPATH:+:$PYTHONPATH}"
common="--checkpoint-interval 0"
maze="--env-id t_maze:TMaze-v0 --env-kwargs length 10 --total-timesteps 60000 --num-envs 32 --num-steps 22"
first="--env-id popgym-RepeatFirstEasy-v0 --total-timesteps 150000"

for seed in 1 2 3; do
    for task in "$maze" "$first"; do
        run="single_files/ppo_tbb_mingru.py $task $common --seed $seed"
        echo "reset=in place: $run"
        for moved in "early in updates:reset_early" "late in updates:reset_late" "late everywhere:reset_late_everywhere"; do
            echo "reset=${moved%%:*}: benchmark/probes/ablate.py ${moved##*:} $run"
        done
    done
done | grid reset_cost "$@"
