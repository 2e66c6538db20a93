// Command handoff takes a lease in the handler of an HTTP request and hands it to a worker in another process, which works on under it
// when the request has long been answered. Whoever asks for the same meanwhile is refused. The handler and the worker are in
// reports.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/internal/demo"
)

func main() { demo.Main("handoff", run) }

func run(ctx context.Context, run *demo.Run) (err error) {
	queue := make(chan []byte, 1) // stands for one outside the process
	h := &handler{run: run, queue: queue}
	h.lock, err = redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner("web-1"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.lock.Close()) }()
	routes := http.NewServeMux()
	routes.Handle("POST /reports/{id}", h)
	server := httptest.NewServer(routes)
	defer server.Close()
	w := &worker{run: run, finish: make(chan struct{})}
	w.lock, err = redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner("worker-1"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.lock.Close()) }()

	v := &visitor{run: run, url: server.URL}
	if err := v.order(ctx, "42", http.StatusAccepted); err != nil {
		return err
	}
	if err := v.order(ctx, "42", http.StatusConflict); err != nil {
		return err
	}
	if err := v.order(ctx, "43", http.StatusServiceUnavailable); err != nil {
		return err
	}
	status, err := h.lock.Inspect(ctx, "report:43")
	if err != nil {
		return err
	}
	if status.Held {
		return errors.New("a lease that could not be handed over was left behind")
	}

	done := make(chan error, 1) // from the goroutine that works, when it has ended
	go func() { done <- w.work(ctx, <-queue) }()
	select {
	case <-time.After(leaseTTL):
		err = v.order(ctx, "42", http.StatusConflict)
		close(w.finish)
	case <-ctx.Done():
	}
	if err := errors.Join(err, <-done); err != nil {
		return err
	}
	if err := v.order(ctx, "42", http.StatusAccepted); err != nil {
		return err
	}
	if err := w.work(ctx, <-queue); err != nil {
		return err
	}
	fmt.Println("\n2 reports, one after the other.")
	return nil
}

// A visitor orders reports.
type visitor struct {
	run *demo.Run
	url string
}

func (v *visitor) order(ctx context.Context, id string, want int) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, v.url+"/reports/"+id, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(response.Body)
	if err := errors.Join(err, response.Body.Close()); err != nil {
		return err
	}
	v.run.Say("visitor", "orders report %s: %s", id, strings.TrimRight(response.Status+", "+string(text), ", \n"))
	if response.StatusCode != want {
		return fmt.Errorf("report %s: %s, want %d", id, response.Status, want)
	}
	return nil
}
