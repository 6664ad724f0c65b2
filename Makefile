# Two commands need nothing but Python 3.10+ and make: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-apart test-models test-integrations contract lint readme hero in-force figures gpu organism clean

quickstart: $(VENV)/.installed  ## the main job: the embedded model, untouched and under six methods, each beside its control
	$(BIN)/vlmfix eval

APART := tests/demo tests/organism tests/serve tests/eval/tune tests/eval/run/test_parallel.py tests/eval/test_workers.py \
	tests/carry/test_fresh.py tests/test_wheel.py tests/test_examples.py tests/test_fix_page.py

test: $(VENV)/.dev lint  ## under ten minutes: each method of the contract on one family, and nothing that trains, tunes, serves or starts many programs
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=5 $(APART:%=--ignore %)

test-apart: $(VENV)/.dev  ## the demo, in a browser, too; training, tuning, the server, the built package, the examples, several processes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5 $(APART)

test-models: $(VENV)/.dev  ## the contract over every model type of transformers, every method on every family, and compiled code
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations=5 tests/contract --all-models

test-integrations: $(VENV)/.dev  ## lmms-eval and the openai client, end to end, in a folder of their own (93 MB); a few minutes
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target build/integrations \
		-r tests/integrations/requirements.txt
	PYTHONPATH=$(CURDIR)/build/integrations $(BIN)/python -m pytest -q tests/integrations tests/serve

contract: $(VENV)/.dev  ## what every method must keep, for one method: make contract METHOD=var
	$(BIN)/python -m pytest -q --method $(METHOD) tests/contract/test_contract.py tests/contract/test_zoo.py \
		tests/asking/test_ask_stages.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p vlmfix

readme: $(VENV)/.installed  ## figures and tables of the README and docs, from the kept answers of the main job
	$(BIN)/python -m tools.readme

hero: $(VENV)/.installed  ## the picture at the head of the README, light and dark; needs Chromium
	$(BIN)/python -m tools.hero

in-force: $(VENV)/.dev  ## the table of ways to call a wrapped model, docs/in-force.md; a few minutes
	$(BIN)/python tools/in_force.py

figures: $(VENV)/.dev  ## the pictures of the README
	$(BIN)/python -m pytest -q tests/demo/test_demo_browser.py -k screenshots --screenshots
	cp build/demo/compare-1400-light.png assets/figures/demo.png

gpu: $(VENV)/.installed  ## what is to be measured on a GPU, in under ten minutes, into build/gpu
	$(BIN)/python tools/gpu.py

organism: $(VENV)/.installed  ## a model that hallucinates on purpose, into runs/organism; goes on where it was stopped
	nice $(BIN)/python -m vlmfix.organism.train

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vlmfix needs Python 3.10 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
