package metrics

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// What slow and greedy clients can have at most. A connection is for one
// request, so nobody keeps one for longer than the two timeouts.
const (
	connectionsMost = 16
	scrapesMost     = 4 // at the same time; the rest is told 503
	headerMost      = 8 << 10
	readFor         = 5 * time.Second
	writeFor        = 10 * time.Second
)

// Serve answers GET /metrics on l, until ctx ends; it closes l.
func (m *Metrics) Serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: scrapesMost, EnableOpenMetrics: true, ErrorHandling: promhttp.ContinueOnError}))
	srv := &http.Server{Handler: mux, ReadTimeout: readFor, WriteTimeout: writeFor,
		MaxHeaderBytes: headerMost, ErrorLog: log.New(io.Discard, "", 0)}
	srv.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	err := srv.Serve(netutil.LimitListener(l, connectionsMost))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
