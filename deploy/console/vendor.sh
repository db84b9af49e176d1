#!/usr/bin/env bash
# Fetches what the console takes from npm, by name and version, and checks it against the hashes that are kept here.
#
#   deploy/console/vendor.sh          fetch, check, replace the vendored files
#   deploy/console/vendor.sh accept   fetch, and keep the hashes of what came: after a version below has changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly PREACT=10.29.8 HTM=3.1.1 UPLOT=1.6.32
readonly VENDOR=server/gateway/routes/console/static/vendor
readonly HASHES=SHA256SUMS

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
  local made=$fetched/vendor
  fetch preact "$PREACT"
  fetch htm "$HTM"
  fetch uplot "$UPLOT"
  mkdir "$made"
  without_map "$fetched/preact/dist/preact.module.js" >"$made/preact.js"
  # A browser resolves no bare names, and an import map would be an inline script.
  without_map "$fetched/preact/hooks/dist/hooks.module.js" | sed 's|from"preact"|from"./preact.js"|' >"$made/hooks.js"
  cp "$fetched/htm/dist/htm.module.js" "$made/htm.js"
  # The package's own module is not minified, at three times the size.
  { cat "$fetched/uplot/dist/uPlot.iife.min.js" && echo && echo 'export default uPlot;'; } >"$made/uplot.js"
  cp "$fetched/uplot/dist/uPlot.min.css" "$made/uplot.css"
  local name
  for name in preact htm uplot; do cp "$fetched/$name/LICENSE" "$made/$name.LICENSE"; done
  if [[ ${1:-} == accept ]]; then
    (cd "$made" && sha256sum -- * >"$HASHES")
  else
    cp "$VENDOR/$HASHES" "$made/"
    (cd "$made" && sha256sum --check --strict --quiet "$HASHES")
  fi
  mkdir -p "$VENDOR"
  cp "$made"/* "$VENDOR/"
  echo "preact $PREACT, htm $HTM and uPlot $UPLOT are in $VENDOR"
}

main "$@"
