#!/usr/bin/env bash
# Sparse students of one teacher, against pruning by magnitude and L1, and without parts of the method: docs/bpd.md.
# bash benchmark/learn/bpd.sh, then python benchmark/tools/report.py. An hour of one core.
WORKERS=${WORKERS:-1}
source "$(dirname "$0")/grid.sh"
task="--env-id popgym-PositionOnlyPendulumEasy-v0"
if [ ! -f runs/bpd_teacher/model.pt ]; then
    mkdir -p runs/bpd_teacher.partial
    (cd runs/bpd_teacher.partial && OMP_NUM_THREADS=1 "${PYTHON:-python}" ../../single_files/ppo_tbb_lru_continuous_action.py --seed 1 $task)
    mv runs/bpd_teacher.partial/runs/* runs/bpd_teacher
fi

arm() { # name, flags; a run's folder is runs/grids/bpd/KEY
    printf "$1: single_files/bpd_tbb_lru_continuous_action.py $task --teacher ../../../bpd_teacher $2 --seed %s\n" 1 2 3 4 5
}
all="--target-sparsity 0.95 0.97 0.98"
{
    arm "svd" "--c-threshold 3 0 $all"
    for share in 0.97 0.95 0.98; do
        arm "magnitude" "--student magnitude --target-sparsity $share"
    done
    arm "L1" "--student l1 $all"
    arm "dense" "--student dense --target-sparsity 0 0.95 0.97 0.98"
    arm "svd, constant eta" "--eta-schedule constant --c-threshold 3 --target-sparsity 0.97"
    arm "svd, exponential eta" "--eta-schedule exp --c-threshold 3 --target-sparsity 0.97"
    arm "svd, with Q" "--q-coef 0.5 --c-threshold 3 --target-sparsity 0.97"
    arm "svd, Q without cloning" "--no-bc --q-coef 1 --c-threshold 3"
    arm "svd, white noise" "--noise-memory 0 --c-threshold 3 --target-sparsity 0.97"
} | grid bpd "$@"
