// The applications of the scenarios, as one static program: what talks, what answers, and what holds a pod's place.
//
// Every message carries the marker, so that a capture of a link shows at once whether it passed in plaintext. It has the
// pod's namespace, by which scenarios that run side by side tell their own from others'.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

var marker = "culvert-e2e-marker:" + os.Getenv("E2E_NAMESPACE")

const usage = `usage: app COMMAND
  serve    HTTP on 8080, TCP echo on 9000, a server that speaks first on 9001, UDP echo on 9002
  client   [-hold N@HOST:PORT] [-load N@URL] [-download BYTES@URL] [-dial N@HOST:PORT]: talks until it is stopped
  stats    what the pod's client has seen, as JSON
  get      [-n N] [-timeout D] URL: HTTP requests, each on a connection of its own
  echo     [-udp] [-timeout D] HOST:PORT: one message there and back
  hello    [-timeout D] HOST:PORT: what a server says that speaks first
  pause    holds a pod's namespaces`

func main() {
	command, arguments := filepath.Base(os.Args[0]), os.Args[1:]
	if command != "pause" {
		if len(arguments) == 0 {
			fatal(usage)
		}
		command, arguments = arguments[0], arguments[1:]
	}
	commands := map[string]func([]string) error{
		"serve": serve, "client": client, "stats": stats, "get": get, "echo": echo, "hello": hello, "pause": pause,
	}
	run, known := commands[command]
	if !known {
		fatal(usage)
	}
	if err := run(arguments); err != nil {
		fatal(err)
	}
}

func fatal(what any) {
	fmt.Fprintln(os.Stderr, what)
	os.Exit(1)
}

// pause waits to be told to end, and buries the orphans of a pod that shares its process namespace.
func pause([]string) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return nil
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}
