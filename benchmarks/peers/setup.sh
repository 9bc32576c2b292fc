#!/bin/sh
# The peers that speed.py compares with, each in a virtual environment of its own, in the pinned versions beside this script.
#
#   benchmarks/peers/setup.sh [DIRECTORY]        (default: runs/peers; about 1.6 GB each)
#
# PYTHON: the interpreter, 3.11 or newer. TORCH_INDEX: where pip looks for torch besides its usual index; on Linux the usual index may have
# the CUDA build, and then  TORCH_INDEX=https://download.pytorch.org/whl/cpu  gets the one for processors.
# An environment that is complete is left alone. What pip says is kept in DIRECTORY/NAME.install.log.
set -u
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$here/../../runs/peers}
python=${PYTHON:-python3}
failed=0
mkdir -p "$target"

install() {
    "$python" -m venv --clear "$target/$1" || return 1
    pip="$target/$1/bin/python -m pip"
    # torch first and by itself, so that the resolver finds it there and never considers another build of it.
    $pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch==2.13.0 || return 1
    $pip install -r "$here/$1.txt" || return 1
    if $pip list --format=freeze | grep -i -E '^(nvidia-c|triton)'; then
        echo "a CUDA build of torch came in; set TORCH_INDEX=https://download.pytorch.org/whl/cpu"
        return 1
    fi
    cp "$here/$1.txt" "$target/$1/pinned.txt"
}

for name in llmcompressor gptqmodel; do
    if cmp -s "$here/$name.txt" "$target/$name/pinned.txt"; then
        continue
    fi
    echo "installing $name into $target/$name"
    if ! install "$name" > "$target/$name.install.log" 2>&1; then
        echo "$name: not installed; the end of $target/$name.install.log:" >&2
        tail -n 5 "$target/$name.install.log" >&2
        rm -f "$target/$name/pinned.txt"
        failed=1
    fi
done
exit $failed
