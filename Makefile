# Two commands do all the set-up: `make quickstart` and `make test`. Both work from a bare clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Nothing but the package installs needs a network.
export HF_HUB_OFFLINE = 1

# Tests use one thread each, so that every core can run a process. Some wait for servers and processes meanwhile: half as many more.
WORKERS ?= $(shell $(PYTHON) -c "import os; n = os.cpu_count() or 1; print(n + n // 2)")

.PHONY: quickstart table test test-all docs lint clean

quickstart: $(VENV)/.installed ## captions, fine-tuning, evaluation and two predictions on the embedded data
	$(BIN)/mmft-hf caption --captioner columns --config recipes/quickstart/caption.yaml --overwrite_output_dir true
	@echo
	$(BIN)/mmft-hf finetune --config recipes/quickstart/finetune.yaml --overwrite_output_dir true \
	  --dataset_name outputs/quickstart/captioned --captions_column captions
	@echo
	$(BIN)/python recipes/quickstart/two_pictures.py outputs/quickstart/pictures
	$(BIN)/mmft-hf predict outputs/quickstart/pictures --model_name_or_path outputs/quickstart/run
	@echo
	@echo "Results, model and card: outputs/quickstart/run   Captioned data: outputs/quickstart/captioned"
	@echo "Your own pictures, one folder per class: $(BIN)/mmft-hf finetune --dataset_name FOLDER --output_dir outputs/mine"

table: $(VENV)/.installed ## the runs of the table in the README: heads on both embedded models, without and with captions
	for model in photo tiny-clip; do for captions in none text; do \
	  $(BIN)/mmft-hf finetune --dataset_name builtin/emoji-mini --model_name_or_path builtin/$$model --num_train_epochs 0 \
	    $$(test $$captions = none || echo --captions_column $$captions) \
	    --output_dir outputs/table/$$model-$$captions --overwrite_output_dir true || exit; \
	done; done

test: lint ## ruff and the fast tests, in parallel
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not slow"

test-all: lint ## ruff and all tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

docs: $(VENV)/.documented ## the documentation as a site, in outputs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch first, so that no other package asks for a newer one.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

lint: $(VENV)/.tested ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs build *.egg-info
