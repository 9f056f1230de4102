package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
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
	said, err := execute(ctx, c.c.Command, append(data, '\n'))
	if err == nil && said != "" {
		c.log.Info("a hook's command says", "hook", c.c.Name, "output", said)
	}
	return err
}

const (
	outputMost = 2048            // bytes of a program's output that are kept
	drainFor   = 2 * time.Second // for output after the program's end: a child may hold the pipe
)

// execute runs a program, without a shell, in a process group of its own,
// with an environment of its own and input on its standard input. At the end
// of ctx the whole group is killed. It returns the beginning of the output.
func execute(ctx context.Context, argv []string, input []byte) (said string, err error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(input)
	out := &head{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
			return os.ErrProcessDone
		}
		return nil
	}
	cmd.WaitDelay = drainFor
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("starting %s: %w", argv[0], err)
	}
	err = cmd.Wait()
	said = printable(strings.TrimSpace(string(out.b)), whyMost)
	switch {
	case err == nil:
		return said, nil
	case cmd.ProcessState.Success() && errors.Is(err, exec.ErrWaitDelay):
		return said, nil // a child of it holds the pipe longer
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
