#!/usr/bin/env bash
# What only a GPU can show, in one go: the tests marked gpu, then benchmarks/gpu.py. `make gpu-check`.
#
#   VENV=.venv-gpu      the environment; it sees the packages of python3 (torch, TensorRT), or of PYTHON
#   WHEELS=FOLDER       install these wheels and nothing else, for a machine without a network
#   PACKAGES="..."      what to install beside mmedge where there is a network
#   MINUTES=N           let the benchmark begin nothing new after N minutes; what it did not reach
#                       is noted in gpu.json
#   OUT=FOLDER          where doctor.txt, tests.txt, gpu.json and gpu.txt go
#
# Every stage runs, whatever became of the one before; one that fails makes the exit code non-zero.
set -uo pipefail
cd "$(dirname "$0")/.."
source checks/environment.sh

venv=${VENV:-.venv-gpu}
out=${OUT:-gpu-check-output}
packages=${PACKAGES:-"onnxruntime-gpu[cuda,cudnn] tensorrt-cu13 tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs cuda-bindings>=13,<14"}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L; then
    echo "gpu-check: nvidia-smi finds no GPU here. Run this on the machine that has one." >&2
    exit 1
fi
mkdir -p "$out"

python=$venv/bin/python
pip=("$python" -m pip --quiet --disable-pip-version-check)
if [[ ! -x $python ]]; then
    environment "$venv" || exit 1
fi
if [[ -n ${WHEELS:-} ]]; then
    "${pip[@]}" install --no-index --no-deps "$WHEELS"/*.whl || exit 1
    "${pip[@]}" install --no-deps --no-build-isolation --editable . || exit 1
elif [[ ! -e $venv/.installed ]]; then
    "${pip[@]}" install --editable ".[convert,dev]" || exit 1
    read -ra wanted <<<"$packages"
    for package in "${wanted[@]}"; do # one that is not to be had must not keep the others away
        "${pip[@]}" install "$package" || echo "gpu-check: $package cannot be installed"
    done
    touch "$venv/.installed"
fi

failed=()
stage() { # NAME FILE COMMAND...
    local name=$1 file=$out/$2
    shift 2
    echo "== $name"
    "$@" 2>&1 | tee "$file"
    ((PIPESTATUS[0] == 0)) || failed+=("$name")
}

stage doctor doctor.txt "$venv/bin/mmedge" doctor
stage tests tests.txt "$python" -m pytest -m gpu -ra --confcutdir=tests/runtimes \
    tests/runtimes/test_session_contract.py tests/runtimes/test_state_contract.py \
    tests/runtimes/cuda/test_cuda_runtime.py \
    tests/runtimes/trt/test_trt_gpu.py
stage benchmark gpu.txt "$python" benchmarks/gpu.py --require --output "$out/gpu.json" \
    ${MINUTES:+--minutes "$MINUTES"}

if ((${#failed[@]})); then
    echo "== gpu-check: FAILED: ${failed[*]}; see $out/"
    exit 1
fi
echo "== gpu-check: all of it ran; see $out/, and date the rows of docs/gpu-checks.md that were seen"
