# Every command of the project. `make` alone prints this list.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# What `make setup` installs. TORCH_INDEX=URL takes torch from an index of its own, for instance
# for a build without CUDA libraries.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRAS ?= dev

GENERATED := proto/shard_pb2.py proto/shard_pb2.pyi proto/shard_pb2_grpc.py proto/shard_pb2_grpc.pyi \
  README.md API.md docker/METRICS.md docker/grafana/dashboards/tessera.json docker/compose.yaml \
  $(wildcard docker/models/*.env)

# `make run` serves the demo model, two shards on a CPU, at port 8000. Every setting is a variable:
# `make run MODEL_ID=llava-hf/llava-v1.6-mistral-7b-hf NUM_SHARD=1 PORT=8080 DTYPE=bfloat16`.
ONCE ?=

help:  ## this list
	@grep -hE '^[a-z][a-z_-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed $(VENV)/.kernels  ## make the virtual environment and build the CPU kernels

run: setup  ## start the server, ask it about a picture, serve on (ONCE=1: stop then)
	@exec $(BIN)/python -m tessera.launcher.ask $(if $(filter-out 0 false,$(ONCE)),--once)

# The stamps make a second call start at once; each step runs again when what it depends on changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Error: $(PYTHON) is older than 3.11; say make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and pinned: the package needs it to build, and other versions are not tested.
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.made
	@echo "==> $(TORCH)"
	@$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@echo "==> tessera and what it needs"
	@$(BIN)/python -m pip install 'setuptools>=77' wheel
	@$(BIN)/python -m pip install --no-build-isolation -e '.[$(EXTRAS)]' '$(TORCH)'
	@touch $@

$(VENV)/.kernels: shard/backends/build.py $(wildcard shard/backends/csrc/*) $(VENV)/.installed
	@echo "==> CPU kernels (C++, about a minute)"
	@$(BIN)/python -m tessera.shard.backends.build
	@touch $@

typed:  ## the import layout that type checkers need (links in .typed/)
	@mkdir -p .typed/tessera && for p in launcher proto router shard; do ln -sfn ../../$$p .typed/tessera/$$p; done

proto: typed  ## regenerate the stubs from proto/shard.proto
	@mkdir -p build/proto && cd .typed && ../$(BIN)/python -m grpc_tools.protoc -I . \
	  --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. tessera/proto/shard.proto

test: setup client-envs triton-env  ## all tests that need no accelerator
	$(BIN)/python -m pytest -q --ignore=tests/operations

triton-env: setup  ## install the Triton that tests kernels for GPUs without one into build/triton-env
	@$(BIN)/python -m tests.shard.backends.triton_environment

ipex-env: setup  ## install Intel's IPEX and the torch it needs, 2 GB, into build/ipex-env
	@timeout 900 $(BIN)/python -m tests.shard.backends.ipex_environment

test-ipex: ipex-env  ## the backend of Intel's IPEX, with its build for processors
	PYTHONPATH=build/ipex-env $(BIN)/python -m pytest -q -k ipex \
	  tests/shard/backends/test_{ipex,conformance,quantized_linear}.py tests/shard/models

client-envs: setup  ## install the older clients the tests run into build/client-envs
	@$(BIN)/python -m tests.clients.environments

client-table: client-envs  ## write what the client tests see into API.md
	-$(BIN)/python -m pytest -q tests/clients/test_compatibility.py
	cp build/compatibility.json tests/clients/compatibility.json
	@$(MAKE) --no-print-directory docs

browser:  ## install the chromium that tests of the page at /ui drive (Debian, as root)
	@command -v chromium >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

monitoring:  ## install the Prometheus and Alertmanager of make test-ops (Debian, as root)
	@command -v prometheus >/dev/null && command -v prometheus-alertmanager >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager; }

test-ops: setup  ## metrics, dashboards and alerts with the real Prometheus, a killed shard included
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) --no-print-directory monitoring || true; fi
	@command -v prometheus >/dev/null && command -v prometheus-alertmanager >/dev/null \
	  || echo "NO PROMETHEUS: dashboards and alerts will not be tested" >&2
	$(BIN)/python -m pytest -q tests/operations

# LEAK_MINUTES=10 also watches the memory under so many minutes of load. No setup: where the GPU is, an
# interpreter with the packages may be all there is (make test-cuda PYTHON_GPU=python3). A file of
# tests whose packages are not there is an error at the end; the others run.
PYTHON_GPU ?= $(BIN)/python
LEAK_MINUTES ?= 0
test-cuda: typed  ## the correctness tests on an NVIDIA GPU: kernels, parity, ranks, the whole server
	@export PYTHONPATH=$(CURDIR)/.typed$${PYTHONPATH:+:$$PYTHONPATH}; \
	if $(PYTHON_GPU) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  LEAK_MINUTES=$(LEAK_MINUTES) $(PYTHON_GPU) -m pytest -q --continue-on-collection-errors \
	    -k cuda tests/cuda tests/shard; \
	else echo "NO GPU: the CUDA backend is not tested" >&2; fi

lock: setup  ## renew docker/requirements.lock where pyproject.toml asks for more
	@$(BIN)/python -m pip install -q pip-tools==7.6.2
	@$(BIN)/python docker/lock.py

docker-engine:  ## install the Docker engine of make test-docker (Debian, as root)
	@command -v dockerd >/dev/null && command -v docker-compose >/dev/null && command -v debootstrap >/dev/null \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  docker.io docker-compose iptables iproute2 debootstrap; }

# IMAGE=NAME tries an image that is there; IMAGES=all builds those for GPUs as well.
test-docker: setup  ## build the image, try it locked down, and compose.yaml with its monitoring
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  timeout 600 $(MAKE) --no-print-directory docker-engine || true; fi
	TEST_DOCKER=1 IMAGE=$(IMAGE) IMAGES=$(IMAGES) timeout 2400 $(BIN)/python -m pytest -q tests/docker/with_engine

bench: setup  ## time steps, server and start on this CPU into benchmark/results (a quarter of an hour)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install -q 'matplotlib>=3.11'
	$(BIN)/python -m benchmark.step --rounds 3 --growth --out benchmark/results/step.json --plots benchmark/results
	$(BIN)/python -m benchmark.stack --out benchmark/results/stack.json
	$(BIN)/python -m benchmark.start --out benchmark/results/start.json

screenshot: setup  ## draw the picture of the page at /ui anew
	$(BIN)/python -m tests.end_to_end.screenshot

check: setup typed  ## ruff, mypy --strict, import contracts, generated files current
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p tessera.launcher -p tessera.proto -p tessera.router -p tessera.shard
	$(BIN)/lint-imports
	@before=$$(cat $(GENERATED) | sha256sum); $(MAKE) --no-print-directory -s proto docs; \
	  test "$$before" = "$$(cat $(GENERATED) | sha256sum)" \
	  || { echo "generated files were not current; 'make proto docs' has written them"; exit 1; }

docs:  ## write the tables of settings, clients, speed, metrics and models' needs, and Grafana's dashboard
	@$(BIN)/python tests/contracts/readme.py
	@$(BIN)/python tests/contracts/client_table.py
	@$(BIN)/python tests/contracts/speed_section.py
	@$(BIN)/python tests/contracts/metrics_page.py
	@$(BIN)/python tests/contracts/compose_settings.py
	@$(BIN)/python tests/contracts/model_envs.py
	@$(BIN)/python docker/grafana/dashboard.py

format:  ## format and sort imports
	$(BIN)/ruff check --fix-only -q
	$(BIN)/ruff format -q
