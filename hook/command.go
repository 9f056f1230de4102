package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// command runs a program with the message as JSON on its standard input.
type command struct {
	c   Config
	log *slog.Logger
}

func (c *command) send(ctx context.Context, m *Message) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	said, err := execute(ctx, c.c.Command, append(data, '\n'), false)
	if err == nil && said != "" {
		c.log.Info("a hook's command says", "hook", c.c.Name, "output", said)
	}
	return err
}

const (
	outputMost = 2048            // bytes of a program's output that are kept
	drainFor   = 2 * time.Second // for those a program leaves behind to finish their output
)

// execute runs a program, without a shell, in a process group of its own,
// with an environment of its own and input on its standard input. It returns
// the beginning of the output. What the program started ends with it: at the
// end of ctx the whole group is killed, and what is left of it when the program
// has ended, too, once it has closed the output or drainFor is over. With
// delivers that is left alone: a mail program leaves a child behind, which
// delivers what was taken.
func execute(ctx context.Context, argv []string, input []byte, delivers bool) (said string, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return "", fmt.Errorf("starting %s: %w", argv[0], err)
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(input)
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	kill := func() error {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
			return os.ErrProcessDone
		}
		return nil
	}
	cmd.Cancel = kill
	cmd.WaitDelay = drainFor
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return "", fmt.Errorf("starting %s: %w", argv[0], err)
	}
	out := &head{}
	drained := make(chan struct{})
	go func() { defer close(drained); _, _ = io.Copy(out, r) }()
	// Until it is waited for, nobody else can get its number: the group that
	// is killed is certainly its own.
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	late := time.NewTimer(drainFor)
	defer late.Stop()
	select {
	case <-drained:
	case <-late.C:
	case <-ctx.Done():
	}
	if !delivers {
		_ = kill()
	}
	err = cmd.Wait()
	_ = r.Close() // one that left the group may hold the other end
	<-drained
	said = printable(strings.TrimSpace(string(out.b)), whyMost)
	switch {
	case err == nil || cmd.ProcessState.Success():
		return said, nil
	case said != "":
		err = fmt.Errorf("%w: %s", err, said)
	}
	return said, fmt.Errorf("%s: %w", argv[0], err)
}

// head keeps the beginning of what is written to it.
type head struct{ b []byte }

func (h *head) Write(p []byte) (int, error) {
	h.b = append(h.b, p[:min(len(p), outputMost-len(h.b))]...)
	return len(p), nil
}
