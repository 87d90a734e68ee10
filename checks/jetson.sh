#!/usr/bin/env bash
# What only a Jetson can show. `make jetson-check BUNDLE=clip.mmedge`; docs/jetson-checks.md says what
# to expect of each stage.
#
#   BUNDLE=FOLDER       a bundle that a workstation converted with --target tensorrt
#   VENV=.venv-jetson   the environment; it sees the system's packages, TensorRT among them
#   OUT=FOLDER          where the output of each stage goes
#
# Every stage runs, whatever became of the one before; one that fails makes the exit code non-zero.
set -uo pipefail
cd "$(dirname "$0")/.."
source checks/environment.sh

venv=${VENV:-.venv-jetson}
out=${OUT:-jetson-check-output}
bundle=${BUNDLE:-}

if [[ ! -e /etc/nv_tegra_release ]]; then
    echo "jetson-check: there is no /etc/nv_tegra_release, so this is no Jetson. Run it there." >&2
    exit 1
fi
if [[ ! -f $bundle/manifest.json ]]; then
    echo "jetson-check: BUNDLE='$bundle' is no bundle. On a workstation:" >&2
    echo "  mmedge convert openai/clip-vit-base-patch32 --target tensorrt \\" >&2
    echo "      --precision fp32,fp16,int8 --calibration photos/ -o clip.mmedge" >&2
    echo "Copy it here, then: make jetson-check BUNDLE=clip.mmedge" >&2
    exit 1
fi
mkdir -p "$out"

# JetPack 6 has CUDA 12, JetPack 7 has CUDA 13; the bindings are to be of the same major version.
bindings="cuda-bindings>=13,<14"
toolkit=$(grep -Eom1 '"version" *: *"[0-9]+' /usr/local/cuda/version.json 2>/dev/null) # CUDA itself comes first
if [[ $toolkit == *'"12' ]]; then
    bindings="cuda-bindings>=12.9,<13"
fi

python=$venv/bin/python
if [[ ! -x $python ]]; then
    environment "$venv" || exit 1
fi
pip=("$python" -m pip --quiet --disable-pip-version-check)
# NVIDIA's own wheel of ONNX Runtime stays, where there is one.
engine=$("$python" -c "import onnxruntime" 2>/dev/null || echo "[cpu]")
"${pip[@]}" install --editable ".$engine" "onnx>=1.19" "pytest>=8.3" "pytest-timeout>=2.3" || exit 1
"${pip[@]}" install "$bindings" || exit 1

failed=()
stage() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt"
    ((PIPESTATUS[0] == 0)) || failed+=("$name")
}

mmedge=$venv/bin/mmedge
stage system cat /etc/nv_tegra_release
stage doctor "$mmedge" doctor "$bundle"
stage contract "$python" -m pytest -m gpu -ra --confcutdir=tests/runtimes \
    tests/runtimes/test_session_contract.py tests/runtimes/test_state_contract.py \
    tests/runtimes/cuda/test_cuda_runtime.py \
    tests/runtimes/trt/test_trt_gpu.py
stage plan "$mmedge" build "$bundle" --target tensorrt --plan
stage build "$mmedge" build "$bundle" --target tensorrt --layers
stage again "$mmedge" build "$bundle" --target tensorrt
stage cache "$mmedge" cache list
stage verify "$mmedge" verify "$bundle" --device gpu --backend tensorrt
stage profile "$mmedge" profile "$bundle" --device gpu --backend tensorrt --json "$out/profile.json"

if ((${#failed[@]})); then
    echo "== jetson-check: FAILED: ${failed[*]}; see $out/ and docs/jetson-checks.md"
    exit 1
fi
echo "== jetson-check: all of it ran; compare $out/ with docs/jetson-checks.md"
