# Shared by label_env.sh and deploy_env.sh, which source it.
#
#   make_env NAME FOLDER PIN...   the empty environment with torch (the first pin); sets $python
#   finish_env CODE PACKAGE...    installs the packages within the pins, sees that CODE runs, and writes the stamp
#
# The stamp is written last and names what was installed: no stamp, or another one, means there is work to do.
say() { printf '[%s] %s\n' "$tool" "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

make_env() {
  tool=$1 venv=$2
  shift 2
  pins=("$@") started=$SECONDS
  mkdir -p "$(dirname "$venv")"
  venv=$(cd "$(dirname "$venv")" && pwd)/$(basename "$venv")
  if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv.lock"
    flock -n 9 || { say "another set-up of $venv is running; waiting for it"; flock 9; }
  fi
  stamp=$venv/lorkd-$tool.stamp
  wanted=$(cat "$root/scripts/${tool}_env.sh" "$root/scripts/tool_env.sh" | cksum)
  python=$venv/bin/python
  if ! is_new; then return; fi
  if [ -e "$venv/lorkd-made-here" ]; then
    rm -rf "$venv"
  elif [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    fail "$venv is there and was not made by this script; name another folder"
  fi
  local candidate interpreter=
  for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      interpreter=$candidate
      break
    fi
  done
  [ -n "$interpreter" ] || fail "no Python 3.10, 3.11 or 3.12 found; name one: PYTHON=/path/to/python3.11 bash $0"
  say "making $venv with $("$interpreter" -V); some minutes the first time"
  mkdir -p "$venv"
  touch "$venv/lorkd-made-here"
  "$interpreter" -m venv "$venv" || fail "$interpreter cannot make an environment; on Debian: apt-get install python3-venv"
  printf '%s\n' "${pins[@]}" > "$venv/lorkd-pins.txt"
  # torch by itself first, and pinned in what follows: an open range takes a build with gigabytes of CUDA.
  # Not compiled: most of what is installed is never imported, and what is gets compiled then.
  install "${pins[0]}" wheel "setuptools<81"
}

install() {
  "$python" -m pip install -qq --disable-pip-version-check --no-compile "$@" \
    || fail "pip cannot install $* into $venv; it needs a package index, through the network or a mirror"
}

is_new() { [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; }

finish_env() {
  local code=$1
  shift
  if is_new; then
    install -c "$venv/lorkd-pins.txt" "$@"
    # Also compiles what is imported, even where the shell forbids that: the first start would take a minute longer.
    (cd "$venv" && PYTHONDONTWRITEBYTECODE= PYTHONPATH= CUDA_VISIBLE_DEVICES= "$python" -W ignore -c "$code" > lorkd-check.log 2>&1) \
      || fail "what was installed into $venv does not run: $(tail -n 5 "$venv/lorkd-check.log")"
    printf '%s' "$wanted" > "$stamp"
    say "done in $((SECONDS - started)) s; $(du -sh "$venv" | cut -f1)"
  fi
  echo "$venv"
}
