package exim

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// ErrCannotTell means that whether an address is in a host list depends on
// more than the address: on names, on files, on the connection.
var ErrCannotTell = errors.New("it depends on more than the address")

// InHostList asks the Exim at path (Config.Path) whether a host list of its
// configuration has an address in it, as ${if match_ip} finds it: with its
// separator, negations, networks and named lists. It takes 10 s at most. The
// error is ErrCannotTell where a yes or no would be a guess.
//
// A test by address alone passes over the items that are host names, which the
// daemon looks up: so a yes is one, and a no only if no item was passed over.
func InHostList(ctx context.Context, path, list string, a netip.Addr) (bool, error) {
	switch {
	case strings.TrimSpace(list) == "":
		return false, nil
	case strings.ContainsAny(list, "${}\\\n"), len(list) > 8<<10: // would be expanded, here or there
		return false, ErrCannotTell
	}
	out, err := said(ctx, path, "-be", "${if match_ip{"+a.String()+"}{"+list+"}{yes}{no}}")
	if err != nil {
		return false, err
	}
	switch answer := strings.TrimSpace(string(out)); {
	case answer == "yes":
		return true, nil
	case answer == "no" && onlyAddresses(list):
		return false, nil
	case answer == "no":
		return false, ErrCannotTell
	default:
		return false, fmt.Errorf("%w: %s -be answers %q", ErrCannotTell, path, oneLine(out))
	}
}

// onlyAddresses reports whether every item of a host list is an address or a
// network, or all hosts. Items are parted by colons, of which one that belongs
// to an item is doubled, or by what follows a "<" at the beginning.
func onlyAddresses(list string) bool {
	sep := ":"
	if rest, ok := strings.CutPrefix(strings.TrimSpace(list), "<"); ok && rest != "" {
		sep, list = rest[:1], rest[1:]
	}
	list = strings.ReplaceAll(list, sep+sep, "\x00")
	for item := range strings.SplitSeq(list, sep) {
		item = strings.TrimSpace(strings.ReplaceAll(item, "\x00", sep))
		item = strings.TrimSpace(strings.TrimPrefix(item, "!"))
		if item == "" || item == "*" {
			continue
		}
		_, aerr := netip.ParseAddr(item)
		_, perr := netip.ParsePrefix(item)
		if aerr != nil && perr != nil {
			return false
		}
	}
	return true
}
