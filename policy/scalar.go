package policy

import (
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// scalar is a single value.
type scalar[T any] struct {
	p     *T
	what  string // "a number of slots or auto"
	parse func(text string, quoted bool) (T, *fault)
	show  func(T) *yaml.Node
}

func (s scalar[T]) read(d *decoder, path string, n *yaml.Node) {
	if !d.accept(path, n, yaml.ScalarNode, s.what) {
		return
	}
	quoted := n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0
	v, f := s.parse(n.Value, quoted)
	if f != nil {
		d.fail(path, n, &fault{path + ": " + f.msg, f.hint})
		return
	}
	*s.p = v
}

func (s scalar[T]) node() *yaml.Node { return s.show(*s.p) }

func textNode(s string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
}

func numberNode(s string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: s}
	if strings.Contains(s, ".") {
		n.Tag = "!!float"
	}
	return n
}

// word is one of a few words.
func word[T ~string](p *T, words ...T) codec {
	names := make([]string, len(words))
	for i, w := range words {
		names[i] = string(w)
	}
	return scalar[T]{p, enumerate(names, "or"),
		func(s string, _ bool) (T, *fault) {
			if slices.Contains(names, s) {
				return T(s), nil
			}
			hint := "want " + enumerate(names, "or")
			if guess := nearest(s, names); guess != "" {
				hint = "did you mean " + guess + "? " + hint
			}
			return "", faultf(hint, "unknown value %s", quote(s))
		},
		func(v T) *yaml.Node { return textNode(string(v)) },
	}
}

var wholeForm = regexp.MustCompile(`^-?(0|[1-9][0-9]{0,17})$`)

func parseWhole(s string, quoted bool, lo, hi int64) (int64, *fault) {
	want := "want " + formatWhole(lo) + " to " + formatWhole(hi)
	if digits := strings.TrimPrefix(s, "-"); len(digits) > 18 && strings.Trim(digits, "0123456789") == "" {
		return 0, faultf(want, "%s is out of range", clip(s))
	}
	if !wholeForm.MatchString(s) {
		if plain := strings.NewReplacer(",", "", "_", "", " ", "").Replace(s); plain != s && wholeForm.MatchString(plain) {
			want = "did you mean " + plain + "?"
		}
		return 0, faultf(want, "%s is not a whole number", quote(s))
	}
	if quoted {
		return 0, faultf("remove the quotation marks", "%s is text, not a number", quote(s))
	}
	n, _ := strconv.ParseInt(s, 10, 64) // 18 digits always fit
	if n < lo || n > hi {
		return 0, faultf(want, "%d is out of range", n)
	}
	return n, nil
}

func formatWhole(n int64) string { return strconv.FormatInt(n, 10) }

// whole is a whole number from lo to hi.
func whole[T int | uint16](p *T, lo, hi T) codec {
	return scalar[T]{p, "a number from " + formatWhole(int64(lo)) + " to " + formatWhole(int64(hi)),
		func(s string, quoted bool) (T, *fault) {
			n, f := parseWhole(s, quoted, int64(lo), int64(hi))
			return T(n), f
		},
		func(v T) *yaml.Node { return numberNode(formatWhole(int64(v))) },
	}
}

// wholeOrAuto is a whole number from 1 to hi, or auto for 0.
func wholeOrAuto(p *int, hi int) codec {
	return scalar[int]{p, "auto or a number from 1 to " + strconv.Itoa(hi),
		func(s string, quoted bool) (int, *fault) {
			if s == Auto {
				return 0, nil
			}
			n, f := parseWhole(s, quoted, 1, int64(hi))
			if f != nil {
				if !quoted {
					f.hint += ", or auto"
				}
				if guess := nearest(s, []string{Auto}); guess != "" {
					f.hint = "did you mean auto?"
				}
			}
			return int(n), f
		},
		func(v int) *yaml.Node {
			if v == 0 {
				return textNode(Auto)
			}
			return numberNode(strconv.Itoa(v))
		},
	}
}

var numberForm = regexp.MustCompile(`^-?[0-9]{1,18}(\.[0-9]{0,18})?$`)

// number is a number, decimal point allowed, from lo to hi.
func number(p *float64, lo, hi float64) codec {
	want := "a number from " + formatNumber(lo) + " to " + formatNumber(hi)
	return scalar[float64]{p, want,
		func(s string, quoted bool) (float64, *fault) {
			if percent, ok := strings.CutSuffix(s, "%"); ok && numberForm.MatchString(percent) {
				f, _ := strconv.ParseFloat(percent, 64)
				return 0, faultf("a share is written as "+formatNumber(math.Round(f*1e6)/1e8), "%s is not a number", quote(s))
			}
			if !numberForm.MatchString(s) {
				return 0, faultf("want "+want, "%s is not a number", quote(s))
			}
			if quoted {
				return 0, faultf("remove the quotation marks", "%s is text, not a number", quote(s))
			}
			f, err := strconv.ParseFloat(s, 64)
			if err != nil || f < lo || f > hi {
				return 0, faultf("want "+want, "%s is out of range", clip(s))
			}
			return f, nil
		},
		func(v float64) *yaml.Node { return numberNode(formatNumber(v)) },
	}
}

func formatNumber(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// span is a duration from lo to hi.
func span(p *time.Duration, lo, hi time.Duration) codec {
	want := "a duration from " + FormatDuration(lo) + " to " + FormatDuration(hi)
	return scalar[time.Duration]{p, want,
		func(s string, _ bool) (time.Duration, *fault) {
			d, f := parseDuration(s)
			if f != nil {
				return 0, f
			}
			if d < lo || d > hi {
				return 0, faultf("want "+want, "%s is out of range", clip(s))
			}
			if d%time.Second != 0 {
				return 0, faultf("want "+want, "%s is not a whole number of seconds", clip(s))
			}
			return d, nil
		},
		func(v time.Duration) *yaml.Node { return textNode(FormatDuration(v)) },
	}
}

// size is a number of bytes from lo to hi.
func size(p *int64, lo, hi int64) codec {
	want := "a size from " + formatSize(lo) + " to " + formatSize(hi)
	return scalar[int64]{p, want,
		func(s string, _ bool) (int64, *fault) {
			n, f := parseSize(s)
			if f == nil && (n < lo || n > hi) {
				f = faultf("want "+want, "%s is out of range", clip(s))
			}
			return n, f
		},
		func(v int64) *yaml.Node { return textNode(formatSize(v)) },
	}
}

// text is any text that check finds nothing wrong with.
func text(p *string, what string, check func(string) *fault) codec {
	return scalar[string]{p, what,
		func(s string, _ bool) (string, *fault) { return s, check(s) },
		textNode,
	}
}

// lengthPrefix is a prefix length, written as "/24".
func lengthPrefix(p *int, lo, hi int) codec {
	want := "want /" + strconv.Itoa(lo) + " to /" + strconv.Itoa(hi)
	return scalar[int]{p, "a prefix length such as /" + strconv.Itoa(hi),
		func(s string, _ bool) (int, *fault) { return parseLength(s, lo, hi, want) },
		func(v int) *yaml.Node { return textNode("/" + strconv.Itoa(v)) },
	}
}

func parseLength(s string, lo, hi int, want string) (int, *fault) {
	digits, slash := strings.CutPrefix(s, "/")
	if !wholeForm.MatchString(digits) || digits[0] == '-' {
		return 0, faultf(want, "%s is not a prefix length", quote(s))
	}
	if !slash {
		return 0, faultf("did you mean /"+digits+"?", "%s is not a prefix length", quote(s))
	}
	n, _ := strconv.Atoi(digits)
	if n < lo || n > hi {
		return 0, faultf(want, "/%d is out of range", n)
	}
	return n, nil
}
