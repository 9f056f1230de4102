//go:build !race

package detector

// raceDetector is set where the race detector makes everything ten times
// slower.
const raceDetector = false
