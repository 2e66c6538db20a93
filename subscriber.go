package redfour

import (
	"context"
	"errors"
	"maps"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/crew"
)

// How the waiting is paced.
const (
	longestLook   = 30 * time.Second        // a waiting id looks at its lock at least this often
	lookJitter    = 10 * time.Millisecond   // spreads the looks of many processes at an expiry
	abreast       = 256                     // so many ids look at the same time: each needs a goroutine for it
	abreastEach   = 16                      // the same of each bucket in a cluster: 4096 goroutines in all
	lookSpread    = 50 * time.Microsecond   // for each id that is to look after a resubscription
	shortestRetry = 50 * time.Millisecond   // after an attempt that failed
	longestRetry  = 2 * time.Second         // the same, after many
	idleTime      = 10 * time.Second        // the subscription outlives its last waiter by this
	pingEvery     = time.Second             // an otherwise silent subscription is checked this often
	silenceLimit  = 2500 * time.Millisecond // and is dead after this, which is more than two pings
	connectTime   = 5 * time.Second         // for connecting and subscribing
	resubscribe   = time.Second             // the longest pause between two tries to subscribe
	deniedPause   = 30 * time.Second        // a right that was refused is asked for again after this
	steadyTime    = 10 * time.Second        // a subscription that lived so long is replaced quickly
)

// A subscriber makes the callers of WaitAcquire wait, in lines (line.go), and hears what wakes
// them: releases, grants, and that the subscription stands (again).
//
// A line is registered before its first look, so that no release falls between the look
// and the wait: if the subscription stood, its message wakes the line; if not,
// the confirmation of the subscription does.
type subscriber struct {
	server *server
	crew   *crew.Crew
	events *events
	life   context.Context //nolint:containedctx // The Lock's own life, no request's.

	mu      sync.Mutex       // guards what follows, and every line
	lines   map[string]*line // by id
	waiters int              // in all of them
	entries int              // made so far
	ears    map[string]*ear  // by the address of their server in a cluster; elsewhere there is one at most, under ""
	heardBy map[*bucket]*ear // nil while it is being found out where a bucket is
	idle    *time.Timer      // closes the ears after the last line has gone; nil before the first
}

func newSubscriber(life context.Context, s *server, c *crew.Crew, e *events) *subscriber {
	return &subscriber{
		server: s, crew: c, events: e, life: life, lines: make(map[string]*line),
		ears: make(map[string]*ear), heardBy: make(map[*bucket]*ear),
	}
}

// waiting returns how many wait.
func (s *subscriber) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiters
}

// idleLocked is called when the last line has gone.
func (s *subscriber) idleLocked() {
	if len(s.heardBy) == 0 || s.life.Err() != nil {
		return
	}
	if s.idle == nil {
		s.idle = time.AfterFunc(idleTime, s.rest)
	} else {
		s.idle.Reset(idleTime)
	}
}

// rest closes the subscriptions if there is still nobody to wait for. The lines have left the queues
// before they went, so nothing is lost with it.
func (s *subscriber) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lines) > 0 {
		return
	}
	for _, e := range s.ears {
		e.close()
	}
	clear(s.ears)
	clear(s.heardBy)
}

// end makes every line clear up, now that life has ended.
func (s *subscriber) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ln := range s.lines {
		s.clearLocked(ln)
	}
	if s.idle != nil {
		s.idle.Stop()
	}
}

// wakeAll makes every line of a bucket look, but not all in the same moment.
func (s *subscriber) wakeAll(b *bucket) {
	for _, id := range s.wakeAllOf(b) {
		s.events.woken(id, bySubscription)
	}
}

// wakeAllOf returns whom it has woken.
func (s *subscriber) wakeAllOf(b *bucket) (woken []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	spread := time.Duration(len(s.lines)) * lookSpread
	for _, ln := range s.lines {
		if ln.bucket != b {
			continue
		}
		if ln.first() != nil {
			woken = append(woken, ln.id)
		}
		if ln.trying {
			s.wakeLocked(ln, false)
		} else if pause := mathrand.N(spread); pause < time.Until(ln.due) {
			s.lookInLocked(ln, pause)
			ln.woken = true
		}
	}
	return woken
}

// An ear is a subscription, and the goroutine that keeps it up. There is one for each server that has locks which
// somebody waits for: one in all, but in a cluster.
type ear struct {
	addr    string
	client  *redis.Client // of that server
	close   context.CancelFunc
	more    chan struct{}    // capacity 1, because one news is enough: buckets were added
	buckets map[*bucket]bool // heard by it; true once it hears grants: the inbox is confirmed. Guarded by subscriber.mu
}

// hearsLocked tells whether the member can be granted a lock of b.
func (s *subscriber) hearsLocked(b *bucket) bool {
	e := s.heardBy[b]
	return e != nil && e.buckets[b] && s.server.mayQueue()
}

// listenLocked sees to it that there is a subscription for b, now or soon. When it is
// confirmed, it wakes everybody, so nobody has to wait for it.
func (s *subscriber) listenLocked(b *bucket) {
	if _, ok := s.heardBy[b]; ok {
		return
	}
	s.heardBy[b] = nil
	if s.server.topology == nil {
		client, addr, _ := s.server.master(s.life, b) // of which it need not ask
		s.addLocked(b, client, addr)
		return
	}
	s.crew.Start(func() { s.settle(b) })
}

// settle finds out which server has b, and subscribes there.
func (s *subscriber) settle(b *bucket) {
	for pauses := (backoff{min: shortestRetry, max: resubscribe}); s.life.Err() == nil; sleep(s.life, s.life, pauses.next()) {
		client, addr, err := s.server.master(s.life, b)
		if err != nil {
			continue
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if e, wanted := s.heardBy[b]; wanted && e == nil {
			s.addLocked(b, client, addr)
		}
		return
	}
}

// addLocked makes the ear at addr hear b.
func (s *subscriber) addLocked(b *bucket, client *redis.Client, addr string) {
	if s.life.Err() != nil {
		return
	}
	e := s.ears[addr]
	if e == nil {
		e = s.newEarLocked(client, addr)
	}
	e.buckets[b] = false
	s.heardBy[b] = e
	select {
	case e.more <- struct{}{}:
	default: // it has been told
	}
}

func (s *subscriber) newEarLocked(client *redis.Client, addr string) *ear {
	ctx, cancel := context.WithCancel(s.life)
	e := &ear{addr: addr, client: client, close: cancel, more: make(chan struct{}, 1), buckets: make(map[*bucket]bool)}
	s.ears[addr] = e
	s.crew.Start(func() { s.listen(ctx, e) })
	return e
}

// listenAnewLocked replaces a subscription.
func (s *subscriber) listenAnewLocked(e *ear) {
	e.close()
	delete(s.ears, e.addr)
	for b := range e.buckets {
		s.addLocked(b, e.client, e.addr)
	}
}

// listen keeps up an ear until ctx ends, or everything that it heard is on other servers.
func (s *subscriber) listen(ctx context.Context, e *ear) {
	noShards, again, fell := false, false, false
	var refused time.Time // when the user was last found to have no right to the channels of the queue
	// Some services count no subscribers. There a new subscription helps nobody, and wakes every id.
	unchecked := backoff{min: pingEvery, max: longestLook}
	for pauses := (backoff{min: shortestRetry, max: resubscribe}); ctx.Err() == nil && s.follow(ctx, e); {
		n := &subscription{
			subscriber: s, ear: e, again: again, unchecked: unchecked.step, channels: make(map[string]channel),
		}
		n.plain = noShards || s.server.topology == nil
		n.releasesOnly = noShards || time.Since(refused) < deniedPause || !s.server.mayQueue()
		start := time.Now()
		err := s.server.inCluster(n.run(ctx))
		if ctx.Err() == nil {
			s.server.heard(err)
			if n.stood {
				again = true
				s.events.unsubscribed(e.addr, err)
			}
		}
		fell = fell && (n.releasesOnly || !n.stood)
		switch {
		case n.placed:
			unchecked.step = 0
		case n.misplaced:
			_ = unchecked.next()
		}
		// A closed subscription is our own doing, and is no reason to give up.
		denied := judge(err) == final && !errors.Is(err, redis.ErrClosed)
		switch {
		case denied && !n.releasesOnly:
			refused = time.Now() // Perhaps the user has a right to the first channel alone.
			if redis.IsPermissionError(err) && !fell {
				fell = true
				s.events.fellBack(err.Error())
			}
			continue
		case !n.plain && unknownCommand(err):
			noShards = true
			s.events.fellBack(err.Error())
			continue
		}
		noShards = false // The server may have been replaced by one that knows more.
		if time.Since(start) > steadyTime || errors.Is(err, errMoved) {
			pauses.step = 0 // Many slots may move, one after another, and what stays is not heard meanwhile.
		}
		pause := pauses.next()
		if denied {
			pause = deniedPause
		}
		sleep(ctx, ctx, pause)
	}
}

// follow gives the buckets that are on other servers now to the ears there. It returns false if none is left; the ear has
// ended then.
func (s *subscriber) follow(ctx context.Context, e *ear) bool {
	if s.server.topology == nil {
		return true
	}
	for _, b := range s.bucketsOf(e) {
		client, addr, err := s.server.master(ctx, b)
		if err != nil {
			continue
		}
		s.mu.Lock()
		switch {
		case s.heardBy[b] != e:
		case addr == e.addr:
			e.client = client // Go-redis closes that of a server which has left, and makes another when it is back.
		default:
			delete(e.buckets, b)
			s.addLocked(b, client, addr)
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(e.buckets) > 0 || s.ears[e.addr] != e {
		return true
	}
	delete(s.ears, e.addr)
	e.close()
	return false
}

// A subscription is one connection of an ear, from its beginning to its end.
//
// The connection is used once: go-redis repairs it silently when it breaks, and
// then nobody learns that messages were lost.
type subscription struct {
	subscriber *subscriber
	ear        *ear
	pubsub     *redis.PubSub
	plain      bool // channels belong to no slot: there is no cluster, or its server does not know better (Redis 6)
	again      bool // another stood before
	stood      bool // everything was confirmed that was asked for at first; of the goroutine that receives

	unchecked time.Duration // at its beginning, while it is not asked where the subscription is
	placed    bool          // it was counted where the scripts run; of checkOn
	misplaced bool          // it was closed because it was not counted there; of checkOn

	mu           sync.Mutex         // guards what follows
	releasesOnly bool               // no grants, as long as the right to them is refused
	channels     map[string]channel // that it has asked for
	asked        int                // buckets whose channels are not confirmed yet
}

// A channel is what a subscription knows of one.
type channel struct {
	bucket *bucket
	inbox  bool
	last   bool // when it is confirmed, all of its bucket are
}

// run lives as long as the subscription, and returns why it ended.
func (n *subscription) run(ctx context.Context) error {
	var helpers sync.WaitGroup
	defer helpers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer n.subscriber.deafen(n.ear)
	n.pubsub = n.ear.client.Subscribe(ctx) // to no channel: this does not connect yet
	if n.subscriber.server.topology != nil {
		helpers.Go(func() { n.lookAround(ctx) })
	}
	err := n.add(ctx)
	if errors.Is(err, redis.ErrClosed) {
		// The client is closed, for the subscription itself is not before checkOn runs. The next
		// attempt of each line ends its waits. (A cluster's client closes those of servers that left.)
		for _, b := range n.subscriber.bucketsOf(n.ear) {
			n.subscriber.wakeAll(b)
		}
	}
	// Only now, because a ping would wait for the connection beyond its own time,
	// and then break it.
	helpers.Go(func() { n.checkOn(ctx) })
	for err == nil {
		var message any
		message, err = receive(ctx, n.pubsub)
		if _, refused := errors.AsType[redis.Error](err); refused && n.confirmed() {
			err = nil // the answer to a ping: the connection lives
		}
		switch m := message.(type) {
		case *redis.Subscription:
			if strings.HasSuffix(m.Kind, "unsubscribe") {
				return errMoved
			}
			n.confirm(m.Channel)
			if !n.stood && n.confirmed() {
				n.stood = true
				n.subscriber.events.subscribed(n.ear.addr, n.again)
			}
		case *redis.Message:
			n.hear(m)
		}
	}
	return err
}

// lookAround gives the buckets of the ear to others while its server does not answer: that may hang, and another may have become the
// master long before the client gives up.
func (n *subscription) lookAround(ctx context.Context) {
	for sleep(ctx, ctx, pingEvery) && !n.confirmed() {
		n.subscriber.server.topology.client.ReloadState(ctx)
		n.subscriber.follow(ctx, n.ear)
	}
}

// add subscribes to the channels of the buckets that were added to the ear. Those of a bucket are in one slot, and a command may
// name no others.
func (n *subscription) add(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	for _, b := range n.subscriber.bucketsOf(n.ear) {
		asked := n.register(b)
		if asked == nil {
			continue
		}
		if err := n.subscribe(ctx, asked); err != nil {
			return err
		}
	}
	return nil
}

// subscribe asks for channels of one bucket.
func (n *subscription) subscribe(ctx context.Context, channels []string) error {
	if n.plain {
		return n.pubsub.Subscribe(ctx, channels...)
	}
	return n.pubsub.SSubscribe(ctx, channels...)
}

// register returns the channels of a bucket, if the subscription has not asked for them. The last, if there are
// several, is the inbox.
func (n *subscription) register(b *bucket) []string {
	all := n.channelsOf(b)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.releasesOnly {
		all = all[:1]
	}
	if _, done := n.channels[all[0]]; done {
		return nil
	}
	for i, name := range all {
		n.channels[name] = channel{bucket: b, inbox: i == 2, last: i == len(all)-1}
	}
	n.asked++
	return all
}

func (n *subscription) channelsOf(b *bucket) []string {
	return []string{b.releases(), b.census(), n.subscriber.server.inbox(b)}
}

// askForMore asks for the channels of the queue again, over the same connection, so that
// no message is missed meanwhile. A refusal is read as the answer to a ping is.
func (n *subscription) askForMore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pingEvery)
	defer cancel()
	for _, b := range n.subscriber.bucketsOf(n.ear) {
		more := n.channelsOf(b)[1:]
		n.mu.Lock()
		for i, name := range more {
			n.channels[name] = channel{bucket: b, inbox: i == 1}
		}
		n.mu.Unlock()
		if err := n.subscribe(ctx, more); err != nil {
			return err
		}
	}
	return nil
}

// lacksGrants reports whether the subscription hears of no grants.
func (n *subscription) lacksGrants() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.releasesOnly
}

// confirmed tells whether nothing that was asked for may still be refused.
func (n *subscription) confirmed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked == 0
}

func (n *subscription) channel(name string) channel {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.channels[name]
}

// confirm takes the confirmation of a channel.
func (n *subscription) confirm(name string) {
	c := n.channel(name)
	if !c.last && !c.inbox {
		return
	}
	n.mu.Lock()
	if c.last {
		n.asked--
	}
	n.releasesOnly = n.releasesOnly && !c.inbox
	n.mu.Unlock()
	if c.inbox {
		n.subscriber.hearsNow(n.ear, c.bucket)
	}
	n.subscriber.wakeAll(c.bucket)
}

func (n *subscription) hear(m *redis.Message) {
	c := n.channel(m.Channel)
	if c.bucket == nil {
		return
	}
	if c.inbox {
		if g, ok := c.bucket.parseGrant(m.Payload); ok {
			n.subscriber.hear(n.ear, c.bucket, g)
		}
	} else if id, ok := c.bucket.id(m.Payload); ok {
		if n.subscriber.released(id) {
			n.subscriber.events.woken(id, byMessage)
		}
	}
}

func (s *subscriber) bucketsOf(e *ear) []*bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(e.buckets))
}

func (s *subscriber) hearsNow(e *ear, b *bucket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := e.buckets[b]; ok {
		e.buckets[b] = true
	}
}

// deafen says that an ear hears nothing any more.
func (s *subscriber) deafen(e *ear) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := range e.buckets {
		e.buckets[b] = false
	}
}

// someHeard returns a bucket of whose grants the ear hears, nil if there is none.
func (s *subscriber) someHeard(e *ear) *bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b, hears := range e.buckets {
		if hears {
			return b
		}
	}
	return nil
}

// receive waits for one message, or the answer to a ping. It is bounded by ctx,
// because go-redis connects again before it returns an error.
func receive(ctx context.Context, pubsub *redis.PubSub) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, silenceLimit)
	defer cancel()
	return pubsub.Receive(ctx)
}

// checkOn pings the subscription, so that a connection that died silently is
// noticed by whoever receives from it, adds what is to be heard as well, and closes it when ctx ends.
//
// It also closes one that is not on the server that runs the scripts. When a name moves,
// or after a failover, the client sends commands to the new master at once. The old master
// keeps its subscribers for seconds or for ever, and grants nothing.
func (n *subscription) checkOn(ctx context.Context) {
	defer n.pubsub.Close() //nolint:errcheck // It is given up, or broken already.
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	began := time.Now()
	placed := make(chan bool, 1) // sent to by the one who asks, who need not wait
	refused := time.Now()        // at the latest, if the user may not hear of grants
	for asks := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-n.ear.more:
			if n.add(ctx) != nil {
				return
			}
		case <-ticker.C:
			lacks, mayQueue := n.lacksGrants(), n.subscriber.server.mayQueue()
			if n.ping(ctx) != nil || !lacks && !mayQueue {
				return // The others must not take it for one who can be handed a lock.
			}
			// One ping earlier, so that it is not later than the pause. A server of a cluster without channels of
			// its slots hands nothing over.
			again := time.Since(refused)+pingEvery >= deniedPause && (n.subscriber.server.topology == nil || !n.plain)
			if lacks && mayQueue && again && n.confirmed() {
				refused = time.Now()
				if n.askForMore(ctx) != nil {
					return
				}
			}
			if b := n.subscriber.someHeard(n.ear); !asks && b != nil && time.Since(began) >= n.unchecked {
				asks = true
				// Beside this, because a server that hangs does not answer for longer than the subscription waits for it.
				n.subscriber.crew.Start(func() { placed <- n.subscriber.server.hears(ctx, b) })
			}
		case ok := <-placed:
			asks = false
			if !ok {
				n.misplaced = true
				return
			}
			n.placed = true
		}
	}
}

func (n *subscription) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pingEvery)
	defer cancel()
	return n.pubsub.Ping(ctx)
}
