# Everything runs in .venv, which is made on first use from constraints.txt (the tested versions).
# `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# vLLM wants other versions of what Coterie needs, so it has an environment of its own, where there is a build of it.
VLLM     := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install -qq --disable-pip-version-check
HAS_VLLM := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -))

# Threads that wait for each other spin by default, which on a machine that others use costs many times the work itself.
export OMP_WAIT_POLICY ?= PASSIVE

# Tests run on all cores, at most eight: one process each, with one thread, or they would wait for each other. A stolen
# test runs where another one of its file does not, so what a file shares is made at most once a process.
# PYTEST_JOBS=0 runs them in one process, for a debugger.
PYTEST_JOBS ?= logical
PYTEST      := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n $(PYTEST_JOBS) --maxprocesses=8 \
	--dist=worksteal

# Fewer bits beside llama.cpp's formats; rows that are kept are not made again.
BITS := OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bits.py --formats Q4_K_M IQ4_XS IQ3_XXS IQ2_M IQ2_XS \
	--json benchmarks/bits.json

.DEFAULT_GOAL := help
.PHONY: help demo test test-more test-slow test-vllm test-browser lint picture docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: $(VENV)/.stamp ## compress the bundled model, evaluate it, draw the report, run it in llama.cpp (minutes, CPU)
	@$(PIP) -e '.[llama]'
	$(BIN)/python benchmarks/demo.py

test: lint ## lint, types and the fast tests (5 minutes on two cores)
	$(BIN)/python -m mypy
	$(PYTEST)

test-more: $(VENV)/.stamp-dev ## every family and every recipe, and the tests that take many seconds
	$(PYTEST) -m '(families or long) and not slow'

test-slow: $(VENV)/.stamp-dev $(if $(HAS_VLLM),$(VLLM)/.stamp) ## the tests that need minutes, and of extras, which are installed
	@$(PIP) -e '.[dev,docs,eval,data]'
	$(PYTEST) -m 'slow or families or long or hypothesis' --hypothesis-profile=thorough
	$(PYTEST) -m 'not slow' tests/evaluate/test_harness.py tests/profile/test_formats.py
	@$(MAKE) --no-print-directory test-browser

test-vllm: $(VENV)/.stamp-dev $(VLLM)/.stamp ## results in a real vLLM (Linux, x86-64; 3 GB); part of test-slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/compress/test_integers_vllm.py

test-browser: $(VENV)/.stamp-dev ## the report and the server's page in a headless Chromium (Debian's, installed if possible)
	@$(PIP) -e '.[dev,browser]'
	COTERIE_SCREENSHOTS=$(CURDIR)/build/screenshots OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser \
		tests/report/test_browser.py tests/serve/test_browser.py

picture: $(VENV)/.stamp-dev demo ## the README's picture of a report (docs/report.png), of a demo made anew
	@$(PIP) -e '.[dev,browser]'
	$(BIN)/python benchmarks/picture.py

docs: $(VENV)/.stamp-dev ## the documentation site, in site/ (`.venv/bin/mkdocs serve` shows it while you write)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.stamp-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.stamp ## all benchmarks, their tables kept in benchmarks/*.md (a day, 50 GB of disk)
	$(BIN)/python benchmarks/demo.py --markdown benchmarks/demo.md
	$(BIN)/python benchmarks/first_steps.py --markdown benchmarks/first_steps.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plain_quantisation.py --markdown benchmarks/plain_quantisation.md
	$(BITS) --models reference/model reference/qwen3_moe --shares 0.16 --seeds 0 1 2 --recipes coterie-bits --markdown benchmarks/bits.md
	$(BITS) --models reference/model reference/qwen3_moe --recipes nearest gptq coterie-bits --markdown benchmarks/bits-plain.md
	$(BITS) --formats IQ4_XS IQ3_XXS IQ2_XS --shares 0.24 0.21 0.16 --recipes coterie-bits-width@packed \
		--markdown benchmarks/bits-packed.md
	$(BITS) --models reference/qwen3_moe --formats --expert-shares 0.25 --tokens 32768 --json benchmarks/bits-shared-base.json \
		--recipes shared-base@packed gptq@packed coterie-bits@packed --markdown benchmarks/bits-shared-base.md
	$(BITS) --models reference/qwen3_moe --formats --expert-shares 0.25 0.1875 0.13 0.1 --recipes coterie-bits-width@packed \
		coterie-bits mxmoe pmq bitsmoe-bits alphaq edgemoe --markdown benchmarks/bits-experts.md
	$(BITS) --models reference/model reference/glm4_moe --formats --expert-shares 0.25 0.13 --recipes \
		coterie-bits-width@packed mxmoe@packed pmq@packed --markdown benchmarks/bits-experts-packed.md
	$(BITS) --models reference/qwen3_moe --formats IQ4_XS --recipes coterie-bits pmq mxmoe alphaq bitsmoe-bits edgemoe \
		--markdown benchmarks/bits-published.md
	$(BIN)/python benchmarks/quantise_speed.py --repeats 1 --types Q6_K Q4_K IQ4_XS Q3_K IQ3_XXS Q2_K IQ2_S IQ2_XXS \
		--markdown benchmarks/quantise_speed.md
	$(BIN)/python benchmarks/block_types.py --markdown benchmarks/block_types.md
	$(BIN)/python benchmarks/planes.py --markdown benchmarks/planes.md
	$(BIN)/python benchmarks/inputs.py --markdown benchmarks/inputs.md
	$(BIN)/python benchmarks/calibration.py --tokens 16384 --test-tokens 10240 --markdown benchmarks/calibration.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py --tokens 131072 --repeats 3 --large-size 0 --recipes reap \
		--markdown benchmarks/overhead.md
	$(BIN)/python benchmarks/run.py --markdown benchmarks/run.md
	$(BIN)/python benchmarks/run_memory.py --markdown benchmarks/run_memory.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_batch.py --markdown benchmarks/run_batch.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_pack.py --markdown benchmarks/run_pack.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_kernels.py --markdown benchmarks/run_kernels.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_kv.py --markdown benchmarks/run_kv.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/route.py --seeds 0 --markdown benchmarks/route.md
	$(BIN)/python benchmarks/run_policies.py --markdown benchmarks/run_policies.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_forecast.py --markdown benchmarks/run_forecast.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_overhead.py --markdown benchmarks/run_overhead.md
	$(BIN)/python benchmarks/memory.py --tokens 2048 --markdown benchmarks/memory.md
	$(BIN)/python benchmarks/memory.py --sizes 2GB 4GB --bundled --tokens 2048 --markdown benchmarks/memory-stages.md
	$(BIN)/python benchmarks/memory.py --sizes 2GB 16GB --commands gptq --limit 7GiB --tokens 4096 \
		--markdown benchmarks/memory-bits.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory_units.py --markdown benchmarks/memory_units.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/research.py --sample-tokens 32768 --markdown benchmarks/research.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/research.py --sample-tokens 32768 --keep 0.75 --only form,refit,rate \
		--markdown benchmarks/research-75.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/research.py --sample-tokens 32768 --keep 0.25 --only form,refit,rate \
		--markdown benchmarks/research-25.md
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/methods.py --recipes average,m-smoe,hc-smoe,mergemoe,mergemoe-output,ream,sub-moe,ppp \
		--routers plain map --removed 0.5 --keep benchmarks/routers
	$(BIN)/python benchmarks/methods.py --recipes heapr-ragged,coterie-ragged --seeds 1 --keep benchmarks/ragged
	$(BIN)/python benchmarks/methods.py --recipes coterie,heapr,naee --effort fast --seeds 1 --jobs 1 --out methods-fast \
		--keep benchmarks/fast

clean: ## remove caches, builds and the demo's results; .venv stays
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo site
	find src tests benchmarks reference -name __pycache__ -type d -prune -exec rm -rf {} +

# The runtime. Installed again only when one of these two files changes.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "No '$(PYTHON)' here: install Python 3.11 or newer, or run: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Coterie needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.11"; exit 1; }
	@echo "Setting up $(VENV) (some minutes the first time: PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

# The development tools on top.
$(VENV)/.stamp-dev: $(VENV)/.stamp
	@$(PIP) -e '.[dev,docs]'
	@touch $@

# vLLM for the tests, begun anew when its versions change. Without dependencies, as the file says; torch brings its own.
$(VLLM)/.stamp: tests/vllm-requirements.txt
	@echo "Setting up $(VLLM) (some minutes)"
	@rm -rf $(VLLM)
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) $$(grep '^torch==' $<)
	@$(VLLM_PIP) --no-deps -r $<
	@touch $@
