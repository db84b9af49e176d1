#!/usr/bin/env bash
# Fetches what the console takes from npm, by name and version, and checks it against the hashes that are kept here.
#
#   deploy/console/vendor.sh          fetch, check, replace the vendored files
#   deploy/console/vendor.sh accept   fetch, and keep the hashes of what came: after a version below has changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly PREACT=10.29.8 HTM=3.1.1
readonly CONSOLE=server/gateway/routes/console
readonly HASHES=vendored.sha256

fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT

# Unpacks one package into a folder of its name.
fetch() {
  mkdir "$fetched/$1"
  (cd "$fetched" && npm pack --silent "$1@$2" >/dev/null && tar -xzf "$1-$2.tgz" -C "$1" --strip-components=1)
}

without_map() {
  sed '/^\/\/# sourceMappingURL=/d' "$1"
}

main() {
  local made=$fetched/made name
  fetch preact "$PREACT"
  fetch htm "$HTM"
  mkdir -p "$made/static/vendor" "$made/licences"
  without_map "$fetched/preact/dist/preact.module.js" >"$made/static/vendor/preact.js"
  # A browser resolves no bare names, and an import map would be an inline script.
  without_map "$fetched/preact/hooks/dist/hooks.module.js" | sed 's|from"preact"|from"./preact.js"|' \
    >"$made/static/vendor/hooks.js"
  cp "$fetched/htm/dist/htm.module.js" "$made/static/vendor/htm.js"
  for name in preact htm; do cp "$fetched/$name/LICENSE" "$made/licences/$name.txt"; done
  if [[ ${1:-} == accept ]]; then
    (cd "$made" && sha256sum licences/* static/vendor/* >"$HASHES")
  else
    cp "$CONSOLE/$HASHES" "$made/"
    (cd "$made" && sha256sum --check --strict --quiet "$HASHES")
  fi
  cp -R "$made/." "$CONSOLE/"
  echo "preact $PREACT and htm $HTM are in $CONSOLE/static/vendor"
}

main "$@"
