package exim

import (
	"context"
	"strings"
)

// Settings asks the Exim at path (Config.Path) for further options of its
// configuration and returns the texts of those that it knows; "" is one that
// is not set. It takes 10 s at most.
func Settings(ctx context.Context, path string, options ...string) (map[string]string, error) {
	out, err := printed(ctx, path, options)
	if err != nil {
		return nil, err
	}
	return parseSettings(out), nil
}

// parseSettings reads "name = value" a line, "name =" for one that is not set,
// "name" or "no_name" for a boolean, which become "true" and "false", and the
// bare path that is configure_file.
func parseSettings(out []byte) map[string]string {
	m := make(map[string]string)
	for line := range strings.SplitSeq(string(out), "\n") {
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\r"), "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		switch off, no := strings.CutPrefix(name, "no_"); {
		case strings.HasPrefix(line, "/"): // configure_file is told without its name
			m["configure_file"] = clip(strings.TrimSpace(line))
		case name == "" || strings.ContainsAny(name, " /\""):
		case ok:
			m[name] = clip(value)
		case no:
			m[off] = "false"
		default:
			m[name] = "true"
		}
	}
	return m
}
