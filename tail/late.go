package tail

import "time"

// lateMax is how long a finished file is kept open after it last grew. Exim's
// processes look at the log's name for each line (log.c), so a writer as late
// as that is one that hung, or another program.
const lateMax = 10 * time.Minute

// readLate delivers what was written to the finished file after its grace
// time. These lines come out of their order, and where to resume after them
// is where the present file is read to: if we are stopped before we see them
// they are lost, but none is ever delivered twice.
func (t *follower) readLate() error {
	f := t.late
	if f == nil {
		return nil
	}
	st, err := f.look()
	if err != nil || st.size < f.at || !st.same {
		return t.letLateGo() // truncated: compressed by a program that does it in place, or emptied
	}
	for {
		n, err := f.read(t.buf)
		if err != nil {
			return t.letLateGo()
		}
		if n == 0 {
			break
		}
		t.lateSeen = time.Now()
		f.advance(t.buf[:n])
		t.lines = t.lines[:0]
		t.lateSplit.split(t.buf[:n], func(text []byte, size int64, truncated bool) {
			f.off += size
			t.noteLate()
			t.lines = append(t.lines, Line{Text: text, Next: t.here(), Truncated: truncated})
		})
		if len(t.lines) == 0 {
			continue
		}
		b := Batch{Lines: t.lines, Next: t.here(), Late: true, CaughtUp: t.caughtUp}
		t.lines = t.lines[:0]
		if err := t.emit(b); err != nil {
			return err
		}
	}
	// An open file that was deleted still takes room on the disk.
	if deleted(f.f) || time.Since(t.lateSeen) >= lateMax {
		return t.letLateGo()
	}
	return nil
}

// endLate reads the finished file for the last time: the present one is to be
// the next.
func (t *follower) endLate() error {
	if err := t.readLate(); err != nil {
		return err
	}
	return t.letLateGo()
}

// letLateGo closes the finished file, with the half line at its end: nothing
// more is read of it.
func (t *follower) letLateGo() (err error) {
	if t.late != nil && t.lateSplit.halfLen > 0 {
		text, size, truncated := t.lateSplit.take()
		t.late.off += size
		t.noteLate()
		if len(text) > 0 { // no hole
			err = t.emit(Batch{Lines: []Line{{Text: text, Next: t.here(), Truncated: truncated}}, Next: t.here(), Late: true, CaughtUp: t.caughtUp})
		}
	}
	t.dropLate()
	return err
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

func (t *follower) dropLate() {
	if t.late != nil {
		t.late.close()
		t.late = nil
	}
}
