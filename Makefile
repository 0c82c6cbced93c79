PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo quick test test-web test-oldest test-whole lint check bench install format clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.demo  ## Transfer an adapter between two small trained models and draw with it; results in demo/out
	$(BIN)/python -m demo

# The core's tests of two files at a time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/.dev  ## Run the tests, and those inside ComfyUI (its library always, a real server where one is found)
	$(PYTEST)
	$(BIN)/python -m pytest -c tests/host/pytest.ini tests/host
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory test-web; \
	else echo "SKIPPED: the unit tests of the views (no npm)"; fi

quick: .venv/.dev  ## Run the core's tests that take a moment (a minute)
	$(PYTEST) -m "not slow and not whole"

test-whole: .venv/.dev  ## Run what the tests take a sample of, whole (long)
	$(PYTEST) -m whole

test-oldest: .venv-oldest/.done  ## Run the quick tests with the oldest packages that pyproject.toml allows (Python up to 3.12)
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not whole"

test-web: tests/web/node_modules  ## Run the unit tests of the views (web/)
	cd tests/web && npm test --silent

tests/web/node_modules: tests/web/package-lock.json
	cd tests/web && npm ci --silent
	@touch $@

lint: .venv/.dev  ## Format, lint, types, import boundaries
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test  ## All of lint, and the tests

PROFILE ?= full
bench: .venv/.dev  ## Time, peak memory and error on full-size bases (PROFILE=smoke: small ones); JSON in benchmarks/results
	$(BIN)/python -m benchmarks --profile $(PROFILE)
	$(BIN)/python -m benchmarks.spectra --profile $(PROFILE)
	$(BIN)/python -m benchmarks.migrate --profile $(PROFILE)

install: .venv/.dev  ## Set up .venv with all that development needs

format: .venv/.dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove .venv and everything that was made
	rm -rf .venv .venv-oldest demo/out *.egg-info tests/web/node_modules screenshots

.venv/.demo: pyproject.toml core-requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml core-requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/notcomfy notcomfy==0.1.0
	@touch $@ .venv/.demo

# What the package and its command line need, each at its lowest version, and what the tests need.
OLDEST = $(shell sed -nE '/^(cli = |[a-z]+>=)/s/>=/==/gp' pyproject.toml core-requirements.txt | grep -oE '[a-z]+==[0-9.]+')

.venv-oldest/.done: pyproject.toml core-requirements.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -e '.[cli]' $(OLDEST) \
		hypothesis jsonschema pytest pytest-timeout pytest-xdist
	@touch $@
