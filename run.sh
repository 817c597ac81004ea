#!/usr/bin/env bash
# ./run.sh            the whole method on the embedded demo; prints the table
# ./run.sh test       the tests
# ./run.sh --model M --data rows.jsonl ...     everything is passed on to forgetting.py (torchrun if there are more GPUs)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv
    fi
    source .venv/bin/activate
fi
if ! cmp -s requirements.txt "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}/.forgetting-requirements"; then
    echo "installing requirements.txt (once)"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}/.forgetting-requirements"
fi

if [ "${1:-}" = test ]; then
    shift
    exec python -m pytest -q tests "$@"
fi
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node="$gpus" forgetting.py "$@"
fi
exec python forgetting.py "$@"
