//go:build unix

package redfour_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

// What docs/security.md says of rights.

// documentedRights returns the rules that docs/security.md gives a user.
func documentedRights(t *testing.T, user string) []any {
	t.Helper()
	text, err := os.ReadFile("docs/security.md")
	require.NoError(t, err)
	lines := regexp.MustCompile(`(?m)^ +ACL SETUSER `+user+` (.*)$`).FindAllSubmatch(text, -1)
	require.Len(t, lines, 1)
	var rules []any
	for rule := range strings.FieldsSeq(string(lines[0][1])) {
		rules = append(rules, rule)
	}
	require.Equal(t, []any{"reset", "on", ">secret", "resetchannels"}, rules[:4])
	return rules
}

// without returns the rules but one.
func without(rules []any, rule any) []any {
	var rest []any
	for _, r := range rules {
		if r != rule {
			rest = append(rest, r)
		}
	}
	return rest
}

// user makes an ACL user with these rules, and returns how to be that user.
func (r *realRedis) user(t *testing.T, rules ...any) func(*redis.Options) {
	t.Helper()
	r.do(t, append([]any{"ACL", "SETUSER", "app", "reset", "on", ">secret"}, rules...)...)
	return func(o *redis.Options) { o.Username, o.Password = "app", "secret" }
}

// A visit is that of a user who has two Locks, and few rights. It shows what he can do.
type visit struct {
	client  func(t *testing.T, via *link) redis.UniversalClient // of the user
	opts    []redfour.Option
	db      int
	servers []*realRedis // all that may refuse something
	data    redis.UniversalClient
	names   func(namespace, id string) (lock, counter string)
	queues  bool // he has the rights for the queue

	bound time.Duration // of everything that is to happen in a moment
	locks [2]*redfour.Lock
	ways  [2]*link
	lease *redfour.Lease  // that the step before has left
	got   <-chan acquired // the waiter that the step before has left
	looks *atomic.Int64   // that his Lock has had answers to
}

// visited is the id of the lock.
const visited = "42"

// pay makes the visit. It returns the step that failed, and why; "" if none did.
func (v *visit) pay(t *testing.T, bound time.Duration) (failed string, err error) {
	t.Helper()
	v.bound = bound
	for i := range v.locks {
		v.ways[i] = new(link)
		v.locks[i] = newLock(t, v.client(t, v.ways[i]), append(v.opts, redfour.WithOwner(fmt.Sprint("me ", i)))...)
	}
	for _, step := range []struct {
		name string
		run  func(*visit, *testing.T) error
	}{
		{"acquire", (*visit).acquire},
		{"foreign", (*visit).foreign},
		{"wait", (*visit).wait},
		{"inspect", (*visit).inspect},
		{"grant", (*visit).grant},
		{"heir", (*visit).heir},
		{"leave", (*visit).leave},
		{"force", (*visit).force},
		{"travel", (*visit).travel},
		{"keep", (*visit).keep},
		{"ping", (*visit).ping},
		{"log", (*visit).log},
		{"close", (*visit).close},
	} {
		if err := step.run(v, t); err != nil {
			return step.name, err
		}
	}
	return "", nil
}

// await returns an error unless something happens in a moment.
func (v *visit) await(what string, cond func() bool) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(v.bound); !cond(); <-tick.C {
		if time.Now().After(end) {
			return fmt.Errorf("still not: %s", what)
		}
	}
	return nil
}

// take returns what a waiter brings in a moment.
func (v *visit) take(got <-chan acquired) (*redfour.Lease, error) {
	timer := time.NewTimer(v.bound)
	defer timer.Stop()
	select {
	case r := <-got:
		return r.lease, r.err
	case <-timer.C:
		return nil, errors.New("nobody woke the waiter")
	}
}

// queued counts the entries in the queue.
func (v *visit) queued(t *testing.T) int64 {
	t.Helper()
	lock, _ := v.names("lock", visited)
	n, err := v.data.LLen(t.Context(), strings.TrimSuffix(lock, ":"+visited)+"-waiters:"+visited).Result()
	require.NoError(t, err)
	return n
}

func (v *visit) acquire(t *testing.T) (err error) {
	t.Helper()
	if v.lease, err = v.locks[0].Acquire(t.Context(), visited, time.Minute); err != nil {
		return err
	}
	if err := v.locks[0].Renew(t.Context(), v.lease, time.Minute); err != nil {
		return err
	}
	if _, err := v.locks[1].Acquire(t.Context(), visited, time.Minute); !errors.Is(err, redfour.ErrLocked) {
		return fmt.Errorf("not held: %w", err)
	}
	return nil
}

func (v *visit) wait(t *testing.T) error {
	t.Helper()
	v.looks = answered(v.ways[1], isAcquire)
	v.got = waitFor(t.Context(), v.locks[1], visited, time.Minute)
	return v.await("two looks, and a place in the queue", func() bool {
		return v.looks.Load() >= 2 && (v.queued(t) == 1) == v.queues
	})
}

func (v *visit) inspect(t *testing.T) error {
	t.Helper()
	status, err := v.locks[0].Inspect(t.Context(), visited)
	if err != nil {
		return err
	}
	if !status.Held || status.Index != v.lease.Index || status.Owner != "me 0" {
		return fmt.Errorf("not as it is: %+v", status)
	}
	if waiters := fmt.Sprint(status.Waiters); (waiters == "[me 1]") != v.queues {
		return fmt.Errorf("waiters are %s", waiters)
	}
	return nil
}

// grant has one Lock hand over to the other by a message, as Redis does for members of a queue; without the rights for
// that, all are told of the release by one.
func (v *visit) grant(t *testing.T) (err error) {
	t.Helper()
	if err := v.locks[0].Release(t.Context(), v.lease); err != nil {
		return err
	}
	if v.lease, err = v.take(v.got); err != nil {
		return err
	}
	s := v.locks[1].Stats()
	granted := s.GrantsClaimed == 1 && s.WokenByMessage == 0 && v.looks.Load() == 2 && strings.Contains(v.lease.Token, ":")
	told := s.GrantsClaimed == 0 && v.looks.Load() > 2
	if s.WokenByTimer > 0 || v.queues != granted || v.queues == told {
		return fmt.Errorf("after %d looks: %+v", v.looks.Load(), s)
	}
	return nil
}

// heir has a Lock hand over to a waiter of its own.
func (v *visit) heir(t *testing.T) (err error) {
	t.Helper()
	looks := answered(v.ways[1], isAcquire)
	got := waitFor(t.Context(), v.locks[1], visited, time.Minute)
	if err := v.await("a look", func() bool { return looks.Load() >= 1 }); err != nil {
		return err
	}
	if err := v.locks[1].Release(t.Context(), v.lease); err != nil {
		return err
	}
	if v.lease, err = v.take(got); err != nil {
		return err
	}
	if s := v.locks[1].Stats(); v.queues && looks.Load() != 1 || s.WokenByTimer > 0 {
		return fmt.Errorf("after %d looks: %+v", looks.Load(), s)
	}
	return nil
}

// leave has a waiter leave the queue.
func (v *visit) leave(t *testing.T) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	looks := answered(v.ways[0], isAcquire)
	got := waitFor(ctx, v.locks[0], visited, time.Minute)
	if err := v.await("a place in the queue", func() bool {
		return looks.Load() >= 2 && (v.queued(t) == 1) == v.queues
	}); err != nil {
		return err
	}
	cancel()
	if _, err := v.take(got); !errors.Is(err, context.Canceled) {
		return fmt.Errorf("not cancelled: %w", err)
	}
	return v.await("an empty queue", func() bool { return v.queued(t) == 0 })
}

// force has the operator end a lease that another Lock has.
func (v *visit) force(t *testing.T) error {
	t.Helper()
	looks := answered(v.ways[0], isAcquire)
	got := waitFor(t.Context(), v.locks[0], visited, time.Minute)
	if err := v.await("a look", func() bool { return looks.Load() >= 1 }); err != nil {
		return err
	}
	if err := v.locks[0].ForceRelease(t.Context(), visited, v.lease.Index); err != nil {
		return err
	}
	next, err := v.take(got)
	if err != nil {
		return err
	}
	if err := v.locks[1].Release(t.Context(), v.lease); !errors.Is(err, redfour.ErrConflict) {
		return fmt.Errorf("not superseded: %w", err)
	}
	v.lease = next
	return nil
}

// travel has a lease released elsewhere.
func (v *visit) travel(t *testing.T) error {
	t.Helper()
	text, err := json.Marshal(v.lease)
	require.NoError(t, err)
	arrived := new(redfour.Lease)
	require.NoError(t, json.Unmarshal(text, arrived))
	if err := v.locks[1].Renew(t.Context(), arrived, time.Minute); err != nil {
		return err
	}
	return v.locks[1].Release(t.Context(), arrived)
}

// keep has a lease kept alive beyond its ttl.
func (v *visit) keep(t *testing.T) error {
	t.Helper()
	renewed := errors.New("never called")
	err := v.locks[0].WithLock(t.Context(), visited, 1500*time.Millisecond, func(ctx context.Context, lease *redfour.Lease) error {
		granted := lease.Deadline()
		renewed = v.await("renewed", func() bool { return lease.Deadline().After(granted) })
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	lease, err := v.locks[0].Acquire(t.Context(), visited, 1500*time.Millisecond)
	if err != nil {
		return err
	}
	granted := lease.Deadline()
	kept, stop := v.locks[0].KeepAlive(t.Context(), lease)
	defer stop()
	again := v.await("renewed", func() bool { return lease.Deadline().After(granted) })
	return errors.Join(renewed, again, kept.Err(), v.locks[0].Release(t.Context(), lease))
}

// foreign has what is wrong with a key named.
func (v *visit) foreign(t *testing.T) error {
	t.Helper()
	key, _ := v.names("lock", "foreign")
	require.NoError(t, v.data.Set(t.Context(), key, "x", 0).Err())
	if _, err := v.locks[0].Acquire(t.Context(), "foreign", time.Minute); !strings.Contains(fmt.Sprint(err), "is a string") {
		return fmt.Errorf("not named: %w", err)
	}
	return nil
}

// ping has the subscriptions live on.
func (v *visit) ping(t *testing.T) error {
	t.Helper()
	anew := func() bool { return v.locks[0].Stats().Subscriptions > 1 || v.locks[1].Stats().Subscriptions > 1 }
	err := v.await("pinged", func() bool {
		pings := 0
		for _, r := range v.servers {
			pings += r.calls(t, "ping")
		}
		return anew() || pings > 0
	})
	if anew() {
		return errors.New("subscribed anew")
	}
	return err
}

// log has no command refused that a script, or a client that was told so, could have done without. It is for those who
// queue; who does not tries now and then.
func (v *visit) log(t *testing.T) error {
	t.Helper()
	for _, r := range v.servers {
		if denied := refusedBy(t, r.admin); v.queues && len(denied) > 0 {
			return fmt.Errorf("refused: %v", denied)
		}
	}
	return nil
}

// refusedBy returns what a server has refused, but for the name and the like that go-redis tells it if it may.
func refusedBy(t *testing.T, client *redis.Client) (objects []string) {
	t.Helper()
	log, err := client.ACLLog(t.Context(), 100).Result()
	require.NoError(t, err)
	for _, denied := range log {
		if !strings.HasPrefix(denied.Object, "client") {
			objects = append(objects, denied.Object)
		}
	}
	return objects
}

// Go-redis tells a server its name when it connects. From Redis 7.2 on that needs a right, or is noted.
func TestRealRights_noConnectionIsNoted(t *testing.T) {
	for _, user := range []string{"app", "simple"} {
		for _, row := range []struct {
			name    string
			right   []any
			options func(o *redis.Options)
			noted   []string // from Redis 7.2 on
		}{
			{"as documented for all", nil, func(*redis.Options) {}, []string{"client|setinfo"}},
			{"without identity", nil, func(o *redis.Options) { o.DisableIdentity = true }, nil},
			{"with the right", []any{"+client|setinfo"}, func(*redis.Options) {}, nil},
		} {
			t.Run(user+"/"+row.name, func(t *testing.T) {
				r := startReal(t)
				version := r.admin.InfoMap(t.Context(), "server").Val()["Server"]["redis_version"]
				knows := !regexp.MustCompile(`^([0-6]|7\.[01])\.`).MatchString(version)
				if row.right != nil && !knows {
					t.Skipf("Redis %s does not know CLIENT SETINFO: such a rule is an error", version)
				}
				o := r.options()
				r.user(t, append(documentedRights(t, user)[4:], row.right...)...)(o)
				row.options(o)
				l := newLock(t, newClient(t, o))
				lease := mustAcquire(t, l, "42", time.Minute)
				got := waitFor(t.Context(), l, "42", time.Minute)
				eventually(t, func() bool { return l.Stats().Subscriptions == 1 }, "subscribed")
				require.NoError(t, l.Release(t.Context(), lease))
				require.NoError(t, l.Release(t.Context(), takeLease(t, got)))

				log, err := r.admin.ACLLog(t.Context(), 100).Result()
				require.NoError(t, err)
				var noted []string
				for _, denied := range log {
					if strings.HasPrefix(denied.Object, "client") {
						noted = append(noted, denied.Object)
					}
				}
				if !knows {
					row.noted = nil // An unknown command is refused before its rights are looked at.
				}
				require.Equal(t, row.noted, noted)
			})
		}
	}
}

func (v *visit) close(*testing.T) error {
	return errors.Join(v.locks[0].Close(), v.locks[1].Close())
}

// standalone is a visit to a server of its own, beside others.
func standalone(t *testing.T, rules []any) *visit {
	t.Helper()
	t.Parallel()
	return startReal(t).visit(t, rules)
}

// visit is one by a user with these rules.
func (r *realRedis) visit(t *testing.T, rules []any) *visit {
	t.Helper()
	login := r.user(t, rules...)
	v := &visit{servers: []*realRedis{r}, data: r.admin, names: plainNames}
	v.client = func(t *testing.T, via *link) redis.UniversalClient {
		t.Helper()
		o := r.options(via)
		o.DB = v.db
		login(o)
		return newClient(t, o, via)
	}
	return v
}

// inCluster returns how to visit a cluster, which all visits share: it takes a while to start. They must not be at the same time.
func inCluster(t *testing.T) func(t *testing.T, rules []any) *visit {
	t.Helper()
	c := redistest.StartCluster(t, 1, 0)
	v := visit{data: c.Client(t), names: clusterNames}
	for _, s := range c.Servers() {
		v.servers = append(v.servers, &realRedis{s, s.Client(t)})
	}
	v.client = func(t *testing.T, via *link) redis.UniversalClient {
		t.Helper()
		o := c.Options()
		o.Username, o.Password = "app", "secret"
		client := redis.NewClusterClient(o)
		client.AddHook(via)
		t.Cleanup(func() { _ = client.Close() })
		return client
	}
	return func(t *testing.T, rules []any) *visit {
		t.Helper()
		for _, r := range v.servers {
			r.user(t, rules...)
			for _, forget := range []string{"FLUSHALL", "SCRIPT FLUSH", "CONFIG RESETSTAT", "ACL LOG RESET"} {
				var words []any
				for word := range strings.FieldsSeq(forget) {
					words = append(words, word)
				}
				r.do(t, words...)
			}
		}
		fresh := v
		return &fresh
	}
}

// requireLeast demands that everything works with the rights that are documented for a user, and that with any of them missing
// something does not: the step of a visit that is the first to fail is given for each of them.
func requireLeast(t *testing.T, user string, queues bool, to func(t *testing.T, rules []any) *visit, first map[string]string) {
	t.Helper()
	rules := documentedRights(t, user)
	t.Run("all", func(t *testing.T) {
		v := to(t, rules)
		v.queues = queues
		failed, err := v.pay(t, enough)
		require.NoError(t, err, failed)
	})
	for _, rule := range rules[4:] {
		t.Run(fmt.Sprint("without ", rule), func(t *testing.T) {
			v := to(t, without(rules, rule))
			v.queues = queues
			failed, err := v.pay(t, 2*time.Second)
			require.Error(t, err)
			require.Contains(t, strings.Fields(first[failed]), rule, "%s: %v", failed, err)
		})
	}
}

func TestRealRights_whoQueuesNeedsAllOfThem(t *testing.T) {
	requireLeast(t, "app", true, standalone, map[string]string{
		"acquire": "~lock:* ~lockindex +evalsha +eval +pttl +hmget +time +set +hset +pexpire",
		"foreign": "+type",
		"wait":    "~lock-waiters:* &lock-release &lock-members &lock-grant:* +subscribe +lpos +rpush",
		"inspect": "+lrange +pubsub|numsub",
		"grant":   "+get +publish +lpop",
		"leave":   "+lrem",
		"travel":  "+del",
		"ping":    "+ping",
		"log":     "+lindex",
	})
}

func TestRealRights_whoIsWokenByReleasesNeedsAllOfThem(t *testing.T) {
	requireLeast(t, "simple", false, standalone, map[string]string{
		"acquire": "~lock:* ~lockindex +evalsha +eval +pttl +hmget +time +set +hset +pexpire",
		"foreign": "+type",
		"wait":    "&lock-release +subscribe",
		"grant":   "+publish +del",
		"ping":    "+ping",
	})
}

func TestClusterRights_whoQueuesNeedsAllOfThem(t *testing.T) {
	requireLeast(t, "fleet", true, inCluster(t), map[string]string{
		"acquire": "~{lock:*}:* ~{lock:*}index +evalsha +eval +pttl +hmget +time +set +hset +pexpire +cluster|slots",
		"foreign": "+type",
		"wait":    "~{lock:*}-waiters:* &{lock:*}-release &{lock:*}-members &{lock:*}-grant:* +ssubscribe +lpos +rpush",
		"inspect": "+lrange +pubsub|shardnumsub",
		"grant":   "+get +spublish +lpop",
		"leave":   "+lrem",
		"travel":  "+del",
		"ping":    "+ping",
		"log":     "+lindex",
	})
}

// WAIT and SELECT are all that these take on top.
func TestRealRights_whatOptionsAdd(t *testing.T) {
	rules := documentedRights(t, "app")
	t.Run("WithReplicas", func(t *testing.T) {
		p := startPair(t)
		v := p.visit(t, append(rules, "+wait"))
		v.queues, v.opts = true, []redfour.Option{redfour.WithReplicas(1, time.Second)}
		failed, err := v.pay(t, enough)
		require.NoError(t, err, failed)
		require.Positive(t, p.calls(t, "wait"))
	})
	t.Run("DB", func(t *testing.T) {
		r := startReal(t)
		v := r.visit(t, append(rules, "+select"))
		v.queues, v.db = true, 3
		o := r.Options()
		o.DB = v.db
		v.data = newClient(t, o)
		failed, err := v.pay(t, enough)
		require.NoError(t, err, failed)

		v = r.visit(t, rules)
		v.db = 3
		failed, err = v.pay(t, enough)
		require.ErrorContains(t, err, "NOPERM")
		require.Equal(t, "acquire", failed)
	})
}

// refused are commands that no user has a right to.
var refused = [][]any{
	{"GET", "other"},
	{"SET", "other", "x"},
	{"DEL", "other"},
	{"HMGET", "other", "token"},
	{"HSET", "other", "index", 1},
	{"PEXPIRE", "other", 1},
	{"KEYS", "*"},
	{"SCAN", 0},
	{"RANDOMKEY"},
	{"CONFIG", "GET", "requirepass"},
	{"ACL", "LIST"},
	{"PUBLISH", "other", "x"},
	{"SUBSCRIBE", "other"},
	{"PSUBSCRIBE", "*"},
	{"PUBSUB", "CHANNELS"},
	{"MONITOR"},
	{"SLOWLOG", "GET"},
	{"CLIENT", "LIST"},
	{"CLIENT", "KILL", "TYPE", "normal"},
	{"SCRIPT", "FLUSH"},
	{"SELECT", 1},
	{"FLUSHALL"},
	{"FLUSHDB"},
	{"SHUTDOWN"},
	{"EVAL", "return 1", 1, "other"},
	{"EVAL", "return redis.call('HMGET', 'other', 'token')", 0},
	{"EVAL", "return redis.call('KEYS', '*')", 0},
	{"EVAL", "return redis.call('PUBLISH', 'other', 'x')", 0},
	{"EVAL", "return redis.call('FLUSHALL')", 0},
}

func TestRealRights_nothingElseIsAllowed(t *testing.T) {
	for _, user := range []string{"app", "simple", "inspector", "fleet"} {
		t.Run(user, func(t *testing.T) {
			r := startReal(t)
			require.NoError(t, r.admin.Set(t.Context(), "other", "x", 0).Err())
			o := r.options()
			r.user(t, documentedRights(t, user)...)(o)
			client := newClient(t, o)
			for _, args := range refused {
				requireRefused(t, client.Do(t.Context(), args...).Err(), args...)
			}
			require.Equal(t, []string{"other"}, r.admin.Keys(t.Context(), "*").Val())
			require.Equal(t, "x", r.admin.Get(t.Context(), "other").Val())
		})
	}
}

func requireRefused(t *testing.T, err error, what ...any) {
	t.Helper()
	require.Error(t, err, what)
	require.Regexp(t, "NOPERM|ACL failure in script|The user executing the script can't", err.Error(), what)
}

// Who may only inspect can neither end a lease nor take one, though he can read the token.
func TestRealRights_whoInspectsChangesNothing(t *testing.T) {
	r := startReal(t)
	o := r.options()
	rules := documentedRights(t, "inspector")
	r.user(t, rules...)(o)
	client := newClient(t, o)
	inspector := newLock(t, client)
	holder, way := r.lock(t), new(link)
	waiter := newLock(t, newClient(t, r.options(way), way), redfour.WithOwner("next"))
	lease := mustAcquire(t, holder, "42", time.Minute)
	got := waitFor(t.Context(), waiter, "42", time.Minute)
	eventually(t, func() bool { return r.admin.LLen(t.Context(), "lock-waiters:42").Val() == 1 }, "queued")
	require.NoError(t, r.admin.Set(t.Context(), "lock:foreign", "x", 0).Err())

	before := r.snapshot(t)
	inspect := func() error {
		status, err := inspector.Inspect(t.Context(), "42")
		if err != nil {
			return err
		}
		if !status.Held || status.Index != lease.Index || fmt.Sprint(status.Waiters) != "[next]" {
			return fmt.Errorf("not as it is: %+v", status)
		}
		status, err = inspector.Inspect(t.Context(), "free")
		if err == nil && status.Held {
			err = errors.New("held")
		}
		if _, foreign := inspector.Inspect(t.Context(), "foreign"); !strings.Contains(fmt.Sprint(foreign), "is a string") {
			err = errors.Join(err, foreign)
		}
		return err
	}
	require.NoError(t, inspect())
	require.Equal(t, lease.Token, client.HMGet(t.Context(), "lock:42", "token").Val()[0])
	_, err := inspector.Acquire(t.Context(), "free", time.Minute)
	requireRefused(t, err)
	_, err = inspector.WaitAcquire(t.Context(), "42", time.Minute)
	requireRefused(t, err)
	requireRefused(t, inspector.Renew(t.Context(), &redfour.Lease{ID: "42", Index: lease.Index, Token: lease.Token}, time.Minute))
	requireRefused(t, inspector.Release(t.Context(), &redfour.Lease{ID: "42", Index: lease.Index, Token: lease.Token}))
	requireRefused(t, inspector.ForceRelease(t.Context(), "42", lease.Index))
	for _, args := range [][]any{{"DEL", "lock:42"}, {"HSET", "lock:42", "index", 1}, {"SET", "lock:42", 1}, {"LPOP", "lock-waiters:42"}} {
		requireRefused(t, client.Do(t.Context(), args...).Err(), args...)
	}
	require.Equal(t, before, r.snapshot(t))

	for _, rule := range rules[4:] {
		r.user(t, without(rules, rule)...)
		r.do(t, "SCRIPT", "FLUSH")
		require.Error(t, inspect(), "without %s", rule)
	}
	// A script takes its keys as if it wrote them.
	for _, key := range []string{"~lock:*", "~lock-waiters:*"} {
		few := append([]any{"ACL", "SETUSER", "app"}, without(rules, key)...)
		if r.admin.Do(t.Context(), append(few, "%R"+key)...).Err() == nil { // Redis 6 knows no such rights.
			require.Error(t, inspect(), "may only read %s", key)
		}
	}
	require.Empty(t, got)
}

// A replica that lags may not say that nobody holds a lock: see Inspect. Where the user may not even try to write, it does.
func TestRealRights_whoInspectsShouldAskAMaster(t *testing.T) {
	p := startPair(t)
	replica := &realRedis{p.replica, p.replica.Client(t)}
	o := replica.options()
	rules := documentedRights(t, "inspector")
	replica.user(t, append(rules, "+del")...)(o)
	l := newLock(t, newClient(t, o))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := l.Inspect(ctx, "42")
	require.ErrorContains(t, err, "READONLY")
	replica.user(t, rules...)
	status, err := l.Inspect(t.Context(), "42")
	require.NoError(t, err)
	require.False(t, status.Held)
}

// A client of sentinels asks them for the master and for each other, and subscribes to changes. What it does without a right it
// may do later, or not at all; that it was refused stands in the sentinel's log.
func TestFailoverRights_whatSentinelsAreAskedFor(t *testing.T) {
	f := redistest.StartFailover(t)
	master := &realRedis{f.Master(), f.Master().Client(t)}
	at := newClient(t, &redis.Options{Addr: f.SentinelAddrs()[0]})
	visit := func(t *testing.T, rules []any) (failed string, err error) {
		t.Helper()
		require.NoError(t, at.Do(t.Context(), append([]any{"ACL", "SETUSER", "seeker"}, rules...)...).Err())
		require.NoError(t, at.Do(t.Context(), "ACL", "LOG", "RESET").Err())
		v := master.visit(t, documentedRights(t, "app"))
		v.queues = true
		v.client = func(t *testing.T, via *link) redis.UniversalClient {
			t.Helper()
			o := f.Options()
			o.Username, o.Password, o.SentinelUsername, o.SentinelPassword = "app", "secret", "seeker", "secret"
			client := redis.NewFailoverClient(o)
			client.AddHook(via)
			t.Cleanup(func() { _ = client.Close() })
			return client
		}
		return v.pay(t, enough)
	}
	rules := documentedRights(t, "seeker")
	t.Run("all", func(t *testing.T) {
		failed, err := visit(t, rules)
		require.NoError(t, err, failed)
		eventually(t, func() bool {
			return strings.Contains(at.ClientList(t.Context()).Val(), " cmd=ping user=seeker")
		}, "a ping of the subscription")
		require.Empty(t, refusedBy(t, at))
	})
	for _, rule := range rules[4:] {
		t.Run(fmt.Sprint("without ", rule), func(t *testing.T) {
			_, _ = visit(t, without(rules, rule))
			eventually(t, func() bool { return len(refusedBy(t, at)) > 0 }, "refused")
			right, _, _ := strings.Cut(strings.TrimLeft(fmt.Sprint(rule), "&+"), "|")
			require.Contains(t, refusedBy(t, at)[0], right)
		})
	}
}

func TestReal_missingPermissionsAreErrorsAtOnce(t *testing.T) {
	r := startReal(t)
	all := []string{"acquire", "wait for", "renew", "release"}
	for _, row := range []struct {
		name  string
		rules []any
		ops   []string
	}{
		{"keys", []any{"~other:*", "&*", "+@all"}, all},
		{"counter", []any{"~lock:*", "&*", "+@all"}, all[:2]},
		{"scripts", []any{"~*", "&*", "+@all", "-@scripting"}, all},
		{"PTTL", []any{"~*", "&*", "+@all", "-pttl"}, all},
		{"HMGET", []any{"~*", "&*", "+@all", "-hmget"}, all[2:]},
		{"TIME", []any{"~*", "&*", "+@all", "-time"}, all[:2]},
		{"SET", []any{"~*", "&*", "+@all", "-set"}, all[:2]},
		{"HSET", []any{"~*", "&*", "+@all", "-hset"}, all[:2]},
		{"PEXPIRE", []any{"~*", "&*", "+@all", "-pexpire"}, all[:2]},
		{"PEXPIRE and DEL", []any{"~*", "&*", "+@all", "-pexpire", "-del"}, all[:2]},
	} {
		for _, op := range row.ops {
			t.Run(row.name+"/"+op, func(t *testing.T) {
				err := requireFinal(t, r, op, r.user(t, row.rules...))
				require.NotContains(t, err.Error(), "which redfour did not make")
				require.Empty(t, r.locks(t))
			})
		}
	}
}

func TestReal_wrongPasswordsAreErrorsAfterFiveSeconds(t *testing.T) {
	r := startReal(t, "--requirepass", "secret")
	for op, call := range everyCall {
		for password, said := range map[string]string{"": "NOAUTH|unauthenticated multibulk length", "guess": "WRONGPASS"} {
			t.Run(op+"/"+said, func(t *testing.T) {
				t.Parallel()
				o := r.options()
				o.Password = password
				start := time.Now()
				err := call(t.Context(), newLock(t, newClient(t, o)))
				require.Regexp(t, said, err)
				require.NotContains(t, err.Error(), "unknown", "nothing ran")
				for _, other := range []error{redfour.ErrLocked, redfour.ErrNotHeld, context.DeadlineExceeded} {
					require.NotErrorIs(t, err, other)
				}
				require.InDelta(t, 5, time.Since(start).Seconds(), 0.7)
			})
		}
	}
}

func TestReal_userWithoutChannelsCanDoAll(t *testing.T) {
	r := startReal(t)
	login := r.user(t, "~*", "+@all", "resetchannels")
	way := new(link)
	o := r.options(way)
	login(o)
	l := newLock(t, newClient(t, o, way))
	ctx := t.Context()

	lease := mustAcquire(t, l, "42", time.Minute)
	require.NoError(t, l.Renew(ctx, lease, time.Hour))
	require.NoError(t, l.Renew(ctx, lease, time.Minute), "the message that it is shorter is refused")
	looks := answered(way, isAcquire)
	local := waitFor(ctx, l, "42", time.Minute)
	eventually(t, func() bool { return looks.Load() == 1 }, "one look")
	require.NoError(t, l.Release(ctx, lease))
	require.NoError(t, l.Release(ctx, takeLease(t, local)))

	// From elsewhere it hears nothing, and waits for the holder's time to run out.
	mustAcquire(t, r.lock(t), "42", 500*time.Millisecond)
	require.NoError(t, l.Release(ctx, takeLease(t, waitFor(ctx, l, "42", time.Minute))))
	require.Empty(t, r.locks(t))
	require.Equal(t, 2, way.subscriptions(), "it tries without an inbox, and does not insist")
}

// An operator who is told that a key is foreign may delete it.
func TestRealRights_aRefusalIsNotAForeignKey(t *testing.T) {
	server := redistest.Start(t)
	admin := server.Client(t)
	mustAcquire(t, newLock(t, admin), "held", time.Minute)
	for denied, id := range map[string]string{"-set": "free", "-hmget": "held"} {
		require.NoError(t, admin.Do(t.Context(), "ACL", "SETUSER", "app", "reset", "on", ">secret", "~*", "&*", "+@all", denied).Err())
		o := server.Options()
		o.Username, o.Password = "app", "secret"
		_, err := newLock(t, newClient(t, o)).WaitAcquire(t.Context(), id, time.Minute)
		require.ErrorContains(t, err, "can't run this command")
		require.NotContains(t, err.Error(), "which redfour did not make")
	}
}

// A member that may subscribe, but not use the queues, hears of open releases only. It must not be counted among those
// who are handed the lock, or there would be none.
func TestRealRights_whoMayNotQueueIsLetInNowAndThen(t *testing.T) {
	r := startReal(t)
	o := r.options()
	r.user(t, "~lock:*", "~lockindex", "&lock-*", "+@all")(o)
	restricted := newLock(t, newClient(t, o))
	ctx, stop := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	for _, l := range []*redfour.Lock{r.lock(t), r.lock(t)} {
		for range 4 {
			busy.Go(func() {
				for ctx.Err() == nil {
					lease, err := l.WaitAcquire(ctx, "42", time.Minute)
					if err == nil {
						err = l.Release(t.Context(), lease)
					}
					if ctx.Err() == nil {
						assert.NoError(t, err)
					}
				}
			})
		}
	}
	for range 3 {
		require.NoError(t, restricted.Release(t.Context(), takeLease(t, waitFor(t.Context(), restricted, "42", time.Minute))))
	}
	stop()
	busy.Wait()
}

// That the user may not touch one lock says nothing about the queues of the others.
func TestRealRights_aForbiddenLockDoesNotEndTheQueues(t *testing.T) {
	r := startReal(t)
	way := new(link)
	o := r.options(way)
	r.user(t, "~lock:42", "~lockindex", "~lock-waiters:*", "&lock-*", "+@all")(o)
	l := newLock(t, newClient(t, o, way))
	holder := r.lock(t)
	lease := mustAcquire(t, holder, "42", time.Minute)
	got := sleeper(t, l, way, "42")
	_, err := l.WaitAcquire(t.Context(), "forbidden", time.Minute)
	require.ErrorContains(t, err, "NOPERM")
	require.NoError(t, holder.Release(t.Context(), lease))
	lease = takeLease(t, got)
	require.Contains(t, lease.Token, ":", "it was granted out of the queue")
	require.NoError(t, l.Release(t.Context(), lease))
}

// An authority signs certificates, of servers at 127.0.0.1 and of clients.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	file string // of its certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	a := &authority{key: key, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	require.NoError(t, err)
	a.cert, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	a.file = writePEM(t, "CERTIFICATE", der)
	return a
}

func writePEM(t *testing.T, kind string, der []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "pem")
	require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

// issue returns a new certificate and its key, and the files with both.
func (a *authority) issue(t *testing.T) (cert tls.Certificate, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, writePEM(t, "CERTIFICATE", der), writePEM(t, "PRIVATE KEY", keyDER)
}

// client is the config of a client that trusts the authority, and has a certificate of it.
func (a *authority) client(t *testing.T) *tls.Config {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	cert, _, _ := a.issue(t)
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}
}

// start starts a server that speaks TLS alone. It demands certificates of the clients, "yes", or does not, "no".
func (a *authority) start(t *testing.T, demands string) *realRedis {
	t.Helper()
	_, cert, key := a.issue(t)
	s := redistest.StartTLS(t, a.client(t), "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", a.file, "--tls-auth-clients", demands)
	return &realRedis{s, s.Client(t)}
}

func TestRealTLS_everythingGoesOverIt(t *testing.T) {
	r := newAuthority(t).start(t, "yes")
	require.Equal(t, map[string]string{"port": "0"}, r.admin.ConfigGet(t.Context(), "port").Val())
	plain := r.Options()
	plain.TLSConfig = nil
	require.Error(t, newClient(t, plain).Ping(t.Context()).Err())
	v := &visit{servers: []*realRedis{r}, data: r.admin, names: plainNames, queues: true}
	v.client = func(t *testing.T, via *link) redis.UniversalClient {
		t.Helper()
		return newClient(t, r.Options(), via)
	}
	failed, err := v.pay(t, enough)
	require.NoError(t, err, failed)
}

// requireNoTLS demands that every call ends within its bounds, with an error that says why there is no connection. It returns all that
// they say.
func requireNoTLS(t *testing.T, o *redis.Options, says string) string {
	t.Helper()
	l := newLock(t, newClient(t, o))
	calls := maps.Clone(everyCall)
	calls["force release"] = func(ctx context.Context, l *redfour.Lock) error { return l.ForceRelease(ctx, "42", 0) }
	calls["wait for"] = func(ctx context.Context, l *redfour.Lock) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := l.WaitAcquire(ctx, "42", time.Minute)
		return err
	}
	start := time.Now()
	var said syncBuffer
	var all sync.WaitGroup
	for op, call := range calls {
		all.Go(func() {
			err := call(t.Context(), l)
			assert.Less(t, time.Since(start), 7*time.Second, op)
			assert.ErrorContains(t, err, "redfour: "+op+` "42": `)
			assert.Regexp(t, says, fmt.Sprint(err), op)
			_, _ = fmt.Fprintln(&said, err)
			assert.NotErrorIs(t, err, redfour.ErrLocked, op)
			assert.NotErrorIs(t, err, redfour.ErrNotHeld, op)
		})
	}
	all.Wait()
	return said.String()
}

func TestRealTLS_aServerOfAnotherAuthorityIsRefused(t *testing.T) {
	t.Parallel()
	o := newAuthority(t).start(t, "no").Options()
	o.TLSConfig = newAuthority(t).client(t)
	requireNoTLS(t, o, "certificate signed by unknown authority")
}

// In TLS 1.3 the client believes that it is connected when the server refuses it. What it writes then may be reset before it reads why.
func TestRealTLS_aClientWithoutCertificateIsRefused(t *testing.T) {
	t.Parallel()
	o := newAuthority(t).start(t, "yes").Options()
	o.TLSConfig.Certificates = nil
	const why = "tls: certificate required"
	require.Contains(t, requireNoTLS(t, o, why+"|connection reset by peer|broken pipe"), why)
}

// urlOfChild is set for the process that TestRealTLS_aURLIsVerifiedAgainstTheSystemsRoots starts, because Go reads these once.
const urlOfChild = "REDFOUR_TEST_URL"

func TestRealTLS_aURLIsVerifiedAgainstTheSystemsRoots(t *testing.T) {
	t.Parallel()
	if url := os.Getenv(urlOfChild); url != "" {
		l, err := redfour.Open(url)
		require.NoError(t, err)
		defer l.Close() //nolint:errcheck // The process ends.
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Minute)))
		return
	}
	if runtime.GOOS == "darwin" {
		t.Skip("SSL_CERT_FILE is not read on macOS")
	}
	a := newAuthority(t)
	r := a.start(t, "no")
	for _, row := range []struct{ name, query, roots, says string }{
		{"refused", "", "", "certificate signed by unknown authority"},
		{"other roots", "", newAuthority(t).file, "certificate signed by unknown authority"},
		{"SSL_CERT_FILE", "", a.file, ""},
		{"skip_verify", "?skip_verify=true", "", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRealTLS_aURLIsVerified", "-test.v")
			child.Env = append(os.Environ(), urlOfChild+"=rediss://"+r.Addr()+"/0"+row.query)
			if row.roots != "" {
				child.Env = append(child.Env, "SSL_CERT_FILE="+row.roots)
			}
			out, err := child.CombinedOutput()
			if row.says == "" {
				require.NoError(t, err, string(out))
				return
			}
			require.Error(t, err)
			require.Contains(t, string(out), row.says)
		})
	}
}

// hostile are ids, and owners where they can be printed, by which somebody might want to get at other keys, or at the scripts.
var hostile = []string{
	"a", "b", "a:b", ":", "::", "a:", ":a", "*", "?", "[ab]", "[^x]", `\`, `\*`, "{a}", "{a}b", "{", "}", "{}", "}{a}", " ", "a ", " a",
	"\n", "\r\n", "\x00", "a\x00", "a\r\nFLUSHALL\r\n", "$8\r\nFLUSHALL\r\n", "a b c d", "a 1 2 3", "1", "0", "-1", "+inf",
	"index", "lockindex", "lock:a", "-waiters:a", "lock-waiters:a", "-release", "-grant:a", "-members", "~*", "&*", "+@all",
	`"`, "'", "]]", `" .. redis.call("FLUSHALL") .. "`, `") redis.call("FLUSHALL") --`, `]] redis.call("FLUSHALL") --`, "KEYS[1]", "ARGV[1]",
	"%s%n", "%d+", "(.*)", "日本", "\u202e", strings.Repeat("x", 1<<20), strings.Repeat("x", 1<<20+1),
}

func TestRealIDs_eachIsALockOfItsOwn(t *testing.T) {
	r := startReal(t)
	require.NoError(t, r.admin.Set(t.Context(), "canary", "x", 0).Err())
	l := r.lock(t)
	held := make(map[string]*redfour.Lease)
	for _, id := range hostile {
		held[id] = mustAcquire(t, l, id, time.Minute)
		require.True(t, held[id].Immediate)
	}
	require.Len(t, held, len(hostile))
	require.EqualValues(t, len(hostile)+2, r.admin.DBSize(t.Context()).Val(), "with the counter and the canary")
	for id, lease := range held {
		status, err := l.Inspect(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, lease.Index, status.Index)
		require.EqualValues(t, 1, r.admin.Exists(t.Context(), "lock:"+id).Val())
		_, err = l.Acquire(t.Context(), id, time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		require.Less(t, len(err.Error()), 1000)
		require.NotContains(t, err.Error(), "\n")
		require.NoError(t, l.Release(t.Context(), lease))
	}
	require.ElementsMatch(t, []string{"canary", "lockindex"}, r.admin.Keys(t.Context(), "*").Val())
}

// An owner is the rest of an entry in the queue, whatever it contains.
func TestRealOwners_areNothingButText(t *testing.T) {
	r := startReal(t)
	holder := r.lock(t)
	for n, owner := range hostile {
		id := fmt.Sprint(n)
		way := new(link)
		l, err := redfour.New(newClient(t, r.options(way), way), redfour.WithOwner(owner))
		if err != nil {
			continue
		}
		t.Cleanup(func() { _ = l.Close() })
		lease := mustAcquire(t, holder, id, time.Minute)
		got := sleeper(t, l, way, id)
		status, err := holder.Inspect(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, []string{owner}, status.Waiters)
		require.NoError(t, holder.Release(t.Context(), lease))
		lease = takeLease(t, got)
		status, err = holder.Inspect(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, owner, status.Owner)
		require.Equal(t, lease.Index, status.Index)
		require.InDelta(t, time.Minute, status.TTL, float64(10*time.Second))
		require.NoError(t, l.Release(t.Context(), lease))
	}
	require.Equal(t, []string{"lockindex"}, r.admin.Keys(t.Context(), "*").Val())
}

// Whoever may choose ids in a namespace can hold what belongs to another one that begins with it and a colon.
func TestRealNamespaces_oneThatBeginsWithAnotherAndAColonIsNotApart(t *testing.T) {
	r := startReal(t)
	outer, inner := r.lock(t), newLock(t, newClient(t, r.options()), redfour.WithNamespace("lock:inner"))
	mustAcquire(t, outer, "inner:42", time.Minute)
	_, err := inner.Acquire(t.Context(), "42", time.Minute)
	require.ErrorIs(t, err, redfour.ErrLocked)
	mustAcquire(t, outer, "innerindex", time.Minute)
	_, err = inner.Acquire(t.Context(), "43", time.Minute)
	require.ErrorContains(t, err, `key "lock:innerindex" is a hash`)
}

// A token keeps somebody who knows no more than the index from a lease. It does not from somebody who may read Redis.
func TestRealToken_isKnownToWhoeverReadsRedis(t *testing.T) {
	r := startReal(t)
	r.do(t, "CONFIG", "SET", "slowlog-log-slower-than", 0)
	l := r.lock(t)
	lease := mustAcquire(t, l, "42", time.Minute)
	for _, guess := range []string{"", "guess", lease.Token[1:], lease.Token + "x", strings.ToLower(lease.Token)} {
		guessed := &redfour.Lease{ID: "42", Index: lease.Index, Token: guess}
		require.ErrorIs(t, l.Renew(t.Context(), guessed, time.Hour), redfour.ErrConflict)
		require.ErrorIs(t, l.Release(t.Context(), guessed), redfour.ErrConflict)
	}
	require.Less(t, r.admin.PTTL(t.Context(), "lock:42").Val(), 2*time.Minute)

	require.Contains(t, r.do(t, "SLOWLOG", "GET", 100), lease.Token)
	text, err := json.Marshal(lease)
	require.NoError(t, err)
	require.Contains(t, string(text), lease.Token)
	require.NotContains(t, fmt.Sprintf("%v %+v %#v", lease, lease, *lease), lease.Token)
	read := &redfour.Lease{ID: "42", Index: lease.Index, Token: r.do(t, "HGET", "lock:42", "token")}
	require.NoError(t, r.lock(t).Release(t.Context(), read))

	// A lease of npm's has none.
	require.NoError(t, r.admin.HSet(t.Context(), "lock:42", "index", 7).Err())
	require.NoError(t, r.admin.Expire(t.Context(), "lock:42", time.Minute).Err())
	require.NoError(t, l.Release(t.Context(), &redfour.Lease{ID: "42", Index: 7}))
}

// The token of a lease out of the queue is the name of its Lock with the index.
func TestRealToken_ofAGrantTellsThoseOfTheSameLock(t *testing.T) {
	r := startReal(t)
	holder, waiter, stranger := r.lock(t), r.lock(t), r.lock(t)
	var granted []*redfour.Lease
	for _, id := range []string{"given", "other"} {
		lease := mustAcquire(t, holder, id, time.Minute)
		got := waitFor(t.Context(), waiter, id, time.Minute)
		eventually(t, func() bool { return r.admin.LLen(t.Context(), "lock-waiters:"+id).Val() == 1 }, "queued")
		require.NoError(t, holder.Release(t.Context(), lease))
		granted = append(granted, takeLease(t, got))
	}
	name, _, _ := strings.Cut(granted[0].Token, ":")
	require.Contains(t, r.admin.PubSubChannels(t.Context(), "*").Val(), "lock-grant:"+name)
	_, err := stranger.Acquire(t.Context(), "other", time.Minute)
	locked := new(redfour.LockedError)
	require.ErrorAs(t, err, &locked)
	forged := &redfour.Lease{ID: "other", Index: locked.Index, Token: fmt.Sprintf("%s:%d", name, locked.Index)}
	require.NoError(t, stranger.Release(t.Context(), forged))
	require.ErrorIs(t, waiter.Release(t.Context(), granted[1]), redfour.ErrExpired)
}

// A lock protects from accidents, and not from somebody who may write its key.
func TestRealTrust_whoMayLockMayEndAndFakeAnyLock(t *testing.T) {
	r := startReal(t)
	o := r.options()
	r.user(t, documentedRights(t, "simple")...)(o)
	rogue := newClient(t, o)
	l := r.lock(t)
	lease := mustAcquire(t, l, "42", time.Minute)
	require.NoError(t, rogue.Del(t.Context(), "lock:42").Err())
	require.ErrorIs(t, l.Release(t.Context(), lease), redfour.ErrExpired)
	require.NoError(t, rogue.HSet(t.Context(), "lock:42", "index", 7, "token", "t", "owner", "somebody else").Err())
	require.NoError(t, rogue.PExpire(t.Context(), "lock:42", time.Minute).Err())
	_, err := l.Acquire(t.Context(), "42", time.Minute)
	require.ErrorContains(t, err, "held by somebody else, index 7")
}

func TestRealSecrets_noErrorAndNoLogHasThem(t *testing.T) {
	r := startReal(t, "--requirepass", "hunter1")
	admin := newClient(t, &redis.Options{Addr: r.Addr(), Password: "hunter1"})
	var out syncBuffer
	log := redfour.WithLogger(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})))
	open := func(password string) *redfour.Lock {
		l, err := redfour.Open("redis://default:"+password+"@"+r.Addr(), log)
		require.NoError(t, err)
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	wrong := make(chan error, len(everyCall)) // one of each call
	for _, call := range everyCall {
		guessing := open("hunter2")
		go func() { wrong <- call(t.Context(), guessing) }()
	}
	var errs []error
	for range everyCall {
		errs = append(errs, <-wrong)
	}
	l, other := open("hunter1"), open("hunter1")
	lease := mustAcquire(t, l, "42", time.Minute)
	copied := &redfour.Lease{ID: "42", Index: lease.Index, Token: lease.Token}
	_, err := other.Acquire(t.Context(), "42", time.Minute)
	errs = append(errs, err)
	got := waitFor(t.Context(), other, "42", time.Minute)
	eventually(t, func() bool { return admin.LLen(t.Context(), "lock-waiters:42").Val() == 1 }, "queued")
	require.NoError(t, admin.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	eventually(t, func() bool { return strings.Contains(out.String(), "subscribed again") }, "logged")
	errs = append(errs, l.ForceRelease(t.Context(), "42", 7))
	require.NoError(t, l.ForceRelease(t.Context(), "42", lease.Index))
	next := takeLease(t, got)
	errs = append(errs, l.Renew(t.Context(), copied, time.Minute), l.Release(t.Context(), copied))
	require.NoError(t, other.Release(t.Context(), next))
	errs = append(errs, l.Renew(t.Context(), copied, time.Minute), l.ForceRelease(t.Context(), "42", 0))
	require.NoError(t, admin.Set(t.Context(), "lock:42", "x", 0).Err())
	errs = append(errs, l.Renew(t.Context(), copied, time.Minute), l.Release(t.Context(), copied))
	_, err = l.Inspect(t.Context(), "42")
	errs = append(errs, err)
	r.Kill()
	_, err = l.Acquire(t.Context(), "42", time.Minute)
	errs = append(errs, err, l.Close(), other.Close())
	text := fmt.Sprint(errs, out.String())
	require.Contains(t, text, "WRONGPASS")
	require.Contains(t, text, "lease lost")
	for _, secret := range []string{"hunter1", "hunter2", lease.Token, next.Token} {
		require.NotContains(t, text, secret)
	}
}

// The token is that of an attempt that did nothing.
func TestRealSecrets_aServerWithoutEVALSHARepeatsWhatItIsSent(t *testing.T) {
	_, err := startReal(t, "--rename-command", "EVALSHA", "").lock(t).Acquire(t.Context(), "42", time.Minute)
	require.ErrorContains(t, err, "ERR unknown command")
	require.Regexp(t, "'[A-Z2-7]{26}'", err.Error())
}
