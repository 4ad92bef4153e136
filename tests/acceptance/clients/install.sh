#!/usr/bin/env bash
# The programs that clients/ tries against an agent: Python packages into build/clients, npm's AI SDK beside them (300 MB).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); folder=$here/../../../build/clients
[ -e "$folder/.ready" ] && exit
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q --disable-pip-version-check uv  # pip itself resolves these for many minutes
"$folder/bin/uv" pip install -q --python "$folder/bin/python" -r "$here/requirements.txt"
if command -v npm >/dev/null; then
  cp "$here/package.json" "$here/ai_client.mjs" "$folder/"
  npm install --silent --no-audit --no-fund --prefix "$folder"
fi
touch "$folder/.ready"
