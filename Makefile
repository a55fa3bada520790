# Baton. `make` lists what there is to do; `make demo` is the place to start.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MODELS := .models
MODEL  := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
BATON  := target/release/baton
BENCH  ?= first-light

export BATON_MODELS := $(abspath $(MODELS))

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: model ## install what is missing, fetch the model, build, start a cluster, answer a prompt, show what went where
	scripts/demo $(BATON)

.PHONY: up
up: build ## start a cluster here and keep it running until Ctrl-C (ARGS="--prefill 2 --decode 2")
	$(BATON) up $(ARGS)

.PHONY: test
test: setup .venv/stamp ## everything that must hold: formatting, lints, unit, property, model and whole-cluster tests
	scripts/setup tests
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo build --locked -p baton
	target/debug/baton model fetch
	BATON_PYTHON=$(abspath .venv/bin/python) BATON_NVRTC=1 \
		LD_LIBRARY_PATH="$$(echo $(abspath .venv)/lib/python3*/site-packages/nvidia/cu13/lib)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" \
		cargo test --workspace --locked

.PHONY: test-aarch64
test-aarch64: setup ## build for aarch64, and run the kernels' tests there under qemu (not part of `make test`)
	scripts/test-aarch64

.PHONY: lint
lint: setup ## formatting, clippy, and cargo-deny where it is installed (licences, sources, duplicates)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; \
	else echo "cargo-deny is not installed (cargo install --locked cargo-deny): licences and sources were not checked"; fi

.PHONY: bench
bench: model ## measure and print a table (BENCH=first-light, cpu-engine or handoff), peers and limits in the same run
	scripts/bench $(BENCH)

.PHONY: goldens
goldens: model .venv-goldens/stamp ## make the committed golden data anew, from llama.cpp and transformers
	.venv-goldens/bin/python tests/goldens/make_tokens.py $(MODEL)
	.venv-goldens/bin/python tests/goldens/make_logits.py $(MODEL)
	.venv-goldens/bin/python tests/goldens/make_blocks.py
	.venv-goldens/bin/python tests/goldens/make_sampler.py
	.venv-goldens/bin/python tests/goldens/make_tiny.py
	.venv-goldens/bin/python tests/goldens/make_text.py

.PHONY: clean
clean: ## remove what was built (the model and the virtual environments stay)
	cargo clean

.PHONY: build
build: setup
	cargo build --release --locked -p baton

.PHONY: setup
setup:
	@scripts/setup

.PHONY: model
model: build
	$(BATON) model fetch

# Python clients that the tests run against the cluster.
.venv/stamp: tests/requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# llama.cpp, built natively: the peer of the benchmarks, never needed by `make test`.
.venv-llama/stamp: tests/requirements-llama.txt
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet --disable-pip-version-check cmake ninja
	PATH="$(abspath .venv-llama/bin):$$PATH" CMAKE_ARGS="-DGGML_NATIVE=ON" \
		.venv-llama/bin/pip install --quiet --disable-pip-version-check -r tests/requirements-llama.txt
	touch $@

# NIXL and Mooncake: peers of the handoff benchmark, never needed by `make test`. Without what they depend on and do not import here.
.venv-transfer/stamp: tests/requirements-transfer.txt
	$(PYTHON) -m venv .venv-transfer
	.venv-transfer/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-transfer.txt
	touch $@

# llama.cpp and transformers: what the goldens are made from.
.venv-goldens/stamp: tests/requirements-goldens.txt
	$(PYTHON) -m venv .venv-goldens
	.venv-goldens/bin/pip install --quiet --disable-pip-version-check -r tests/requirements-goldens.txt
	touch $@
