#!/usr/bin/env bash
# From nothing to expert bundles, on synthetic images: makes the environment, draws phantoms of several tasks, trains
# a small teacher, decomposes it, writes one expert bundle per task, and runs one of them on an image.
#
#   bash scripts/demo.sh [FOLDER]     FOLDER for everything it writes; default: demo_output in the checkout
#
# Under 5 minutes on 2 CPU cores once the packages are installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/demo_output}
mkdir -p "$(dirname "$out")"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
if [ -e "$out/made-by-the-demo" ]; then
  rm -rf "$out"
elif [ -n "$(ls -A "$out" 2>/dev/null)" ]; then
  echo "error: $out is not empty and not from an earlier demo; name another folder: bash scripts/demo.sh FOLDER" >&2
  exit 1
fi

bash "$root/scripts/setup.sh" "${LORKD_DEMO_EXTRAS:-tensorboard}"
venv=${LORKD_VENV:-$root/.venv}
python=$(cd "$venv" && pwd)/bin/python
bundle=$root/bundles/lorkd_2d_classification
data=$out/phantoms
mkdir -p "$out"
touch "$out/made-by-the-demo"
cd "$out"
started=$SECONDS
step() { printf '\n== %s  (%d s)\n' "$1" $((SECONDS - started)); }
bundle_run() {
  "$python" -m monai.bundle run "$1" --bundle_root "$bundle" --config_file "$bundle/configs/train.yaml" \
    --dataset_dir "$data" --output_dir "$out/run" --image_size 32 --batch_size 32 "${@:2}"
}

step "1/5 drawing phantoms: several tasks that look like different modalities"
"$python" -c 'import sys; from lorkd_monai.data.phantoms import make_phantoms; make_phantoms(sys.argv[1], "classification", 2)' "$data"

step "2/5 pretraining: a teacher for all tasks at once"
bundle_run pretraining --pretrain_epochs 8

step "3/5 training: ONE training decomposes it; an expert bundle per task comes out"
bundle_run training --max_epochs 10

step "4/5 evaluating: every expert on the test split of its task"
bundle_run evaluating

# The first test image that is a file of its own (some tasks keep theirs in one .npz), and the expert of its task.
{ read -r image; read -r task; } < <("$python" - "$data" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
item = json.loads((folder / "dataset.json").read_text())["test"][0]
print(folder / item["image"], item["task"], sep="\n")
PYTHON
)
expert=$out/run/experts/${task}_classification
step "5/5 one expert by itself, with stock MONAI: $(basename "$expert") on $(basename "$image")"
"$python" -m monai.bundle run --bundle_root "$expert" --config_file "$expert/configs/inference.json" \
  --dataset_dir "$image" --output_dir "$out/prediction"
cat "$out/prediction/predictions.csv"

cat <<END

Done in $((SECONDS - started)) s. Everything lies in $out
  phantoms/             the images and their data list dataset.json
  run/                  the teacher, checkpoints, logs and figures
  run/experts/          one MONAI bundle per task:
$(find "$out/run/experts" -mindepth 1 -maxdepth 1 -type d | sort | sed 's|.*/|                          |')
  prediction/           what the expert said about one image

Next: look into one expert,        $python -m lorkd_monai inspect $out/run
      or decompose on your images, see README.md
END
