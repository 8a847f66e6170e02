#!/usr/bin/env bash
# Do memories whose length fits the task last on longer episodes? docs/longer.md. bash benchmark/learn/longer.sh
# 150 networks of about 15 seconds each, one after the other. Started again, it goes on with what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
probe="${PYTHON:-python} benchmark/probes/longer.py"

$probe --tasks RepeatPrevious PositionOnlyCartPole --seeds 1 2 3
$probe --tasks RepeatFirst --seeds 1 2 3
$probe --seeds 1 2 3 4 5
