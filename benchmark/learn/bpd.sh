#!/usr/bin/env bash
# Sparse students of one teacher, against pruning by magnitude and L1, and with parts of the method changed: docs/bpd.md.
# bash benchmark/learn/bpd.sh, then python benchmark/tools/report.py. An hour and a half of one core.
WORKERS=${WORKERS:-1}
source "$(dirname "$0")/grid.sh"
task="--env-id popgym-PositionOnlyPendulumEasy-v0"
if [ ! -f runs/bpd_teacher/model.pt ]; then
    mkdir -p runs/bpd_teacher.partial
    teach="../../single_files/ppo_tbb_lru_continuous_action.py $task --seed 1"
    (cd runs/bpd_teacher.partial && OMP_NUM_THREADS=1 PYTHONPATH=../.. "${PYTHON:-python}" $teach)
    mv runs/bpd_teacher.partial/runs/* runs/bpd_teacher
fi

run() { # arm, seed, flags, and bpd_q for the script with critics; its folder is runs/grids/bpd/KEY
    script=single_files/${4:-bpd}_tbb_lru_continuous_action.py
    echo "$1: $script $task --teacher ../../../bpd_teacher --eval-episodes 100 $3 --seed $2"
}
all="--target-sparsity 0.95 0.97 0.98"
{
    for seed in 1 2 3 4 5; do
        run "svd" $seed "--c-threshold 3 0 $all"
    done
    for share in 0.97 0.98; do
        for seed in 1 2 3 4 5; do
            run "magnitude" $seed "--student magnitude --target-sparsity $share"
        done
    done
    for seed in 1 2 3 4 5; do
        run "L1" $seed "--student l1 $all"
    done
    for seed in 1 2 3 4 5; do
        run "magnitude" $seed "--student magnitude --target-sparsity 0.95"
    done
    for seed in 1 2 3 4 5; do
        run "svd, constant eta" $seed "--eta-schedule constant --c-threshold 0 $all"
        run "svd, exponential eta" $seed "--eta-schedule exp --c-threshold 0 $all"
        run "svd, with Q" $seed "--c-threshold 0 $all" bpd_q
        run "svd, Q without cloning" $seed "--no-bc --q-coef 1 --c-threshold 0 $all" bpd_q
        run "dense" $seed "--student dense --target-sparsity 0 0.95 0.97 0.98"
        run "svd, white noise" $seed "--noise-memory 0 --c-threshold 0 $all"
    done
} | grid bpd "$@"
