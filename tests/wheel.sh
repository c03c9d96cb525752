#!/bin/bash
# The package as its users get it: builds the wheel, installs it for every Python found from 3.10 to 3.13 with the newest releases of what
# it needs, and on the oldest of these Pythons with the lowest that pyproject.toml admits, and runs a short quickstart in an empty folder.
# From the repository's root: bash tests/wheel.sh
set -euo pipefail
versions=(3.10 3.11 3.12 3.13)
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
    "$work/venv/bin/python" -m pip list --format=freeze | grep -E '^(torch|transformers|accelerate|datasets|numpy)=='
    rm -rf "$work/venv" "$work/run"
}

mapfile -t pythons < <(for v in "${versions[@]}"; do python_of "$v"; done)
builder=${pythons[0]:-}
test -n "$builder" || { echo "no Python from ${versions[0]} to ${versions[-1]} found" >&2; exit 1; }
"$builder" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
wheel=$(ls "$work"/*.whl)
size=$(stat -c %s "$wheel")
echo "wheel: $size bytes"
test "$size" -lt "$limit" || { echo "more than $limit bytes" >&2; exit 1; }

for version in "${versions[@]}"; do
    python=$(python_of "$version")
    if [ -n "$python" ]; then try "$python" "Python $version, newest releases" "$wheel"; else echo "== Python $version: not found"; fi
done
mapfile -t lowest < <(unzip -p "$wheel" '*/METADATA' | sed -n 's/^Requires-Dist: \([^;]*\)$/\1/p' | sed 's/>=/==/')
try "$builder" "$("$builder" -V), lowest releases" "$wheel" "${lowest[@]}"
