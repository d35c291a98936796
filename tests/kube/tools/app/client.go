package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Where a pod's client tells what it has seen: on loopback, which no mesh captures.
const statsAddress = "127.0.0.1:9099"

// job is one thing that a client does, and what came of it.
type job struct {
	sync.Mutex
	Kind   string `json:"kind"`
	Target string `json:"target"`
	// Connections or requests begun.
	Started int64 `json:"started"`
	// Messages, requests or bytes that came back as they should.
	Good int64 `json:"good"`
	// Connections lost, or requests failed.
	Failed int64 `json:"failed"`
	// The longest that an answer took.
	LongestMs int64  `json:"longest_ms"`
	LastError string `json:"last_error"`
	Done      bool   `json:"done"`
}

func (j *job) start() {
	j.Lock()
	j.Started++
	j.Unlock()
}

func (j *job) good(n int64, took time.Duration) {
	j.Lock()
	j.Good += n
	j.LongestMs = max(j.LongestMs, took.Milliseconds())
	j.Unlock()
}

func (j *job) failed(err error) {
	j.Lock()
	j.Failed++
	j.LastError = err.Error()
	j.Unlock()
	fmt.Printf("%s %s %s: %v\n", time.Now().Format(time.RFC3339Nano), j.Kind, j.Target, err)
}

func (j *job) done() {
	j.Lock()
	j.Done = true
	j.Unlock()
}

// many is N@TARGET.
func many(text string) (int64, string, error) {
	count, target, found := strings.Cut(text, "@")
	n, err := strconv.ParseInt(count, 10, 64)
	if !found || err != nil {
		return 0, "", fmt.Errorf("%q is not NUMBER@TARGET", text)
	}
	return n, target, nil
}

func client(arguments []string) error {
	flags := flag.NewFlagSet("client", flag.ExitOnError)
	var jobs []*job
	add := func(kind string, run func(*job, int64)) {
		flags.Func(kind, "NUMBER@TARGET", func(text string) error {
			n, target, err := many(text)
			if err != nil {
				return err
			}
			j := &job{Kind: kind, Target: target}
			jobs = append(jobs, j)
			go run(j, n)
			return nil
		})
	}
	add("hold", holdAll)
	add("load", load)
	add("dial", dialAll)
	add("download", fetch)
	_ = flags.Parse(arguments)

	page := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for _, j := range jobs {
			j.Lock()
			defer j.Unlock()
		}
		_ = json.NewEncoder(w).Encode(jobs)
	})
	return http.ListenAndServe(statsAddress, page)
}

func stats([]string) error {
	response, err := http.Get("http://" + statsAddress + "/")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(os.Stdout, response.Body)
	return err
}

// every does `what` `rate` times a second, each time on its own.
func every(rate int64, what func()) {
	for range time.Tick(time.Second / time.Duration(max(rate, 1))) {
		go what()
	}
}

// holdAll keeps `n` connections, each with a message a tenth of a second; a lost one is counted and made again.
func holdAll(j *job, n int64) {
	for range n {
		go func() {
			for {
				j.start()
				j.failed(hold(j))
				time.Sleep(200 * time.Millisecond)
			}
		}()
	}
}

func hold(j *job) error {
	connection, err := net.DialTimeout("tcp", j.Target, 5*time.Second)
	if err != nil {
		return err
	}
	defer connection.Close()
	reader := bufio.NewReader(connection)
	for n := int64(0); ; n++ {
		took, err := exchange(connection, reader, line(n), 10*time.Second)
		if err != nil {
			return fmt.Errorf("after %d messages: %w", n, err)
		}
		j.good(1, took)
		time.Sleep(100 * time.Millisecond)
	}
}

func exchange(connection net.Conn, reader *bufio.Reader, message string, limit time.Duration) (time.Duration, error) {
	began := time.Now()
	_ = connection.SetDeadline(began.Add(limit))
	if _, err := io.WriteString(connection, message); err != nil {
		return 0, err
	}
	answer, err := reader.ReadString('\n')
	switch {
	case errors.Is(err, io.EOF):
		return 0, errClosed
	case err != nil:
		return 0, err
	case answer != message:
		return 0, fmt.Errorf("sent %q, got %q", message, answer)
	}
	return time.Since(began), nil
}

// load makes requests, each on a connection of its own.
func load(j *job, rate int64) {
	every(rate, func() {
		j.start()
		began := time.Now()
		if _, err := request(j.Target, 10*time.Second); err != nil {
			j.failed(err)
		} else {
			j.good(1, time.Since(began))
		}
	})
}

// dialAll makes connections with one message each.
func dialAll(j *job, rate int64) {
	every(rate, func() {
		j.start()
		began := time.Now()
		if err := echoOnce("tcp", j.Target, 5*time.Second); err != nil {
			j.failed(err)
		} else {
			j.good(1, time.Since(began))
		}
	})
}

// fetch downloads once, and compares every line.
func fetch(j *job, bytes int64) {
	j.start()
	defer j.done()
	response, err := http.Get(fmt.Sprintf("%s&bytes=%d", j.Target, bytes))
	if err != nil {
		j.failed(err)
		return
	}
	defer response.Body.Close()
	reader := bufio.NewReader(response.Body)
	for n := range bytes / lineLength {
		began := time.Now()
		got, err := reader.ReadString('\n')
		if err == nil && got != line(n) {
			err = fmt.Errorf("line %d is %q", n, got)
		}
		if err != nil {
			j.failed(fmt.Errorf("after %d bytes: %w", n*lineLength, err))
			return
		}
		j.good(lineLength, time.Since(began))
	}
}

func request(url string, limit time.Duration) (string, error) {
	client := http.Client{Timeout: limit, Transport: &http.Transport{DisableKeepAlives: true}}
	message, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	message.Header.Set("X-Marker", marker)
	response, err := client.Do(message)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if response.StatusCode >= 400 {
		return "", fmt.Errorf("%s: %d %s", url, response.StatusCode, strings.TrimSpace(string(body)))
	}
	return fmt.Sprintf("%d %s", response.StatusCode, strings.TrimSpace(string(body))), nil
}

func get(arguments []string) error {
	flags := flag.NewFlagSet("get", flag.ExitOnError)
	count := flags.Int("n", 1, "how many requests")
	limit := flags.Duration("timeout", 5*time.Second, "for each request")
	_ = flags.Parse(arguments)
	for range *count {
		answer, err := request(flags.Arg(0), *limit)
		if err != nil {
			return err
		}
		fmt.Println(answer)
	}
	return nil
}

func echoOnce(network, address string, limit time.Duration) error {
	connection, err := net.DialTimeout(network, address, limit)
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = exchange(connection, bufio.NewReader(connection), line(0), limit)
	return err
}

func echo(arguments []string) error {
	flags := flag.NewFlagSet("echo", flag.ExitOnError)
	udp := flags.Bool("udp", false, "a datagram")
	limit := flags.Duration("timeout", 5*time.Second, "for connecting, and for the answer")
	_ = flags.Parse(arguments)
	network := "tcp"
	if *udp {
		network = "udp"
	}
	began := time.Now()
	if err := echoOnce(network, flags.Arg(0), *limit); err != nil {
		return err
	}
	fmt.Println("ok", time.Since(began))
	return nil
}

func hello(arguments []string) error {
	flags := flag.NewFlagSet("hello", flag.ExitOnError)
	limit := flags.Duration("timeout", 5*time.Second, "for connecting, and for the greeting")
	_ = flags.Parse(arguments)
	connection, err := net.DialTimeout("tcp", flags.Arg(0), *limit)
	if err != nil {
		return err
	}
	defer connection.Close()
	_ = connection.SetDeadline(time.Now().Add(*limit))
	greeting, err := bufio.NewReader(connection).ReadString('\n')
	fmt.Print(greeting)
	return err
}
