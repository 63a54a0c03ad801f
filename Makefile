.DEFAULT_GOAL := help
PYTHON ?= python3
FLOWGEN := .venv/bin/flowgen
SETUP := .venv/.setup
DEMO := outputs/demo

SCALE ?= full
DATA ?= celeba_hq

FAULTS ?= 20

.PHONY: help setup demo test check-all lint docs docs-long docs-pictures faults bench zoo reproduce-thesis

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /#/' | column -t -s '#'

setup: $(SETUP) ## create a virtual environment with all extras in .venv

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(SETUP) ## sample from trained models, then train 1,500 steps on included digits; 3 minutes on two cores
	$(FLOWGEN) sample --run zoo/glow_mnist
	$(FLOWGEN) sample --run zoo/rbm_mnist
	$(FLOWGEN) train experiment=demo output_dir=$(DEMO) resume=true
	$(FLOWGEN) evaluate --run $(DEMO)
	$(FLOWGEN) sample --run $(DEMO) --temperature 0.5 --temperature 0.7
	.venv/bin/python scripts/reproduce/save_digits.py $(DEMO)
	$(FLOWGEN) interpolate $(DEMO)/digit_2.png $(DEMO)/digit_7.png --run $(DEMO)
	.venv/bin/python scripts/reproduce/demo_page.py $(DEMO) zoo/glow_mnist zoo/rbm_mnist
	@echo
	@echo "Then try  source .venv/bin/activate"
	@echo "          flowgen sample --run zoo/glow_mnist --label 3 --temperature 0.6"
	@echo "          flowgen interpolate $(DEMO)/digit_2.png $(DEMO)/digit_7.png --run zoo/glow_mnist --out walk.gif"
	@echo "          flowgen train data=folder data.root=PICTURES data.size=32 data.bits=5 trainer.minutes=30"
	@echo
	@echo "The results are on a page: open $(DEMO)/demo.html"

test: $(SETUP) ## run the tests, except the slow ones
	.venv/bin/pytest -n 2 --dist worksteal

check-all: $(SETUP) ## run every check: .ci/run, the slow tests, and the slow commands of the documentation; half an hour
	.ci/run
	.venv/bin/pytest -n 2 -m slow
	$(MAKE) docs-long

lint: $(SETUP) ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: $(SETUP) ## build the documentation in docs/_build; needs no network
	rm -rf docs/_build
	.venv/bin/sphinx-build -q -n -W --keep-going docs docs/_build
	@echo "Open docs/_build/index.html"

docs-long: docs ## run the slow commands of the documentation too, and check its pages in a browser: minutes
	FLOWGEN_DOCS=long .venv/bin/pytest tests/test_docs.py

docs-pictures: $(SETUP) ## create the pictures of the documentation from the commands of its pages: PICTURES=all, or names
	.venv/bin/python scripts/reproduce/docs_pictures.py $(PICTURES)

reproduce-thesis: $(SETUP) ## make every figure of the thesis and of the slides: SCALE=full|night|small|smoke DATA=celeba_hq|celeba|folder ROOT=
	.venv/bin/python scripts/reproduce/thesis --preset $(SCALE) --data $(DATA) $(if $(ROOT),--root "$(ROOT)") $(if $(PARTS),--parts $(PARTS))

faults: $(SETUP) ## run the fuzzers (kills, full disks, damaged files, command lines): minutes, or hours with FAULTS=1000
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 .venv/bin/python tests/fuzz/run.py --count $(FAULTS)
	FLOWGEN_EXAMPLES=$$((10 * $(FAULTS))) .venv/bin/pytest -n 2 tests/test_properties.py

zoo: $(SETUP) ## train the models of the package: hours
	.venv/bin/python scripts/reproduce/zoo.py $(NAMES)

bench: $(SETUP) ## compare the training speed with other packages
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	.venv/bin/python scripts/benchmarks/bench.py
