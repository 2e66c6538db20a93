package faults

import (
	"io"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// A name is an address behind which the server can change, as behind a virtual IP or
// a DNS name. Connections that stand stay where they are.
type name struct {
	listener net.Listener
	carriers sync.WaitGroup

	mu     sync.Mutex // guards what follows
	server string
	conns  map[string]net.Conn // to servers, by the address that the server sees
}

// newName returns a name of the server at addr. It ends with the test.
func newName(t *testing.T, addr string) *name {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	n := &name{listener: listener, server: addr, conns: make(map[string]net.Conn)}
	n.carriers.Go(n.accept)
	t.Cleanup(func() {
		_ = listener.Close()
		n.mu.Lock()
		for _, conn := range n.conns {
			_ = conn.Close()
		}
		n.mu.Unlock()
		n.carriers.Wait()
	})
	return n
}

func (n *name) addr() string { return n.listener.Addr().String() }

// move makes new connections go to the server at addr.
func (n *name) move(addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.server = addr
}

// owns reports whether a server sees one of the name's connections come from addr.
func (n *name) owns(addr string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.conns[addr] != nil
}

func (n *name) accept() {
	for {
		client, err := n.listener.Accept()
		if err != nil {
			return
		}
		n.carriers.Go(func() { n.carry(client) })
	}
}

// carry passes on what comes either way, until one end closes.
func (n *name) carry(client net.Conn) {
	defer client.Close() //nolint:errcheck // All that it had to say is said.
	n.mu.Lock()
	addr := n.server
	n.mu.Unlock()
	server, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	n.mu.Lock()
	n.conns[server.LocalAddr().String()] = server
	n.mu.Unlock()
	n.carriers.Go(func() {
		_, _ = io.Copy(server, client)
		_ = server.Close()
	})
	_, _ = io.Copy(client, server)
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, server.LocalAddr().String())
}
