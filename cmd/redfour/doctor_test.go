//go:build unix

package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// A finding is what a check has come to.
type finding struct{ Check, Result, Found, Advice, Server string }

// examine runs the doctor, and returns what it has found, by check.
func examine(t *testing.T, url string, code int, args ...string) map[string]finding {
	t.Helper()
	r := do(t, url, append([]string{"doctor", "--json"}, args...)...)
	require.Equal(t, code, r.code, r.stdout+r.stderr)
	require.Empty(t, r.stderr)
	found := make(map[string]finding)
	for line := range strings.Lines(r.stdout) {
		var f finding
		require.NoError(t, json.Unmarshal([]byte(line), &f))
		require.NotContains(t, found, f.Check+f.Server)
		found[f.Check+f.Server] = f
	}
	return found
}

// results returns of each check what it has come to.
func results(found map[string]finding) map[string]string {
	r := make(map[string]string)
	for name, f := range found {
		r[name] = f.Result
	}
	return r
}

func TestRealDoctor_ofAServerThatIsFit(t *testing.T) {
	s := redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always", "--maxmemory", "100mb")
	r := do(t, url(s), "doctor")
	assert.Zero(t, r.code)
	assert.Empty(t, r.stderr)
	assert.Regexp(t, `^ok       connection   a round trip takes .*s
ok       version      (Redis|Valkey) \d+\.\d+\.\d+
ok       role         standalone master
ok       eviction     maxmemory-policy noeviction
ok       persistence  appendonly yes, appendfsync always: a restart keeps all leases
ok       replicas     none: when the server is gone, so are its locks until it is back
ok       clock        that of Redis and that of this host differ by less than 1s
ok       locks        acquired, renewed and released one
ok       hand-over    a release handed the lock to a waiter, who had it after .*s
$`, r.stdout)
	assert.Equal(t, []string{"lockindex"}, s.Client(t).Keys(t.Context(), "*").Val(), "what it leaves")
}

func TestRealDoctor_ofSettings(t *testing.T) {
	s := redistest.Start(t)
	admin := s.Client(t)
	set := func(t *testing.T, name, value string) {
		t.Helper()
		before := admin.ConfigGet(t.Context(), name).Val()[name]
		require.NoError(t, admin.ConfigSet(t.Context(), name, value).Err())
		ctx := context.WithoutCancel(t.Context())
		t.Cleanup(func() { assert.NoError(t, admin.ConfigSet(ctx, name, before).Err()) })
	}
	t.Run("as they come", func(t *testing.T) {
		found := examine(t, url(s), 0)
		assert.Equal(t, finding{
			"persistence", "warning", "appendonly no: a restart loses leases that are held",
			"set appendonly yes and appendfsync always, or let nothing depend on a lease that a restart may lose", "",
		}, found["persistence"])
		delete(found, "persistence")
		for name, result := range results(found) {
			assert.Equal(t, "ok", result, name)
		}
	})
	t.Run("appendfsync", func(t *testing.T) {
		set(t, "appendonly", "yes")
		set(t, "appendfsync", "everysec")
		f := examine(t, url(s), 0)["persistence"]
		assert.Equal(t, "warning", f.Result)
		assert.Equal(t, "appendonly yes, appendfsync everysec: a crash of the machine loses leases of the last moment", f.Found)
	})
	t.Run("a policy that may evict locks", func(t *testing.T) {
		set(t, "maxmemory-policy", "volatile-lru")
		f := examine(t, url(s), 0)["eviction"]
		assert.Equal(t, finding{
			"eviction", "warning", "maxmemory-policy volatile-lru, and no maxmemory, so nothing is evicted",
			"set maxmemory-policy noeviction before anybody sets maxmemory", "",
		}, f)
		set(t, "maxmemory", "100mb")
		f = examine(t, url(s), 1)["eviction"]
		assert.Equal(t, finding{
			"eviction", "problem", "maxmemory-policy volatile-lru",
			"set maxmemory-policy noeviction: any other may evict a lock that is held", "",
		}, f)
	})
	t.Run("nearly full", func(t *testing.T) {
		var used int64
		for line := range strings.Lines(admin.Info(t.Context(), "memory").Val()) {
			_, _ = fmt.Sscanf(line, "used_memory:%d", &used)
		}
		set(t, "maxmemory", fmt.Sprint(used+used/20+100_000))
		f := examine(t, url(s), 0)["eviction"]
		assert.Equal(t, "warning", f.Result, f.Found)
		assert.Regexp(t, `^maxmemory-policy noeviction, and 9\d% of maxmemory are used$`, f.Found)
	})
	t.Run("full", func(t *testing.T) {
		set(t, "maxmemory", "1mb")
		f := examine(t, url(s), 1)["locks"]
		assert.Equal(t, "problem", f.Result)
		assert.Contains(t, f.Found, "OOM ")
	})
}

func TestRealDoctor_ofRights(t *testing.T) {
	s := redistest.Start(t)
	const (
		scripts = "~lock:* ~lockindex -@all +evalsha +eval +pttl +hmget +type +time +set +hset +pexpire +del +publish +subscribe +ping"
		queue   = " ~lock-waiters:* &lock-* +get +lpos +rpush +lindex +lrange +lpop +lrem +pubsub"
	)
	for _, test := range []struct {
		name, rules string
		code        int
		want        map[string]string // of the results that are not as usual
		text        string            // of one of those
	}{
		{"the least", scripts + queue, 0, nil, ""},
		{"those of npm", scripts + " &lock-release", 0, map[string]string{"hand-over": "warning"}, "cannot queue: whoever is first wins: NOPERM"},
		{"no channel", scripts + " resetchannels", 1, map[string]string{"hand-over": "problem"}, "do not hear of releases"},
		{"no key", "resetkeys -@all +@all &*", 1, map[string]string{"locks": "problem", "hand-over": ""}, "NOPERM"},
		{"no script", "~* &* +@all -evalsha", 1, map[string]string{"locks": "problem", "hand-over": ""}, "NOPERM"},
	} {
		t.Run(test.name, func(t *testing.T) {
			rules := []any{"ACL", "SETUSER", "app", "reset", "on", ">secret"}
			for rule := range strings.FieldsSeq(test.rules) {
				rules = append(rules, rule)
			}
			require.NoError(t, s.Client(t).Do(t.Context(), rules...).Err())
			found := examine(t, "redis://app:secret@"+s.Addr(), test.code)
			got := results(found)
			text := ""
			for name, result := range test.want {
				assert.Equal(t, result, got[name], found[name].Found)
				if test.text != "" && result != "" {
					text = found[name].Found
					assert.Equal(t, "docs/security.md lists the least rights", found[name].Advice)
				}
			}
			assert.Contains(t, text, test.text)
			if len(test.want) == 0 {
				assert.Equal(t, "ok", got["hand-over"], found["hand-over"].Found)
			}
			if !strings.Contains(test.rules, "+@all") { // None of them may ask for INFO.
				for _, name := range []string{"version", "role", "eviction", "persistence", "replicas"} {
					assert.Equal(t, finding{name, "warning", "not known: this user may not ask INFO", "run the doctor as a user with +info", ""}, found[name])
				}
			}
		})
	}
}

func TestDoctor_ofClocks(t *testing.T) {
	s := miniredis.RunT(t) // A real server has the clock of this host.
	for _, test := range []struct {
		ahead time.Duration
		text  string
	}{
		{time.Hour, `^that of Redis is (1h0m0|59m59.)\S*s ahead of this host's$`},
		{-time.Minute, `^that of Redis is (1m0|59.9)\S*s behind this host's$`},
	} {
		s.SetTime(time.Now().Add(test.ahead))
		f := examine(t, "redis://"+s.Addr(), 1)["clock"]
		assert.Equal(t, "warning", f.Result)
		assert.Regexp(t, test.text, f.Found)
		assert.Contains(t, f.Advice, "NTP")
	}
}

func TestFailoverDoctor_ofReplicasAndSentinels(t *testing.T) {
	f := redistest.StartFailover(t)
	host := "redis://" + f.SentinelAddrs()[0]
	master := host + "?master_name=" + f.Options().MasterName

	found := examine(t, master, 0)
	assert.Equal(t, "ok", found["replicas"].Result)
	assert.Regexp(t, `^1, the last of them \d+ bytes behind, heard of within [12] s$`, found["replicas"].Found)
	assert.Equal(t, "ok", found["hand-over"].Result)

	replica := examine(t, url(f.Replica()), 1)
	assert.Equal(t, finding{"role", "problem", "standalone slave", "locks need the master", ""}, replica["role"])
	assert.Equal(t, "problem", replica["locks"].Result)

	sentinel := examine(t, host, 1)
	assert.Equal(t, finding{"role", "problem", "a Sentinel", "say whose: redis://host:26379?master_name=NAME", ""}, sentinel["role"])

	f.Replica().Pause()
	eventually(t, "the replica lags", func() bool {
		replicas := examine(t, url(f.Master()), 0)["replicas"]
		return replicas.Result == "warning" && strings.Contains(replicas.Advice, "see why")
	})
}

func TestClusterDoctor(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	host := "redis://" + c.Servers()[0].Addr()

	found := examine(t, host, 0, "--cluster")
	for name, result := range results(found) {
		if name != "persistence" {
			assert.Equal(t, "ok", result, found[name])
		}
	}
	assert.Equal(t, "cluster master", found["role"].Found)

	one := c.Masters()[1]
	require.NoError(t, one.Client(t).ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err())
	found = examine(t, host, 0, "--cluster")
	for _, master := range c.Masters() {
		want := "ok"
		if master == one {
			want = "warning"
		}
		_, port, err := net.SplitHostPort(master.Addr())
		require.NoError(t, err)
		assert.Equal(t, want, found["eviction127.0.0.1:"+port].Result)
	}
	assert.Contains(t, do(t, host, "doctor", "--cluster").stdout, one.Addr()+": maxmemory-policy allkeys-lru")

	one.Kill()
	found = examine(t, host, 1, "--cluster")
	assert.Equal(t, "problem", found["connection"+one.Addr()].Result, found)
	assert.Equal(t, "ok", found["version"].Result)

	found = examine(t, host, 1)
	assert.Equal(t, "problem", found["role"].Result)
	assert.Equal(t, "say --cluster: a lock has another name in a cluster", found["role"].Advice)

	r := do(t, host, "run", "--cluster", "x", "--", "echo", "runs")
	assert.Equal(t, result{0, "runs\n", ""}, r)
	r = do(t, host, "run", "x", "--", "echo", "runs")
	assert.Equal(t, 69, r.code)
	assert.Empty(t, r.stdout)
}
