package doctor

import "strings"

// setting says how options of Exim's main section are set on this system, to
// be pasted. Each option is "name = value".
func (x *exam) setting(options ...string) []string {
	lines := strings.Join(options, "\n")
	switch x.System {
	case CPanel:
		return append([]string{"WHM » Service Configuration » Exim Configuration Manager » Advanced Editor: change the setting where it is listed, else Add additional configuration setting; then Save:"}, options...)
	case DirectAdmin:
		return append([]string{"Put into /etc/exim.conf.custom or /etc/exim.variables.conf.custom, build with `da build exim_conf`, and `systemctl restart exim`:"}, options...)
	case DebianSplit:
		return []string{"cat >>/etc/exim4/conf.d/main/95_smtpguard <<'END'\n" + lines + "\nEND", "update-exim4.conf && systemctl restart exim4"}
	case Debian:
		return []string{"cat >>/etc/exim4/exim4.conf.localmacros <<'END'\n" + lines + "\nEND", "update-exim4.conf && systemctl restart exim4"}
	}
	file := x.Settings["configure_file"]
	if file == "" {
		file = "Exim's configuration file (`exim -bV` names it)"
	}
	return append([]string{"In the main section of " + file + ", then restart Exim:"}, options...)
}

// selectorSetting is setting for log_selector: what is there stays. Debian has
// a macro for it, and takes a second definition for a fault.
func (x *exam) selectorSetting(add string) []string {
	value := strings.TrimSpace(x.Exim.LogSelector + " " + add)
	switch {
	case x.System != Debian && x.System != DebianSplit:
		return x.setting("log_selector = " + value)
	case x.MacroIn != "":
		return []string{"In " + x.MacroIn + ", the line that begins with MAIN_LOG_SELECTOR becomes:", "MAIN_LOG_SELECTOR = " + value, "update-exim4.conf && systemctl restart exim4"}
	}
	lines := x.setting("MAIN_LOG_SELECTOR = " + value)
	if x.System == DebianSplit { // a macro must come before its use
		lines[0] = strings.Replace(lines[0], "95_smtpguard", "000_localmacros", 1)
	}
	return lines
}
