#!/usr/bin/env bash
# Builds the Debian package into target/debian. Needs cargo-deb: cargo install cargo-deb --version 3.8.0 --locked
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --locked --package homeport
homeport=${CARGO_TARGET_DIR:-target}/release/homeport
made=target/package
rm -rf "$made"
mkdir -p "$made/man"
"$homeport" manual "$made/man"
gzip -9n "$made"/man/*.1
for shell in bash zsh fish; do "$homeport" completions "$shell" > "$made/homeport.$shell"; done
cargo deb --no-build --package homeport "$@"
