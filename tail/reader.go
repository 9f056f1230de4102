package tail

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// FollowReader delivers the lines of a stream until it ends or ctx does, when
// it returns nil, or emit fails, when it returns that error. A half line at the
// end is a line. Positions are zero: a stream cannot be resumed.
//
// Reading a file (a pipe, a terminal) ends with ctx; another Reader must end
// by itself.
func FollowReader(ctx context.Context, r io.Reader, o Options, emit func(Batch) error) error {
	o = o.withDefaults()
	split := splitter{max: o.MaxLine}
	buf := make([]byte, readSize)
	var lines []Line
	add := func(text []byte, _ int64, truncated bool) {
		lines = append(lines, Line{Text: text, Truncated: truncated})
	}
	first := true
	for {
		waiting, err := ready(r, 0)
		if err == nil && !waiting && first {
			first = false
			if err := emit(Batch{CaughtUp: true}); err != nil {
				return ended(ctx, err)
			}
		}
		for err == nil && !waiting && ctx.Err() == nil {
			waiting, err = ready(r, 200)
		}
		if ctx.Err() != nil {
			return nil
		}
		n := 0
		if err == nil {
			n, err = r.Read(buf)
		}
		lines = lines[:0]
		split.split(buf[:n], add)
		if err != nil && split.halfLen > 0 {
			if text, size, truncated := split.take(); len(text) > 0 {
				add(text, size, truncated)
			}
		}
		more, _ := ready(r, 0)
		if len(lines) > 0 || err != nil {
			first = false
			if err := emit(Batch{Lines: lines, Late: true, CaughtUp: err != nil || !more}); err != nil {
				return ended(ctx, err)
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

// ended is emit's error, unless it is only the end of ctx.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// ready waits up to ms milliseconds for something to read. Only a file can
// tell; of another Reader it is assumed.
func ready(r io.Reader, ms int) (bool, error) {
	f, ok := r.(*os.File)
	if !ok {
		return true, nil
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	var n int
	var perr error
	err = conn.Control(func(fd uintptr) {
		n, perr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, ms)
	})
	if errors.Is(perr, unix.EINTR) {
		return false, nil
	}
	return n > 0, errors.Join(err, perr)
}
