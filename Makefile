# All that is run on this repository, by people and by CI. "make" lists it.

GOLANGCI_LINT := v2.15.0

# Each module is tested and linted on its own; a new one needs no entry here.
modules := $(sort $(patsubst %/go.mod,%,$(shell find . -name node_modules -prune -o -name go.mod -print)))

# $(call each,command) runs a command in every module, in the others too when one fails.
each = failed=; \
	for module in $(modules); do \
		echo "== $$module: $(1)"; \
		(cd $$module && $(1)) || failed="$$failed $$module"; \
	done; \
	[ -z "$$failed" ] || { echo "failed in:$$failed" >&2; exit 1; }

# $(call absent,what,what does not happen,variable) says so, and fails if the environment demands it.
absent = { echo "$(1): $(2)"; [ "$$$(3)" != 1 ] || { echo "$(3)=1 demands it" >&2; exit 1; }; }

# The race detector needs cgo, and cgo a C compiler. Go turns cgo off by itself when there is none, unless CC is set.
race := $(shell [ "$$(go env CGO_ENABLED)" = 1 ] && command -v $(firstword $(shell go env CC)) >/dev/null && echo -race)

# Not cached: go does not see which servers are in PATH.
go_test := go test $(race) -count=1 -shuffle=on

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: ## run an example: one worker of many refreshes a token (on the server in REDIS_URL, if set)
	@cd examples && go run ./tokenrefresh

.PHONY: test
test: tools ## vet and test every module, with all that this machine has
	@$(call each,go vet ./... && $(go_test) ./...)

.PHONY: tools
tools: ## say which tests cannot run here, and fail for REDFOUR_REQUIRE_{RACE,REDIS,INTEROP}=1
	@[ -n "$(race)" ] || $(call absent,no C compiler or CGO_ENABLED=0,the tests run without the race detector,REDFOUR_REQUIRE_RACE)
	@command -v redis-server >/dev/null || $(call absent,redis-server is not in PATH,the tests on a real server do not run,REDFOUR_REQUIRE_REDIS)
	@command -v node >/dev/null || $(call absent,node is not in PATH,the tests with npm redfour do not run,REDFOUR_REQUIRE_INTEROP)
	@! command -v node >/dev/null || $(MAKE) --silent interop/node_modules/.package-lock.json || \
		$(call absent,the packages of interop/package-lock.json are missing,the tests with npm redfour do not run,REDFOUR_REQUIRE_INTEROP)

# npm writes this file when it has installed everything.
interop/node_modules/.package-lock.json: interop/package-lock.json
	@command -v npm >/dev/null || { echo "npm is not in PATH"; exit 1; }
	cd interop && npm ci
	@touch $@

.PHONY: stress
stress: stress-bubble stress-real stress-failover stress-interop ## run the tests many times, in random order

# By convention of the root module, tests on a real server are called TestReal…, and on Sentinel TestFailover….
.PHONY: stress-bubble
stress-bubble: tools ## … those in bubbles 50 times on each of 1, 2 and 4 CPUs
	$(go_test) -count=50 -cpu=1,2,4 -timeout=1h -skip='^(TestReal|TestFailover)' . ./internal/crew

.PHONY: stress-real
stress-real: tools ## … those on a real server 10 times
	$(go_test) -count=10 -timeout=1h -run='^TestReal' .

.PHONY: stress-failover
stress-failover: tools ## … those with Sentinel 3 times
	$(go_test) -count=3 -timeout=1h -run='^TestFailover' . ./internal/redistest

.PHONY: stress-interop
stress-interop: tools ## … those with npm redfour and ioredfour 3 times
	cd interop && $(go_test) -count=3 -timeout=1h ./...

.PHONY: lint
lint: golangci_lint = $(cache)/golangci-lint
lint: $(cache)/golangci-lint ## check style, and that go.mod and go.sum are tidy
