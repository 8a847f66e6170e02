#!/usr/bin/env bash
# In-context learning with each memory, and how long it lasts: docs/algorithm_distillation.md. bash benchmark/learn/ad.sh
# What has been measured is not done again. About 80 minutes on one core; the first half is a table already.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
in_context() { "${PYTHON:-python}" benchmark/probes/in_context.py "$@"; }
ed=single_files/ad_ed.py
door="--env-id DarkKeyToDoor --episode-length 15 --episodes 40 --histories-per-task 3 --test-tasks 24"
chunks="--chunk-length 16 --mem-len 48 --batch-rows 2048" # of DarkKeyToDoor, whose episodes have 16 rows
room="--room-size 9 --episode-length 20 --episodes 60 --histories-per-task 20 --test-tasks 15"
mingru=single_files/ad_mingru.py
scales() { # the gradient into ED's cache
    echo "ED, scale 1: $ed --mem-grad-scale 1 --seed $1"
    echo "ED, scale 0.5: $ed --mem-grad-scale 0.5 --seed $1"
}
others() {
    echo "linear attention: single_files/ad_linattn.py --seed $1"
    echo "minGRU, reset at episodes: $mingru --reset-on episode --seed $1"
    echo "ED, pre-norm: $ed --norm pre --seed $1"
    echo "full context: single_files/ad_full.py --seed $1"
    echo "XL: $ed --cache input --seed $1"
    echo "reduced context: single_files/ad_full.py --context-length 11 --seed $1"
    echo "LRU: single_files/ad_lru.py --seed $1"
    # a cache shorter than the window: here a gradient can teach relaying
    echo "ED, short cache, scale 1: $ed --mem-len 11 --mem-grad-scale 1 --seed $1"
    echo "ED, short cache, scale 0: $ed --mem-len 11 --seed $1"
}

{
    for seed in 1 2 3 4 5; do # at equal processor time: 800 updates of memoroids, 500 of transformers
        echo "minGRU: $mingru --seed $seed"
        echo "ED: $ed --seed $seed"
    done
    for seed in 1 2 3 4 5; do
        echo "ED, 600 updates: $ed --total-updates 600 --seed $seed"
    done
    for seed in 1 2 3 4 5; do # a task with two places to remember
        echo "minGRU: $mingru $door --batch-rows 1280 --total-updates 1100 --seed $seed"
        echo "ED: $ed $door $chunks --seed $seed"
    done
    scales 1
    others 1
    for seed in 1 2 3; do echo "minGRU: $mingru $room --batch-rows 5040 --seed $seed"; done # a larger room
    scales 2
    others 2
    for seed in 3 4 5; do scales $seed; done
    for seed in 3 4 5; do others $seed; done
    for seed in 1 2 3 4 5; do
        echo "ED, short cache, scale 0.5: $ed --mem-len 11 --mem-grad-scale 0.5 --seed $seed"
        for scale in 0 0.5 1; do # the same window
            echo "minGRU, window, scale $scale: $mingru --chunk-length 11 --bptt-chunks 4 --mem-grad-scale $scale --seed $seed"
        done
        echo "no cache: $ed --cache none --seed $seed"
        echo "ED, smoothed labels: $ed --label-smoothing 0.1 --seed $seed"
        echo "ED, early greed: $ed --exploration-fraction 0.3 --seed $seed"
    done
} | in_context "$@"
