#!/usr/bin/env bash
# What an unbroken gradient buys: bash benchmark/unbroken_gradient.sh; then python benchmark/report.py; docs/ppo.md has the results.
# Both tasks ask for the first observation of an episode that spans three to four rollouts. 30 runs: half an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
# without the previous action, which would let a policy copy what it did before instead of remembering
medium="--env-id popgym-RepeatFirstMedium-v0 --no-prev-action --num-steps 128 --total-timesteps 1500000"
# At the default rate of 1e-3, or with normalised advantages, LRU finds the cue and may lose it again: all environments walk in
# step, so most rollouts hold no reward, and what is normalised there is noise.
maze="--env-id t_maze:TMaze-v0 --num-steps 64 --total-timesteps 1000000 --learning-rate 5e-4 --no-norm-adv"
flags="--gamma 0.5 --checkpoint-interval 0" # rewards of a step depend on its action alone

for task in "$maze" "$medium"; do
    for arm in "ppo_tbb_lru lru-carried" "ppo_tbb_lru lru-stored --max-prefix 0" "ppo_tbb_ffm ffm-carried" \
        "ppo_tbb_ffm ffm-stored --max-prefix 0" "ppo_sbb_lstm lstm-stored"; do
        for seed in 1 2 3; do # innermost: a run's folder is named by its seed and the second of its start
            read -r script name more <<<"$arm"
            echo "single_files/$script.py $task $flags --exp-name unbroken_gradient.$name ${more:-} --seed $seed"
        done
    done
done | PYTHONPATH=benchmark OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 "$python"
