package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// keeper is a process that outlives this one, whatever ends it, by the time
// it takes to kill the mail server and to remove the directory. The kernel's
// own parent-death signal does not do for Exim: it is forgotten when a
// program changes its user.
//
// It reads lines on its standard input, "+PGID" and "-PGID" for process
// groups to be killed or not, and acts when the input ends.
type keeper struct {
	cmd *exec.Cmd
	mu  sync.Mutex
	in  io.WriteCloser
}

func startKeeper(dir string) (*keeper, error) {
	cmd := self("keeper", dir)
	cmd.Stderr = os.Stderr
	// In a group of its own Ctrl-C does not reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	// It must have said that it is there: a program that forgot to call
	// Enter would otherwise run itself again and again.
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the lab's keeper: %w", err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "keeping\n" {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
		return nil, errors.New("starting the lab's keeper: this program calls neither lab.Enter nor lab.Serve first")
	}
	return &keeper{cmd: cmd, in: in}, nil
}

func (k *keeper) watch(pgid int)  { k.say("+%d\n", pgid) }
func (k *keeper) forget(pgid int) { k.say("-%d\n", pgid) }

func (k *keeper) say(format string, pgid int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	// A keeper that is gone has done its work already.
	fmt.Fprintf(k.in, format, pgid)
}

func (k *keeper) close() error {
	k.mu.Lock()
	k.in.Close()
	k.mu.Unlock()
	if err := k.cmd.Wait(); err != nil {
		return fmt.Errorf("the lab's keeper: %w", err)
	}
	return nil
}

// keep is the keeper's process.
func keep() {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	if len(os.Args) != 2 {
		os.Exit(2)
	}
	fmt.Println("keeping")
	groups := map[int]bool{}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		pgid, err := strconv.Atoi(strings.TrimLeft(in.Text(), "+-"))
		if err != nil || pgid <= 1 {
			continue
		}
		if in.Text()[0] == '+' {
			groups[pgid] = true
		} else {
			delete(groups, pgid)
		}
	}
	for pgid := range groups {
		syscall.Kill(-pgid, syscall.SIGKILL)
	}
	if err := os.RemoveAll(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "removing the lab's directory:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
