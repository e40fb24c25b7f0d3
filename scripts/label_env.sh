#!/usr/bin/env bash
# Makes the environment that serves experts with MONAI Label, once. It is one of its own: Label needs pydicom 2 and
# numpy 1, MONAI Deploy pydicom 3 (scripts/deploy_env.sh).
#
#   bash scripts/label_env.sh [FOLDER]     default: .venv-label in the checkout
#
# PYTHON  the interpreter to make it with (default: the first of python3.11, 3.12, 3.10, python3 that works)
#
# Safe to repeat (nothing happens when it is up to date). Prints the folder at the end.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/tool_env.sh"
make_env label "${1:-$root/.venv-label}" "torch==2.13.0" "torchvision==0.28.*" "monai==1.6.1" "numpy==1.26.4" \
  "pydicom==2.4.5" "pynetdicom<3" "setuptools<81"

# torchvision has no build for the CPU on every index, and the ordinary one does not load beside a CPU torch: its
# compiled operators are missing. MONAI Label only wants its pictures of grids, so the names are enough. Where torch
# is a CUDA build this does nothing.
if is_new && "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  cp "$root/scripts/torchvision_on_cpu.py" "$site/lorkd_torchvision_on_cpu.py"
  echo 'import lorkd_torchvision_on_cpu' > "$site/lorkd_torchvision_on_cpu.pth"
fi
# sam2, which MONAI Label names, has its CUDA parts built on this machine unless told not to.
SAM2_BUILD_CUDA=0 finish_env "import monailabel.main, monailabel.app, monailabel.tasks.infer.bundle" \
  --no-build-isolation "monailabel==0.8.5" "monai==1.6.1" "pydicom==2.4.5"
