# The only door. `make test` and `make demo` make their own environment in .venv/ and use it again.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made

.PHONY: demo test check bench reproduce clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "raydetect needs Python 3.11 ($(PYTHON) is not there). Say make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Making the environment in $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@rm -rf .demo
	@$(BIN)/python -m tests.made.archives .demo/archive
	@$(BIN)/raydetect fit jobs/demo/fit.yaml $(if $(WEIGHTS),--set detector.params.weights=$(WEIGHTS))
	@$(BIN)/raydetect score jobs/demo/score.yaml
	@$(BIN)/raydetect report .demo/results -o .demo/report.html
	@echo "Open it in a browser: file://$(CURDIR)/.demo/report.html"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# One thread for each of two test processes: on two cores more threads wait for each other longer than they compute.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,bench]'
	$(BIN)/python -m jobs.bench.search
	$(BIN)/python -m jobs.bench.job
	$(BIN)/python -m jobs.bench.memory
	$(BIN)/python -m jobs.bench.coreset
	$(BIN)/python -m jobs.bench.training
	$(BIN)/python -m jobs.bench.serve

reproduce: $(STAMP)
	$(BIN)/python -m jobs.reproduce.run

clean:
	rm -rf $(VENV) .demo
