#!/usr/bin/env bash
# Makes the environment that the other scripts use, once.
#
#   bash scripts/setup.sh [EXTRAS]      EXTRAS of pyproject.toml, comma-separated; default "test"
#
# LORKD_VENV  where it lies (default: .venv in the checkout)
# PYTHON      the interpreter to make it with (default: the first of python3.11, 3.12, 3.10, python3 that works)
#
# Safe to repeat (nothing happens when it is up to date), safe to run twice at once (the second waits), and an
# environment whose set-up was killed is made again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-test}
venv=${LORKD_VENV:-$root/.venv}
say() { printf '[setup] %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

works='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))'
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
    if "$candidate" -c "$works" >/dev/null 2>&1; then echo "$candidate"; return; fi
  done
  fail "no Python 3.10, 3.11 or 3.12 found (tried: ${PYTHON:-python3.11 python3.12 python3.10 python3};" \
    "python3 is $(python3 -V 2>&1 || true)). Install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null 2>&1; then
  exec 9>"${venv%/}.lock"
  flock -n 9 || { say "another set-up of $venv is running; waiting for it"; flock 9; }
fi

# The stamp is written last and names what was installed: no stamp, or another one, means there is work to do.
# "made-here" marks an environment that this script may delete; one that a user brought is only installed into.
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
stamp="$venv/lorkd-$(printf '%s' "$extras" | tr -c 'A-Za-z0-9\n' '-').stamp"
up_to_date() { [ -f "$1" ] && [ "$(cat "$1")" = "$wanted $root" ]; }
if up_to_date "$stamp"; then exit 0; fi
# "test" holds all extras but these; installing again would pull the package away under tests that are running.
case $extras in *label* | *deploy* | *dev*) ;; *) if up_to_date "$venv/lorkd-test.stamp"; then exit 0; fi ;; esac

if [ -e "$venv/lorkd-unfinished" ]; then
  say "the last set-up of $venv did not end: making it again"
  rm -rf "$venv"
fi
if [ ! -x "$venv/bin/python" ]; then
  [ -z "$(ls -A "$venv" 2>/dev/null)" ] || fail "$venv holds something that is no Python environment; name another folder in LORKD_VENV"
  python=$(find_python)
  say "making $venv with $("$python" -V)"
  mkdir -p "$venv"
  touch "$venv/lorkd-made-here" "$venv/lorkd-unfinished"
  "$python" -m venv "$venv" || fail "$python cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv"
elif [ -e "$venv/lorkd-made-here" ]; then
  touch "$venv/lorkd-unfinished"
fi
python=$venv/bin/python
"$python" -c "$works" || fail "$venv runs $("$python" -V); Python 3.10 to 3.12 is needed. Delete it, or name another in LORKD_VENV"

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
say "installing torch, then lorkd-monai[$extras] (a few minutes the first time)"
torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$root/constraints.txt")
pip install -qq "$torch"
pip install -qq -c "$root/constraints.txt" -e "$root[$extras]"
case $extras in
  *test* | *dev*)
    # nnU-Net's networks, without what they depend on: torchvision is among it, which asks for a torch with CUDA.
    networks=$(sed -n 's/^\(dynamic-network-architectures==[^ ;]*\).*/\1/p' "$root/constraints.txt")
    pip install -qq --no-deps "$networks"
    ;;
esac
rm -f "$venv/lorkd-unfinished"
printf '%s' "$wanted $root" > "$stamp"
say "done: $venv"
