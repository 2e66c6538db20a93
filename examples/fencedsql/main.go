// Command fencedsql shows how a database refuses a write that comes too late. A holder of the lock is frozen: by garbage collection, a
// suspended virtual machine, a slow disk. Its lease ends, another takes the lock and writes, and then the first wakes up and writes as
// well. No lock can prevent that; the row can, because it remembers the highest index under which it was written.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/internal/demo"
)

var (
	errStale = errors.New("written under a later lease already")
	errNoRow = errors.New("no such token")
)

func main() { demo.Main("fencedsql", run) }

func run(ctx context.Context, run *demo.Run) (err error) {
	db, err := openDatabase(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	// Each stands for a process.
	frozen, err := redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner("frozen"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, frozen.Close()) }()
	other, err := redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner("other"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, other.Close()) }()

	lease, err := frozen.Acquire(ctx, "token:42", 500*time.Millisecond)
	if err != nil {
		return err
	}
	run.Say("frozen", "got index %d, and freezes", lease.Index) // Nothing renews the lease now.

	err = other.WithLock(ctx, "token:42", 10*time.Second, func(ctx context.Context, lease *redfour.Lease) error {
		run.Say("other", "got index %d when that lease had ended", lease.Index)
		if err := save(ctx, db, "42", "new", lease.Index); err != nil {
			return err
		}
		run.Say("other", "wrote: 1 row changed")
		return nil
	})
	if err != nil {
		return err
	}

	// It does not look at the clock, lease.Remaining() or a context: it was about to write when it froze.
	err = save(ctx, db, "42", "old", lease.Index)
	run.Say("frozen", "wakes up, and writes: %v", err)
	if !errors.Is(err, errStale) {
		return errors.Join(errors.New("a late write was not refused"), err)
	}
	err = save(ctx, db, "43", "old", lease.Index)
	run.Say("frozen", "writes a token that does not exist: %v", err)
	if !errors.Is(err, errNoRow) {
		return errors.Join(errors.New("a missing row was not noticed"), err)
	}
	err = frozen.Release(ctx, lease)
	run.Say("frozen", "releases: %v", err)
	if !errors.Is(err, redfour.ErrNotHeld) {
		return errors.Join(errors.New("a lease that had ended was released"), err)
	}

	var value string
	if err := db.QueryRowContext(ctx, "SELECT value FROM tokens WHERE id = '42'").Scan(&value); err != nil {
		return err
	}
	if value != "new" {
		return fmt.Errorf("the token is %q", value)
	}
	fmt.Println("\nThe late write changed nothing.")
	return nil
}

func openDatabase(ctx context.Context) (*sql.DB, error) {
	db, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1) // Each connection would have a database of its own.
	_, err = db.ExecContext(ctx, `
		CREATE TABLE tokens (id text PRIMARY KEY, value text NOT NULL, fence bigint NOT NULL DEFAULT 0);
		INSERT INTO tokens (id, value) VALUES ('42', 'initial');`)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// save writes a token, under the lease with the given index. It returns errStale if a later lease has written it already.
func save(ctx context.Context, db *sql.DB, id, value string, index int64) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after Commit

	// The row is looked for and changed in one statement: fence cannot grow in between.
	result, err := tx.ExecContext(ctx, "UPDATE tokens SET value = ?1, fence = ?2 WHERE id = ?3 AND fence <= ?2", value, index, id)
	if err != nil {
		return err
	}
	changed, err := result.RowsAffected()
	if err != nil {
		return err
	}
	if changed == 0 {
		return whyUnchanged(ctx, tx, id, index)
	}
	return tx.Commit()
}

// whyUnchanged tells a row with a later fence from none: both are 0 rows changed.
func whyUnchanged(ctx context.Context, tx *sql.Tx, id string, index int64) error {
	var fence int64
	err := tx.QueryRowContext(ctx, "SELECT fence FROM tokens WHERE id = ?1", id).Scan(&fence)
	if errors.Is(err, sql.ErrNoRows) {
		return errNoRow
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("0 rows changed: %w: index %d, not %d", errStale, fence, index)
}
