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
It waits for the lock, runs the command, and releases the lock when the command itself has ended, even if that has left something in the
background. Meanwhile the lease is renewed every third of its ttl. The command finds the lock in its environment: REDFOUR_ID,
REDFOUR_INDEX, a fencing token, greater than that of every lease of the id before, and REDFOUR_TOKEN, the proof that it holds.

If the lease is lost (Redis could not be reached for a ttl, or lost its data, or an operator ended it), the command gets SIGTERM, and
SIGKILL after the grace period. Another may hold the lock by then, so for that long two may be at work. If the command must not do
something twice, let what it changes check the index.

That two do not run at a time does not keep one from running after the other. For a job that is to run once in the fleet, whose hosts
start it at slightly different times, name the lock after the time and use --keep with a ttl longer than the clocks differ.

Signals are passed on. The command has a process group of its own, and they go to all of it; what a signal has told to end has the grace
period to do so before the lock is released. But in the foreground of a terminal the command shares the group of redfour: Ctrl-C and
Ctrl-\ reach it from there, all other signals go to the command alone, and what it has started is not ended with it. Ctrl-Z stops
redfour as well, and the lease ends after a ttl. What leaves the group (setsid) or its user (sudo) cannot be ended.

When redfour is killed so that it can do nothing, Linux kills the command, though not what that has started; other systems leave it
running without the lock. Windows knows no SIGTERM: there the command is killed at once.

A Redis that cannot be reached at first is an error after 5s; redfour then takes up to 5s to give back what may still come. One that
goes away later is waited for.

Examples:
  redfour run backup -- pg_dump -f /backup/db.sql db
  redfour run --try --keep --ttl 10m report-$(date +%F) -- ./report.sh   # once in the fleet; 75 where another host has it
  redfour run --wait 10m --ttl 1m deploy -- make deploy                  # give up after 10 minutes
  redfour run deploy -- sh -c './deploy --fence $REDFOUR_INDEX'
`

// A run is one call of "redfour run".
type run struct {
	*tool

	ttl, wait, grace time.Duration
	try, keep        bool
	verbose          bool
	id               string
	argv             []string
	signals          chan os.Signal // to be passed on; filled by the signal package, closed by nobody
}

func newRun(t *tool, flags *flag.FlagSet) func(ctx context.Context, o operands) error {
	r := &run{tool: t, ttl: 30 * time.Second, grace: 5 * time.Second}
	flags.Var((*span)(&r.ttl), "ttl", "the `time` for which the lock outlives a redfour that cannot renew it, by default 30s")
	flags.Var((*span)(&r.wait), "wait", "the longest `time` to wait for the lock, by default as long as it takes")
	flags.BoolVar(&r.try, "try", false, "do not wait for the lock")
	flags.Var((*span)(&r.grace), "grace", "the `time` that the command has to end once it was told to, by default 5s")
	flags.BoolVar(&r.keep, "keep", false, "keep the lock for another ttl after the command has succeeded")
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
	r.atEnd = shut
	r.signals = make(chan os.Signal, 16) // More at a time than anybody sends.
	signal.Notify(r.signals, passedOn()...)
	defer signal.Stop(r.signals)
	ignoreBrokenPipe()

	began := time.Now()
	lease, err := r.acquire(ctx, lock)
	if err != nil {
		return err
	}
	kept, stop := lock.KeepAlive(ctx, lease)
	defer stop()
	r.tell("acquired", map[string]any{"index": lease.Index, "waited": time.Since(began).Milliseconds()},
		"holds %s with index %d, after %s", label(r.id), lease.Index, short(time.Since(began)))
	ran := r.supervise(kept, path, lease)
	lost, left := context.Cause(kept), lease.Remaining()
	if r.keep && ran == nil {
		stop()
		return r.settle(ran, lost, lock.Renew(ctx, lease, r.ttl), left, lease)
	}
	return r.settle(ran, lost, lock.Release(ctx, lease), left, lease)
}

// ignoreBrokenPipe lets redfour live on when nobody reads what it says. The command does not inherit that.
func ignoreBrokenPipe() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// openAs opens a Lock whose owner is the command. Not every name of a program can be an owner.
func (r *run) openAs(program string) (*redfour.Lock, func(), error) {
	host, err := os.Hostname()
	if err == nil {
		owner := redfour.WithOwner(fmt.Sprintf("%s by redfour on %s (pid %d)", filepath.Base(program), host, os.Getpid()))
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
			_ = lock.Release(context.WithoutCancel(ctx), got.lease) // If that fails, it ends after its ttl.
		}
		return nil, signaled(sig, "the command had not run, for want of "+label(r.id)+",")
	}
}

// take tries once, so that a Redis that cannot be reached is an error and not a reason to wait, and then waits.
func (r *run) take(ctx context.Context, lock *redfour.Lock) (*redfour.Lease, error) {
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
	if errors.Is(err, redfour.ErrNotHeld) {
		err = &failure{code: exitUnavailable, err: err} // It came when its ttl was over, and the command has not run.
	}
	return lease, err
}

// tell tells what happens, if anybody wants to know.
func (r *run) tell(event string, fields map[string]any, format string, a ...any) {
	if r.json || r.verbose {
		r.warn(event, fields, fmt.Sprintf(format, a...))
	}
}

// warn tells what happens, in any case.
func (r *run) warn(event string, fields map[string]any, text string) {
	if !r.json {
		r.say(text)
		return
	}
	fields["event"], fields["id"] = event, r.id
	r.printJSON(os.Stderr, fields)
}

// supervise runs the command until it has ended, and ends it when kept does. It returns a *failure that has the status of the command,
// or nil for success.
//
// What it says may have to wait for whoever reads it. Nothing waits for that which ends the command.
func (r *run) supervise(kept context.Context, path string, lease *redfour.Lease) error {
	select {
	case sig := <-r.signals:
		return signaled(sig, "the command had not run")
	case <-kept.Done():
		return errNotStarted
	default:
	}
	p, err := start(path, r.argv, append(os.Environ(),
		"REDFOUR_ID="+lease.ID, "REDFOUR_INDEX="+strconv.FormatInt(lease.Index, 10), "REDFOUR_TOKEN="+lease.Token))
	if err != nil {
		return notRunnable(err)
	}
	lost := kept.Done()
	ending := false // a signal has told the command to end
	var graceOver <-chan struct{}
	for {
		select {
		case sig := <-r.signals:
			p.pass(sig)
			ending = ending || ends(sig)
		case <-lost:
			lost, ending = nil, true
			err := p.terminate()
			graceOver = after(r.grace)
			go r.tellLoss(context.Cause(kept), err) // ends with redfour at the latest
		case <-graceOver:
			_ = p.kill() // If it may not, that was told when it could not terminate it.
			graceOver = nil
		case <-p.exited:
			if _, signaled := p.signal(); lost != nil && (ending || signaled) {
				graceOver = after(r.grace)
			}
			if graceOver != nil {
				r.endOthers(p, graceOver)
			}
			return p.failure()
		}
	}
}

// after returns a channel that is closed when so much time has passed.
func after(d time.Duration) <-chan struct{} {
	over := make(chan struct{})
	time.AfterFunc(d, func() { close(over) })
	return over
}

// tellLoss tells that the lease was lost, and whether the command could be told.
func (r *run) tellLoss(why, failed error) {
	text := fmt.Sprintf("%s was lost, and the command is told to end: %v", label(r.id), why)
	if failed != nil {
		text = fmt.Sprintf("%s was lost, and the command CANNOT be told to end (%v): %v", label(r.id), failed, why)
	}
	r.warn("lost", map[string]any{"error": text}, text)
}

// endOthers waits for the others in the command's group until the grace period is over, and then kills them: they may still be at
// what the lock is for. The lease is kept alive meanwhile, if it was not lost.
func (r *run) endOthers(p *process, graceOver <-chan struct{}) {
	look := time.NewTicker(20 * time.Millisecond) // Nobody tells when they end.
	defer look.Stop()
	for p.others() {
		select {
		case <-look.C:
		case sig := <-r.signals:
			p.pass(sig)
		case <-graceOver:
			_ = p.kill()
			return
		}
	}
}

// settle tells what the call as a whole came to, from how the command ended, why its context did, how the release went, or
// the renewal in its place, and for how long the lease was certain before.
func (r *run) settle(ran, lost, released error, left time.Duration, lease *redfour.Lease) error {
	if f, ok := errors.AsType[*failure](ran); !ok || f.silent {
		r.tell("exited", map[string]any{"status": exitCode(ran)}, "the command ended with %s", outcome(ran))
	}
	switch {
	case lost == nil && errors.Is(released, redfour.ErrNotHeld):
		lost = released
		fallthrough
	case lost != nil && !errors.Is(ran, errNotStarted):
		return &failure{
			code: exitLost,
			err:  fmt.Errorf("%s was lost, index %d, while the command ran, which ended with %s: %w", label(r.id), lease.Index, outcome(ran), lost),
		}
	case lost != nil:
		return &failure{code: exitLost, err: fmt.Errorf("%s was lost, index %d, before the command was started: %w", label(r.id), lease.Index, lost)}
	case released != nil:
		r.warn("not released", map[string]any{"index": lease.Index, "error": released.Error()},
			fmt.Sprintf("%v; the lease ends by itself, in %s or so", released, short(left)))
	case r.keep && ran == nil:
		r.tell("kept", map[string]any{"index": lease.Index}, "keeps %s for %s", label(r.id), short(r.ttl))
	default:
		r.tell("released", map[string]any{"index": lease.Index}, "released %s", label(r.id))
	}
	return ran
}

// errNotStarted says that the lease was over before the command was started.
var errNotStarted error = &failure{code: exitLost, err: errors.New("not started")}

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
