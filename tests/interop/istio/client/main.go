// Istio's clients of a control plane, for tests: its delta ADS client, and its client of the CA.
//
//	client watch         follows workloads, services and policies; one line of JSON for each event
//	client sign          has the identity of the token's pod certified
//	client sign ID       has another identity certified, as a ztunnel does
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	pb "istio.io/api/security/v1alpha1"
	"istio.io/istio/pkg/adsc"
	"istio.io/istio/pkg/security"
	"istio.io/istio/pkg/workloadapi"
	authorization "istio.io/istio/pkg/workloadapi/security"
	"istio.io/istio/security/pkg/nodeagent/caclient/providers/citadel"
	pkiutil "istio.io/istio/security/pkg/pki/util"
)

var (
	address   = flag.String("address", "", "host:port of the control plane")
	name      = flag.String("name", "", "the name in its certificate")
	root      = flag.String("root", "", "the file of the roots")
	tokenFile = flag.String("token", "", "the file of the token")
	pod       = flag.String("pod", "", "the pod's name")
	namespace = flag.String("namespace", "", "the pod's namespace")
	node      = flag.String("node", "", "the pod's node")
	ip        = flag.String("ip", "", "the pod's address")
	refuse    = flag.String("refuse", "", "a resource that is refused")
)

func main() {
	flag.Parse()
	var err error
	switch flag.Arg(0) {
	case "watch":
		err = watch()
	case "sign":
		err = sign(flag.Arg(1))
	default:
		err = errors.New("usage: client [flags] watch | sign [ID]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// bearer is the token, as each request has it, and the cluster.
type bearer struct{}

func (bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := os.ReadFile(*tokenFile)
	return map[string]string{
		"authorization": "Bearer " + strings.TrimSpace(string(token)),
		"clusterid":     "Kubernetes",
	}, err
}

func (bearer) RequireTransportSecurity() bool { return true }

func roots() (*x509.CertPool, error) {
	text, err := os.ReadFile(*root)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate", *root)
	}
	return pool, nil
}

func dialOptions() ([]grpc.DialOption, error) {
	pool, err := roots()
	if err != nil {
		return nil, err
	}
	secured := credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: *name, MinVersion: tls.VersionTLS12})
	return []grpc.DialOption{grpc.WithTransportCredentials(secured), grpc.WithPerRPCCredentials(bearer{})}, nil
}

func say(event any) {
	line, err := json.Marshal(event)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(line))
}

type event struct {
	Event   string          `json:"event"`
	Name    string          `json:"name"`
	Version string          `json:"version,omitempty"`
	Object  json.RawMessage `json:"object,omitempty"`
}

func heard[T proto.Message](ctx adsc.HandlerContext, name, version string, object T, what adsc.Event) {
	said := event{Event: what.String(), Name: name, Version: version}
	if what == adsc.EventAdd {
		text, err := protojson.Marshal(object)
		if err != nil {
			panic(err)
		}
		said.Object = text
	}
	say(said)
	if name == *refuse && what == adsc.EventAdd {
		ctx.Reject(fmt.Errorf("%s is refused", name))
	}
}

func watch() error {
	options, err := dialOptions()
	if err != nil {
		return err
	}
	meta, err := structpb.NewStruct(map[string]any{
		"NAME": *pod, "NAMESPACE": *namespace, "NODE_NAME": *node, "CLUSTER_ID": "Kubernetes", "INSTANCE_IPS": *ip,
	})
	if err != nil {
		return err
	}
	config := &adsc.DeltaADSConfig{Config: adsc.Config{
		NodeType: "ztunnel", Workload: *pod, Namespace: *namespace, IP: *ip, Meta: meta, GrpcOpts: options,
	}}
	client := adsc.NewDelta(*address, config,
		adsc.Register(heard[*workloadapi.Address]), adsc.Register(heard[*authorization.Authorization]),
		adsc.Watch[*authorization.Authorization]("*"), adsc.Watch[*workloadapi.Address]("*"))
	go func() {
		<-client.Synced()
		say(event{Event: "synced"})
	}()
	client.Run(context.Background())
	return errors.New("the stream has ended")
}

// credential is the token, as Istio's client of the CA wants it.
type credential struct{}

func (credential) GetPlatformCredential() (string, error) {
	token, err := os.ReadFile(*tokenFile)
	return strings.TrimSpace(string(token)), err
}
func (credential) GetIdentityProvider() string { return "" }
func (credential) Stop()                       {}

func sign(other string) error {
	request, key, err := pkiutil.GenCSR(pkiutil.CertOptions{Host: other, ECSigAlg: pkiutil.EcdsaSigAlg})
	if err != nil {
		return err
	}
	var chain []string
	if other == "" {
		chain, err = own(request)
	} else {
		chain, err = impersonated(request, other)
	}
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair([]byte(strings.Join(chain[:len(chain)-1], "")), key)
	if err != nil {
		return fmt.Errorf("the key and the certificates: %w", err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return err
	}
	if err := verify(leaf, chain[1:]); err != nil {
		return err
	}
	identities := []string{}
	for _, uri := range leaf.URIs {
		identities = append(identities, uri.String())
	}
	say(map[string]any{
		"identities": identities, "certificates": len(chain), "seconds": int(time.Until(leaf.NotAfter).Seconds()),
	})
	return nil
}

// verify checks the leaf by the roots that we have, and that the last of the answer is one of them.
func verify(leaf *x509.Certificate, rest []string) error {
	pool, err := roots()
	if err != nil {
		return err
	}
	between := x509.NewCertPool()
	for _, text := range rest {
		between.AppendCertsFromPEM([]byte(text))
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	for _, usage := range usages {
		options := x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}
		if _, err := leaf.Verify(options); err != nil {
			return err
		}
	}
	block, _ := pem.Decode([]byte(rest[len(rest)-1]))
	if block == nil {
		return errors.New("the last of the answer is no certificate")
	}
	last, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	_, err = last.Verify(x509.VerifyOptions{Roots: pool})
	return err
}

func own(request []byte) ([]string, error) {
	options := &security.Options{
		CAEndpoint: *address, CAEndpointSAN: *name, ClusterID: "Kubernetes", CredFetcher: credential{},
	}
	client, err := citadel.NewCitadelClient(options, &citadel.TLSOptions{RootCert: *root})
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.CSRSign(request, 3600)
}

// impersonated asks as Istio's ztunnel does, for which Istio has no client in Go.
func impersonated(request []byte, identity string) ([]string, error) {
	options, err := dialOptions()
	if err != nil {
		return nil, err
	}
	connection, err := grpc.NewClient(*address, options...)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	meta, err := structpb.NewStruct(map[string]any{security.ImpersonatedIdentity: identity})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), nil), 30*time.Second)
	defer cancel()
	answer, err := pb.NewIstioCertificateServiceClient(connection).CreateCertificate(ctx, &pb.IstioCertificateRequest{
		Csr: string(request), ValidityDuration: 3600, Metadata: meta,
	})
	if err != nil {
		return nil, err
	}
	if len(answer.CertChain) < 2 {
		return nil, errors.New("there is no root in the answer")
	}
	return answer.CertChain, nil
}
