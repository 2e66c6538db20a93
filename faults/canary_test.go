package faults

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The canaries are libraries that are broken, by a patch under mutants/. Each must be caught under a fault that
// brings it out, by the rule that it breaks.
var canaries = []struct{ patch, fault, rule string }{
	{"a batch fails as one", "SCRIPT FLUSH", "order"},
	{"a dead member is not skipped", "waiter killed", "waiter"},
	{"a grant is claimed twice", "jitter", "index"},
	{"a grant is dropped", "none", "waiter"},
	{"a leaving waiter keeps the grant", "none", "waiter"},
	{"a refused password is final", "a password rotates", "limit"},
	{"a release answer wakes nobody", "none", "waiter"},
	{"a subscription does not follow its name", "a name moves", "end"},
	{"a subscription does not follow its slot", "cluster: slots migrate", "waiter"},
	{"abandoned attempts are forgotten", "reply lost", "waiter|end"},
	{"an error of a proxy is a refusal", "a proxy answers for the server", "waiter|end"},
	{"callers cannot leave", "none", "limit"},
	{"deadline counted from the reply", "latency", "overlap"},
	{"dead connections are taken one after another", "connections die silently", "end"},
	{"deaf to a half-open subscription", "half-open subscriber", "waiter"},
	{"force release ends nothing", "none", "order"},
	{"force release ignores the index", "none", "order"},
	{"forgotten scripts", "SCRIPT FLUSH", "waiter"},
	{"index from the counter alone", "server killed, data lost", "index"},
	{"late requests are not swept", "late, and reply lost", "waiter|end"},
	{"leases are not renewed", "none", "kept"},
	{"leases for nobody are kept", "none", "waiter"},
	{"look before register", "jitter", "waiter"},
	{"loss is not signalled", "server stopped", "loss"},
	{"members race instead of queueing", "none", "turn"},
	{"no look after a reconnection", "CLIENT KILL pubsub", "waiter"},
	{"one silent master delays the others", "cluster: a master hangs", "waiter"},
	{"release without token", "reply lost", "order"},
	{"repeated release is not recognised", "reply lost", "order"},
	{"replies of a batch change places", "none", "order"},
	{"retried acquire without token", "reply lost", "waiter"},
	{"the claim memory is dropped too early", "jitter", "index"},
	{"the slots are not asked for again", "cluster: a master is killed", "waiter"},
	{"wrong owner check in release", "none", "order"},
	{"wrong owner check in renew", "none", "order"},
}

func TestCanaries(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: whether the judge catches broken libraries is not shown")
	}
	needServer(t)
	patches, err := filepath.Glob("mutants/*.patch")
	require.NoError(t, err)
	require.Len(t, patches, len(canaries), "each patch is a canary")
	for _, c := range canaries {
		t.Run(c.patch, func(t *testing.T) {
			t.Parallel()
			binary := buildMutant(t, c.patch)
			broken := regexp.MustCompile(`\b(` + c.rule + `): .*`)
			const seeds = 16 // Some need luck. Most are caught with the first.
			var said string
			for seed := uint64(1); seed <= seeds; seed++ {
				caught, out := runMutant(t, binary, c.fault, seed)
				if line := broken.FindString(out); caught && line != "" {
					t.Logf("caught under %s with seed %d: %s", c.fault, seed, line)
					return
				}
				said += out
			}
			t.Errorf("survived %d runs under %s:\n%s", seeds, c.fault, said)
		})
	}
}

// buildMutant builds this test binary with a library that has been patched.
func buildMutant(t *testing.T, patch string) (binary string) {
	t.Helper()
	dir := t.TempDir()
	root, err := filepath.Abs("..")
	require.NoError(t, err)
	sources, err := filepath.Glob(filepath.Join(root, "*.go"))
	require.NoError(t, err)
	inner, err := filepath.Glob(filepath.Join(root, "internal", "*", "*.go"))
	require.NoError(t, err)
	replace := make(map[string]string)
	for _, source := range append(sources, inner...) {
		text, err := os.ReadFile(source)
		require.NoError(t, err)
		patched := filepath.Join(dir, strings.TrimPrefix(source, root))
		require.NoError(t, os.MkdirAll(filepath.Dir(patched), 0o700))
		require.NoError(t, os.WriteFile(patched, text, 0o600))
		replace[source] = patched
	}
	file, err := filepath.Abs("mutants/" + strings.ReplaceAll(patch, " ", "-") + ".patch")
	require.NoError(t, err)
	apply := exec.Command("git", "apply", file)
	apply.Dir = dir
	apply.Env = append(apply.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir)) // not the repository that dir may be in
	out, err := apply.CombinedOutput()
	require.NoError(t, err, "the patch does not apply: %s", out)

	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	require.NoError(t, err)
	overlayFile := filepath.Join(dir, "overlay.json")
	require.NoError(t, os.WriteFile(overlayFile, overlay, 0o600))
	binary = filepath.Join(dir, "mutant.test")
	out, err = exec.Command("go", "test", "-c", "-overlay", overlayFile, "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return binary
}

// runMutant lets one fault happen to a mutant, and tells whether that was found to be broken.
func runMutant(t *testing.T, binary, fault string, seed uint64) (caught bool, out string) {
	t.Helper()
	name := regexp.QuoteMeta(strings.ReplaceAll(fault, " ", "_"))
	cmd := exec.CommandContext(t.Context(), binary, "-test.v", fmt.Sprintf("-seed=%d", seed),
		fmt.Sprintf("-test.run=^TestFaults$/^seed=%d$/^%s$", seed, name))
	text, err := cmd.CombinedOutput()
	require.Contains(t, string(text), "--- ", "it did not run")
	return err != nil, string(text)
}
