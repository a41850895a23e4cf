# The front door. Everything runs in $(VENV), which is made when it is needed and used again afterwards.
#
#   make demo                                            the interpreter is python3, torch the newest that fits
#   make test PYTHON=python3.12 TORCH=torch==2.13.0      another interpreter, a certain torch
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#   make test VENV=/tmp/venv PYTEST_ARGS="-k mdqn -x"    another environment, arguments for pytest

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
SBX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
export PIP_DISABLE_PIP_VERSION_CHECK = 1

DEMO_ALGO := mdqn
DEMO_ENV := CartPole-v1
DEMO_SEED := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint type format doc bench build clean FORCE

help:
	@echo "make demo     train Munchausen DQN on CartPole-v1 through rl-zoo3, evaluate it, plot and film it (in demo/)"
	@echo "make test     run the tests (PYTEST_ARGS='-m expensive' for the long ones)"
	@echo "make lint     ruff: rules and formatting     make type    mypy     make format  let ruff rewrite the files"
	@echo "make doc      build the documentation into docs/_build/html"
	@echo "make bench    measure speed and memory on this machine (about two hours, with nothing else to do),"
	@echo "              report the recorded learning benchmark; SBX=python of an environment with sbx-rl compares with it"
	@echo "make build    build the wheel and the source distribution into dist/"
	@echo "make clean    remove what these targets made, except the environment $(VENV)"
	@echo "Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) WORKERS=$(WORKERS)"

# ---- The environment: one directory, one stamp for each set of extras ----

# torch comes first, so that a chosen build is not replaced by the newest one. Only another TORCH installs it again.
$(VENV)/.torch: FORCE
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))" || \
		{ echo "sb3_softq needs Python 3.10 to 3.13: name one with PYTHON=, e.g. make demo PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@if [ ! -e $@ ] || [ "$(TORCH)" != torch ] && [ "$(TORCH)" != "$$(cat $@ 2> /dev/null)" ]; then \
		echo "Installing $(TORCH) into $(VENV)"; $(PIP) install $(TORCH) && echo "$(TORCH)" > $@; fi

$(VENV)/.zoo: $(VENV)/.torch pyproject.toml
	$(PIP) install -e ".[zoo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -e ".[zoo,atari,box2d,minatar,dev]"
	@touch $@ $(VENV)/.zoo

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install -e ".[docs]"
	@touch $@

# ---- Targets ----

# No screen is needed to draw or to play
demo test: export SDL_VIDEODRIVER = dummy
demo test: export SDL_AUDIODRIVER = dummy
demo test: export MPLBACKEND = Agg

# Written only when the training was not interrupted
demo/.trained: | $(VENV)/.zoo
	rm -rf demo/logs
	$(BIN)/rl-zoo3 train --algo $(DEMO_ALGO) --env $(DEMO_ENV) --seed $(DEMO_SEED) -P --log-folder demo/logs --num-threads 1 \
		--eval-freq 2500 --eval-episodes 20 --n-eval-envs 5 --verbose 0
	@touch $@

demo: $(VENV)/.zoo
	@if [ -e demo/.trained ]; then echo "Using the agent that was trained before: remove demo/ to train it again."; fi
	@$(MAKE) --no-print-directory demo/.trained
	@$(BIN)/python benchmarks/demo.py --algo $(DEMO_ALGO) --env $(DEMO_ENV) --folder demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

doc: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Speed alternates between ours and the reference with 1 and with 2 threads. The recorded learning curves, the picture of the
# multi-goal environment and the runs on scaled rewards are not made again: see the head of each script in benchmarks/
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/learning.py report
	$(BIN)/python benchmarks/speed.py run $(if $(SBX),--sbx $(SBX))
	$(BIN)/python benchmarks/speed.py report
	$(BIN)/python benchmarks/memory.py run
	$(BIN)/python benchmarks/memory.py report

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf build dist demo docs/_build .pytest_cache .mypy_cache .ruff_cache
	find sb3_softq benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
