// Package crew counts goroutines, so that their owner can wait for them.
//
// It does what a sync.WaitGroup does, and two things that a WaitGroup does
// not allow: goroutines may be started while somebody waits, and the wait can
// be given up.
package crew

import "sync"

// A Crew is a set of running goroutines. The zero Crew is empty and ready.
type Crew struct {
	mu    sync.Mutex      // guards what follows
	n     int             // goroutines that run
	idles []chan struct{} // closed by the last goroutine that ends
}

// Start runs fn in a new goroutine of the crew.
func (c *Crew) Start(fn func()) {
	c.Join()
	go func() {
		// Deferred, so that a hook of the client that ends the goroutine
		// with runtime.Goexit does not leave it counted for ever.
		defer c.Leave()
		fn()
	}()
}

// Join counts the calling goroutine as one of the crew, until it calls Leave.
func (c *Crew) Join() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
}

// Leave ends what Join began.
func (c *Crew) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n--
	if c.n > 0 {
		return
	}
	for _, idle := range c.idles {
		close(idle)
	}
	c.idles = nil
}

// Idle returns a channel that is closed as soon as no goroutine runs.
func (c *Crew) Idle() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	idle := make(chan struct{})
	if c.n == 0 {
		close(idle)
	} else {
		c.idles = append(c.idles, idle)
	}
	return idle
}
