// Package smtpguard holds what the program carries with it. The program
// itself is in cmd/smtpguard.
package smtpguard

import _ "embed"

// PolicyYAML is the shipped policy file, as `smtpguard policy init` writes
// it: every setting with its unit, at its default.
//
//go:embed policy.yaml
var PolicyYAML string
