.PHONY: build demo test check corpus fuzz bench install clean

PREFIX ?= /usr/local
GO ?= go
FUZZTIME ?= 30s
LDFLAGS = $(if $(VERSION),-X main.version=$(VERSION))

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/smtpguard ./cmd/smtpguard

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

install: build
	install -D -m 755 bin/smtpguard $(DESTDIR)$(PREFIX)/sbin/smtpguard
	test -e $(DESTDIR)/etc/smtpguard/policy.yaml || install -D -m 644 policy.yaml $(DESTDIR)/etc/smtpguard/policy.yaml
	sed 's,/usr/local,$(PREFIX),' smtpguard.service | install -D -m 644 /dev/stdin $(DESTDIR)/etc/systemd/system/smtpguard.service

clean:
	rm -rf bin
