#!/bin/bash
# The package as its users get it: builds the wheel, installs it for every Python from 3.10 to 3.13 with the newest releases of what it
# needs, and on the oldest of these Pythons with the lowest that pyproject.toml admits, and runs a short quickstart in an empty folder.
# From the repository's root: bash tests/wheel.sh. A Python that is not here is a failure, unless WHEEL_PYTHONS names those to try:
# WHEEL_PYTHONS="3.10 3.12" bash tests/wheel.sh
set -euo pipefail
read -r -a versions <<< "${WHEEL_PYTHONS:-3.10 3.11 3.12 3.13}"
limit=12500000 # bytes of the wheel
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python_of() { # VERSION -> an interpreter that runs, or nothing
    for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if "$candidate" -c "import sys; assert '%d.%d' % sys.version_info[:2] == '$1'" 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

try() { # PYTHON NAME REQUIREMENT..
    local python=$1 name=$2
    shift 2
    echo "== $name"
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    mkdir "$work/run"
    (cd "$work/run" && OMP_NUM_THREADS=1 "$work/venv/bin/refine-nsp" quickstart --seeds 1 --steps 2 --output_dir run > log.txt 2>&1) \
        || { tail -40 "$work/run/log.txt"; exit 1; }
    test -s "$work/run/run/report.html"
    (cd "$work/run" && "$work/venv/bin/refine-nsp" pretrain --config recipes/pretrain_delta_net.yaml --dry_run > /dev/null)
    "$work/venv/bin/python" -m pip list --format=freeze | grep -E '^(torch|transformers|accelerate|datasets|numpy)=='
    rm -rf "$work/venv" "$work/run"
}

missing=()
for version in "${versions[@]}"; do test -n "$(python_of "$version")" || missing+=("$version"); done
if [ ${#missing[@]} -gt 0 ]; then
    echo "no Python ${missing[*]} here; install it, or name the versions to try: WHEEL_PYTHONS=\"3.10 3.12\"" >&2
    exit 1
fi
builder=$(python_of "${versions[0]}")
"$builder" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
wheel=$(ls "$work"/*.whl)
size=$(stat -c %s "$wheel")
echo "wheel: $size bytes"
test "$size" -lt "$limit" || { echo "more than $limit bytes" >&2; exit 1; }

for version in "${versions[@]}"; do
    try "$(python_of "$version")" "Python $version, newest releases" "$wheel"
done
mapfile -t lowest < <(unzip -p "$wheel" '*/METADATA' | sed -n 's/^Requires-Dist: \([^;]*\)$/\1/p' | sed 's/>=/==/')
try "$builder" "$("$builder" -V), lowest releases" "$wheel" "${lowest[@]}"
