package faults

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func tell(ops ...*operation) *history {
	return &history{operations: ops, away: make(map[string][]span), end: ms(100_000)}
}

func ms(n int) instant { return instant(time.Hour) + instant(n)*instant(time.Millisecond) }

// op is an operation of process p on the id "42".
func op(p string, what what, call, returns int, result result, index int64) *operation {
	o := &operation{
		process: p, what: what, id: "42", call: ms(call), returns: ms(returns), result: result, index: index, ttl: time.Second,
	}
	if result == granted {
		o.until = o.call.add(o.ttl)
	}
	if result == locked {
		o.index, o.holder = 0, index
	}
	return o
}

func lost(o *operation) *operation {
	o.returns = never
	return o
}

// proved is a grant whose request was sent only then.
func proved(o *operation, sent int) *operation {
	o.until = ms(sent).add(o.ttl)
	return o
}

// of gives a lease that was asked for a ttl.
func of(o *operation, ttl time.Duration) *operation {
	o.ttl = ttl
	return o
}

// within gives an operation's caller so much time.
func within(o *operation, limit time.Duration) *operation {
	o.limit = limit
	return o
}

// kept is what a holder says of a lease that is kept alive up to a moment.
func kept(at, until int, index int64, kept, lost bool) heard {
	return heard{event{At: ms(at), ID: "42", Index: index, Until: ms(until), Kept: kept, Lost: lost}, "a"}
}

// with changes a history.
func with(h *history, change func(h *history)) *history {
	change(h)
	return h
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		history *history
		rules   []string // that were broken
	}{
		"one after the other": {tell(
			op("a", try, 0, 1, granted, 1), op("b", try, 2, 3, locked, 1), op("a", renew, 4, 5, done, 1),
			op("a", release, 6, 7, done, 1), op("b", wait, 4, 8, granted, 2), op("b", release, 9, 10, done, 2),
		), nil},
		"two at a time": {tell(
			op("a", try, 0, 1, granted, 1), op("b", try, 2, 3, granted, 2),
		), []string{"order", "overlap"}},
		"one after the other's end": {tell(
			op("a", try, 0, 1, granted, 1), op("b", wait, 2, 1005, granted, 2),
		), nil},
		"a release that the server may have made": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, unknown, 1), op("b", wait, 4, 5, granted, 2),
		), nil},
		"a release of somebody else's lease": {tell(
			op("a", try, 0, 1, granted, 1), op("b", wait, 2, 1005, granted, 2), op("a", release, 1010, 1011, done, 1),
		), []string{"order"}},
		"a renewal of somebody else's lease": {tell(
			op("a", try, 0, 1, granted, 1), op("b", wait, 2, 1005, granted, 2), op("a", renew, 1010, 1011, done, 1),
		), []string{"order"}},
		"expired, long before its end": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, expired, 1),
		), []string{"order"}},
		"a conflict with nobody": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, conflict, 1),
		), []string{"order"}},
		"locked by one who has released": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, done, 1), op("b", try, 4, 5, locked, 1),
		), []string{"order"}},
		"locked by an attempt that nobody knows of": {tell(
			op("c", wait, 0, 1, unknown, 0), op("b", try, 4, 5, locked, 1),
		), nil},
		"locked by an attempt that was for somebody who has left": {tell(
			op("a", wait, 0, 3, unknown, 0), op("b", try, 4, 5, locked, 1), op("a", wait, 6, 10, granted, 1),
		), nil},
		"locked by a lease that was not asked for yet": {tell(
			op("c", wait, 0, 3, unknown, 0), op("b", try, 4, 5, locked, 1), op("a", wait, 6, 10, granted, 1),
		), []string{"order"}},
		"locked by one that was not asked for since the last": {tell(
			op("a", wait, 0, 1, unknown, 0), op("a", wait, 2, 3, granted, 1), op("a", release, 4, 5, done, 1),
			op("b", try, 6, 7, locked, 2), op("a", wait, 8, 9, granted, 2),
		), []string{"order"}},
		"locked by a copy of an attempt for the last": {with(tell(
			op("a", wait, 0, 1, unknown, 0), op("a", wait, 2, 3, granted, 1), op("a", release, 4, 5, done, 1),
			op("b", try, 6, 7, locked, 2), op("a", wait, 8, 9, granted, 2),
		), func(h *history) { h.proxied = true }), nil},
		"an index that falls": {tell(
			op("a", try, 0, 1, granted, 2), op("a", release, 2, 3, done, 2), op("b", try, 4, 5, granted, 1),
		), []string{"index", "order"}},
		"a waiter who is forgotten": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 10, 11, done, 1), op("b", wait, 5, 6000, granted, 2),
		), []string{"waiter"}},
		"a waiter for whom nobody is there": {tell(
			lost(op("b", wait, 5, 0, unknown, 0)),
		), []string{"waiter"}},
		"a waiter behind one that died": {
			func() *history {
				h := tell(op("a", try, 0, 1, granted, 1), op("b", wait, 5, 2003, granted, 2), op("b", release, 2004, 2005, done, 2))
				h.holds = []heard{{event{At: ms(2), ID: "42", Index: 1, Until: ms(1000), Kept: true}, "a"}}
				h.away["a"] = []span{{ms(1000), never}}
				return h
			}(), nil,
		},
		"a waiter behind one that died when it was granted the lock": {with(tell(
			op("a", try, 0, 1, granted, 1), lost(of(op("c", wait, 2, 0, unknown, 0), 6*time.Second)), op("a", release, 10, 11, done, 1),
			op("b", wait, 2, 6020, granted, 3), op("b", release, 6300, 6301, done, 3),
		), func(h *history) { h.away["c"] = []span{{ms(20), never}} }), nil},
		"a waiter behind one that died when its caller had just left": {with(tell(
			op("a", try, 0, 1, granted, 1), of(op("c", wait, 2, 8, unknown, 0), 6*time.Second), op("a", release, 10, 11, done, 1),
			op("b", wait, 2, 6020, granted, 3), op("b", release, 6300, 6301, done, 3),
		), func(h *history) { h.away["c"] = []span{{ms(20), never}} }), nil},
		"a waiter behind one that died long after its caller had left": {with(tell(
			op("a", try, 0, 1, granted, 1), of(op("c", wait, 2, 8, unknown, 0), 6*time.Second), op("a", release, 10, 11, done, 1),
			op("b", wait, 2, 6020, granted, 3), op("b", release, 6300, 6301, done, 3),
		), func(h *history) { h.away["c"] = []span{{ms(800), never}} }), []string{"waiter"}},
		"a waiter behind one that was granted the lock after its death": {with(tell(
			op("a", try, 0, 1, granted, 1), lost(of(op("c", wait, 2, 0, unknown, 0), 6*time.Second)), op("a", release, 500, 501, done, 1),
			op("b", wait, 2, 6520, granted, 3), op("b", release, 6800, 6801, done, 3),
		), func(h *history) { h.away["c"] = []span{{ms(20), never}} }), []string{"waiter"}},
		"a waiter behind one that went on after it was stopped": {
			func() *history {
				h := tell(op("a", try, 5000, 5001, granted, 1), op("a", release, 12000, 12001, done, 1), op("b", wait, 5002, 12002, granted, 2))
				h.holds = []heard{
					{event{At: ms(5002), ID: "42", Index: 1, Until: ms(6000), Kept: true}, "a"},
					{event{At: ms(12000), ID: "42", Index: 1, Until: ms(12500)}, "a"},
				}
				h.away["a"] = []span{{ms(1000), ms(4000)}}
				return h
			}(), nil,
		},
		"a waiter in a process that went on after it was stopped": {
			func() *history {
				h := tell(op("b", wait, 5000, 12002, granted, 1))
				h.away["b"] = []span{{ms(1000), ms(4000)}}
				return h
			}(), []string{"waiter"},
		},
		"a caller who is kept waiting": {tell(
			op("a", try, 0, 1, granted, 1), within(op("b", wait, 2, 900, unknown, 0), 100*time.Millisecond), op("a", release, 950, 951, done, 1),
		), []string{"limit"}},
		"a caller who is sent away": {tell(
			within(op("b", wait, 0, 1, unknown, 0), time.Minute),
		), []string{"limit"}},
		"a release that takes too long": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 8000, expired, 1),
		), []string{"limit"}},
		"a release that does not know what it did, though nothing is wrong": {with(tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, unknown, 1),
		), func(h *history) { h.steady = true }), []string{"limit"}},
		"leases that are not kept alive": {with(tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 1001, 1002, expired, 1),
			op("a", try, 2000, 2001, granted, 2), op("a", release, 3001, 3002, expired, 2),
			op("a", try, 4000, 4001, granted, 3), op("a", release, 5001, 5002, expired, 3),
		), func(h *history) {
			h.holds = []heard{kept(2, 1000, 1, true, false), kept(2002, 3000, 2, true, false), kept(4002, 5000, 3, true, false)}
			h.steady = true
		}), []string{"kept"}},
		"a loss that was none": {with(tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 340, 341, done, 1),
		), func(h *history) { h.holds = []heard{kept(2, 1000, 1, true, false), kept(339, 339, 1, false, true)} }), []string{"loss"}},
		"a renewal that revives": {tell(
			op("a", wait, 0, 1, granted, 1), op("a", renew, 5000, 5001, done, 1), op("a", release, 5500, 5501, done, 1),
		), []string{"ends"}},
		"a release of what had ended": {tell(
			op("a", wait, 0, 1, granted, 1), op("a", release, 5000, 5001, done, 1),
		), []string{"ends"}},
		"an index twice, across a loss": {with(tell(
			op("a", try, 0, 1, granted, 7), op("b", try, 20, 21, granted, 7),
		), func(h *history) { h.losses = []loss{{from: ms(10), to: ms(11)}} }), []string{"index"}},
		"an index that falls across a loss, for one who had come before": {with(tell(
			proved(op("b", wait, 0, 21, granted, 3), 20), op("a", try, 1, 2, granted, 3+1e6), op("b", release, 25, 26, done, 3),
		), func(h *history) { h.losses = []loss{{from: ms(10), to: ms(11)}} }), []string{"index"}},
		"an index that falls for less than a second, while two masters may serve": {with(tell(
			proved(op("b", wait, 0, 21, granted, 3), 20), op("a", try, 1, 2, granted, 2+1e6), op("b", release, 25, 26, done, 3),
		), func(h *history) { h.losses = []loss{{from: ms(10), to: ms(11), revives: true}} }), nil},
		"an index that falls for less than a second, with one master": {with(tell(
			proved(op("b", wait, 0, 21, granted, 3), 20), op("a", try, 1, 2, granted, 2+1e6), op("b", release, 25, 26, done, 3),
		), func(h *history) { h.losses = []loss{{from: ms(10), to: ms(11)}} }), []string{"index"}},
		"two at a time after a loss, for both had come before": {with(tell(
			proved(op("a", wait, 0, 501, granted, 1), 500), proved(op("b", wait, 1, 601, granted, 2), 600),
			op("a", release, 900, 901, conflict, 1), op("b", release, 950, 951, done, 2),
		), func(h *history) { h.losses = []loss{{from: ms(10), to: ms(11)}} }), []string{"order", "overlap"}},
		"a release whose lease was lost, and then the reply": {with(tell(
			op("a", try, 0, 1, granted, 1), op("b", wait, 20, 21, granted, 2), op("a", release, 30, 31, done, 1), op("b", release, 32, 33, done, 2),
		), func(h *history) { h.losses, h.mixed = []loss{{from: ms(10), to: ms(11)}}, true }), nil},
		"a release whose lease was lost, though no reply was": {with(tell(
			op("a", try, 0, 1, granted, 1), op("b", wait, 20, 21, granted, 2), op("a", release, 30, 31, done, 1), op("b", release, 32, 33, done, 2),
		), func(h *history) { h.losses = []loss{{from: ms(10), to: ms(11)}} }), []string{"order"}},
		"a release of what was granted after the loss": {with(tell(
			op("a", try, 14, 15, granted, 1), op("b", wait, 20, 1021, granted, 2),
			op("a", release, 1030, 1031, done, 1), op("b", release, 1032, 1033, done, 2),
		), func(h *history) { h.losses, h.mixed = []loss{{from: ms(10), to: ms(11)}}, true }), []string{"ends", "order"}},
		"one who stands in line and is passed over": {with(tell(
			op("c", wait, 0, 6000, granted, 9), op("a", wait, 1000, 1001, granted, 1), op("a", release, 1010, 1011, done, 1),
			op("b", wait, 1100, 1101, granted, 2), op("b", release, 1110, 1111, done, 2),
			op("a", wait, 1200, 1201, granted, 3), op("a", release, 1210, 1211, done, 3),
		), func(h *history) {
			h.steady = true
			for _, o := range h.operations {
				o.id = lineID
			}
			proved(h.operations[0], 2000)
		}), []string{"turn", "waiter"}},
		"locked by no index": {tell(
			op("b", try, 4, 5, locked, 0),
		), []string{"order"}},
		"locked by an index that is over": {tell(
			op("a", try, 0, 1, granted, 5), op("a", release, 2, 3, done, 5), op("b", try, 4, 5, locked, 3),
		), []string{"order"}},
		"two at a time, with a deadline that is taken back": {tell(
			op("a", try, 0, 1, granted, 1), op("b", try, 100, 101, granted, 2),
			func() *operation {
				o := op("a", renew, 500, 501, conflict, 1)
				o.until = ms(1)
				return o
			}(),
		), []string{"order", "overlap"}},
		"a waiter behind one that died while it renewed": {with(tell(
			op("a", wait, 0, 1, granted, 1), lost(op("c", renew, 10, 0, unknown, 1)), proved(op("b", wait, 6, 20000, granted, 2), 19999),
		), func(h *history) { h.away["c"] = []span{{ms(20), never}} }), []string{"waiter"}},
		"a holder who does not hear of its loss, before it is stopped": {with(tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 5001, 5002, expired, 1),
		), func(h *history) {
			h.holds = []heard{kept(2, 1000, 1, true, false), kept(5000, 1000, 1, false, false)}
			h.away["a"] = []span{{ms(20000), never}}
		}), []string{"loss"}},
		"a holder that does not hear of its loss while it is stopped": {with(tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 5001, 5002, expired, 1),
		), func(h *history) {
			h.holds = []heard{kept(2, 1000, 1, true, false), kept(5000, 1000, 1, false, false)}
			h.away["a"] = []span{{ms(10), ms(4999)}, {ms(20000), ms(25000)}}
		}), nil},
		"a holder who does not hear of its loss": {
			func() *history {
				h := tell(op("a", try, 0, 1, granted, 1))
				h.holds = []heard{{event{At: ms(3000), ID: "42", Index: 1, Until: ms(1000)}, "a"}}
				return h
			}(), []string{"loss"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := judge(c.history)
			require.Equal(t, c.rules, brokenRules(v), v.violations)
		})
	}
}

// c ends leases of a and b by force.
func TestJudge_force(t *testing.T) {
	steady := func(h *history) { h.steady = true }
	for name, c := range map[string]struct {
		history *history
		rules   []string // that were broken
	}{
		"a lease that was seen": {tell(
			op("a", try, 0, 1, granted, 1), op("c", inspect, 2, 3, locked, 1), op("c", force, 4, 5, done, 1), op("c", inspect, 6, 7, expired, 0),
			op("b", wait, 6, 9, granted, 2), op("a", release, 10, 11, conflict, 1), op("b", release, 12, 13, done, 2),
		), nil},
		"whichever lease holds": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 4, 5, done, 0), op("b", wait, 2, 8, granted, 2),
			op("a", release, 9, 10, conflict, 1), op("b", release, 11, 12, done, 2),
		), nil},
		"whichever lease held, and was released meanwhile": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 8, done, 0), op("a", release, 3, 5, done, 1),
			op("b", try, 4, 6, granted, 2), op("b", renew, 9, 10, done, 2),
		), steady), nil},
		"a lease that nobody was told of": {tell(
			op("a", wait, 0, 1, unknown, 0), op("c", inspect, 2, 3, locked, 1), op("c", force, 4, 5, done, 1), op("b", try, 6, 7, granted, 2),
		), nil},
		"a lease that nobody was told of, and an older one after it": {tell(
			op("a", wait, 0, 1, unknown, 0), op("c", force, 2, 3, done, 2), op("b", try, 4, 5, granted, 1),
		), []string{"order"}},
		"a lease, perhaps": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, unknown, 1), op("b", wait, 4, 5, granted, 2), op("b", renew, 6, 7, done, 2),
		), nil},
		"whichever lease holds, perhaps": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, unknown, 0), op("b", wait, 4, 5, granted, 2), op("b", renew, 6, 7, done, 2),
		), nil},
		"a lease, perhaps, of another index": {tell(
			op("b", try, 0, 1, granted, 1), op("b", release, 2, 3, done, 1),
			op("a", try, 4, 5, granted, 2), op("c", force, 6, 7, unknown, 1), op("b", wait, 8, 9, granted, 3),
		), []string{"order", "overlap"}},
		"a lease that is still held": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, done, 1), op("a", renew, 4, 5, done, 1),
		), []string{"order"}},
		"whichever lease holds, which is still held": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, done, 0), op("a", renew, 4, 5, done, 1),
		), []string{"order"}},
		"two leases at once": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 20, done, 0), op("b", wait, 3, 4, granted, 2), op("d", wait, 5, 8, granted, 3),
		), []string{"order"}},
		"a lease of another index": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, done, 1), op("b", try, 4, 5, granted, 2), op("c", force, 6, 7, done, 1),
		), []string{"order"}},
		"a lease that is said to be over": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, expired, 1),
		), steady), []string{"order"}},
		"a lease that is said to have gone to another": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, conflict, 1),
		), steady), []string{"order"}},
		"whichever lease holds, but another": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, conflict, 0),
		), []string{"order"}},
		"nobody is seen, though somebody holds": {tell(
			op("a", try, 0, 1, granted, 1), op("c", inspect, 2, 3, expired, 0),
		), []string{"order"}},
		"one is seen who has released": {tell(
			op("a", try, 0, 1, granted, 1), op("a", release, 2, 3, done, 1), op("c", inspect, 4, 5, locked, 1),
		), []string{"order"}},
		"a lease that was released, where a request may have been lost": {tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 8, done, 1), op("a", release, 3, 9, done, 1),
		), nil},
		"a lease that was released": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 8, done, 1), op("a", release, 3, 9, done, 1),
		), steady), []string{"order"}},
		"a lease, before a waiter who is forgotten": {tell(
			of(op("a", try, 0, 1, granted, 1), time.Minute), op("c", force, 10, 11, done, 1), op("b", wait, 5, 6000, granted, 2),
		), []string{"waiter"}},
		"whichever lease holds, before a waiter who is forgotten": {tell(
			of(op("a", try, 0, 1, granted, 1), time.Minute), op("c", force, 10, 11, done, 0), op("b", wait, 5, 6000, granted, 2),
		), []string{"waiter"}},
		"a lease whose holder hears of it with the next renewal": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, done, 1), op("a", release, 400, 401, expired, 1),
		), func(h *history) {
			h.steady, h.holds = true, []heard{kept(1, 1000, 1, true, false), kept(399, 399, 1, false, true)}
		}), nil},
		"a lease whose holder hears of it late": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, done, 1), op("a", release, 1400, 1401, expired, 1),
		), func(h *history) {
			h.steady, h.holds = true, []heard{kept(1, 1000, 1, true, false), kept(1399, 1000, 1, false, true)}
		}), []string{"forced"}},
		"a lease whose holder hears of what had no effect": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 2, 3, unknown, 1), op("a", release, 5, 6, done, 1),
		), func(h *history) { h.holds = []heard{kept(1, 1000, 1, true, false), kept(4, 4, 1, false, true)} }), nil},
		"leases that are kept alive up to then": {with(tell(
			op("a", try, 0, 1, granted, 1), op("c", force, 900, 901, done, 1), op("a", release, 1001, 1002, expired, 1),
			op("a", try, 2000, 2001, granted, 2), op("c", force, 2900, 2901, done, 2), op("a", release, 3001, 3002, expired, 2),
			op("a", try, 4000, 4001, granted, 3), op("c", force, 4900, 4901, done, 3), op("a", release, 5001, 5002, expired, 3),
		), func(h *history) {
			h.holds = []heard{kept(2, 1000, 1, true, false), kept(2002, 3000, 2, true, false), kept(4002, 5000, 3, true, false)}
			h.steady = true
		}), nil},
		"a lease on its way to a process, where somebody asks only now": {tell(
			op("c", force, 3, 4, done, 1), op("d", try, 5, 6, granted, 2), op("d", release, 7, 8, done, 2),
			proved(op("b", wait, 10, 20, granted, 1), 2),
		), nil},
		"no lease on its way to a process, where somebody asks only now": {tell(
			op("d", try, 5, 6, granted, 2), op("d", release, 7, 8, done, 2), proved(op("b", wait, 10, 20, granted, 1), 2),
		), []string{"index", "order"}},
		"a lease on its way that was asked for only then": {tell(
			op("d", try, 5, 6, granted, 2), op("d", release, 7, 8, done, 2),
			proved(op("b", wait, 10, 20, granted, 1), 9), op("c", force, 12, 13, done, 1),
		), []string{"index", "order"}},
		"a lease, as long as two calls take": {tell(
			of(op("a", try, 0, 1, granted, 1), time.Minute), op("c", force, 2, 9000, done, 1),
		), nil},
		"a lease, for too long": {tell(
			of(op("a", try, 0, 1, granted, 1), time.Minute), op("c", force, 2, 15000, done, 1),
		), []string{"limit"}},
	} {
		t.Run(name, func(t *testing.T) {
			v := judge(c.history)
			require.Equal(t, c.rules, brokenRules(v), v.violations)
		})
	}
}

// brokenRules returns the rules that were broken, each once.
func brokenRules(v *verdict) []string {
	var rules []string
	for _, violation := range v.violations {
		rule, _, _ := strings.Cut(violation, ":")
		rules = append(rules, rule)
	}
	return slices.Compact(rules)
}

// What Redis loses may be had by two, and is counted. The indexes of ours grow all the same.
func TestJudge_countsOverlapsAcrossALoss(t *testing.T) {
	h := tell(
		op("a", try, 0, 1, granted, 1e6), op("b", wait, 2, 20, granted, 2e6),
		op("a", release, 30, 31, conflict, 1e6), op("b", release, 32, 33, done, 2e6),
	)
	require.Len(t, judge(h).violations, 2)
	h.losses = []loss{{from: ms(10), to: ms(11)}}
	v := judge(h)
	require.Empty(t, v.violations)
	require.Equal(t, 1, v.overlaps)

	h.operations[1].index, h.operations[3].index = 0, 0
	require.NotEmpty(t, judge(h).violations, "index")
	h.operations[0].npm = true
	require.NotContains(t, strings.Join(judge(h).violations, " "), "index")
}

// An outage excuses waiting, and ends it.
func TestJudge_countsTheStallFromTheEndOfAnOutage(t *testing.T) {
	h := tell(op("b", wait, 0, 9000, granted, 1), op("b", release, 9001, 9002, done, 1))
	h.outages = []outage{{from: ms(100), to: ms(8000)}}
	v := judge(h)
	require.Empty(t, v.violations)
	require.Equal(t, time.Second, v.stall)
}

// What befell the locks of one master excuses nothing on another.
func TestJudge_isNotLenientWhereAFaultSparedALock(t *testing.T) {
	overlap := tell(
		op("a", try, 0, 1, granted, 1), op("b", wait, 2, 20, granted, 2),
		op("a", release, 30, 31, conflict, 1), op("b", release, 32, 33, done, 2),
	)
	stall := tell(op("b", wait, 0, 9000, granted, 1), op("b", release, 9001, 9002, done, 1))
	befall := func(ids ...string) {
		overlap.losses = []loss{{from: ms(10), to: ms(11), ids: ids}}
		stall.outages = []outage{{from: ms(100), to: ms(8000), ids: ids}}
	}
	befall("other", overlap.operations[0].id)
	require.Empty(t, judge(overlap).violations)
	require.Empty(t, judge(stall).violations)
	befall("other")
	require.Len(t, judge(overlap).violations, 2)
	require.Len(t, judge(stall).violations, 1)
}

func TestRecorder_joinsCallsAndReturns(t *testing.T) {
	r := newRecorder()
	r.record("a", false, event{At: 1, Worker: 1, What: wait, ID: "42", TTL: 7})
	r.record("a", false, event{At: 2, Worker: 2, What: release, ID: "43", Index: 5})
	require.Equal(t, "42", r.record("a", false, event{At: 3, Worker: 1, What: returned, Result: granted, Index: 6, Until: 9}))
	require.Len(t, r.operations, 2)
	require.Equal(t, operation{
		what: wait, process: "a", worker: 1, id: "42", ttl: 7 * time.Millisecond, index: 6, call: 1, returns: 3, result: granted, until: 9,
	}, *r.operations[0])
	require.Equal(t, unknown, r.operations[1].result)
	require.Equal(t, never, r.operations[1].returns)
}
