# make train: from a fresh clone to a trained model and a text that it writes. make test: the whole suite.
# Both need Python >= 3.10 and nothing else; what they install lies in .venv. Variables: PYTHON, TORCH_INDEX (where to
# get torch from, for a build with or without CUDA), CONFIG, ARGS (overrides such as ARGS="train.steps=50").

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=
TORCH := $(shell sed -n 's/^torch==/&/p' constraints.txt)
BIN := .venv/bin
CORPUS := data/sotu/manifest.json

.PHONY: train test clean
.DELETE_ON_ERROR:

train: $(CORPUS)
	$(BIN)/roots train $(CONFIG) $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

$(CORPUS): | .venv/installed
	$(BIN)/roots prepare embedded:state-of-the-union --output $(@D) --vocab 4096

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "✗ $(PYTHON) is older than Python 3.10, or missing. Fix: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "✗ $(PYTHON) cannot make a virtual environment. Fix: install its venv module"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
