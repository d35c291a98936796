# What people type, and what CI runs.

CARGO ?= cargo
RELEASE := target/release

.PHONY: help demo build test lint bench clean-demo

help: ## What there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## The optimised programs, in target/release
	@.ci/packages build
	$(CARGO) build --release --locked -p cli -p ztunnel

demo: ## The mesh at work on this machine, in six steps (root); ARGS="--keep" leaves it up
	@.ci/packages demo
	$(CARGO) build --release --locked -p cli -p ztunnel
	@$(RELEASE)/culvert demo $(ARGS)

clean-demo: ## Clears what `make demo ARGS=--keep`, or one that was killed, left
	@$(RELEASE)/culvert demo --clean

test: ## All tests; those of namespaces and capture need root, without it they are skipped and say so
	@.ci/test

lint: ## Format, clippy and the dependencies' rules, as CI checks them
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@.ci/dependencies

bench: ## Measures the tunnel beside the direct path and writes bench/results (root, half an hour)
	@.ci/packages demo
	$(CARGO) build --profile dist --locked -p cli -p ztunnel
	@target/dist/culvert bench --out bench/results $(ARGS)
