#!/bin/bash
# Everything that needs a GPU, in one go: installs, says what is there, tests the kernels, compares, times. From the repository's root:
#   bash benchmarks/gpu.sh            about 15 minutes on one device of 80 GiB; "--quick" leaves out 65,536 tokens
# It leaves runs/gpu/ with environment.json, tests.txt, gpu.json and gpu.md.
set -uo pipefail
out=runs/gpu
mkdir -p "$out"
python3 -m venv .venv
.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,gpu]' || exit 1
.venv/bin/refine-nsp env | tee "$out/environment.txt"
.venv/bin/refine-nsp env --json > "$out/environment.json" || exit 1
failed=0
.venv/bin/python -m pytest -v -rs tests/gpu 2>&1 | tee "$out/tests.txt" || failed=1
# On PyTorch's operations alone, what the kernels are compared with.
REFINE_NSP_KERNELS=torch .venv/bin/python -m pytest -q tests/ops 2>&1 | tee -a "$out/tests.txt" || failed=1
.venv/bin/python benchmarks/gpu.py --output "$out/gpu" "$@" || failed=1
echo "results: $out; $([ $failed = 0 ] && echo 'all passed' || echo 'SOMETHING FAILED, see above')"
exit $failed
