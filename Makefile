# Two commands do everything, the virtual environment included:  make demo   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),constraints/base.txt,constraints/cpu.txt)
TOKENS ?= 16384
JOBS ?= 2

.PHONY: demo test check fix test-gpu bench golden budgets fuzz coverage clean

$(VENV)/ready: pyproject.toml constraints/base.txt constraints/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c $(CONSTRAINTS) -e '.[transformers,test]'
	touch $@

demo: $(VENV)/ready  ## the main job: a long prompt, dense against minference
	$(BIN)/python -m sparse_compiler demo --tokens $(TOKENS) $(if $(JSON),--json $(JSON))

test: $(VENV)/ready  ## every test that needs no GPU, the architecture test included; JOBS=2 at a time
	$(BIN)/python -m pytest -m "not gpu" -n $(JOBS) --dist loadfile --durations 15

check: $(VENV)/ready  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(VENV)/ready  ## the property tests with many more examples
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -m "not gpu" --timeout 3600

coverage: $(VENV)/ready  ## every architecture of transformers against itself; QUICK=1: a third of them
	$(BIN)/python tests/models/run_coverage.py --write docs/coverage.md $(if $(QUICK),--quick)

# On a GPU machine the interpreter that holds torch is used as it is: make test-gpu PYTHON=python3
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

bench:
	$(PYTHON) benchmarks/attention.py --json benchmarks/results/attention.json
	$(PYTHON) benchmarks/ttft.py --json benchmarks/results/ttft.json

golden: $(VENV)/ready  ## rewrite the golden kernels after a deliberate change of the templates
	$(BIN)/python tests/codegen/test_emit.py

budgets: $(VENV)/ready  ## accept what the compiler reports now: registers, shared memory, instructions
	$(BIN)/python tests/codegen/test_budgets.py

clean:
	rm -rf $(VENV) build dist *.egg-info
