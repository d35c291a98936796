#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether connections may pass between two pods of a node without a proxy: the experiment of docs/same-node.md.

Needs root, clang, gcc, bpftool and libbpf-dev. Makes network namespaces, a cgroup mount and pins of its own, and removes them.
Each line says what was tried and what was seen; one that is not as documented ends it with an error.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
NAME = f"culvert-verdicts-{os.getpid()}"
PINS = Path("/sys/fs/bpf") / NAME
COUNTS = "REWRITTEN PEER_ASKED SPOOFED VERIFIED STALE EXPIRED DELIVERED UNVERIFIED OPENED CLOSED BYTES".split()
VIP, A, B, EVIL, FAR = "10.96.0.9", "10.77.0.2", "10.77.0.3", "10.77.0.4", "10.88.0.2"
MESH = [("a", A), ("b", B), ("evil", EVIL)]

SERVER = """
import socket, threading
listener = socket.socket(); listener.setsockopt(1, 2, 1); listener.bind(("0.0.0.0", 8080)); listener.listen()
def serve(stream, peer):
    try:
        stream.sendall((peer[0] + "\\n").encode())
        while data := stream.recv(65536): stream.sendall(data)
    except OSError: pass
    stream.close()
while True: threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
"""
# connect [SOURCE [MARK]]: who the server sees, whom the client thinks that it talks to, and its mark.
CLIENT = """
import socket, sys
s = socket.socket(); s.settimeout(1.5)
if len(sys.argv) > 4: s.setsockopt(1, 36, int(sys.argv[4], 16))
if len(sys.argv) > 3: s.setsockopt(0, 19, 1); s.bind((sys.argv[3], 0))
try:
    s.connect((sys.argv[1], int(sys.argv[2])))
    print(s.recv(64).decode().strip(), s.getpeername()[0], hex(s.getsockopt(1, 36)))
except OSError as error: print(type(error).__name__)
"""
# A socket that was translated connects elsewhere.
AGAIN = """
import ctypes, socket, struct
s = socket.socket(); s.settimeout(1.5); s.connect(("10.96.0.9", 80)); s.recv(64)
ctypes.CDLL(None).connect(s.fileno(), struct.pack("H14x", 0), 16)
s.connect(("10.88.0.2", 8080)); print(s.getpeername()[0], hex(s.getsockopt(1, 36)))
"""
# Goes on for as long as it may.
FLOW = """
import socket, time
s = socket.socket(); s.settimeout(8); s.connect(("10.96.0.9", 80)); s.recv(64); sent = 0
try:
    while True:
        s.sendall(b"x" * 1000); got = 0
        while got < 1000: got += len(s.recv(4096)) or 10000
        sent += 1000; time.sleep(0.01)
except OSError as error: print(sent, time.time(), type(error).__name__)
"""


def run(*words, check=True):
    return subprocess.run([str(w) for w in words], check=check, capture_output=True, text=True).stdout.strip()


def inside(pod, code, *args):
    return run("ip", "netns", "exec", f"{NAME}-{pod}", sys.executable, "-c", code, *args)


def ip(pod, words):
    return run("ip", "-n", f"{NAME}-{pod}", *words.split())


def hexed(data):
    return " ".join(f"{byte:02x}" for byte in data)


def put(name, key, value):
    words = f"bpftool map update pinned {PINS / name} key hex {hexed(key)} value hex {hexed(value)}"
    run(*words.split())


def counts():
    dump = json.loads(run("bpftool", "-j", "map", "dump", "pinned", PINS / "counts"))
    values = [entry.get("formatted", entry)["value"] for entry in dump]
    return dict(zip(COUNTS, values))


def address(text, port):
    return socket.inet_aton(text) + struct.pack("!H2x", port)


def renew(seconds=3600):
    put("lease", struct.pack("I", 0), struct.pack("Q", time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(seconds * 1e9)))


def set_generation(number):
    put("generation", struct.pack("I", 0), struct.pack("I", number))


def allow(number):
    put("verdicts", socket.inet_aton(A) + address(B, 8080), struct.pack("I", number))


def network():
    """Three pods on a bridge, and one behind a route, which stands for another node."""
    for name in ["node", "far", *(pod for pod, _ in MESH)]:
        run("ip", "netns", "add", f"{NAME}-{name}")
        ip(name, "link set lo up")
    ip("node", "link add cbr0 type bridge")
    ip("node", "link set cbr0 up")
    ip("node", "addr add 10.77.0.1/24 dev cbr0")
    for pod, own in [*MESH, ("far", FAR)]:
        ip("node", f"link add v{pod} type veth peer name eth0 netns {NAME}-{pod}")
        ip("node", f"link set v{pod} {'up' if pod == 'far' else 'master cbr0 up'}")
        ip(pod, f"addr add {own}/24 dev eth0")
        ip(pod, "link set eth0 up")
        ip(pod, f"route add default via {own.rsplit('.', 1)[0]}.1")
    ip("node", "addr add 10.88.0.1/24 dev vfar")
    switch = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter"
    run("ip", "netns", "exec", f"{NAME}-node", "sh", "-c", switch)


def routed():
    """The same without a bridge: a route to each pod."""
    for pod, own in MESH[:2]:
        ip("node", f"link set v{pod} nomaster")
        ip("node", f"route add {own}/32 dev v{pod}")
        ip("node", f"addr add 10.77.0.1/32 dev v{pod}")
        run("ip", "netns", "exec", f"{NAME}-node", "sh", "-c", f"echo 1 > /proc/sys/net/ipv4/conf/v{pod}/proxy_arp")
    ip("node", "addr del 10.77.0.1/24 dev cbr0")
    for pod, _ in MESH:
        ip(pod, "neigh flush all")


def saw(what, seen, wanted):
    print(f"{what}: {seen}", flush=True)
    if seen != wanted:
        raise SystemExit(f"wanted {wanted}")


def flow_until(change):
    """What a connection's client says that goes on while `change` is made, and how long after it."""
    command = ["ip", "netns", "exec", f"{NAME}-a", sys.executable, "-c", FLOW]
    flow = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(1)
    at = time.time()
    change()
    sent, ended, how = flow.communicate()[0].split()
    return int(sent), float(ended) - at, how


def destroy():
    for pod, end in [("a", "dst"), ("b", "src")]:
        run("ip", "netns", "exec", f"{NAME}-{pod}", "ss", "-K", "-t", end, B, check=False)


def experiments():
    client = lambda pod, *args: inside(pod, CLIENT, *args)
    saw("a by the service's address: server sees, getpeername, mark", client("a", VIP, 80), f"{A} {VIP} 0x538")
    saw("a by the pod's address", client("a", B, 8080), f"{A} {B} 0x0")
    saw("evil by the service's address, which is not its to use", client("evil", VIP, 80), "OSError")
    saw("evil as itself", client("evil", B, 8080), f"{EVIL} {B} 0x0")
    saw("evil with a's address, and with the host's mark", [client("evil", B, 8080, A), client("evil", B, 8080, A, "77")],
        ["TimeoutError"] * 2)
    saw("another node with a's address, and with the host's mark",
        [client("far", B, 8080, A), client("far", B, 8080, A, "77")], ["TimeoutError"] * 2)
    now = counts()
    saw("  stopped: at the source's end, at the destination's", [now[k] > 0 for k in ("SPOOFED", "UNVERIFIED")], [True] * 2)
    saw("a socket connects again elsewhere: getpeername, mark", inside("a", AGAIN), f"{FAR} 0x0")

    before = counts()
    sent, after, how = flow_until(lambda: (set_generation(8), destroy()))
    time.sleep(0.2)
    now = counts()
    saw("a new generation, sockets destroyed: ended within a second, how", [after < 1, how], [True, "ConnectionAbortedError"])
    print(f"  after {after:.3f} s")
    saw("  the kernel's count of its bytes", now["BYTES"] - before["BYTES"] - sent in range(1001), True)
    saw("  and of what closed", now["CLOSED"] - before["CLOSED"], 1)
    saw("a by the old verdict", client("a", VIP, 80), "TimeoutError")
    allow(8)
    saw("a by a new verdict", client("a", VIP, 80), f"{A} {VIP} 0x538")

    _, after, how = flow_until(lambda: renew(0.5))
    saw("nobody renews the lease: no byte passes, and the client waits until", how, "TimeoutError")
    saw("a while there is no lease", client("a", VIP, 80), "TimeoutError")
    renew()
    routed()
    saw("a, with routes instead of a bridge", client("a", VIP, 80), f"{A} {VIP} 0x538")
    saw("another node, with routes", client("far", B, 8080, A), "TimeoutError")


def main():
    work = Path(tempfile.mkdtemp())
    cgroup = work / "cgroup"
    processes = []
    try:
        (work / "vmlinux.h").write_text(run("bpftool", "btf", "dump", "file", "/sys/kernel/btf/vmlinux", "format", "c"))
        target = "-O2 -g -target bpf -D__TARGET_ARCH_x86".split()
        run("clang", *target, "-I", work, "-c", HERE / "programs.bpf.c", "-o", work / "programs.o")
        run("gcc", "-O1", HERE / "load.c", "-o", work / "load", "-lbpf")
        network()
        cgroup.mkdir()
        run("mount", "-t", "cgroup2", "none", cgroup)
        PINS.mkdir()
        index = {pod: int(ip("node", f"-o link show v{pod}").split(":")[0]) for pod, _ in MESH}
        words = [work / "load", work / "programs.o", cgroup, f"/run/netns/{NAME}-node", PINS, *index.values()]
        loader = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, text=True)
        processes.append(loader)
        if loader.stdout.readline().strip() != "ready":
            raise SystemExit("the programs can't be loaded")
        for pod, own in MESH:
            put("own", struct.pack("I", index[pod]), socket.inet_aton(own))
        cookie = "import socket; print(int.from_bytes(socket.socket().getsockopt(1, 71, 8), 'little'))"
        put("services", struct.pack("Q", int(inside("a", cookie))) + address(VIP, 80), address(B, 8080))
        set_generation(7)
        allow(7)
        renew()
        for pod in ["b", "far"]:
            command = ["ip", "netns", "exec", f"{NAME}-{pod}", sys.executable, "-c", SERVER]
            processes.append(subprocess.Popen(command))
        time.sleep(0.7)
        experiments()
    finally:
        for process in processes:
            process.kill()
            process.wait()
        run("umount", "-l", cgroup, check=False)
        shutil.rmtree(PINS, ignore_errors=True)
        for name in ["node", "far", *(pod for pod, _ in MESH)]:
            run("ip", "netns", "del", f"{NAME}-{name}", check=False)
        for path in work.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        work.rmdir()


main()
