# Everything runs in .venv, made on first use; nothing but Python is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint format bench venv clean

demo: venv  ## train a small GSPN-2 on the digits and write report/report.html
	$(BIN)/gspn2 demo --out report

# worksteal: neighbours stay in one process, so what a file prepares once is prepared once.
test: venv  ## all tests that need no GPU
	$(BIN)/python -m pytest -q -m "not gpu" -n 2 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv  ## the CPU benchmark (benchmarks/results/cpu), and the tables made from it in README and docs
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/tables.py

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) report build *.egg-info src/*.egg-info
