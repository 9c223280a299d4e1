# `make train`, `make figure`, `make test`. Each installs what it needs into .venv first.
METHOD  ?= stadb
DATASET ?= synthped-small
SEED    ?= 0
ARGS    ?=
EXECUTE ?= yes
PYTHON  ?= python3
BIN      = .venv/bin
EXECUTED = reports/notebooks/train-$(subst /,-,$(METHOD))-$(DATASET)-s$(SEED).ipynb

FIGURE  ?= topdb-fig6
RUNS    ?=
EVIDENCE ?= topdb-table1,bdb-table2,bdb-table3,sen-table2,stadb-table6,pmm-table3
SEEDS   ?= 3
WORKERS ?= 2

.PHONY: train figure evidence publish test test-all check export outputs readme clean lab docs help
help:           ## what there is
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: .venv/installed  ## train METHOD on DATASET with SEED; ARGS='-p epochs 5' passes anything else through
	@mkdir -p $(dir $(EXECUTED))
	$(BIN)/papermill --no-progress-bar --log-output nbs/train.ipynb $(EXECUTED) -p method $(METHOD) -p dataset $(DATASET) -p seed $(SEED) $(ARGS)
	@echo "executed notebook: $(EXECUTED)"

figure: .venv/installed  ## FIGURE of a paper, as topdb-fig6, from the runs that are there; ARGS='-p runs DIR -p query 3'
	@mkdir -p reports/notebooks
	$(BIN)/papermill --no-progress-bar --log-output nbs/figures.ipynb reports/notebooks/figure-$(FIGURE).ipynb -p figure $(FIGURE) $(ARGS)

evidence: .venv/installed  ## train what the tables of EVIDENCE lack in the profile study, WORKERS at once; the same command goes on
	@mkdir -p reports/evidence
	@for f in $$(cd reports/published/runs && find . -name run.json); do d=$${f%/run.json}; \
	  [ -e reports/evidence/$$d ] || { mkdir -p reports/evidence/$$d && cp -R reports/published/runs/$$d/. reports/evidence/$$d; }; done
	$(BIN)/reidnb table $(EVIDENCE) --datasets synthped-small --profile study --seeds $(SEEDS) --workers $(WORKERS) --runs reports/evidence --out reports/evidence/tables

publish: .venv/installed  ## copy RUNS to reports/published, and make its tables and figures again; ARGS='--figures topdb-fig6'
	$(BIN)/reidnb publish $(RUNS) $(ARGS)

test: .venv/installed  ## clean? in step? then every notebook and the ordinary tests: 8 minutes on two quiet cores
	$(BIN)/python tests/run.py

test-all: .venv/installed  ## the same, and the tests that are slow by nature
	$(BIN)/python tests/run.py --slow

check: .venv/installed  ## formatted? linted? notebooks clean, reidnb/ equal to their export, README.md equal to nbs/index.ipynb
	$(BIN)/python tests/run.py --check

export: .venv/installed  ## format the notebooks, and write reidnb/ and README.md from them
	$(BIN)/ruff format
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tests/in_step.py --write

outputs: .venv/installed  ## run the notebooks that keep their outputs, and write what is new; then look at it
	$(BIN)/python tests/run.py --outputs

docs: .venv/installed  ## the notebooks as a site: _site/index.html, every link checked; EXECUTE=no runs nothing (a minute, not ten)
	OMP_NUM_THREADS=1 $(BIN)/python docs/make_site.py $(if $(filter no,$(EXECUTE)),--no-execute)

lab: .venv/installed  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab

clean:          ## remove the environment and the site; data and runs stay
	rm -rf .venv _site build/executed
