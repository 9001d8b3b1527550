# make serve   build, serve the example projects on 127.0.0.1:8080 (or PORT=…), say what to try
# make test    everything that must pass before a change lands
# make replay  of these, QGIS's own tests of its server alone: each request sent to qgisserver
# make soak    faults and loads for longer: a million requests, minutes of fuzzing
# make bench   in-process QGIS, nginx + FastCGI and qgisserver, side by side
#
# All of them work on a fresh Debian 12 with a Rust toolchain, as root or as a
# user with sudo: Debian packages that are missing are installed.

# QGIS is Debian's, so its Python must be too, whatever `python3` is first on PATH.
export PYO3_PYTHON := /usr/bin/python3
export PATH := $(PATH):$(HOME)/.cargo/bin

BUILD := gcc make pkg-config python3-dev
QGIS  := python3-qgis python3-gdal qgis-server qgis-providers
# What QGIS's source is packed with.
PACK  := xz-utils bzip2
# Where projects and layers are, too.
DATA  := postgresql postgresql-postgis
TEST  := procps systemd supervisor slowhttptest $(DATA) $(PACK)
BENCH := nginx-light spawn-fcgi

.PHONY: help serve test replay soak check bench cargo

help:
	@sed -n 's/^# make/make/p' Makefile

serve: cargo
	@.ci/need $(BUILD) $(QGIS)
	cargo build --release --workspace --bins
	@sh examples/serve.sh target/release/qgisserver

# The programs first: the tests start them.
test: cargo
	@.ci/need $(BUILD) $(QGIS) $(TEST)
	@$(PYO3_PYTHON) -c 'import qgis.server' || { echo 'QGIS does not load in $(PYO3_PYTHON)' >&2; exit 1; }
	cargo build --workspace --bins
	@$(MAKE) --no-print-directory check
	cargo test --workspace
	@.ci/fuzz 10
	@.ci/replay --within 900 --tries 2

replay: cargo
	@.ci/need $(BUILD) $(QGIS) $(DATA) $(PACK)
	cargo build --workspace --bins
	tests/replay/replay.py

# One test at a time: each wants the whole machine.
soak: cargo
	@.ci/need $(BUILD) $(QGIS) procps slowhttptest
	cargo build --release --workspace --bins
	HISTORY_REQUESTS=1000000 HISTORY_SECONDS=60 cargo test --release --test history --test overload -- --nocapture --test-threads=1
	@.ci/fuzz 120

# rustfmt and clippy are optional parts of a toolchain.
check:
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else echo 'no rustfmt here: layout not checked'; fi
	@if cargo clippy --version >/dev/null 2>&1; then cargo clippy --workspace --all-targets -- -D warnings; else echo 'no clippy here: not linted'; fi

bench: cargo
	@.ci/need $(BUILD) $(QGIS) $(BENCH)
	cargo build --release --workspace --bins
	cargo bench --bench compare

cargo:
	@command -v cargo >/dev/null || { echo 'cargo not found: install Rust for this user (sudo is called where it is needed)' >&2; exit 1; }
