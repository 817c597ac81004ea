#!/usr/bin/env bash
# ./run.sh help lists what it starts. Everything runs in the environment that is active, or in .venv beside this
# file, which is made at the first call.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name="${1:-demo}"

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

help() {
    cat <<'TEXT'
./run.sh                     the demo: the whole method in a small world whose noise is known, 3 to 5 minutes
./run.sh --model M --data rows.jsonl --reference-data trusted.jsonl --out RUN
                             the method on your rows (forgetting.py; --help lists its options and methods)
./run.sh NAME ...            one of these; ./run.sh NAME --help says more

test             the tests, on all cores; what follows goes to a single pytest
demo             the demo with other seeds, methods or options
plain            Algorithm 1 in a hundred plain lines, on your rows
look             a page with every token of a run and its Q, or a run's rows in order of Q
eval             benchmarks, your own questions, or answers side by side (eval.py)
publish          a trained adapter, or the model with it merged in, ready for the Hub
get_data         benchmarks and public instruction rows
ablations        the paper's ablations in the demo's world
real_run         the method on a real model and real rows whose noise is known
reference_steps  how hard the reference should be trained, in both worlds
bench            speed and memory beside transformers, PEFT, TRL and lm-evaluation-harness
gpu_check        the comparisons that only a GPU can make, and its speed
TEXT
}

# The lines of requirements.txt that the environment does not satisfy
lacking() {
    python - "$root/requirements.txt" <<'PYTHON'
import sys
from importlib import metadata

for requirement in open(sys.argv[1]).read().split():
    name, wanted = requirement.split("==")
    try:
        here = metadata.version(name)
    except metadata.PackageNotFoundError:
        here = ""
    if here.partition("+")[0] != wanted:  # 2.13.0+cpu is a build of 2.13.0
        print(requirement)
PYTHON
}

# What pip would replace in the environment, others' requirements included: lines of "NAME 1.0 -> 2.0"
would_replace() {
    local report
    report="$(python -m pip install --dry-run --quiet --disable-pip-version-check --report - -r "$root/requirements.txt")"
    python -c '
import json, sys
from importlib import metadata

for change in json.load(sys.stdin)["install"]:
    name, wanted = change["metadata"]["name"], change["metadata"]["version"]
    if name == "setuptools":
        continue  # every new environment has one, older than torch asks for
    try:
        print(name, metadata.version(name), "->", wanted)
    except metadata.PackageNotFoundError:
        pass  # new there
' <<<"$report"
}

check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
    fail "$("$1" --version 2>&1) is too old: 3.11 or newer is needed ($2)"
}

prepare() {
    local environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [ -n "$environment" ]; then
        check_python python "deactivate $environment, and name another with PYTHON=/path/to/python3 ./run.sh"
    else
        environment="$root/.venv"
        if [ ! -f "$environment/bin/activate" ]; then
            check_python "${PYTHON:-python3}" "PYTHON=/path/to/python3 ./run.sh"
            rm -rf "$environment"
            "${PYTHON:-python3}" -m venv "$environment"
        fi
        source "$environment/bin/activate"
    fi

    local missing replaced
    missing="$(lacking)"
    [ -n "$missing" ] || return 0
    if [ "$environment" != "$root/.venv" ]; then
        replaced="$(would_replace)"
        if [ -n "$replaced" ]; then
            echo "run.sh: in $environment, which is active, these would be replaced:" >&2
            sed 's/^/  /' <<<"$replaced" >&2
            echo "Nothing was changed. Deactivate it (deactivate, conda deactivate), and ./run.sh makes a .venv beside itself;" >&2
            fail "or change it yourself: python -m pip install -r $root/requirements.txt"
        fi
    fi
    echo "installing into $environment, once: $(tr '\n' ' ' <<<"$missing")"
    if grep -q '^torch' <<<"$missing"; then
        echo "(a build of torch with CUDA takes several gigabytes; where a CPU build is installed already, it stays)"
    fi
    python -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
}

# A program that knows ranks: under torchrun where there are several GPUs
launch() {
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -gt 1 ]; then
        exec torchrun --standalone --nproc_per_node="$gpus" "$@"
    fi
    exec python "$@"
}

case "$name" in
help)
    help
    exit
    ;;
-* | test | plain | eval | demo | look | get_data | publish | ablations | real_run | reference_steps | bench | gpu_check) ;;
*) fail "'$name' is none of its names: ./run.sh help lists them (options of a run begin with --)" ;;
esac
prepare
export THP_MEM_ALLOC_ENABLE=1 # large buffers in huge pages: 5 to 10 % faster on a CPU
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}" # threads that wait leave their core to others, after microseconds
case "$name" in
-*) launch "$root/forgetting.py" "$@" ;;
test)
    [ $# -gt 1 ] || exec python "$root/tests/suite.py"
    exec python -m pytest -q "$root/tests" "${@:2}"
    ;;
plain) exec python "$root/tests/plain.py" "${@:2}" ;;
eval) launch "$root/eval.py" "${@:2}" ;;
*) exec python "$root/tests/tools/$name.py" "${@:2}" ;;
esac
