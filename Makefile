.DEFAULT_GOAL := help
PYTHON ?= python3
FLOWGEN := .venv/bin/flowgen
DEMO := outputs/demo

THESIS := outputs/thesis/glow_conv

.PHONY: help setup demo test lint bench slides reproduce-thesis

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

reproduce-thesis: $(FLOWGEN) ## experiment 1 of the thesis at full scale: one GPU, goes on where it was stopped
	test -f $(THESIS)/done || test ! -f $(THESIS)/config.yaml || $(FLOWGEN) resume $(THESIS)
	test -f $(THESIS)/config.yaml || $(FLOWGEN) train experiment=thesis/glow_conv out=$(THESIS)
	touch $(THESIS)/done
	$(FLOWGEN) evaluate --run $(THESIS)
	$(FLOWGEN) sample --run $(THESIS) --count 8 --temperature 0 --temperature 0.25 --temperature 0.7 --temperature 1

SLIDES := filters l2_1e3 l2_1e6 l1_1e3 l1_1e6 cd1 cd10 tempering
comma := ,
space := $(subst ,, )

slides: $(FLOWGEN) ## the RBMs of the slides, 24 runs of two minutes each on two cores, as one page
	$(FLOWGEN) train -m experiment=$(subst $(space),$(comma),$(SLIDES:%=slides/%)) model.hidden=50,100,300 out=outputs/slides
	$(FLOWGEN) report outputs/slides --out outputs/slides/report.html

bench: $(FLOWGEN) ## training speed beside other packages
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	.venv/bin/python scripts/bench.py
