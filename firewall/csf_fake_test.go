package firewall

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fakeCSF stands in for the csf command: what CSF 15.10 was seen to print for
// each call, with its exit status, and what it then had in its files. It
// blocks nothing. Each call is noted in root/calls.
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
	switch {
	case fileExists(filepath.Join(root, "hang")):
		time.Sleep(time.Minute)
	case fileExists(filepath.Join(root, "restarting")):
		say("Error: csf is being restarted, try again in a moment: at /usr/sbin/csf line 190.")
		return 11
	case fileExists(p.file("csf.disable")):
		say("CSF and LFD have been disabled!")
		return 1
	case fileExists(p.file("csf.error")):
		say("You have an unresolved error when starting csf. You need to restart csf successfully to remove this warning")
		return 1
	}
	conf, err := readCSFConf(p.file("csf.conf"))
	if err != nil {
		panic(err)
	}
	if len(args) < 2 {
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
	tempban := p.lib + "/csf.tempban"
	read := func(file string) []string {
		data, _ := os.ReadFile(file)
		return strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' })
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
