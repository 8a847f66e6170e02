#!/usr/bin/env bash
# The runs behind docs/ppo.md: bash benchmark/ppo.sh; then python benchmark/report.py. JOBS=1 runs them one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
paper='{"k":10,"num_decks":2}' # what Morad et al. (2024) call RepeatPreviousEasy; as registered it has k = 4 and one deck
pendulum="single_files/ppo_tbb_lru_continuous_action.py"

{ # seeds innermost: a run's folder is named by its seed and the second of its start
    for seed in 1 2 3 4 5; do
        echo "single_files/ppo_tbb_ffm.py --seed $seed"
    done
    for memory in tbb_lru tbb_s5 tbb_linattn sbb_lstm; do
        for seed in 1 2 3 4 5; do
            echo "single_files/ppo_$memory.py --seed $seed"
        done
    done
    for flags in "--total-timesteps 200000" "--total-timesteps 300000 --num-envs 32 --env-kwargs '$paper'"; do
        for seed in 1 2 3 4 5; do
            echo "single_files/ppo_tbb_lru.py --seed $seed --env-id popgym-RepeatPreviousEasy-v0 --gamma 0.5 $flags"
        done
    done
    for seed in 1 2 3 4 5; do
        echo "single_files/ppo_tbb_lru.py --seed $seed --env-id popgym-PositionOnlyCartPoleEasy-v0 --num-steps 64" \
            "--total-timesteps 400000"
    done
    for script in "$pendulum --exp-name pendulum.lru" "benchmark/memoryless.py $pendulum --exp-name pendulum.memoryless"; do
        for seed in 1 2 3 4 5; do
            echo "$script --seed $seed"
        done
    done
} | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 "$python"
