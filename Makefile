# One machine, two commands: `make demo` uses it, `make test` checks it. Both set up what they need in .venv.
# `make test-all` adds the tests that take long, for a nightly run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Workers of the tests, for two cores; where there are more: make test WORKERS=8.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist worksteal

# make's output is the project's own: pip neither advertises itself nor comments on the user that runs it.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_PYTHON_VERSION_WARNING := 1

.PHONY: demo test test-all check format setup clean docs wheel arm64
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/yuanmoe demo

test: $(VENV)/.dev
	$(BIN)/pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/pytest $(PARALLEL)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest tests/structure

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The source archive, the wheel made of it, and the wheel alone in an empty environment, away from the sources.
wheel: $(VENV)/.release
	rm -rf dist
	YUANMOE_RELEASE=1 $(BIN)/python -m build --quiet --outdir dist
	$(BIN)/twine check --strict dist/*
	if [ "$$(uname)" = Linux ]; then $(BIN)/auditwheel show dist/*.whl; fi
	set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	$(PYTHON) -m venv "$$away/venv"; cp -R tests/smoke "$$away"; cd "$$away"; \
	venv/bin/python -m pip install --quiet "$(TORCH)"; \
	venv/bin/python -m pip install --quiet "$(CURDIR)"/dist/*.whl pytest; \
	venv/bin/python -m pytest -q -W error smoke/test_installed.py smoke/released_wheel.py

# The kernels for 64-bit ARM, cross-compiled and run on an emulated CPU.
arm64: $(VENV)/.dev
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
	  command -v $$tool >/dev/null || { echo "$$tool is missing; Debian: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(BIN)/pytest tests/parity/test_native_arm64.py

setup: $(VENV)/.dev

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"yuanmoe needs Python 3.11 or newer, this is {v[0]}.{v[1]}; name another with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.created: $(VENV)/.python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.core: pyproject.toml $(wildcard setup.py) $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/.release: pyproject.toml $(VENV)/.python
	$(BIN)/python -m pip install --quiet 'build>=1.6' 'twine>=6.1' $(if $(filter Linux,$(shell uname)),'auditwheel>=6.2')
	@touch $@

clean:
	rm -rf $(VENV) build dist site demo
