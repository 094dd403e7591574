# make demo: the whole chain on the embedded demo set. Before a change lands, .ci/run runs lint, docs and all tests.
# make gpu CALL=1 OUT=DIR: a call on a GPU, uninstalled, with any python that has torch, triton, numpy, pillow, pytest.
PYTHON ?= python3.11
PYTHON312 ?= $(firstword $(filter-out %/shims/python3.12,$(wildcard \
	$(foreach folder,$(subst :, ,$(PATH)),$(folder)/python3.12) $(HOME)/.pyenv/versions/3.12*/bin/python)))
PYTHON_GPU ?= python3
CALL ?= 1
OUT ?= runs/gpu-$(CALL)
COMMIT ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
REHEARSAL := .venv-rehearsal
PEERS := .venv-peers
DOCS := .venv-docs
IN_PARALLEL := -n logical --maxprocesses 8 --dist worksteal --durations 10
# Python compiles what is imported; pip would compile all of torch.
PIP_INSTALL := install --quiet --disable-pip-version-check --no-compile
PEERS_APT := build-essential pkg-config libopencv-dev libturbojpeg0-dev

.PHONY: demo environments test test-main test-kernels test-slow test-main-and-slow test-triton rehearse test-peers soak \
	lint docs bench bench-data gpu gpu-carry clean
.DELETE_ON_ERROR:

environments: $(INSTALLED) $(REHEARSAL)/installed

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(PIP_INSTALL) -c constraints.txt -e '.[test]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/fastbyol-prep demo runs/demo-data --overwrite
	$(BIN)/fastbyol-train demo --data runs/demo-data/train.beton --val runs/demo-data/val.beton \
		--budget 90s --method auto --device cpu --out runs/demo --overwrite
	$(BIN)/fastbyol-eval knn runs/demo --train runs/demo-data/train.beton --val runs/demo-data/val.beton

test: test-main test-kernels

test-main: $(INSTALLED)
	$(BIN)/python -m pytest -m "not peers and not slow" --ignore tests/kernels $(IN_PARALLEL)

# The kernels under Triton's interpreter.
test-kernels: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels $(IN_PARALLEL)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not peers" $(IN_PARALLEL)

# Both, collected once.
test-main-and-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "not peers" --ignore tests/kernels $(IN_PARALLEL)

# Each kernel under the oldest Triton that is supported, which torch 2.11 brings on a GPU: the first case of each test,
# mostly in float32, and every specialisation compiled. Whole steps are left to test-kernels.
test-triton: $(REHEARSAL)/installed
	TRITON_INTERPRET=1 $(REHEARSAL)/bin/python -m pytest tests/kernels --ignore tests/kernels/test_step.py \
		--first-cases $(IN_PARALLEL)
	$(REHEARSAL)/bin/python -m pytest tests/benchmarks/test_aot.py

# The calls of make gpu in reduced form, from a tree without .git, in a GPU machine's own environment. That needs
# python3.12 and 6 GB of disk; no simplejpeg, no installed fastbyol. Its output stays in runs/rehearsal.
rehearse: $(REHEARSAL)/installed
	rm -rf runs/rehearsal && mkdir -p runs/rehearsal
	here=$$PWD; bare=$$(mktemp -d) && trap 'rm -rf "$$bare"' EXIT && mkdir "$$bare/tree" && \
	git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --ignore-failed-read -cf - \
		| tar -xf - -C "$$bare/tree" && cd "$$bare/tree" && for call in 1 2 3 4 5; do \
		$$here/$(REHEARSAL)/bin/python benchmarks/gpu/call.py $$call --out $$here/runs/rehearsal/call-$$call \
			--work ../work --device cpu --sets imagenette $(if $(CARRIED),--carried "$(abspath $(CARRIED))") \
			|| exit 1; done

$(REHEARSAL)/installed: Makefile
	test -n "$(PYTHON312)" || { echo "no python3.12 was found; give make PYTHON312=/path/to/python3.12" >&2; exit 1; }
	test -x $(REHEARSAL)/bin/python || $(PYTHON312) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/pip $(PIP_INSTALL) \
		torch==2.11.0 triton==3.6.0 "numpy<2.4" pillow tqdm safetensors pytest pytest-xdist hypothesis setuptools
	touch $@

# ffcv, DALI, nvJPEG, torchvision, lightly, timm and W&B as oracles; ffcv is built from source. Their environment finds
# torch, Triton and pytest in the tests' own, so that these 2 GB are on the disk once.
test-peers: $(PEERS)/installed
	$(PEERS)/bin/python -c 'import ffcv, nvidia.dali, wandb'  # their tests skip themselves where they are missing
	$(PEERS)/bin/pip show --quiet torchvision lightly timm nvidia-nvjpeg  # of which three import only beside their torch
	timeout 900 $(PEERS)/bin/python -m pytest -m peers tests/loaders/test_contract.py tests/peers

$(PEERS)/installed: $(INSTALLED) constraints-peers.txt
	missing=$$(for name in $(PEERS_APT); do \
		dpkg-query -W -f='$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; done); \
	if [ -n "$$missing" ] && [ "$$(id -u)" != 0 ]; then \
		echo "make test-peers: to build ffcv, first: apt-get install" $$missing >&2; exit 1; \
	elif [ -n "$$missing" ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$packages" > "$$($(PEERS)/bin/python -c "$$packages")/tests.pth"
	$(PEERS)/bin/pip $(PIP_INSTALL) -c constraints.txt -c constraints-peers.txt \
		-e '.[ffcv,dali,nvjpeg,wandb,tensorboard]'
	$(PEERS)/bin/pip $(PIP_INSTALL) --no-deps -c constraints-peers.txt \
		torchvision lightly lightning-utilities timm
	touch $@

# Thirty budgets and fifty kills, which go on where they were stopped and write docs/reliability.md; then damaged files,
# 20 000 betons and 20 000 images.
soak: $(INSTALLED)
	$(BIN)/python -m tests.support.soak
	mkdir -p runs/fuzz && for suite in mutants payloads; do \
		$(BIN)/python -m tests.support.fuzz $$suite runs/fuzz --count 20000 || exit 1; done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, into site/; a dead link or a path that is not in the repository fails. Needs no torch.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/installed: pyproject.toml constraints-docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/pip $(PIP_INSTALL) -c constraints-docs.txt -r $(DOCS)/requirements.txt
	touch $@

bench: $(INSTALLED)
	for group in kernels views step optimizer; do \
		$(BIN)/python benchmarks/bench.py $$group --json benchmarks/results/bench.jsonl || exit 1; done
	$(BIN)/python benchmarks/report.py benchmarks/results/*.jsonl --write

# Loaders and writers against ffcv, DALI and torchvision; DATA=photographs.tar takes your own images.
bench-data: $(PEERS)/installed
	for group in loader prep; do $(PEERS)/bin/python benchmarks/bench.py $$group \
		$(if $(DATA),--data "$(DATA)") --json benchmarks/results/bench.jsonl || exit 1; done

gpu:
	$(PYTHON_GPU) benchmarks/gpu/call.py $(CALL) --out "$(OUT)" --commit "$(COMMIT)"

# What travels with the tree: make gpu-carry CIFAR=cifar10.tar.gz IMAGENETTE=imagenette.tar.gz FAILED=DIR/failed.txt
gpu-carry:
	$(PYTHON) benchmarks/gpu/carry.py $(if $(FAILED),--failed "$(FAILED)") $(CIFAR) $(IMAGENETTE)

clean:
	rm -rf $(VENV) $(REHEARSAL) $(PEERS) $(DOCS) carried build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
