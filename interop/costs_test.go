package interop_test

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// TestCosts_onTheServer compares what a script costs the server, by INFO commandstats, when the lock is free and nobody waits. Many are
// sent at once, so that nothing else has a part in it. The bounds are generous, because machines are noisy: the figures are in the log.
func TestCosts_onTheServer(t *testing.T) {
	requireNode(t)
	s := newScene(t)
	ours := captureScripts(t, s)
	npm := npmScripts(t)
	const rounds, count = 60, 500
	keys := make([]string, count)
	for i := range keys {
		keys[i] = fmt.Sprint(key, i)
	}
	costs := make(map[string][]float64)
	// spend runs a script once for each key, and returns the indexes that it replied.
	spend := func(what, source string, args func(i int) []any) []any {
		require.NoError(t, s.redis.ScriptLoad(t.Context(), source).Err())
		p := s.redis.Pipeline()
		var replies []*redis.Cmd
		for i := range keys {
			replies = append(replies, p.Do(t.Context(), append([]any{"evalsha", redis.NewScript(source).Hash()}, args(i)...)...))
		}
		require.NoError(t, s.redis.ConfigResetStat(t.Context()).Err())
		_, err := p.Exec(t.Context())
		require.NoError(t, err)
		costs[what] = append(costs[what], scriptCost(s))
		indexes := make([]any, count)
		for i, r := range replies {
			require.NoError(t, r.Err())
			indexes[i] = r.Val() // where the library alone replies just the index
			if values, ok := r.Val().([]any); ok {
				indexes[i] = values[1]
			}
		}
		return indexes
	}
	for range rounds {
		indexes := spend("npm acquire", npm["acquire"], func(i int) []any { return []any{2, keys[i], namespace + "index", 60000} })
		spend("npm release", npm["release"], func(i int) []any { return []any{1, keys[i], indexes[i]} })
		indexes = spend("acquire", ours["acquire"].source, func(i int) []any { return ours["acquire"].with(map[int]any{3: keys[i]}) })
		spend("release", ours["release"].source, func(i int) []any {
			return ours["release"].with(map[int]any{3: keys[i], 6: indexes[i]}) // The token is the same.
		})
		require.Zero(t, s.redis.Exists(t.Context(), keys...).Val(), "all were released")
	}
	median := func(what string) float64 {
		slices.Sort(costs[what])
		return costs[what][rounds/2]
	}
	scale := 3.1 / median("npm acquire")
	for _, what := range []string{"npm acquire", "npm release", "acquire", "release"} {
		t.Logf("%-12s %.2f µs; %.2f where npm's acquire is 3.1", what, median(what), scale*median(what))
	}
	require.Less(t, scale*median("acquire"), 6.2)
	require.Less(t, scale*median("release"), 6.2)
}

// A sent is a script as the library sent it.
type sent struct {
	source string
	args   []any // of the command, its name and the script included
}

// with returns the arguments after the script. Those at some places in the command are replaced.
func (s sent) with(values map[int]any) []any {
	args := slices.Clone(s.args)
	for place, value := range values {
		args[place] = value
	}
	return args[2:]
}

// captureScripts returns what the library sends for an Acquire and a Release.
func captureScripts(t *testing.T, s scene) map[string]sent {
	t.Helper()
	client := s.server.Client(t)
	var scripts []sent
	client.AddHook(capture(func(cmd redis.Cmder) {
		if cmd.Name() == "eval" {
			scripts = append(scripts, sent{fmt.Sprint(cmd.Args()[1]), cmd.Args()})
		}
	}))
	lock, err := redfour.New(client, redfour.WithNamespace(namespace))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, lock.Close()) })
	lease, err := lock.Acquire(t.Context(), id, longTTL)
	require.NoError(t, err)
	require.NoError(t, lock.Release(t.Context(), lease))
	require.Len(t, scripts, 2)
	return map[string]sent{"acquire": scripts[0], "release": scripts[1]}
}

// A capture is a hook that sees each command.
type capture func(cmd redis.Cmder)

func (c capture) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c capture) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (c capture) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c(cmd)
		return next(ctx, cmd)
	}
}

// npmScripts returns the scripts of npm redfour.
func npmScripts(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("node_modules/redfour/src/index.js")
	require.NoError(t, err)
	scripts := make(map[string]string)
	for _, found := range regexp.MustCompile("(?s)var (acquire|release)Script = `(.*?)`").FindAllStringSubmatch(string(text), -1) {
		scripts[found[1]] = strings.ReplaceAll(found[2], "${this._namespace}", namespace)
	}
	require.Len(t, scripts, 2)
	return scripts
}

// scriptCost returns how many µs a script has cost since the statistics were reset.
func scriptCost(s scene) float64 {
	info := s.redis.InfoMap(s.t.Context(), "commandstats")
	require.NoError(s.t, info.Err())
	var calls, usec float64
	_, err := fmt.Sscanf(info.Item("Commandstats", "cmdstat_evalsha"), "calls=%f,usec=%f,", &calls, &usec)
	require.NoError(s.t, err)
	return usec / calls
}
