package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	// With -race every command would wait a second before it ends.
	if os.Getenv("GORACE") == "" {
		os.Setenv("GORACE", "atexit_sleep_ms=10")
	}
	testscript.Main(m, map[string]func(){
		"smtpguard": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
		},
	})
}

// flood is a log of one address that opens 150 connections now.
func flood() []byte {
	var b bytes.Buffer
	for i := range 150 {
		fmt.Fprintf(&b, "%s SMTP connection from [198.51.100.9]:%d (TCP/IP connection count = %d)\n",
			time.Now().UTC().Format("2006-01-02 15:04:05"), 20000+i, i+1)
	}
	return b.Bytes()
}

// TestScript runs the stories in testdata/script on the real command. Beside
// testscript's own commands there is "exits N COMMAND ...", which wants that
// exit status.
func TestScript(t *testing.T) {
	data, err := filepath.Abs("../../testdata")
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Glob(filepath.Join(data, "script", "*.txtar"))
	if err != nil || len(scripts) == 0 {
		t.Fatal(scripts, err)
	}
	for _, name := range scripts { // testscript's own "stop" ends the script there, and it passes
		if b, err := os.ReadFile(name); err != nil || bytes.Contains(b, []byte("\nstop ")) {
			t.Errorf("%s has the command stop, which skips the rest of the script; to stop a daemon, halt (%v)", name, err)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join(data, "script"),
		Setup: func(e *testscript.Env) error {
			e.Setenv("DATA", data)
			e.Setenv("TZ", "UTC")
			e.Setenv("GORACE", os.Getenv("GORACE"))
			e.Setenv("ESC", "\x1b")
			return os.WriteFile(filepath.Join(e.WorkDir, "flood.log"), flood(), 0o644)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// append FILE FROM adds what is in FROM to FILE, as a logger does.
			"append": func(ts *testscript.TestScript, neg bool, args []string) {
				b := ts.ReadFile(args[1])
				f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_WRONLY|os.O_APPEND, 0)
				ts.Check(err)
				_, err = f.WriteString(b)
				ts.Check(errors.Join(err, f.Close()))
			},
			// wait-for FILE waits until FILE exists.
			"wait-for": func(ts *testscript.TestScript, neg bool, args []string) {
				for range 1000 {
					if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				ts.Fatalf("%s does not appear", args[0])
			},
			// wait-output TEXT COMMAND ... runs the command until it prints TEXT.
			"wait-output": func(ts *testscript.TestScript, neg bool, args []string) {
				for range 200 {
					_ = ts.Exec(args[1], args[2:]...)
					if strings.Contains(ts.ReadFile("stdout"), args[0]) {
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
				ts.Fatalf("%q is never printed", args[0])
			},
			// wait-metric SOCKET REGEXP reads the metrics on a socket until a
			// line of them is matched.
			"wait-metric": func(ts *testscript.TestScript, neg bool, args []string) {
				if err := waitMetric(ts.MkAbs(args[0]), args[1]); err != nil {
					ts.Fatalf("%v", err)
				}
			},
			// halt NAME ends a background command as systemd does, and waits
			// for it.
			"halt": func(ts *testscript.TestScript, neg bool, args []string) {
				for _, c := range ts.BackgroundCmds() {
					if err := c.Process.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) { // an earlier one
						ts.Check(err)
					}
				}
				ts.Check(ts.Exec("true"))
				for range 1000 {
					if _, err := os.Stat(ts.MkAbs("run/c.sock")); err != nil {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				ts.Fatalf("%s does not stop", args[0])
			},
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: exits N COMMAND ...")
				}
				err := ts.Exec(args[1], args[2:]...)
				status := 0
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					status = exit.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if want, err := strconv.Atoi(args[0]); err != nil || status != want {
					ts.Fatalf("exit status %d, want %s", status, args[0])
				}
			},
		},
	})
}
