# make demo: the whole chain on the embedded demo set; make lint, test, test-triton, test-peers: what CI runs.
# make gpu: GPU tests and all benchmarks, uninstalled, with any python that has torch, triton, numpy and pytest.
PYTHON ?= python3.11
PYTHON_GPU ?= python3
COMMIT ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
OLDEST := .venv-triton
PEERS := .venv-peers
PEERS_APT := build-essential pkg-config libopencv-dev libturbojpeg0-dev

.PHONY: demo test test-triton test-peers soak lint bench bench-data gpu clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/fastbyol-prep demo runs/demo-data --overwrite
	$(BIN)/fastbyol-train demo --data runs/demo-data/train.beton --val runs/demo-data/val.beton \
		--budget 90s --device cpu --out runs/demo --overwrite
	$(BIN)/fastbyol-eval knn runs/demo --train runs/demo-data/train.beton --val runs/demo-data/val.beton

test: $(INSTALLED)
	$(BIN)/python -m pytest --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels

# The kernels under the oldest Triton that is supported, which torch 2.11 brings on a GPU.
test-triton: $(OLDEST)/installed
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest tests/kernels
	$(OLDEST)/bin/python -m pytest tests/test_aot.py

$(OLDEST)/installed: pyproject.toml setup.py constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -e . pytest torch==2.13.0 triton==3.6.0 "numpy<2.4"
	touch $@

# ffcv, DALI, torchvision, lightly, timm and W&B as oracles, in an environment of their own; ffcv is built from source.
test-peers: $(PEERS)/installed
	$(PEERS)/bin/python -c 'import ffcv, nvidia.dali, wandb'  # their tests skip themselves where they are missing
	$(PEERS)/bin/pip show --quiet torchvision lightly timm  # which import only beside the torch they were built for
	timeout 900 $(PEERS)/bin/python -m pytest -m peers tests/test_loader_contract.py tests/peers

$(PEERS)/installed: pyproject.toml setup.py constraints.txt constraints-peers.txt
	missing=$$(for name in $(PEERS_APT); do \
		dpkg-query -W -f='$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; done); \
	if [ -n "$$missing" ] && [ "$$(id -u)" != 0 ]; then \
		echo "make test-peers: to build ffcv, first: apt-get install" $$missing >&2; exit 1; \
	elif [ -n "$$missing" ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-peers.txt \
		-e '.[ffcv,dali,wandb,tensorboard]' pytest
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps -c constraints-peers.txt \
		torchvision lightly lightning-utilities timm
	touch $@

# Thirty budgets and fifty kills, under an hour; goes on where it was stopped, and writes docs/reliability.md.
soak: $(INSTALLED)
	$(BIN)/python -m tests.soak

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	for group in kernels views step optimizer; do \
		$(BIN)/python benchmarks/bench.py $$group --json benchmarks/results/bench.jsonl || exit 1; done
	$(BIN)/python benchmarks/report.py benchmarks/results/*.jsonl --write

# Loaders and writers against ffcv, DALI and torchvision; DATA=photographs.tar takes your own images.
bench-data: $(PEERS)/installed
	for group in loader prep; do $(PEERS)/bin/python benchmarks/bench.py $$group \
		$(if $(DATA),--data "$(DATA)") --json benchmarks/results/bench.jsonl || exit 1; done

gpu:
	PYTHONUNBUFFERED=1 $(PYTHON_GPU) benchmarks/suite.py --commit "$(COMMIT)"

clean:
	rm -rf $(VENV) $(OLDEST) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
