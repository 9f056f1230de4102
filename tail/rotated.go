package tail

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// generation is one file of the log's history as the directory shows it.
type generation struct {
	name  string
	id    id
	size  int64
	mtime time.Time
	// number is the N of log.N and log.N.gz: larger is older. date is the
	// digits of log-20261122 and the like: larger is newer. One of the two.
	number int
	date   string
}

// rotated lists the rotated files of the log beside each of the paths, oldest
// first, without the paths themselves. settled is false if they were renamed
// all the time: then the list may lack some of them, and must not be used to
// decide which file comes next.
func rotated(paths ...string) (gs []generation, settled bool) {
	gs, settled = twice(func() []generation { return list(paths) })
	order(gs)
	return gs, settled
}

func list(paths []string) []generation {
	var gs []generation
	seen := map[string]bool{}
	for _, p := range paths {
		dir, base := filepath.Split(p)
		if dir == "" {
			dir = "."
		}
		ents, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range ents {
			name := filepath.Join(dir, e.Name())
			number, date, ok := suffix(base, e.Name())
			if !ok || seen[name] {
				continue
			}
			fi, err := os.Stat(name)
			if err != nil || !fi.Mode().IsRegular() {
				continue
			}
			seen[name] = true
			gs = append(gs, generation{name, idOf(fi), fi.Size(), fi.ModTime(), number, date})
		}
	}
	// While gzip is at work both log.1 and an unfinished log.1.gz are there.
	// While files are renamed that may also be two.
	return slices.DeleteFunc(gs, func(g generation) bool {
		plain := trimCompressed(g.name)
		return plain != g.name && seen[plain] && !other(g.name, plain)
	})
}

// other reports whether a compressed file is certainly not made of the plain
// one.
func other(packed, plain string) bool {
	p, err := openFile(plain)
	if err != nil {
		return false
	}
	defer p.close()
	z, err := openFile(packed)
	if err != nil {
		return false
	}
	defer z.close()
	b := make([]byte, headMin)
	n, err := z.read(b)
	if n == 0 || err != nil {
		return false
	}
	mark := p.mark()
	if mark.HeadLen == 0 {
		return true
	}
	z.advance(b[:n])
	err = z.seek(mark.Offset)
	return (err == nil || err == errShort) && (len(z.head) < mark.HeadLen || checksum(z.head[:mark.HeadLen]) != mark.Head)
}

// suffix reads what a rotation adds to the name of a log: .1, .01, .2.gz,
// -20261122, .2026-11-22, -20261122-1795376652.xz; and the same before the
// ending of the log's name (logrotate's "extension"); and what logrotate makes
// of a log that the mail server created before it could: -2026112219.backup.
func suffix(base, name string) (number int, date string, ok bool) {
	name = strings.TrimSuffix(trimCompressed(name), ".backup")
	rest, ok := strings.CutPrefix(name, base)
	if !ok {
		ext := filepath.Ext(base)
		stem := strings.TrimSuffix(base, ext)
		if ext == "" || stem == "" {
			return 0, "", false
		}
		if rest, ok = strings.CutPrefix(name, stem); !ok {
			return 0, "", false
		}
		if rest, ok = strings.CutSuffix(rest, ext); !ok {
			return 0, "", false
		}
	}
	if len(rest) < 2 || len(rest) > 64 || !strings.ContainsRune(".-_", rune(rest[0])) {
		return 0, "", false
	}
	if digits := rest[1:]; rest[0] == '.' && len(digits) <= 5 && strings.Trim(digits, "0123456789") == "" {
		number, _ = strconv.Atoi(digits)
		return number, "", true
	}
	digits := strings.Map(func(r rune) rune {
		if strings.ContainsRune(".-_:T", r) {
			return -1
		}
		return r
	}, rest)
	if len(digits) > 32 || strings.Trim(digits, "0123456789") != "" || !beginsWithDate(digits) {
		return 0, "", false
	}
	return 0, digits, true
}

// beginsWithDate reports whether digits begin with a date, YYYYMMDD or YYYYMM
// alone, or are a time in seconds since 1970 (logrotate's dateformat %s).
// Other numbers are of a name: exim_mainlog-587 is the log of a port.
func beginsWithDate(digits string) bool {
	if len(digits) == 10 && '1' <= digits[0] && digits[0] <= '3' && digits[:2] != "19" && digits[:2] != "20" {
		return true
	}
	layout := "20060102"
	if len(digits) == 6 {
		layout = "200601"
	}
	if len(digits) < len(layout) {
		return false
	}
	t, err := time.Parse(layout, digits[:len(layout)])
	return err == nil && 1990 <= t.Year() && t.Year() < 2100
}

// order sorts oldest first: by name if all names are of one kind, for names
// do not lie when files are rotated within one tick of the clock; else by the
// time of the last write, which renaming and gzip leave alone.
func order(gs []generation) {
	numbers, dates := true, true // year first: with fewer than 8 digits that is not certain
	for _, g := range gs {
		numbers = numbers && g.date == ""
		dates = dates && len(g.date) >= 8 && len(g.date) == len(gs[0].date)
	}
	slices.SortStableFunc(gs, func(a, b generation) int {
		switch {
		case numbers:
			return cmp.Or(cmp.Compare(b.number, a.number), a.mtime.Compare(b.mtime))
		case dates:
			return cmp.Or(cmp.Compare(a.date, b.date), a.mtime.Compare(b.mtime))
		}
		return cmp.Or(a.mtime.Compare(b.mtime), cmp.Compare(b.number, a.number), cmp.Compare(a.name, b.name))
	})
}
