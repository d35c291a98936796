"""The same work as configuration of the waypoint and of Envoy.

A setup says what is between client and upstream (`carry`: plain, mtls on both sides, hbone in and out), and what is to be
done with requests: so many routes, of which each needs a path and a header and shares its requests 90 to 10 between two
back ends; security (50 authorization rules of which the last holds, a token, an access log); limits (a local rate limit that
is not reached, three retries, a timeout).
"""

import json
import os
import shutil
from dataclasses import dataclass
from typing import Any

UPSTREAM, FAILING, WAYPOINT, PEER, MTLS_UPSTREAM = 18081, 18085, 18082, 18083, 18086
VIP = "240.240.0.1:80"
HOST, OTHER = "cart.bench.example", "shelf.bench.example"
ISSUER = "https://issuer.bench.example"
# Of the loopback network, each with tunnels at 15008.
WAYPOINT_NODE, ENDPOINT_NODE, PEER_NODE = "127.77.0.1", "127.77.0.2", "127.77.0.3"
IN_TUNNEL = 8080
OWN = "spiffe://cluster.local/ns/bench/sa/waypoint"
ENDPOINT = "spiffe://cluster.local/ns/bench/sa/cart"
# As much as nobody reaches.
LIMIT = 10_000_000


@dataclass
class Setup:
    routes: int = 0
    # A key of which tokens are to be, or None.
    security: Any = None
    limits: bool = False
    carry: str = "plain"
    # How often the routes were replaced, or None where they aren't.
    edition: Any = None

    @property
    def upstream(self):
        """Where the upstream listens, without tunnels."""
        if self.carry == "mtls":
            return MTLS_UPSTREAM
        return FAILING if self.limits else UPSTREAM


# The waypoint


def put(path, text):
    """Writes a file whole, in the place of the one before."""
    beside = os.path.join(os.path.dirname(os.path.dirname(path)), "beside")
    with open(beside, "w") as out:
        out.write(text)
    os.replace(beside, path)


def route_value(setup, number):
    """What a route's header is to be: the first route says which edition it is of."""
    return f"r{number}-{setup.edition}" if setup.edition and number == 0 else f"r{number}"


def waypoint_files(folder, setup, certificates):
    if not setup.edition:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    docs = [
        "{apiVersion: v1, kind: Namespace, metadata: {name: bench, labels: {istio.io/dataplane-mode: ambient}}}",
        "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: waypoint, namespace: bench}, "
        "spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}}",
        "{apiVersion: v1, kind: Service, metadata: {name: waypoint, namespace: bench}, "
        "spec: {clusterIP: 10.96.0.9, ports: [{port: 15008}]}}",
    ]
    for host, address in ((HOST, VIP.split(":")[0]), (OTHER, "240.240.0.2")):
        docs += service(host, address, setup, certificates)
    if setup.routes:
        docs.append(virtual_service(setup))
    target = "targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: cart}]"
    if setup.security:
        docs += security(target, setup.security)
    if setup.limits:
        docs.append(
            "{apiVersion: culvert.dev/v1alpha1, kind: RateLimit, metadata: {name: limit, namespace: bench}, spec: {%s, "
            "headers: None, limits: [{name: all, local: {requests: %d, per: 1s}}]}}" % (target, LIMIT)
        )
    put(os.path.join(folder, "bench.yaml"), "\n---\n".join(docs) + "\n")


def service(host, address, setup, certificates):
    name = host.split(".")[0]
    endpoint, port = "{address: 127.0.0.1}", setup.upstream
    if setup.carry == "hbone":
        port = IN_TUNNEL
        endpoint = "{address: %s, serviceAccount: cart, labels: {networking.istio.io/tunnel: http}}" % ENDPOINT_NODE
    docs = [
        "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: %s, namespace: bench, "
        "labels: {istio.io/use-waypoint: waypoint}}, spec: {hosts: [%s], addresses: [%s], resolution: STATIC, "
        "location: MESH_INTERNAL, ports: [{number: 80, name: http, protocol: HTTP, targetPort: %d}], endpoints: [%s]}}"
        % (name, host, address, port, endpoint)
    ]
    if setup.carry == "mtls":
        docs.append(
            "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: %s, namespace: bench}, "
            "spec: {host: %s, trafficPolicy: {tls: {mode: MUTUAL, sni: %s, clientCertificate: %s/cert.pem, "
            "privateKey: %s/key.pem, caCertificates: %s/root.pem}}}}" % (name, host, HOST, *[certificates] * 3)
        )
    return docs


def virtual_service(setup):
    extra = ""
    if setup.limits:
        extra = ", timeout: 5s, retries: {attempts: 3, retryOn: 'gateway-error,connect-failure'}"
    routes = ", ".join(
        "{match: [{uri: {prefix: /r%d/}, headers: {x-route: {exact: %s}}}], route: ["
        "{destination: {host: %s}, weight: 90}, {destination: {host: %s}, weight: 10}]%s}"
        % (n, route_value(setup, n), HOST, OTHER, extra)
        for n in range(setup.routes)
    )
    return (
        "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: cart, namespace: bench}, "
        "spec: {hosts: [%s], http: [%s]}}" % (HOST, routes)
    )


def security(target, key):
    rules = ", ".join(
        "{from: [{source: {principals: [cluster.local/ns/bench/sa/other-%d]}}], to: [{operation: {paths: [/r%d/*]}}]}" % (n, n)
        for n in range(49)
    )
    last = "{from: [{source: {principals: [cluster.local/ns/bench/sa/web], requestPrincipals: ['*']}}]}"
    jwks = json.dumps(json.dumps({"keys": [key.jwk]}))
    return [
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: rules, namespace: bench}, "
        "spec: {%s, rules: [%s, %s]}}" % (target, rules, last),
        "{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {name: jwt, namespace: bench}, "
        "spec: {%s, jwtRules: [{issuer: '%s', jwks: %s, forwardOriginalToken: true}]}}" % (target, ISSUER, jwks),
        "{apiVersion: telemetry.istio.io/v1, kind: Telemetry, metadata: {name: log, namespace: bench}, "
        "spec: {accessLogging: [{providers: [{name: envoy}]}]}}",
    ]


# Envoy

TYPES = "type.googleapis.com/envoy.extensions."
ROUTER = {"name": "router", "typed_config": {"@type": TYPES + "filters.http.router.v3.Router"}}
MANAGER = TYPES + "filters.network.http_connection_manager.v3.HttpConnectionManager"


def envoy_file(path, setup, certificates):
    """`certificates` is the directory of cert.pem, key.pem and root.pem."""
    hosts = [{"name": "all", "domains": ["*"], "routes": envoy_routes(setup)}]
    routes = {"route_config": {"virtual_hosts": hosts}}
    if setup.edition is not None:
        folder = os.path.join(os.path.dirname(path), "envoy-routes")
        os.makedirs(folder, exist_ok=True)
        file = os.path.join(folder, "routes.json")
        resource = {"@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", "name": "all", "virtual_hosts": hosts}
        put(file, json.dumps({"resources": [resource]}))
        source = {"path_config_source": {"path": file, "watched_directory": {"path": folder}}, "resource_api_version": "V3"}
        routes = {"rds": {"route_config_name": "all", "config_source": source}}
    if setup.edition:
        return
    manager = {
        "@type": MANAGER,
        "stat_prefix": "bench",
        "codec_type": "AUTO",
        **routes,
        "http_filters": [*envoy_filters(setup), ROUTER],
    }
    if setup.security:
        log = {"@type": TYPES + "access_loggers.file.v3.FileAccessLog", "path": "/dev/null"}
        manager["access_log"] = [{"name": "log", "typed_config": log}]
    filters = [{"name": "hcm", "typed_config": manager}]
    if setup.carry == "hbone":
        config = envoy_tunnels(filters, certificates)
    else:
        chain = {"filters": filters}
        to = {"socket_address": {"address": "127.0.0.1", "port_value": setup.upstream}}
        clusters = [envoy_cluster(name, to) for name in ("cart", "shelf")]
        if setup.carry == "mtls":
            chain["transport_socket"] = envoy_tls("Downstream", certificates, ["http/1.1"])
            for cluster in clusters:
                cluster["transport_socket"] = envoy_tls("Upstream", certificates, ["http/1.1"])
        listen = {"socket_address": {"address": "127.0.0.1", "port_value": PEER}}
        config = {"static_resources": {"listeners": [{"name": "in", "address": listen, "filter_chains": [chain]}], "clusters": clusters}}
    with open(path, "w") as out:
        # Routes that are watched ask for a name.
        json.dump({"node": {"id": "bench", "cluster": "bench"}, **config}, out)


def envoy_routes(setup):
    if not setup.routes:
        return [{"match": {"prefix": "/"}, "route": {"cluster": "cart"}}]
    both = {"weighted_clusters": {"clusters": [{"name": "cart", "weight": 90}, {"name": "shelf", "weight": 10}]}}
    if setup.limits:
        both["timeout"] = "5s"
        both["retry_policy"] = {"retry_on": "gateway-error,connect-failure", "num_retries": 3}
    return [
        {"match": {"prefix": f"/r{n}/", "headers": [{"name": "x-route", "string_match": {"exact": route_value(setup, n)}}]}, "route": both}
        for n in range(setup.routes)
    ]


def envoy_filters(setup):
    filters = []
    if setup.security:
        provider = {
            "issuer": ISSUER,
            "local_jwks": {"inline_string": json.dumps({"keys": [setup.security.jwk]})},
            "forward": True,
            "payload_in_metadata": "jwt",
        }
        jwt = {
            "@type": TYPES + "filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": {"p": provider},
            "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
        }
        client = lambda name: {"header": {"name": "x-client", "string_match": {"exact": name}}}
        policies = {
            f"p{n}": {"principals": [client(f"other-{n}")], "permissions": [{"url_path": {"path": {"prefix": f"/r{n}/"}}}]}
            for n in range(49)
        }
        policies["q"] = {"principals": [client("web")], "permissions": [{"any": True}]}
        rbac = {"@type": TYPES + "filters.http.rbac.v3.RBAC", "rules": {"action": "ALLOW", "policies": policies}}
        filters += [{"name": "jwt", "typed_config": jwt}, {"name": "rbac", "typed_config": rbac}]
    if setup.limits:
        every = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
        limit = {
            "@type": TYPES + "filters.http.local_ratelimit.v3.LocalRateLimit",
            "stat_prefix": "limit",
            "token_bucket": {"max_tokens": LIMIT, "tokens_per_fill": LIMIT, "fill_interval": "1s"},
            "filter_enabled": every,
            "filter_enforced": every,
        }
        filters.append({"name": "limit", "typed_config": limit})
    return filters


def envoy_cluster(name, address):
    most = 100_000
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {
            "thresholds": [{"max_connections": most, "max_requests": most, "max_pending_requests": most, "max_retries": most}]
        },
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    }


def envoy_tls(side, certificates, protocols):
    common = {
        "alpn_protocols": protocols,
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": f"{certificates}/cert.pem"},
                "private_key": {"filename": f"{certificates}/key.pem"},
            }
        ],
        "validation_context": {"trusted_ca": {"filename": f"{certificates}/root.pem"}},
    }
    context = {"@type": f"{TYPES}transport_sockets.tls.v3.{side}TlsContext", "common_tls_context": common}
    if side == "Downstream":
        context["require_client_certificate"] = True
    else:
        context["sni"] = HOST
    return {"name": "tls", "typed_config": context}


def envoy_tunnels(filters, certificates):
    """Tunnels in and out, put together as in a waypoint of Istio's: the CONNECT ends at a listener of its own within the
    process, and what goes out passes a second one, which opens the tunnel."""
    h2 = {"allow_connect": True, "max_concurrent_streams": 1000}
    take = {
        "@type": MANAGER,
        "stat_prefix": "tunnels",
        "codec_type": "HTTP2",
        "http2_protocol_options": h2,
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "http_filters": [ROUTER],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "in",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"connect_matcher": {}},
                            "route": {
                                "cluster": "main",
                                "timeout": "0s",
                                "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                            },
                        }
                    ],
                }
            ]
        },
    }
    begin = {
        "@type": TYPES + "filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "out",
        "cluster": "tunnel",
        "tunneling_config": {"hostname": f"{ENDPOINT_NODE}:{IN_TUNNEL}"},
    }
    inside = lambda name, filters: {"name": name, "internal_listener": {}, "filter_chains": [{"filters": filters}]}
    to = lambda name: {"envoy_internal_address": {"server_listener_name": name, "endpoint_id": name}}
    raw = {
        "name": "internal",
        "typed_config": {
            "@type": TYPES + "transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            "transport_socket": {
                "name": "raw",
                "typed_config": {"@type": TYPES + "transport_sockets.raw_buffer.v3.RawBuffer"},
            },
        },
    }
    node = lambda address: {"socket_address": {"address": address, "port_value": 15008}}
    listener = {
        "name": "tunnels",
        "address": node(PEER_NODE),
        "filter_chains": [
            {
                "transport_socket": envoy_tls("Downstream", certificates, ["h2"]),
                "filters": [{"name": "hcm", "typed_config": take}],
            }
        ],
    }
    options = {
        "@type": TYPES + "upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": h2},
    }
    tunnel = {
        **envoy_cluster("tunnel", node(ENDPOINT_NODE)),
        "transport_socket": envoy_tls("Upstream", certificates, ["h2"]),
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }
    inner = [{**envoy_cluster(name, to(where)), "transport_socket": raw} for name, where in (("main", "main"), ("cart", "out"), ("shelf", "out"))]
    extension = {"@type": TYPES + "bootstrap.internal_listener.v3.InternalListener"}
    return {
        "bootstrap_extensions": [{"name": "envoy.bootstrap.internal_listener", "typed_config": extension}],
        "static_resources": {
            "listeners": [listener, inside("main", filters), inside("out", [{"name": "tcp", "typed_config": begin}])],
            "clusters": [tunnel, *inner],
        },
    }
