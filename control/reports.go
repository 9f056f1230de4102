package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
)

// Reports is what the socket offers of the abuse reports. *Client is one, and
// Desk makes one of an *abuse.Desk. The names of operators that are passed to
// a Client are not sent, since the daemon asks the kernel.
type Reports interface {
	// Reports lists the cases without the long lists of their evidence.
	Reports(ctx context.Context) ([]abuse.Case, error)
	// Report returns one case and the message of its newest mail. ShowReport
	// does so for a person, who may then approve what is shown.
	Report(ctx context.Context, id string) (abuse.Case, []byte, error)
	ShowReport(ctx context.Context, id, by string) (abuse.Case, []byte, error)
	EditReport(ctx context.Context, id, by string, e abuse.Edit) (abuse.Case, error)
	ApproveReport(ctx context.Context, id, by string, a abuse.Approval) (abuse.Case, error)
	// SendReport may return before the mail is handed over: ErrUnderWay, and the
	// case as it is then.
	SendReport(ctx context.Context, id, by string, o abuse.SendOptions) (abuse.Case, error)
	CloseReport(ctx context.Context, id, by, note string) (abuse.Case, error)
	WithdrawReport(ctx context.Context, id, by, note string) (abuse.Case, error)
	// ReopenReport returns the case that goes on, which may be another one.
	ReopenReport(ctx context.Context, id, by string) (abuse.Case, error)
	// ReceiveReport notes what one mail to the reports' mailbox says. Of a
	// long one the beginning is enough.
	ReceiveReport(ctx context.Context, mail []byte, by string) ([]abuse.Received, error)
}

// Desk makes Reports of an *abuse.Desk.
func Desk(d *abuse.Desk) Reports { return desk{d} }

type desk struct{ d *abuse.Desk }

func (k desk) Reports(context.Context) ([]abuse.Case, error) {
	all := k.d.Cases()
	for i := range all {
		for j := range all[i].Mails {
			m := &all[i].Mails[j]
			m.Facts.Sources, m.Facts.Excerpt, m.Text = nil, nil, ""
		}
		all[i].Blocks = nil
	}
	return all, nil
}

func (k desk) Report(_ context.Context, id string) (abuse.Case, []byte, error) { return k.d.Case(id) }

func (k desk) ShowReport(_ context.Context, id, by string) (abuse.Case, []byte, error) {
	return k.d.Show(id, by)
}

func (k desk) EditReport(ctx context.Context, id, by string, e abuse.Edit) (abuse.Case, error) {
	return k.d.Edit(ctx, id, by, e)
}

func (k desk) ApproveReport(_ context.Context, id, by string, a abuse.Approval) (abuse.Case, error) {
	return k.d.Approve(id, by, a)
}

func (k desk) SendReport(ctx context.Context, id, by string, o abuse.SendOptions) (abuse.Case, error) {
	return k.d.Send(ctx, id, by, o)
}

func (k desk) CloseReport(_ context.Context, id, by, note string) (abuse.Case, error) {
	return k.d.CloseCase(id, by, note)
}

func (k desk) WithdrawReport(_ context.Context, id, by, note string) (abuse.Case, error) {
	return k.d.Withdraw(id, by, note)
}

func (k desk) ReopenReport(_ context.Context, id, by string) (abuse.Case, error) {
	return k.d.Reopen(id, by)
}

func (k desk) ReceiveReport(_ context.Context, mail []byte, by string) ([]abuse.Received, error) {
	return k.d.Receive(bytes.NewReader(mail), by)
}

// Paths of the reports.
const (
	pathReports  = "/v1/reports"
	pathReport   = "/v1/report"
	pathShow     = "/v1/report/show"
	pathEdit     = "/v1/report/edit"
	pathApprove  = "/v1/report/approve"
	pathSend     = "/v1/report/send"
	pathClose    = "/v1/report/close"
	pathWithdraw = "/v1/report/withdraw"
	pathReopen   = "/v1/report/reopen"
	pathReceive  = "/v1/report/receive"

	// MaxMail is how much of a mail ReceiveReport takes.
	MaxMail = maxRequest - 1024
	// sendWait is how long SendReport waits for the handover.
	sendWait = 20 * time.Second
)

// ErrUnderWay: a mail, or a trial of it, is still being handed over.
var ErrUnderWay = errors.New("it is still being handed over")

// reportChange is the body of a request that changes a report.
type reportChange struct {
	ID       string             `json:"id"`
	Edit     *abuse.Edit        `json:"edit,omitempty"`
	Approval *abuse.Approval    `json:"approval,omitempty"`
	Send     *abuse.SendOptions `json:"send,omitempty"`
	Note     string             `json:"note,omitempty"`
}

// reportAnswer is the body of an answer on one report.
type reportAnswer struct {
	Case    abuse.Case `json:"case"`
	Message []byte     `json:"message,omitempty"`
	// UnderWay is ErrUnderWay.
	UnderWay bool `json:"under_way,omitempty"`
}

// reportFailure is the body of an answer that is an error. Kind is the
// sentinel, so that the other end can decide.
type reportFailure struct {
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
	Kind  string `json:"kind,omitempty"`
}

var reportErrors = map[string]error{"unknown": abuse.ErrUnknown, "state": abuse.ErrState, "held": abuse.ErrHeld, "doubtful": abuse.ErrDoubtful}

// WithReports makes Serve answer on reports too.
func WithReports(r Reports) func(*http.ServeMux) {
	return func(mux *http.ServeMux) {
		mux.HandleFunc("GET "+pathReports, func(w http.ResponseWriter, req *http.Request) {
			v, err := r.Reports(req.Context())
			reportReply(w, v, err)
		})
		mux.HandleFunc("GET "+pathReport, func(w http.ResponseWriter, req *http.Request) {
			c, msg, err := r.Report(req.Context(), req.URL.Query().Get("id"))
			reportReply(w, reportAnswer{Case: c, Message: msg}, err)
		})
		mux.HandleFunc("POST "+pathShow, func(w http.ResponseWriter, req *http.Request) {
			c, msg, err := r.ShowReport(req.Context(), req.URL.Query().Get("id"), by(req))
			reportReply(w, reportAnswer{Case: c, Message: msg}, err)
		})
		change := func(path string, f func(ctx context.Context, c reportChange, by string) (abuse.Case, error)) {
			mux.HandleFunc("POST "+path, func(w http.ResponseWriter, req *http.Request) {
				var c reportChange
				dec := json.NewDecoder(req.Body)
				dec.DisallowUnknownFields()
				err := dec.Decode(&c)
				if err == nil {
					err = Printable(c.ID + c.Note)
				}
				if err != nil {
					reportReply(w, nil, fmt.Errorf("reading the request: %w", err))
					return
				}
				v, err := f(req.Context(), c, by(req))
				if errors.Is(err, ErrUnderWay) {
					reportReply(w, reportAnswer{Case: v, UnderWay: true}, nil)
					return
				}
				reportReply(w, reportAnswer{Case: v}, err)
			})
		}
		change(pathEdit, func(ctx context.Context, c reportChange, by string) (abuse.Case, error) {
			if c.Edit == nil {
				c.Edit = &abuse.Edit{}
			}
			return r.EditReport(ctx, c.ID, by, *c.Edit)
		})
		change(pathApprove, func(ctx context.Context, c reportChange, by string) (abuse.Case, error) {
			if c.Approval == nil {
				c.Approval = &abuse.Approval{}
			}
			return r.ApproveReport(ctx, c.ID, by, *c.Approval)
		})
		change(pathSend, func(ctx context.Context, c reportChange, by string) (abuse.Case, error) {
			if c.Send == nil {
				c.Send = &abuse.SendOptions{}
			}
			return sendPatiently(ctx, r, c.ID, by, *c.Send)
		})
		change(pathClose, func(ctx context.Context, c reportChange, by string) (abuse.Case, error) {
			return r.CloseReport(ctx, c.ID, by, c.Note)
		})
		change(pathWithdraw, func(ctx context.Context, c reportChange, by string) (abuse.Case, error) {
			return r.WithdrawReport(ctx, c.ID, by, c.Note)
		})
		change(pathReopen, func(ctx context.Context, c reportChange, by string) (abuse.Case, error) {
			return r.ReopenReport(ctx, c.ID, by)
		})
		mux.HandleFunc("POST "+pathReceive, func(w http.ResponseWriter, req *http.Request) {
			mail, err := io.ReadAll(req.Body)
			var v []abuse.Received
			if err == nil {
				v, err = r.ReceiveReport(req.Context(), mail, by(req))
			}
			reportReply(w, v, err)
		})
	}
}

// WithoutReports makes Serve say why there are no reports: the section of the
// policy has faults, and the rest runs without it.
func WithoutReports(why error) func(*http.ServeMux) {
	say := func(w http.ResponseWriter, _ *http.Request) {
		reportReply(w, nil, &abuse.Refusal{Why: "the daemon keeps no reports, for its `reports:` section has faults: " + why.Error(),
			Hint: "`smtpguard policy check` names them; restart the daemon when they are mended"})
	}
	return func(mux *http.ServeMux) {
		mux.HandleFunc(pathReports, say)
		mux.HandleFunc(pathReport, say)
		mux.HandleFunc(pathReport+"/", say)
	}
}

// sendPatiently waits for the handover for a while. It goes on behind the
// answer, whoever waits for it.
func sendPatiently(ctx context.Context, r Reports, id, by string, o abuse.SendOptions) (abuse.Case, error) {
	type result struct {
		c   abuse.Case
		err error
	}
	done := make(chan result, 1)
	go func() {
		c, err := r.SendReport(context.WithoutCancel(ctx), id, by, o)
		done <- result{c, err}
	}()
	t := time.NewTimer(sendWait)
	defer t.Stop()
	select {
	case res := <-done:
		return res.c, res.err
	case <-t.C:
	case <-ctx.Done():
	}
	c, _, err := r.Report(context.WithoutCancel(ctx), id)
	if err == nil {
		err = ErrUnderWay
	}
	return c, err
}

func reportReply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err == nil {
		_ = json.NewEncoder(w).Encode(v)
		return
	}
	f := reportFailure{Error: err.Error()}
	code := http.StatusInternalServerError
	var refused *abuse.Refusal
	if errors.As(err, &refused) {
		f.Error, f.Hint, f.Kind, code = refused.Why, refused.Hint, "refused", http.StatusForbidden
	}
	for kind, e := range reportErrors {
		if errors.Is(err, e) {
			f.Kind, code = kind, http.StatusConflict
		}
	}
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(f)
}

// kindError is an error of the daemon with the sentinel that it wraps there.
type kindError struct {
	msg  string
	kind error
}

func (e *kindError) Error() string { return e.msg }
func (e *kindError) Unwrap() error { return e.kind }

// report asks the daemon about reports.
func (c *Client) report(ctx context.Context, method, path string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://smtpguard"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("asking the daemon: %w", err)
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode != http.StatusOK {
		var f reportFailure
		switch err := dec.Decode(&f); {
		case resp.StatusCode == http.StatusNotFound:
			return errors.New("the daemon keeps no reports (reports.mode: off)")
		case err != nil || f.Error == "":
			return fmt.Errorf("the daemon answered %s", resp.Status)
		case f.Kind == "refused":
			return &abuse.Refusal{Why: f.Error, Hint: f.Hint}
		case reportErrors[f.Kind] != nil:
			return &kindError{f.Error, reportErrors[f.Kind]}
		}
		return errors.New(f.Error)
	}
	if err := dec.Decode(out); err != nil {
		return fmt.Errorf("reading the daemon's answer: %w", err)
	}
	return nil
}

func (c *Client) changeReport(ctx context.Context, path string, ch reportChange) (abuse.Case, error) {
	body, err := json.Marshal(ch)
	if err != nil {
		return abuse.Case{}, err
	}
	var a reportAnswer
	err = c.report(ctx, http.MethodPost, path, body, &a)
	if err == nil && a.UnderWay {
		err = ErrUnderWay
	}
	return a.Case, err
}

func (c *Client) Reports(ctx context.Context) (v []abuse.Case, err error) {
	err = c.report(ctx, http.MethodGet, pathReports, nil, &v)
	return v, err
}

func (c *Client) Report(ctx context.Context, id string) (abuse.Case, []byte, error) {
	var a reportAnswer
	err := c.report(ctx, http.MethodGet, pathReport+"?id="+url.QueryEscape(id), nil, &a)
	return a.Case, a.Message, err
}

func (c *Client) ShowReport(ctx context.Context, id, _ string) (abuse.Case, []byte, error) {
	var a reportAnswer
	err := c.report(ctx, http.MethodPost, pathShow+"?id="+url.QueryEscape(id), nil, &a)
	return a.Case, a.Message, err
}

func (c *Client) EditReport(ctx context.Context, id, _ string, e abuse.Edit) (abuse.Case, error) {
	return c.changeReport(ctx, pathEdit, reportChange{ID: id, Edit: &e})
}

func (c *Client) ApproveReport(ctx context.Context, id, _ string, a abuse.Approval) (abuse.Case, error) {
	return c.changeReport(ctx, pathApprove, reportChange{ID: id, Approval: &a})
}

func (c *Client) SendReport(ctx context.Context, id, _ string, o abuse.SendOptions) (abuse.Case, error) {
	return c.changeReport(ctx, pathSend, reportChange{ID: id, Send: &o})
}

func (c *Client) CloseReport(ctx context.Context, id, _, note string) (abuse.Case, error) {
	return c.changeReport(ctx, pathClose, reportChange{ID: id, Note: note})
}

func (c *Client) WithdrawReport(ctx context.Context, id, _, note string) (abuse.Case, error) {
	return c.changeReport(ctx, pathWithdraw, reportChange{ID: id, Note: note})
}

// ReopenReport takes back what WithdrawReport said of a network.
func (c *Client) ReopenReport(ctx context.Context, id, _ string) (abuse.Case, error) {
	return c.changeReport(ctx, pathReopen, reportChange{ID: id})
}

func (c *Client) ReceiveReport(ctx context.Context, mail []byte, _ string) (v []abuse.Received, err error) {
	err = c.report(ctx, http.MethodPost, pathReceive, mail[:min(len(mail), MaxMail)], &v)
	return v, err
}
