package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard"
	"github.com/smtpguard/smtpguard/policy"
)

func (e *env) policyCommand() *cli.Command {
	return &cli.Command{
		Name: "policy", Usage: "check, show or make the policy",
		Subcommands: []*cli.Command{
			{Name: "check", Usage: "report every fault of the policy with its place", ArgsUsage: "[FILE]", Action: e.policyCheck},
			{Name: "show", Usage: "print every setting as it is in effect", Action: e.policyShow},
			{Name: "init", Usage: "write the shipped policy", ArgsUsage: "[FILE]", Action: e.policyInit},
		},
	}
}

// policyPath is the argument, else the flag, else the usual place.
func policyPath(c *cli.Context) (string, error) {
	switch {
	case c.NArg() > 1:
		return "", &usageError{"name one file"}
	case c.NArg() == 1:
		return c.Args().First(), nil
	case c.String("policy") != "":
		return c.String("policy"), nil
	}
	return defaultPolicy, nil
}

func (e *env) policyCheck(c *cli.Context) error {
	path, err := policyPath(c)
	if err != nil {
		return err
	}
	p, err := policy.Load(path)
	var faults policy.Errors
	if errors.As(err, &faults) && len(faults) > 0 && faults[0].Line > 0 {
		for _, f := range faults {
			if c.Bool("json") {
				if err := e.json(map[string]any{"file": f.File, "line": f.Line, "column": f.Column, "error": f.Msg, "hint": f.Hint}); err != nil {
					return err
				}
				continue
			}
			fmt.Fprintln(e.stdout, f)
		}
		return fmt.Errorf("%s has %s", path, count(len(faults), "fault", "faults"))
	}
	if err != nil {
		return err
	}
	if err := reportsFaults(p); err != nil {
		lines := strings.Split(err.Error(), "\n")
		for _, l := range lines {
			if c.Bool("json") {
				if err := e.json(map[string]any{"file": path, "error": l}); err != nil {
					return err
				}
				continue
			}
			fmt.Fprintf(e.stdout, "%s: %s\n", path, l)
		}
		return fmt.Errorf("%s has %s", path, count(len(lines), "fault", "faults"))
	}
	if c.Bool("json") {
		return e.json(map[string]any{"file": path, "right": true})
	}
	fmt.Fprintf(e.stdout, "%s is right: mode %s, %s, %s on the allowlist\n", path, p.Mode,
		count(len(p.Rules), "rule", "rules"), count(len(p.Allow)+len(p.AllowNames), "entry", "entries"))
	return nil
}

func (e *env) policyShow(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	p, err := e.policy(c)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(p)
	}
	return p.WriteYAML(e.stdout)
}

func (e *env) policyInit(c *cli.Context) error {
	path, err := policyPath(c)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return withHint(fmt.Errorf("%s exists, and is left as it is", path), "`smtpguard policy check` says whether it is right")
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(smtpguard.PolicyYAML)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(map[string]any{"file": path, "written": true})
	}
	fmt.Fprintf(e.stdout, "%s is written; mode is observe until you change it\n", path)
	return nil
}
