#!/usr/bin/env bash
# Runs a bundle in a new environment that holds only the packages which its metadata.json names, as the model zoo's
# CI does: what is missing there is missing on a user's machine.
#
#   bash scripts/clean_env_check.sh BUNDLE IMAGES [VENV]
#
# IMAGES  an image or a folder of images
# VENV    where the environment is made (default: a temporary folder, removed at the end); kept and used again if named
# PYTHON  the interpreter to make it with (default: python3)
set -euo pipefail
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
[ $# -ge 2 ] || fail "expected BUNDLE and IMAGES: bash scripts/clean_env_check.sh BUNDLE IMAGES [VENV]"
bundle=$(cd "$1" && pwd) || fail "no bundle at $1"
[ -e "$2" ] || fail "no image or folder at $2"
images=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${3:-$work/venv}
[ "${venv#/}" != "$venv" ] || venv=$PWD/$venv

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
"$python" - "$bundle/configs/metadata.json" > "$work/requirements.txt" <<'PY'
import json, sys
meta = json.load(open(sys.argv[1], encoding="utf-8"))
pins = {"torch": meta["pytorch_version"], "monai": meta["monai_version"], "numpy": meta["numpy_version"]}
for name, version in {**pins, **meta["required_packages_version"]}.items():
    print(f"{name}=={version}")
PY
echo "packages: $(tr '\n' ' ' < "$work/requirements.txt")" >&2
# torch by itself first: beside an open range of another package pip may choose a build with gigabytes of CUDA.
"$python" -m pip install -q --disable-pip-version-check "$(head -1 "$work/requirements.txt")" || exit 3
"$python" -m pip install -q --disable-pip-version-check -r "$work/requirements.txt" || exit 3

cd "$work"
PYTHONPATH= "$python" -c 'import lorkd_monai' 2>/dev/null && fail "lorkd_monai is installed in $venv: name another environment"
PYTHONPATH= "$python" -W ignore -m monai.bundle run --bundle_root "$bundle" \
  --config_file "$bundle/configs/inference.json" --dataset_dir "$images" --output_dir "$work/out" > "$work/log" 2>&1 \
  || { cat "$work/log" >&2; fail "the bundle does not run with only the packages of its metadata.json"; }
[ -n "$(ls -A "$work/out" 2>/dev/null)" ] || { cat "$work/log" >&2; fail "the bundle ran and wrote nothing"; }
echo "ok: $(basename "$bundle") runs with only the packages of its metadata.json and wrote: $(ls "$work/out" | tr '\n' ' ')"
