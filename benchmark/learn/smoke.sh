#!/usr/bin/env bash
# Is the benchmark's machinery in order? Two scripts x two environments x two seeds, and one run that must fail, from the runner
# to the report, in a throw-away folder. Exits with 1, as the runner does after a failure; with 2 where anything else is wrong.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
ln -s "$PWD/single_files" "$PWD/cleanrl_memoroid" "$root"
mkdir -p "$root/benchmark/results" "$root/docs"
printf '<!-- results: smoke -->\n<!-- end results -->\n' > "$root/README.md"
short="--total-timesteps 6000 --eval-episodes 10"

status=0
{
    printf '%s\n' "single_files/"{dqn_tbb_ffm,ppo_tbb_lru}".py --env-id popgym-"{RepeatFirst,RepeatPrevious}"Easy-v0 $short --seed "{1,2}
    echo "single_files/dqn_tbb_ffm.py --env-id popgym-RepeatFirstEasy-v0 $short --seed 3 --num-envs 0"
} | "$python" benchmark/tools/run.py --name smoke --root "$root" --workers "${WORKERS:-2}" || status=$?

"$python" benchmark/tools/report.py --root "$root"
cat "$root/README.md"
wrong() { echo "smoke.sh: $1" >&2 && exit 2; }
[ "$status" = 1 ] || wrong "expected the runner to exit with 1 because of the failed run, got $status"
[ "$(grep -l '"state": "done"' "$root"/runs/grids/smoke/*/record.json | wc -l)" = 8 ] || wrong "expected 8 runs to be done"
grep -q -- '- failed: .*num-envs' "$root/README.md" || wrong "expected the failed run in the report, it is not there"
echo "smoke.sh: eight runs done, the planted failure seen and reported; exit status $status" && exit "$status"
