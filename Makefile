# Everything below needs only Python 3.11 or newer and make. The first run makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo weights test notebooks lint clean

demo: .venv/core  ## the whole paper in miniature, from nothing
	$(BIN)/python train.py miniature --out runs/miniature

weights: .venv/core  ## remake weights/miniature
	$(BIN)/python train.py miniature --out runs/full --recipe full --bundle weights/miniature

test: .venv/core  ## the test suite
	$(BIN)/python -m pytest

notebooks: .venv/notebooks  ## run the notebooks anew and keep what they show
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams notebooks/*.ipynb

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/core: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/notebooks: .venv/core .ci/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[notebooks]"
	touch $@

.venv/lint: .venv/core .ci/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[lint]"
	touch $@
