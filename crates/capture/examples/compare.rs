//! What capture costs with nftables and with eBPF, in paired rounds: processor time per connection and per gigabyte, through a
//! proxy that only copies. `bench/capture/run` builds and runs it; needs root and a machine with nothing else to do.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a measurement for one to look at"
)]

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use capture::{Backend, Ports, Rules, Tools};
use harness::netns::Lab;
use net::{AcceptLoop, AcceptStats, ByteCounts, ConnectOptions, ListenOptions, Netns};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

const BACKENDS: [Backend; 2] = [Backend::Nftables, Backend::Ebpf];

/// Seconds of this process, and of the whole machine, which includes what interrupts do for it.
#[derive(Clone, Copy)]
struct Spent {
    own: f64,
    machine: f64,
}

impl Spent {
    fn now() -> Self {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let seconds = |t: nix::sys::time::TimeVal| {
            Duration::new(u64::try_from(t.tv_sec()).unwrap(), u32::try_from(t.tv_usec() * 1000).unwrap())
        };
        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        let fields: Vec<f64> =
            stat.lines().next().unwrap().split_whitespace().skip(1).map(|f| f.parse().unwrap()).collect();
        // user, nice, system, then idle and waiting, then interrupts of both kinds; in hundredths.
        let busy = fields[0] + fields[1] + fields[2] + fields[5] + fields[6];
        Self {
            own: (seconds(usage.user_time()) + seconds(usage.system_time())).as_secs_f64(),
            machine: busy / 100.0,
        }
    }

    fn since(self, before: Self) -> Self {
        Self { own: self.own - before.own, machine: self.machine - before.machine }
    }
}

fn listen(netns: &Netns, port: u16, ours: bool) -> AcceptLoop {
    let mark = ours.then_some(net::ZTUNNEL_MARK);
    let options = ListenOptions { mark, transparent: ours, ..ListenOptions::default() };
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    AcceptLoop::new(net::listen(netns, any, &options).unwrap(), Arc::new(AcceptStats::default()))
}

/// Passes what is captured on to where it was going.
fn proxy(netns: &Netns, port: u16, inbound: bool) {
    let (mut accepting, netns) = (listen(netns, port, true), netns.clone());
    tokio::spawn(async move {
        loop {
            let (client, peer) = accepting.next().await;
            let netns = netns.clone();
            tokio::spawn(async move {
                let to = net::original_dst(&client, peer).unwrap();
                let source = inbound.then(|| SocketAddr::new(peer.ip().to_canonical(), 0));
                let options = ConnectOptions { source, ..ConnectOptions::default() };
                if let Ok(server) = net::connect(&netns, &options, to, Duration::from_secs(5)).await {
                    drop(net::copy(client, server, &ByteCounts::default()).await);
                }
            });
        }
    });
}

/// Answers one byte with one, and then reads to the end.
fn application(netns: &Netns) {
    let mut accepting = listen(netns, 8080, false);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = accepting.next().await;
            tokio::spawn(async move {
                let mut buffer = vec![0; 1 << 18];
                if stream.read_exact(&mut buffer[..1]).await.is_ok() && stream.write_all(&[1]).await.is_ok() {
                    while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
                }
            });
        }
    });
}

async fn dial(netns: &Netns, to: SocketAddr) -> TcpStream {
    let options = ConnectOptions { mark: None, ..ConnectOptions::default() };
    let mut stream = net::connect(netns, &options, to, Duration::from_secs(5)).await.unwrap();
    stream.write_all(&[1]).await.unwrap();
    stream.read_exact(&mut [0]).await.unwrap();
    stream
}

/// Connections and megabytes, both into the pod and out of it.
async fn round(lab: &Lab, connections: u32, megabytes: u32) -> [(Spent, f64); 4] {
    let (pod, other) = (lab.pod("server"), lab.pod("client"));
    let mut all = Vec::new();
    for (from, to) in [(other, pod), (pod, other)] {
        let to = SocketAddr::new(to.ipv4.into(), 8080);
        let (before, started) = (Spent::now(), Instant::now());
        for _ in 0..connections {
            net::reset(dial(&from.netns, to).await);
        }
        all.push((Spent::now().since(before), started.elapsed().as_secs_f64()));
        let mut stream = dial(&from.netns, to).await;
        let block = vec![0; 1 << 20];
        let (before, started) = (Spent::now(), Instant::now());
        for _ in 0..megabytes {
            stream.write_all(&block).await.unwrap();
        }
        stream.shutdown().await.unwrap();
        while net::unacknowledged(&stream).is_ok_and(|bytes| bytes > 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        all.push((Spent::now().since(before), started.elapsed().as_secs_f64()));
    }
    all.try_into().unwrap_or_else(|_| unreachable!("four were measured"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let number =
        |at: usize, default: u32| std::env::args().nth(at).map_or(default, |text| text.parse().unwrap());
    let (rounds, connections, megabytes) = (number(1, 10), number(2, 2000), number(3, 1024));
    println!("round,backend,what,cpu_own_us,cpu_machine_us,wall_us");
    for round_number in 0..rounds {
        // In turn, so that what else the machine does meets both.
        let turn = usize::try_from(round_number % 2).unwrap();
        for backend in [BACKENDS[turn], BACKENDS[1 - turn]] {
            let lab = Lab::builder().node("a", &["server", "client"]).build().unwrap();
            let (pod, ports) = (&lab.pod("server").netns, Ports::default());
            application(pod);
            application(&lab.pod("client").netns);
            proxy(pod, ports.outbound, false);
            proxy(pod, ports.inbound_plaintext, true);
            let capture = capture::probe(backend, &Tools::default()).unwrap();
            capture.install(pod, &Rules::default()).unwrap();
            let measured = round(&lab, connections, megabytes).await;
            capture.remove(pod).unwrap();
            let whats = ["connection in", "gigabyte in", "connection out", "gigabyte out"];
            for (what, (spent, wall)) in whats.iter().zip(measured) {
                let units = f64::from(if what.starts_with('c') { connections } else { megabytes })
                    / if what.starts_with('c') { 1.0 } else { 1024.0 };
                let micros = |seconds: f64| seconds * 1e6 / units;
                println!(
                    "{round_number},{backend},{what},{:.1},{:.1},{:.1}",
                    micros(spent.own),
                    micros(spent.machine),
                    micros(wall)
                );
            }
        }
    }
}
