# `make` or `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
FILE ?= examples/imagenet-lite/ensemble.yaml
BIN := $(VENV)/bin
# Where it is there, it has the API server that some tests want; see `make test`.
KUBE := ../shared/kube
IMAGES := operator gateway worker
CRD := crds/ensemble-operator.io_inferenceensembles.yaml
POLICY := crds/ensemble-operator.io_inferenceensembles_policy.yaml
STALE := { echo "crds/ is out of date: run 'make crd'" >&2; exit 1; }
# Folders that do not exist yet are no reason to fail.
CODE := $(wildcard operator worker tests benchmarks examples charts images hatch_build.py)

.PHONY: help
help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-13s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.installed-demo models  ## Serve three ImageNet networks, classify a photograph, stop
	@$(BIN)/python examples/imagenet-lite/demo.py --port $(PORT)

.PHONY: serve
serve: $(VENV)/.installed-demo models  ## Serve FILE (default: the ImageNet example) on PORT until Ctrl-C
	@exec $(BIN)/ensemble serve $(FILE) --port $(PORT)

.PHONY: digits
digits: $(VENV)/.installed-demo  ## Train the four networks of the digits example
	@$(BIN)/python examples/digits/train.py

.PHONY: test
test: $(VENV)/.installed-dev  ## Run the test suite; ARGS goes to pytest
	@if [ -z "$${KUBEBUILDER_ASSETS:-}" ] && [ -x $(KUBE)/cluster ] && assets=$$($(KUBE)/cluster unpack 2>/dev/null); then \
	    export KUBEBUILDER_ASSETS="$$assets"; fi; \
	$(BIN)/python -m pytest $(ARGS)

# Says what compiling lacks here, if it lacks something.
CAN_COMPILE = $(BIN)/python -B -c 'import sys, hatch_build; sys.exit(hatch_build.missing())'
COMPILED := build/compiled
.PHONY: can-compile
can-compile: $(VENV)/.installed-dev
	@$(CAN_COMPILE)

.PHONY: compiled
compiled: $(COMPILED)/.installed  ## Compile the data plane with mypyc into build/compiled

# For what builds the wheel. The first is what older pips look at, the second what newer ones do.
BUILD_CONSTRAINT := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
# The operator stays plain, and is taken from its sources.
$(COMPILED)/.installed: pyproject.toml hatch_build.py constraints.txt $(shell find worker -name '*.py') | $(VENV)/.installed-dev
	@$(CAN_COMPILE)
	rm -rf $(COMPILED)
	$(BUILD_CONSTRAINT) HATCH_BUILD_HOOKS_ENABLE=1 $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	    --target $(COMPILED) .
	@rm -rf $(COMPILED)/ensemble_operator $(COMPILED)/bin && touch $@

DATA_PLANE := activations cache_map combiner deadlines dispatcher* gather lanes metrics placement queues replies ring \
    rowstore turns data_plane device_rows edge* executor* faults gateway_clients links* plan_changes predictor stacks
.PHONY: test-compiled
test-compiled: $(COMPILED)/.installed  ## Run the data plane's tests against the compiled modules; ARGS goes to pytest
	@export PYTHONPATH=$(abspath $(COMPILED)); \
	$(BIN)/python -c 'import ensemble_gateway.engine as e; assert e.__file__.endswith(".so"), e.__file__'; \
	$(BIN)/python -m pytest $(wildcard $(foreach kind,unit integration,$(DATA_PLANE:%=tests/$(kind)/test_%.py))) $(ARGS)

.PHONY: bench
bench: $(VENV)/.installed-dev models  ## Measure serving against the raw bound, compiled where it can be; ARGS goes to the benchmark
	@if lacking=$$($(CAN_COMPILE) 2>&1); then $(MAKE) --no-print-directory compiled; export PYTHONPATH=$(abspath $(COMPILED)); \
	else echo "the plain modules are measured, for $$lacking" >&2; fi; \
	$(BIN)/python -m benchmarks.serving $(ARGS)

.PHONY: verify
verify: $(VENV)/.installed-dev  ## Check format, lint, types, layers and generated files
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/mypy examples/imagenet-lite
	$(BIN)/mypy examples/digits
	$(BIN)/lint-imports
	$(BIN)/python -m ensemble_operator.crd | diff -u $(CRD) - || $(STALE)
	$(BIN)/python -m ensemble_operator.crd policy | diff -u $(POLICY) - || $(STALE)
	$(BIN)/python -m charts.generate --check

.PHONY: format
format: $(VENV)/.installed-dev  ## Format the code and mend what ruff can mend
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

.PHONY: crd
crd: $(VENV)/.installed-dev  ## Generate the CRD from the resource's types
	$(BIN)/python -m ensemble_operator.crd > $(CRD).new && mv $(CRD).new $(CRD)
	$(BIN)/python -m ensemble_operator.crd policy > $(POLICY).new && mv $(POLICY).new $(POLICY)

.PHONY: chart
chart: crd  ## Generate what the chart and its documents repeat from the code
	$(BIN)/python -m charts.generate

.PHONY: images
images:  ## Build the three images as archives in build/images (with docker, or what ../shared/kube has)
	@mkdir -p build/images
	@if [ -x $(KUBE)/images ]; then $(KUBE)/images . build/images $(IMAGES); else \
	    for target in $(IMAGES); do docker build --target $$target --tag localhost/$$target:test . && \
	        docker save --output build/images/$$target.tar localhost/$$target:test; done; fi

# The stock client that tests send from a pod: for the Python of the images, which have numpy themselves.
V2_CLIENT := build/v2-client
$(V2_CLIENT)/.installed: constraints.txt | $(BIN)/python
	rm -rf $(V2_CLIENT)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --target $(V2_CLIENT) \
	    --python-version 3.11 --only-binary :all: 'tritonclient[http]'
	@rm -rf $(V2_CLIENT)/numpy* && touch $@

CLUSTER_TEST = ENSEMBLE_TEST_V2_CLIENT=$(abspath $(V2_CLIENT)) ENSEMBLE_TEST_ARCHIVES=$(abspath build/images) \
    $(BIN)/python -m pytest tests/cluster $(ARGS)
.PHONY: cluster-test
cluster-test: $(VENV)/.installed-dev images models $(V2_CLIENT)/.installed  ## Install, serve and break things in the cluster that KUBECONFIG names
	@if [ -n "$${KUBECONFIG:-}" ]; then export ENSEMBLE_TEST_IMAGES=$${ENSEMBLE_TEST_IMAGES:-localhost:test}; $(CLUSTER_TEST); \
	elif [ -x $(KUBE)/cluster ]; then \
	    $(BIN)/python -m tests.cluster.second_tag next build/images/*.tar; \
	    export ENSEMBLE_TEST_IMAGES=localhost:test ENSEMBLE_TEST_NEXT_IMAGES=localhost:next; \
	    .ci/with-cluster env $(CLUSTER_TEST); \
	else echo "KUBECONFIG names no cluster: kind create cluster, load build/images/*.tar into it, and set KUBECONFIG" >&2; exit 1; fi

.PHONY: clean
clean:  ## Remove the virtual environment, exported models and caches
	rm -rf $(VENV) build dist examples/*/models
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: models
models: $(VENV)/.installed-demo
	@$(BIN)/python examples/imagenet-lite/export.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is not there, or older than Python 3.11: name one, as in 'make demo PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments: install its venv module (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[local,demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed-demo
