# Brainloom: each target is a thin call of `python -m prep …` or `python -m train …`.
# `make` alone prints them. The first use of any creates .venv from constraints.txt.

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin
PY := $(BIN)/python
STORE ?= store
OUT ?=
RUN ?= train/configs/debug.yaml
HOSTFILE ?= hostfiles/cluster
ARGS ?=

# What of some variables was typed, for commands that do without.
given = $(foreach name,$(1),$(if $(filter command environment,$(origin $(name))),--$(shell tr A-Z a-z <<< $(name)) "$$$(name)"))
GIVEN := $(call given,STORE HOSTFILE NODES SLOTS)
GIVEN_SIZE := $(call given,NODES SLOTS)

# Recipes that say "$$NODES" instead of $(NODES) get the value as it was typed: neither make nor a shell reads it.
VERBATIM := NODES SLOTS HOSTFILE STORE OUT RUN RUN_DIR HUB REPO RECIPE DATASET SCHEDULER CLUSTER FILE
$(foreach name,$(VERBATIM),$(eval override export $(name) := $$(value $(name))))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all bench bench-science bench-gpu bench-trainer bench-scaling check lint prep inspect verify report hostfile stage doctor dry-run train sbatch train-report eval audit export adapt push campaign

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

install: .venv/installed  ## create .venv from constraints.txt (every other target does it when needed)

.venv/installed: setup.py constraints.txt
	@echo "Setting up .venv (once; a few minutes) …"
	@$(PYTHON) -c 'import sys; sys.exit("Brainloom needs Python 3.11 or newer; this is %s. Set PYTHON=…" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel torch
	@DS_BUILD_OPS=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed  ## fresh clone -> the whole road on a laptop; ends in runs/demo/summary.json
	$(PY) -m train demo --out "$${OUT:-runs/demo}" $(ARGS)

test: .venv/installed  ## fresh clone -> the test suite (without the slow tests)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not slow' -n 2 --dist loadfile $(ARGS)

campaign: .venv/installed  ## WHICH=prep|train|cluster [N=50]: killed, starved and damaged at random moments; as if nothing had been after a rerun
	PYTHONPATH=tests $(PY) -m campaign $(or $(WHICH),prep) $(or $(N),50) $(ARGS)

test-all: .venv/installed  ## every test, the slow ones too
	$(PY) -m pytest $(ARGS)

bench: .venv/installed  ## prep against the limit and its peers -> tests/bench/RESULTS.md (half an hour, 10 GB of temporary files)
	$(PY) -W ignore tests/bench/run.py $(ARGS)

bench-science: .venv/installed  ## Brainloom on real recordings beside regressions, networks and POYO -> tests/bench/RESULTS.md (three hours)
	$(PY) -W ignore tests/bench/science/run.py $(ARGS)

bench-gpu: .venv/installed  ## what the 300m and 1b models make of one GPU, in bf16 and compiled -> tests/bench/RESULTS.md
	$(PY) -W ignore tests/bench/gpu.py $(ARGS)

bench-trainer: .venv/installed  ## the trainer beside a loop written by hand, and what a run waits for -> tests/bench/RESULTS.md
	$(PY) -W ignore tests/bench/trainer.py $(ARGS)

bench-scaling: .venv/installed  ## a step on two hosts over links of three speeds, predicted and measured -> tests/bench/RESULTS.md (needs root)
	$(PY) -W ignore tests/bench/scaling.py $(ARGS)

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## lint, types, architecture, tests; warnings are errors

prep: .venv/installed  ## SRC="dir|file|url …" OUT=store|s3://… [RECIPE=…] [DATASET=…] [SCHEDULER=tcp://… | CLUSTER=prep/clusters/x.yaml]: NWB recordings -> token store
	@test -n "$(SRC)" || { echo 'make prep needs SRC="dir|file …" (NWB recordings), for instance: make prep SRC=recordings OUT=store'; exit 2; }
	$(PY) -m prep ingest $(SRC) --out "$${OUT:-$$STORE}" $(if $(RECIPE),--recipe "$$RECIPE") $(if $(DATASET),--dataset "$$DATASET") $(if $(SCHEDULER),--scheduler "$$SCHEDULER") $(if $(CLUSTER),--cluster "$$CLUSTER") $(ARGS)

inspect: .venv/installed  ## FILE=x.nwb: what is in a file, and what would become of each object
	$(PY) -m prep inspect "$$FILE" $(ARGS)

verify: .venv/installed  ## STORE=store: every byte against its digest
	$(PY) -m prep verify "$$STORE" $(ARGS)

report: .venv/installed  ## STORE=store [OUT=report.html]: what it holds, as one HTML file
	$(PY) -m prep report "$$STORE" --out "$${OUT:-report.html}" $(ARGS)

hostfile: .venv/installed  ## [NODES="a b"] [SLOTS=8]: from SLURM, PBS, LSF, MPI, a list or this machine -> hostfiles/cluster
	$(PY) -m train hostfile --out "$$HOSTFILE" $(ARGS)

stage: .venv/installed  ## [HOSTFILE=hostfiles/cluster] [RUN=x.yaml] [ARGS=--install]: the code onto hosts that share no disk, by ssh
	$(PY) -m train stage --hostfile "$$HOSTFILE" --config "$$RUN" $(ARGS)

doctor: .venv/installed  ## [HOSTFILE=hostfiles/cluster] [STORE=store] [RUN=x.yaml] [OUT=runs/x]: is every host fit to train?
	$(PY) -m train doctor --hostfile "$$HOSTFILE" --store "$$STORE" --config "$$RUN" --out "$${OUT:-runs}" $(ARGS)

dry-run: .venv/installed  ## RUN=train/configs/1b.yaml [NODES=8 SLOTS=8 | HOSTFILE=hostfiles/cluster] [STORE=store]: memory, traffic, days, 1 to 8 nodes, without a GPU
	$(PY) -m train dry-run --config "$$RUN" $(GIVEN) $(ARGS)

train: .venv/installed  ## RUN=train/configs/x.yaml STORE=store OUT=runs/x [HOSTFILE=hostfiles/cluster]: train, or resume
	$(PY) -m train train --config "$$RUN" --store "$$STORE" --out "$${OUT:-runs/$$(basename "$$RUN" .yaml)}" --hostfile "$$HOSTFILE" $(ARGS)

sbatch: .venv/installed  ## RUN=… STORE=… OUT=… [NODES=8 SLOTS=8]: the batch script of a run for SLURM -> OUT/job.sbatch, and how to submit it
	$(PY) -m train sbatch --config "$$RUN" --store "$$STORE" --out "$${OUT:-runs/$$(basename "$$RUN" .yaml)}" $(GIVEN_SIZE) $(ARGS)

train-report: .venv/installed  ## RUN_DIR=runs/x: curves, scores and pictures of a run -> RUN_DIR/report.html
	$(PY) -m train report "$$RUN_DIR" $(ARGS)

eval: .venv/installed  ## RUN_DIR=runs/x: held-out deviance explained per modality and task
	$(PY) -m train eval "$$RUN_DIR" $(ARGS)

audit: .venv/installed  ## RUN_DIR=runs/x: show that nothing a task hides reaches the model
	$(PY) -m train audit "$$RUN_DIR" $(ARGS)

export: .venv/installed  ## RUN_DIR=runs/x HUB=dir: checkpoint -> hub folder
	$(PY) -m train export "$$RUN_DIR" --hub "$$HUB" $(ARGS)

adapt: .venv/installed  ## HUB=dir STORE=store OUT=runs/y [ARGS="--steps 200"]: identities for units that the model has never seen
	$(PY) -m train adapt --hub "$$HUB" --store "$$STORE" --out "$$OUT" $(ARGS)

push: .venv/installed  ## HUB=dir REPO=org/name: hub folder -> model hub
	$(PY) -m train push --hub "$$HUB" --repo "$$REPO" $(ARGS)
