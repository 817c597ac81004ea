#!/usr/bin/env bash
# ./run.sh            the whole method on the embedded demo; prints the table
# ./run.sh test       the tests
# ./run.sh --model M --data rows.jsonl ...     everything is passed on to forgetting.py (torchrun if there are more GPUs)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run.sh: Python 3.11 or newer is needed (PYTHON=/path/to/it ./run.sh)" >&2; exit 2; }
    if [ ! -f "$root/.venv/bin/activate" ]; then
        rm -rf "$root/.venv"
        "$python" -m venv "$root/.venv"
    fi
    source "$root/.venv/bin/activate"
fi
installed="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}/.forgetting-requirements"
if ! cmp -s "$root/requirements.txt" "$installed"; then
    echo "installing requirements.txt (once)"
    python -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
    cp "$root/requirements.txt" "$installed"
fi

if [ "${1:-}" = test ]; then
    shift
    exec python -m pytest -q "$root/tests" "$@"
fi
export THP_MEM_ALLOC_ENABLE=1 # large buffers in huge pages: 5 to 10 % faster on a CPU
python "$root/tests/tools/check_flags.py" forgetting.py "$@"
gpus=0
if command -v nvidia-smi >/dev/null; then # not asked of torch, which takes seconds to load
    gpus=$(nvidia-smi --list-gpus | wc -l)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    fi
fi
if [ "$gpus" -gt 1 ]; then
    exec python "$root/tests/tools/launch.py" --standalone --nproc_per_node="$gpus" "$root/forgetting.py" "$@"
fi
exec python "$root/forgetting.py" "$@"
