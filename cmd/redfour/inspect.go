package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/redfour-go/redfour"
)

const inspectHelp = `
It prints who holds the lock, its index, when the lease began by the clock of Redis, what is left of it, and who waits in the
queue, the next first. It exits with 1 if nobody holds it.

Examples:
  redfour inspect backup
  redfour inspect --json backup | jq .owner
  redfour inspect backup >/dev/null; [ $? -eq 1 ] && echo nobody runs it
`

const releaseHelp = `
It ends the lease that has this index, or none. The lock then goes to the next waiter. It is for somebody who knows that the holder is gone, or
stuck: the holder is not asked, and may still be at work, until its next renewal or its deadline.

Examples:
  redfour inspect backup                             # who is it, and what is the index?
  redfour release backup --index 1795885625926303
`

// A state is a Status as JSON.
type state struct {
	Time    time.Time  `json:"time"`
	ID      string     `json:"id"`
	Held    bool       `json:"held"`
	Index   int64      `json:"index,omitempty"`
	TTL     int64      `json:"ttl,omitempty"` // ms
	Owner   string     `json:"owner,omitempty"`
	Since   *time.Time `json:"since,omitempty"`
	Waiters []string   `json:"waiters"`
}

func newState(s redfour.Status) state {
	j := state{
		Time: time.Now().UTC().Truncate(time.Millisecond), ID: s.ID, Held: s.Held, Index: s.Index, TTL: s.TTL.Milliseconds(),
		Owner: s.Owner, Waiters: append([]string{}, s.Waiters...),
	}
	if !s.Since.IsZero() {
		since := s.Since.UTC()
		j.Since = &since
	}
	return j
}

// untilSignal returns a context that ends when somebody wants redfour to end, with a *failure that says so.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		select {
		case sig := <-signals:
			cancel(signaled(sig, "it had not ended"))
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
	}
}

// signaled is the failure for a signal that has ended redfour.
func signaled(sig os.Signal, what string) error {
	number, _ := sig.(syscall.Signal)
	return &failure{code: exitSignal + int(number), err: fmt.Errorf("%s when the signal \"%v\" came", what, sig)}
}

func newInspect(t *tool, _ *flag.FlagSet) func(ctx context.Context, o operands) error {
	return func(ctx context.Context, o operands) error {
		id, err := o.one()
		if err != nil {
			return err
		}
		ctx, stop := untilSignal(ctx)
		defer stop()
		lock, _, err := t.open() // It has nothing to give back, and so need not be closed, which may take 5 s.
		if err != nil {
			return err
		}
		status, err := lock.Inspect(ctx, id)
		if err != nil {
			return err
		}
		if t.json {
			t.printJSON(os.Stdout, newState(status))
		} else {
			printStatus(status)
		}
		if !status.Held {
			return &failure{code: exitNo, err: fmt.Errorf("nobody holds %s", label(id)), silent: true}
		}
		return nil
	}
}

func printStatus(s redfour.Status) {
	if s.Held {
		fmt.Printf("%s is held by %s\n", label(s.ID), holder(s))
		fmt.Printf("  index    %d\n", s.Index)
		if !s.Since.IsZero() {
			fmt.Printf("  since    %s\n", s.Since.Local().Format(time.DateTime))
		}
		fmt.Printf("  left     %s\n", short(s.TTL))
	} else {
		fmt.Printf("nobody holds %s\n", label(s.ID))
	}
	for i, waiter := range s.Waiters {
		head := ""
		if i == 0 {
			head = "waiting"
		}
		fmt.Printf("  %-7s  %d. %s\n", head, i+1, named(waiter))
	}
}

// holder returns what the holder calls itself.
func holder(s redfour.Status) string {
	if s.Owner == "" && s.Since.IsZero() {
		return "somebody without a name, perhaps an npm client"
	}
	return named(s.Owner)
}

func named(owner string) string {
	if owner == "" {
		return "somebody without a name"
	}
	return label(owner)
}

func newRelease(t *tool, flags *flag.FlagSet) func(ctx context.Context, o operands) error {
	var index int64
	flags.Int64Var(&index, "index", 0, "the index `N` of the lease to end, as \"redfour inspect\" shows it")
	return func(ctx context.Context, o operands) error {
		id, err := o.one()
		if err != nil {
			return err
		}
		if index <= 0 { // ForceRelease would take 0 for any lease.
			return usage("which lease? --index is missing, or not an index")
		}
		ctx, stop := untilSignal(ctx)
		defer stop()
		lock, shut, err := t.open()
		if err != nil {
			return err
		}
		t.atEnd = shut
		if err := lock.ForceRelease(ctx, id, index); err != nil {
			return err
		}
		if t.json {
			t.printJSON(os.Stdout, map[string]any{"id": id, "index": index, "released": true})
			return nil
		}
		fmt.Printf("ended lease %d of %s; its holder hears of it at its next renewal\n", index, label(id))
		return nil
	}
}
