package main

import (
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
)

// A server is the Redis that the flags name, and the namespace there.
type server struct {
	url       string
	namespace string
	cluster   bool
}

func (s *server) flags(flags *flag.FlagSet) {
	flags.StringVar(&s.url, "url", "", "`URL` of the server, by default that in REDIS_URL, or redis://localhost:6379")
	flags.StringVar(&s.namespace, "namespace", "lock", "the `prefix` of all keys, by default \"lock\"")
	flags.BoolVar(&s.cluster, "cluster", false, "the server is one of a Redis Cluster")
}

// open returns a Lock on the server. Whoever calls it calls shut.
func (s *server) open(opts ...redfour.Option) (lock *redfour.Lock, shut func(), err error) {
	client, err := s.client()
	if err != nil {
		return nil, nil, err
	}
	lock, err = s.lock(client, opts...)
	if err != nil {
		_ = client.Close()
		return nil, nil, err
	}
	return lock, func() {
		_ = lock.Close()
		_ = client.Close()
	}, nil
}

// lock returns a Lock that works through a client of the server.
func (s *server) lock(client redis.UniversalClient, opts ...redfour.Option) (*redfour.Lock, error) {
	lock, err := redfour.New(client, append(opts, redfour.WithNamespace(s.namespace))...)
	if err != nil {
		return nil, &failure{code: exitUsage, err: err}
	}
	return lock, nil
}

// client returns a client of the server. Its errors repeat nothing of the URL, because that may be a password.
func (s *server) client() (redis.UniversalClient, error) {
	name, raw := "--url", s.url
	if raw == "" {
		name, raw = "REDIS_URL", os.Getenv("REDIS_URL")
	}
	if raw == "" {
		raw = "redis://localhost:6379"
	}
	client, err := dial(raw, s.cluster)
	if err != nil { // which may quote the password
		return nil, usage("the URL in %s is not understood", name)
	}
	return client, nil
}

func dial(raw string, cluster bool) (redis.UniversalClient, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, err
	}
	switch {
	case cluster:
		o, err := redis.ParseClusterURL(raw)
		if err != nil {
			return nil, err
		}
		if o.ReadTimeout == 0 {
			o.ReadTimeout = 2 * time.Second // for which go-redis may wait for the slots from a master that hangs
		}
		return redis.NewClusterClient(o), nil
	case u.Query().Has("master_name"):
		o, err := redis.ParseFailoverURL(raw)
		if err != nil {
			return nil, err
		}
		return redis.NewFailoverClient(o), nil
	default:
		o, err := redis.ParseURL(raw)
		if err != nil {
			return nil, err
		}
		return redis.NewClient(o), nil
	}
}

// A span is a flag for a time that is longer than none.
type span time.Duration

func (s *span) String() string { return time.Duration(*s).String() }

func (s *span) Set(text string) error {
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		return errors.New("a time is wanted, such as 500ms, 30s or 5m")
	case d < time.Millisecond:
		return errors.New("at least 1ms is needed")
	}
	*s = span(d)
	return nil
}

// label returns an id or an owner as it can be printed within a line. They may come from anywhere.
func label(text string) string {
	quoted := fmt.Sprintf("%q", text)
	if quoted == `"`+text+`"` {
		return text
	}
	return quoted
}

// printable returns a text without what could move the cursor of a terminal. A server may say anything.
func printable(text string) string {
	var b strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) || r == '\n' {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// short returns a time as people read it.
func short(d time.Duration) string {
	if d < time.Second {
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(100 * time.Millisecond).String()
}
