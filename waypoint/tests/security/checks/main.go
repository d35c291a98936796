// An external authorizer, a rate-limit service and a service that takes access logs, as others build them: grpc-go and Envoy's own
// messages. What they answer is told by the request, so that a test can ask for each kind of answer; what was logged is at /logs.
//
// Usage: checks ADDRESS-OF-GRPC ADDRESS-OF-HTTP
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	als "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	ratelimit "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	kind "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type authorizer struct {
	auth.UnimplementedAuthorizationServer
}

func header(key, value string, add bool) *core.HeaderValueOption {
	return &core.HeaderValueOption{
		Header: &core.HeaderValue{Key: key, Value: value},
		Append: wrapperspb.Bool(add),
	}
}

// Check does what the header x-ask says, and tells in headers what it was told.
func (authorizer) Check(_ context.Context, in *auth.CheckRequest) (*auth.CheckResponse, error) {
	request := in.GetAttributes().GetRequest().GetHttp()
	ask := request.GetHeaders()["x-ask"]
	switch {
	case ask == "slow":
		time.Sleep(30 * time.Second)
	case strings.HasPrefix(ask, "deny="):
		code, _ := strconv.Atoi(strings.TrimPrefix(ask, "deny="))
		return &auth.CheckResponse{
			Status: &status.Status{Code: int32(codes.PermissionDenied)},
			HttpResponse: &auth.CheckResponse_DeniedResponse{DeniedResponse: &auth.DeniedHttpResponse{
				Status:  &kind.HttpStatus{Code: kind.StatusCode(code)},
				Headers: []*core.HeaderValueOption{header("x-why", "because", false)},
				Body:    "no, " + in.GetAttributes().GetSource().GetPrincipal(),
			}},
		}, nil
	case ask == "fail":
		return nil, fmt.Errorf("out of order")
	}
	told := fmt.Sprintf("%s %s%s from %s body=%q partial=%s", request.GetMethod(), request.GetHost(), request.GetPath(),
		in.GetAttributes().GetSource().GetAddress().GetSocketAddress().GetAddress(), request.GetBody(),
		request.GetHeaders()["x-envoy-auth-partial-body"])
	return &auth.CheckResponse{
		Status: &status.Status{Code: int32(codes.OK)},
		HttpResponse: &auth.CheckResponse_OkResponse{OkResponse: &auth.OkHttpResponse{
			Headers: []*core.HeaderValueOption{header("x-told", told, false), header("host", "evil", false),
				header("x-forwarded-client-cert", "forged", false), header("x_forwarded-client_cert", "forged", true)},
			HeadersToRemove:      []string{"x-secret"},
			ResponseHeadersToAdd: []*core.HeaderValueOption{header("x-decided", "yes", true)},
		}},
	}, nil
}

// Counts requests by their descriptors: the limit is the number in the constant "limit".
type counter struct {
	ratelimit.UnimplementedRateLimitServiceServer
	mutex sync.Mutex
	seen  map[string]uint32
}

func (c *counter) ShouldRateLimit(_ context.Context, in *ratelimit.RateLimitRequest) (*ratelimit.RateLimitResponse, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	out := &ratelimit.RateLimitResponse{OverallCode: ratelimit.RateLimitResponse_OK}
	for _, descriptor := range in.GetDescriptors() {
		key, limit := in.GetDomain(), uint32(0)
		for _, entry := range descriptor.GetEntries() {
			key += "|" + entry.GetKey() + "=" + entry.GetValue()
			if entry.GetKey() == "limit" {
				number, _ := strconv.Atoi(entry.GetValue())
				limit = uint32(number)
			}
			if entry.GetKey() == "add" {
				out.RequestHeadersToAdd = []*core.HeaderValue{
					{Key: "x-credential", Value: entry.GetValue()},
					{Key: "X-Forwarded-Client-Cert", Value: "forged"},
					{Key: "x_forwarded-client_cert", Value: "forged"},
				}
			}
		}
		c.seen[key] += max(in.GetHitsAddend(), 1)
		one := &ratelimit.RateLimitResponse_DescriptorStatus{
			Code: ratelimit.RateLimitResponse_OK,
			CurrentLimit: &ratelimit.RateLimitResponse_RateLimit{
				RequestsPerUnit: limit,
				Unit:            ratelimit.RateLimitResponse_RateLimit_MINUTE,
			},
			DurationUntilReset: durationpb.New(30 * time.Second),
		}
		if c.seen[key] > limit {
			one.Code = ratelimit.RateLimitResponse_OVER_LIMIT
			out.OverallCode = ratelimit.RateLimitResponse_OVER_LIMIT
			out.ResponseHeadersToAdd = []*core.HeaderValue{{Key: "x-counted", Value: key}}
		} else {
			one.LimitRemaining = limit - c.seen[key]
		}
		out.Statuses = append(out.Statuses, one)
	}
	return out, nil
}

func check(out http.ResponseWriter, in *http.Request) {
	body, _ := io.ReadAll(in.Body)
	out.Header().Set("x-told", fmt.Sprintf("%s %s%s body=%q user=%q cookie=%q", in.Method, in.Host, in.URL.RequestURI(), body,
		in.Header.Get("x-user"), in.Header.Get("cookie")))
	out.Header().Set("x-internal", "secret")
	if code, err := strconv.Atoi(in.Header.Get("x-ask")); err == nil {
		out.Header().Set("location", "/login")
		out.WriteHeader(code)
		fmt.Fprint(out, "not you")
	}
}

func main() {
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	kept := &logs{end: make(chan struct{})}
	pages := http.NewServeMux()
	pages.Handle("/logs", kept)
	pages.HandleFunc("/", check)
	go func() { log.Fatal(http.ListenAndServe(os.Args[2], pages)) }()
	server := grpc.NewServer()
	auth.RegisterAuthorizationServer(server, authorizer{})
	ratelimit.RegisterRateLimitServiceServer(server, &counter{seen: map[string]uint32{}})
	als.RegisterAccessLogServiceServer(server, kept)
	log.Fatal(server.Serve(listener))
}
