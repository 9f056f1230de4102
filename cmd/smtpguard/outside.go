package main

import (
	"os"
	"os/exec"
)

// outside is what a command line begins with so that the program runs outside
// of the sandbox of our systemd unit: nothing where we are not in one.
//
// The mail server's sendmail starts the delivery of a mail to a local mailbox
// as a child of its own. Inside it could write to no mailbox, call no filter of
// a user, and not become that user. So the whole handover is a service of its
// own, with our input and output, whose exit status is ours. Its leftover
// children are let live (KillMode): one of them delivers. A unit says
// NOTIFY_SOCKET to the process that it starts, and to no other.
func outside() []string {
	if os.Getenv("NOTIFY_SOCKET") == "" || os.Geteuid() != 0 {
		return nil
	}
	for _, need := range []string{"/run/systemd/system", "/run/dbus/system_bus_socket"} { // sd_booted(3); --wait wants the bus
		if _, err := os.Stat(need); err != nil {
			return nil
		}
	}
	run, err := exec.LookPath("systemd-run")
	if err != nil {
		return nil
	}
	return []string{run, "--quiet", "--pipe", "--wait", "--collect", "--description=smtpguard hands over a mail",
		"--property=KillMode=process", "--property=RuntimeMaxSec=600", "--"}
}
