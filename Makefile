# What people type, and what CI runs.

CARGO ?= cargo
RELEASE := target/release
# Namespaces need root; building does not.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help demo build images test test-node interop e2e conformance lint bench bench-control-plane bench-waypoint clean-demo

help: ## What there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## The optimised programs, in target/release
	@$(SUDO) .ci/packages build
	$(CARGO) build --release --locked -p cli -p ztunnel -p waypoint

demo: ## The mesh at work on this machine, in seven steps; ARGS="--keep" leaves it up
	@$(SUDO) .ci/packages demo
	$(CARGO) build --release --locked -p cli -p ztunnel -p waypoint
	@$(SUDO) $(RELEASE)/culvert demo $(ARGS)

clean-demo: ## Clears what `make demo ARGS=--keep`, or one that was killed, left
	@$(SUDO) $(RELEASE)/culvert demo --clean

test: ## All tests; those of namespaces and capture need root, without it they are skipped and say so
	@.ci/test

test-node: ## Two nodes with real traffic and faults, by the real ztunnel (root, a minute)
	@.ci/packages test
	$(CARGO) test --locked -p ztunnel --test node

interop: ## Among programs of others, built from Go modules: Istio's, and the waypoint's peers (gRPC, OPA, OpenTelemetry; root, Go)
	@.ci/packages test
	$(CARGO) run --locked -q -p kube-tests -- cluster build
	@.ci/istio
	CULVERT_REQUIRE_ISTIO=1 $(CARGO) test --locked -p ztunnel --test istio -p control-plane --test istio_clients
	@.ci/peers
	$(CARGO) build --locked -p waypoint
	CULVERT_REQUIRE_PEERS=1 $(CARGO) test --locked -p interop --test waypoint
	CULVERT_REQUIRE_GO=1 CULVERT_RATELIMIT_SERVICE=$(CURDIR)/target/interop/peers/ratelimit $(CARGO) test --locked -p waypoint --test security

images: ## The container images with their bills of materials, in target/images; ARGS="--arch arm64 --sysroot DIR"
	@$(SUDO) .ci/packages demo
	$(CARGO) run --locked -q -p kube-tests -- images $(ARGS)

e2e: ## The mesh on a real Kubernetes of two nodes, made on this machine (root, Go); ARGS="--short", ARGS="enrol --keep"
	@$(SUDO) .ci/packages e2e
	$(CARGO) build --locked -q -p kube-tests -p cli -p control-plane -p node-agent -p waypoint -p ztunnel
	@$(SUDO) target/debug/kube-tests e2e $(ARGS)

conformance: ## Of that, the Gateway API's conformance suite alone, without a mesh and with it (root, Go)
	@$(MAKE) e2e ARGS="by-chance conformance $(ARGS)"

lint: ## Format, clippy and the dependencies' rules, as CI checks them
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@.ci/dependencies

bench: ## Measures the tunnel beside the direct path and writes bench/results (half an hour)
	@$(SUDO) .ci/packages demo
	$(CARGO) build --profile dist --locked -p cli -p ztunnel
	@$(SUDO) target/dist/culvert bench --out bench/results $(ARGS)

bench-waypoint: ## Measures the waypoint beside Envoy on the same scenarios and writes bench/results (a quarter of an hour)
	@$(SUDO) .ci/packages bench
	$(CARGO) build --profile dist --locked -p waypoint --bin waypoint --example front --example ends
	python3 bench/waypoint/run.py $(ARGS)

bench-control-plane: ## Measures the control plane at up to 100,000 pods and 2,000 proxies and writes bench/results (half an hour)
	@$(SUDO) .ci/packages build
	$(CARGO) build --profile dist --locked -p control-plane -p control-plane-bench -p ztunnel
	target/dist/control-plane-bench --out bench/results $(ARGS)
