package allow

import (
	"context"
	"net"
	"strings"
	"testing"
)

// A resolver that is not there is said to be so, without the ports of our side.
func TestNobodyAnswers(t *testing.T) {
	gone, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := gone.LocalAddr().String()
	gone.Close()
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", addr)
	}}
	name, err := Parse("dns:mail.example.org")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Resolve(t.Context(), r, name)
	if err == nil || !strings.Contains(err.Error(), " does not answer (connection refused)") || strings.Contains(err.Error(), "udp") || !strings.Contains(err.Error(), "the resolver ") {
		t.Errorf("%v", err)
	}
}
