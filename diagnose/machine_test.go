package diagnose

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestMachine: what is so at this moment comes first, whatever the log says of
// the night.
func TestMachine(t *testing.T) {
	now := time.Date(2026, 11, 22, 4, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name        string
		m           Machine
		title, says string // title: the beginning; "" for none
		confidence  Confidence
	}{
		{"well", Machine{Listen: []uint16{25}, Programs: []string{"exim4"}, Daemons: []int{7}}, "", "", ""},
		{"programs not shown", Machine{Listen: []uint16{25}, Programs: []string{""}}, "", "", ""},
		{"started by a socket", Machine{Listen: []uint16{25}, Programs: []string{"systemd"}}, "", "", ""},
		{"down", Machine{Written: now.Add(-5 * time.Minute)}, "Exim is not running", "systemctl restart exim4", Certain},
		{"down, told how long", Machine{Written: now.Add(-5 * time.Minute)}, "Exim is not running", "last written 5m ago", Certain},
		{"in a container", Machine{Elsewhere: []int{9}}, "Exim is not running", "another network namespace (process 9)", Likely},
		{"broken configuration", Machine{ConfigErr: errors.New("exim: \x1b[31mline 7")}, "Exim is not running", `\x1b[31mline 7`, Certain},
		{"broken configuration, of which its last lines tell", Machine{Last: []string{"2026-11-22 03:59:00 Exim configuration error in line 7 of /etc/exim.conf: main option \"x\" unknown"}}, "Exim is not running", "exim4 -bV", Certain},
		{"children are left", Machine{Daemons: []int{7}}, "Exim does not listen", "last connections", Likely},
		{"somebody else", Machine{Listen: []uint16{25}, Programs: []string{"master"}}, "Exim is not running: its ports are served by master", "sport = :25", Certain},
	} {
		c.m.Now, c.m.Ports, c.m.Start = now, []uint16{25, 465}, []string{"`systemctl restart exim4`."}
		c.m.Last = append(c.m.Last, "paniclog: \x1b[2J died")
		d := newDiagnosis(t, 100)
		d.o.Machine = &c.m
		if err := d.Read(t.Context(), strings.NewReader("2026-11-22 03:01:40 spool directory space check failed: space=812 inodes=20118\n"), now); err != nil {
			t.Fatal(err)
		}
		f := d.Report().Findings
		if c.title == "" {
			if len(f) != 1 || f[0].Kind != Disk {
				t.Errorf("%s: %+v", c.name, f)
			}
			continue
		}
		if len(f) != 2 || f[0].Kind != NotRunning || !strings.HasPrefix(f[0].Title, c.title) || f[0].Confidence != c.confidence {
			t.Errorf("%s: %+v", c.name, f)
			continue
		}
		all := strings.Join(append(append(f[0].Why, f[0].Do...), f[0].Lines...), "\n")
		if !strings.Contains(all, c.says) || strings.Contains(all, "\x1b") || !strings.Contains(all, `\x1b[2J died`) {
			t.Errorf("%s: want %q in\n%s", c.name, c.says, all)
		}
	}
}

// TestGuarding: nothing is advised that has no effect as things stand.
func TestGuarding(t *testing.T) {
	for _, c := range []struct {
		g         Guarding
		has, lack string
	}{
		{Guarding{Mode: "enforce", PolicyMode: "enforce"}, "smtpguard block 192.0.2.7 --for 1h", "mode: enforce"},
		{Guarding{Mode: "observe", PolicyMode: "observe", PolicyFile: "/p.yaml"}, "`sed -i 's/^mode: .*/mode: enforce/' /p.yaml`, `systemctl reload smtpguard`, `smtpguard block 192.0.2.7 --for 1h`", "enable --now"},
		{Guarding{Mode: "observe", PolicyMode: "enforce"}, "systemctl reload smtpguard", "smtpguard block "},
		{Guarding{PolicyMode: "enforce"}, "systemctl enable --now smtpguard", "mode: enforce"},
		{Guarding{PolicyMode: "observe"}, "in /etc/smtpguard/policy.yaml, then `systemctl enable --now smtpguard`", "reload"},
	} {
		got := strings.Join(c.g.block([]string{"192.0.2.7"}), "\n")
		if !strings.Contains(got, c.has) || strings.Contains(got, c.lack) {
			t.Errorf("%+v:\n%s", c.g, got)
		}
		if len(c.g.block(nil)) == 0 {
			t.Errorf("%+v says nothing of networks", c.g)
		}
	}
}
