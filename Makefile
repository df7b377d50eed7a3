# Every command of the project. `make` alone prints this list.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

help:  ## this list
	@grep -hE '^[a-z][a-z_-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

typed:  ## the import layout that type checkers need (links in .typed/)
	@mkdir -p .typed/tessera && for p in launcher proto router shard; do ln -sfn ../../$$p .typed/tessera/$$p; done

proto: typed  ## regenerate the stubs from proto/shard.proto
	@mkdir -p build/proto && cd .typed && ../$(BIN)/python -m grpc_tools.protoc -I . \
	  --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. tessera/proto/shard.proto

test: setup  ## all tests that need no accelerator
	$(BIN)/python -m pytest -q

check: setup typed  ## ruff, mypy --strict, import contracts, generated files current
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p tessera.launcher -p tessera.proto -p tessera.router -p tessera.shard
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory proto docs && git diff --exit-code -- proto README.md \
	  || { echo "generated files were not current: commit what 'make proto docs' wrote"; exit 1; }

docs:  ## write the settings table into README.md
	@$(BIN)/python tests/contracts/readme.py

format:  ## format and sort imports
	$(BIN)/ruff check --fix-only -q
	$(BIN)/ruff format -q
