// Demo shows on the terminal, in well under a minute, what smtpguard is for:
// in a private network it fills a real mail server's slots from a handful of
// addresses until proper mail is refused, with the real smtpguard beside it,
// and tells what happens when. Nothing outside is touched, nothing is left.
//
// Usage: demo [-bin FILE] [-mta exim|standin]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
)

func main() {
	// First of all: this may run the program again, as root of a user
	// namespace of its own.
	noNamespaces := lab.Enter()

	bin := flag.String("bin", "bin/smtpguard", "the smtpguard to show is `FILE`")
	mta := flag.String("mta", "", "the mail server is `exim` or `standin` (default: Exim if it is installed)")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "demo shows what smtpguard does, in a private network.\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 || (*mta != "" && *mta != "exim" && *mta != "standin") {
		flag.Usage()
		os.Exit(2)
	}
	program, err := filepath.Abs(*bin)
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		fmt.Fprintln(os.Stderr, "hint: `make demo` builds it, or name one with -bin")
		os.Exit(1)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out := &printer{w: os.Stdout, start: time.Now(), colour: term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
	err = tell(ctx, out, program, *mta, noNamespaces)
	switch {
	case err == nil:
		out.now(plain, "that was it; everything is taken away again")
		return
	case errors.Is(ctx.Err(), context.Canceled):
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; everything is cleaned up")
	default:
		fmt.Fprintf(os.Stderr, "\ndemo: the story did not come true: %v\n", err)
	}
	stop()
	os.Exit(1)
}
