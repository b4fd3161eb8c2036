# `make test` and `make demo` create their own environment in .venv/ and reuse it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made

.DEFAULT_GOAL := help
.PHONY: help demo test newest test-newest quick check docs bench reproduce clean
.DELETE_ON_ERROR:

# -qq leaves out pip's warnings (about running as root, its own version, indexes of the machine) but not its errors.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '' 2>/dev/null || { echo "$(PYTHON) is not there. Run make PYTHON=/path/to/python, 3.11 or newer"; exit 1; }
	@echo "Making the environment in $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cpu,rasters,plot,dev,docs]'
	@touch $(STAMP)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-16s %s\n", $$1, $$2}'

demo: $(STAMP) ## fit a small archive, score on a local Ray, and write a report
	@rm -rf .demo
	@$(BIN)/python -m tests.builders.archives .demo/archive
	@$(BIN)/raydetect fit jobs/demo/fit.yaml $(if $(WEIGHTS),--set detector.params.weights=$(WEIGHTS))
	@$(BIN)/raydetect score jobs/demo/score.yaml
	@$(BIN)/raydetect report .demo/results -o .demo/report.html
	@echo "Open it in a browser: file://$(CURDIR)/.demo/report.html"

check: $(STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Two processes with one thread each: on two cores, more threads spend longer waiting than computing.
test: check ## the checks, then the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# The newest Python, in an environment of its own; a part of the suite, because the pinned packages are the same.
NEWEST ?= $(lastword $(shell command -v python3.13) $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3.13))
newest:
	@echo $(NEWEST)

test-newest: ## a part of the test suite with the newest Python (an environment of 7 GB more)
	@$(MAKE) --no-print-directory PYTHON=$(or $(NEWEST),python3.13) VENV=.venv-newest quick

quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/config tests/archives tests/planning tests/python_api tests/packaging

docs: $(STAMP) ## the reference from the code, and the site with its links checked
	@$(BIN)/python -m jobs.docs.site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "Open it in a browser: file://$(CURDIR)/build/site/index.html"

bench: $(STAMP) ## every benchmark of jobs/bench (long)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cpu,bench]'
	$(BIN)/python -m jobs.bench.search
	$(BIN)/python -m jobs.bench.job
	$(BIN)/python -m jobs.bench.memory
	$(BIN)/python -m jobs.bench.coreset
	$(BIN)/python -m jobs.bench.training
	$(BIN)/python -m jobs.bench.serve
	$(BIN)/python -m jobs.bench.jpeg
	$(BIN)/python -m jobs.bench.pipeline
	$(BIN)/python -m jobs.bench.driver
	$(BIN)/python -m jobs.bench.tiles

reproduce: $(STAMP) ## fit every detector on real images and compare (long)
	$(BIN)/python -m jobs.reproduce.run

clean: ## remove the environment and the demo
	rm -rf $(VENV) .venv-newest .demo
