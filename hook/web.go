package hook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/http/httpguts"
)

// Headers of a signed request.
const (
	// HeaderTime has the time of sending, in seconds of Unix.
	HeaderTime = "Smtpguard-Time"
	// HeaderSignature is "sha256=" and the HMAC-SHA256, in hexadecimal, of
	// HeaderTime's value, a full stop, and the body.
	HeaderSignature = "Smtpguard-Signature"
)

const (
	answerMost = 4 << 10 // bytes of an answer that are read
	secretMost = 4 << 10 // bytes of a file with a header or a secret
	hopsMost   = 3
)

// web sends the message as JSON by POST.
type web struct {
	c       Config
	version string
	client  *http.Client
}

func newWeb(c Config, version string) *web {
	t := &http.Transport{
		Proxy:       http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext, TLSHandshakeTimeout: 10 * time.Second,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		MaxResponseHeaderBytes: 16 << 10, DisableKeepAlives: true,
	}
	return &web{c, version, &http.Client{Transport: t, CheckRedirect: sameHost}}
}

// sameHost follows a redirect that stays where the policy wants the message:
// the header and the body are for nobody else.
func sameHost(req *http.Request, via []*http.Request) error {
	first := via[0].URL
	switch {
	case len(via) > hopsMost:
		return errors.New("too many redirects")
	case req.URL.Scheme != first.Scheme || req.URL.Host != first.Host:
		return errors.New("it redirects to another server, which is not followed")
	case req.Method != http.MethodPost:
		return errors.New("its redirect would lose the message (303 or the like, where 307 or 308 keeps it)")
	}
	return nil
}

func (w *web) send(ctx context.Context, m *Message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.c.URL, bytes.NewReader(body))
	if err != nil {
		return errors.New("the URL cannot be used")
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "smtpguard/"+word(w.version))
	if w.c.HeaderFile != "" {
		name, value, err := readHeader(w.c.HeaderFile)
		if err != nil {
			return err
		}
		req.Header.Set(name, value)
	}
	if w.c.SecretFile != "" {
		secret, err := readSecret(w.c.SecretFile)
		if err != nil {
			return err
		}
		at := strconv.FormatInt(time.Now().Unix(), 10)
		req.Header.Set(HeaderTime, at)
		req.Header.Set(HeaderSignature, Sign(secret, at, body))
	}
	res, err := w.client.Do(req)
	if err != nil {
		var ue *url.Error // has the URL, which may be a secret itself
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return fmt.Errorf("telling %s: %w", req.URL.Host, err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, answerMost))
	if res.StatusCode/100 == 2 {
		return nil // whatever else it says
	}
	if err != nil {
		return fmt.Errorf("%s answers %d, and then: %w", req.URL.Host, res.StatusCode, err)
	}
	return fmt.Errorf("%s answers %d: %s", req.URL.Host, res.StatusCode, printable(strings.TrimSpace(string(answer)), 200))
}

// Sign returns the value of HeaderSignature, for a HeaderTime of at.
func Sign(secret []byte, at string, body []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(at + "."))
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

// readHeader reads the "Name: value" in the first line of a file.
func readHeader(path string) (name, value string, err error) {
	data, err := readSecret(path)
	if err != nil {
		return "", "", err
	}
	name, value, ok := strings.Cut(string(data), ":")
	value = strings.TrimSpace(value)
	if !ok || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || value == "" {
		return "", "", fmt.Errorf("the first line of %s is not a header, as in \"Authorization: Bearer ...\"", path)
	}
	return name, value, nil
}

// readSecret reads the first line of a file. It does not wait for the writer
// of a pipe.
func readSecret(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, secretMost))
	if err != nil {
		return nil, err
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	if line = bytes.TrimRight(line, "\r"); len(line) == 0 {
		return nil, fmt.Errorf("the first line of %s is empty", path)
	}
	return line, nil
}
