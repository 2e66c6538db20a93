# All that is run on this repository, by people and by CI. "make" lists it.

GOLANGCI_LINT_VERSION := v2.15.0

# Each module is tested and linted on its own. A new one needs no entry here.
modules := $(sort $(patsubst %/go.mod,%,$(shell find . -name node_modules -prune -o -name go.mod -print)))

# $(call each,command) runs a command in every module, and in the others too when one fails.
each = failed=; \
	for module in $(modules); do \
		echo "== $$module"; \
		(cd $$module && $(1)) || failed="$$failed $$module"; \
	done; \
	[ -z "$$failed" ] || { echo "failed in:$$failed" >&2; exit 1; }

# The race detector needs cgo, and cgo needs a C compiler.
race = $(shell [ "$$(go env CGO_ENABLED)" = 1 ] && command -v $(firstword $(shell go env CC)) >/dev/null && echo -race)
go_test = go test $(race) -shuffle=on -timeout 30m

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: ## see one worker of many refresh a token (on the server in REDIS_URL, if that is set)
	@cd examples && go run ./tokenrefresh

# The results are not cached, because go does not know which servers the tests find in PATH.
.PHONY: test
test: tools ## vet and test every module, with whatever this machine has
	@$(call each,go vet ./... && $(go_test) -count=1 ./...)

# $(call absent,what,consequence,variable) says what is missing, and fails if the variable is 1.
absent = { echo "$(1): $(2)"; [ "$$$(3)" != 1 ] || { echo "$(3)=1 forbids that" >&2; exit 1; }; }

.PHONY: tools
tools: ## say which tests cannot run here; fail for REDFOUR_REQUIRE_RACE=1, _REDIS=1, _INTEROP=1
	@[ -n "$(race)" ] || \
		$(call absent,no C compiler in PATH or CGO_ENABLED=0,the tests run without the race detector,REDFOUR_REQUIRE_RACE)
	@command -v redis-server >/dev/null || \
		$(call absent,redis-server is not in PATH,the tests on a real server do not run,REDFOUR_REQUIRE_REDIS)
	@if ! command -v node >/dev/null; then \
		$(call absent,node is not in PATH,the tests with npm redfour do not run,REDFOUR_REQUIRE_INTEROP); \
	elif ! $(MAKE) --silent $(npm_packages) $(bench_packages); then \
		$(call absent,the packages of interop/ and bench/node/ are not installed,the tests with npm redfour do not run,REDFOUR_REQUIRE_INTEROP); \
	fi

# npm writes this file last.
npm_packages := interop/node_modules/.package-lock.json
bench_packages := bench/node/node_modules/.package-lock.json
$(npm_packages) $(bench_packages): %/node_modules/.package-lock.json: %/package-lock.json
	@command -v npm >/dev/null || { echo "npm is not in PATH"; exit 1; }
	cd $* && npm ci
	@touch $@

# In the root module the tests on a real server are called TestReal…, those on Sentinel TestFailover…; all others run in a bubble or on
# miniredis.
.PHONY: stress stress-bubble stress-real stress-failover stress-interop
.NOTPARALLEL:
stress: stress-bubble stress-real stress-failover stress-interop ## repeat all tests, in random order (about 15 minutes)

# In many processes: the race detector has room for only so many events in one, and ends it with "CHECK failed" beyond.
stress-bubble: tools ## … those without a server, 50 times on 1, 2 and 4 CPUs
	for part in $$(seq 25); do $(go_test) -count=2 -cpu=1,2,4 -timeout=1h -skip='^(TestReal|TestFailover)' . || exit 1; done

stress-real: tools ## … those on a real server, 10 times
	$(go_test) -count=10 -timeout=1h -run='^TestReal' .

stress-failover: tools ## … those on Sentinel, 3 times
	$(go_test) -count=3 -timeout=1h -run='^TestFailover' .

stress-interop: tools ## … those with npm redfour and ioredfour, 3 times
	cd interop && $(go_test) -count=3 -timeout=1h ./...

# The binary is run by itself, so that its last line is the verdict.
SEED ?= 1
faults_length = $(if $(MINUTES),-test.timeout=0 -minutes=$(MINUTES) -test.run='^TestFaults$$',-test.timeout=1h -passes=1)
.PHONY: faults
faults: tools ## attack the library with faults, and broken libraries with its judge (11 minutes; SEED=1 MINUTES=30)
	@binary=$$(mktemp) && trap "rm -f $$binary" EXIT && cd faults && go test -c -o $$binary . && $$binary -test.count=1 -seed=$(SEED) $(faults_length)

# A quick run must not replace the results of a full one.
bench_flags = $(if $(QUICK),-quick -out quick,-out results)
.PHONY: bench
bench: tools ## measure the library beside others, into bench/results (21 minutes; QUICK=1: 3 minutes, into bench/quick)
	@[ -e $(bench_packages) ] || echo "the npm libraries are not measured"
	@cd bench && go run . $(bench_flags)

.PHONY: model
model: ## check a model of the queue, and that variants with a rule left out fail (2 minutes; needs spin and a C compiler)
	@docs/model/check.sh

# A golangci-lint cannot check code for a newer Go than it was built with, so each Go has its own. The first build takes minutes.
golangci_lint := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/redfour/$(GOLANGCI_LINT_VERSION)-$(shell go env GOVERSION)/golangci-lint
config = --config=$(CURDIR)/.github/golangci.yml
$(golangci_lint):
	GOBIN=$(@D) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)

.PHONY: lint
lint: $(golangci_lint) ## check the style of every module, and that its go.mod is tidy
	@$(call each,$(golangci_lint) run $(config) && go mod tidy -diff)
	@for pair in $(vetted); do \
		echo "== vet for $$pair"; \
		CGO_ENABLED=0 GOOS=$${pair%/*} GOARCH=$${pair#*/} go vet ./... || exit 1; \
	done

# Where the library and its tests must build too. The other modules are for the machines that develop it.
vetted := linux/386 windows/amd64 darwin/arm64

.PHONY: fmt
fmt: $(golangci_lint) ## format every module
	@$(call each,$(golangci_lint) fmt $(config))
