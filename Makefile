# Every command a person or CI runs. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODELS ?= models
PYTEST_ARGS ?=
# On a machine with cores to spare, PYTEST_WORKERS=N runs test files in so many processes side by side.
PYTEST_WORKERS ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install models consul toolchains stubs certs run up test test-unit test-integration check lock format protos descriptors bench bench-groups bench-tokens bench-routing \
  bench-overload fuzz kill-everywhere consul-outage chaos compose-test clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# A stamp, so that an unchanged pyproject.toml costs nothing. torch goes first and by its exact pin: any range would pull a CUDA build.
$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on PATH; install Python 3.11 or set PYTHON=…" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); apt-get install -y --no-install-recommends python3-venv && $(PYTHON) -m venv $(VENV); }
	$(BIN)/pip install --quiet --progress-bar off "pip>=24"
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[worker,dev]'
	# Every service and rank is a process that imports this: compiled once, not by each.
	$(BIN)/python -m compileall -q tensorway services
	@touch $@

install: $(VENV)/.installed ## Create .venv with everything

# The base distribution alone, to prove that gateway and orchestrator need no torch.
.venv-base/.installed: pyproject.toml
	test -x .venv-base/bin/python || $(PYTHON) -m venv .venv-base
	.venv-base/bin/pip install --quiet -e .
	@touch $@

# NVIDIA's own client, in a process and environment of its own: two copies of `inference.*` must not meet in one descriptor pool.
.venv-triton/.installed: Makefile
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet 'tritonclient[grpc]==2.73.0'
	@touch $@

# Compilers and gRPC libraries of other languages; what cannot be brought is named, and its tests are skipped.
toolchains: install ## Bring what the client examples in other languages need
	@$(BIN)/python -m tests.clients.toolchains

# LANG is also the shell's: only what is said on the command line counts.
OUT ?=
stubs: install ## Make client stubs for another language: make stubs LANG=go [OUT=DIR]
	@$(BIN)/python examples/clients/stubs.py $(if $(filter command line,$(origin LANG)),$(LANG)) $(if $(OUT),--out $(OUT))

CERTS ?= certs
certs: install ## Make a local authority and a certificate for every role, in ./certs (CERTS=DIR)
	@$(BIN)/tensorway certs create $(CERTS)

# A real Consul agent for tests: CONSUL_BIN, the one on PATH, or one unpacked under .tools.
consul: install ## Bring a Consul binary for tests and print its path
	@$(BIN)/python -m tests.consul.binary

models: install ## Fetch the files that the models in models/ declare
	$(BIN)/tensorway models fetch $(MODELS)

run: install ## Fetch models, start a whole mesh here, show real answers, serve until Ctrl-C
	@exec $(BIN)/tensorway up $(MODELS) --demo

test: install .venv-base/.installed .venv-triton/.installed models consul toolchains ## Set up and run every test
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-unit: install ## Only the quick tests
	$(BIN)/python -m pytest tests/unit tests/contract -m 'not models' -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

check: install ## Lint, types, house rules, contract and generated stubs
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	mkdir -p .tools && $(PROTOC) --include_imports --include_source_info --descriptor_set_out=.tools/protos.binpb $(PROTOS)
	$(BIN)/buf lint .tools/protos.binpb --config protos/buf.yaml
	$(BIN)/python tests/check_stubs.py $(BIN)/python
	$(BIN)/python -m docs.generate --check
	$(BIN)/python deploy/grafana/dashboards.py --check

lock: install ## Pin what the images install, deploy/requirements/*.txt
	$(BIN)/python deploy/requirements/lock.py

format: install ## Sort imports and mend what ruff can
	$(BIN)/ruff check --fix .

# google.api.http annotations come with googleapis-common-protos, which the kit needs anyway.
PROTOC = $(BIN)/python -m grpc_tools.protoc -I protos -I "$$($(BIN)/python -c 'import google.api; print(list(google.api.__path__)[0] + "/../..")')"
PROTOS = protos/tensorway/v1/*.proto protos/tensorway/compat/*.proto

protos: install descriptors ## Generate the Python stubs from protos/
	$(PROTOC) --python_out=. --pyi_out=. $(PROTOS)
	$(PROTOC) --grpc_python_out=. $(addprefix protos/tensorway/v1/,$(addsuffix .proto,inference model mesh node link ops))

descriptors: install ## Generate what Envoy needs to translate REST into gRPC, deploy/envoy/tensorway.pb
	$(PROTOC) --include_imports --descriptor_set_out=deploy/envoy/tensorway.pb $(addprefix protos/tensorway/,v1/inference.proto v1/model.proto v1/mesh.proto compat/grpc_service.proto) \
	  google/rpc/status.proto google/rpc/error_details.proto

# h2load is C, from Debian: a load generator that nobody here wrote.
bench: install models ## Measure the running mesh with h2load and perf-analyzer; writes benchmarks/results.md
	command -v h2load >/dev/null || apt-get install -y --no-install-recommends nghttp2-client || { apt-get update && apt-get install -y --no-install-recommends nghttp2-client; }
	$(BIN)/python -m benchmarks.run

bench-groups: install models ## Measure groups of several ranks beside their parts; writes benchmarks/groups.md
	$(BIN)/python -m benchmarks.groups

bench-tokens: install models ## Measure tokens through the mesh beside the bare engine and transformers; writes benchmarks/tokens.md
	$(BIN)/python -m benchmarks.tokens

bench-routing: install ## Simulate routing with 1 000 groups and 1 000 000 requests; writes benchmarks/routing_sim.md
	$(BIN)/python -m benchmarks.routing_sim

bench-overload: install models ## Offer a mesh up to three times what it can do; writes benchmarks/overload.md
	$(BIN)/python -m benchmarks.overload

consul-outage: install consul ## The long form of Consul's absence: 60 seconds
	TENSORWAY_LONG_OUTAGE=1 $(BIN)/python -m pytest tests/contract/registry/test_consul_outage.py -k sixty_seconds

# Network namespaces, packet filters and clocks need these; without root the faults that need them are left out, and it says so.
CHAOS_TOOLS := iptables iproute2 gcc libc6-dev
chaos: install models consul ## Kill, stop, cut and fill everything under load, and check every answer; writes benchmarks/chaos.md
	for tool in iptables ip tc cc; do command -v $$tool >/dev/null || { apt-get update && apt-get install -y --no-install-recommends $(CHAOS_TOOLS); break; }; done || true
	$(BIN)/python -m tests.chaos --report benchmarks/chaos.md

compose-test: install consul ## Build the images and run compose.yaml on a Docker engine of its own: call, kill, cut off (root)
	TENSORWAY_COMPOSE_TEST=1 $(BIN)/python -m pytest tests/deploy/test_compose.py -s

fuzz: install ## The long form of the fuzz at the door
	TENSORWAY_FUZZ_CASES=2000000 $(BIN)/python -m pytest tests/contract/gateway -k fuzz --timeout=3600

kill-everywhere: install models ## The long form of the death of groups: at every token of an answer
	TENSORWAY_KILL_ALL=1 $(BIN)/python -m pytest tests/integration/test_generate_faults.py -k outlives_its_group

clean: ## Remove environments, caches and fetched files
	rm -rf .venv .venv-base .venv-triton .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info models/*/files
