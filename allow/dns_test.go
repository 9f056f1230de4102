package allow

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// server answers on loopback, by UDP and TCP, from records as text:
//
//	name. A 192.0.2.1 | name. CNAME other. | name. MX 10 host. | name. TXT text to the end | name. SERVFAIL
type server struct {
	mu      sync.Mutex
	records map[string][]string
	asked   map[string]int
}

func newServer(t *testing.T, zone string) (*server, *net.Resolver) {
	t.Helper()
	s := &server{asked: make(map[string]int)}
	s.set(zone)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := tcp.Addr().String()
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			if out := s.answer(buf[:n], 512); out != nil {
				_, _ = udp.WriteTo(out, from)
			}
		}
	})
	wg.Go(func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				r := bufio.NewReader(c)
				var size [2]byte
				if _, err := io.ReadFull(r, size[:]); err != nil {
					return
				}
				msg := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(r, msg); err != nil {
					return
				}
				out := s.answer(msg, 65535)
				_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
			})
		}
	})
	t.Cleanup(func() { udp.Close(); tcp.Close(); wg.Wait() })
	return s, &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, addr)
	}}
}

func (s *server) set(zone string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = make(map[string][]string)
	for line := range strings.Lines(zone) {
		if name, rest, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			s.records[name] = append(s.records[name], rest)
		}
	}
}

// answer answers one message; what is longer than most is cut off and marked.
func (s *server) answer(in []byte, most int) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(in)
	if err != nil {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	name := strings.ToLower(q.Name.String())
	s.asked[name]++
	msg := dnsmessage.Message{Header: dnsmessage.Header{ID: h.ID, Response: true, RecursionAvailable: true}, Questions: []dnsmessage.Question{q}}
	if _, ok := s.records[name]; !ok {
		msg.RCode = dnsmessage.RCodeNameError
	}
	at := q.Name
	for range 5 {
		next := ""
		for _, r := range s.records[strings.ToLower(at.String())] {
			kind, data, _ := strings.Cut(r, " ")
			rh := dnsmessage.ResourceHeader{Name: at, Class: dnsmessage.ClassINET, TTL: 60}
			add := func(t dnsmessage.Type, b dnsmessage.ResourceBody) {
				if t == q.Type || t == dnsmessage.TypeCNAME {
					rh.Type = t
					msg.Answers = append(msg.Answers, dnsmessage.Resource{Header: rh, Body: b})
				}
			}
			switch kind {
			case "A":
				add(dnsmessage.TypeA, &dnsmessage.AResource{A: netip.MustParseAddr(data).As4()})
			case "AAAA":
				add(dnsmessage.TypeAAAA, &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr(data).As16()})
			case "CNAME":
				next = data
				add(dnsmessage.TypeCNAME, &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(data)})
			case "MX":
				add(dnsmessage.TypeMX, &dnsmessage.MXResource{Pref: 10, MX: dnsmessage.MustNewName(data)})
			case "TXT":
				var parts []string
				for len(data) > 250 {
					parts, data = append(parts, data[:250]), data[250:]
				}
				add(dnsmessage.TypeTXT, &dnsmessage.TXTResource{TXT: append(parts, data)})
			case "SERVFAIL":
				msg.RCode = dnsmessage.RCodeServerFailure
			}
		}
		if next == "" {
			break
		}
		at = dnsmessage.MustNewName(next)
	}
	out, err := msg.Pack()
	if err != nil {
		return nil
	}
	if len(out) > most {
		msg.Answers, msg.Truncated = nil, true
		out, _ = msg.Pack()
	}
	return out
}
