# Sourced by the grids of this folder: `lines | grid NAME "$@"` runs the lines, two at a time; WORKERS=8: eight. Where a run
# fails, the grids behind it still run, and the exit status is 1.
set -euo pipefail
shopt -s lastpipe # a pipe's last command is in this very shell, so that `failed` is known at the end
cd "$(dirname "$0")/../.."
failed=0
trap 'exit $(($? ? $? : failed))' EXIT
grid() {
    local name=$1 status=0
    shift
    "${PYTHON:-python}" benchmark/tools/run.py --name "$name" --workers "${WORKERS:-2}" "$@" || status=$?
    [ $status -le 1 ] || exit $status # stopped
    [ $status = 0 ] || failed=1
}
