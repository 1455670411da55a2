# make train: from a fresh clone to a trained model and a text that it writes. make test: every rule and every pair of
# features, in minutes. make test-full: the whole products too, of which `make test` runs a cover of pairs. make mutants:
# every bug of tests/mutants is planted, one by one, and must be noticed. make check: ruff, its formatter, mypy --strict,
# shellcheck, links. make docs: the documentation site, into .site; a link that leads nowhere stops it. make audit: what is
# installed, against the known vulnerabilities of PyPI. All need Python >= 3.10 and nothing else; what they install lies
# in .venv, each no more than it needs. Variables: PYTHON, TORCH_INDEX (where to get torch from, for a build with or
# without CUDA), CONFIG, ARGS (overrides such as ARGS="train.steps=50", or options such as ARGS="--only NAME").

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=
TORCH := $(shell sed -n 's/^torch==/&/p' constraints.txt)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
WORKERS := -n logical --maxprocesses 4 --dist worksteal
CORPUS := data/sotu/manifest.json
export PYTHONDONTWRITEBYTECODE := # images set it: every process that starts would compile torch again, for 2 seconds

.PHONY: train test test-full gpu mutants check audit docs clean
.DELETE_ON_ERROR:

train: $(CORPUS)
	$(BIN)/roots train $(CONFIG) $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-full: .venv/test-full
	$(BIN)/python -m pytest $(WORKERS) -m "full or not full" $(ARGS)

gpu: .venv/test
	$(BIN)/python -m pytest tests/gpu tests/unit/test_rng_triton.py tests/unit/test_attention_triton.py -rs $(ARGS)

mutants: .venv/test
	$(BIN)/python -m tests.mutants.run --workers 2 $(ARGS)

check: .venv/check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh roots_dist/runs/launch/templates/*.sh .ci/run
	$(BIN)/python -m pytest tests/test_links.py

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "to read it, with search: $(BIN)/python -m http.server -d .site, then http://localhost:8000"

audit: .venv/train
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit; }
	.venv-audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') $(ARGS)

$(CORPUS): | .venv/train
	$(BIN)/roots prepare embedded:state-of-the-union --output $(@D) --vocab 4096

.venv/train: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "✗ $(PYTHON) is older than Python 3.10, or missing. Fix: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "✗ $(PYTHON) cannot make a virtual environment. Fix: install its venv module"; exit 1; }
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(INSTALL) -e .
	@touch $@

.venv/test: .venv/train
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/test-full: .venv/test # apart: what speaks to S3 takes the installer minutes
	$(INSTALL) -e '.[test-full]'
	@touch $@

.venv/check: .venv/train
	$(INSTALL) -e '.[check]'
	@touch $@

.venv/docs: .venv/train
	$(INSTALL) -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-audit
