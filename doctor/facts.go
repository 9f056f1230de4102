package doctor

import (
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
)

// Facts are what Look found. An error beside a fact says why it is missing.
type Facts struct {
	Now time.Time
	// Root: we are root, and may look at everything.
	Root     bool
	System   System
	Hostname string // of this machine; "": not known

	Policy     *policy.Policy // never nil: the default if PolicyErr
	PolicyPath string         // "" if the shipped one is used
	PolicyErr  error

	Exim    exim.Config
	EximErr error
	// Settings are further options of Exim, see eximSettings; nil: not asked.
	Settings map[string]string
	// Set is where Exim's configuration sets what, by names of options and
	// macros; SetErr why not all of it could be read.
	Set    map[string][]Setting
	SetErr error
	// ReserveLocal: smtp_reserve_hosts has 127.0.0.1 in it. ReserveErr: why
	// that cannot be told.
	ReserveLocal bool
	ReserveErr   error

	LogErr error // of finding them
	Logs   []Log

	Sockets  Sockets
	Filter   Filter
	CSF      *firewall.CSFState // nil: none
	CSFErr   error
	Others   []string // other firewalls
	Daemon   *guard.Status
	DaemonUp error // why Daemon is nil
	// Lacks are capabilities that the daemon, or where none runs this process,
	// does not have.
	Lacks    []string
	LacksErr error

	Store   Store
	Unit    Unit
	UnitErr error
	Clock   Clock

	// Exempt are never blocked: this machine's own, and in Allowed also what
	// the policy and the operator allow.
	Exempt    []guard.Exempt
	ExemptErr error
	Allowed   []netip.Prefix
	// Peer is who is logged in here by SSH; invalid: nobody.
	Peer netip.Addr
	// Advice on abuse reports.
	Advice []string
}

// System says how Exim is configured here.
type System string

const (
	CPanel      System = "cpanel"
	DirectAdmin System = "directadmin"
	DebianSplit System = "debian-split" // /etc/exim4/conf.d
	Debian      System = "debian"       // /etc/exim4/exim4.conf.template
	Other       System = ""
)

// Log is a log of Exim.
type Log struct {
	Path    string
	Err     error // why it cannot be read
	Mode    string
	Owner   string // "Debian-exim:adm"
	Size    int64
	Written time.Time
	// Of its end, SampleSize bytes at most.
	Stats    exim.Stats
	LastLine time.Time // by its own words; zero: none
	Offset   bool      // its times have their offset
	Grew     bool      // while it was looked at: the last line was written just then
	Regulars []Regular
}

// Regular is an address that connects at even intervals and sends no mail.
type Regular struct {
	Addr  netip.Addr
	Every time.Duration
	Times int
}

// Sockets is what the kernel's socket table says.
type Sockets struct {
	Err        error
	CanDestroy bool
	Why        error // why not
	// Listen are the policy's ports on which something listens; Programs who.
	Listen    []uint16
	Programs  []string
	ListenErr error
}

// Filter is the packet filter.
type Filter struct {
	Backend, Why string
	Err          error
	Chains       []firewall.Chain
	ChainsErr    error
}

// Store is the file of what must survive.
type Store struct {
	Path    string
	Missing bool
	InUse   bool // by the daemon
	Err     error
	Size    int64
	Free    uint64 // bytes on its disk; 0: not known
	Good    int    // known good senders; -1: not known
}

// Clock is the machine's.
type Clock struct {
	Err    error
	Synced bool
}

// log is the first that can be read.
func (f *Facts) log() (Log, bool) {
	for _, l := range f.Logs {
		if l.Err == nil {
			return l, true
		}
	}
	return Log{}, false
}

// writes reports whether this machine's Exim writes a log that is followed:
// only then is its configuration of interest.
func (f *Facts) writes() bool {
	if f.EximErr != nil {
		return false
	}
	for _, l := range f.Logs {
		if l.Path == f.Exim.MainLog {
			return true
		}
	}
	return false
}
