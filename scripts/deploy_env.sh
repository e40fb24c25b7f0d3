#!/usr/bin/env bash
# Makes the environment that runs experts with the MONAI Deploy App SDK, once; Linux on x86-64 or aarch64.
#
#   bash scripts/deploy_env.sh [FOLDER]     default: .venv-deploy in the checkout
#
# PYTHON  the interpreter to make it with (default: the first of python3.11, 3.12, 3.10, python3 that works)
#
# Safe to repeat (nothing happens when it is up to date). Prints the folder at the end.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/tool_env.sh"
make_env deploy "${1:-$root/.venv-deploy}" "torch==2.13.0" "monai==1.6.1" "pydicom==3.0.2" "setuptools<81"
# The SDK declares neither monai nor highdicom, SimpleITK, nibabel and pyyaml, but the application needs them.
finish_env "import SimpleITK, highdicom, monai.bundle, monai.deploy.core, monai.deploy.operators, nibabel, yaml, PIL" \
  "monai-deploy-app-sdk==4.0.0" "holoscan-cu13==4.6.0" "monai==1.6.1" "pydicom==3.0.2" highdicom SimpleITK nibabel \
  pillow pyyaml
