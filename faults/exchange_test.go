package faults

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExchange_keepsInStepHoweverTheBytesCome(t *testing.T) {
	const (
		hello  = "*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n"
		script = "*3\r\n$7\r\nevalsha\r\n$4\r\n*1\r\n\r\n$1\r\n0\r\n"
		server = "%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nmodules\r\n*0\r\n"
		reply  = "*3\r\n:1\r\n$-1\r\n$5\r\n+1\r\n2\r\n"
		push   = ">2\r\n+a\r\n_\r\n"
		denied = "-NOPERM no\r\n"
		pong   = "+PONG\r\n"
	)
	requests := hello + script + script + "PING\r\n"
	replies := server + push + reply + denied + push + pong
	for size := 1; size <= len(replies); size++ {
		p := new(proxy)
		p.answering.Store(true)
		x := &exchange{proxy: p}
		for rest := requests; rest != ""; rest = rest[min(size, len(rest)):] {
			x.request([]byte(rest[:min(size, len(rest))]))
		}
		var got string
		for rest := replies; rest != ""; rest = rest[min(size, len(rest)):] {
			got += string(x.reply([]byte(rest[:min(size, len(rest))])))
		}
		begin, ok := strings.CutPrefix(got, server+push)
		require.True(t, ok, got)
		instead, ok := strings.CutSuffix(begin, denied+push+pong)
		require.True(t, ok, got)
		if p.answered.Load() == 0 {
			require.Equal(t, reply, instead)
		} else {
			require.Contains(t, proxyErrors, instead)
		}
	}
}

func TestExchange_leavesSubscriptionsAlone(t *testing.T) {
	x := &exchange{proxy: new(proxy)}
	x.request([]byte("*2\r\n$9\r\nsubscribe\r\n$1\r\na\r\n*1\r\n$4\r\nPI"))
	const half = "*3\r\n$7\r\nmess"
	require.Equal(t, half, string(x.reply([]byte(half))))
}
