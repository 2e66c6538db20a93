package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/redfour-go/redfour"
)

const watchHelp = `
It prints a line for each lock, and another whenever the holder, or those who wait, have changed, until it is interrupted. It
polls, so a lease that comes and goes between two looks shows only as a gap in the index.

Examples:
  redfour watch backup deploy
  redfour watch --interval 100ms --json backup
`

// A watch is one call of "redfour watch".
type watch struct {
	*tool

	interval time.Duration
	lock     *redfour.Lock
	width    int     // of the longest id
	last     []sight // of each id
}

// A sight is what was seen of a lock.
type sight struct {
	status redfour.Status
	err    error
}

func newWatch(t *tool, flags *flag.FlagSet) func(ctx context.Context, o operands) error {
	w := &watch{tool: t, interval: 500 * time.Millisecond}
	flags.Var((*span)(&w.interval), "interval", "the `time` between two looks, by default 500ms")
	return w.do
}

func (w *watch) do(ctx context.Context, o operands) error {
	ids := o.all()
	if err := checkIDs(ids); err != nil {
		return err
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	lock, _, err := w.open() // As in inspect, there is nothing to give back.
	if err != nil {
		return err
	}
	w.lock = lock
	for _, id := range ids {
		w.width = max(w.width, utf8.RuneCountInString(label(id)))
	}
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		seen := w.look(ctx, ids)
		if ctx.Err() != nil {
			return nil // This is how it is meant to end.
		}
		if w.last == nil && !slices.ContainsFunc(seen, func(s sight) bool { return s.err == nil }) {
			return seen[0].err // Nothing could ever be seen: that is no outage, but a mistake.
		}
		for i, s := range seen {
			if w.last == nil || !s.same(w.last[i]) {
				w.print(ids[i], s)
			}
		}
		w.last = seen
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// look inspects all at once, so that they share a round trip.
func (w *watch) look(ctx context.Context, ids []string) []sight {
	const outage = time.Second // From then on Redis is said to be out of reach.
	if w.last != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, outage)
		defer cancel()
	}
	seen := make([]sight, len(ids))
	var all sync.WaitGroup
	for i, id := range ids {
		all.Go(func() { seen[i].status, seen[i].err = w.lock.Inspect(ctx, id) })
	}
	all.Wait()
	return seen
}

// same reports whether there is nothing new in s. That time passes is not new, nor are other words for the same trouble.
func (s sight) same(before sight) bool {
	a, b := s.status, before.status
	return (s.err == nil) == (before.err == nil) &&
		a.Held == b.Held && a.Index == b.Index && a.Owner == b.Owner && slices.Equal(a.Waiters, b.Waiters)
}

func (w *watch) print(id string, s sight) {
	now := time.Now()
	switch {
	case s.err != nil && w.json:
		w.printJSON(os.Stdout, map[string]any{"time": now.UTC().Truncate(time.Millisecond), "id": id, "error": s.err.Error()})
	case s.err != nil:
		w.printLine(now, id, "not known: "+printable(s.err.Error()))
	case w.json:
		w.printJSON(os.Stdout, newState(s.status))
	default:
		w.printLine(now, id, line(s.status))
	}
}

func (w *watch) printLine(now time.Time, id, text string) {
	fmt.Printf("%s  %-*s  %s\n", now.Format("15:04:05.000"), w.width, label(id), text)
}

// line describes a lock in a line.
func line(s redfour.Status) string {
	text := "free"
	if s.Held {
		text = fmt.Sprintf("held by %s, index %d, %s left", holder(s), s.Index, short(s.TTL))
	}
	switch n := len(s.Waiters); n {
	case 0:
	case 1:
		text += "; waiting: " + named(s.Waiters[0])
	default:
		text += fmt.Sprintf("; %d wait, next %s", n, named(s.Waiters[0]))
	}
	return text
}
