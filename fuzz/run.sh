#!/usr/bin/env bash
# Runs each fuzz target for a while: `fuzz/run.sh [SECONDS [TARGET…]]`, 60 seconds each by default.
# Works with the stable toolchain (coverage only, no sanitizer); what it finds lands in fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true

if ! cargo fuzz --version >/dev/null 2>&1; then
    cargo install cargo-fuzz --version 0.13.2 --locked
fi
for target in "${@:-$(cargo fuzz list)}"; do
    for one in $target; do
        echo "== $one"
        # New inputs stay out of the tree: the corpus here holds only what was put there by hand.
        mkdir -p "fuzz/target/corpus/$one"
        cargo fuzz run --sanitizer none "$one" "fuzz/target/corpus/$one" "fuzz/corpus/$one" -- \
            -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1
    done
done
