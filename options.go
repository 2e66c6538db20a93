package redfour

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// An Option changes a default of [New] or [Open].
type Option func(*config) error

// config is what the options set.
type config struct {
	namespace string
}

// maxNamespace is the longest namespace in bytes. It stands in front of every
// key, so a long one is a mistake rather than a wish.
const maxNamespace = 512

func newConfig(opts []Option) (config, error) {
	c := config{namespace: "lock"}
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
// Do not use a namespace and the same with "-waiters" appended: they share the names of keys.
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
