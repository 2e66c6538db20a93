//go:build unix

package redfour_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// The scripts alone, on a real server: at random against an oracle, and in tables where the oracle does not go,
// because the server is full, a replica, or does not allow everything.

// What the scripts reply, as "The scripts" in script.go has it.
const (
	isHeld     = 0
	isDone     = 1
	isAgain    = 2
	isQueued   = 3
	isFound    = 4
	isHanded   = 5
	isGranted  = 6
	isOpen     = 7
	isTaken    = 8
	isUnqueued = 9
	isNobody   = -1
	isConflict = -2
)

const (
	lockKey        = "lock:42"
	counterKey     = "lockindex"
	queueKey       = "lock-waiters:42"
	releaseChannel = "lock-release"
	censusChannel  = "lock-members"
)

func inboxOf(member string) string { return "lock-grant:" + member }

// A scriptStep is one run of a script. The oracle reads its fields, and Redis what is made of them.
type scriptStep interface {
	script() (source string, keys []string, argv []any)
	predict(o *oracle, now int64) scriptAnswer
}

// A queueEntry is what stands for a member in the queue. The zero value is none.
type queueEntry struct {
	member string
	ttl    int64
	number int
	owner  string
}

func (e queueEntry) String() string {
	if e == (queueEntry{}) {
		return ""
	}
	entry := fmt.Sprintf("%s %d %d", e.member, e.ttl, e.number)
	if e.owner != "" {
		entry += " " + e.owner
	}
	return entry
}

func word(b bool) string {
	if b {
		return "1"
	}
	return ""
}

type acquireStep struct {
	ttl     int64
	token   string
	highest int64
	owner   string
	entry   queueEntry // zero: it does not wait
	claimed int64
	expiry  bool
}

func (s acquireStep) script() (source string, keys []string, argv []any) {
	keys, argv = []string{lockKey, counterKey}, []any{s.ttl, s.token, s.highest, s.owner}
	if s.entry != (queueEntry{}) {
		keys = append(keys, queueKey)
		argv = append(argv, s.entry.String(), s.entry.member, s.claimed, word(s.expiry), "lock-", lockKey)
	}
	return redfour.AcquireScript, keys, argv
}

type leaveStep struct {
	entry   queueEntry
	claimed int64
}

func (s leaveStep) script() (source string, keys []string, argv []any) {
	return redfour.LeaveScript, []string{lockKey, queueKey}, []any{s.entry.String(), s.entry.member, s.claimed}
}

type releaseStep struct {
	index   string
	token   string
	highest int64
	queues  bool // the user may use the counter and the queue
	foreign bool // another process may have got the lease
	heir    string
	ttl     int64
	turn    bool
	entry   queueEntry // zero: it cannot be queued
	more    bool
	owner   string
}

func (s releaseStep) script() (source string, keys []string, argv []any) {
	if !s.queues {
		return redfour.ReleaseScript, []string{lockKey}, []any{s.index, s.token, "lock-", lockKey}
	}
	keys, argv = []string{lockKey, counterKey, queueKey}, []any{s.index, s.token, "lock-", s.highest, word(s.foreign)}
	if s.heir != "" {
		argv = append(argv, s.heir, s.ttl, word(s.turn), s.entry.String(), word(s.more), s.owner)
	}
	return redfour.ReleaseScript, keys, append(argv, lockKey)
}

type renewStep struct {
	index string
	token string
	ttl   int64
}

func (s renewStep) script() (source string, keys []string, argv []any) {
	return redfour.RenewScript, []string{lockKey}, []any{s.index, s.token, s.ttl}
}

type inspectStep struct{}

func (s inspectStep) script() (source string, keys []string, argv []any) {
	return redfour.InspectScript, []string{lockKey, queueKey}, []any{"lock-"}
}

// A scriptAnswer is what a script should reply.
type scriptAnswer struct {
	status, index, left int64
	timed               bool     // the server's time is in it
	words               []string // what follows
	err                 string
}

// The oracle says what the scripts should do, as plainly as it can be said. It knows no time but the one that a
// reply names: leases end when the test deletes them.
type oracle struct {
	lock     *modelLease // nil: it is free
	counter  string      // "" when it is lost
	queue    []queueEntry
	queueTTL int64           // what its expiry was set to last
	alive    map[string]bool // the members that subscribe to their inboxes, to releases and to the census
	npm      bool            // somebody else subscribes to releases
	sent     []string        // "<channel> <payload>"
}

type modelLease struct {
	index int64
	token string // "": npm's
	hops  int    // 0: there is no such field
	ttl   int64
	owner string // "": there is no such field
}

const (
	aMinute = 60_000
	no      = -1 // index
)

// next returns the index of the next lease.
func (o *oracle) next(highest, now int64) int64 {
	last := int64(0)
	if o.counter != "" {
		n, err := strconv.ParseInt(o.counter, 10, 64)
		if err != nil {
			return no
		}
		last = n
	}
	index := max(last+1, highest+1, now)
	if index >= 1<<53 {
		return no
	}
	return index
}

func (o *oracle) hold(index int64, token string, hops int, ttl int64, owner string) {
	o.counter = strconv.FormatInt(index, 10)
	o.lock = &modelLease{index, token, hops, ttl, owner}
}

func (o *oracle) free() {
	o.lock = nil
	o.publish()
}

func (o *oracle) publish() { o.sent = append(o.sent, releaseChannel+" "+lockKey) }

// anyAlive reports whether a member is counted.
func (o *oracle) anyAlive() bool {
	for _, alive := range o.alive {
		if alive {
			return true
		}
	}
	return false
}

// grant gives the lock to a member that was in the queue.
func (o *oracle) grant(e queueEntry, index int64, hops int, now int64) {
	o.hold(index, fmt.Sprintf("%s:%d", e.member, index), hops, e.ttl, e.owner)
	o.queueTTL = e.ttl + aMinute
	o.sent = append(o.sent, fmt.Sprintf("%s %d %d %d %s", inboxOf(e.member), index, e.ttl, now, lockKey))
}

// pop takes entries out of the queue up to the first that counts: one of another member that lives, or the one given.
func (o *oracle) pop(self string, own queueEntry) (queueEntry, bool) {
	for len(o.queue) > 0 {
		e := o.queue[0]
		o.queue = o.queue[1:]
		if e == own || e.member != self && o.alive[e.member] {
			return e, true
		}
	}
	return queueEntry{}, false
}

func (o *oracle) enqueue(e queueEntry) {
	if !slices.Contains(o.queue, e) {
		o.queue = append(o.queue, e)
	}
}

func (o *oracle) dequeue(e queueEntry) {
	if i := slices.Index(o.queue, e); i >= 0 {
		o.queue = slices.Delete(o.queue, i, i+1)
	}
}

// unclaimed tells whether the member was granted the lock and has not claimed it.
func (o *oracle) unclaimed(member string, claimed int64) bool {
	return o.lock != nil && o.lock.token == fmt.Sprintf("%s:%d", member, o.lock.index) && o.lock.index > claimed
}

func (s acquireStep) predict(o *oracle, now int64) scriptAnswer {
	waits := s.entry != (queueEntry{})
	if l := o.lock; l != nil {
		a := scriptAnswer{index: l.index, left: l.ttl, timed: waits}
		switch {
		case l.token == s.token:
			a.status = isAgain
			if !waits {
				a.words = []string{l.owner} // which nobody reads
			}
		case !waits:
			a.status, a.words = isHeld, []string{l.owner}
		case o.unclaimed(s.entry.member, s.claimed):
			a.status = isFound
		default:
			o.enqueue(s.entry)
			o.queueTTL = l.ttl + aMinute
			a.status, a.words = isHeld, []string{l.owner}
			if l.token != "" {
				a.status = isQueued
			}
		}
		return a
	}

	index := o.next(s.highest, now)
	if index == no {
		return scriptAnswer{err: "REDFOUR 2"}
	}
	if waits && s.expiry {
		if len(o.queue) > 0 {
			o.queue = nil
			o.publish()
		}
	} else if waits {
		if e, ok := o.pop(s.entry.member, s.entry); ok && e != s.entry {
			o.enqueue(s.entry)
			o.grant(e, index, 0, now)
			return scriptAnswer{status: isQueued, index: index, left: e.ttl, timed: true, words: []string{e.owner}}
		}
	}
	o.hold(index, s.token, 0, s.ttl, s.owner)
	return scriptAnswer{status: isDone, index: index}
}

func (s leaveStep) predict(o *oracle, _ int64) scriptAnswer {
	o.dequeue(s.entry)
	if o.unclaimed(s.entry.member, s.claimed) {
		return scriptAnswer{status: isFound, index: o.lock.index, left: o.lock.ttl, timed: true}
	}
	return scriptAnswer{status: isDone}
}

func (s releaseStep) predict(o *oracle, now int64) scriptAnswer {
	l := o.lock
	switch {
	case l == nil:
		o.free()
		return scriptAnswer{status: isNobody}
	case s.index == "" && s.token != "" && s.token == l.token:
	case s.index == fmt.Sprint(l.index) && s.token == l.token:
	case s.heir != "" && s.heir == l.token:
		return scriptAnswer{status: isTaken, index: l.index, left: l.ttl}
	default:
		o.publish()
		return scriptAnswer{status: isConflict, index: l.index, left: l.ttl}
	}

	if !s.queues || s.heir == "" && len(o.queue) == 0 {
		o.lock = nil
		if !s.queues || s.foreign || o.npm || !o.anyAlive() {
			o.publish()
		}
		return scriptAnswer{status: isDone}
	}
	hops := l.hops + 1
	if hops == 64 {
		hops = 0
		if o.npm {
			o.free()
			return scriptAnswer{status: isOpen}
		}
	}
	index := o.next(s.highest, now)
	if index == no {
		o.free()
		return scriptAnswer{status: isDone}
	}
	own := slices.Contains(o.queue, s.entry)
	if s.heir == "" || !s.turn {
		if e, ok := o.pop(s.entry.member, queueEntry{member: "none"}); ok {
			a := scriptAnswer{status: isGranted, index: index, left: e.ttl, timed: true, words: []string{e.owner}}
			switch {
			case s.heir == "":
			case s.entry != (queueEntry{}):
				o.enqueue(s.entry)
			default:
				a = scriptAnswer{status: isDone, timed: true}
			}
			if s.foreign {
				o.publish()
			}
			o.grant(e, index, hops, now)
			return a
		}
	}
	if s.heir == "" {
		o.free()
		return scriptAnswer{status: isDone}
	}
	if s.foreign {
		o.publish()
	}
	o.hold(index, s.heir, hops, s.ttl, s.owner)
	switch {
	case !s.more:
		o.dequeue(s.entry)
	case own && !s.turn: // It is put back, for nobody else was there.
		o.enqueue(s.entry)
		o.queueTTL = s.ttl + aMinute
	}
	return scriptAnswer{status: isHanded, index: index, left: s.ttl, timed: true}
}

func (s renewStep) predict(o *oracle, _ int64) scriptAnswer {
	switch l := o.lock; {
	case l == nil:
		return scriptAnswer{status: isNobody}
	case s.index == fmt.Sprint(l.index) && s.token == l.token:
		l.ttl = s.ttl
		return scriptAnswer{status: isDone, index: l.index, left: s.ttl}
	default:
		return scriptAnswer{status: isConflict, index: l.index, left: l.ttl}
	}
}

func (s inspectStep) predict(o *oracle, _ int64) scriptAnswer {
	a := scriptAnswer{status: isNobody, timed: true, words: []string{"", ""}}
	if l := o.lock; l != nil {
		a = scriptAnswer{status: isHeld, index: l.index, left: l.ttl, timed: true, words: []string{l.owner, l.token}}
	}
	for _, e := range o.queue {
		if o.alive[e.member] {
			a.words = append(a.words, e.String())
		}
	}
	return a
}

// wordsOf returns what follows the numbers in a reply.
func wordsOf(cmd *redis.Cmd) (words []string) {
	values, _ := cmd.Slice()
	for _, v := range values[min(4, len(values)):] {
		words = append(words, v.(string))
	}
	return words
}

// A tap is a connection that subscribes, and what it should have heard.
type tap struct {
	*redis.PubSub

	channels []string
	want     []string
}

// hear reads all that was sent to the connection before now. What is published is in its way before the answer
// to a later ping, so there is nothing to wait for.
func (e *tap) hear(t *testing.T) []string {
	t.Helper()
	require.NoError(t, e.Ping(t.Context(), "so far"))
	var got []string
	for {
		msg, err := e.Receive(t.Context())
		require.NoError(t, err)
		switch msg := msg.(type) {
		case *redis.Pong:
			return got
		case *redis.Message:
			got = append(got, msg.Channel+" "+msg.Payload)
		}
	}
}

// setOn subscribes, or unsubscribes, and returns when the server has done so.
func (e *tap) setOn(t *testing.T, on bool) {
	t.Helper()
	if on {
		require.NoError(t, e.Subscribe(t.Context(), e.channels...))
	} else {
		require.NoError(t, e.Unsubscribe(t.Context()))
	}
	for range e.channels {
		msg, err := e.Receive(t.Context())
		require.NoError(t, err)
		require.IsType(t, &redis.Subscription{}, msg)
	}
}

// A match plays the same steps to Redis and to the oracle.
type match struct {
	t       *testing.T
	admin   *redis.Client
	rng     *rand.Rand
	oracle  oracle
	monitor *tap
	npm     *tap
	members map[string]*tap
	trace   []string
	played  []scriptStep
	leases  []modelLease // that there were
	entries map[string]queueEntry
	numbers int            // entries, tokens and ttls so far
	streak  int            // releases still to be made in a row
	seen    map[string]int // script and status
}

// The second is as odd as a member's name may be, for a pattern or a format would trip over it.
var memberNames = []string{"A", "B%d+.*[%", "C", "D"}

func newMatch(t *testing.T, r *realRedis, seed uint64, seen map[string]int) *match {
	t.Helper()
	r.do(t, "FLUSHALL")
	c := &match{
		t: t, admin: r.admin, rng: rand.New(rand.NewPCG(seed, 0)), seen: seen,
		members: make(map[string]*tap), entries: make(map[string]queueEntry),
		oracle: oracle{alive: make(map[string]bool)},
	}
	client := r.Client(t)
	newTap := func(channels ...string) *tap {
		e := &tap{PubSub: client.Subscribe(t.Context()), channels: channels}
		t.Cleanup(func() { _ = e.Close() })
		return e
	}
	for _, m := range memberNames {
		c.members[m] = newTap(releaseChannel, censusChannel, inboxOf(m))
	}
	c.npm = newTap(releaseChannel)
	c.monitor = newTap()
	require.NoError(t, c.monitor.PSubscribe(t.Context(), "*"))
	_, err := c.monitor.Receive(t.Context())
	require.NoError(t, err)
	return c
}

// slack is more than a seed takes, and less than what lies between any two ttls, and between that of a lock and that of its queue.
const slack = 40_000

func (c *match) ttl() int64 { return 10_000_000 + 1_000_000*c.rng.Int64N(50) }

// play runs a script and compares what it replies, and what it leaves.
func (c *match) play(s scriptStep) {
	t := c.t
	source, keys, argv := s.script()
	p := c.admin.Pipeline()
	before, reply, after := p.Time(t.Context()), p.Eval(t.Context(), source, keys, argv...), p.Time(t.Context())
	compare := c.look(p)
	_, _ = p.Exec(t.Context()) // Each command has its error.

	got, err := valuesOf(reply)
	var now int64
	if err == nil {
		require.Len(t, got, 4)
		if now = got[3]; now == 0 { // If the index is not the time, it does not matter which.
			now = min(max(got[1], before.Val().UnixMicro()), after.Val().UnixMicro())
		}
	}
	want := s.predict(&c.oracle, now)
	c.note("%#v\n\t-> %v %v, not %v", s, got, err, want)
	switch {
	case want.err != "" || err != nil:
		require.ErrorContains(t, err, want.err+" ", c.report())
	case want.timed:
		require.NotZero(t, got[3], c.report())
		require.GreaterOrEqual(t, now, before.Val().UnixMicro(), c.report())
		require.LessOrEqual(t, now, after.Val().UnixMicro(), c.report())
	default:
		require.Zero(t, got[3], c.report())
	}
	if err == nil {
		require.Equal(t, []int64{want.status, want.index}, got[:2], c.report())
		require.True(t, got[2] <= want.left && got[2] >= max(0, want.left-slack), c.report())
		require.Equal(t, want.words, wordsOf(reply), c.report())
	}
	compare()
	c.played = append(c.played, s)
	c.seen[fmt.Sprintf("%T %d%s", s, want.status, want.err)]++
}

// outside plays what somebody else does.
func (c *match) outside(what string, redisSide func(p redis.Pipeliner), oracleSide func(o *oracle)) {
	p := c.admin.Pipeline()
	redisSide(p)
	compare := c.look(p)
	_, _ = p.Exec(c.t.Context())
	oracleSide(&c.oracle)
	c.note("%s", what)
	c.seen[what]++
	compare()
}

func (c *match) note(format string, args ...any) {
	c.trace = append(c.trace, fmt.Sprintf(format, args...))
}

func (c *match) report() string {
	return fmt.Sprintf("%s\noracle: %+v\nlock: %+v",
		strings.Join(c.trace[max(0, len(c.trace)-12):], "\n"), c.oracle, c.oracle.lock)
}

// look reads the whole state as the last part of a pipeline, and returns what compares it.
func (c *match) look(p redis.Pipeliner) (compare func()) {
	t, ctx := c.t, c.t.Context()
	lock, lockTTL := p.HGetAll(ctx, lockKey), p.Do(ctx, "PTTL", lockKey)
	counter := p.Get(ctx, counterKey)
	queue, queueTTL := p.LRange(ctx, queueKey, 0, -1), p.Do(ctx, "PTTL", queueKey)
	all := p.DBSize(ctx)
	return func() {
		t.Helper()
		o := &c.oracle
		fields, size := map[string]string{}, int64(0)
		if l := o.lock; l != nil {
			size++
			fields["index"] = fmt.Sprint(l.index)
			if l.token != "" {
				fields["token"] = l.token
			}
			// A hand-over may leave a 0 where there is no count.
			if _, ok := lock.Val()["hops"]; ok || l.hops > 0 {
				fields["hops"] = fmt.Sprint(l.hops)
			}
			// Likewise, if the lease before had an owner or not.
			if _, ok := lock.Val()["owner"]; ok || l.owner != "" {
				fields["owner"] = l.owner
			}
			c.requireTTL(lockTTL, l.ttl)
			if last := len(c.leases) - 1; last < 0 || c.leases[last].token != l.token || c.leases[last].index != l.index {
				c.leases = append(c.leases, *l)
			}
		}
		require.Equal(t, fields, lock.Val(), c.report())
		require.Equal(t, o.counter, counter.Val(), c.report())
		if o.counter != "" {
			size++
		}
		entries := []string{}
		for _, e := range o.queue {
			entries = append(entries, e.String())
		}
		require.Equal(t, entries, queue.Val(), c.report())
		if len(entries) > 0 {
			size++
			c.requireTTL(queueTTL, o.queueTTL)
		}
		require.Equal(t, size, all.Val(), c.report())

		for _, message := range o.sent {
			for _, e := range c.members {
				e.expect(message)
			}
			c.npm.expect(message)
		}
		require.Equal(t, o.sent, c.monitor.hear(t), c.report())
		o.sent = nil
	}
}

func (c *match) requireTTL(got *redis.Cmd, want int64) {
	c.t.Helper()
	left, err := got.Int64()
	require.NoError(c.t, err)
	require.LessOrEqual(c.t, left, want, c.report())
	require.Greater(c.t, left, want-slack, c.report())
}

// expect notes a message for a tap that hears its channel.
func (e *tap) expect(message string) {
	channel, _, _ := strings.Cut(message, " ")
	if e.want != nil && slices.Contains(e.channels, channel) {
		e.want = append(e.want, message)
	}
}

// toggle lets a tap come or go, and compares what it has heard before it goes.
func (c *match) toggle(e *tap) (on bool) {
	c.t.Helper()
	on = e.want == nil
	c.compareHeard(e)
	e.setOn(c.t, on)
	e.want = nil
	if on {
		e.want = []string{}
	}
	return on
}

func (c *match) compareHeard(e *tap) {
	c.t.Helper()
	if e.want == nil {
		return
	}
	got := e.hear(c.t)
	require.Equal(c.t, e.want, append([]string{}, got...), c.report())
	e.want = []string{}
}

func (c *match) toggleMember(name string) {
	on := c.toggle(c.members[name])
	c.oracle.alive[name] = on
	c.note("member %q lives: %v", name, on)
}

func (c *match) toggleNPM() {
	c.oracle.npm = c.toggle(c.npm)
	c.note("npm listens: %v", c.oracle.npm)
}

func pick[T any](rng *rand.Rand, from []T) T { return from[rng.IntN(len(from))] }

func (c *match) chance(percent int) bool { return c.rng.IntN(100) < percent }

// lease returns one that holds, most of the time.
func (c *match) lease() (index, token string) {
	switch l := c.oracle.lock; {
	case l != nil && c.chance(70):
		return fmt.Sprint(l.index), l.token
	case l != nil && c.chance(20):
		return fmt.Sprint(l.index + 1 - c.rng.Int64N(3)), l.token
	case l != nil && c.chance(20):
		return fmt.Sprint(l.index), ""
	case len(c.leases) > 0 && c.chance(90):
		l := pick(c.rng, c.leases[max(0, len(c.leases)-6):])
		return fmt.Sprint(l.index), l.token
	}
	return "7", "nobody's"
}

// highest is what a caller may have seen.
func (c *match) highest() int64 {
	n, _ := strconv.ParseInt(c.oracle.counter, 10, 64)
	n = min(n, 1<<52) // What is more is not believed.
	return pick(c.rng, []int64{0, 0, n, max(0, n-1), n + 1000})
}

func (c *match) claimed() int64 {
	if l := c.oracle.lock; l != nil {
		return pick(c.rng, []int64{0, l.index - 1, l.index, l.index, l.index + 1})
	}
	return 0
}

// entry returns what stands for a member in the queue, which changes now and then.
func (c *match) entry() queueEntry {
	m := pick(c.rng, memberNames)
	if e, ok := c.entries[m]; ok && c.chance(80) {
		return e
	}
	c.numbers++
	c.entries[m] = queueEntry{m, c.ttl(), c.numbers, c.owner()}
	return c.entries[m]
}

// owner is one that says nothing, or whatever people write.
func (c *match) owner() string {
	return pick(c.rng, []string{"", "me", "web-3 (pid 7)", " 12  3 ", "%d+.*[%", "ü"})
}

func (c *match) token() string {
	if c.chance(90) {
		c.numbers++
	}
	return fmt.Sprintf("t%d", c.numbers)
}

func (c *match) wait() acquireStep {
	return acquireStep{
		ttl: c.ttl(), token: c.token(), highest: c.highest(), owner: c.owner(),
		entry: c.entry(), claimed: c.claimed(), expiry: c.chance(15),
	}
}

func (c *match) release() releaseStep {
	s := releaseStep{queues: c.chance(95), foreign: c.chance(10), highest: c.highest()}
	s.index, s.token = c.lease()
	if c.chance(10) {
		s.index = ""
	}
	if s.queues && c.chance(60) {
		s.heir, s.ttl, s.turn, s.more, s.owner = c.token(), c.ttl(), c.chance(40), c.chance(50), c.owner()
		if c.chance(80) {
			s.entry = c.entry()
		}
	}
	return s
}

// step plays one at random.
func (c *match) step() {
	o := &c.oracle
	if c.streak > 0 {
		c.streak--
		if l := o.lock; l != nil && c.chance(75) {
			s := c.release()
			s.index, s.token, s.queues = fmt.Sprint(l.index), l.token, true
			if s.heir == "" {
				s.heir, s.ttl = c.token(), c.ttl()
			}
			c.play(s)
			return
		}
		c.play(c.wait())
		return
	}
	switch n := c.rng.IntN(100); {
	case n < 4:
		c.play(inspectStep{})
	case n < 12:
		c.play(acquireStep{ttl: c.ttl(), token: c.token(), highest: c.highest(), owner: c.owner()})
	case n < 38:
		c.play(c.wait())
	case n < 44:
		c.play(leaveStep{c.entry(), c.claimed()})
	case n < 68:
		c.play(c.release())
	case n < 72:
		index, token := c.lease()
		c.play(renewStep{index, token, c.ttl()})
	case n < 77 && len(c.played) > 0: // A reply was lost, or a request comes late.
		c.play(pick(c.rng, c.played[max(0, len(c.played)-8):]))
	case n < 83:
		c.toggleMember(pick(c.rng, memberNames))
	case n < 85:
		c.toggleNPM()
	case n < 86:
		c.streak = 100 // of which 64 are releases, if nothing happens in between
	default:
		c.elsewhere(n)
	}
}

// elsewhere plays what neither script nor member does.
func (c *match) elsewhere(n int) {
	o, ctx := &c.oracle, c.t.Context()
	switch l := o.lock; {
	case o.next(0, 0) == no:
		c.outside("the counter is repaired", func(p redis.Pipeliner) { p.Set(ctx, counterKey, 7, 0) }, func(o *oracle) { o.counter = "7" })
	case n < 89 && l != nil && l.token != "":
		hops := 59 + c.rng.IntN(5)
		c.outside("it was handed over often",
			func(p redis.Pipeliner) { p.HSet(ctx, lockKey, "hops", hops) }, func(o *oracle) { o.lock.hops = hops })
	case n < 91 && l != nil && l.token != "":
		c.outside("the lease runs out", func(p redis.Pipeliner) { p.Del(ctx, lockKey) }, func(o *oracle) { o.lock = nil })
	case n < 94 && l == nil:
		index, err := strconv.ParseInt(o.counter, 10, 64)
		if o.counter != "" && (err != nil || index > 1<<52 || strconv.FormatInt(index, 10) != o.counter) {
			return // It fails.
		}
		ttl := c.ttl()
		c.outside("npm acquires", func(p redis.Pipeliner) {
			p.Incr(ctx, counterKey)
			p.HSet(ctx, lockKey, "index", index+1)
			p.PExpire(ctx, lockKey, time.Duration(ttl)*time.Millisecond)
		}, func(o *oracle) { o.hold(index+1, "", 0, ttl, "") })
	case n < 94 && l != nil && l.token == "":
		c.outside("npm releases", func(p redis.Pipeliner) {
			p.Del(ctx, lockKey)
			p.Publish(ctx, releaseChannel, lockKey)
		}, (*oracle).free)
	case n < 96:
		value := pick(c.rng, []string{"x", "-", "1", "0007", "9007199254740990", "9007199254740991"})
		switch c.rng.IntN(3) {
		case 0:
			c.outside("the counter is lost", func(p redis.Pipeliner) { p.Del(ctx, counterKey) }, func(o *oracle) { o.counter = "" })
			return
		case 1:
			value = strconv.FormatInt(time.Now().Add(time.Hour).UnixMicro(), 10)
		}
		c.outside("the counter is another",
			func(p redis.Pipeliner) { p.Set(ctx, counterKey, value, 0) }, func(o *oracle) { o.counter = value })
	case n < 97:
		c.outside("the queue is lost", func(p redis.Pipeliner) { p.Del(ctx, queueKey) }, func(o *oracle) { o.queue = nil })
	}
}

// REDFOUR_SEED plays one match alone.
func TestRealScripts_agreeWithAnOracle(t *testing.T) {
	const seeds, steps = 18, 1500
	r := startReal(t)
	seen := make(map[string]int)
	first, n := uint64(1), seeds
	if s := os.Getenv("REDFOUR_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		first, n = seed, 1
	}
	for i := range n {
		seed := first + uint64(i)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			c := newMatch(t, r, seed, seen)
			for i := range steps {
				c.step()
				if i%50 == 49 {
					for _, e := range c.members {
						c.compareHeard(e)
					}
					c.compareHeard(c.npm)
				}
			}
		})
	}
	if n < seeds || t.Failed() {
		return
	}
	for script, statuses := range map[string][]int{
		"acquireStep": {isHeld, isDone, isAgain, isQueued, isFound},
		"leaveStep":   {isDone, isFound},
		"releaseStep": {isDone, isHanded, isGranted, isOpen, isTaken, isNobody, isConflict},
		"renewStep":   {isDone, isNobody, isConflict},
		"inspectStep": {isHeld, isNobody},
	} {
		for _, status := range statuses {
			require.GreaterOrEqual(t, seen[fmt.Sprintf("redfour_test.%s %d", script, status)], 10, "%s %d in %v", script, status, seen)
		}
	}
	t.Log(seen)
}

// A stage is a server on which single runs are set up.
type stage struct {
	*realRedis

	user *redis.Client // who runs the scripts
	b    *tap          // a member that lives
	all  *tap          // a monitor
}

func newStage(t *testing.T) *stage {
	t.Helper()
	r := startReal(t)
	r.user(t, "~*", "&*", "+@all")
	o := r.Options()
	o.Username, o.Password = "app", "secret"
	ears := r.Client(t)
	b := &tap{PubSub: ears.Subscribe(t.Context()), channels: []string{releaseChannel, censusChannel, inboxOf("B")}}
	t.Cleanup(func() { _ = b.Close() })
	b.setOn(t, true)
	all := &tap{PubSub: ears.PSubscribe(t.Context(), "*")}
	t.Cleanup(func() { _ = all.Close() })
	_, err := all.Receive(t.Context())
	require.NoError(t, err)
	return &stage{r, newClient(t, o), b, all}
}

// holder is who has the lock when a scene begins.
const (
	holderIndex = "1700000000000000"
	holderToken = "holder"
)

// scene sets the keys: the lock, if it is held, and the queue.
func (s *stage) scene(t *testing.T, isHeld bool, queue ...any) {
	t.Helper()
	s.do(t, "FLUSHALL")
	s.do(t, "SET", counterKey, holderIndex)
	if isHeld {
		s.do(t, "HSET", lockKey, "index", holderIndex, "token", holderToken)
		s.do(t, "PEXPIRE", lockKey, aMinute)
	}
	if len(queue) > 0 {
		s.do(t, append([]any{"RPUSH", queueKey}, queue...)...)
		s.do(t, "PEXPIRE", queueKey, 2*aMinute)
	}
	s.all.hear(t)
}

func (s *stage) run(t *testing.T, st scriptStep) ([]int64, error) {
	t.Helper()
	source, keys, argv := st.script()
	return valuesOf(s.user.Eval(t.Context(), source, keys, argv...))
}

func (s *stage) lockFields(t *testing.T) map[string]string {
	t.Helper()
	fields, err := s.admin.HGetAll(t.Context(), lockKey).Result()
	require.NoError(t, err)
	if len(fields) > 0 {
		left, err := s.admin.Do(t.Context(), "PTTL", lockKey).Int64()
		require.NoError(t, err)
		require.Positive(t, left, "a lock for ever")
	}
	return fields
}

func (s *stage) queued(t *testing.T) []string {
	t.Helper()
	queue, err := s.admin.LRange(t.Context(), queueKey, 0, -1).Result()
	require.NoError(t, err)
	return queue
}

var (
	ownEntry = queueEntry{"A", aMinute, 1, "the owner of A"}
	bEntry   = queueEntry{"B", 2 * aMinute, 1, "the owner of B"}
	ending   = releaseStep{index: holderIndex, token: holderToken, queues: true}
)

// withHeir is a release for somebody who waits in the same process.
func withHeir(turn, more bool, e queueEntry) releaseStep {
	s := ending
	s.heir, s.ttl, s.turn, s.more, s.entry = "heir", 3*aMinute, turn, more, e
	return s
}

// releases are the ways in which a lease ends, with what they reply if nothing is in the way.
var releases = map[string]struct {
	queue  []any
	step   releaseStep
	status int64
}{
	"for nobody":               {nil, ending, isDone},
	"for the heir":             {nil, withHeir(false, false, ownEntry), isHanded},
	"in turn":                  {[]any{ownEntry.String(), bEntry.String()}, withHeir(true, true, ownEntry), isHanded},
	"in turn, the last":        {[]any{ownEntry.String(), bEntry.String()}, withHeir(true, false, ownEntry), isHanded},
	"for the first":            {[]any{bEntry.String()}, ending, isGranted},
	"for the first that lives": {[]any{"dead 60000 1", bEntry.String()}, ending, isGranted},
	"to queue again":           {[]any{bEntry.String()}, withHeir(false, true, ownEntry), isGranted},
	"to stay in the queue":     {[]any{bEntry.String(), ownEntry.String()}, withHeir(false, true, ownEntry), isGranted},
	"without a queue for us":   {[]any{bEntry.String()}, withHeir(false, true, queueEntry{}), isDone},
	"past the dead":            {[]any{"dead 60000 1"}, withHeir(false, true, ownEntry), isHanded},
}

// requireEnded shows that the lease is over, and that whoever has the lock now can know it.
func (s *stage) requireEnded(t *testing.T, got []int64, st releaseStep) {
	t.Helper()
	fields, sent := s.lockFields(t), s.all.hear(t)
	switch token := fields["token"]; token {
	case "":
		require.Empty(t, fields)
		require.Contains(t, []int64{isDone, isOpen}, got[0])
		return
	case st.heir:
		require.EqualValues(t, isHanded, got[0])
	default:
		require.Equal(t, "B:"+fields["index"], token)
		require.Equal(t, bEntry.owner, fields["owner"])
		require.Len(t, sent, 1)
		require.Regexp(t, fmt.Sprintf(`^lock-grant:B %s %d \d{16} lock:42$`, fields["index"], bEntry.ttl), sent[0])
		if got[0] == isDone { // The caller is not in the queue, and is to look.
			require.Zero(t, got[1])
			return
		}
		require.EqualValues(t, isGranted, got[0])
		if st.heir != "" {
			require.Contains(t, s.queued(t), st.entry.String())
		}
	}
	require.Equal(t, fields["index"], fmt.Sprint(got[1]))
	require.Equal(t, fields["index"], s.do(t, "GET", counterKey))
	require.Greater(t, fields["index"], holderIndex)
	left, err := s.admin.Do(t.Context(), "PTTL", lockKey).Int64()
	require.NoError(t, err)
	require.LessOrEqual(t, left, got[2])
	require.Greater(t, left, got[2]-slack, "it lasts as long as was said")
}

// requireRepeatable shows that a release which is repeated changes nothing.
func (s *stage) requireRepeatable(t *testing.T, st releaseStep) {
	t.Helper()
	fields := s.lockFields(t)
	got, err := s.run(t, st)
	require.NoError(t, err)
	switch fields["token"] {
	case "":
		require.EqualValues(t, isNobody, got[0])
	case st.heir:
		require.EqualValues(t, isTaken, got[0])
		require.Equal(t, fields["index"], fmt.Sprint(got[1]))
	default:
		require.EqualValues(t, isConflict, got[0])
	}
	require.Equal(t, fields, s.lockFields(t))
}

// denials are users who lack one right. Where a lease cannot end without it, a release may fail, if it fails whole.
var denials = map[string][]any{
	"lpos": nil, "rpush": nil, "lindex": nil, "lrange": nil, "lpop": nil, "lrem": nil, "pubsub": nil, "time": nil, "get": nil, "set": nil,
	"publish": nil, "pexpire": nil, "hset": nil, "del": nil, "hmget": nil, "type": nil, "pttl": nil,
	"any channel":       {"resetchannels"},
	"inboxes":           {"resetchannels", "&lock-release", "&lock-members"},
	"the release":       {"resetchannels", "&lock-grant:*", "&lock-members"},
	"scripts on queues": {"resetkeys", "~lock:*", "~lockindex"},
	"nothing":           {"+@all"},
}

func (s *stage) deny(t *testing.T, right string) {
	t.Helper()
	rules := []any{"~*", "&*", "+@all"}
	if more := denials[right]; more != nil {
		rules = append(rules, more...)
	} else {
		rules = append(rules, "-"+right)
	}
	s.realRedis.user(t, rules...)
}

func TestRealScripts_releaseEndsTheLeaseWhateverIsDenied(t *testing.T) {
	s := newStage(t)
	for right := range denials {
		for name, row := range releases {
			t.Run(right+"/"+name, func(t *testing.T) {
				s.scene(t, true, row.queue...)
				s.deny(t, right)
				held := s.lockFields(t)
				got, err := s.run(t, row.step)
				switch right {
				case "del", "hmget", "scripts on queues":
					if err != nil {
						require.Equal(t, held, s.lockFields(t))
						require.Equal(t, holderIndex, s.do(t, "GET", counterKey))
						return
					}
				}
				require.NoError(t, err)
				s.requireEnded(t, got, row.step)
				if right != "pttl" {
					s.requireRepeatable(t, row.step)
				}
				if right == "nothing" {
					require.Equal(t, row.status, got[0])
				}
			})
		}
	}
}

// If it cannot be known who listens, npm clients may.
func TestRealScripts_everySixtyFourthReleaseIsOpenIfNobodyCanCount(t *testing.T) {
	s := newStage(t)
	s.deny(t, "pubsub")
	for hops, want := range map[int]int64{62: isHanded, 63: isOpen} {
		s.scene(t, true, bEntry.String())
		s.do(t, "HSET", lockKey, "hops", hops)
		st := withHeir(true, true, ownEntry)
		got, err := s.run(t, st)
		require.NoError(t, err)
		require.Equal(t, want, got[0], hops)
		s.requireEnded(t, got, st)
		require.Equal(t, []string{bEntry.String()}, s.queued(t), "the queue stays")
	}
}

// A user without rights to the queue names the lock alone.
func TestRealScripts_releaseNeedsOneKey(t *testing.T) {
	s := newStage(t)
	s.realRedis.user(t, "~lock:*", "resetchannels", "+@all")
	s.scene(t, true, bEntry.String())
	st := ending
	st.queues = false
	got, err := s.run(t, st)
	require.NoError(t, err)
	require.Equal(t, []int64{isDone, 0, 0, 0}, got)
	require.Empty(t, s.lockFields(t))
}

var waiting = acquireStep{ttl: 4 * aMinute, token: "mine", entry: ownEntry}

func TestRealScripts_acquireQueuesOrSaysThatItDoesNot(t *testing.T) {
	s := newStage(t)
	expired := waiting
	expired.expiry = true
	for right := range denials {
		for name, row := range map[string]struct {
			isHeld bool
			queue  []any
			step   acquireStep
			status int64
		}{
			"held":                {true, nil, waiting, isQueued},
			"held, and queued":    {true, []any{ownEntry.String()}, waiting, isQueued},
			"free":                {false, nil, waiting, isDone},
			"free, and first":     {false, []any{ownEntry.String(), bEntry.String()}, waiting, isDone},
			"free, and second":    {false, []any{bEntry.String(), ownEntry.String()}, waiting, isQueued},
			"free, behind":        {false, []any{bEntry.String()}, waiting, isQueued},
			"free, behind a dead": {false, []any{"dead 60000 1"}, waiting, isDone},
			"expired":             {false, []any{bEntry.String()}, expired, isDone},
		} {
			t.Run(right+"/"+name, func(t *testing.T) {
				s.scene(t, row.isHeld, row.queue...)
				s.deny(t, right)
				before := s.lockFields(t)
				got, err := s.run(t, row.step)
				fields, sent := s.lockFields(t), s.all.hear(t)
				if err != nil {
					require.Contains(t, []string{"pttl", "hmget", "hset", "get", "set", "time", "pexpire", "scripts on queues"}, right)
					require.Equal(t, before, fields)
					return
				}
				if right == "nothing" {
					require.Equal(t, row.status, got[0])
				}
				require.Equal(t, fields["index"], fmt.Sprint(got[1]))
				switch got[0] {
				case isDone:
					require.Equal(t, "mine", fields["token"])
					if right != "lrem" && right != "lpop" {
						require.NotContains(t, s.queued(t), ownEntry.String())
					}
				case isQueued:
					require.Contains(t, s.queued(t), ownEntry.String())
					if !row.isHeld {
						require.Equal(t, "B:"+fields["index"], fields["token"])
						require.Len(t, sent, 1)
						require.Contains(t, sent[0], "lock-grant:B "+fields["index"])
					}
				default:
					require.EqualValues(t, isUnqueued, got[0])
					if !slices.Contains(row.queue, any(ownEntry.String())) {
						require.NotContains(t, s.queued(t), ownEntry.String())
					}
					if row.isHeld {
						require.Equal(t, before, fields)
					} else { // It was granted to another, and the caller could not enter the queue.
						require.Equal(t, "B:"+fields["index"], fields["token"])
					}
				}
			})
		}
	}
}

// inspect returns what the script replied to a user who may do that.
func (s *stage) inspect(t *testing.T) (numbers []int64, words []string) {
	t.Helper()
	source, keys, argv := inspectStep{}.script()
	reply := s.user.Eval(t.Context(), source, keys, argv...)
	numbers, err := valuesOf(reply)
	require.NoError(t, err)
	return numbers, wordsOf(reply)
}

// What may not be read is left out, and a lock that is held is never said to be free.
func TestRealScripts_inspectTellsTheTruthWhateverIsDenied(t *testing.T) {
	s := newStage(t)
	for right := range denials {
		for _, held := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, held %v", right, held), func(t *testing.T) {
				s.scene(t, held, "dead 60000 1 x", bEntry.String())
				s.deny(t, right)
				before := s.lockFields(t)
				got, err := s.run(t, inspectStep{})
				require.Equal(t, before, s.lockFields(t))
				require.Len(t, s.queued(t), 2)
				if err != nil {
					require.Contains(t, []string{"pttl", "hmget", "time", "scripts on queues"}, right)
					return
				}
				want := int64(isNobody)
				if held {
					want = isHeld
				}
				require.Equal(t, want, got[0])
				if _, words := s.inspect(t); right != "pubsub" && right != "lrange" {
					require.Equal(t, []string{bEntry.String()}, words[2:])
				}
			})
		}
	}
}

func TestRealScripts_onAFullServer(t *testing.T) {
	s := newStage(t)
	full := func(t *testing.T) {
		t.Helper()
		s.do(t, "CONFIG", "SET", "maxmemory", 1)
		t.Cleanup(func() { s.admin.ConfigSet(context.WithoutCancel(t.Context()), "maxmemory", "0") })
	}
	for name, row := range releases {
		t.Run("release "+name, func(t *testing.T) {
			s.scene(t, true, row.queue...)
			full(t)
			got, err := s.run(t, row.step)
			require.NoError(t, err)
			require.Equal(t, row.status, got[0])
			s.requireEnded(t, got, row.step)
			s.requireRepeatable(t, row.step)
		})
	}
	t.Run("acquire", func(t *testing.T) {
		s.scene(t, false, bEntry.String())
		full(t)
		_, err := s.run(t, waiting)
		require.ErrorContains(t, err, "OOM")
		require.Empty(t, s.lockFields(t))
		require.Equal(t, []string{bEntry.String()}, s.queued(t))
		require.Equal(t, holderIndex, s.do(t, "GET", counterKey))
	})
	t.Run("acquire what is held", func(t *testing.T) {
		s.scene(t, true, bEntry.String())
		full(t)
		got, err := s.run(t, waiting)
		require.NoError(t, err)
		require.EqualValues(t, isUnqueued, got[0])
		require.Equal(t, []string{bEntry.String()}, s.queued(t))
	})
	t.Run("acquire when queued", func(t *testing.T) {
		s.scene(t, true, ownEntry.String())
		full(t)
		got, err := s.run(t, waiting)
		require.NoError(t, err)
		require.EqualValues(t, isQueued, got[0])
	})
	t.Run("leave and renew", func(t *testing.T) {
		s.scene(t, true, ownEntry.String())
		full(t)
		got, err := s.run(t, leaveStep{ownEntry, 0})
		require.NoError(t, err)
		require.EqualValues(t, isDone, got[0])
		require.Empty(t, s.queued(t))
		got, err = s.run(t, renewStep{holderIndex, holderToken, aMinute})
		require.NoError(t, err)
		require.EqualValues(t, isDone, got[0])
	})
}

// A master that was demoted, or a replica that lags, must not say that it did something, nor that nobody holds the lock.
func TestRealScripts_onAReplica(t *testing.T) {
	s := newStage(t)
	replica := func(t *testing.T) {
		t.Helper()
		s.do(t, "REPLICAOF", "127.0.0.1", 1)
		t.Cleanup(func() { s.admin.Do(context.WithoutCancel(t.Context()), "REPLICAOF", "NO", "ONE") })
	}
	for name, row := range releases {
		for _, isHeld := range []bool{true, false} {
			t.Run(fmt.Sprintf("release %s, held %v", name, isHeld), func(t *testing.T) {
				s.scene(t, isHeld, row.queue...)
				before := s.lockFields(t)
				replica(t)
				_, err := s.run(t, row.step)
				require.ErrorContains(t, err, "READONLY")
				require.Equal(t, before, s.lockFields(t))
				require.Empty(t, s.all.hear(t))
			})
		}
	}
	for name, st := range map[string]scriptStep{
		"acquire": waiting, "acquire once": acquireStep{ttl: aMinute, token: "mine"}, "leave": leaveStep{ownEntry, 0},
		"renew": renewStep{holderIndex, holderToken, aMinute}, "inspect": inspectStep{},
	} {
		for _, isHeld := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, held %v", name, isHeld), func(t *testing.T) {
				s.scene(t, isHeld, bEntry.String())
				replica(t)
				got, err := s.run(t, st)
				if (name == "acquire once" || name == "inspect") && isHeld {
					require.NoError(t, err)
					require.EqualValues(t, 0, got[0], "it writes nothing")
					return
				}
				require.ErrorContains(t, err, "READONLY")
			})
		}
	}
}

func TestRealScripts_aQueueThatIsNone(t *testing.T) {
	s := newStage(t)
	scene := func(t *testing.T, isHeld bool) {
		t.Helper()
		s.scene(t, isHeld)
		s.do(t, "SET", queueKey, "x")
	}
	for name, row := range releases {
		t.Run("release "+name, func(t *testing.T) {
			scene(t, true)
			got, err := s.run(t, row.step)
			require.NoError(t, err)
			want := int64(isDone)
			if row.step.heir != "" {
				want = isHanded
			}
			require.Equal(t, want, got[0])
			s.requireEnded(t, got, row.step)
			s.requireRepeatable(t, row.step)
		})
	}
	t.Run("acquire", func(t *testing.T) {
		scene(t, false)
		got, err := s.run(t, waiting)
		require.NoError(t, err)
		require.EqualValues(t, isDone, got[0])
	})
	t.Run("acquire what is held", func(t *testing.T) {
		scene(t, true)
		got, err := s.run(t, waiting)
		require.NoError(t, err)
		require.EqualValues(t, isUnqueued, got[0])
	})
	t.Run("leave", func(t *testing.T) {
		scene(t, true)
		_, err := s.run(t, leaveStep{ownEntry, 0})
		require.ErrorContains(t, err, "WRONGTYPE")
	})
	t.Run("inspect", func(t *testing.T) {
		scene(t, true)
		got, words := s.inspect(t)
		require.EqualValues(t, isHeld, got[0])
		require.Equal(t, []string{"", holderToken}, words)
	})
}

// noEntries are in a queue what no member put there.
var noEntries = []any{
	"x", "", " ", "a b", "B", "B ", "B x", "B -5 1", " 60000 1", "\x00\xff", "\r\n", "A 60000", "%s %d", strings.Repeat("z", 100_000),
	"dead 60000 1", "B: 60000 1",
}

func TestRealScripts_whatIsNoEntryIsDropped(t *testing.T) {
	s := newStage(t)
	odd := &tap{PubSub: s.Client(t).Subscribe(t.Context()), channels: []string{inboxOf("\x00\xff%1")}}
	t.Cleanup(func() { _ = odd.Close() })
	odd.setOn(t, true)
	for name, st := range map[string]releaseStep{"for nobody": ending, "for an heir": withHeir(false, true, ownEntry)} {
		t.Run("release "+name, func(t *testing.T) {
			s.scene(t, true, append(slices.Clone(noEntries), bEntry.String(), "later 60000 1")...)
			got, err := s.run(t, st)
			require.NoError(t, err)
			require.EqualValues(t, isGranted, got[0])
			s.requireEnded(t, got, st)
			want := []string{"later 60000 1"}
			if st.heir != "" {
				want = append(want, ownEntry.String())
			}
			require.Equal(t, want, s.queued(t))
		})
	}
	t.Run("release for nobody at all", func(t *testing.T) {
		s.scene(t, true, noEntries...)
		got, err := s.run(t, ending)
		require.NoError(t, err)
		require.EqualValues(t, isDone, got[0])
		s.requireEnded(t, got, ending)
		require.Empty(t, s.queued(t))
	})
	t.Run("acquire", func(t *testing.T) {
		s.scene(t, false, append(slices.Clone(noEntries), bEntry.String())...)
		got, err := s.run(t, waiting)
		require.NoError(t, err)
		require.EqualValues(t, isQueued, got[0])
		require.Equal(t, "B:"+fmt.Sprint(got[1]), s.lockFields(t)["token"])
		require.Equal(t, []string{ownEntry.String()}, s.queued(t))
	})
	t.Run("a member of odd bytes", func(t *testing.T) {
		s.scene(t, true, "\x00\xff%1 60000 with further words")
		got, err := s.run(t, ending)
		require.NoError(t, err)
		require.EqualValues(t, isGranted, got[0])
		require.Equal(t, "\x00\xff%1:"+fmt.Sprint(got[1]), s.lockFields(t)["token"])
		require.Len(t, odd.hear(t), 1)
	})
}

// A lock must not be left for ever, nor an acquire fail half-way, because of what stands in the queue for a member that lives.
func TestRealScripts_aTTLThatIsNone(t *testing.T) {
	s := newStage(t)
	for _, ttl := range []string{"0", "00", "9223372036854775807", "99999999999999999999", "100000000000000000"} {
		for name, st := range map[string]releaseStep{"for nobody": ending, "for an heir": withHeir(false, true, ownEntry)} {
			t.Run("release "+name+" "+ttl, func(t *testing.T) {
				s.scene(t, true, "B "+ttl+" 1")
				_, err := s.run(t, st)
				require.NoError(t, err)
				require.NotEqual(t, holderToken, s.lockFields(t)["token"])
			})
		}
		t.Run("acquire "+ttl, func(t *testing.T) {
			s.scene(t, false, "B "+ttl+" 1")
			_, err := s.run(t, waiting)
			s.lockFields(t)
			require.NoError(t, err)
		})
	}
}

// One script goes past a hundred that are dead, and no more; those behind hear of a release to nobody.
func TestRealScripts_manyThatAreDead(t *testing.T) {
	s := newStage(t)
	var dead []any
	for i := range 99 {
		dead = append(dead, fmt.Sprintf("dead%d 60000 %d", i, i))
	}
	t.Run("release to the hundredth", func(t *testing.T) {
		s.scene(t, true, append(slices.Clone(dead), bEntry.String())...)
		got, err := s.run(t, ending)
		require.NoError(t, err)
		require.EqualValues(t, isGranted, got[0])
		s.requireEnded(t, got, ending)
	})
	dead = append(dead, "dead99 60000 99")
	t.Run("release", func(t *testing.T) {
		s.scene(t, true, append(slices.Clone(dead), bEntry.String())...)
		got, err := s.run(t, ending)
		require.NoError(t, err)
		require.Equal(t, []int64{isDone, 0, 0, 0}, got)
		require.Equal(t, []string{releaseChannel + " " + lockKey}, s.all.hear(t))
		require.Empty(t, s.lockFields(t))
		require.Equal(t, []string{bEntry.String()}, s.queued(t))
	})
	t.Run("release for an heir", func(t *testing.T) {
		s.scene(t, true, append(slices.Clone(dead), bEntry.String())...)
		got, err := s.run(t, withHeir(false, true, ownEntry))
		require.NoError(t, err)
		require.EqualValues(t, isHanded, got[0])
		require.Equal(t, []string{bEntry.String()}, s.queued(t))
	})
	t.Run("acquire", func(t *testing.T) {
		s.scene(t, false, append(slices.Clone(dead), bEntry.String(), ownEntry.String())...)
		got, err := s.run(t, waiting)
		require.NoError(t, err)
		require.EqualValues(t, isDone, got[0])
		require.Equal(t, []string{bEntry.String()}, s.queued(t))
	})
}

func TestRealScripts_locksThatAreNone(t *testing.T) {
	s := newStage(t)
	steps := map[string]scriptStep{
		"acquire": acquireStep{ttl: aMinute, token: "mine"}, "wait": waiting,
		"release": ending, "release for an heir": withHeir(true, true, ownEntry), "renew": renewStep{holderIndex, holderToken, aMinute},
		"inspect": inspectStep{},
	}
	for name, st := range steps {
		t.Run(name+" a string", func(t *testing.T) {
			s.scene(t, false, bEntry.String())
			s.do(t, "SET", lockKey, "x", "PX", aMinute)
			_, err := s.run(t, st)
			require.ErrorContains(t, err, "REDFOUR 1 string")
			require.Equal(t, "x", s.do(t, "GET", lockKey))
			require.Equal(t, []string{bEntry.String()}, s.queued(t))
		})
		t.Run(name+" without expiry", func(t *testing.T) {
			s.scene(t, false, bEntry.String())
			s.do(t, "HSET", lockKey, "index", 7)
			_, err := s.run(t, st)
			require.ErrorContains(t, err, "REDFOUR 1 hash without expiry")
			require.Equal(t, []string{bEntry.String()}, s.queued(t))
		})
		for _, fields := range [][]any{{"name", "x"}, {"token", "x"}, {"index", "x"}, {"index", ""}} {
			t.Run(fmt.Sprint(name, " of ", fields), func(t *testing.T) {
				s.scene(t, false)
				s.do(t, append([]any{"HSET", lockKey}, fields...)...)
				s.do(t, "PEXPIRE", lockKey, aMinute)
				before := s.lockFields(t)
				got, err := s.run(t, st)
				require.NoError(t, err)
				require.Contains(t, []int64{isHeld, isQueued, isConflict}, got[0])
				require.Zero(t, got[1])
				require.Equal(t, before, s.lockFields(t))
			})
		}
	}
	for _, fields := range [][]any{{"name", "x"}, {"token", "x"}, {"index", "x"}} {
		t.Run(fmt.Sprint("leave ", fields), func(t *testing.T) {
			s.scene(t, false, ownEntry.String())
			s.do(t, append([]any{"HSET", lockKey}, fields...)...)
			s.do(t, "PEXPIRE", lockKey, aMinute)
			got, err := s.run(t, leaveStep{ownEntry, 0})
			require.NoError(t, err)
			require.Equal(t, []int64{isDone, 0, 0, 0}, got)
			require.Empty(t, s.queued(t))
		})
	}
}

// A counter that the index cannot grow beyond is no reason to keep a lock, nor to hand it over under another index.
func TestRealScripts_countersThatAreNone(t *testing.T) {
	s := newStage(t)
	for _, counter := range []string{"x", "", "nan", "inf", "-7", "1e3", "0x10", " 7 ", "4000000000000000.5", "9007199254740991", strings.Repeat("9", 400)} {
		for name, row := range releases {
			t.Run(fmt.Sprintf("%.20q/release %s", counter, name), func(t *testing.T) {
				s.scene(t, true, row.queue...)
				s.do(t, "SET", counterKey, counter)
				got, err := s.run(t, row.step)
				require.NoError(t, err)
				if fields := s.lockFields(t); len(fields) > 0 {
					require.Equal(t, fields["index"], fmt.Sprint(got[1]))
				}
				s.requireRepeatable(t, row.step)
			})
		}
	}
	t.Run("a list", func(t *testing.T) {
		for name, row := range releases {
			s.scene(t, true, row.queue...)
			s.do(t, "DEL", counterKey)
			s.do(t, "RPUSH", counterKey, 7)
			got, err := s.run(t, row.step)
			require.NoError(t, err, name)
			require.Equal(t, []int64{isDone, 0, 0, 0}, got)
			require.Empty(t, s.lockFields(t))
		}
	})
}
