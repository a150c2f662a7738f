#!/usr/bin/env bash
# Runs every test, and installs what they need: checks of form, unit and service tests, then real browsers.
# With --containers also those that run docker-compose.yml in a Docker Engine, and the Debian package on a machine that systemd
# has booted: twenty minutes more.
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in
  "") ;;
  --containers) export HOMEPORT_CONTAINERS=1 ;;
  *) echo "usage: ./test.sh [--containers]" >&2; exit 2 ;;
esac

step() { printf '\n== %s\n' "$*"; }

# Debian's packages: Chromium and Firefox for the pages, Prometheus for the dashboards, coturn for its client of TURN,
# OpenSSL and pebble for certificates, iproute2, iptables and conntrack for networks of a test's own, Python for aioice.
missing=()
command -v turnutils_uclient >/dev/null || missing+=(coturn)
command -v openssl >/dev/null || missing+=(openssl)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
[ -x /usr/bin/chromium ] || missing+=(chromium)
[ -x /usr/bin/firefox-esr ] || missing+=(firefox-esr)
command -v conntrack >/dev/null || missing+=(conntrack)
command -v curl >/dev/null || missing+=(curl)
command -v ip >/dev/null || missing+=(iproute2)
command -v iptables >/dev/null || missing+=(iptables)
command -v nats-server >/dev/null || missing+=(nats-server)
command -v pebble >/dev/null || missing+=(pebble)
command -v prometheus >/dev/null && command -v promtool >/dev/null || missing+=(prometheus)
if [ -n "${HOMEPORT_CONTAINERS:-}" ]; then
  [ -x /usr/sbin/dockerd ] && [ -x /usr/bin/docker ] || missing+=(docker.io)
  [ -x /usr/sbin/debootstrap ] || missing+=(debootstrap)
  [ -x /usr/bin/caddy ] || missing+=(caddy)
  [ -x /usr/bin/systemd-nspawn ] || missing+=(systemd-container)
fi
if [ ${#missing[@]} -gt 0 ]; then
  step "installing ${missing[*]}"
  if [ "$(id -u)" != 0 ]; then
    echo "these Debian packages are missing: ${missing[*]}. Install them: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ -n "${HOMEPORT_CONTAINERS:-}" ] && ! command -v cargo-deb >/dev/null; then
  step "installing cargo-deb"
  cargo install --quiet --locked cargo-deb@3.8.0
fi

step "form"
cargo fmt --all --check
cargo clippy --workspace --all-targets --locked -- --deny warnings

if command -v cargo-deny >/dev/null; then
  # Advisories need a database from the network: cargo deny check has them.
  cargo deny --offline --log-level error check licenses bans sources
else
  echo "licences and sources of dependencies: skipped, there is no cargo-deny (cargo install --locked cargo-deny@0.20.2)"
fi

step "unit and service tests"
cargo test --workspace --locked

step "deployment files"
promtool check config deploy/prometheus/prometheus.yml
promtool check config --syntax-only deploy/cluster/prometheus.yml
promtool test rules deploy/prometheus/rules.test.yml
if command -v systemd-analyze >/dev/null; then
  # Of what systemd knows to restrict, a tenth to two tenths is what a network service needs.
  systemd-analyze security --offline=true --threshold=20 --no-pager deploy/systemd/homeport.service | tail -n 1
else
  echo "the systemd units: skipped, there is no systemd-analyze"
fi

step "browsers"
cargo build --locked --package homeport
cd e2e
npm ci --no-audit --no-fund
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
.venv/bin/python ../grafana/make-alerts.py --check
.venv/bin/docker-compose --file ../docker-compose.yml --profile bridge --profile proxy config --quiet
HOMEPORT_CLUSTER__PASSWORD=x NATS_ROUTE_PASSWORD=x HOMEPORT_TURN__SECRET=x .venv/bin/docker-compose \
  --file ../docker-compose.yml --file ../deploy/cluster/docker-compose.yml --env-file ../deploy/cluster/env.example \
  --profile watch config --quiet
.venv/bin/hadolint ../deploy/Dockerfile
# Of what is loaded into real browsers, one file at a time: they share two cores.
node --test --test-concurrency=1 --test-reporter=spec
