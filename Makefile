# Needs Python 3.11 or newer with its venv module, and make. Everything else lands in .venv.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check

# The stamps carry what was done last; each is older than its inputs only when there is work to do.
VENV := .venv/.created
RUN_LOCK := .venv/.run-lock
DEV_LOCK := .venv/.dev-lock
PROJECT := .venv/.project
# The baselines have an environment of their own: what they need, the service does not.
BENCH_LOCK := .venv-bench/.lock
BENCH_GO := bench/baselines/go/built/orders
BENCH_NODE := bench/baselines/fastify/node_modules/.lock
# So do the programs that make clients of the interface, and Locust. Some of them run on Node.
CLIENTS_PYTHON := .clients/python/.lock
CLIENTS_NODE := .clients/node/.lock
# And so does a server that answers like Stripe.
LOCALSTRIPE := .localstripe/.lock
# And so does what looks up known weaknesses.
AUDIT := .audit/.lock

define FIND_PYTHON
	for python in python3.11 python3 python3.12 python3.13; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Expediter needs Python 3.11 or newer on the PATH; python3 is: $$(python3 --version 2>&1)" >&2; \
	    exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$python has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; \
	fi
endef

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	    | while IFS='|' read -r target text; do printf '  %-20s %s\n' "$$target" "$$text"; done

.PHONY: run
run: $(RUN_LOCK) $(PROJECT) ## Serve orders on http://127.0.0.1:8000
	@exec $(BIN)/expediter serve

# Whoever has no npm, or no network now, runs everything else. With CI=true, tests whose programs are missing fail.
.PHONY: test
test: $(DEV_LOCK) $(PROJECT) ## Run the tests
	@$(MAKE) --no-print-directory --keep-going clients \
	    || echo "The tests of generated clients go without what could not be installed" >&2
	@$(MAKE) --no-print-directory localstripe || echo "The tests on localstripe are skipped" >&2
	$(BIN)/python -m pytest

.PHONY: clients
clients: $(CLIENTS_PYTHON) $(CLIENTS_NODE) ## Install what makes clients of the interface, and Locust (needs npm)

.PHONY: localstripe
localstripe: $(LOCALSTRIPE) ## Install a server that answers like Stripe, for the tests

# Some fifty minutes on two busy processors. The table is written only if all went well.
FAULTS_TALLY := .venv/.faults.jsonl

.PHONY: test-faults
test-faults: $(DEV_LOCK) $(PROJECT) ## Bring about every fault on every database, and write the table of docs/guarantees.md
	@rm -f $(FAULTS_TALLY)
	EXPEDITER_FAULTS=all EXPEDITER_FAULTS_TALLY=$(CURDIR)/$(FAULTS_TALLY) \
	    $(BIN)/python -m pytest -n2 --dist=load tests/faults $(ARGS)
	$(BIN)/python docs/faults.py $(FAULTS_TALLY)

.PHONY: walk
walk: $(DEV_LOCK) $(PROJECT) ## Let many processes and clients meet until a law breaks (ARGS="--on postgresql --minutes 30")
	@$(BIN)/python tests/walk/endless.py $(ARGS)

.PHONY: race
race: $(DEV_LOCK) $(PROJECT) ## Cancel orders while several processes charge them (ARGS="--on postgresql --processes 4 --kills")
	@$(BIN)/python tests/walk/race.py $(ARGS)

.PHONY: pay
pay: $(DEV_LOCK) $(PROJECT) ## Send orders through a gateway that loses answers, by workers that die (ARGS="--on postgresql")
	@$(BIN)/python tests/walk/paying.py $(ARGS)

.PHONY: lint
lint: $(DEV_LOCK) $(PROJECT) ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The database of known weaknesses is elsewhere, so this is no part of `make lint`, which needs no network.
.PHONY: audit
audit: $(AUDIT) ## Look up whether a library that is served has a known weakness (needs a network)
	@said=$$(.audit/bin/pip-audit --requirement requirements.txt --require-hashes --disable-pip \
	    --progress-spinner off 2>&1); status=$$?; \
	case "$$said" in *requests.exceptions.*) \
	    echo "make audit has looked up nothing: the database of known weaknesses cannot be reached from here" >&2; \
	    exit 2;; esac; \
	echo "$$said"; exit $$status

# Each round has other inputs than the one before.
.PHONY: fuzz
fuzz: $(DEV_LOCK) $(PROJECT) ## Read random orders and requests until one is neither taken nor refused (stop it with Ctrl-C)
	@while EXPEDITER_FUZZ=20000 $(BIN)/python -m pytest -q -n0 tests/web/test_fuzz.py $(ARGS); do :; done; exit 1

.PHONY: format
format: $(DEV_LOCK) ## Repair style and format where a machine can
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: docs
docs: $(DEV_LOCK) $(PROJECT) ## Draw in the documents what is drawn from the code
	$(BIN)/python docs/lifecycle.py
	$(BIN)/python docs/promises.py
	$(BIN)/python docs/commands.py
	$(BIN)/python docs/settings.py
	$(BIN)/python docs/events.py
	$(BIN)/python docs/limits.py
	$(BIN)/python docs/postman.py

.PHONY: outage
outage: $(DEV_LOCK) $(PROJECT) ## Draw a minute without the gateway, for docs/monitoring.md (needs prometheus and chromium)
	@$(BIN)/python tests/outage.py

.PHONY: example
example: $(DEV_LOCK) $(PROJECT) ## Send a month of an online shop's orders through the service
	$(BIN)/python examples/online_retail.py $(ARGS)

.PHONY: load
load: $(CLIENTS_PYTHON) ## Put load on a service at http://127.0.0.1:8000 for 30 seconds (ARGS="--host ... --users 200")
	@.clients/python/bin/locust --locustfile examples/locustfile.py --headless --only-summary \
	    --host http://127.0.0.1:8000 --users 50 --spawn-rate 50 --run-time 30s $(ARGS)

.PHONY: bad-input
bad-input: $(VENV) ## Send all bad input to a service at http://127.0.0.1:8000 (ARGS="http://... --behind-nginx --password ...")
	@$(BIN)/python tests/bad_input.py $(ARGS)

# Where Go or Node is missing, the rows that are compared with it say so, and the others are measured.
define BASELINES
	@$(MAKE) --no-print-directory --keep-going baselines || echo "The rows say what they go without" >&2
endef

.PHONY: bench
bench: $(DEV_LOCK) $(PROJECT) $(BENCH_LOCK) ## Measure the service against its baselines (needs wrk; 40 minutes)
	$(BASELINES)
	@$(BIN)/python bench/run.py $(ARGS)

.PHONY: bench-quick
bench-quick: $(DEV_LOCK) $(PROJECT) $(BENCH_LOCK) ## Measure intake, cached reads and the pipeline, in a few minutes
	$(BASELINES)
	@$(BIN)/python bench/run.py --quick $(ARGS)

.PHONY: baselines
baselines: $(BENCH_GO) $(BENCH_NODE) ## Build what the service is measured against in Go and Node

.PHONY: lock
lock: ## Renew the locked requirements (needs uv and npm)
	@command -v uv >/dev/null || { echo "make lock needs uv on the PATH" >&2; exit 1; }
	@command -v npm >/dev/null || { echo "make lock needs npm on the PATH" >&2; exit 1; }
	@$(call LOCK,pyproject.toml,requirements.txt)
	@$(call LOCK,pyproject.toml --extra dev --constraints requirements.txt,requirements-dev.txt)
	@$(call LOCK,bench/requirements.in --no-annotate --constraints requirements-dev.txt,bench/requirements.txt)
	@$(call LOCK,tests/clients/requirements.in --no-annotate,tests/clients/requirements.txt)
	@$(call LOCK,tests/audit/requirements.in --no-annotate,tests/audit/requirements.txt)
	@$(call LOCK,tests/payments/localstripe/requirements.in --no-annotate,tests/payments/localstripe/requirements.txt)
	@$(call LOCK_NODE,tests/clients)
	@$(call LOCK_NODE,bench/baselines/fastify)
	@echo hatchling | $(call LOCK,- --no-annotate --constraints requirements-dev.txt,requirements-build.txt)

.PHONY: clean
clean: ## Remove the environment, the caches and the builds; databases stay
	rm -rf .venv .venv-bench .clients .localstripe .audit .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	rm -rf $(dir $(BENCH_GO)) $(dir $(BENCH_NODE))
	find src tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One lock serves every platform. Addresses stay out: where packages come from is the reader's own choice.
LOCK = { echo '\# Locked for every platform; renew with: make lock'; \
	    uv pip compile $(1) --universal --python-version 3.11 --upgrade --quiet --generate-hashes \
	    --no-header --no-emit-index-url --no-emit-find-links; } >$(2).new && mv $(2).new $(2)

LOCK_NODE = cd $(1) && rm -f package-lock.json && npm install --package-lock-only --ignore-scripts && node -e 'const fs = require("fs"), lock = require("./package-lock.json"); for (const each of Object.values(lock.packages)) delete each.funding; fs.writeFileSync("package-lock.json", JSON.stringify(lock, null, 2) + "\n")' --input-type=commonjs

$(VENV):
	@$(FIND_PYTHON); \
	echo "Setting up .venv with $$($$python --version)"; \
	$$python -m venv --clear .venv
	@touch $@

$(RUN_LOCK): requirements.txt $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements.txt
	@touch $@

# The development lock holds the runtime one, at the same versions.
$(DEV_LOCK): requirements-dev.txt $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements-dev.txt
	@touch $@

$(BENCH_LOCK): bench/requirements.txt $(VENV)
	$(BIN)/python -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes -r $<
	@touch $@

# Debian's packages have the sources of pgx; nothing is fetched.
$(BENCH_GO): bench/baselines/go/main.go
	@command -v go >/dev/null || { \
	    echo "go is missing. On Debian and Ubuntu: apt-get install golang-go golang-github-jackc-pgx-v4-dev" >&2; exit 1; }
	cd bench/baselines/go && GO111MODULE=off GOPATH=/usr/share/gocode go build -o built/orders .

$(BENCH_NODE): bench/baselines/fastify/package-lock.json bench/baselines/fastify/package.json
	@command -v npm >/dev/null || { echo "npm is missing. On Debian and Ubuntu: apt-get install npm" >&2; exit 1; }
	cd bench/baselines/fastify && npm ci --ignore-scripts
	@touch $@

$(CLIENTS_PYTHON): tests/clients/requirements.txt $(VENV)
	$(BIN)/python -m venv --clear .clients/python
	.clients/python/bin/python -m pip install --quiet --no-input --disable-pip-version-check --no-compile \
	    --require-hashes -r $<
	@touch $@

$(LOCALSTRIPE): tests/payments/localstripe/requirements.txt $(VENV)
	$(BIN)/python -m venv --clear .localstripe
	.localstripe/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(AUDIT): tests/audit/requirements.txt $(VENV)
	$(BIN)/python -m venv --clear .audit
	.audit/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes -r $<
	@touch $@

# Scripts of the packages are not run: what is needed here needs none.
$(CLIENTS_NODE): tests/clients/package-lock.json tests/clients/package.json tests/clients/.npmrc
	@command -v npm >/dev/null || { echo "npm is missing. On Debian and Ubuntu: apt-get install npm" >&2; exit 1; }
	@rm -rf .clients/node && mkdir -p .clients/node && cp $^ .clients/node
	cd .clients/node && npm ci --ignore-scripts
	@touch $@

# The build backend comes locked too, so that building the project fetches nothing unnamed.
$(PROJECT): pyproject.toml requirements-build.txt $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements-build.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
