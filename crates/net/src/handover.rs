//! A listener's port handed over to a successor process without a connection lost.
//!
//! Listeners that share a port (`SO_REUSEPORT`) each get a part of the new connections, and what waits in the queue of one
//! that closes is reset. So the newest listener gets all new ones from its first moment on ([`prefer_newest`]), and the
//! queue of the older one is empty when it closes; what still waits there moves over ([`move_queues`]).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netns::Netns;
use crate::sysctl;

/// Where it is set (kernel Documentation/networking/ip-sysctl.rst; since 5.14).
const MIGRATE: &str = "ipv4/tcp_migrate_req";

/// Has the connections that wait in the queue of a listener which closes move to another that shares its port, in `netns`.
///
/// # Errors
/// The kernel is older than 5.14, or the setting can't be written, see [`sysctl::write`].
pub fn move_queues(netns: &Netns) -> io::Result<()> {
    if sysctl::read(netns, MIGRATE)? == "1" {
        return Ok(());
    }
    sysctl::write(netns, MIGRATE, "1")
}

/// Steers new connections, or datagrams, to the newer of two sockets that share a port: to the second of the group. Where
/// there is none, the only one gets them (kernel net/core/sock_reuseport.c, `run_bpf_filter`).
pub(crate) fn prefer_newest(socket: BorrowedFd<'_>) -> io::Result<()> {
    const RETURN_CONSTANT: u16 = 0x06; // BPF_RET | BPF_K
    let mut program = [libc::sock_filter { code: RETURN_CONSTANT, jt: 0, jf: 0, k: 1 }];
    attach(socket, &mut program)
}

#[expect(unsafe_code, reason = "no safe wrapper of this option exists")]
fn attach(socket: BorrowedFd<'_>, program: &mut [libc::sock_filter; 1]) -> io::Result<()> {
    let program = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    let size = libc::socklen_t::try_from(size_of_val(&program)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for the duration of the borrow; the option's value is `program`, of the size that is
    // said, and what it points to is one instruction that lives as long as the call. The kernel copies both.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
