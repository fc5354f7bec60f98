# make demo | make test | make clean. The first run fills .venv; later ones need no network.
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadgroup

PIP := .venv/bin/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.NOTPARALLEL:
.PHONY: help demo test test-oldest test-newest clean FORCE

help:
	@echo "make demo [ARGS=...]   ask a small model about a long text: full attention against hashed"
	@echo "make test              ruff, mypy and pytest"
	@echo "make test-oldest       pytest with the oldest versions that are supported, in .venv-oldest"
	@echo "make test-newest       pytest with what pip installs today, in .venv-newest"
	@echo "make clean             remove .venv and caches"
	@echo "PYTHON=python3.12 chooses the Python (3.11 or newer) that .venv is made with."

demo: .venv/.demo
	@echo "== demo (about 2 minutes; the first time it also fetches 104 MB of model and text)"
	@.venv/bin/hashattn demo $(ARGS)

test: .venv/.test
	@echo "== ruff check"
	@.venv/bin/ruff check .
	@echo "== ruff format --check"
	@.venv/bin/ruff format --check .
	@echo "== mypy (about a minute the first time)"
	@.venv/bin/mypy hashattn
	@echo "== pytest (some minutes; the first time it also fetches 104 MB of model and text)"
	@.venv/bin/pytest $(PYTEST_ARGS)

test-oldest: .venv-oldest/.test
	@echo "== pytest with the oldest versions"
	@.venv-oldest/bin/pytest $(PYTEST_ARGS)

test-newest: .venv-newest/.test
	@echo "== pytest with the newest versions"
	@.venv-newest/bin/pytest $(PYTEST_ARGS)

clean:
	rm -rf .venv .venv-oldest .venv-newest .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist
	find hashattn tests -name __pycache__ -type d -exec rm -rf {} +

# Each stamp is touched last, so an interrupted step is done again.
.venv/.demo: .venv/.made $(INPUTS)
	@echo "== installing hashattn for the demo (1 to 5 minutes, 1 GB or more, the first time)"
	@$(PIP) install -qq -c constraints.txt -e '.[demo,cpu]'
	@touch $@

.venv/.test: .venv/.made $(INPUTS)
	@echo "== installing hashattn with its test tools (1 to 5 minutes, 1 GB or more, the first time)"
	@$(PIP) install -qq -c constraints.txt -e '.[test,dev]'
	@touch $@

.venv/.made:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("hashattn needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another, make PYTHON=python3.12" % v[:2])'
	@echo "== making .venv with $$($(PYTHON) --version) (a few seconds)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@touch $@

.venv-oldest/.test: pyproject.toml constraints-oldest.txt
	@echo "== installing the oldest versions (1 to 10 minutes, some GB, the first time)"
	@rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip --disable-pip-version-check install -qq -c constraints-oldest.txt -e '.[test]'
	@touch $@

.venv-newest/.test: pyproject.toml
	@echo "== installing the newest versions (1 to 10 minutes, some GB, the first time)"
	@rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip --disable-pip-version-check install -qq --upgrade -e '.[test]'
	@touch $@

# A .venv whose Python does not run (moved, upgraded away, half made) is made afresh, whatever its stamps say.
ifneq ($(shell .venv/bin/python -c 'import pip' 2>/dev/null && echo works),works)
.venv/.made: FORCE
endif
