.PHONY: build demo test check corpus fuzz bench man install packages release clean

PREFIX ?= /usr/local
UNITDIR ?= /etc/systemd/system
GO ?= go
FUZZTIME ?= 30s
VERSION := $(or $(VERSION),$(shell packaging/version))
GOBUILD = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"

BUILD ?= bin
build:
	$(GOBUILD) -o $(BUILD)/smtpguard ./cmd/smtpguard

# A flood on a mail server of its own, and its end, on your terminal.
demo: build
	$(GO) build -o bin/demo ./cmd/demo
	bin/demo -bin bin/smtpguard

# Everything; installs what it misses when it can (root on Debian).
test: check
	@.ci/deps
	@.ci/test $(GO)

check:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt-ed:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# Who is blocked, when and how widely, in the logs of real floods.
corpus:
	$(GO) test -count=1 -run Corpus -v ./detector | grep -v '^=== '

fuzz:
	@for t in $$(grep -rnoE --include='*_test.go' 'func Fuzz[A-Za-z0-9]+' . | sed -E 's/^\.\/(.*)\/[^/]+:[0-9]+:func (.*)/\1:\2/'); do \
		echo "== $$t"; $(GO) test -run '^$$' -fuzz "^$${t#*:}\$$" -fuzztime $(FUZZTIME) "./$${t%%:*}" || exit 1; done

bench: build
	$(GO) test -run '^$$' -bench . -benchmem ./...

# Manual pages and completions, as the program tells of itself.
man: build
	for p in smtpguard.8 smtpguard-policy.5; do $(BUILD)/smtpguard man $$p | gzip -9n >$(BUILD)/$$p.gz || exit 1; done
	for s in bash zsh fish; do $(BUILD)/smtpguard completion $$s >$(BUILD)/completion.$$s || exit 1; done

# BIN: another binary than the one of this machine.
BIN ?= $(BUILD)/smtpguard
SHARE = $(DESTDIR)$(PREFIX)/share
install: man
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/sbin/smtpguard
	test -e $(DESTDIR)/etc/smtpguard/policy.yaml || install -D -m 644 policy.yaml $(DESTDIR)/etc/smtpguard/policy.yaml
	sed 's,/usr/local/,$(PREFIX)/,' smtpguard.service | install -D -m 644 /dev/stdin $(DESTDIR)$(UNITDIR)/smtpguard.service
	install -D -m 644 -t $(SHARE)/man/man8 $(BUILD)/smtpguard.8.gz
	install -D -m 644 -t $(SHARE)/man/man5 $(BUILD)/smtpguard-policy.5.gz
	install -D -m 644 $(BUILD)/completion.bash $(SHARE)/bash-completion/completions/smtpguard
	install -D -m 644 $(BUILD)/completion.zsh $(SHARE)/zsh/site-functions/_smtpguard
	install -D -m 644 $(BUILD)/completion.fish $(SHARE)/fish/vendor_completions.d/smtpguard.fish
	install -D -m 644 -t $(SHARE)/doc/smtpguard README.md CHANGELOG.md LICENSE
	install -D -m 644 -t $(SHARE)/doc/smtpguard/docs docs/*
	install -D -m 644 -t $(SHARE)/doc/smtpguard/contrib contrib/*

# .deb and .rpm in DIST, static, the same bytes whoever builds them from the
# same commit with the same Go.
DIST ?= dist
ARCHES ?= amd64 arm64
MAINTAINER ?= the smtpguard developers <smtpguard@users.noreply.github.com>
packages: export SOURCE_DATE_EPOCH := $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),0)
packages: man
	@set -e; for a in $(ARCHES); do root=$(DIST)/.root/$$a; rm -rf $$root; \
		GOARCH=$$a $(GOBUILD) -o $(DIST)/.root/smtpguard-$$a ./cmd/smtpguard; \
		$(MAKE) -s install VERSION=$(VERSION) BIN=$(DIST)/.root/smtpguard-$$a DESTDIR=$$root PREFIX=/usr UNITDIR=/usr/lib/systemd/system; \
		for p in deb rpm; do ROOT=$$root ARCH=$$a VERSION=$(VERSION) MAINTAINER="$(MAINTAINER)" \
			$(GO) tool -modfile=packaging/nfpm.mod nfpm package -f packaging/nfpm.yaml -p $$p -t $(DIST)/; done; done

# What is put up for download: from a clean commit that has a tag.
release:
	@case "$(VERSION)" in *+*|0.0.0) echo "$(VERSION) is no release: tag a clean commit as vX.Y.Z first"; exit 1;; esac
	rm -rf $(DIST)
	$(MAKE) packages
	git archive --prefix=smtpguard-$(VERSION)/ HEAD | gzip -9n >$(DIST)/smtpguard-$(VERSION).tar.gz
	cd $(DIST) && sha256sum *.deb *.rpm *.tar.gz >SHA256SUMS

clean:
	rm -rf bin dist
