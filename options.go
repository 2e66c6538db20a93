package redfour

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"
)

// An Option changes a default of [New] or [Open].
type Option func(*config) error

// config is what the options set.
type config struct {
	namespace   string
	replication replication
	maxHold     time.Duration // 0: no bound
	owner       string
	trace       Trace
	log         *slog.Logger
}

// maxNamespace is the longest namespace in bytes. It stands in front of every
// key, so a long one is a mistake rather than a wish.
const maxNamespace = 512

func newConfig(opts []Option) (config, error) {
	c := config{namespace: "lock", owner: thisProcess(), log: slog.New(slog.DiscardHandler)}
	for _, opt := range opts {
		if opt == nil {
			return config{}, errors.New("nil option")
		}
		if err := opt(&c); err != nil {
			return config{}, err
		}
	}
	return c, nil
}

// WithNamespace sets the prefix of all keys and channels, "lock" by default as
// in npm redfour. Locks exclude each other only within one namespace, and each
// namespace counts its own indexes.
//
// Do not use a namespace and the same with "-waiters" appended, or with a colon and more: they share the names of keys. In
// "orders" the id "a:42" is the lock of 42 in "orders:a".
//
// A namespace is non-empty valid UTF-8 of at most 512 bytes without control
// characters; [New] and [Open] return an error for any other. In a cluster it may have a "}" only in, or after, a hash tag,
// which keeps all of the namespace in one slot.
func WithNamespace(ns string) Option {
	return func(c *config) error {
		switch {
		case ns == "":
			return errors.New("empty namespace")
		case len(ns) > maxNamespace:
			return fmt.Errorf("namespace of %d bytes: at most %d are allowed", len(ns), maxNamespace)
		case !utf8.ValidString(ns):
			return fmt.Errorf("namespace %q is not valid UTF-8", ns)
		case strings.ContainsFunc(ns, unicode.IsControl):
			return fmt.Errorf("namespace %q contains a control character", ns)
		}
		c.namespace = ns
		return nil
	}
}

// WithReplicas makes a lease count only once n replicas of its master have acknowledged it, within timeout. [Lock.Acquire],
// [Lock.WaitAcquire] and [Lock.WithLock] confirm each lease before they return it, however it was got: they renew it,
// and ask with WAIT on the same connection. A lease that fewer have acknowledged by then is
// given back in the background, and the error matches [ErrNotReplicated]; a wait ends with it. Where there are fewer than n
// replicas that is so every time.
//
// It narrows what a failover can lose: a lease that was returned is kept if one of the replicas that acknowledged it is promoted. But Redis
// does not promise to promote one of those. An old master that is cut off from the others may
// go on with replicas on its side. Replicas acknowledge what they have in memory, not on disk. And renewals and releases are not waited for:
// after a failover a lease may end as it was last replicated, before its Deadline, or hold until then although it was released. So
// what must not be done twice needs fencing all the same.
//
// It costs each lease another round trip and the wait, and a connection of the client's pool meanwhile.
// The ttl of a lease must be longer than timeout. With npm redfour on the same locks, its leases are not confirmed.
//
// [New] and [Open] return an error if n is less than 1, timeout is shorter than 1 ms, or it is not shorter than the client's ReadTimeout, after
// which go-redis gives up on the connection.
func WithReplicas(n int, timeout time.Duration) Option {
	return func(c *config) error {
		switch {
		case n < 1:
			return fmt.Errorf("%d replicas to wait for: at least 1 is needed", n)
		case timeout < time.Millisecond:
			return fmt.Errorf("timeout %v to wait for replicas is shorter than 1ms", timeout)
		}
		c.replication = replication{n, timeout.Truncate(time.Millisecond)}
		return nil
	}
}

// WithMaxHold bounds for how long a lease is kept alive, so that a section that hangs
// does not hold its lock for ever. [Lock.WithLock] and [Lock.KeepAlive] renew a lease so
// that it ends in Redis d after it was acquired, plus the time that its acquisition took.
// Their context ends just before, at [Lease.Deadline] or earlier, with a cause that
// matches [ErrMaxHold] and [ErrNotHeld]. The lock is not released then, because the
// function of WithLock may still be running: the lease runs out, and the lock goes on as
// after a holder died. It counts, and is logged, as a lost lease.
//
// A lease that came from elsewhere counts from its first KeepAlive in this process. A
// [Lock.Renew] by the caller is not bounded: the lease then holds for the ttl of that,
// but the context ends all the same. A ttl longer than d is an error of [Lock.Acquire],
// [Lock.WaitAcquire] and WithLock. The bound is that of the Lock that keeps a lease
// alive; another Lock may have none. By default there is none.
//
// [New] and [Open] return an error for a d shorter than 1 ms.
func WithMaxHold(d time.Duration) Option {
	return func(c *config) error {
		if d < time.Millisecond {
			return fmt.Errorf("bound of %v on the hold is shorter than 1ms", d)
		}
		c.maxHold = d
		return nil
	}
}

// maxOwner is the longest owner in bytes. It stands in every lock, and in every queue.
const maxOwner = 256

// WithOwner sets what the [Lock] calls itself where it holds a lock, for people: [LockedError] and [Lock.Inspect] show it, in this
// process and in others. By default that is the program, the host and the process id: "billing on web-3 (pid 4121)". Nothing is ever
// decided by it, and npm clients do not see it. With "" nothing is stored.
//
// An owner is printable, not blank, and of at most 256 bytes; [New] and [Open] return an error for any other. Everybody who
// uses the same Redis can read it.
func WithOwner(owner string) Option {
	return func(c *config) error {
		if err := checkOwner(owner); err != nil {
			return err
		}
		c.owner = owner
		return nil
	}
}

func checkOwner(owner string) error {
	switch {
	case len(owner) > maxOwner:
		return fmt.Errorf("owner of %d bytes: at most %d are allowed", len(owner), maxOwner)
	case !utf8.ValidString(owner):
		return fmt.Errorf("owner %q is not valid UTF-8", owner)
	case strings.ContainsFunc(owner, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("owner %q contains what cannot be printed", owner)
	case owner != "" && strings.TrimSpace(owner) == "":
		return fmt.Errorf("owner %q is blank", owner)
	}
	return nil
}

// thisProcess is the owner where no option says another. What the system calls this host, or the program, may be nothing
// that can be an owner.
func thisProcess() string {
	host, err := os.Hostname()
	if err != nil {
		host = "?"
	}
	program := "?"
	if len(os.Args) > 0 { // It may be a library of a program in another language.
		program = filepath.Base(os.Args[0])
	}
	owner := fmt.Sprintf("%s on %s (pid %d)", program, host, os.Getpid())
	if checkOwner(owner) != nil {
		owner = fmt.Sprintf("pid %d", os.Getpid())
	}
	return owner
}

// WithLogger makes the [Lock] log the few events that whoever operates the service must see: a subscription that was lost (as a
// warning) and is there again (as an info); a lease that was lost, so that its section may have overlapped with another (a warning); and
// that the user lacks the rights for the queue, or the server the commands (a warning, every 30 s while somebody waits). Namespace, ids
// and indexes are logged, tokens never. By default nothing is. A handler that blocks holds up what a [Trace] would.
func WithLogger(l *slog.Logger) Option {
	return func(c *config) error {
		if l == nil {
			return errors.New("nil logger")
		}
		c.log = l
		return nil
	}
}

// A replication is how many replicas are to acknowledge a lease, and within what time. The zero replication asks for none.
type replication struct {
	replicas int
	timeout  time.Duration
}

// check returns an error if the client would not wait so long for an answer.
func (r replication) check(client redis.UniversalClient) error {
	var limit time.Duration // without one it is 0, or negative
	switch c := client.(type) {
	case *redis.Client:
		limit = c.Options().ReadTimeout
	case *redis.ClusterClient:
		limit = c.Options().ReadTimeout
	}
	if limit > 0 && r.timeout >= limit {
		return fmt.Errorf("timeout %v to wait for replicas is not shorter than the client's ReadTimeout of %v", r.timeout, limit)
	}
	return nil
}

// checkTTL returns an error if nothing would be left of a lease.
func (r replication) checkTTL(ttl time.Duration) error {
	if r.replicas > 0 && ttl.Truncate(time.Millisecond) <= r.timeout {
		return fmt.Errorf("ttl %v leaves no room to wait %v for replicas", ttl, r.timeout)
	}
	return nil
}
