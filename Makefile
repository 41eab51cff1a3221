# Two commands: `make demo` and `make test`. Both set everything up first, and are quick the second time.
PYTHON ?= python3
VENV ?= .venv
FUZZ_EXAMPLES ?= 5000
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PYTHON_FILES := fpn_fast pytest_fpn_fast.py tests benchmarks examples tools setup.py
CPP_FILES := $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz sanitize wheel test-wheel test-mmdet test-family test-oldest build bench docs lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@$(BIN)/python tools/progress.py $(VENV)/build.log \
		$(BIN)/python -m pip install --no-build-isolation --no-deps --verbose -e .
	@touch $@

build: $(VENV)/.built  ## .venv with pinned dependencies, and the compiled library

demo: build  ## train a small Faster R-CNN on digits in photographs, torchvision's and ours (about 4 minutes on 2 cores)
	$(BIN)/python examples/train_detector.py --compare --backbone slim_resnet --heads tiny --channels 64 --image-size 128 \
		--smallest-digit 24 --batch-size 4 --steps 600 --lr 3e-3 --lr-steps 390 540 --threads 1 --workers 1 \
		--eval-images 100 --output output/demo

test: build  ## all tests that this machine can run
	$(BIN)/python -m pytest tests -n auto --dist worksteal $(PYTEST_ARGS)

fuzz: build  ## every op with arguments that nobody should give it, for as long as FUZZ_EXAMPLES of each take
	FPN_FAST_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/test_fuzz.py -q

sanitize: build  ## every op's tests on the CPU with the library under the address and undefined-behaviour sanitizers
	PYTHONPATH=tests $(BIN)/python -m helpers.sanitized_library $(PYTEST_ARGS)

# Environments over the one above: what the requirements do not name is its.
$(VENV)-%/.installed: $(VENV)/.installed requirements-%.txt
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(VENV)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/development.pth"
	$(VENV)-$*/bin/python -m pip install --quiet --no-deps -r requirements-$*.txt
	@touch $@

wheel: $(VENV)/.installed  ## the wheel for Linux x86-64 in dist/, checked, installed and verified in a new environment
	FPN_FAST_CUDA=$${FPN_FAST_CUDA:-1} $(BIN)/python tools/build_wheel.py $(WHEEL_ARGS)

test-wheel: $(VENV)/.installed  ## the same, under every Python from 3.10 on that this machine has
	FPN_FAST_CUDA=$${FPN_FAST_CUDA:-1} $(BIN)/python tools/build_wheel.py --every-python $(WHEEL_ARGS)

test-mmdet: build $(VENV)-mmdet/.installed  ## our modules beside mmdetection's own, in an environment that has it
	$(VENV)-mmdet/bin/python -m pytest tests/against_mmdet.py $(PYTEST_ARGS)

test-family: build $(VENV)-family/.installed  ## our pyramids beside the originals, in an environment that has them
	$(VENV)-family/bin/python -m pytest tests/against_family.py $(PYTEST_ARGS)

test-oldest: build $(VENV)-oldest/.installed  ## all tests with the oldest torch that the library serves, as built with ours
	$(VENV)-oldest/bin/python -m pytest tests -n auto --dist worksteal $(PYTEST_ARGS)

bench: build  ## benchmarks, as ratios to eager PyTorch and torch.compile
	$(BIN)/python -m benchmarks --output output/benchmarks $(BENCH_ARGS)

docs: $(VENV)/.installed  ## the documentation as a site, in output/site; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed  ## ruff, clang-format and mypy
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-mmdet $(VENV)-family $(VENV)-oldest build dist output *.egg-info fpn_fast/*.so
