package main

import (
	"fmt"
	"io"
	"net/http"
	"sync"

	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
)

// A service that takes access logs, and shows what it got, one message a line.
type logs struct {
	als.UnimplementedAccessLogServiceServer
	mutex    sync.Mutex
	messages []string
	streams  int
	end      chan struct{}
}

func (l *logs) StreamAccessLogs(stream als.AccessLogService_StreamAccessLogsServer) error {
	l.mutex.Lock()
	l.streams++
	end := l.end
	l.mutex.Unlock()
	received := make(chan error, 1)
	go func() {
		for {
			message, err := stream.Recv()
			if err != nil {
				received <- err
				return
			}
			text, err := protojson.Marshal(message)
			if err != nil {
				received <- err
				return
			}
			l.mutex.Lock()
			l.messages = append(l.messages, string(text))
			l.mutex.Unlock()
		}
	}()
	select {
	case err := <-received:
		if err == io.EOF {
			return stream.SendAndClose(&als.StreamAccessLogsResponse{})
		}
		return err
	case <-end:
		return status.Error(codes.Unavailable, "asked to end")
	}
}

// ServeHTTP shows the messages and the number of streams; a POST ends the streams that are open.
func (l *logs) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if in.Method == http.MethodPost {
		close(l.end)
		l.end = make(chan struct{})
		return
	}
	fmt.Fprintf(out, "streams %d\n", l.streams)
	for _, message := range l.messages {
		fmt.Fprintln(out, message)
	}
}
