#!/usr/bin/env bash
# A learned optimiser: cells beside Adam; what a GRU's outputs mean crossed with what it sees; meta-learning rates; without the
# pipeline: bash benchmark/learn/optim4rl.sh. SEEDS="1 2 3" chooses meta-seeds, of 9 minutes of one core each; all arms of a
# seed run before the next seed.
source "$(dirname "$0")/grid.sh"
gru=single_files/optim4rl.py
memoroid=single_files/optim4rl_lru.py

for seed in ${SEEDS:-1 2 3 4 5}; do
    run="--env-id catch --seed $seed --checkpoint-interval 0"
    echo "memoroid: $memoroid $run --test-agents 96" # one agent in a hundred gets stuck: many, to see it
    echo "memoroid from Adam: $memoroid $run --init adam --no-baselines"
    for structure in adaptive linear momentum raw; do
        for grad_proc in none signlog l2l asinh; do
            echo "GRU $structure, $grad_proc: $gru $run --no-baselines --test-agents 16 --structure $structure --grad-proc $grad_proc"
        done
    done
    echo "memoroid, no pipeline: $memoroid $run --no-baselines --no-pipeline"
    echo "GRU adaptive, signlog, no pipeline: $gru $run --no-baselines --no-pipeline"
    for rate in 3e-3 3e-2 1e-1; do
        echo "memoroid, meta-lr $rate: $memoroid $run --no-baselines --meta-lr $rate"
        echo "GRU adaptive, signlog, meta-lr $rate: $gru $run --no-baselines --meta-lr $rate"
    done
    # bare gradients want a high rate; what it learns comes and goes, so fresh agents rate it often
    echo "GRU adaptive, none, meta-lr 1e-1, six validations: $gru $run --no-baselines --test-agents 16 --grad-proc none" \
        "--meta-lr 1e-1 --num-validations 6 --num-windows 120"
done | grid optim4rl "$@"
