package firewall

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fakeCSF stands in for the csf command: what CSF 15.10 was seen to print for
// each call, with its exit status, and what it then had in its files. Each
// call is noted in root/calls. It blocks nothing unless there is root/rules:
// then it keeps its rules in iptables, as CSF does.
//
// A file root/killer with a call's first words makes that call end whoever
// called it, by SIGKILL, instead of doing anything.
func fakeCSF(root string, args []string) int {
	p := csfAt(root)
	say := func(format string, a ...any) {
		fmt.Printf("\x1b[1;37m%s\x1b[0m\n", fmt.Sprintf(format, a...)) // colours since 15.00
	}
	appendTo := func(file, text string) {
		f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			_ = unix.Flock(int(f.Fd()), unix.LOCK_EX)
			_, err = f.WriteString(text)
			f.Close()
		}
		if err != nil {
			panic(err)
		}
	}
	appendTo(filepath.Join(root, "calls"), strings.Join(args, " ")+"\n")
	if killer, err := os.ReadFile(filepath.Join(root, "killer")); err == nil && strings.HasPrefix(strings.Join(args, " "), string(killer)) {
		_ = unix.Kill(os.Getppid(), unix.SIGKILL)
		return 1
	}
	rules := fileExists(filepath.Join(root, "rules"))
	iptables := func(v6 bool, args ...string) error {
		command := csfConfDefault.commands[familyIndex(v6)]
		return exec.Command(command, append([]string{"-w"}, args...)...).Run()
	}
	drop := func(do, ip, ports string) error {
		v6 := strings.Contains(ip, ":")
		if ports == "" {
			return iptables(v6, do, csfChain, "-s", ip, "!", "-i", "lo", "-j", "DROP")
		}
		var errs []error
		for port := range strings.SplitSeq(ports, ",") {
			errs = append(errs, iptables(v6, do, csfChain, "-s", ip, "!", "-i", "lo", "-p", "tcp", "--dport", port, "-j", "DROP"))
		}
		return errors.Join(errs...)
	}
	switch {
	case fileExists(filepath.Join(root, "hang")):
		time.Sleep(time.Minute)
	case fileExists(filepath.Join(root, "restarting")):
		say("Error: csf is being restarted, try again in a moment: at /usr/sbin/csf line 190.")
		return 11
	case fileExists(p.file("csf.disable")):
		say("CSF and LFD have been disabled!")
		return 1
	case fileExists(p.file("csf.error")) && !(len(args) > 0 && args[0] == "-r"):
		say("You have an unresolved error when starting csf. You need to restart csf successfully to remove this warning")
		return 1
	}
	conf, err := readCSFConf(p.file("csf.conf"))
	if err != nil {
		panic(err)
	}
	tempban := p.lib + "/csf.tempban"
	read := func(file string) []string {
		data, _ := os.ReadFile(file)
		return strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' })
	}
	if len(args) < 2 {
		if len(args) == 1 && (args[0] == "-r" || args[0] == "-f" || args[0] == "-x") {
			for _, v6 := range []bool{false, true} {
				_ = iptables(v6, "-F")
				_ = iptables(v6, "-X")
			}
		}
		switch {
		case len(args) == 1 && args[0] == "-x":
			appendTo(p.file("csf.disable"), "")
		case len(args) == 1 && args[0] == "-r": // bans that did not run out come back
			_ = os.Remove(p.file("csf.error"))
			for _, v6 := range []bool{false, true} {
				_ = iptables(v6, "-N", csfChain)
				_ = iptables(v6, "-A", "INPUT", "-j", csfChain)
			}
			for _, line := range read(tempban) {
				if b, ok := parseCSFBan(line); ok && b.until().After(time.Now()) {
					_ = drop("-A", csfText(b.prefix), b.ports)
				}
			}
		}
		return 0
	}
	ip := args[1]
	prefix, ok := csfPrefix(ip)
	if !ok {
		say("csf: [%s] is not a valid PUBLIC IP", ip)
		return 0
	}
	if prefix.Addr().Is6() && !conf.ipv6 {
		say("failed: [%s] is valid IPv6 but IPV6 is not enabled in csf.conf", ip) // and goes on
	}
	switch args[0] {
	case "-td":
		ttl, rest := 0, strings.Join(args[2:], " ")
		if first, more, _ := strings.Cut(rest, " "); first != "" {
			if ttl, err = strconv.Atoi(first); err == nil {
				rest = more
			}
		}
		dir, ports := "in", ""
		if m := fakeDir.FindStringSubmatch(rest); m != nil {
			dir = m[1]
		}
		if m := fakePorts.FindStringSubmatch(rest); m != nil {
			ports = m[1]
		}
		comment := strings.TrimSpace(fakePorts.ReplaceAllString(fakeDir.ReplaceAllString(rest, ""), ""))
		if comment == "" {
			comment = "Manually added: " + ip
		}
		for _, line := range read(p.file("csf.deny")) {
			if rest, ok := strings.CutPrefix(line, ip); ok && !strings.ContainsAny(rest[:min(1, len(rest))], "0123456789") {
				say("csf: %s is already permanently blocked", ip)
				return 0
			}
		}
		for _, line := range read(tempban) {
			if strings.Contains(line, "|"+ip+"|"+ports+"|") {
				say("csf: %s is already temporarily blocked", ip)
				return 0
			}
		}
		if ttl < 2 {
			ttl = 3600
		}
		if rules {
			if err := drop("-A", ip, ports); err != nil { // fatal to CSF, which opens the firewall
				appendTo(p.file("csf.error"), err.Error())
				_ = iptables(prefix.Addr().Is6(), "-F")
				return 1
			}
		}
		appendTo(tempban, fmt.Sprintf("%d|%s|%s|%s|%d|%s\n", time.Now().Unix(), ip, ports, dir, ttl, comment))
		if ports == "" {
			ports = "*"
		}
		say("csf: %s blocked on port %s for %d seconds %s", ip, ports, ttl, map[string]string{"in": "inbound", "out": "outbound", "inout": "in and outbound"}[dir])
	case "-trd":
		lines := read(tempban)
		if len(lines) == 0 {
			say("csf: There are no temporary IP bans")
			return 0
		}
		var keep strings.Builder
		found := false
		for _, line := range lines {
			if b, _ := parseCSFBan(line); b.prefix == prefix {
				say("csf: %s temporary block removed", ip)
				found = true
				if rules {
					_ = drop("-D", ip, b.ports)
				}
				continue
			}
			keep.WriteString(line + "\n")
		}
		if !found {
			say("csf: %s not found in temporary bans", ip)
		}
		if err := os.WriteFile(tempban, []byte(keep.String()), 0o600); err != nil {
			panic(err)
		}
	}
	return 0
}

var (
	fakeDir   = regexp.MustCompile(`(?i)-d\s*(inout|out|in)`)
	fakePorts = regexp.MustCompile(`(?i)-p\s*([\w,*;]+)`)
)
