//! What a copied byte and a copied message cost: the CPU time of the thread that copies, apart from that of
//! the programs at its ends. `cargo run --release -p net --example copy_bench`
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for people")]
#![allow(clippy::disallowed_types, reason = "the programs at the ends block, each on its own thread")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use net::{ByteCounts, ConnectOptions, ListenOptions, Netns};
use nix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

fn cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

/// Copies one connection to `to`; sends its listening port, and returns the CPU time that the copy took.
fn relay(to: std::net::SocketAddr, port: &std::sync::mpsc::Sender<std::net::SocketAddr>) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let netns = Netns::current().unwrap();
        let listener =
            net::listen(&netns, (Ipv4Addr::LOCALHOST, 0).into(), &ListenOptions::default()).unwrap();
        port.send(listener.local_addr().unwrap()).unwrap();
        let (client, _) = listener.accept().await.unwrap();
        let options = ConnectOptions { mark: None, ..ConnectOptions::default() };
        let server = net::connect(&netns, &options, to, Duration::from_secs(5)).await.unwrap();
        let start = cpu();
        let _ = net::copy(client, server, &ByteCounts::default()).await;
        cpu() - start
    })
}

fn run<T: Send>(
    server: impl FnOnce(TcpListener) -> T + Send,
    client: impl FnOnce(std::net::SocketAddr) -> Duration,
) -> (Duration, Duration) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let (sender, port) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let copying = scope.spawn(move || relay(to, &sender));
        scope.spawn(move || server(listener));
        let took = client(port.recv().unwrap());
        (took, copying.join().unwrap())
    })
}

fn bulk(total: usize, write: usize) {
    let (took, cpu) = run(
        |listener| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = vec![0; 256 * 1024];
            let mut received = 0;
            while received < total {
                received += stream.read(&mut buffer).unwrap();
            }
        },
        |to| {
            let mut stream = std::net::TcpStream::connect(to).unwrap();
            let buffer = vec![1; write];
            let start = Instant::now();
            for _ in 0..total / write {
                stream.write_all(&buffer).unwrap();
            }
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = stream.read(&mut [0]);
            start.elapsed()
        },
    );
    let gigabytes = total as f64 / 1e9;
    println!(
        "bulk, writes of {write:>7}: {:5.1} Gbit/s, {:.3} CPU s/GB of the copy",
        gigabytes * 8.0 / took.as_secs_f64(),
        cpu.as_secs_f64() / gigabytes
    );
}

fn ping_pong(size: usize, times: u32) {
    let (took, cpu) = run(
        |listener| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            let mut buffer = vec![0; size];
            while stream.read_exact(&mut buffer).is_ok() {
                stream.write_all(&buffer).unwrap();
            }
        },
        |to| {
            let mut stream = std::net::TcpStream::connect(to).unwrap();
            stream.set_nodelay(true).unwrap();
            let mut buffer = vec![1; size];
            let start = Instant::now();
            for _ in 0..times {
                stream.write_all(&buffer).unwrap();
                stream.read_exact(&mut buffer).unwrap();
            }
            start.elapsed()
        },
    );
    println!(
        "ping-pong of {size:>7}: {:6.1} µs a round trip, {:.2} CPU µs of the copy",
        took.as_secs_f64() * 1e6 / f64::from(times),
        cpu.as_secs_f64() * 1e6 / f64::from(times)
    );
}

fn main() {
    for write in [1 << 20, 128 << 10, 32 << 10, 4 << 10] {
        bulk(4 << 30, write);
    }
    for size in [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10] {
        ping_pong(size, 20_000);
    }
}
