#!/usr/bin/env bash
# Builds the Debian package into target/debian. Needs cargo-deb: cargo install cargo-deb --version 3.8.0 --locked
#
#   deploy/debian/build.sh                        what is meant to be installed
#   deploy/debian/build.sh --profile dev --fast   for a test: what `cargo build` makes; further words go to cargo deb
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=release
[ "${1:-}" != --profile ] || profile=$2
target=${CARGO_TARGET_DIR:-target}
cargo build --profile "$profile" --locked --package homeport
# Cargo keeps what the profile dev makes in a folder of another name.
homeport=$target/${profile/#dev/debug}/homeport
made=target/package
rm -rf "$made"
mkdir -p "$made/man"
"$homeport" manual "$made/man"
gzip -9n "$made"/man/*.1
for shell in bash zsh fish; do "$homeport" completions "$shell" > "$made/homeport.$shell"; done
cargo deb --no-build --package homeport "$@"
