// Smtpguard protects an Exim mail server from connection floods: it follows
// the log, sees who holds the server's slots, and drops them in the packet
// filter. This is the daemon and the command line in one.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/policy"
)

// Exit statuses.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
	exitNo     = 3 // "no" as an answer: nothing found, nothing to lift
)

// version is set by the linker for a release.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program: it returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	e := &env{stdin: stdin, stdout: stdout, stderr: stderr}
	app := &cli.App{
		Name:    "smtpguard",
		Usage:   "keep an Exim mail server reachable under connection floods",
		Version: programVersion(),
		Flags:   globalFlags(),
		Commands: []*cli.Command{
			e.runCommand(), e.doctorCommand(), e.diagnoseCommand(), e.replayCommand(),
			e.statusCommand(), e.topCommand(), e.explainCommand(),
			e.blocksCommand(), e.blockCommand(), e.unblockCommand(), e.allowCommand(),
			e.commitCommand(), e.resumeCommand(),
			e.reportsCommand(), e.firewallCommand(), e.policyCommand(),
			e.completionCommand(), e.manCommand(), e.versionCommand(),
		},
		Reader: stdin, Writer: stdout, ErrWriter: stderr,
		HideVersion:     true,
		HideHelpCommand: true,
		ExitErrHandler:  func(*cli.Context, error) {},
		OnUsageError: func(c *cli.Context, err error, _ bool) error {
			return badFlags(c, nil, err)
		},
		CommandNotFound: func(*cli.Context, string) {},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return noCommand("", c.Args().First(), c.App.Commands)
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, c := range app.Commands {
		usageErrors(c)
	}
	if len(args) == 0 {
		args = []string{"smtpguard"}
	}
	args, err := askedHelp(app, args)
	if err != nil {
		return report(stderr, err)
	}
	err = app.RunContext(ctx, append(args[:1:1], flagsFirst(app, args[1:])...))
	status := report(stderr, err)
	return cmp.Or(status, report(stderr, e.close()))
}

// askedHelp turns "help blocks list", which people write, into "blocks list
// --help".
func askedHelp(app *cli.App, args []string) ([]string, error) {
	at := 1
	for at < len(args) && strings.HasPrefix(args[at], "-") { // global flags
		name := strings.TrimLeft(args[at], "-")
		at++
		for _, f := range app.Flags {
			if _, isBool := f.(*cli.BoolFlag); !isBool && slices.Contains(f.Names(), name) {
				at++
			}
		}
	}
	if at >= len(args) || args[at] != "help" {
		return args, nil
	}
	out := args[:1:1]
	commands := app.Commands
	for _, word := range args[at+1:] {
		if strings.HasPrefix(word, "-") {
			continue
		}
		c := find(commands, word)
		if c == nil {
			return nil, noCommand(strings.Join(out[1:], " "), word, commands)
		}
		out, commands = append(out, word), c.Subcommands
	}
	return append(out, "--help"), nil
}

func usageErrors(c *cli.Command) {
	c.OnUsageError = func(ctx *cli.Context, err error, _ bool) error { return badFlags(ctx, c.Flags, err) }
	c.HideHelpCommand = true
	for _, f := range c.Flags {
		if b, ok := f.(*cli.BoolFlag); ok {
			b.DisableDefaultText = true
		}
	}
	for _, s := range c.Subcommands {
		usageErrors(s)
	}
	if len(c.Subcommands) > 0 && c.Action == nil {
		c.Action = func(ctx *cli.Context) error {
			if ctx.Args().Present() {
				return noCommand(c.Name, ctx.Args().First(), c.Subcommands)
			}
			return cli.ShowSubcommandHelp(ctx)
		}
	}
}

// env is what a command has of the outside.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	atEnd          []func() error // when the command has ended, last first
	shipped        bool           // see policy
	eximSays       bool           // the number of slots of a replay
	taken          *policy.Policy // that the daemon goes by; nil: there is none
}

// close ends what the command has begun. Its errors are the command's.
func (e *env) close() error {
	var errs []error
	for _, f := range slices.Backward(e.atEnd) {
		errs = append(errs, f())
	}
	e.atEnd = nil
	return errors.Join(errs...)
}

func globalFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "policy", Usage: "read the policy from `FILE`", EnvVars: []string{"SMTPGUARD_POLICY"}, DefaultText: defaultPolicy},
		&cli.StringFlag{Name: "socket", Usage: "the daemon's socket is `FILE` (default: as the policy says)", EnvVars: []string{"SMTPGUARD_SOCKET"}},
		&cli.StringFlag{Name: "store", Usage: "the state is in `FILE` (default: as the policy says)", EnvVars: []string{"SMTPGUARD_STORE"}},
		&cli.BoolFlag{Name: "json", Usage: "print JSON", DisableDefaultText: true},
	}
}

// flagsFirst puts the flags of a command before its arguments, and global
// flags before the command: people write "block 192.0.2.7 --for 1h", and the
// flag package stops at the first argument.
func flagsFirst(app *cli.App, args []string) []string {
	takesValue := func(flags []cli.Flag, name string) (value, known bool) {
		for _, f := range flags {
			for _, n := range f.Names() {
				if n == name {
					_, isBool := f.(*cli.BoolFlag)
					return !isBool, true
				}
			}
		}
		return false, false
	}
	var global, path, own, rest []string
	flags, commands := []cli.Flag(nil), app.Commands
	for i := 0; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			rest = append(rest, args[i:]...)
			break
		}
		if len(a) > 1 && a[0] == '-' {
			name, _, joined := strings.Cut(strings.TrimLeft(a, "-"), "=")
			value, known := takesValue(flags, name)
			to := &own
			if !known {
				if value, known = takesValue(app.Flags, name); known {
					to = &global
				}
			}
			*to = append(*to, a)
			if value && !joined && i+1 < len(args) {
				i++
				*to = append(*to, args[i])
			}
			continue
		}
		if len(rest) == 0 {
			if c := find(commands, a); c != nil {
				path, flags, commands = append(path, a), c.Flags, c.Subcommands
				continue
			}
		}
		rest = append(rest, a)
		commands = nil
	}
	out := append(global, path...)
	return append(append(out, own...), rest...)
}

func find(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

func (e *env) versionCommand() *cli.Command {
	return &cli.Command{Name: "version", Usage: "print the version", Action: func(c *cli.Context) error {
		if err := noArgs(c); err != nil {
			return err
		}
		if c.Bool("json") {
			return e.json(map[string]string{"version": programVersion()})
		}
		fmt.Fprintln(e.stdout, "smtpguard", programVersion())
		return nil
	}}
}

func programVersion() string {
	if version != "" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}

// usageError is a wrong call.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }

// answerNo is "no" as an answer: its text is for the person, its status for
// the script.
type answerNo struct{ msg string }

func (e *answerNo) Error() string { return e.msg }

// hinted is an error with what to do about it.
type hinted struct {
	err  error
	hint string
}

func (e *hinted) Error() string { return e.err.Error() }
func (e *hinted) Unwrap() error { return e.err }

func withHint(err error, hint string) error { return &hinted{err, hint} }

// report prints an error as the person needs it (one line what, one line
// what to do) and returns the exit status.
func report(w io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	var no *answerNo
	if errors.As(err, &no) {
		if no.msg != "" {
			fmt.Fprintln(w, no.msg)
		}
		return exitNo
	}
	fmt.Fprintln(w, "smtpguard:", err)
	if h := hint(err); h != "" {
		fmt.Fprintln(w, "hint:", h)
	}
	var u *usageError
	if errors.As(err, &u) {
		return exitUsage
	}
	return exitFailed
}

func noArgs(c *cli.Context) error {
	if c.Args().Present() {
		return &usageError{fmt.Sprintf("%s takes no argument, but got %q", c.Command.HelpName, c.Args().First())}
	}
	return nil
}
