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
	Lock   *redfour.Lock
	Closed func(ctx context.Context, month string) (bool, error)
	Bill   func(ctx context.Context, month string) error // must not happen twice
}

// CloseMonth closes a month, unless another process of the fleet has.
func (s *Service) CloseMonth(ctx context.Context, month string) error {
	return s.Lock.WithLock(ctx, "invoice:"+month, time.Minute, func(ctx context.Context, _ *redfour.Lease) error {
		// Look now: whoever held the lock before may have done it.
		if closed, err := s.Closed(ctx, month); closed || err != nil {
			return err
		}
		return s.Bill(ctx, month)
	})
}
