# make demo    the main job on real input: train a small linear transformer on handwritten digits, draw and complete digits
# make test    lint, then every test and doctest, warnings as errors, on all cores
# make lint    ruff and mypy alone
# make docs    the site, in build/docs: open build/docs/index.html; warnings are errors, examples are executed
# make bench   speed and memory of each form
# make mutants change the core line by line and count the changes that no law notices: an hour or two
# make clean   remove what the above made, the environments too
#
# Needs python3 (3.10 or later) with venv, and make; each target first makes its own environment in .venv, once per change of setup.cfg.
# PYTHON=python3.12 make test     another interpreter, in an environment of its own
# ARGS="--smoke" make demo        more arguments for the command, for pytest or for Sphinx

PYTHON ?= python3
ARGS ?=
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(subst /,-,$(PYTHON)))
RUN := $(VENV)/bin/python

# ruff reads no setup.cfg; these few options are all of its configuration.
# E731: a short lambda with a name is fine. E741: l and O are names of the field. B905: axes are checked before they are zipped.
RUFF := ruff check --isolated --quiet --line-length 150 --target-version py310 \
        --select E,W,F,B,UP,NPY --ignore E731,E741,B905

.PHONY: demo test lint docs bench mutants clean
.DELETE_ON_ERROR:
# No two pips write into one environment.
.NOTPARALLEL:

demo: $(VENV)/demo.stamp
	@$(RUN) -m refattn demo $(ARGS)

bench: $(VENV)/demo.stamp
	@$(RUN) -m refattn bench $(ARGS)

mutants: $(VENV)/test.stamp
	@$(RUN) -m pip install --quiet --disable-pip-version-check 'mutmut>=3.8'
	@HYPOTHESIS_PROFILE=mutants $(RUN) -m mutmut run $(ARGS)

test: lint
	@$(RUN) -W error -m pytest -n auto --dist worksteal $(ARGS)

docs: $(VENV)/docs.stamp
	@$(RUN) -m sphinx -b html -W --keep-going -q $(ARGS) docs build/docs
	@echo "docs: build/docs/index.html"

lint: $(VENV)/test.stamp
	@$(RUN) -m $(RUFF) $(wildcard refattn tests examples docs)
	@$(RUN) -m mypy
	@echo "lint: ruff and mypy found nothing"

clean:
	rm -rf .venv .venv-* build dist out *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .coverage mutants
	find $(wildcard refattn tests examples docs) -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/test.stamp: $(VENV)/demo.stamp
	@echo "$(VENV): installing the test tools"
	@$(RUN) -m pip install --quiet --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	@echo "$(VENV): installing what builds the site"
	@$(RUN) -m pip install --quiet --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(VENV)/demo.stamp: $(VENV)/venv.stamp setup.cfg
	@echo "$(VENV): installing refattn and what the demo needs"
	@$(RUN) -m pip install --quiet --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

# Not pyvenv.cfg: that is there before pip is, and would stay when the rest fails.
$(VENV)/venv.stamp:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is not installed; name another interpreter, for example: PYTHON=python3.12 make test" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "refattn needs Python 3.10 or later, $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "$(VENV): a new environment with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@
