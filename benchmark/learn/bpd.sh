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

arm() { # name, flags; a run is in runs/grids/bpd/KEY
    for seed in 1 2 3 4 5; do
        echo "$1: single_files/bpd_tbb_lru_continuous_action.py $task --teacher ../../../bpd_teacher" \
            "--eval-episodes 100 $2 --seed $seed"
    done
}
all="--target-sparsity 0.95 0.97 0.98"
{
    arm "svd" "--c-threshold 3 0 $all"
    arm "magnitude" "--student magnitude --target-sparsity 0.97"
    arm "magnitude" "--student magnitude --target-sparsity 0.98"
    arm "L1" "--student l1 $all"
    arm "magnitude" "--student magnitude --target-sparsity 0.95"
    arm "dense" "--student dense --target-sparsity 0 0.95 0.97 0.98"
    arm "svd, constant eta" "--eta-schedule constant"
    arm "svd, exponential eta" "--eta-schedule exp"
    arm "svd, with Q" "--q-coef 0.5"
    arm "svd, Q without cloning" "--no-bc --q-coef 1"
    arm "svd, white noise" "--noise-memory 0"
} | grid bpd "$@"
