package exim

import (
	"maps"
	"testing"
)

func TestParseSettings(t *testing.T) {
	got := parseSettings([]byte("smtp_accept_reserve = 10\nsmtp_reserve_hosts = <; 127.0.0.1 ; ::1\nsmtp_load_reserve =\n" +
		"queue_only\nno_log_timezone\nsmtp_x is not a known option\n/etc/exim.conf\n"))
	want := map[string]string{"smtp_accept_reserve": "10", "smtp_reserve_hosts": "<; 127.0.0.1 ; ::1", "smtp_load_reserve": "",
		"queue_only": "true", "log_timezone": "false"}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
