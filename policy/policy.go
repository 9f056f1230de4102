// Package policy states what smtpguard may do: it reads and checks
// policy.yaml, and keeps the list of addresses that are never blocked.
package policy

import (
	"net/netip"
	"slices"
	"time"
	_ "time/tzdata" // the same zone names are valid on every machine

	"github.com/smtpguard/smtpguard/detector"
)

// Mode says what becomes of a decision to block.
type Mode string

const (
	Observe Mode = "observe" // decided, recorded and told; no packet is dropped
	Enforce Mode = "enforce" // blocked
)

// Confirm says what must agree with the log before a source is blocked.
type Confirm string

const (
	ConfirmSockets Confirm = "sockets" // the kernel's socket table
	ConfirmOff     Confirm = "off"     // nothing: the log alone decides
)

// BlockPorts says what a blocked source cannot reach.
type BlockPorts string

const (
	BlockSMTP BlockPorts = "smtp" // the ports of Policy.Ports
	BlockAll  BlockPorts = "all"  // every port and protocol
)

// Overlap says what becomes of a block with somebody in it who is allowed.
type Overlap string

const (
	OverlapSplit  Overlap = "split"  // the rest of it is blocked
	OverlapRefuse Overlap = "refuse" // nothing is
)

// Backend names a packet filter, as firewall.Open knows it.
type Backend string

const (
	BackendAuto     Backend = "auto"
	BackendNftables Backend = "nftables"
	BackendIptables Backend = "iptables" // with ipset; without it each block is a rule
	BackendCSF      Backend = "csf"      // through the csf command
	BackendMemory   Backend = "memory"   // drops nothing
)

// Hook says where in the kernel packets are dropped.
type Hook string

const (
	HookPrerouting Hook = "prerouting" // ahead of conntrack; protects containers too
	HookInput      Hook = "input"      // only what is for this machine itself
)

// CSF says what CSF learns of blocks that another backend makes.
type CSF string

const (
	CSFCooperate CSF = "cooperate" // it shows the widest and worst as temporary denies
	CSFIgnore    CSF = "ignore"    // nothing
)

// OnStop says what happens to blocks when the daemon is stopped.
type OnStop string

const (
	Keep   OnStop = "keep"   // they stay in force until their time
	Remove OnStop = "remove" // they are taken out of the packet filter
)

// Auto is the value of a setting that is found out on the machine.
const Auto = "auto"

// Names of logs that are no files.
const (
	Journald = "journald" // the systemd journal
	Stdin    = "-"        // standard input
)

// LogCandidates are the main logs to try, in this order, where a log is
// "auto" and Exim does not say where it writes: the places of cPanel and
// DirectAdmin, of Debian, and of Exim's own packages elsewhere.
var LogCandidates = []string{
	"/var/log/exim_mainlog",
	"/var/log/exim4/mainlog",
	"/var/log/exim/main.log",
}

// Policy is a policy.yaml that was found to be without faults. The zero
// Policy is not valid; start from Default.
type Policy struct {
	Mode Mode
	// Commit is how long an enforcing start waits for `smtpguard commit`
	// before it lifts every block and only observes; 0: it waits for nothing.
	Commit time.Duration
	// Logs are absolute paths of Exim main logs, which may have a date (%D,
	// %M, as Exim's log_file_path has it) or a wildcard (*, ?, [...]) in them;
	// or Journald, Stdin, or Auto. At least one.
	Logs []string
	// Zone is the time zone of log lines that state none: Auto, "UTC" or an
	// IANA name. See Location.
	Zone string
	// Capacity is the number of connections that the server takes at the
	// same time (slots); 0 means that it is found out.
	Capacity int
	Confirm  Confirm
	// Ports are the mail server's TCP ports; at least one, none twice.
	Ports      []uint16
	Saturation Saturation
	// Rules have distinct names. None at all means that only an operator blocks.
	Rules     []detector.Rule
	Block     Block
	KnownGood KnownGood
	// Memory bounds what the detector remembers, in bytes.
	Memory int64
	// Allow are the prefixes that are never blocked, also those that the
	// AllowFiles held when the policy was read.
	Allow      []AllowEntry
	AllowNames []AllowName // whose addresses are never blocked; at most MaxAllowNames
	AllowFiles []AllowFile
	Firewall   Firewall
	Store      Store
	Control    Control
	Reports    Reports
	Metrics    Metrics
	Hooks      []EventHook
}

// Saturation says when a server is full: shares of the capacity, with
// 0 < PressureFrom < SaturatedAt <= 1.
type Saturation struct {
	// PressureFrom is the share of taken slots from which holding slots counts.
	PressureFrom float64
	// SaturatedAt is the share from which it counts in full.
	SaturatedAt float64
}

// Block says how long, how wide and how many.
type Block struct {
	// For is how long the first, second, ... block of a source lasts; the
	// last one stands for all further ones. At least one, never falling.
	For []time.Duration
	// Forget is how long after the end of its last block a source counts as
	// a first offender again. It is no shorter than the last step of For.
	Forget time.Duration
	// MaxPrefix4 and MaxPrefix6 are the widest prefixes that may be blocked,
	// in bits: 8 to 32 and 16 to 128.
	MaxPrefix4, MaxPrefix6 int
	// MaxBlocks is the largest number of blocks in force at the same time.
	MaxBlocks int
	// MaxNewPerMinute is the largest number of blocks that verdicts may make
	// in any 60 s.
	MaxNewPerMinute int
	// MaxGoodShare is the largest share of the senders in good standing that
	// rules may block within some minutes before they are stopped, 0 to 1; 1 is
	// no limit.
	MaxGoodShare float64
	Overlap      Overlap
	Ports        BlockPorts
}

// KnownGood says how senders that delivered mail are treated.
type KnownGood struct {
	// Factor multiplies the thresholds for a known good sender; 1 or more.
	// See detector.KnownGood.
	Factor float64
	// MaxAge is how long a sender counts as known good after its last mail.
	MaxAge time.Duration
	// Max is the largest number of senders that are remembered; 1 or more.
	Max int
}

// Firewall names the packet filter and how it is used.
type Firewall struct {
	Backend Backend
	Hook    Hook
	OnStop  OnStop
	CSF     CSF
}

// Store says where the state is kept.
type Store struct {
	Path string // absolute
}

// AllowFile is a "file:" entry of the allowlist: a file with one address or
// prefix a line.
type AllowFile struct {
	Path string // absolute
	Note string // what a person wrote beside it; may be empty
}

// Control says how the command line reaches the daemon.
type Control struct {
	Socket string // absolute
	// Group may use the socket beside root; empty: nobody else.
	Group string
}

// Default returns the policy that an empty file gives. It is what the
// shipped policy.yaml says.
func Default() *Policy {
	return &Policy{
		Mode:       Observe,
		Logs:       []string{Auto},
		Zone:       Auto,
		Confirm:    ConfirmSockets,
		Ports:      []uint16{25, 465, 587},
		Saturation: Saturation{PressureFrom: 0.5, SaturatedAt: 0.9},
		Rules:      detector.DefaultRules(),
		Block: Block{
			For:             []time.Duration{10 * time.Minute, time.Hour, day, week},
			Forget:          30 * day,
			MaxPrefix4:      16,
			MaxPrefix6:      32,
			MaxBlocks:       100_000,
			MaxNewPerMinute: 200,
			MaxGoodShare:    0.1,
			Overlap:         OverlapSplit,
			Ports:           BlockSMTP,
		},
		KnownGood: KnownGood{Factor: 2, MaxAge: 30 * day, Max: 100_000},
		Memory:    64 << 20,
		Firewall:  Firewall{Backend: BackendAuto, Hook: HookPrerouting, OnStop: Keep, CSF: CSFCooperate},
		Store:     Store{Path: "/var/lib/smtpguard/smtpguard.db"},
		Control:   Control{Socket: "/run/smtpguard/smtpguard.sock"},
		Reports:   defaultReports(),
		Hooks:     []EventHook{},
	}
}

// Location returns the zone of log lines that state none; nil means that it
// is to be found out (Auto).
func (p *Policy) Location() *time.Location {
	if p.Zone == Auto {
		return nil
	}
	loc, err := time.LoadLocation(p.Zone)
	if err != nil {
		return nil // not reached: the name was checked when the file was read
	}
	return loc
}

// BlockedPorts returns the TCP ports that a blocked source cannot reach;
// empty means every port and protocol.
func (p *Policy) BlockedPorts() []uint16 {
	if p.Block.Ports == BlockAll {
		return nil
	}
	return slices.Clone(p.Ports)
}

// Duration returns how long the offence-th block of a source lasts; offences
// count from 1.
func (b Block) Duration(offence int) time.Duration {
	return b.For[min(max(offence, 1), len(b.For))-1]
}

// TooWide reports whether a prefix is wider than may be blocked.
func (b Block) TooWide(prefix netip.Prefix) bool {
	prefix = Canonical(prefix)
	if prefix.Addr().Is4() {
		return prefix.Bits() < b.MaxPrefix4
	}
	return prefix.Bits() < b.MaxPrefix6
}
