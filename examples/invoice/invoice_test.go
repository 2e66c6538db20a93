package invoice_test

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/invoice"
)

// Another process has begun to close the month, and died: its lease ends after a minute.
func TestCloseMonth_afterAnotherDied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := miniredis.NewMiniRedis()
		server.ClockTTL(true) // leases end by the clock of the bubble
		defer server.Close()
		client := redis.NewClient(&redis.Options{
			Addr:   "127.0.0.1:6379", // no name, because looking that up leaves the bubble
			Dialer: func(context.Context, string, string) (net.Conn, error) { return server.Dial() },
		})
		defer func() { _ = client.Close() }()
		lock, err := redfour.New(client)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = lock.Close() }()
		if _, err := lock.Acquire(t.Context(), "invoice:2026-11", time.Minute); err != nil {
			t.Fatal(err)
		}

		start, closed := time.Now(), ""
		service := &invoice.Service{
			Lock:   lock,
			Closed: func(_ context.Context, month string) (bool, error) { return closed == month, nil },
			Bill:   func(_ context.Context, month string) error { closed += month; return nil },
		}
		for range 2 { // The second finds it done.
			if err := service.CloseMonth(t.Context(), "2026-11"); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(start); closed != "2026-11" || waited < time.Minute || waited > time.Minute+time.Second {
			t.Errorf("closed %q after %v", closed, waited)
		}
	})
}

func TestREADME_showsTheTest(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("invoice_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(source), "// Another process")
	shown, _, _ := strings.Cut(text, "\nfunc TestREADME")
	if !strings.Contains(string(readme), "// Another process"+shown) {
		t.Error("the README shows another test than this")
	}
}
