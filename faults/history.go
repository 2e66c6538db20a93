package faults

import (
	"fmt"
	"math"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// An instant is a moment on the machine's monotonic clock, in nanoseconds. All
// processes of a machine share it, whatever happens to the wall clock, and so
// does process.hrtime of Node.js.
type instant int64

// never is later than every instant.
const never instant = math.MaxInt64

// now returns the present instant.
func now() instant {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // There is no system without this clock.
	}
	return instant(t.Nano())
}

func (i instant) add(d time.Duration) instant {
	if i == never {
		return never
	}
	return i + instant(d)
}

func (i instant) sub(j instant) time.Duration { return time.Duration(i - j) }

// An event is what a worker process reports: that it begins an operation, how
// one ended, or what it sees of a lease between two.
type event struct {
	At     instant `json:"at"`
	Worker int     `json:"worker"` // a goroutine of the process; it makes one operation at a time
	What   what    `json:"what"`
	ID     string  `json:"id,omitempty"`
	TTL    int64   `json:"ttl,omitempty"`   // of a call, in ms
	Limit  int64   `json:"limit,omitempty"` // of a wait, in ms
	Index  int64   `json:"index,omitempty"`
	Until  instant `json:"until,omitempty"` // the lease's deadline, as the library tells it
	Result result  `json:"result,omitempty"`
	Holder int64   `json:"holder,omitempty"` // the index that a *LockedError named
	Kept   bool    `json:"kept,omitempty"`   // the lease is being kept alive
	Lost   bool    `json:"lost,omitempty"`   // it was kept alive, and is said to be lost
	Text   string  `json:"text,omitempty"`   // an error; a lease's JSON
}

// what says what an event tells.
type what string

// The operations, which begin with an event and end with a returned.
const (
	try     what = "try"  // Acquire
	wait    what = "wait" // WaitAcquire
	renew   what = "renew"
	release what = "release"
	inspect what = "inspect"
	force   what = "force" // ForceRelease
)

// The other events.
const (
	returned what = "returned" // the operation that this worker had begun
	hold     what = "hold"     // the lease holds, up to a deadline
	write    what = "write"    // to the resource that the lock protects
	hand     what = "hand"     // a lease leaves the process, as JSON
	ready    what = "ready"    // the process begins to work
	ended    what = "ended"    // the process has cleaned up
	leftover what = "leftover" // it should have, but this was left
)

// result is how an operation ended.
type result string

const (
	granted  result = "granted"  // try, wait
	locked   result = "locked"   // try, wait: another lease holds; inspect: one does
	done     result = "done"     // renew, release, force
	expired  result = "expired"  // renew, release, inspect, force: nobody holds
	conflict result = "conflict" // renew, release, force: another lease holds
	unknown  result = "unknown"  // it may have happened, may happen yet, or not
	nothing  result = "nothing"  // it did certainly not happen
)

// An operation is one call of the library, by one worker.
type operation struct {
	what          what
	process       string
	npm           bool
	worker        int
	id            string
	ttl           time.Duration
	limit         time.Duration // for which the caller waits; 0: not told
	index         int64         // of the lease that was granted, renewed, released or forced; 0 where any was to be forced
	holder        int64
	call, returns instant // returns is never, if the process ended before
	result        result
	until         instant // the lease's deadline, as told when the call returned
	began         instant // it has not taken effect before; the judge's
	doubtful      bool    // a release or a force that may have found nothing; the judge's
}

// sent is when the request was sent, at the earliest, that proved a grant.
func (op *operation) sent() instant { return max(op.call, op.until.add(-op.ttl)) }

// String tells what happened in one line, with times in microseconds.
func (op *operation) String() string {
	text := fmt.Sprintf("%s/%d %s %s: %s", op.process, op.worker, op.what, op.id, op.result)
	if op.index != 0 {
		text += fmt.Sprintf(" %d", op.index)
	}
	if op.holder != 0 {
		text += fmt.Sprintf(" by %d", op.holder)
	}
	return fmt.Sprintf("%s [%d %d] until %d", text, op.call/1000, op.returns/1000, op.until/1000)
}

// A loss is a time in which Redis may have lost leases: a flush, a restart without
// data, a failover.
type loss struct {
	from, to instant
	revives  bool     // it may have lost releases as well
	ids      []string // of the locks that it befell; nil: all
}

// An outage is a time in which no grant can be expected.
type outage struct {
	from, to instant
	ids      []string // of the locks that it befell; nil: all
}

// A history is all that happened in one run.
type history struct {
	operations []*operation
	holds      []heard
	losses     []loss
	outages    []outage
	away       map[string][]span // when each process did not run: it was stopped, or killed
	freezes    []outage          // in which requests may have been delayed rather than lost
	steady     bool              // nothing keeps anybody from renewing a lease
	proxied    bool              // a request may arrive after its sender has given up the connection
	mixed      bool              // there were several faults, so that an operation may have met more than one
	end        instant
}

// of returns the history with those troubles alone that befell id.
func (h *history) of(id string) *history {
	mine := *h
	spared := func(ids []string) bool { return ids != nil && !slices.Contains(ids, id) }
	mine.losses = slices.DeleteFunc(slices.Clone(h.losses), func(l loss) bool { return spared(l.ids) })
	mine.outages = slices.DeleteFunc(slices.Clone(h.outages), func(o outage) bool { return spared(o.ids) })
	mine.freezes = slices.DeleteFunc(slices.Clone(h.freezes), func(o outage) bool { return spared(o.ids) })
	return &mine
}

// A heard is what the holder of a lease knew of it at some time.
type heard struct {
	event

	process string
}

// A recorder makes operations of events. It is for one goroutine.
type recorder struct {
	history

	pending map[workerKey]*operation
}

type workerKey struct {
	process string
	worker  int
}

func newRecorder() *recorder {
	return &recorder{
		history: history{away: make(map[string][]span)},
		pending: make(map[workerKey]*operation),
	}
}

// record takes an event, and returns the id that it is about.
func (r *recorder) record(process string, npm bool, e event) (id string) {
	key := workerKey{process, e.Worker}
	switch e.What {
	case try, wait, renew, release, inspect, force:
		op := &operation{
			what: e.What, process: process, npm: npm, worker: e.Worker, id: e.ID, index: e.Index,
			ttl: time.Duration(e.TTL) * time.Millisecond, limit: time.Duration(e.Limit) * time.Millisecond, call: e.At, returns: never, result: unknown,
		}
		r.pending[key] = op
		r.operations = append(r.operations, op)
	case returned:
		op := r.pending[key]
		delete(r.pending, key)
		op.returns, op.result, op.until, op.holder = e.At, e.Result, e.Until, e.Holder
		if e.Index != 0 {
			op.index = e.Index
		}
		return op.id
	case hold:
		r.holds = append(r.holds, heard{e, process})
	}
	return e.ID
}

// A lease is what a history tells of one lease.
type lease struct {
	id    string
	index int64
	grant *operation

	certain instant // the holder was sure of it up to here, unless Redis lost it
	mayEnd  instant // before this it has not ended on its own
	gone    instant // from here on nobody has it

	toldAt   instant      // when the holder was last told a deadline
	evidence instant      // when it may last have been renewed
	kept     bool         // renewed in the background
	released instant      // when its first release was called
	forced   instant      // when the first force was called that may have been for it
	struck   instant      // when the first returned that has certainly left it ended
	open     instant      // when the first release or force was called that had no certain outcome
	ended    *operation   // its first release
	proofs   []*operation // that found the lease
	renewals []*operation
	ends     []*operation // the releases and forces that may have ended it
}

type leaseKey struct {
	id    string
	index int64
}

// leases returns the leases of a history, and those that were granted twice to ours.
func (h *history) leases() (all map[leaseKey]*lease, twice []leaseKey) {
	all = make(map[leaseKey]*lease)
	for _, op := range h.operations {
		if op.result == granted {
			if before := all[leaseKey{op.id, op.index}]; before != nil && !before.grant.npm && !op.npm {
				twice = append(twice, leaseKey{op.id, op.index})
			}
			l := &lease{id: op.id, index: op.index, grant: op, gone: never, released: never, forced: never, struck: never, open: never}
			l.hear(op.returns, op.until)
			all[leaseKey{op.id, op.index}] = l
		}
	}
	for _, e := range h.holds {
		if l := all[leaseKey{e.ID, e.Index}]; l != nil {
			l.hear(e.At, e.Until)
			l.kept = l.kept || e.Kept
		}
	}
	h.findEnds(all)
	for _, op := range h.operations {
		l := all[leaseKey{op.id, op.index}]
		op.doubtful = l != nil && h.doubts(l, op)
		if l != nil && op.result == done && !op.doubtful {
			l.proofs = append(l.proofs, op)
		}
		switch {
		case l == nil:
		case op.what == renew:
			l.renewal(op)
		case op.what == release:
			l.release(op)
		}
	}
	for _, l := range all {
		l.settle(h)
	}
	return all, twice
}

// doubts tells of a release that succeeded whether the lease may have been lost before. The library takes it for its
// own doing that a lease is gone, if the reply to the first request was lost and the lease should have held then. It
// cannot know that the server had lost the lease. This takes two faults: one loses the lease, the other the reply. Nor can it
// know that somebody else ended the lease, where a request was lost. Force finds the lease first, and so does not take the end of
// one for its own doing that was over before.
func (h *history) doubts(l *lease, op *operation) bool {
	if op.what != release && op.what != force || op.result != done || op.npm {
		return false
	}
	rival := func(other *operation) bool {
		over := op.what == force && other.result == done && other.returns < op.call
		return other != op && other.call < op.returns && !over
	}
	return h.mixed && h.lostBetween(l.grant.sent(), op.call) || !h.steady && slices.ContainsFunc(l.ends, rival)
}

// findEnds notes with each lease what may have ended it.
func (h *history) findEnds(all map[leaseKey]*lease) {
	for _, op := range h.operations {
		switch l := all[leaseKey{op.id, op.index}]; {
		case op.what == force && op.index == 0:
			for _, l := range all {
				if l.id == op.id && l.grant.until.add(-l.grant.ttl) <= op.returns {
					l.force(op, h.steady)
				}
			}
		case l == nil:
		case op.what == force:
			l.force(op, h.steady)
		case op.what == release:
			l.ends = append(l.ends, op)
		}
	}
}

// force notes that somebody ended the lease by force, or tried to. From the call on its holder may hear of a loss, and release
// it himself. A force that came too late has ended nothing, if no request was lost. One for any lease that succeeds leaves
// every lease ended that had been granted before.
func (l *lease) force(op *operation, steady bool) {
	l.forced = min(l.forced, op.call)
	late := op.result == expired || op.result == conflict
	if late && steady {
		return
	}
	l.ends = append(l.ends, op)
	switch {
	case op.result != done:
		l.open = min(l.open, op.call)
	case op.index != 0 || l.grant.returns <= op.call:
		l.struck = min(l.struck, op.returns)
	}
}

// hear notes a deadline that the holder was told.
func (l *lease) hear(at, until instant) {
	l.evidence = max(l.evidence, at)
	if until != 0 && at >= l.toldAt {
		// What was certain up to now remains so, whatever a later deadline says.
		l.toldAt, l.certain = at, max(until, min(l.certain, at))
	}
}

func (l *lease) renewal(op *operation) {
	l.renewals = append(l.renewals, op)
	if op.returns == never {
		return
	}
	l.hear(op.returns, op.until)
	if op.result == expired || op.result == conflict {
		l.gone = min(l.gone, op.returns)
	}
}

func (l *lease) release(op *operation) {
	if l.ended == nil || op.call < l.ended.call {
		l.ended = op
	}
	l.released = min(l.released, op.call)
	l.evidence = max(l.evidence, op.call)
	if op.result == unknown {
		l.open = min(l.open, l.released)
	} else {
		l.gone = min(l.gone, op.returns)
	}
}

// wasThere tells whether an operation found the lease between two moments.
func (l *lease) wasThere(from, to instant) bool {
	return slices.ContainsFunc(l.proofs, func(op *operation) bool { return op.call > from && op.returns < to })
}

// left returns when a process was next stopped or killed, or never.
func (h *history) left(process string, after instant) instant {
	for _, o := range h.away[process] {
		if o.from >= after {
			return o.from
		}
	}
	return never
}

// diedAt returns when a process was killed, or never.
func (h *history) diedAt(process string) instant {
	for _, o := range h.away[process] {
		if o.to == never {
			return o.from
		}
	}
	return never
}

// stood tells whether a process did not run at some time between two moments.
func (h *history) stood(process string, a, b instant) bool {
	return slices.ContainsFunc(h.away[process], func(o span) bool { return o.from <= b && o.to >= a })
}

// settle concludes from all that was told.
func (l *lease) settle(h *history) {
	l.mayEnd = min(l.certain, l.open)
	l.certain = min(l.certain, l.released, l.forced)
	for _, op := range l.renewals {
		if op.returns == never { // It may have been made for as long as its process lived.
			l.evidence = max(l.evidence, min(h.diedAt(op.process), h.end))
		}
	}
	left := h.left(l.grant.process, l.grant.returns)
	switch {
	case !l.kept:
	case left < l.released: // Nobody keeps it alive meanwhile, and that is for longer than it lasts.
		l.evidence = left
	case l.released == never:
		l.evidence = h.end
	}
	l.gone = min(l.gone, l.struck, l.evidence.add(l.grant.ttl))
}
