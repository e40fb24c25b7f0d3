#!/usr/bin/env bash
# Makes the environment (scripts/setup.sh) and runs the tests; arguments go on to pytest:
#
#   bash scripts/test.sh                          all, as CI does
#   bash scripts/test.sh -m "not slow"            without those of more than about ten seconds
#   bash scripts/test.sh tests/losses -n 0        one folder, in one process
#
# LORKD_TEST_WORKERS   processes side by side (default: the cores, at most 4)
# LORKD_TOOLS          1 (default): the tests that run experts in MONAI Label and MONAI Deploy make the environments
#                      .venv-label and .venv-deploy first (5 GB), and fail where they cannot; 0: leave these tests out
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh" test
venv=${LORKD_VENV:-$root/.venv}
[ "${venv#/}" != "$venv" ] || venv=$PWD/$venv
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
workers=${LORKD_TEST_WORKERS:-$((cores < 4 ? cores : 4))}

# One thread a process, whole files to one process (what a file trains once, its tests share), in the order of
# the folders: tests/bundles, the longest, comes early.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 LORKD_TOOLS=${LORKD_TOOLS:-1} PATH="$venv/bin:$PATH"
cd "$root"
exec "$venv/bin/python" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder --durations=10 "$@"
