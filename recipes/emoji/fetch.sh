#!/bin/bash
# Fetch and unpack the npm packages of packages.txt and WordNet 3.0 from Debian; nothing is installed.
#   usage: bash fetch.sh RAW_FOLDER        (needs npm, apt-get and dpkg; 0.4 GB on disk, less than a minute)
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
while read -r package; do
  file=$(npm pack --silent "$package" </dev/null)
  mkdir -p "${file%.tgz}"
  tar xzf "$file" -C "${file%.tgz}" --strip-components=1
  rm "$file"
  echo "${file%.tgz}"
done < "$HERE/packages.txt"
apt-get download -qq wordnet-base
dpkg -x wordnet-base_*.deb wordnet
rm wordnet-base_*.deb
echo wordnet
