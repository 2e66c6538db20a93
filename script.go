package redfour

import (
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/crew"
)

// names makes every key and channel name. They are shared with npm redfour and
// ioredfour, so they are part of the wire.
type names struct{ namespace string }

func (n names) lock(id string) string  { return n.namespace + ":" + id }
func (n names) counter() string        { return n.namespace + "index" }
func (n names) releaseChannel() string { return n.namespace + "-release" }

// inbox is a channel that one Lock alone subscribes to.
func (n names) inbox(member string) string { return n.namespace + "-grant:" + member }

// id is the inverse of lock. It returns false for a key that is no lock's.
func (n names) id(key string) (string, bool) { return strings.CutPrefix(key, n.namespace+":") }

// The scripts. Every key stands in KEYS and every other word in ARGV, so that
// nothing that a caller chose is ever read as Lua. They validate before they
// write, and write nothing that can fail half-way.
//
// All reply {status, index, milliseconds left}. Trouble with a key that is no
// lock is an error "REDFOUR <number of the key in KEYS> <what it is>".

// acquireScript takes a free lock.
//
//	KEYS 1 lock  2 counter
//	ARGV 1 ttl in ms  2 token  3 the highest index that the caller knows of
//
//	 1  the caller has the lock, under index
//	 2  the caller had it already: the reply to an earlier attempt was lost
//	 0  another lease has it, under index
//
// The index is at least the server's time in µs, so that it keeps growing when
// the counter is lost; see "Index" in docs/protocol.md. Numbers are
// formatted by hand because tostring loses digits of a number of this size.
// The first PEXPIRE changes nothing: it fails where an ACL refuses the second,
// which would leave a lock for ever. It comes after SET, because a server that is
// full lets pass what follows a write, and must refuse here.
var acquireScript = newScript(`
local left = redis.call("PTTL", KEYS[1])
if left ~= -2 then
  local held = redis.pcall("HMGET", KEYS[1], "index", "token")
  if held.err or left == -1 then
    local kind = redis.call("TYPE", KEYS[1]).ok
    if held.err and kind == "hash" then return held end
    if left == -1 then kind = kind .. " without expiry" end
    return redis.error_reply("REDFOUR 1 " .. kind)
  end
  local index = tonumber(held[1]) or 0
  if held[2] == ARGV[2] then return {2, index, left} end
  return {0, index, left}
end

local last = redis.pcall("GET", KEYS[2]) or "0"
if type(last) ~= "string" then
  local kind = redis.call("TYPE", KEYS[2]).ok
  if kind == "string" or kind == "none" then return last end
  return redis.error_reply("REDFOUR 2 " .. kind)
end
if not string.match(last, "^%d+$") then return redis.error_reply("REDFOUR 2 string without a number") end
local time = redis.call("TIME")
local index = math.max(tonumber(last) + 1, time[1] * 1000000 + time[2], tonumber(ARGV[3]) + 1)
if index >= 2^53 then return redis.error_reply("REDFOUR 2 number beyond 2^53") end

local id = string.format("%.0f", index)
redis.call("SET", KEYS[2], id)
redis.call("PEXPIRE", KEYS[1], ARGV[1])
redis.call("HSET", KEYS[1], "index", id, "token", ARGV[2])
redis.call("PEXPIRE", KEYS[1], ARGV[1])
return {1, index, tonumber(ARGV[1])}
`)

// releaseScript frees a lock that still belongs to the caller.
//
//	KEYS 1 lock
//	ARGV 1 index, or "" for whichever index the token has
//	     2 token, or "" for a lease of npm redfour  3 release channel
//
//	 1  released
//	-1  nobody held it
//	-2  another lease holds it, under index
//
// The index is unknown to an attempt whose reply was lost; its random token
// alone is then proof. No token and no index together prove nothing. DEL comes
// first: it is allowed when Redis is full, and then so is the rest. PUBLISH may
// be refused to this user; the lock is free all the same.
//
// A replica that lags must not say that nobody holds the lock, so before that
// answer a write is tried which changes nothing: a replica refuses it. The others are
// told as well, because they may still wait for the end of a lease that was deleted.
var releaseScript = newScript(`
local held = redis.pcall("HMGET", KEYS[1], "index", "token")
if held.err then
  local kind = redis.call("TYPE", KEYS[1]).ok
  if kind == "hash" or kind == "none" then return held end
  return redis.error_reply("REDFOUR 1 " .. kind)
end
local mine
if ARGV[1] == "" then
  mine = ARGV[2] ~= "" and held[2] == ARGV[2]
else
  mine = held[1] == ARGV[1] and (held[2] or "") == ARGV[2]
end
if mine then
  redis.call("DEL", KEYS[1])
  redis.pcall("PUBLISH", ARGV[3], KEYS[1])
  return {1, 0, 0}
end
local left = redis.call("PTTL", KEYS[1])
if left == -2 then
  local write = redis.pcall("DEL", KEYS[1])
  if type(write) == "table" and string.find(write.err, "READONLY") then return write end
  redis.pcall("PUBLISH", ARGV[3], KEYS[1])
  return {-1, 0, 0}
end
if left == -1 then return redis.error_reply("REDFOUR 1 hash without expiry") end
return {-2, tonumber(held[1]) or 0, left}
`)

// renewScript gives a lease that still holds a new ttl.
//
//	KEYS 1 lock
//	ARGV 1 index  2 token, or "" for a lease of npm redfour  3 ttl in ms
//
//	 1  renewed
//	-1  nobody holds it
//	-2  another lease holds it, under index
var renewScript = newScript(`
local held = redis.pcall("HMGET", KEYS[1], "index", "token")
if held.err then
  local kind = redis.call("TYPE", KEYS[1]).ok
  if kind == "hash" or kind == "none" then return held end
  return redis.error_reply("REDFOUR 1 " .. kind)
end
if held[1] == ARGV[1] and (held[2] or "") == ARGV[2] then
  redis.call("PEXPIRE", KEYS[1], ARGV[3])
  return {1, tonumber(held[1]), tonumber(ARGV[3])}
end
local left = redis.call("PTTL", KEYS[1])
if left == -2 then
  local write = redis.pcall("PEXPIRE", KEYS[1], ARGV[3])
  if type(write) == "table" and string.find(write.err, "READONLY") then return write end
  return {-1, 0, 0}
end
if left == -1 then return redis.error_reply("REDFOUR 1 hash without expiry") end
return {-2, tonumber(held[1]) or 0, left}
`)

// The statuses that the scripts reply.
const (
	statusHeld     = 0 // acquire: by another lease
	statusDone     = 1 // acquired, released, renewed
	statusAgain    = 2 // acquire: the caller had it already
	statusNobody   = -1
	statusConflict = -2
)

type script struct{ source, hash string }

func newScript(source string) *script {
	sum := sha1.Sum([]byte(source)) // the name that Redis gives it
	return &script{source: source, hash: hex.EncodeToString(sum[:])}
}

// A command is a script call that go-redis does not repeat. It would do so when
// a reply is lost, and could not tell the first run from the second.
type command struct{ *redis.Cmd }

func newCommand(ctx context.Context, name, script string, keys []string, argv []any) command {
	args := make([]any, 0, 3+len(keys)+len(argv))
	args = append(args, name, script, len(keys))
	for _, key := range keys {
		args = append(args, key)
	}
	c := command{redis.NewCmd(ctx, append(args, argv...)...)}
	// With the position and the distance of the keys given, the client needs no
	// COMMAND call to find them.
	c.SetFirstKeyPos(3)
	c.SetStepCount(1)
	return c
}

// NoRetry tells go-redis to send the command once.
func (c command) NoRetry() bool { return true }

// Clone keeps NoRetry, which a clone of the embedded command would lose.
func (c command) Clone() redis.Cmder {
	clone, ok := c.Cmd.Clone().(*redis.Cmd)
	if !ok {
		return c
	}
	return command{clone}
}

// A reply is what a script answered, and the time just before it was sent,
// from which every deadline is counted.
type reply struct {
	status int64
	index  int64
	left   time.Duration
	sent   time.Time
}

// A server sends the scripts of one namespace. It is safe for concurrent use.
type server struct {
	client  redis.UniversalClient
	names   names
	crew    *crew.Crew
	highest atomic.Int64 // index seen so far in this namespace
}

// moves tells whether the client follows a failover to another server. Go-redis does
// not say so; this is what it calls the address of such a client.
func (s *server) moves() bool {
	c, ok := s.client.(*redis.Client)
	return ok && c.Options().Addr == "FailoverClient"
}

// hears tells whether somebody subscribes to a channel, on the server that runs the
// scripts. It believes so if there is no answer.
func (s *server) hears(ctx context.Context, channel string) bool {
	subscribers, err := s.client.PubSubNumSub(ctx, channel).Result()
	return err != nil || subscribers[channel] > 0
}

// acquire tries once to take the lock of id. It returns when go-redis does,
// which may be long after ctx has ended; see start.
func (s *server) acquire(ctx context.Context, id, token string, ttl time.Duration) (reply, error) {
	return s.run(ctx, acquireScript, []string{s.names.lock(id), s.names.counter()},
		ttl.Milliseconds(), token, s.highest.Load())
}

// release tries once to free the lock of a lease.
func (s *server) release(ctx context.Context, l leaseKey) (reply, error) {
	return s.run(ctx, releaseScript, []string{s.names.lock(l.id)},
		strconv.FormatInt(l.index, 10), l.token, s.names.releaseChannel())
}

// releaseToken is release for a lease whose index is not known.
func (s *server) releaseToken(ctx context.Context, id, token string) (reply, error) {
	return s.run(ctx, releaseScript, []string{s.names.lock(id)}, "", token, s.names.releaseChannel())
}

// renew tries once to give a lease a new ttl.
func (s *server) renew(ctx context.Context, l leaseKey, ttl time.Duration) (reply, error) {
	return s.run(ctx, renewScript, []string{s.names.lock(l.id)},
		strconv.FormatInt(l.index, 10), l.token, ttl.Milliseconds())
}

// run sends a script by its hash and, where the server does not know it (it
// was restarted, or a replica was promoted, or SCRIPT FLUSH), in full.
func (s *server) run(ctx context.Context, sc *script, keys []string, argv ...any) (reply, error) {
	sent := time.Now()
	cmd := newCommand(ctx, "evalsha", sc.hash, keys, argv)
	err := s.client.Process(ctx, cmd)
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		cmd = newCommand(ctx, "eval", sc.source, keys, argv)
		err = s.client.Process(ctx, cmd)
	}
	if err != nil {
		return reply{}, keyErrorOf(err, keys)
	}
	values, err := cmd.Int64Slice()
	if err != nil {
		return reply{}, err
	}
	if len(values) != 3 {
		return reply{}, fmt.Errorf("script replied %d values, not 3", len(values))
	}
	// Whoever set the expiry of a foreign lock may have set more than a Duration holds.
	left := time.Duration(min(values[2], math.MaxInt64/int64(time.Millisecond))) * time.Millisecond
	r := reply{status: values[0], index: values[1], left: left, sent: sent}
	s.observe(r.index)
	return r, nil
}

// observe remembers the highest index. One that the clock will not reach before
// the next century is not ours, and must not drive ours beyond 2^53.
func (s *server) observe(index int64) {
	if index >= 1<<52 {
		return
	}
	for {
		highest := s.highest.Load()
		if index <= highest || s.highest.CompareAndSwap(highest, index) {
			return
		}
	}
}

// A call is a script that was sent and may still be on its way.
type call struct {
	done  chan struct{} // closed by the call's goroutine, after reply and err are written
	reply reply
	err   error
}

func newCall() *call { return &call{done: make(chan struct{})} }

// ask sends a script from a goroutine of its own, because go-redis can leave a cancelled
// caller waiting for its read timeout, and waits until ctx ends, for at most d. What
// could not be sent by then, for want of a connection, is not sent any more: it is
// going to be repeated, and would only keep others from the connection.
func (s *server) ask(
	ctx context.Context, d time.Duration, c *call, send func(ctx context.Context) (reply, error),
) (reply, error) {
	bounded, cancel := context.WithTimeout(ctx, d)
	s.crew.Start(func() {
		defer cancel()
		defer close(c.done)
		c.err = errCallEnded
		c.reply, c.err = send(bounded)
	})
	return c.waitUntil(ctx, d)
}

// errCallEnded is the outcome of a call whose goroutine was ended by a hook of
// the caller's client.
var errCallEnded = errors.New("the call was ended by the client")

// cleanupTime bounds what the library does for a caller who is gone.
const cleanupTime = 5 * time.Second

// A quest is the attempts to get one lease, all under one token: the first that
// comes through takes the lock, and the others recognise it. So an attempt whose
// reply is late can be repeated over another connection, and one whose reply was
// lost can be repeated at all. A quest belongs to one goroutine at a time.
type quest struct {
	id, token string
	calls     []*call // those on their way, and perhaps some that have come back
	maybe     bool    // one that has come back may have taken the lock
}

func newQuest(id string) *quest { return &quest{id: id, token: rand.Text()} }

// try makes one attempt. It waits for it for as long as patience lasts.
func (s *server) try(ctx context.Context, q *quest, ttl time.Duration) (reply, error) {
	c := newCall()
	q.calls = append(q.calls, c)
	r, err := s.ask(ctx, patience, c, func(ctx context.Context) (reply, error) {
		return s.acquire(ctx, q.id, q.token, ttl)
	})
	q.tidy()
	return r, err
}

// tidy forgets the attempts that have come back.
func (q *quest) tidy() {
	q.calls = slices.DeleteFunc(q.calls, func(c *call) bool {
		select {
		case <-c.done:
			q.maybe = q.maybe || c.mayHold()
			return true
		default:
			return false
		}
	})
}

// abandon gives back, in the background, what the quest took or may still take.
func (s *server) abandon(ctx context.Context, q *quest) {
	if len(q.calls) == 0 && !q.maybe {
		return
	}
	ctx = context.WithoutCancel(ctx)
	s.crew.Start(func() {
		for _, c := range q.calls {
			<-c.done
		}
		if q.maybe || slices.ContainsFunc(q.calls, (*call).mayHold) {
			s.discard(ctx, q.id, q.token)
		}
	})
}

// won ends the quest for a lease that was got. An attempt that comes through only
// after that lease was released takes the lock again: that is given back.
func (s *server) won(ctx context.Context, q *quest, index int64) {
	if len(q.calls) == 0 {
		return
	}
	ctx = context.WithoutCancel(ctx)
	s.crew.Start(func() {
		for _, c := range q.calls {
			<-c.done
			if c.err == nil && c.reply.status == statusDone && c.reply.index != index {
				_, _ = s.release(ctx, leaseKey{q.id, c.reply.index, q.token})
			}
		}
	})
}

// mayHold tells of an acquire that is done whether it may have taken the lock.
func (c *call) mayHold() bool {
	return judge(c.err) == unknown || c.err == nil && c.reply.status != statusHeld
}

// discard releases whatever lease has this token.
func (s *server) discard(ctx context.Context, id, token string) {
	until := time.Now().Add(cleanupTime)
	_ = repeat(ctx, ctx, until, verdict.transient, func() error {
		_, err := s.ask(ctx, patience, newCall(), func(ctx context.Context) (reply, error) {
			return s.releaseToken(ctx, id, token)
		})
		return err
	})
}

// giveBack releases a lease that nobody has heard of.
func (s *server) giveBack(ctx context.Context, lease *Lease) {
	s.discard(ctx, lease.ID, lease.Token)
}

// suit gives a lease that nobody has heard of the ttl that its taker wants.
func (s *server) suit(ctx context.Context, lease *Lease, ttl time.Duration) (*Lease, error) {
	key := lease.key()
	r, err := s.ask(ctx, patience, newCall(), func(ctx context.Context) (reply, error) { return s.renew(ctx, key, ttl) })
	if err != nil {
		return nil, err
	}
	if r.status != statusDone {
		return nil, notHeld(r)
	}
	suited := newLease(lease.ID, lease.Token, ttl, r)
	suited.Immediate = lease.Immediate
	return suited, nil
}

// patience is how long one attempt may take before it is sent again over another
// connection: this one may have died silently.
const patience = time.Second

// waitUntil is wait for at most d.
func (c *call) waitUntil(ctx context.Context, d time.Duration) (reply, error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.reply, c.err
	case <-ctx.Done():
		return reply{}, &givenUpError{contextError(ctx)}
	case <-timer.C:
		return reply{}, errNoAnswer
	}
}

// A givenUpError is that of a caller who did not wait for the answer. Its cause is the
// caller's, and may be an error of Redis or of another lock: it says nothing about
// this one.
type givenUpError struct{ error }

func (e *givenUpError) Unwrap() error { return e.error }

// errNoAnswer says that an attempt was given up while its caller was still there.
var errNoAnswer = errors.New("no answer from Redis")

// A verdict says what an error tells about a script.
type verdict int

const (
	answered    verdict = iota // no error: the script replied
	lost                       // it replied that the lease holds no longer
	final                      // nothing ran, and another attempt cannot help
	rejected                   // nothing ran; the server takes no writes for now
	unreachable                // nothing ran; there was no server to run it
	unknown                    // it may or may not have run
)

// transient tells whether somebody who has time should try again.
func (v verdict) transient() bool { return v >= rejected }

// outOfReach tells whether somebody in a hurry should try again.
func (v verdict) outOfReach() bool { return v >= unreachable }

func judge(err error) verdict {
	if err == nil {
		return answered
	}
	if _, ok := errors.AsType[*givenUpError](err); ok {
		return unknown
	}
	if errors.Is(err, ErrNotHeld) {
		return lost
	}
	if _, ok := errors.AsType[*keyError](err); ok {
		return final
	}
	if serverErr, ok := errors.AsType[redis.Error](err); ok {
		return judgeServer(serverErr)
	}
	switch {
	case errors.Is(err, redis.ErrClosed):
		return final
	case notConnected(err), errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted):
		return unreachable
	}
	return unknown
}

// notConnected tells whether there was no connection to send a script over.
func notConnected(err error) bool {
	opErr, ok := errors.AsType[*net.OpError](err)
	if ok && opErr.Op == "dial" {
		return true
	}
	_, badCertificate := errors.AsType[*tls.CertificateVerificationError](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	return badCertificate || noTLS
}

// judgeServer judges an error that the server sent, which proves that the script
// wrote nothing.
func judgeServer(err redis.Error) verdict {
	code, _, _ := strings.Cut(err.Error(), " ")
	switch {
	case redis.IsAuthError(err), redis.IsPermissionError(err), deniedInScript(err):
		return final
	case redis.IsMaxClientsError(err), redis.IsReadOnlyError(err), errors.Is(err, redis.Nil):
		return unreachable // Nil is a sentinel's, that knows of no master
	}
	switch code {
	case "WRONGTYPE", "CROSSSLOT", "MOVED":
		return final
	case "LOADING", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "BUSY":
		return unreachable
	}
	return rejected
}

// deniedInScript recognises what an ACL says inside a script: Redis 7.0 does not
// call it NOPERM there.
func deniedInScript(err error) bool {
	text := err.Error()
	return strings.Contains(text, "The user executing the script can't") ||
		strings.Contains(text, "ACL failure in script")
}

// A keyError says that a key under a name of ours is not ours.
type keyError struct{ key, kind string }

func (e *keyError) Error() string {
	return fmt.Sprintf("key %s is a %s, which redfour did not make", quote(e.key), e.kind)
}

// keyErrorOf turns the scripts' own errors into keyErrors.
func keyErrorOf(err error, keys []string) error {
	serverErr, ok := errors.AsType[redis.Error](err)
	if !ok {
		return err
	}
	text, ok := strings.CutPrefix(strings.TrimPrefix(serverErr.Error(), "ERR "), "REDFOUR ")
	number, kind, _ := strings.Cut(text, " ")
	n, convErr := strconv.Atoi(number)
	if !ok || convErr != nil || n < 1 || n > len(keys) {
		return err
	}
	return &keyError{key: keys[n-1], kind: kind}
}

// quote quotes an id or a key for an error, and cuts what nobody would read.
func quote(s string) string {
	const most = 100
	if len(s) <= most {
		return strconv.Quote(s)
	}
	return fmt.Sprintf("%q… (%d bytes)", strings.ToValidUTF8(s[:most], ""), len(s))
}

// repeat calls try until it succeeds, until again does not want to repeat its
// error, until the given time or until ctx or life ends. It returns try's last error.
func repeat(ctx, life context.Context, until time.Time, again func(verdict) bool, try func() error) error {
	for b := (backoff{min: 10 * time.Millisecond, max: 500 * time.Millisecond}); ; {
		err := try()
		if err == nil || !again(judge(err)) {
			return err
		}
		pause := b.next()
		if time.Until(until) < pause || !sleep(ctx, life, pause) {
			return err
		}
	}
}

// sleep lets d pass. It returns early, and false, when ctx or life ends.
func sleep(ctx, life context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-life.Done():
	}
	// All may be so, and then select does not care.
	return ctx.Err() == nil && life.Err() == nil
}

// A backoff is a growing, random pause: each is between a half and the whole of
// a step, and each step twice the last.
type backoff struct{ min, max, step time.Duration }

func (b *backoff) next() time.Duration {
	b.step = min(max(2*b.step, b.min), b.max)
	return b.step/2 + mathrand.N(b.step/2+1)
}

// contextError returns an error that matches both ctx.Err() and its cause.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return fmt.Errorf("%w: %w", err, cause)
}
