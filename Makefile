# Everyday commands. Each makes or updates .venv first; a finished set-up takes no time.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types style format acceptance lock openapi docs release audit images containers-test clean

BIN := .venv/bin
PACKAGES := adapters bank bench demo evaluation mta_client server
SCRIPTS := deploy/setup.sh deploy/locks/lock.sh deploy/console/vendor.sh .ci/run
WORKERS := logical --maxprocesses 4
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: ## make .venv with everything (GPU=1 or GPU=0 picks the build of vLLM, PYTHON the interpreter)
	@deploy/setup.sh

demo: setup ## from nothing to personalised answers, in a table
	@$(BIN)/mta demo --data out/demo/data

test: lint ## lint, then run every test, on data that the tests make themselves
	$(PYTEST) tests --durations=15

check: lint ## lint, then run the unit and contract tests: before a commit
	$(PYTEST) tests/unit tests/contract -q

lint: ## check formatting, style, types, layers, security, shell scripts
	@deploy/setup.sh tools
	@$(MAKE) --no-print-directory --jobs 2 --output-sync types style

types:
	$(BIN)/mypy

style:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r $(PACKAGES)
	@if command -v shellcheck >/dev/null; then echo shellcheck $(SCRIPTS); shellcheck $(SCRIPTS); \
	 else echo "shellcheck is not installed: the shell scripts are not checked"; fi
	@if command -v luacheck >/dev/null; then luacheck -q server/store/lua; \
	 else echo "luacheck is not installed: the store's scripts are not checked"; fi

format: setup ## let ruff format and fix the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

acceptance: setup ## the long checks, in one table (DATA=folder of the real histories; RESUME=1 keeps what passed, STEP=name runs one)
	@test -n "$(DATA)" || { echo "say where the histories are: make acceptance DATA=../shared/data" >&2; exit 2; }
	$(BIN)/python -m bench.acceptance --data "$(DATA)" $(if $(RESUME),--resume) $(if $(STEP),--only "$(STEP)")

lock: setup ## pin the packages of the images, with hashes, in deploy/locks
	deploy/locks/lock.sh

openapi: setup ## write the API's description to docs/openapi.json, for reviews of what changed
	@$(BIN)/python -c 'import json; from server.gateway.app import create_app; from server.settings import Settings; \
	  print(json.dumps(create_app(Settings()).openapi(), indent=1, ensure_ascii=False))' > docs/openapi.json

docs: setup ## make the site out/site from README and docs/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f deploy/site/mkdocs.yml

release: setup ## make what a release consists of in out/release, and publish nothing
	$(BIN)/python -m deploy.release

audit: setup ## an SBOM of each image in out/sbom, and what is known to be vulnerable in them
	$(BIN)/python -m deploy.audit

images: ## build the images for CPUs (GPU=1 for GPUs; STAND_INS=1 where no registry of images can be reached)
	@GPU=$(filter 0,$(GPU)) deploy/setup.sh containers # GPU=1 is about the image, and not about .venv
	$(BIN)/python -m deploy.containers images

containers-test: ## run the compose files with those images: start, use, kill, upgrade, observe (half an hour)
	@deploy/setup.sh containers
	$(BIN)/python -m deploy.containers test

clean: ## remove everything that was made here: .venv, out/, caches
	rm -rf .venv out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +
