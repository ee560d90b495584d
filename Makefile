# make demo       install, fetch a pair of models, answer one question with every system
# make test       install, run the tests (about 5 minutes on two cores)
# make test-slow  the long ones: processes, soak, notebooks, browser
# make fuzz       property tests with one seed after the other, for 10 minutes (SECONDS=600 SEED=1)
# make lint       formatting, lint, strict types

PYTHON ?= python3
VENV ?= .venv
# tests run in so many processes with one thread each: two with two threads each wait for each other
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
# uv installs in a tenth of pip's time; pip is used where there is no uv
UV := $(shell command -v uv 2>/dev/null)
# uv does not read pip's settings: a folder or page of further builds, such as those of torch without CUDA
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow fuzz test-real test-vllm lint format results bench docs docs-serve notebooks pictures install clean

install: $(STAMP)

# $(call make-environment,FOLDER,REQUIREMENTS)
ifdef UV
make-environment = uv venv --quiet --allow-existing --python $(PYTHON) $(1) && uv pip install --quiet --python $(1)/bin/python $(2)
else
make-environment = $(PYTHON) -m venv $(1) && $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
endif

$(STAMP): pyproject.toml constraints.txt src/c2c/version.py
	$(call make-environment,$(VENV),-c constraints.txt -e '.[dev]')
	@touch $@

FUSER := zoo/smollm2-135m_from_qwen2.5-coder-1.5b
define QUESTION
Answer the following multiple choice question with the letter of the correct option.

Question: Which of these would help a plant in a dark cupboard to grow?
A. a louder radio
B. a lamp
C. a heavier pot
D. a locked door
endef
export QUESTION

demo: $(STAMP)
	$(BIN)/c2c pull smollm2-135m qwen2.5-coder-1.5b
	@printf '%s' "$$QUESTION" | $(BIN)/c2c run - --fuser $(FUSER) --system "You are a helpful assistant." \
		--answer-prefix "The answer is" --max-new-tokens 2

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# messages, rows, request bodies and configurations drawn anew for each seed; stops at what fails
SECONDS ?= 600
SEED ?= 1

fuzz: $(STAMP)
	@seed=$(SEED); end=$$(($$(date +%s) + $(SECONDS))); while [ $$(date +%s) -lt $$end ]; do \
		echo "seed $$seed"; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fuzz -p no:cacheprovider \
			--hypothesis-seed=$$seed --hypothesis-show-statistics $(PYTEST_ARGS) > .fuzz.log || { cat .fuzz.log; exit 1; }; \
		awk '/ passing, /{n += $$2} END {print n " inputs"}' .fuzz.log; seed=$$((seed + 1)); done; rm .fuzz.log

# the tests on real models, fetched first
test-real: $(STAMP)
	$(BIN)/c2c pull smollm2-135m qwen2.5-coder-0.5b gemma3-270m
	C2C_REAL=1 $(BIN)/python -m pytest -m real $(PYTEST_ARGS)

# the tests of the vLLM engine, in an environment of its own: vLLM needs an older transformers than the rest is tested
# with (5.19), and brings builds of three packages for CUDA, which it does not start with on a CPU and does not need
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

$(VLLM_STAMP): pyproject.toml src/c2c/version.py
	$(call make-environment,$(VLLM),-e '.[vllm]' openai pip pytest)
	$(VLLM)/bin/python -m pip --quiet --disable-pip-version-check uninstall --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_parts.py $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/c2c report results --markdown docs/results.md --plots docs/results --readme README.md --check

# docs/results.md, its plots and the README's table, from the result files
results: $(STAMP)
	$(BIN)/c2c report results --markdown docs/results.md --plots docs/results --readme README.md

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/train_step.py

# the documentation as a site in site/, every warning an error; docs-serve shows it while it is written
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# both notebooks once more, with the outputs that they are kept with: real models, 9 GB of free memory
notebooks: $(STAMP)
	$(BIN)/c2c pull smollm2-135m qwen2.5-coder-1.5b
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python docs/tools/notebooks.py

# the pictures of the demo in docs/images/, taken in a headless Chromium: real models, 6 GB of free memory
pictures: $(STAMP)
	$(BIN)/c2c pull smollm2-135m qwen2.5-coder-1.5b qwen2.5-coder-0.5b
	$(BIN)/python docs/tools/pictures.py

clean:
	rm -rf site $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
