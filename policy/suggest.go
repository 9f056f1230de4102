package policy

import "strings"

// enumerate writes "a, b or c".
func enumerate(words []string, or string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " " + or + " " + words[last]
}

// Nearest returns the word that somebody most likely meant who wrote another,
// or "". Words may have hyphens, but no underscores.
func Nearest(written string, words []string) string {
	plain := make([]string, len(words))
	for i, w := range words {
		plain[i] = strings.ReplaceAll(w, "-", "_")
	}
	return strings.ReplaceAll(nearest(written, plain), "_", "-")
}

// nearest returns the word that somebody most likely meant, or nothing.
func nearest(written string, words []string) string {
	if len(written) > 40 {
		return ""
	}
	written = strings.ReplaceAll(strings.ToLower(written), "-", "_")
	best, bestDistance := "", 3
	for _, w := range words {
		if d := distance(written, w); d < bestDistance && d < (len(w)+1)/2 {
			best, bestDistance = w, d
		}
	}
	if best != "" || len(written) < 3 {
		return best
	}
	for _, w := range words { // "threshold_percent", "max"
		if strings.HasPrefix(w, written) || strings.HasPrefix(written, w) {
			return w
		}
	}
	return ""
}

// distance is the number of letters to add, remove, replace or swap with
// their neighbour to get from a to b (optimal string alignment).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d := min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}
