package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/redfour-go/redfour"
)

const runHelp = `
It waits for the lock, runs the command, and releases the lock when the command has ended. Meanwhile the lease is renewed every third
of its ttl. The command finds the lock in its environment: REDFOUR_ID, REDFOUR_INDEX, a fencing token, greater than that of every lease
of the id before, and REDFOUR_TOKEN, the proof that it holds.

If the lease is lost (Redis could not be reached for a ttl, or lost its data, or an operator ended it), the command gets SIGTERM, and
SIGKILL after the grace period, because another may hold the lock by then. What it must not do twice should check the index.

Signals are passed on. Where there is no terminal the command has a process group of its own, and signals go to all of it. At a
terminal, which sends its Ctrl-C to everybody, they go to the command alone. When redfour is killed so that it can do nothing, Linux
kills the command, though not what that has started; the lock is free after a ttl.

A Redis that cannot be reached at first is an error after 5s. One that goes away later is waited for.

Examples:
  redfour run backup -- pg_dump -f /backup/db.sql db
  redfour run --try nightly-report -- ./report.sh              # exit with 75 if another host runs it
  redfour run --wait 10m --ttl 1m deploy -- make deploy        # give up after 10 minutes
  redfour run deploy -- sh -c './deploy --fence $REDFOUR_INDEX'
`

// A run is one call of "redfour run".
type run struct {
	*tool

	ttl, wait, grace time.Duration
	try, verbose     bool
	id               string
	argv             []string
	signals          chan os.Signal // to be passed on; filled by the signal package, closed by nobody
}

func newRun(t *tool, flags *flag.FlagSet) func(ctx context.Context, o operands) error {
	r := &run{tool: t, ttl: 30 * time.Second, grace: 5 * time.Second}
	flags.Var((*span)(&r.ttl), "ttl", "the `time` for which the lock outlives a redfour that cannot renew it, by default 30s")
	flags.Var((*span)(&r.wait), "wait", "the longest `time` to wait for the lock, by default as long as it takes")
	flags.BoolVar(&r.try, "try", false, "do not wait for the lock")
	flags.Var((*span)(&r.grace), "grace", "the `time` that the command has to end after the lease was lost, by default 5s")
	flags.BoolVar(&r.verbose, "verbose", false, "tell when it waits, gets and releases the lock")
	return r.do
}

// arguments sets the id and the command. An id that begins with a dash stands behind a "--" of its own.
func (r *run) arguments(o operands) error {
	if len(o.before) == 0 && len(o.after) > 1 && o.after[1] == "--" {
		o = operands{before: o.after[:1], after: o.after[2:], dashes: true}
	}
	if err := checkIDs(o.before); err != nil {
		return err
	}
	switch {
	case !o.dashes || len(o.before) > 1:
		return usage("the command goes behind a \"--\", and one ID before it")
	case len(o.after) == 0:
		return usage("there is no command behind the \"--\"")
	case r.try && r.wait > 0:
		return usage("--try does not wait, so that --wait makes no sense with it")
	}
	r.id, r.argv = o.before[0], o.after
	return nil
}

func (r *run) do(ctx context.Context, o operands) error {
	if err := r.arguments(o); err != nil {
		return err
	}
	path, err := exec.LookPath(r.argv[0])
	if err != nil {
		return notRunnable(err)
	}
	lock, shut, err := r.openAs(r.argv[0])
	if err != nil {
		return err
	}
	defer shut()
	r.signals = make(chan os.Signal, 16) // More at a time than anybody sends.
	signal.Notify(r.signals, passedOn()...)
	defer signal.Stop(r.signals)

	lease, err := r.acquire(ctx, lock)
	if err != nil {
		return err
	}
	kept, stop := lock.KeepAlive(ctx, lease)
	defer stop()
	ran := r.supervise(kept, path, lease)
	return r.settle(ran, context.Cause(kept), lock.Release(ctx, lease), lease)
}

// openAs opens a Lock whose owner is the command. Not every name of a program can be an owner.
func (r *run) openAs(program string) (*redfour.Lock, func(), error) {
	host, err := os.Hostname()
	if err == nil {
		owner := redfour.WithOwner(fmt.Sprintf("%s on %s (pid %d)", filepath.Base(program), host, os.Getpid()))
		if lock, shut, err := r.open(owner); err == nil {
			return lock, shut, nil
		}
	}
	return r.open()
}

// acquire takes the lock, unless a signal comes first.
func (r *run) acquire(ctx context.Context, lock *redfour.Lock) (*redfour.Lease, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		lease *redfour.Lease
		err   error
	}
	taken := make(chan result, 1)
	go func() {
		lease, err := r.take(ctx, lock)
		taken <- result{lease, err}
	}()
	select {
	case got := <-taken:
		return got.lease, got.err
	case sig := <-r.signals:
		cancel()
		if got := <-taken; got.err == nil {
			_ = lock.Release(ctx, got.lease) // If that fails, it ends after its ttl.
		}
		return nil, &failure{
			code: exitSignal + number(sig),
			err:  fmt.Errorf("the command has not run: the signal \"%v\" came before the lock %s", sig, label(r.id)),
		}
	}
}

// take tries once, so that a Redis that cannot be reached is an error and not a reason to wait, and then waits.
func (r *run) take(ctx context.Context, lock *redfour.Lock) (*redfour.Lease, error) {
	began := time.Now()
	if r.wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, r.wait)
		defer cancel()
	}
	lease, err := lock.Acquire(ctx, r.id, r.ttl)
	if locked, ok := errors.AsType[*redfour.LockedError](err); ok && !r.try {
		r.tell("waiting", map[string]any{"holder": locked.Owner}, "waits for %s, %v", label(r.id), locked)
		lease, err = lock.WaitAcquire(ctx, r.id, r.ttl)
	}
	if err == nil {
		waited := time.Since(began)
		r.tell("acquired", map[string]any{"index": lease.Index, "waited": waited.Milliseconds()},
			"holds %s with index %d, after %s", label(r.id), lease.Index, short(waited))
	}
	return lease, err
}

// tell tells what happens, if anybody wants to know.
func (r *run) tell(event string, fields map[string]any, format string, a ...any) {
	switch {
	case r.json:
		fields["event"], fields["id"] = event, r.id
		r.printJSON(os.Stderr, fields)
	case r.verbose:
		r.say(fmt.Sprintf(format, a...))
	}
}

// supervise runs the command until it has ended, and ends it when kept does. It returns a *failure that has the status of the command,
// or nil for success.
func (r *run) supervise(kept context.Context, path string, lease *redfour.Lease) error {
	p, err := start(path, r.argv, append(os.Environ(),
		"REDFOUR_ID="+lease.ID, "REDFOUR_INDEX="+strconv.FormatInt(lease.Index, 10), "REDFOUR_TOKEN="+lease.Token))
	if err != nil {
		return notRunnable(err)
	}
	lost := kept.Done()
	var graceOver <-chan struct{}
	for {
		select {
		case sig := <-r.signals:
			p.pass(sig)
		case <-lost:
			lost = nil
			r.tell("lost", map[string]any{"error": context.Cause(kept).Error()}, "lost %s, and ends the command", label(r.id))
			p.terminate()
			grace, cancel := context.WithTimeout(context.WithoutCancel(kept), r.grace)
			defer cancel()
			graceOver = grace.Done()
		case <-graceOver:
			p.kill()
			graceOver = nil
		case <-p.exited:
			if lost == nil {
				p.endRest(graceOver)
			}
			err := p.failure()
			r.tell("exited", map[string]any{"status": exitCode(err)}, "the command ended with %s", outcome(err))
			return err
		}
	}
}

// settle tells what the call as a whole came to, from how the command ended, why its context did, and how the release.
func (r *run) settle(ran, lost, released error, lease *redfour.Lease) error {
	switch {
	case lost == nil && errors.Is(released, redfour.ErrNotHeld):
		lost = released
		fallthrough
	case lost != nil:
		return &failure{
			code: exitLost,
			err:  fmt.Errorf("%s was lost, index %d, while the command ran, which ended with %s: %w", label(r.id), lease.Index, outcome(ran), lost),
		}
	case released != nil:
		r.complain(fmt.Errorf("%w; it ends by itself within %s", released, short(lease.Remaining())))
	default:
		r.tell("released", map[string]any{"index": lease.Index}, "released %s", label(r.id))
	}
	return ran
}

// outcome tells how the command ended.
func outcome(err error) string {
	if err == nil {
		return "success"
	}
	return err.Error()
}

func notRunnable(err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return &failure{code: exitNotFound, err: err}
	}
	return &failure{code: exitNotRunnable, err: err}
}

// number returns that of a signal.
func number(sig os.Signal) int {
	if s, ok := sig.(syscall.Signal); ok {
		return int(s)
	}
	return 0
}
