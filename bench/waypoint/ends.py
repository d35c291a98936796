"""What is around the proxies: processes, keys and certificates, upstreams, and load.

The proxy has one core, everything here another.
"""

import base64
import json
import os
import re
import socket
import subprocess
import time

from configs import ENDPOINT_NODE, FAILING, HOST, ISSUER, MTLS_UPSTREAM, OWN, UPSTREAM, VIP

PROXY_CORE, LOAD_CORE = "0", "1"


class Broken(Exception):
    """A scenario that can't be measured here: said, and left out."""


# Processes


def start(command, log, core):
    with open(log, "wb") as out:
        return subprocess.Popen(["taskset", "-c", core, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def wait_for(address, process, log, limit=60.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Broken(f"{log}: it ended:\n" + open(log).read()[-2000:])
        try:
            socket.create_connection(address, 1).close()
            return
        except OSError:
            time.sleep(0.005)
    raise Broken(f"nothing listens on {address}: {log}")


def stop(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_seconds(pid):
    """Of all threads that there are: they live as long as the process."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        total += int(open(f"/proc/{pid}/task/{thread}/schedstat").read().split()[0])
    return total / 1e9


def resident_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1))


def run(command, limit=300.0):
    """What a command on the load's core prints."""
    done = subprocess.run(["taskset", "-c", LOAD_CORE, *command], capture_output=True, text=True, timeout=limit)
    if done.returncode != 0:
        raise Broken(f"{command[0]}: " + (done.stderr or done.stdout)[-800:])
    return done.stdout


# Keys and certificates, for both the same


def openssl(*args, data=None):
    return subprocess.run(["openssl", *args], input=data, check=True, capture_output=True).stdout


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Key:
    """A key that tokens are signed by, its JWK, and a file of tokens of which each is another user's."""

    def __init__(self, work, program, algorithm, count):
        self.path, self.tokens = os.path.join(work, f"{algorithm}.pem"), os.path.join(work, f"{algorithm}.tokens")
        kind = ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"] if algorithm == "RS256" else ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
        openssl("genpkey", "-algorithm", *kind, "-out", self.path)
        if algorithm == "RS256":
            modulus = openssl("rsa", "-in", self.path, "-noout", "-modulus").decode().strip().split("=")[1]
            self.jwk = {"kty": "RSA", "n": b64(bytes.fromhex(modulus)), "e": "AQAB"}
        else:
            der = openssl("pkey", "-in", self.path, "-pubout", "-outform", "DER")
            self.jwk = {"kty": "EC", "crv": "P-256", "x": b64(der[-64:-32]), "y": b64(der[-32:])}
        self.jwk.update({"alg": algorithm, "kid": "k1", "use": "sig"})
        wanted = ["--algorithm", algorithm.lower(), "--key", self.path, "--issuer", ISSUER, "--count", str(count)]
        subprocess.run([program, "tokens", *wanted, "--out", self.tokens], check=True)
        with open(self.tokens) as tokens:
            self.token = tokens.readline().strip()


def certificates(folder):
    """A CA and one certificate for both sides of plain mutual TLS."""
    os.makedirs(folder, exist_ok=True)
    at = lambda name: os.path.join(folder, name)
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]
    openssl("req", "-x509", *new, "-days", "30", "-subj", "/CN=bench", "-keyout", at("ca.key"), "-out", at("root.pem"))
    openssl("req", *new, "-subj", f"/CN={HOST}", "-keyout", at("key.pem"), "-out", at("request.pem"))
    sign(folder, at("root.pem"), at("ca.key"), f"DNS:{HOST}")
    return folder


def sign(folder, authority, key, name):
    at = lambda name: os.path.join(folder, name)
    with open(at("extensions"), "w") as out:
        out.write(f"subjectAltName={name}\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n")
        out.write("extendedKeyUsage=serverAuth,clientAuth\n")
    wanted = ["-in", at("request.pem"), "-CA", authority, "-CAkey", key, "-days", "2", "-extfile", at("extensions")]
    openssl("x509", "-req", *wanted, "-out", at("cert.pem"))


def waypoint_certificate(folder, authority):
    """A certificate of the waypoint's for Envoy, by the CA that everybody in the tunnels trusts."""
    os.makedirs(folder, exist_ok=True)
    at = lambda name: os.path.join(folder, name)
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]
    openssl("req", *new, "-subj", "/", "-keyout", at("key.pem"), "-out", at("request.pem"))
    # The root and its key in one file.
    ca = os.path.join(authority, "ca.pem")
    sign(folder, ca, ca, f"critical,URI:{OWN}")
    with open(at("root.pem"), "w") as out:
        out.write(open(os.path.join(authority, "roots.pem")).read())
    return folder


# Upstreams


class Upstreams:
    """nginx: 1 KB, 1 GB, and 1 KB of which one in a hundred fails; 1 KB behind mutual TLS and in tunnels."""

    def __init__(self, work, program, mtls, authority):
        self.processes = []
        big = os.path.join(work, "files")
        os.makedirs(big, exist_ok=True)
        with open(os.path.join(big, "gigabyte"), "wb") as out:
            out.truncate(1 << 30)
        body = "x" * 1024
        conf = os.path.join(work, "nginx.conf")
        with open(conf, "w") as out:
            out.write(
                f"daemon off; user root; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx.err;\n"
                "events { worker_connections 20000; }\n"
                "http { access_log off; keepalive_requests 100000000; keepalive_timeout 3600s; default_type text/plain;\n"
                "split_clients $request_id $fails { 1% 1; * 0; }\n"
                f"server {{ listen 127.0.0.1:{UPSTREAM} backlog=4096; root {big}; sendfile on;\n"
                f"  location / {{ return 200 '{body}'; }} location = /gigabyte {{ }} }}\n"
                f"server {{ listen 127.0.0.1:{FAILING} backlog=4096;\n"
                f"  location / {{ if ($fails) {{ return 503; }} return 200 '{body}'; }} }} }}\n"
            )
        try:
            self.add(["nginx", "-c", conf], work, "nginx", ("127.0.0.1", UPSTREAM))
            for carry, address, folder in (("mtls", ("127.0.0.1", MTLS_UPSTREAM), mtls), ("hbone", (ENDPOINT_NODE, 15008), authority)):
                listen = ["--listen", f"{address[0]}:{address[1]}", "--certificates", folder]
                self.add([program, "serve", "--carry", carry, *listen], work, f"serve-{carry}", address)
        except Broken:
            self.stop()
            raise

    def add(self, command, work, name, address):
        log = os.path.join(work, f"{name}.log")
        process = start(command, log, LOAD_CORE)
        self.processes.append(process)
        wait_for(address, process, log)

    def stop(self):
        for process in self.processes:
            stop(process)


# Load


def wrk(port, seconds, connections=32, path="/", headers=()):
    """Requests a second, and how many there were: all of them answered with 200."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{port}{path}"]
    for field in (f"Host: {HOST}", *headers):
        command += ["-H", field]
    text = run(command)
    rate, done = re.search(r"Requests/sec:\s+([\d.]+)", text), re.search(r"(\d+) requests in", text)
    if not rate or not int(done.group(1)) or "Non-2xx or 3xx responses" in text or "Socket errors" in text:
        raise Broken("wrk: " + text[-800:])
    return float(rate.group(1)), int(done.group(1))


def h2load(port, seconds, path="/", headers=()):
    """The same by HTTP/2, over 32 connections with 10 streams each."""
    command = ["h2load", "-t1", "-c32", "-m10", "-D", str(seconds), f"http://127.0.0.1:{port}{path}"]
    for field in (f":authority: {HOST}", *headers):
        command += ["-H", field]
    text = run(command)
    rate = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", text)
    done = re.search(r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", text)
    failed = re.search(r"(\d+) failed, (\d+) errored", text)
    if not rate or not done or not int(done.group(1)) or failed.groups() != ("0", "0"):
        raise Broken("h2load: " + text[-800:])
    return float(rate.group(1)), int(done.group(1))


class Client:
    """Our own, for what wrk and h2load can't do."""

    def __init__(self, program, mtls, authority):
        self.program = program
        self.certificates = {"plain": ".", "mtls": mtls, "hbone": authority}
        self.peer = {"plain": HOST, "mtls": HOST, "hbone": OWN}

    def command(self, what, carry, to, path="/", headers=(), peer=None, **flags):
        command = [self.program, what, "--carry", carry, "--to", to, "--certificates", self.certificates[carry]]
        command += ["--peer", peer or self.peer[carry], "--authority", VIP, "--path", path]
        for field in headers:
            command += ["--header", field]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        return command

    def load(self, carry, to, **flags):
        """Requests a second, how many there were, and the rest that it has to say."""
        said = json.loads(run(self.command("load", carry, to, **flags)))
        if said["errors"] or set(said["statuses"]) != {"200"}:
            raise Broken(f"answers {said['statuses']}, errors {said['errors']}")
        return said["requests"] / said["seconds"], said["requests"], said

    def hold(self, carry, to, connections):
        """Opens connections, each of which has had its answer; to be ended by a line on its input."""
        command = self.command("hold", carry, to, connections=connections)
        process = subprocess.Popen(
            ["taskset", "-c", LOAD_CORE, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if process.stdout.readline().strip() != str(connections):
            process.stdin.close()
            raise Broken("connections could not be held: " + process.stderr.read()[-500:])
        return process

    def first(self, carry, to):
        """A process that prints when the first answer came."""
        return subprocess.Popen(
            ["taskset", "-c", LOAD_CORE, *self.command("first", carry, to, seconds=30)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def latencies(port, seconds, work):
    """Microseconds of requests at 1,000 a second."""
    log = os.path.join(work, "latency.log")
    if os.path.exists(log):
        os.remove(log)
    run(["h2load", "--h1", "-t1", "-c10", "--rps=100", "-D", str(seconds), f"--log-file={log}", f"http://127.0.0.1:{port}/"])
    lines = [line.split("\t") for line in open(log)]
    bad = [line for line in lines if line[1] != "200"]
    if bad or len(lines) < 900 * seconds:
        raise Broken(f"{len(bad)} of {len(lines)} requests failed in {seconds} seconds")
    times = sorted(int(line[2]) for line in lines)
    at = lambda share: times[min(int(len(times) * share), len(times) - 1)]
    return {"p50_us": at(0.5), "p90_us": at(0.9), "p99_us": at(0.99)}


def gigabyte(port):
    """Seconds that the body took."""
    command = ["curl", "-sS", "--fail", "-o", "/dev/null", "-w", "%{size_download} %{time_total}", f"http://127.0.0.1:{port}/gigabyte"]
    size, seconds = run([*command, "-H", f"Host: {HOST}"]).split()
    if int(size) != 1 << 30:
        raise Broken(f"{size} bytes came")
    return float(seconds)
