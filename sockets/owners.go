package sockets

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// What is looked at in procfs, at most. A large server has some thousand
// processes; an Exim child some dozen descriptors.
const (
	maxProcesses   = 1 << 17
	maxDescriptors = 1 << 17 // per process
	maxTitle       = 512     // bytes
)

// Process is a process that has a socket open.
type Process struct {
	PID int
	// Name is the base name of its executable, or if that may not be read
	// what the process calls itself.
	Name string
	// Title is its command line as it shows in ps(1), cut after 512 bytes;
	// the process can set it as it likes.
	Title string
}

// Owners returns the processes that have these sockets open, by inode. It
// walks through procfs, so it costs some microseconds per descriptor on the
// machine; processes of which we may not read the descriptors are missing, as
// are those of other PID namespaces. Inode 0 is no socket.
func (t *Table) Owners(ctx context.Context, inodes []uint32) (map[uint32][]Process, error) {
	want := make(map[uint32]bool, len(inodes))
	for _, i := range inodes {
		if i != 0 {
			want[i] = true
		}
	}
	owners := make(map[uint32][]Process)
	if len(want) == 0 {
		return owners, nil
	}
	err := t.eachProcess(ctx, func(p proc) error {
		var self *Process
		return p.eachSocket(func(inode uint32) bool {
			if want[inode] {
				if self == nil {
					self = &Process{PID: p.pid, Name: p.name(), Title: p.title()}
				}
				if of := owners[inode]; len(of) == 0 || of[len(of)-1].PID != p.pid {
					owners[inode] = append(of, *self)
				}
			}
			return true
		})
	})
	if err != nil {
		return owners, fmt.Errorf("finding the processes of sockets: %w", err)
	}
	return owners, nil
}

// proc is a process in procfs. It may end at any time: every method then
// finds nothing, or an error that errors.Is(err, os.ErrNotExist) or ESRCH.
type proc struct {
	dir string
	pid int
}

// eachProcess calls f for every process, until one call returns an error.
func (t *Table) eachProcess(ctx context.Context, f func(proc) error) error {
	dir, err := os.Open(t.o.ProcRoot)
	if err != nil {
		return err
	}
	defer dir.Close()
	for n := 0; ; {
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			pid, err := strconv.Atoi(name)
			if err != nil || pid <= 0 {
				continue
			}
			if n++; n > maxProcesses {
				return fmt.Errorf("more than %d processes: %w", maxProcesses, ErrTooMany)
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(t.proc(pid)); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *Table) proc(pid int) proc {
	return proc{dir: filepath.Join(t.o.ProcRoot, strconv.Itoa(pid)), pid: pid}
}

// eachSocket calls f with the inode of every socket that the process has
// open, until f returns false. A process that is gone or hidden has none.
func (p proc) eachSocket(f func(inode uint32) bool) error {
	fds := filepath.Join(p.dir, "fd")
	dir, err := os.Open(fds)
	if err != nil {
		return nil
	}
	defer dir.Close()
	for n := 0; ; {
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			if n++; n > maxDescriptors {
				return fmt.Errorf("process %d has more than %d descriptors: %w", p.pid, maxDescriptors, ErrTooMany)
			}
			target, err := os.Readlink(filepath.Join(fds, name))
			if err != nil {
				continue
			}
			if inode, ok := socketInode(target); ok && !f(inode) {
				return nil
			}
		}
		if err != nil {
			return nil // the end, or the process's
		}
	}
}

// socketInode parses "socket:[12345]", what proc(5) shows for a descriptor of
// a socket.
func socketInode(target string) (uint32, bool) {
	s, ok := strings.CutPrefix(target, "socket:[")
	if !ok {
		return 0, false
	}
	if s, ok = strings.CutSuffix(s, "]"); !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil
}

// exe returns the base name of the executable, "" if it may not be read.
func (p proc) exe() string {
	target, err := os.Readlink(filepath.Join(p.dir, "exe"))
	if err != nil {
		return ""
	}
	return filepath.Base(strings.TrimSuffix(target, " (deleted)"))
}

// comm returns what the process was started as, at most 15 bytes, unless it
// has given itself another name.
func (p proc) comm() string {
	return strings.TrimSuffix(p.read("comm", 64), "\n")
}

func (p proc) name() string {
	if exe := p.exe(); exe != "" {
		return exe
	}
	return p.comm()
}

func (p proc) title() string {
	return strings.TrimRight(strings.ReplaceAll(p.read("cmdline", maxTitle), "\x00", " "), " ")
}

// read returns the first n bytes of a file of the process, "" if it is gone.
func (p proc) read(name string, n int64) string {
	f, err := os.Open(filepath.Join(p.dir, name))
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, n))
	if err != nil {
		return ""
	}
	return string(b)
}
