package detector

import "time"

// Now is the detector's time, as the log would write it: that of the latest
// event which was believed. Zero before the first.
func (d *Detector) Now() time.Time { return d.logTime(d.now) }
