package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// line is the n-th line of a download, as long as all others; both ends can tell it without having it.
func line(n int64) string { return fmt.Sprintf("%s %012d\n", marker, n) }

var lineLength = int64(len(line(0)))

func serve(arguments []string) error {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	grace := flags.Duration("grace", 2*time.Second, "how long to go on serving after SIGTERM")
	_ = flags.Parse(arguments)

	for port, answer := range map[int]func(net.Conn){9000: echoBack, 9001: speakFirst} {
		listener, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go accept(listener, answer)
	}
	packets, err := net.ListenPacket("udp", ":9002")
	if err != nil {
		return err
	}
	go echoPackets(packets)

	server := &http.Server{Addr: ":8080", Handler: pages(), ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.ListenAndServe() }()

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-ended:
		return err
	case <-stop:
	}
	// Endpoints and meshes learn late that a pod goes; a well-behaved application goes on for a moment.
	time.Sleep(*grace)
	limit, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return server.Shutdown(limit)
}

func accept(listener net.Listener, answer func(net.Conn)) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			fatal(err)
		}
		go func() {
			defer connection.Close()
			answer(connection)
		}()
	}
}

func echoBack(connection net.Conn) { _, _ = io.Copy(connection, connection) }

func speakFirst(connection net.Conn) {
	fmt.Fprintf(connection, "%s %s\n", marker, hostname())
	_, _ = io.Copy(io.Discard, connection)
}

func echoPackets(packets net.PacketConn) {
	buffer := make([]byte, 2048)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err == nil {
			_, _ = packets.WriteTo(buffer[:n], from)
		}
	}
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

func pages() http.Handler {
	var unready, dead atomic.Bool
	pages := http.NewServeMux()
	pages.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		w.Header().Set("X-Marker", marker)
		// What came of the path on its way.
		w.Header().Set("X-Path", r.RequestURI)
		fmt.Fprintf(w, "%s %s\n", hostname(), host)
	})
	pages.HandleFunc("/download", download)
	switched := func(off *atomic.Bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if off.Load() {
				http.Error(w, "switched off", http.StatusServiceUnavailable)
			}
		}
	}
	pages.HandleFunc("/ready", switched(&unready))
	pages.HandleFunc("/live", switched(&dead))
	pages.HandleFunc("/set", func(w http.ResponseWriter, r *http.Request) {
		for name, off := range map[string]*atomic.Bool{"ready": &unready, "live": &dead} {
			if value := r.FormValue(name); value != "" {
				off.Store(value == "0")
			}
		}
	})
	return pages
}

// download sends `bytes` bytes of lines, at most `rate` a second.
func download(w http.ResponseWriter, r *http.Request) {
	bytes, err := strconv.ParseInt(r.FormValue("bytes"), 10, 64)
	if err != nil {
		http.Error(w, "bytes=N is missing", http.StatusBadRequest)
		return
	}
	rate, err := strconv.ParseInt(r.FormValue("rate"), 10, 64)
	if err != nil {
		rate = 1 << 40
	}
	lines := bytes / lineLength
	w.Header().Set("Content-Length", strconv.FormatInt(lines*lineLength, 10))
	out := bufio.NewWriterSize(w, 16<<10)
	started := time.Now()
	for n := range lines {
		if _, err := out.WriteString(line(n)); err != nil {
			return
		}
		if due := time.Duration(float64(n*lineLength) / float64(rate) * float64(time.Second)); n%512 == 0 {
			time.Sleep(due - time.Since(started))
		}
	}
	_ = out.Flush()
}

var errClosed = errors.New("closed by the other side")
