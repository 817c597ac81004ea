#!/usr/bin/env bash
# ./run.sh                                     the whole method on the embedded demo; prints its table
# ./run.sh demo --seeds 3 4                    the same with other flags
# ./run.sh test                                the tests
# ./run.sh --model M --data rows.jsonl ...     forgetting.py with these flags, under torchrun where there are several GPUs
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

export THP_MEM_ALLOC_ENABLE=1 # large buffers in huge pages: 5 to 10 % faster on a CPU
case "${1:-demo}" in
test) exec python -m pytest -q "$root/tests" "${@:2}" ;;
demo) exec python "$root/tests/tools/demo.py" "${@:2}" ;;
esac
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node="$gpus" "$root/forgetting.py" "$@"
fi
exec python "$root/forgetting.py" "$@"
