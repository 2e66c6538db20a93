package redfour

import (
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/batch"
	"github.com/redfour-go/redfour/internal/crew"
)

// names makes every key and channel name. They are shared with npm redfour and
// ioredfour, so they are part of the wire.
type names struct{ namespace string }

func (n names) lock(id string) string  { return n.namespace + ":" + id }
func (n names) counter() string        { return n.namespace + "index" }
func (n names) queue(id string) string { return n.namespace + "-waiters:" + id }

// channels is what the name of every channel begins with. The scripts add the rest.
func (n names) channels() string           { return n.namespace + "-" }
func (n names) releases() string           { return n.channels() + "release" }
func (n names) census() string             { return n.channels() + "members" }
func (n names) inbox(member string) string { return n.channels() + "grant:" + member }

// id is the inverse of lock. It returns false for a key that is no lock's.
func (n names) id(key string) (string, bool) { return strings.CutPrefix(key, n.namespace+":") }

// The scripts. Every key stands in KEYS and every other word in ARGV, so that
// nothing that a caller chose is ever read as Lua. They validate before they
// write, and write nothing that can fail half-way.
//
// All reply {status, index, milliseconds left, server's time in µs}, and perhaps words; what is not known, or
// not used, is 0. The most frequent replies are cheaper: an index alone stands for {1, index, 0, 0}. Trouble with
// a key that is no lock is an error "REDFOUR <number of the key in KEYS> <what it is>".
//
// A member is one Lock value. Its entry in the queue of a lock is "<member> <ttl in ms> <number> <owner>", where the
// owner is the rest, and may be empty. A member lives if somebody subscribes to its inbox; what PUBLISH
// returns is no proof, because a monitor's PSUBSCRIBE * counts there.
//
// An owner is a text that says who holds a lock, for people. Nothing is decided by it.

// acquireScript takes a free lock, or enters the queue.
//
//	KEYS 1 lock  2 counter  3 queue, to wait
//	ARGV 1 ttl in ms  2 token  3 the highest index that the caller knows of  4 the caller as an owner, "" for none
//	     and to wait:  5 the caller's entry  6 the caller  7 the highest index that it has claimed of this lock
//	     8 "1" for an attempt at the end of the holder's lease  9 what channels begin with
//	     10 the lock's key as members know it
//
//	 1  the caller has the lock, under index
//	 2  the caller had it already, under this token: the reply to an earlier attempt was lost
//	 4  the caller was granted it, and has not claimed it: the message has not come, or not yet
//	 0  another lease has it, under index; a fifth value is its owner, "" if that is not known
//	 3  a lease of a member has it, and the caller is in the queue: it will be handed over; the owner likewise
//	 9  another lease has it, and the queue refused the caller's entry; the owner likewise
//
// The index is at least the server's time in µs, so that it keeps growing when
// the counter is lost; see "Index" in docs/protocol.md. Numbers are
// formatted by hand because tostring loses digits of a number of this size.
//
// A free lock with a queue is rare: its holder died, or was npm's, or the release was an open one. It goes to
// the first member in the queue that lives, and to the caller where that is himself. At the end of a lease the
// queue is dropped instead, and whoever lives is told to come again: many that died at once cost one ttl together.
//
// SET comes first, because a server that is full refuses it there, and lets pass what follows
// a write. It reads the counter as well: what is no counter is put back. Nearly always the clock is ahead, and
// the index is in the counter already. Where an ACL refuses PEXPIRE, a lock would stay for ever: it is deleted or, where that is
// refused as well, replaced by what has expired long ago.
var acquireScript = newScript(`
local entry, owner = ARGV[5], ARGV[4]
local left = redis.call("PTTL", KEYS[1])
if left ~= -2 then
  local held = redis.pcall("HMGET", KEYS[1], "index", "token", "owner")
  if held.err or left == -1 then
    local kind = redis.call("TYPE", KEYS[1]).ok
    if held.err and kind == "hash" then return held end
    if left == -1 then kind = kind .. " without expiry" end
    return redis.error_reply("REDFOUR 1 " .. kind)
  end
  local index = tonumber(held[1]) or 0
  if not entry then return {held[2] == ARGV[2] and 2 or 0, index, left, 0, held[3] or ""} end
  local time = redis.call("TIME")
  local now = time[1] * 1000000 + time[2]
  if held[2] == ARGV[2] then return {2, index, left, now} end
  if held[2] == ARGV[6] .. ":" .. (held[1] or "") and index > tonumber(ARGV[7]) then return {4, index, left, now} end
  local place = redis.pcall("LPOS", KEYS[3], entry) or redis.pcall("RPUSH", KEYS[3], entry)
  if type(place) == "table" then
    if string.find(place.err, "READONLY") then return place end
    return {9, index, left, now, held[3] or ""}
  end
  redis.pcall("PEXPIRE", KEYS[3], left + 60000)
  return {held[2] and 3 or 0, index, left, now, held[3] or ""}
end

local time = redis.call("TIME")
local micros = time[2]
if #micros < 6 then micros = string.sub("00000" .. micros, -6) end
local id = time[1] .. micros
local now = id + 0
local last = redis.pcall("SET", KEYS[2], id, "GET") or "0"
local index, counter = now, type(last) == "string" and tonumber(last)
if not counter or counter >= now or #last < 16 or ARGV[3] + 0 >= now then
  if type(last) ~= "string" then
    local kind = redis.call("TYPE", KEYS[2]).ok
    if kind == "string" or kind == "none" then return last end
    return redis.error_reply("REDFOUR 2 " .. kind)
  end
  index = math.max(now, ARGV[3] + 1)
  local number = string.find(last, "^%d+$")
  if not number or counter >= index then
    index = number and counter + 1 or 2^53
    if index >= 2^53 then
      redis.call("SET", KEYS[2], last)
      return redis.error_reply("REDFOUR 2 " .. (number and "number beyond 2^53" or "string without a number"))
    end
  end
  if index > now then
    id = string.format("%.0f", index)
    redis.call("SET", KEYS[2], id)
  end
end

local token, ttl, inbox, purged = ARGV[2], ARGV[1]
if entry and ARGV[8] == "1" then
  purged = redis.pcall("DEL", KEYS[3]) == 1
elseif entry then
  local e
  for _ = 1, 100 do
    e = redis.pcall("LPOP", KEYS[3])
    if type(e) ~= "string" or e == entry then break end
    local member, its, label = string.match(e, "^(%S+) ([1-9]%d*) ?%d* ?(.*)")
    local live = member and #its < 14 and member ~= ARGV[6]
      and redis.pcall("PUBSUB", "NUMSUB", ARGV[9] .. "grant:" .. member)
    if live and not live.err and live[2] > 0 then
      token, ttl, owner, inbox = member .. ":" .. id, its, string.sub(label, 1, 256), ARGV[9] .. "grant:" .. member
      break
    end
  end
  if e and e ~= entry and not inbox then redis.pcall("LREM", KEYS[3], 1, entry) end
end

if owner == "" then
  redis.call("HSET", KEYS[1], "index", id, "token", token)
else
  redis.call("HSET", KEYS[1], "index", id, "token", token, "owner", owner)
end
local expires = redis.pcall("PEXPIRE", KEYS[1], ttl)
if expires ~= 1 then
  if redis.pcall("DEL", KEYS[1]) ~= 1 then redis.call("SET", KEYS[1], "", "PXAT", 1) end
  return expires
end
if inbox then
  local place = redis.pcall("LPOS", KEYS[3], entry) or redis.pcall("RPUSH", KEYS[3], entry)
  redis.pcall("PEXPIRE", KEYS[3], ttl + 60000)
  local grant = id .. " " .. ttl .. " " .. string.format("%.0f", now) .. " " .. ARGV[10]
  if type(redis.pcall("PUBLISH", inbox, grant)) == "number" then
    return {type(place) == "number" and 3 or 9, index, tonumber(ttl), now, owner}
  end
  redis.pcall("LREM", KEYS[3], 1, entry)
  redis.call("HSET", KEYS[1], "token", ARGV[2], "owner", ARGV[4])
  redis.call("PEXPIRE", KEYS[1], ARGV[1])
elseif purged then
  redis.pcall("PUBLISH", ARGV[9] .. "release", ARGV[10])
end
return index
`)

// leaveScript takes an entry out of the queue.
//
//	KEYS 1 lock  2 queue
//	ARGV 1 the caller's entry  2 the caller  3 the highest index that it has claimed of this lock
//
//	 1  nothing of it is left
//	 4  the caller was granted the lock before, under index, and has not claimed it
var leaveScript = newScript(`
local held = redis.call("HMGET", KEYS[1], "index", "token")
redis.call("LREM", KEYS[2], 1, ARGV[1])
if held[1] and held[2] == ARGV[2] .. ":" .. held[1] and tonumber(held[1]) > tonumber(ARGV[3]) then
  local time = redis.call("TIME")
  return {4, tonumber(held[1]), redis.call("PTTL", KEYS[1]), time[1] * 1000000 + time[2]}
end
return {1, 0, 0, 0}
`)

// releaseScript ends a lease that still holds, and gives the lock to the next.
//
//	KEYS 1 lock  and where the user may use them:  2 counter  3 queue
//	ARGV 1 index, or "" for whichever index the token has
//	     2 token, or "" for a lease of npm redfour
//	     3 what channels begin with  4 the highest index that the caller knows of
//	     5 "1" if waiters of the process that got the lease may not be in the queue, and the caller is another
//	     and where somebody waits in the caller's process:
//	     6 his token  7 his ttl in ms  8 "1" while the caller's turn goes on
//	     9 the caller's entry, "" if it cannot be queued  10 "1" if others wait behind him  11 he as an owner, "" for none
//	     and always, after the others:  the lock's key as members know it
//
//	 1  released: the lock is free, or somebody has it and the caller could not enter the queue
//	 5  handed to the next waiter of the caller's process, under index; if others wait behind him, the caller is in the
//	    queue as it was before, and else not
//	 6  granted to another member, under index; the caller is in the queue if it has waiters; a fifth value is the owner
//	 7  released openly, for those who are not in the queue: members try after a pause
//	-1  nobody held it
//	 8  the next waiter has the lock already, under index; by whom the lease was ended is not known
//	-2  another lease holds it, under index
//
// The index is unknown to an attempt whose reply was lost; its random token
// alone is then proof. No token and no index together prove nothing.
//
// All that must be read is read before the first write, and trouble with it means a release to nobody. The
// first write is one that a server allows which is full; then it allows the rest. What a user may lack the
// rights for goes through pcall. A release to nobody needs DEL, and a PUBLISH that may be refused.
//
// Every waiting process of the namespace gets that message, so it is sent only where a waiter may need it. A member
// that waits is in the queue, or looks when its subscription is confirmed; or it waits for its own process, which
// wakes it. A caller that is another process is said to be so, and is published also if it hands the lock on: the
// next release would not be. A waiter that knows no queue listens to releases, and not to the members channel. If the
// queue was not empty, its entries may belong to members that Redis took for dead. A lease that is gone may have gone
// with its queue, so those answers are always published. So is a release that no
// client listens to, which costs nothing: some services count no subscribers.
//
// At every 64th hand-over without a break the lock is released openly if more listen to releases than the
// members who wait: npm clients do not hear of grants, and would wait for ever.
//
// A replica that lags must not say that nobody holds the lock, so before that
// answer a write is tried which changes nothing: a replica refuses it. The others are
// told as well, because they may still wait for the end of a lease that was deleted.
var releaseScript = newScript(`
local held = redis.pcall("HMGET", KEYS[1], "index", "token", "hops")
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
local next, release, name = #ARGV > 6 and ARGV[6], ARGV[3] .. "release", ARGV[#ARGV]
if not mine then
  local left = redis.call("PTTL", KEYS[1])
  if left == -2 then
    local write = redis.pcall("DEL", KEYS[1])
    if type(write) == "table" and string.find(write.err, "READONLY") then return write end
    redis.pcall("PUBLISH", release, name)
    return {-1, 0, 0, 0}
  end
  if left == -1 then return redis.error_reply("REDFOUR 1 hash without expiry") end
  if next and held[2] == next then return {8, tonumber(held[1]) or 0, left, 0} end
  redis.pcall("PUBLISH", release, name)
  return {-2, tonumber(held[1]) or 0, left, 0}
end

local foreign = #ARGV > 5 and ARGV[5] == "1"
local status, announce = 1, foreign or not KEYS[3]
if KEYS[3] and (next or redis.pcall("LINDEX", KEYS[3], 0)) then
  announce = true
  local last, time = redis.pcall("GET", KEYS[2]) or "0", redis.pcall("TIME")
  last = type(last) == "string" and not time.err and string.find(last, "^%d+$") and tonumber(last) or 2^53
  local now = (time[1] or 0) * 1000000 + (time[2] or 0)
  local index = math.max(last + 1, now, tonumber(ARGV[4]) + 1)
  local id = string.format("%.0f", index)
  local hops = (tonumber(held[3]) or 0) + 1
  if hops >= 64 then
    local n = redis.pcall("PUBSUB", "NUMSUB", release, ARGV[3] .. "members")
    if n.err or n[2] > n[4] then status = 7 end
    hops = 0
  end

  local function lease(token, ttl, owner)
    local made = type(redis.pcall("PEXPIRE", KEYS[1], ttl)) == "number"
      and redis.pcall("SET", KEYS[2], id).ok
      and type(redis.pcall("HSET", KEYS[1], "index", id, "token", token, "hops", hops, "owner", owner)) == "number"
    if made and foreign then redis.pcall("PUBLISH", release, name) end
    return made
  end
  if status == 1 and index < 2^53 then
    local entry, more, popped = ARGV[9] or "", ARGV[10] == "1", false
    local function hand()
      if not next or not lease(next, ARGV[7], ARGV[11]) then return false end
      if more and popped then
        redis.pcall("RPUSH", KEYS[3], entry)
        redis.pcall("PEXPIRE", KEYS[3], ARGV[7] + 60000)
      elseif not more and entry ~= "" and not popped then
        redis.pcall("LREM", KEYS[3], 1, entry)
      end
      return {5, index, tonumber(ARGV[7]), now}
    end
    local handed = ARGV[8] == "1" and hand()
    if handed then return handed end
    local self = string.match(entry, "^%S+")
    for _ = 1, 100 do
      local e = redis.pcall("LPOP", KEYS[3])
      if type(e) ~= "string" then break end
      popped = popped or e == entry
      local member, ttl, owner = string.match(e, "^(%S+) ([1-9]%d*) ?%d* ?(.*)")
      local inbox = ARGV[3] .. "grant:" .. (member or "")
      owner = string.sub(owner or "", 1, 256)
      local live = member and #ttl < 14 and member ~= self and redis.pcall("PUBSUB", "NUMSUB", inbox)
      if live and not live.err and live[2] > 0 then
        if not lease(member .. ":" .. id, ttl, owner) then
          next = nil
          break
        end
        local queued = not next or entry ~= "" and type(redis.pcall("LPOS", KEYS[3], entry)
          or redis.pcall("RPUSH", KEYS[3], entry)) == "number"
        redis.pcall("PEXPIRE", KEYS[3], ttl + 60000)
        local grant = id .. " " .. ttl .. " " .. string.format("%.0f", now) .. " " .. name
        if type(redis.pcall("PUBLISH", inbox, grant)) ~= "number" then
          next = nil
          break
        end
        if not queued then return {1, 0, 0, now} end
        return {6, index, tonumber(ttl), now, owner}
      end
    end
    handed = hand()
    if handed then return handed end
  end
end
if not announce then
  local n = redis.pcall("PUBSUB", "NUMSUB", release, ARGV[3] .. "members")
  announce = n.err or n[2] > n[4] or n[2] == 0
end
redis.call("DEL", KEYS[1])
if announce then redis.pcall("PUBLISH", release, name) end
return status == 1 and 0 or {status, 0, 0, 0}
`)

// renewScript gives a lease that still holds a new ttl.
//
//	KEYS 1 lock
//	ARGV 1 index  2 token, or "" for a lease of npm redfour  3 ttl in ms
//	     and to wake waiters:  4 what channels begin with  5 the lock's key as members know it
//
//	 1  renewed
//	-1  nobody holds it
//	-2  another lease holds it, under index
//
// Waiters know when the lease was to end, and look again then. If it ends earlier they
// are woken, because a holder that dies would not wake them. Up to 10 ms do not matter:
// waiters spread their looks by that.
var renewScript = newScript(`
local held = redis.pcall("HMGET", KEYS[1], "index", "token")
if held.err then
  local kind = redis.call("TYPE", KEYS[1]).ok
  if kind == "hash" or kind == "none" then return held end
  return redis.error_reply("REDFOUR 1 " .. kind)
end
if held[1] == ARGV[1] and (held[2] or "") == ARGV[2] then
  local left = ARGV[4] and redis.call("PTTL", KEYS[1])
  redis.call("PEXPIRE", KEYS[1], ARGV[3])
  if left and left > ARGV[3] + 10 then redis.pcall("PUBLISH", ARGV[4] .. "release", ARGV[5]) end
  return {1, tonumber(held[1]), tonumber(ARGV[3]), 0}
end
local left = redis.call("PTTL", KEYS[1])
if left == -2 then
  local write = redis.pcall("PEXPIRE", KEYS[1], ARGV[3])
  if type(write) == "table" and string.find(write.err, "READONLY") then return write end
  return {-1, 0, 0, 0}
end
if left == -1 then return redis.error_reply("REDFOUR 1 hash without expiry") end
return {-2, tonumber(held[1]) or 0, left, 0}
`)

// inspectScript tells who holds a lock, and who waits for it. It changes nothing, but before it says that nobody holds
// the lock it tries a write, as release does.
//
//	KEYS 1 lock  and where the user may use it:  2 queue
//	ARGV 1 what channels begin with
//
//	 0  a lease has it, under index
//	-1  nobody holds it
//
// The further values are the owner and the token of the lease, "" where there is none, and the entries of the members
// in the queue that live.
var inspectScript = newScript(`
local held = redis.pcall("HMGET", KEYS[1], "index", "token", "owner")
local left = redis.call("PTTL", KEYS[1])
if held.err or left == -1 then
  local kind = redis.call("TYPE", KEYS[1]).ok
  if held.err and (kind == "hash" or kind == "none") then return held end
  if left == -1 then kind = kind .. " without expiry" end
  return redis.error_reply("REDFOUR 1 " .. kind)
end
if left == -2 then
  local write = redis.pcall("DEL", KEYS[1])
  if type(write) == "table" and string.find(write.err, "READONLY") then return write end
end
local time = redis.call("TIME")
local index = held[1] and #held[1] < 17 and string.find(held[1], "^[1-9]%d*$") and tonumber(held[1]) or 0
local reply = {left == -2 and -1 or 0, index, math.max(left, 0), time[1] * 1000000 + time[2],
  held[3] or "", held[2] or ""}
local queue = KEYS[2] and redis.pcall("LRANGE", KEYS[2], 0, 999) or {}
for _, entry in ipairs(queue.err and {} or queue) do
  local member = string.match(entry, "^(%S+) [1-9]%d*")
  local live = member and redis.pcall("PUBSUB", "NUMSUB", ARGV[1] .. "grant:" .. member)
  if live and not live.err and live[2] > 0 then reply[#reply + 1] = entry end
end
return reply
`)

// countScript counts the subscribers of a channel where the scripts run. A server that was replaced by
// another still counts its own, so a write is tried first, which changes nothing: a replica refuses it. The key
// sends a cluster's client to the slot's master.
//
//	KEYS 1 a key that does not exist
//	ARGV 1 the channel
//
// It replies the number alone.
var countScript = newScript(`
local write = redis.pcall("DEL", KEYS[1])
if type(write) == "table" then return write end
local n = redis.pcall("PUBSUB", "NUMSUB", ARGV[1])
return n.err and n or n[2]
`)

// The statuses that the scripts reply.
const (
	statusHeld     = 0 // acquire: by another lease; inspect: by one
	statusDone     = 1 // acquired, left, released to nobody, renewed
	statusAgain    = 2 // acquire: the caller had it already
	statusQueued   = 3 // acquire: held by a member, and the caller is in the queue
	statusFound    = 4 // acquire, leave: granted to the caller before
	statusHanded   = 5 // release: to the next waiter of this process
	statusGranted  = 6 // release: to another member; the caller, if it has waiters, is in the queue
	statusOpen     = 7 // release: to whoever is not in the queue
	statusTaken    = 8 // release: the next waiter has the lock already
	statusUnqueued = 9 // acquire: held, and the queue refused the caller's entry
	statusNobody   = -1
	statusConflict = -2
)

type script struct {
	source string
	hash   []byte // in hexadecimal digits
}

func newScript(source string) *script {
	sum := sha1.Sum([]byte(source)) // the name that Redis gives it
	return &script{source: source, hash: hex.AppendEncode(nil, sum[:])}
}

// words begins the words of a command that runs the script with as many keys. The keys are to follow, and then the
// arguments, as many as there is room for.
func (sc *script) words(keys, argv int) []any {
	return append(make([]any, 0, firstKey+keys+argv), "evalsha", nil, keys) // See newCall.
}

// firstKey is where the keys begin in the words of a command.
const firstKey = 3

// A command is a script call that go-redis does not repeat. It would do so when
// a reply is lost, and could not tell the first run from the second.
type command struct{ *redis.Cmd }

func newCommand(ctx context.Context, words []any) command {
	c := command{redis.NewCmd(ctx, words...)}
	// With the position and the distance of the keys given, the client needs no
	// COMMAND call to find them.
	c.SetFirstKeyPos(firstKey)
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

// A mark is the second word of a command: the hash of the script, or its source. Go-redis
// asks for its bytes when it writes the command, and not before. Whatever the error of a
// command whose mark was not asked for: it is one of the client's own, and nothing ran.
// It may be of a Limiter, a hook, a Dialer, the pool or the handshake.
type mark struct {
	text  []byte
	state atomic.Int32 // a markState
}

type markState = int32

const (
	unwritten markState = iota
	written             // or about to be
	withdrawn           // it was not written, and must not be any more
)

func (m *mark) MarshalBinary() ([]byte, error) {
	if !m.state.CompareAndSwap(unwritten, written) && m.state.Load() == withdrawn {
		return nil, errWithdrawn
	}
	return m.text, nil
}

func (m *mark) String() string { return string(m.text) }

// withdraw reports whether the command was not written. It is not written from then on: a
// hook may have left the rest of the client at work.
func (m *mark) withdraw() bool {
	return m.state.CompareAndSwap(unwritten, withdrawn) || m.state.Load() == withdrawn
}

// errWithdrawn keeps a command from being written.
var errWithdrawn = errors.New("the call has failed before")

// A reply is what a script answered, and the time just before it was sent,
// from which every deadline is counted.
type reply struct {
	status int64
	index  int64
	left   time.Duration
	micros int64 // the server's time; 0: not told
	words  []string
	sent   time.Time
}

// owner returns who has the lock, as an answer told whose first word that is.
func (r reply) owner() string {
	if len(r.words) == 0 {
		return ""
	}
	return r.words[0]
}

// locked tells who has the lock of id.
func (r reply) locked(id string) *LockedError {
	return &LockedError{ID: id, Index: r.index, TTL: r.left, Owner: r.owner()}
}

// brings reports of an answer to an acquire whether it brings a lease.
func (r reply) brings() bool {
	return r.status != statusHeld && r.status != statusQueued && r.status != statusUnqueued
}

// released tells of an answer to a release whether it ended the lease.
func (r reply) released() bool {
	switch r.status {
	case statusDone, statusHanded, statusGranted, statusOpen:
		return true
	}
	return false
}

// A server sends the scripts of one namespace. It is safe for concurrent use.
type server struct {
	client   redis.UniversalClient
	batcher  *batch.Batcher
	topology *topology // nil where there is one master
	buckets  []*bucket
	events   *events
	member   string // what this Lock is called in queues, and in the names of its inboxes
	owner    any    // what people call it; a string, as an any here, so that it is not made one with each call
	crew     *crew.Crew
	life     context.Context //nolint:containedctx // The Lock's own life, no request's.

	acquiring, releasing, renewing, inspecting, counting *script // as this server needs them

	pace    pace                      // of the one master, outside a cluster
	timers  sync.Pool                 // of *time.Timer, stopped; of this Lock alone, because a test's bubble must not share them
	refused atomic.Pointer[time.Time] // when the user was last found to have no right to queues; nil since he had it
	rotates bool                      // the client asks a provider for its password
	limited bool                      // the client has a Limiter
}

func newServer(life context.Context, client redis.UniversalClient, cfg config, c *crew.Crew, e *events) *server {
	cluster, ok := client.(*redis.ClusterClient)
	s := &server{
		client: client, crew: c, life: life, buckets: layOut(cfg.namespace, ok), events: e,
		member: rand.Text(), owner: cfg.owner, rotates: rotates(client),
		acquiring: acquireScript, releasing: releaseScript, renewing: renewScript, inspecting: inspectScript,
		counting: countScript,
	}
	s.batcher = s.newBatcher()
	if one, ok := client.(*redis.Client); ok {
		s.limited = one.Options().Limiter != nil
	}
	if ok {
		s.topology = &topology{client: cluster, masters: make(map[string]*master)}
		s.acquiring, s.releasing, s.inspecting = shardedAcquireScript, shardedReleaseScript, shardedInspectScript
		s.counting = shardedCountScript
		s.renewing = shardedRenewScript
	}
	return s
}

func (s *server) newBatcher() *batch.Batcher {
	return batch.New(s.life, s.client, s.crew, patience, s.events.sent)
}

var (
	shardedAcquireScript = acquireScript.sharded()
	shardedReleaseScript = releaseScript.sharded()
	shardedRenewScript   = renewScript.sharded()
	shardedInspectScript = inspectScript.sharded()
	shardedCountScript   = countScript.sharded()
)

// A reading is the server's clock, as a reply told it.
type reading struct {
	sent   time.Time // just before the script was sent: the server read its clock later
	micros int64
}

// inbox is the channel of a bucket that this member alone subscribes to.
func (s *server) inbox(b *bucket) string { return b.inbox(s.member) }

// hears reports whether this member subscribes to its inbox, on the server that runs the
// scripts. It returns true if there is no answer within about a second.
//
// A name may move to another server while the client's pool has connections to the old
// one. Each of these refuses the script's write, and is closed then.
func (s *server) hears(ctx context.Context, b *bucket) bool {
	var r reply
	err := repeat(ctx, ctx, time.Now().Add(pingEvery), verdict.outOfReach, func() (err error) {
		r, err = s.run(ctx, pingEvery, b, s.counting, append(s.counting.words(1, 1), b.lock(""), s.inbox(b)))
		return err
	})
	return err != nil || r.index > 0
}

// A place is how a member waits for a lock: its entry in the queue, and the highest index that
// it has claimed. The zero place is not in the queue.
type place struct {
	entry   string
	claimed int64
	expiry  bool // the attempt is made because the holder's lease should have ended
}

// acquire tries once to take the lock of id, or to enter its queue, and waits for the answer for at most d.
//
// While the slot moves, a lock cannot be taken: a master serves a script with several keys
// only if it has them all, and a free lock has none. A form with the lock alone would have
// no counter, and the clocks of the two masters may differ: the index could fall.
func (s *server) acquire(
	ctx context.Context, d time.Duration, id, token string, ttl time.Duration, p place,
) (reply, error) {
	b, sc := s.bucket(id), s.acquiring
	var lock any = b.lock(id)
	highest := b.highest.Load()
	if p.entry != "" {
		r, err := s.run(ctx, d, b, sc, append(sc.words(3, 10),
			lock, b.counterKey, b.queue(id), ttl.Milliseconds(), token, highest, s.owner,
			p.entry, s.member, p.claimed, flag(p.expiry), b.prefix, lock))
		if r.status == statusUnqueued {
			s.fallBack("the queue refused an entry")
		}
		if !refusesKeys(err) {
			s.noteRight(err)
			return r.lasting(ttl), err
		}
	}
	r, err := s.run(ctx, d, b, sc, append(sc.words(2, 4),
		lock, b.counterKey, ttl.Milliseconds(), token, highest, s.owner))
	s.noteRefusal(p.entry != "", err)
	return r.lasting(ttl), err
}

// lasting returns the reply to an acquire, which leaves out how long a new lease lasts.
func (r reply) lasting(ttl time.Duration) reply {
	if r.status == statusDone {
		r.left = ttl
	}
	return r
}

func flag(b bool) string {
	if b {
		return "1"
	}
	return ""
}

// mayQueue tells whether the user has the right to the queues, as far as is known.
func (s *server) mayQueue() bool {
	refused := s.refused.Load()
	return refused == nil || time.Since(*refused) > deniedPause
}

// refusesKeys tells whether a script was refused for its keys, of which it may not need the queue.
func refusesKeys(err error) bool {
	return redis.IsPermissionError(err) && strings.Contains(err.Error(), " key")
}

// noteRefusal takes the outcome without a queue of what may have been refused with one. If this is no refusal, it was
// the queue, and not the lock itself.
func (s *server) noteRefusal(refused bool, err error) {
	if refused && !redis.IsPermissionError(err) {
		s.fallBack("no right to the key of the queue")
	}
}

// fallBack makes this Lock wait without queues for a while. Its subscription then
// leaves the members channel, so that releases are published to it.
func (s *server) fallBack(reason string) {
	if s.refused.Load() == nil {
		s.events.fellBack(reason)
	}
	now := time.Now()
	s.refused.Store(&now)
}

// noteRight takes the outcome of a script that used the queue.
func (s *server) noteRight(err error) {
	refused := s.refused.Load()
	if err == nil && refused != nil && time.Since(*refused) > deniedPause {
		s.refused.CompareAndSwap(refused, nil)
	}
}

// leave tries once to take an entry out of the queue of id.
func (s *server) leave(ctx context.Context, id string, p place) (reply, error) {
	b := s.bucket(id)
	return s.run(ctx, longestPatience, b, leaveScript, append(leaveScript.words(2, 3),
		b.lock(id), b.queue(id), p.entry, s.member, p.claimed))
}

// An heir is who gets a lock that is released: the next waiter in the process, if there
// is one.
type heir struct {
	token string // of his attempts; "": nobody waits here
	ttl   time.Duration
	turn  bool   // the member's turn goes on
	entry string // of the member, "" if it cannot be queued
	more  bool   // others wait behind him
}

// release tries once to end a lease, and to give its lock to the next.
func (s *server) release(ctx context.Context, l leaseKey, h heir) (reply, error) {
	return s.awaitRelease(ctx, longestPatience, s.sendRelease(ctx, l, true, h))
}

// releaseToken is release for a lease whose index is not known.
func (s *server) releaseToken(ctx context.Context, id, token string) (reply, error) {
	return s.awaitRelease(ctx, longestPatience, s.sendReleaseAs(ctx, id, "", token, true, heir{}))
}

// sendRelease sends the release of a lease, of which awaitRelease has the answer. It is foreign if another process
// may have got the lease.
func (s *server) sendRelease(ctx context.Context, l leaseKey, foreign bool, h heir) *call {
	return s.sendReleaseAs(ctx, l.id, strconv.FormatInt(l.index, 10), l.token, foreign, h)
}

func (s *server) sendReleaseAs(ctx context.Context, id, index, token string, foreign bool, h heir) *call {
	b, sc := s.bucket(id), s.releasing
	var lock any = b.lock(id)
	if !s.mayQueue() {
		return s.sendAloneRelease(ctx, b, lock, index, token)
	}
	words := append(sc.words(3, 12), lock, b.counterKey, b.queue(id), index, token, b.prefix, b.highest.Load())
	switch {
	case h.token != "":
		words = append(words, flag(foreign), h.token, h.ttl.Milliseconds(), flag(h.turn), h.entry, flag(h.more), s.owner)
	case foreign:
		words = append(words, flag(true))
	}
	return s.send(newCall(ctx, b, sc, append(words, lock)))
}

// sendAloneRelease is for users who may not use the queue, and for slots that move.
func (s *server) sendAloneRelease(ctx context.Context, b *bucket, lock, index, token any) *call {
	return s.send(newCall(ctx, b, s.releasing, append(s.releasing.words(1, 4), lock, index, token, b.prefix, lock)))
}

// awaitRelease waits for the answer to a release for at most d, and repeats it without a queue where the user may not use that.
//
// It does so as well while the slot moves, and one master has not all three keys: a script
// with one key runs wherever that is. No lock is handed over then. Members may miss the
// message, but none can take a lock before the slot has moved, and all look after that.
func (s *server) awaitRelease(ctx context.Context, d time.Duration, c *call) (reply, error) {
	r, err := s.await(ctx, d, c)
	if len(c.keys()) == 1 {
		return r, err
	}
	refused := refusesKeys(err)
	if !refused && !redis.IsTryAgainError(err) {
		s.noteRight(err)
		return r, err
	}
	argv := c.words[firstKey+len(c.keys()):]
	r, err = s.await(ctx, d, s.sendAloneRelease(c.Caller(), c.bucket, c.keys()[0], argv[0], argv[1]))
	s.noteRefusal(refused, err)
	return r, err
}

// renew tries once to give a lease a new ttl, and waits for the answer for at most d. It
// wakes waiters if the lease gets shorter.
func (s *server) renew(ctx context.Context, d time.Duration, l leaseKey, ttl time.Duration) (reply, error) {
	b := s.bucket(l.id)
	return s.run(ctx, d, b, s.renewing, append(s.renewal(b, l, ttl), b.prefix, b.lock(l.id)))
}

// renewNew is renew for a lease that is so new that no waiter knows its end.
func (s *server) renewNew(ctx context.Context, d time.Duration, l leaseKey, ttl time.Duration) (reply, error) {
	b := s.bucket(l.id)
	return s.run(ctx, d, b, s.renewing, s.renewal(b, l, ttl))
}

// renewal returns the words of a renewal that wakes nobody.
func (s *server) renewal(b *bucket, l leaseKey, ttl time.Duration) []any {
	return append(s.renewing.words(1, 5),
		b.lock(l.id), strconv.FormatInt(l.index, 10), l.token, ttl.Milliseconds())
}

// inspect asks once who has the lock of id, and who waits for it. While the slot moves it may
// learn of the holder alone, as in awaitRelease.
func (s *server) inspect(ctx context.Context, id string) (reply, error) {
	b, sc := s.bucket(id), s.inspecting
	r, err := s.run(ctx, longestPatience, b, sc, append(sc.words(2, 1), b.lock(id), b.queue(id), b.prefix))
	if refusesKeys(err) || redis.IsTryAgainError(err) {
		return s.look(ctx, id)
	}
	return r, r.checkWords(2, err)
}

// look asks once who has the lock of id.
func (s *server) look(ctx context.Context, id string) (reply, error) {
	b, sc := s.bucket(id), s.inspecting
	r, err := s.run(ctx, longestPatience, b, sc, append(sc.words(1, 1), b.lock(id), b.prefix))
	return r, r.checkWords(2, err)
}

// checkWords returns err, or that there are fewer words than a script replies.
func (r reply) checkWords(n int, err error) error {
	if err == nil && len(r.words) < n {
		err = fmt.Errorf("script replied %d words, not %d", len(r.words), n)
	}
	return err
}

// A confirmation is the answer to confirm.
type confirmation struct {
	sent  time.Time // just before the lease was renewed
	acked int64     // so many replicas have it
	err   error     // matches ErrNotHeld if the lease was lost
}

// confirm renews a lease, and waits until the replicas have that. WAIT is about what the same connection has written, so the two
// travel together, and not in a batch with others. Whoever has the renewal has what made the lease, which the same master
// wrote before.
//
// It takes as long as the client does. It goes to the master itself, because a cluster's client would send WAIT
// anywhere. A slot that has moved is asked for again, by the next attempt.
func (s *server) confirm(ctx context.Context, l leaseKey, ttl time.Duration, want replication) confirmation {
	b := s.bucket(l.id)
	master, _, err := s.master(ctx, b)
	if err != nil {
		s.heard(err)
		return confirmation{err: &unsentError{err, false}}
	}
	c := newCall(ctx, b, s.renewing, s.renewal(b, l, ttl)).inFull() // A server without the script would still go through with WAIT.
	wait := redis.NewIntCmd(ctx, "wait", want.replicas, want.timeout.Milliseconds())
	p := master.Pipeline()
	_ = p.Process(ctx, c.Cmd)
	_ = p.Process(ctx, wait)
	s.events.sent(1)
	sent := time.Now()
	_, err = p.Exec(ctx)
	if err != nil && c.Cmd.Err() == nil && wait.Err() == nil {
		c.Cmd.SetErr(err) // of a hook that has refused both
	}
	r, err := s.read(c)
	switch {
	case err != nil:
	case r.status != statusDone:
		err = notHeld(r)
	case wait.Err() != nil:
		err = wait.Err()
		s.heard(err)
	}
	return confirmation{sent, wait.Val(), err}
}

// run sends a script and waits for the answer for at most d.
func (s *server) run(ctx context.Context, d time.Duration, b *bucket, sc *script, words []any) (reply, error) {
	return s.await(ctx, d, s.send(newCall(ctx, b, sc, words)))
}

// A call is a script that was sent, or is about to be.
type call struct {
	batch.Call

	bucket *bucket
	script *script
	words  []any  // of the command; a hook of the client may have changed its keys
	given  [3]any // the keys as they were made
	pace   *pace  // of what sends it; set by send, nil without it
	mark   mark   // the second of the words
}

func newCall(ctx context.Context, b *bucket, sc *script, words []any) *call {
	c := &call{bucket: b, script: sc, words: words, mark: mark{text: sc.hash}}
	words[1] = &c.mark
	copy(c.given[:], words[firstKey:])
	c.Init(ctx, newCommand(ctx, words))
	return c
}

// keys returns the keys that the script was given.
func (c *call) keys() []any {
	n, _ := c.words[firstKey-1].(int)
	return c.given[:n]
}

// unknownScript tells of a call that is done whether the server did not know the script: it was restarted, or a replica
// was promoted, or SCRIPT FLUSH.
func (c *call) unknownScript() bool {
	err := c.Cmd.Err()
	return err != nil && redis.HasErrorPrefix(err, "NOSCRIPT")
}

// inFull makes a call that brings the script along.
func (c *call) inFull() *call {
	words := slices.Clone(c.words)
	words[0] = "eval"
	copy(words[firstKey:], c.keys()) // A hook that prefixes keys does so again.
	full := newCall(c.Caller(), c.bucket, c.script, words)
	full.mark.text = []byte(c.script.source)
	return full
}

// send sends a call, and returns it.
func (s *server) send(c *call) *call {
	to, pace := s.batcherFor(c.bucket)
	c.pace = pace
	to.Send(&c.Call)
	return c
}

// await waits for the answer to a call, until ctx ends, for as long as the pace of its server says, and for at most d:
// go-redis alone can leave a cancelled caller waiting for its read timeout.
//
// What could not be sent by then, for want of a connection, is not sent any more: it is
// going to be repeated, and would only keep others from the connection.
func (s *server) await(ctx context.Context, d time.Duration, c *call) (reply, error) {
	end, limit := time.Now().Add(d), c.pace.limit()
	left := min(d, limit)
	early := max(left/4, shortestPing) // A sweep that starts so long before the end is over by then.
	if early > left/2 {
		early = 0
	}
	timer := s.timer(left - early)
	defer s.timers.Put(timer)
	defer timer.Stop()
	for {
		var why error
		select {
		case <-c.Ready():
			if !c.unknownScript() {
				return s.read(c)
			}
			c = s.send(c.inFull()) // The server has just answered, so the wait begins anew.
			timer.Reset(min(time.Until(end), limit))
			early = 0
			continue
		case <-ctx.Done():
			why = contextError(ctx)
		case <-timer.C:
			if early > 0 {
				timer.Reset(early)
				early = 0
				s.sweepConns(c)
				continue
			}
			why = errNoAnswer
			c.pace.slowDown(limit)
		}
		if c.GiveUp() {
			c = nil
		}
		err := &givenUpError{why, c}
		if ctx.Err() == nil {
			s.heard(err)
		}
		return reply{}, err
	}
}

// timer returns a timer that was used before, if there is one.
func (s *server) timer(d time.Duration) *time.Timer {
	if timer, ok := s.timers.Get().(*time.Timer); ok {
		timer.Reset(d)
		return timer
	}
	return time.NewTimer(d)
}

// late calls f with the answer to a call that was given up, when it comes.
func (s *server) late(c *call, f func(r reply, err error)) {
	s.crew.Start(func() {
		<-c.Ready()
		f(s.read(c))
	})
}

// read returns the answer to a call that is done.
func (s *server) read(c *call) (reply, error) {
	cmd := c.Cmd.(command) //nolint:forcetypeassert // See newCall.
	err := s.inCluster(cmd.Err())
	s.heard(err)
	if err != nil && c.mark.withdraw() {
		return reply{}, &unsentError{err, s.limited && !onTheWay(err)}
	}
	if c.pace != nil && judge(err) != unknown && !judge(err).outOfReach() {
		c.pace.answered(time.Since(c.Sent()))
	}
	if err != nil {
		return reply{}, keyErrorOf(err, c.keys())
	}
	if index, ok := cmd.Val().(int64); ok {
		c.bucket.observe(index)
		return reply{status: statusDone, index: index, sent: c.Sent()}, nil
	}
	values, err := cmd.Slice()
	if err != nil {
		return reply{}, err
	}
	r, err := parseReply(values)
	if err != nil {
		return reply{}, err
	}
	r.sent = c.Sent()
	if r.status != statusGranted { // It may be this member's own, and must not look as if it had been claimed.
		c.bucket.observe(r.index)
	}
	if r.micros > 0 {
		c.bucket.clock.Store(&reading{r.sent, r.micros})
	}
	return r, nil
}

// parseReply reads the values that a script replied.
func parseReply(values []any) (r reply, err error) {
	var numbers [4]int64
	if len(values) < len(numbers) {
		return reply{}, fmt.Errorf("script replied %d values, not %d", len(values), len(numbers))
	}
	for i, v := range values {
		var ok bool
		if i < len(numbers) {
			numbers[i], ok = v.(int64)
		} else {
			var word string
			word, ok = v.(string)
			r.words = append(r.words, word)
		}
		if !ok {
			return reply{}, fmt.Errorf("script replied a %T as value %d", v, i+1)
		}
	}
	r.status, r.index, r.micros = numbers[0], numbers[1], numbers[3]
	// Whoever set the expiry of a foreign lock may have set more than a Duration holds.
	r.left = time.Duration(min(numbers[2], math.MaxInt64/int64(time.Millisecond))) * time.Millisecond
	return r, nil
}

// A grant is the message by which a member learns that it was given a lock.
type grant struct {
	id     string
	index  int64
	ttl    time.Duration
	micros int64 // the server's clock
}

// parseGrant reads "<index> <ttl in ms> <server's µs> <lock key>". It returns false for anything else.
func (b *bucket) parseGrant(message string) (g grant, ok bool) {
	words := strings.SplitN(message, " ", 4)
	if len(words) != 4 {
		return grant{}, false
	}
	var numbers [3]int64
	for i := range numbers {
		n, err := strconv.ParseInt(words[i], 10, 64)
		if err != nil || n <= 0 {
			return grant{}, false
		}
		numbers[i] = n
	}
	id, ok := b.id(words[3])
	if !ok || numbers[0] >= 1<<53 || numbers[1] > math.MaxInt64/int64(time.Millisecond) {
		return grant{}, false
	}
	return grant{id, numbers[0], time.Duration(numbers[1]) * time.Millisecond, numbers[2]}, true
}

// lease makes the lease that a grant tells of. Its deadline follows from the server's clock, then
// and at the last reply: a message may have been on its way for long. It is exact unless that
// clock contradicts ours, by which the lease cannot last longer than its ttl from now.
func (s *server) lease(b *bucket, g grant) (lease *Lease, exact bool) {
	now := time.Now()
	sent := now
	if r := b.clock.Load(); r != nil {
		since := min(max(g.micros-r.micros-1, -farMicros), farMicros) // Both were rounded down.
		counted := time.Duration(since) * time.Microsecond            // by the server's clock
		sent = r.sent.Add(counted - drift(counted))
		exact = !sent.After(now)
	}
	if !exact {
		sent = now
	}
	b.observe(g.index)
	return newLease(g.id, s.grantToken(g.index), g.ttl, reply{index: g.index, left: g.ttl, sent: sent}), exact
}

// farMicros is more than any two readings of a clock differ by, and no more than a Duration holds.
const farMicros = 1 << 52

// grantToken is the token of a lease that this member was granted.
func (s *server) grantToken(index int64) string {
	return s.member + ":" + strconv.FormatInt(index, 10)
}

// observe remembers the highest index of a bucket. One that the clock will not reach before
// the next century is not ours, and must not drive ours beyond 2^53.
func (b *bucket) observe(index int64) {
	if index >= farIndex {
		return
	}
	for {
		highest := b.highest.Load()
		if index <= highest || b.highest.CompareAndSwap(highest, index) {
			return
		}
	}
}

// farIndex is µs since 1970 that the clock reaches in the next century.
const farIndex = 1 << 52

const (
	// patience is how long one attempt may take, at first, before it is sent again
	// over another connection: this one may have died silently.
	patience = time.Second

	// longestPatience is how long one attempt may take at most. Each that gets no
	// answer doubles the time, so that a fleet does not keep down a server that
	// stalls. More than 2 s gain little, because most calls try for 5 s, and would
	// make a promoted replica wait: attempts at a master that hangs end so late.
	longestPatience = 2 * time.Second
)

// A pace is how long the attempts at one server are waited for. It is safe for
// concurrent use, and the zero pace is ready.
type pace struct {
	sweeper

	longer atomic.Int64 // the limit in ns, where it is more than patience
}

// limit returns how long the next attempt is waited for.
func (p *pace) limit() time.Duration { return max(patience, time.Duration(p.longer.Load())) }

// slowDown notes that an attempt got no answer within the limit. Attempts that were
// made at the same time count once.
func (p *pace) slowDown(limit time.Duration) {
	before := p.longer.Load()
	if time.Duration(before) <= limit {
		p.longer.CompareAndSwap(before, int64(min(2*limit, longestPatience)))
	}
}

// answered notes how long an answer took, whether it was waited for or not. A
// server that needs longer than a second gets twice what it needed.
func (p *pace) answered(took time.Duration) {
	longer := int64(min(2*took, longestPatience))
	if longer <= int64(patience) {
		longer = 0
	}
	if p.longer.Load() != longer {
		p.longer.Store(longer)
	}
}

// A givenUpError is that of a caller who did not wait for the answer any longer. Its cause may be
// an error of Redis or of another lock, if the caller's ctx says so: it says nothing about this one.
type givenUpError struct {
	why  error
	call *call // may still come back; nil if nothing was sent
}

func (e *givenUpError) Error() string { return e.why.Error() }
func (e *givenUpError) Unwrap() error { return e.why }

// An unsentError is an error of the client's own, about a script that it has not begun to write.
type unsentError struct {
	why     error
	limited bool // it may be that of a Limiter
}

func (e *unsentError) Error() string { return e.why.Error() }
func (e *unsentError) Unwrap() error { return e.why }

// errNoAnswer says that an attempt was given up while its caller was still there.
var errNoAnswer = errors.New("no answer from Redis")

// unheard returns the call that was sent and nobody waited for, if err says so.
func unheard(err error) *call {
	if e, ok := errors.AsType[*givenUpError](err); ok {
		return e.call
	}
	return nil
}

// A verdict says what an error tells about a script.
type verdict int

const (
	answered        verdict = iota // no error: the script replied
	lost                           // it replied that the lease holds no longer
	final                          // nothing ran, and another attempt cannot help
	rejected                       // nothing ran; the server takes no writes for now
	unauthenticated                // nothing ran; the server refused the password, or wants one
	unreachable                    // nothing ran; there was no server to run it
	unknown                        // it may or may not have run
)

// transient tells whether somebody who has time should try again.
func (v verdict) transient() bool { return v >= rejected }

// outOfReach tells whether somebody in a hurry should try again.
func (v verdict) outOfReach() bool { return v >= unauthenticated }

// lasts reports whether a password that was refused so long is to be taken for wrong. One
// that a provider of the client's options yields changes, and may be right at any time.
func (s *server) lasts(refused time.Duration) bool { return !s.rotates && refused >= acquireTime }

// rotates reports whether the client asks a provider for its password.
func rotates(client redis.UniversalClient) bool {
	switch c := client.(type) {
	case *redis.Client:
		o := c.Options()
		return o.CredentialsProvider != nil || o.CredentialsProviderContext != nil || o.StreamingCredentialsProvider != nil
	case *redis.ClusterClient:
		o := c.Options()
		return o.CredentialsProvider != nil || o.CredentialsProviderContext != nil || o.StreamingCredentialsProvider != nil
	}
	return false
}

func judge(err error) verdict {
	if err == nil {
		return answered
	}
	if e, ok := errors.AsType[*givenUpError](err); ok {
		if e.call == nil {
			return unreachable
		}
		return unknown
	}
	if e, ok := errors.AsType[*unsentError](err); ok {
		switch v := judge(e.why); {
		case v != unknown:
			return v
		case e.limited:
			// A circuit breaker is there to make calls fail fast, and a caller in a hurry should not fight it.
			return rejected
		}
		return unreachable
	}
	if errors.Is(err, ErrNotHeld) {
		return lost
	}
	if _, ok := errors.AsType[*movingError](err); ok {
		return unreachable
	}
	if _, ok := errors.AsType[*keyError](err); ok {
		return final
	}
	if serverErr, ok := errors.AsType[redis.Error](err); ok {
		return judgeServer(serverErr)
	}
	if errors.Is(err, redis.ErrClosed) {
		return final
	}
	// In a cluster a script may have been written before, to a server that sent it elsewhere.
	if opErr, ok := errors.AsType[*net.OpError](err); ok && opErr.Op == "dial" {
		return unreachable
	}
	return unknown
}

// onTheWay reports whether an error is of the way to the server, and none of a Limiter's.
func onTheWay(err error) bool {
	_, network := errors.AsType[net.Error](err) // a timeout and the end of a context included
	_, answer := errors.AsType[redis.Error](err)
	_, badCertificate := errors.AsType[*tls.CertificateVerificationError](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	return network || answer || badCertificate || noTLS || errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) ||
		errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted) || errors.Is(err, batch.ErrEnded)
}

// judgeServer judges an error that came over the wire. Only the errors that Redis and
// Valkey send before a script runs, or when its first write is refused, prove that the
// script wrote nothing. A proxy that forwards a script and loses the reply answers with
// an error of its own, so every other error leaves the outcome unknown.
func judgeServer(err redis.Error) verdict {
	code, _, _ := strings.Cut(err.Error(), " ")
	switch {
	case refusesPassword(err):
		return unauthenticated
	case redis.IsPermissionError(err), deniedInScript(err):
		return final
	case redis.IsMaxClientsError(err), redis.IsReadOnlyError(err), errors.Is(err, redis.Nil):
		return unreachable // Nil is a sentinel's, that knows of no master
	}
	switch code {
	case "WRONGTYPE", "CROSSSLOT", "MOVED":
		return final
	case "LOADING", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "BUSY":
		return unreachable
	case "OOM", "MISCONF", "NOREPLICAS", "NOSCRIPT":
		return rejected
	case "ERR":
		if fromServer(err.Error()) {
			return rejected
		}
	}
	return unknown
}

// fromServer reports whether the text of an ERR is one of Redis or Valkey: a connection
// that it refused, a command that it does not know or accept, or what a script was
// refused. Redis before version 7 reports OOM, MISCONF and NOREPLICAS in a script as ERR.
func fromServer(text string) bool {
	for _, part := range []string{
		"AUTH ", "DB index is out of range", "SELECT is not allowed", "cluster support disabled",
		"unknown command", "unknown subcommand", "wrong number of arguments", "user_script", "REDFOUR ", "compiling script",
	} {
		if strings.Contains(text, part) {
			return true
		}
	}
	return false
}

// deniedInScript recognises what an ACL says inside a script: Redis 7.0 does not
// call it NOPERM there.
func deniedInScript(err error) bool {
	text := err.Error()
	return strings.Contains(text, "The user executing the script can't") ||
		strings.Contains(text, "ACL failure in script")
}

// refusesPassword reports whether a server refuses a password, or wants one. To a long
// command without one Redis says "unauthenticated multibulk length" instead of NOAUTH.
// Redis before version 6 says "invalid password".
func refusesPassword(err redis.Error) bool {
	text := err.Error()
	return redis.IsAuthError(err) || strings.Contains(text, "invalid username-password pair") ||
		strings.HasPrefix(text, "ERR invalid password") || strings.HasPrefix(text, "ERR AUTH failed")
}

// A keyError says that a key under a name of ours is not ours.
type keyError struct{ key, kind string }

func (e *keyError) Error() string {
	return fmt.Sprintf("key %s is a %s, which redfour did not make", quote(e.key), e.kind)
}

// keyErrorOf turns the scripts' own errors into keyErrors.
func keyErrorOf(err error, keys []any) error {
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
	key, _ := keys[n-1].(string)
	return &keyError{key: key, kind: kind}
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
