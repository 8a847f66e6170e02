#!/usr/bin/env bash
# The runs behind docs/linattn.md: bash benchmark/dqn_tbb_linattn.sh; then python benchmark/report.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

for seed in 1 2 3 4 5; do
    "$python" single_files/dqn_tbb_linattn.py --seed "$seed"
done
