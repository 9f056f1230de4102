package tail

import "time"

// lateMax is how long a finished file is kept open after it last grew. Exim's
// processes look at the log's name for each line (log.c), so a writer as late
// as that is one that hung, or another program.
const lateMax = 10 * time.Minute

// readLate delivers what was written to the finished file after its grace
// time, and lets the file go when nothing more is expected of it. These lines
// come out of their order, and where to resume after them is where the present
// file is read to: if we are stopped before we see them they are lost, but none
// is ever delivered twice.
func (t *follower) readLate() error {
	if t.late == nil {
		return nil
	}
	// An open file that was deleted still takes room on the disk. What was
	// written before that is still read.
	gone := deleted(t.late.f)
	more, err := t.catchUpLate()
	if err != nil {
		return err
	}
	if !more || gone || time.Since(t.lateSeen) >= lateMax {
		return t.letLateGo()
	}
	return nil
}

// endLate is readLate for the last time: another file is to be finished, or
// the log is.
func (t *follower) endLate() error {
	if t.late == nil {
		return nil
	}
	if _, err := t.catchUpLate(); err != nil {
		return err
	}
	return t.letLateGo()
}

// catchUpLate reads the late file to its end; more: it may grow yet. It uses
// buf and lines, so both must be done with.
func (t *follower) catchUpLate() (more bool, err error) {
	f := t.late
	st, err := f.look()
	if err != nil || st.size < f.at || !st.same {
		return false, nil // truncated: compressed by a program that does it in place, or emptied
	}
	for {
		n, err := f.read(t.buf)
		if err != nil {
			return false, nil
		}
		if n == 0 {
			return true, nil
		}
		t.lateSeen = time.Now()
		f.advance(t.buf[:n])
		t.lines = t.lines[:0]
		t.lateSplit.split(t.buf[:n], t.addLate)
		if err := t.tellLate(); err != nil {
			return false, err
		}
	}
}

// letLateGo delivers the half line that the late file ends in, and closes it.
func (t *follower) letLateGo() error {
	t.lines = t.lines[:0]
	if t.lateSplit.halfLen > 0 {
		text, size, truncated := t.lateSplit.take()
		if len(text) > 0 { // else only a hole
			t.addLate(text, size, truncated)
		}
	}
	err := t.tellLate()
	t.dropLate()
	return err
}

// addLate appends a line of the late file to the batch.
func (t *follower) addLate(text []byte, size int64, truncated bool) {
	t.late.off += size
	t.noteLate()
	t.lines = append(t.lines, Line{Text: text, Next: t.here(), Truncated: truncated})
}

// tellLate emits the lines of the late file, if there are any.
func (t *follower) tellLate() error {
	if len(t.lines) == 0 {
		return nil
	}
	b := Batch{Lines: t.lines, Next: t.here(), Late: true, CaughtUp: t.caughtUp}
	t.lines = t.lines[:0]
	return t.emit(b)
}

// noteLate notes where the late file is read to, in the place of what was
// noted when it was finished.
func (t *follower) noteLate() {
	p := t.late.place(t.late.off)
	if i := len(t.done) - 1; i >= 0 && t.done[i].Dev == p.Dev && t.done[i].Inode == p.Inode {
		t.done[i] = p
	} else {
		t.done = append(t.done, p)
	}
}

// dropLate closes the late file. Its half line is dropped with it: see
// letLateGo.
func (t *follower) dropLate() {
	if t.late != nil {
		t.late.close()
		t.late = nil
	}
}
