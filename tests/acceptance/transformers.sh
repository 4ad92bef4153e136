#!/usr/bin/env bash
# A real `transformers serve` on a CPU: transformers.sh FOLDER PORT   (FOLDER: a Hugging Face folder)
# It is the transformers of .venv; the first time FastAPI, which it asks for, is installed from PyPI into build/fastapi.
# Its model is called acceptance/NAME, NAME being the folder's: models are listed by what is in a cache of the hub.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath "${1:?a Hugging Face folder}"); port=${2:?a port}; name=$(basename "$folder")
if [ ! -e build/fastapi/.ready ]; then
  .venv/bin/python -m pip install -q --disable-pip-version-check --upgrade --target build/fastapi fastapi
  touch build/fastapi/.ready
fi
cached=build/hub/models--acceptance--$name
mkdir -p "$cached/refs" "$cached/snapshots/0"
printf 0 >"$cached/refs/main"
ln -sf "$folder"/* "$cached/snapshots/0/"
export PYTHONPATH=build/fastapi HF_HUB_CACHE=build/hub HF_HUB_OFFLINE=1
exec .venv/bin/transformers serve "acceptance/$name" --host 127.0.0.1 --port "$port" --device cpu --dtype float32
