package faults

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// A verdict is what the judge found in one history.
type verdict struct {
	operations int
	unknowns   int // operations that may or may not have happened
	overlaps   int // of leases, across a loss of data
	violations []string
	stall      time.Duration // the longest time for which nobody had a lock that somebody waited for
}

func (v *verdict) violate(format string, args ...any) {
	v.violations = append(v.violations, fmt.Sprintf(format, args...))
}

// patience is how long a free lock may stay free while somebody waits. A silent
// subscription is noticed after 2.5 s; the rest is for slow machines.
const patience = 4 * time.Second

// judge holds a history against what the library promises.
func judge(h *history) *verdict {
	v := &verdict{operations: len(h.operations)}
	for _, op := range h.operations {
		if op.result == unknown {
			v.unknowns++
		}
	}
	slices.SortStableFunc(h.losses, func(a, b loss) int { return cmp.Compare(a.from, b.from) })
	h.findBegins()
	leases, twice := h.leases()
	for _, key := range twice {
		v.violate("index: %q was granted twice with %d", key.id, key.index)
	}
	inOrder := byGrant(leases)
	for _, id := range h.ids() {
		h, ls := h.of(id), inOrder[id]
		v.checkIndexes(h, ls)
		v.checkOverlaps(h, ls)
		v.checkOrder(h, id, leases)
		v.checkWaiters(h, id, ls)
		v.checkTurns(h, id, ls)
	}
	v.checkLosses(h, leases)
	v.checkForced(h, leases)
	v.checkTimes(h)
	v.checkEnds(leases)
	v.checkKept(h, leases)
	slices.Sort(v.violations)
	return v
}

// ids returns the ids of all operations.
func (h *history) ids() []string {
	var ids []string
	for _, op := range h.operations {
		if !slices.Contains(ids, op.id) {
			ids = append(ids, op.id)
		}
	}
	return ids
}

// checkLosses demands that the holder of a lease that is kept alive hears of its loss, and of
// no loss that was none.
func (v *verdict) checkLosses(h *history, leases map[leaseKey]*lease) {
	for _, e := range h.holds {
		late := e.At.sub(e.Until)
		if !e.Kept && late > hearTime && !h.stood(e.process, e.Until, e.At) {
			v.violate("loss: %q was worked on for %v after the deadline of %d", e.ID, late, e.Index)
		}
		l := leases[leaseKey{e.ID, e.Index}]
		if l == nil || !e.Lost {
			continue
		}
		held := l.ended != nil && l.ended.result == done && !l.ended.doubtful && e.At < min(l.grant.until, l.forced)
		if held || late < 0 {
			v.violate("loss: that of %q as %d was no loss", e.ID, e.Index)
		}
	}
}

// checkForced demands that the holder of a lease which is kept alive hears with the next renewal, a third of the ttl later, that
// it was ended by force, where nothing is in the way.
func (v *verdict) checkForced(h *history, leases map[leaseKey]*lease) {
	for _, e := range h.holds {
		l := leases[leaseKey{e.ID, e.Index}]
		if l == nil || e.Kept || !h.steady {
			continue
		}
		if late := e.At.sub(max(l.struck, l.grant.returns)) - l.grant.ttl/3; late > hearTime {
			v.violate("forced: %q was worked on for %v after %d, ended by force, was to be renewed", e.ID, late, e.Index)
		}
	}
}

// callTime is how long a call that does not wait may take: five seconds in which it tries again, and its
// last attempt.
const callTime = 6*time.Second + hearTime

// checkTimes demands that nobody waits for longer than he wants to, that nobody is sent away before, and
// that the other calls have an end. Where nothing is in the way they know what they have done.
func (v *verdict) checkTimes(h *history) {
	for _, op := range h.operations {
		took, over, most := min(op.returns, h.end).sub(op.call), op.returns < h.end, callTime
		if op.what == force {
			most *= 2 // It makes two calls.
		}
		switch {
		case op.npm, h.stood(op.process, op.call, op.returns):
		case op.limit > 0 && took-op.limit > hearTime:
			v.violate("limit: %q was waited for %v longer than the caller wanted", op.id, took-op.limit)
		case op.limit > 0 && over && op.result != granted && op.limit-took > hearTime:
			v.violate("limit: %q was given up %v before the caller wanted", op.id, op.limit-took)
		case op.what != wait && took > most:
			v.violate("limit: to %s %q took %v", op.what, op.id, took)
		case op.what != wait && over && op.result == unknown && h.steady:
			v.violate("limit: to %s %q had no outcome", op.what, op.id)
		}
	}
}

// checkEnds demands that a lease that was not renewed is over when its ttl is.
func (v *verdict) checkEnds(leases map[leaseKey]*lease) {
	for _, l := range leases {
		for _, op := range l.proofs {
			end, known := l.grant.returns.add(l.grant.ttl), !l.kept
			for _, other := range l.renewals {
				known = known && other.result != unknown
				if other != op && other.call < op.returns {
					end = max(end, other.returns.add(l.grant.ttl))
				}
			}
			if late := op.call.sub(end); known && late > clockStep {
				v.violate("ends: %q was still held as %d, %v after its end", l.id, l.index, late)
			}
		}
	}
}

// clockStep is what the clock by which Redis ends leases may differ from ours within a run.
const clockStep = 10 * time.Millisecond

// checkKept demands that leases are kept alive beyond their ttl where nothing is in the way. On a busy
// machine a short one may be lost now and then.
func (v *verdict) checkKept(h *history, leases map[leaseKey]*lease) {
	long, kept := 0, 0
	for _, l := range leases {
		if !l.kept || l.ended == nil || l.ended.call < l.grant.until || l.forced < l.ended.call {
			continue
		}
		long++
		// Redis keeps a lease for a little longer than its holder is told: who releases at once may still find it.
		if l.ended.result == done && l.ended.call > l.grant.until.add(keptTime) {
			kept++
		}
	}
	const few = 3
	if h.steady && long >= few && 2*kept < long {
		v.violate("kept: leases were kept alive beyond their ttl in %d sections of %d", kept, long)
	}
}

// keptTime is for how long a lease that was not renewed may still be found in Redis after its deadline.
const keptTime = 50 * time.Millisecond

// hearTime is how long a process on a busy machine may take to notice that a timer has fired.
const hearTime = 700 * time.Millisecond

// byGrant returns the leases of each id, in the order in which their holders heard of them.
func byGrant(leases map[leaseKey]*lease) map[string][]*lease {
	byID := make(map[string][]*lease)
	for key, l := range leases {
		byID[key.id] = append(byID[key.id], l)
	}
	for _, ls := range byID {
		slices.SortFunc(ls, func(a, b *lease) int {
			return cmp.Or(cmp.Compare(a.grant.returns, b.grant.returns), cmp.Compare(a.index, b.index))
		})
	}
	return byID
}

// lostBetween tells whether data may have been lost between two moments.
func (h *history) lostBetween(a, b instant) bool {
	return slices.ContainsFunc(h.losses, func(l loss) bool { return l.from <= b && l.to >= a })
}

// splitBetween tells whether two masters may have been there between two moments.
func (h *history) splitBetween(a, b instant) bool {
	return slices.ContainsFunc(h.losses, func(l loss) bool { return l.revives && l.from <= b && l.to >= a })
}

// splitTime is for how long a master that was replaced may go on granting. While two do, each gives indexes by its clock, in µs, and a
// lease that was renewed before it was returned looks as if it had been granted only then.
const splitTime = time.Second

// checkIndexes demands that every lease of ours has a greater index than all that
// were there before it was asked for. Those of npm need the counter for that.
//
// A lease may be on its way to a process, be ended by force, and be followed by others, before somebody asks who is then given it.
func (v *verdict) checkIndexes(h *history, ls []*lease) {
	for i, l := range ls {
		asked := l.grant.sent()
		if l.forced < l.grant.returns {
			asked = l.grant.began
		}
		for _, before := range ls[:i] {
			switch {
			case before.grant.returns >= asked, before.index < l.index:
			case (before.grant.npm || l.grant.npm) && h.lostBetween(before.grant.call, l.grant.returns):
			case before.index > l.index && before.index-l.index < splitTime.Microseconds() && h.splitBetween(before.grant.call, l.grant.returns):
			default:
				v.violate("index: %q was granted with %d after %d", l.id, l.index, before.index)
			}
		}
	}
}

// checkOverlaps demands that no two holders are certain at the same time.
func (v *verdict) checkOverlaps(h *history, ls []*lease) {
	for i, l := range ls {
		for _, before := range ls[:i] {
			together := min(before.certain, l.certain).sub(l.grant.returns)
			switch {
			case together <= 0:
			case h.lostBetween(before.grant.sent(), l.grant.returns):
				v.overlaps++
			default:
				v.violate("overlap: %q was held as %d and as %d for %v", l.id, before.index, l.index, together)
			}
		}
	}
}

// checkOrder demands that what happened to one id between two losses can be
// explained by one lock, on which each operation takes effect in a moment between its
// call and its return.
func (v *verdict) checkOrder(h *history, id string, leases map[leaseKey]*lease) {
	for n := range len(h.losses) + 1 {
		start, from, to := state{}, instant(0), never
		if n > 0 {
			start.holder, from = anybody, h.losses[n-1].to
		}
		if n < len(h.losses) {
			to = h.losses[n].from
		}
		ops := h.between(id, from, to, leases)
		result, info := porcupine.CheckOperationsVerbose(newModel(id, start, ops, leases), ops, orderTime)
		switch result {
		case porcupine.Illegal:
			v.violate("order: no order of the operations on %q explains their results\n%s", id, whereItEnds(ops, info))
		case porcupine.Unknown:
			v.violate("order: the operations on %q could not be ordered within %v", id, orderTime)
		}
	}
}

// between returns the operations on id between two losses. Those that began before the
// first, or returned after the second, may have taken effect on the other side of it;
// but not a grant whose lease was there between the two. A doubtful release may have had no effect at all.
func (h *history) between(id string, from, to instant, leases map[leaseKey]*lease) []porcupine.Operation {
	var ops []porcupine.Operation
	for _, op := range h.operations {
		began, returns := op.began, op.returns
		if op.id != id || !op.tells() || returns <= from || began >= to {
			continue
		}
		elsewhere := began <= from || returns >= to || op.doubtful
		if op.result == granted && (leases[leaseKey{id, op.index}].wasThere(from, to) || op.sent() > from && returns < to) {
			elsewhere = false
		}
		if returns >= to {
			returns = never
		}
		ops = append(ops, porcupine.Operation{
			ClientId: op.worker, Input: step{op, elsewhere}, Call: int64(max(began, from)), Return: int64(returns),
		})
	}
	return ops
}

// findBegins notes when each operation may first have taken effect. Attempts belong to all
// waiters of a process: what was sent for one that has left is given to one who may have come
// since. So a grant may be as old as the first of those calls that was there after the last grant.
// Behind a proxy that includes the call which got the last grant: a copy of one of its attempts may arrive late.
func (h *history) findBegins() {
	type line struct{ process, id string }
	waits := make(map[line][]*operation)
	for _, op := range h.operations {
		op.began = op.call
		if op.what == wait && !op.npm {
			key := line{op.process, op.id}
			waits[key] = append(waits[key], op)
		}
	}
	for _, ops := range waits {
		slices.SortStableFunc(ops, func(a, b *operation) int { return cmp.Compare(a.returns, b.returns) })
		var last instant // when the attempt was sent that brought the last grant
		for _, op := range ops {
			if op.result != granted {
				continue
			}
			for _, other := range ops {
				if (other.result != granted || h.proxied && other != op) && other.returns >= last {
					op.began = min(op.began, max(other.call, last))
				}
			}
			last = op.until.add(-op.ttl)
			op.began = min(op.began, last)
		}
	}
}

// A step is an operation as the model sees it.
type step struct {
	*operation

	elsewhere bool // it may have taken effect beyond the loss at which the model begins or ends
}

// orderTime bounds the search for an order. Legal histories take milliseconds.
const orderTime = 20 * time.Second

// whereItEnds describes the end of the longest order that was found, and what could not follow.
func whereItEnds(ops []porcupine.Operation, info porcupine.LinearizationInfo) string {
	const most = 6
	var longest []porcupine.Operation
	for _, order := range info.PartialLinearizationsOperations()[0] {
		if len(order) > len(longest) {
			longest = order
		}
	}
	placed := make(map[any]bool)
	for _, op := range longest {
		placed[op.Input] = true
	}
	var text strings.Builder
	for _, op := range longest[max(0, len(longest)-most):] {
		fmt.Fprintf(&text, "    then %v\n", op.Input)
	}
	ops = slices.Clone(ops)
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Return, b.Return) })
	for n := 0; len(ops) > 0 && n < most; ops = ops[1:] {
		if !placed[ops[0].Input] {
			fmt.Fprintf(&text, "    not  %v\n", ops[0].Input)
			n++
		}
	}
	return text.String()
}

// tells says whether the result proves anything about the lock's state. A wait that
// ended without the lock may report what its line knew before.
func (op *operation) tells() bool {
	switch op.result {
	case unknown, nothing:
		return false
	case locked:
		return op.what != wait
	}
	return op.returns != never
}

// A state is one lock, as a sequence of operations sees it.
type state struct {
	holder int64   // index; 0: nobody that we know of; anybody: not known
	last   int64   // index that was granted
	grants int     // made so far, without those that may have been made elsewhere
	at     instant // not before this
}

const anybody = -1

// A model is the sequential specification of a lock with leases. A lease that nobody
// released ends at a moment of its own choice, but not before its deadline. An attempt
// whose outcome is unknown may hold the lock under an index that nobody was told.
type model struct {
	leases map[int64]*lease // of the id
	ranks  map[int64]int    // of the grants that were made here, in the order of their indexes
}

func newModel(id string, start state, ops []porcupine.Operation, leases map[leaseKey]*lease) porcupine.Model {
	m := model{leases: make(map[int64]*lease), ranks: make(map[int64]int)}
	for key, l := range leases {
		if key.id == id {
			m.leases[key.index] = l
		}
	}
	var indexes []int64
	for _, op := range ops {
		if s, ok := op.Input.(step); ok && s.result == granted && !s.elsewhere {
			indexes = append(indexes, s.index)
		}
	}
	slices.Sort(indexes)
	for rank, index := range indexes {
		m.ranks[index] = rank
	}
	nondeterministic := porcupine.NondeterministicModel{
		Init: func() []any { return []any{start} },
		Step: func(before, input, _ any) []any {
			s, _ := before.(state)
			op, _ := input.(step)
			var after []any
			if legal, s := m.take(s, op); legal {
				after = append(after, s)
			}
			if m.endsMeanwhile(s, op) {
				s.at = max(s.at, op.began)
				after = append(after, s)
			}
			if op.elsewhere {
				after = append(after, s)
			}
			return after
		},
	}
	return nondeterministic.ToModel()
}

// take tells whether op can have its result in s, and what s is then.
func (m model) take(s state, op step) (bool, state) {
	s.at = max(s.at, op.began)
	switch op.result {
	case granted:
		legal := op.index > s.last && m.free(&s, op)
		if !op.elsewhere {
			legal = legal && m.ranks[op.index] == s.grants
			s.grants++
		}
		s.holder, s.last = op.index, op.index
		return legal, s
	case locked:
		if _, known := m.leases[op.holder]; known {
			return m.heldBy(&s, op.holder), s
		}
		return op.holder > s.last && m.free(&s, op), s
	case done:
		if op.what == force {
			return m.force(s, op)
		}
		legal := m.heldBy(&s, op.index)
		if op.what == release {
			s.holder = 0
		}
		return legal, s
	case expired:
		return m.free(&s, op), s
	case conflict:
		if op.index == 0 {
			return false, s // There is none with whichever holds.
		}
		if s.holder == anybody || s.holder != 0 && s.holder != op.index {
			return true, s
		}
		return m.free(&s, op), s
	}
	return false, s
}

// force tells whether op can have ended a lease in s, and what s is then.
func (m model) force(s state, op step) (bool, state) {
	legal := true
	switch _, known := m.leases[op.index]; {
	case known:
		legal = m.heldBy(&s, op.index)
	case op.index != 0:
		legal = op.index > s.last && m.free(&s, op)
		s.last = max(s.last, op.index)
	case s.holder == 0:
		legal = m.free(&s, op)
	}
	s.holder = 0
	return legal, s
}

// endsMeanwhile tells whether op, a force for any lease, can have found one in s that then ended without it. Nobody finds that
// lease any more when op has returned.
func (m model) endsMeanwhile(s state, op step) bool {
	l := m.leases[s.holder]
	return l != nil && op.what == force && op.index == 0 && op.result == done &&
		!slices.ContainsFunc(l.proofs, func(proof *operation) bool { return proof.call > op.returns })
}

func (m model) heldBy(s *state, index int64) bool {
	if s.holder == anybody {
		s.holder = index
	}
	return s.holder == index
}

// free tells whether no lease that we know of needs to be there when op takes effect.
func (m model) free(s *state, op step) bool {
	if l := m.leases[s.holder]; l != nil {
		s.at = max(s.at, l.mayEnd)
	}
	s.holder = 0
	return s.at <= op.returns
}

// checkWaiters demands that a lock does not stay free while somebody waits.
func (v *verdict) checkWaiters(h *history, id string, ls []*lease) {
	idle := gaps(h.busy(id, ls), h.end)
	for _, w := range merge(h.waiting(id)) {
		for _, g := range idle {
			stall := min(w.to, g.to).sub(max(w.from, g.from))
			v.stall = max(v.stall, stall)
			if stall > patience {
				v.violate("waiter: %q was free for %v while somebody waited", id, stall.Round(time.Millisecond))
			}
		}
	}
}

// longestQueue is how many others may go first, where each process has one waiter.
const longestQueue = processes - 1

// checkTurns demands that those who stand in line are served in turn, where nothing is in the way: once somebody is in the
// queue, each of the others is served once at most before him.
func (v *verdict) checkTurns(h *history, id string, ls []*lease) {
	if id != lineID || !h.steady {
		return
	}
	for _, op := range h.operations {
		if op.id != id || op.what != wait {
			continue
		}
		queued, until := op.call.add(hearTime), min(op.returns, h.end)
		if op.result == granted {
			until = min(until, op.sent())
		}
		before := 0
		for _, l := range ls {
			if l.grant.process != op.process && l.grant.sent() > queued && l.grant.sent() < until {
				before++
			}
		}
		if before > longestQueue {
			v.violate("turn: %d others were served before %s on %q, after it had come", before, op.process, id)
		}
	}
}

// A span is a time.
type span struct{ from, to instant }

// replicationLag is how late a replica on the same machine may be.
const replicationLag = time.Second

// busy returns the spans in which the lock of id may have been held, or could not
// be given.
func (h *history) busy(id string, ls []*lease) []span {
	var spans []span
	for _, o := range h.outages {
		spans = append(spans, span{o.from, o.to})
	}
	for _, l := range ls {
		spans = append(spans, span{l.grant.returns, l.gone})
		for _, lost := range h.losses {
			if lost.revives && l.gone > lost.from.add(-replicationLag) && l.grant.sent() < lost.to {
				spans = append(spans, span{lost.from, l.evidence.add(l.grant.ttl)})
			}
		}
	}
	for _, op := range h.operations {
		if op.id != id || op.result == granted || op.what != try && op.what != wait {
			continue
		}
		// What such an attempt took, or was granted by way of the queue, is given back soon, if there is somebody to do it: a process may die
		// just after its caller has left. Who died in the queue costs one ttl if he was granted the lock before the server knew; later he is
		// passed over.
		if died := h.diedAt(op.process); died != never && op.returns.add(hearTime) > died {
			spans = append(spans, span{op.call, min(died.add(op.ttl), foundAfter(ls, died.add(deathTime)))})
		}
		if op.result != unknown {
			continue
		}
		if op.npm {
			spans = append(spans, span{op.call, min(op.returns, h.end).add(op.ttl)})
		}
		for _, f := range h.freezes {
			if op.call < f.to && op.returns > f.from {
				spans = append(spans, span{op.call, f.to.add(op.ttl)})
			}
		}
	}
	return merge(spans)
}

// deathTime is for how long the server may take a process for alive that has died, and do what it had asked for.
const deathTime = 200 * time.Millisecond

// foundAfter returns the first moment after another in which one of the leases was certainly there, or never. A process
// that had died by then did not have the lock, and must not be granted it any more.
func foundAfter(ls []*lease, after instant) instant {
	found := never
	for _, l := range ls {
		for _, op := range l.proofs {
			if at := max(l.grant.returns, after); at <= op.call {
				found = min(found, at)
			}
		}
	}
	return found
}

// waiting returns the spans in which somebody of ours waited for id.
func (h *history) waiting(id string) []span {
	var spans []span
	for _, op := range h.operations {
		if op.id != id || op.what != wait || op.npm {
			continue
		}
		spans = append(spans, span{op.call, min(op.returns, h.end, h.left(op.process, op.call))})
	}
	return spans
}

// merge returns the union of spans, in order and apart.
func merge(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var merged []span
	for _, s := range spans {
		if n := len(merged); n > 0 && s.from <= merged[n-1].to {
			merged[n-1].to = max(merged[n-1].to, s.to)
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}

// gaps returns what lies between merged spans, up to the end.
func gaps(merged []span, end instant) []span {
	var between []span
	var last instant
	for _, s := range merged {
		between = append(between, span{last, s.from})
		last = max(last, s.to)
	}
	return append(between, span{last, end})
}
