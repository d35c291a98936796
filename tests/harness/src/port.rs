//! Ports of loopback for programs that are told their port before they listen.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// Below those that the kernel gives to connections (`net.ipv4.ip_local_port_range` begins at 32768), so that no
/// connection takes a port before the program has it.
const FIRST: u32 = 20_000;
const COUNT: u32 = 12_000;

static GIVEN: AtomicU32 = AtomicU32::new(0);

/// A port of 127.0.0.1 that nobody listens on. This process gets no port twice, and other ones begin elsewhere.
///
/// # Panics
/// If all are taken.
#[must_use]
#[allow(clippy::panic, reason = "tests end so")]
pub fn free() -> u16 {
    let start = std::process::id().wrapping_mul(61);
    for _ in 0..COUNT {
        let next = start.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + next % COUNT).unwrap_or_default();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("all ports from {FIRST} to {} are taken", FIRST + COUNT)
}
