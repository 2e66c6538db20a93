// Package invoice is a service with a section that runs in one process at a time. It is here for its test, which needs no Redis
// and no time.
package invoice

import (
	"context"
	"time"

	"github.com/redfour-go/redfour"
)

// A Service closes the books of a month.
type Service struct {
	Lock *redfour.Lock
	Bill func(ctx context.Context, month string) error // must not happen twice at a time
}

// Close closes a month, when no other process of the fleet does so.
func (s *Service) Close(ctx context.Context, month string) error {
	return s.Lock.WithLock(ctx, "invoice:"+month, time.Minute, func(ctx context.Context, _ *redfour.Lease) error {
		return s.Bill(ctx, month)
	})
}
