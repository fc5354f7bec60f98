# make demo | make test | make clean. The first run fills .venv; later ones need no network.
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadgroup

PIP := .venv/bin/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.NOTPARALLEL:
.PHONY: help demo test clean FORCE

help:
	@echo "make demo [ARGS=...]   ask a small model about a long text: full attention against hashed"
	@echo "make test              ruff, mypy and pytest"
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

clean:
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist
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

# A .venv whose Python does not run (moved, upgraded away, half made) is made afresh, whatever its stamps say.
ifneq ($(shell .venv/bin/python -c 'import pip' 2>/dev/null && echo works),works)
.venv/.made: FORCE
endif
