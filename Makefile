.DEFAULT_GOAL := help
PYTHON ?= python3
FLOWGEN := .venv/bin/flowgen
DEMO := outputs/demo

SCALE ?= full
DATA ?= celeba_hq

.PHONY: help setup demo test lint bench zoo reproduce-thesis

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /#/' | column -t -s '#'

setup: $(FLOWGEN) ## a virtual environment with everything, in .venv

$(FLOWGEN): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(FLOWGEN) ## train on embedded digits for 3 minutes, sample, interpolate
	test -f $(DEMO)/done || rm -rf $(DEMO)
	test -f $(DEMO)/done || $(FLOWGEN) train experiment=demo out=$(DEMO)
	touch $(DEMO)/done
	$(FLOWGEN) evaluate --run $(DEMO)
	$(FLOWGEN) sample --run $(DEMO) --temperature 0.7 --temperature 1
	.venv/bin/python scripts/save_digits.py $(DEMO)
	$(FLOWGEN) interpolate $(DEMO)/digit_2.png $(DEMO)/digit_7.png --run $(DEMO)

test: $(FLOWGEN) ## every test
	.venv/bin/pytest -n 2

lint: $(FLOWGEN) ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

reproduce-thesis: $(FLOWGEN) ## every figure of the thesis and of the slides: SCALE=full|small|smoke DATA=celeba_hq|celeba|folder ROOT=
	.venv/bin/python scripts/thesis --scale $(SCALE) --data $(DATA) $(if $(ROOT),--root "$(ROOT)") $(if $(PARTS),--parts $(PARTS))

zoo: $(FLOWGEN) ## train the models that the package brings: hours
	.venv/bin/python scripts/zoo.py $(NAMES)

bench: $(FLOWGEN) ## training speed beside other packages
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	.venv/bin/python scripts/bench.py
