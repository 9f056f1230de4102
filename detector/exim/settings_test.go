package exim

import (
	"maps"
	"os"
	"strings"
	"testing"
)

func TestParseSettings(t *testing.T) {
	got := parseSettings([]byte("smtp_accept_reserve = 10\nsmtp_reserve_hosts = <; 127.0.0.1 ; ::1\nsmtp_load_reserve =\n" +
		"queue_only\nno_log_timezone\nsmtp_x is not a known option\n/etc/exim.conf\n"))
	want := map[string]string{"smtp_accept_reserve": "10", "smtp_reserve_hosts": "<; 127.0.0.1 ; ::1", "smtp_load_reserve": "",
		"queue_only": "true", "log_timezone": "false", "configure_file": "/etc/exim.conf"}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// The real program tells its file without the option's name.
func TestConfigureFile(t *testing.T) {
	path, err := find()
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	m, err := Settings(t.Context(), path, "smtp_accept_reserve", "configure_file")
	if err != nil || !strings.HasPrefix(m["configure_file"], "/") {
		t.Errorf("%v, %v", m, err)
	}
}
