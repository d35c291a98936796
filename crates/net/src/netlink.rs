//! Just enough netlink (RFC 3549, kernel include/uapi/linux/netlink.h) to ask about sockets, rules and routes
//! of a namespace without a program to run for each question.
//!
//! Replies come from the kernel and are still parsed like input: every length is checked, and a wait is bounded.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::netns::Netns;
use crate::scratch::Scratch;
use crate::seqpacket::register;

/// `NLM_F_REQUEST`.
pub const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`.
pub const ACK: u16 = 0x4;
/// `NLM_F_EXCL`: fail if it exists.
pub const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_ROOT | NLM_F_MATCH`: all there are.
pub const DUMP: u16 = 0x300;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// `NLA_TYPE_MASK`: without the flags for nesting and byte order.
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// The kernel answers at once; a longer silence is a fault.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// A request under construction.
#[derive(Clone, Debug)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of type `kind` with `NLM_F_*` flags; [`REQUEST`] is added.
    #[must_use]
    pub fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | REQUEST).to_ne_bytes());
        bytes.resize(HEADER, 0);
        Self { bytes }
    }

    /// Appends the fixed part that the type demands, padded to four bytes.
    #[must_use]
    pub fn body(mut self, body: &[u8]) -> Self {
        self.bytes.extend(body);
        self.pad();
        self
    }

    /// Appends an attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend(attribute(kind, value));
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The bytes to send, with length, more flags and sequence number filled in.
    fn finish(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        if let Some(field) = self.bytes.get_mut(6..8) {
            let own = u16_at(field, 0).unwrap_or_default();
            field.copy_from_slice(&(own | flags).to_ne_bytes());
        }
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        for (at, value) in [(0, len), (8, sequence)] {
            if let Some(field) = self.bytes.get_mut(at..at + 4) {
                field.copy_from_slice(&value.to_ne_bytes());
            }
        }
        self.bytes
    }
}

/// A netlink socket in a namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// A socket of the given protocol (`NetlinkRoute`, `NetlinkSockDiag`, ...) in `netns`.
    ///
    /// # Errors
    /// The namespace can't be entered, or the kernel lacks the protocol (`EPROTONOSUPPORT`).
    pub fn open(netns: &Netns, protocol: SockProtocol) -> io::Result<Self> {
        let socket = netns
            .run(|| socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol))??;
        let timeout = TimeVal::from(libc::timeval {
            tv_sec: i64::try_from(REPLY_TIMEOUT.as_secs()).unwrap_or(i64::MAX),
            tv_usec: 0,
        });
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and waits for its acknowledgement.
    ///
    /// # Errors
    /// The kernel's answer, such as `EEXIST`, `ENOENT` or `EPERM`.
    pub fn acknowledged(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, ACK, |_, _| {})
    }

    /// Sends a request for one object and hands its type and payload to `each`.
    ///
    /// # Errors
    /// The kernel's answer, `ENOENT` as a rule.
    pub fn get(&mut self, message: Message, each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.exchange(message, ACK, each)
    }

    /// Sends a request for all there are and hands type and payload of every one to `each`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn dump(&mut self, message: Message, each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.exchange(message, DUMP, each)
    }

    /// Sends `messages` between `begin` and `end` at once: all of them happen, or none (nf_tables).
    ///
    /// # Errors
    /// The kernel's answer to the first that failed.
    pub fn transaction(&mut self, begin: Message, messages: Vec<Message>, end: Message) -> io::Result<()> {
        let last = messages.len();
        let parts = std::iter::once(begin).chain(messages).chain(std::iter::once(end)).enumerate();
        let mut request = Vec::new();
        let first = self.sequence.wrapping_add(1);
        for (number, message) in parts {
            self.sequence = self.sequence.wrapping_add(1);
            request.extend(message.finish(if number == last { ACK } else { 0 }, self.sequence));
        }
        self.send(&request)?;
        self.receive(first, |_, _| {})
    }

    fn exchange(&mut self, message: Message, flags: u16, each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        self.send(&message.finish(flags, self.sequence))?;
        self.receive(self.sequence, each)
    }

    fn send(&self, request: &[u8]) -> io::Result<()> {
        sendto(self.socket.as_raw_fd(), request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    /// Reads until the end of the answer to the requests numbered from `first` on.
    fn receive(&self, first: u32, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let fd = self.socket.as_raw_fd();
        let own = 0..=self.sequence.wrapping_sub(first);
        let mut buffer = Scratch::take();
        loop {
            let received = recv(fd, &mut buffer, MsgFlags::empty())?;
            let mut rest = buffer.get(..received).unwrap_or_default();
            while let Some((kind, sequence, payload, after)) = next_message(rest) {
                rest = after;
                if !own.contains(&sequence.wrapping_sub(first)) {
                    continue;
                }
                match kind {
                    // As a rule without an error; but a list that the kernel broke off ends with one.
                    NLMSG_DONE => return done(payload),
                    NLMSG_ERROR => return error_of(payload),
                    _ => each(kind, payload),
                }
            }
        }
    }
}

/// `RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR` (kernel include/uapi/linux/rtnetlink.h).
const DEVICES: u32 = 0x1 | 0x10 | 0x100;

/// What changes of a namespace's devices and their addresses, from when it was made on. It keeps the namespace alive.
#[derive(Debug)]
pub struct Devices {
    socket: AsyncFd<OwnedFd>,
}

impl Devices {
    /// In `netns`. Within a runtime.
    ///
    /// # Errors
    /// The namespace can't be entered, or descriptors have run out.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = netns
            .run(|| socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute))??;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, DEVICES))?;
        Ok(Self { socket: register(socket, Interest::READABLE)? })
    }

    /// Waits for a change. Those of one moment are one.
    ///
    /// # Errors
    /// The socket is of no use any more.
    pub async fn changed(&self) -> io::Result<()> {
        // What they are does not matter; that some were too many for the socket (`ENOBUFS`) is a change, too.
        let mut few = [0; 64];
        let mut any = false;
        loop {
            let mut ready = self.socket.readable().await?;
            match recv(self.socket.as_raw_fd(), &mut few, MsgFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if any => return Ok(()),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether something changed since this was asked, or [`Devices::changed`] returned, last.
    #[must_use]
    pub fn have_changed(&self) -> bool {
        let (mut few, mut any) = ([0; 64], false);
        // Who may change devices may do so all the time.
        for _ in 0..1000 {
            match recv(self.socket.as_raw_fd(), &mut few, MsgFlags::empty()) {
                Ok(1..) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EINTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
        any
    }
}

/// The first message of `bytes`: type, sequence number, payload, and what follows.
fn next_message(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
    let (kind, sequence) = (u16_at(bytes, 4)?, u32_at(bytes, 8)?);
    let payload = bytes.get(HEADER..len)?;
    let after = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, payload, after))
}

/// The end of a list, which may be too early (kernel net/netlink/af_netlink.c, `netlink_dump_done`).
fn done(payload: &[u8]) -> io::Result<()> {
    if payload.is_empty() { Ok(()) } else { error_of(payload) }
}

/// An `nlmsgerr`: zero is the acknowledgement.
fn error_of(payload: &[u8]) -> io::Result<()> {
    match u32_at(payload, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// An attribute with its header and padding, to be put into another one.
#[must_use]
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes in `bytes`, type (without flags) and value. Stops at the first that doesn't fit.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & ATTRIBUTE_KIND;
        let value = bytes.get(ATTRIBUTE_HEADER..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The number in native byte order at `at`.
#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(field.try_into().ok()?))
}

/// The number in native byte order at `at`.
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_wants_it() {
        let bytes = Message::new(20, DUMP).body(&[1, 2, 3]).attribute(7, &[9]).finish(ACK, 5);
        assert_eq!(u32_at(&bytes, 0), Some(28));
        assert_eq!(u16_at(&bytes, 4), Some(20));
        assert_eq!(u16_at(&bytes, 6), Some(DUMP | REQUEST | ACK));
        assert_eq!(u32_at(&bytes, 8), Some(5));
        assert_eq!(bytes[16..], [1, 2, 3, 0, 5, 0, 7, 0, 9, 0, 0, 0]);
    }

    #[tokio::test]
    async fn a_device_that_changes_is_told_of() {
        let Ok(netns) = Netns::new_empty() else { return };
        let devices = Devices::open(&netns).unwrap();
        let changes = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        let seen = changes.clone();
        let watch = tokio::spawn(async move {
            while devices.changed().await.is_ok() {
                seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        });
        // RTM_NEWLINK with an `ifinfomsg`: the first device, loopback, goes up.
        let up = Message::new(16, 0).body(&[0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        Netlink::open(&netns, SockProtocol::NetlinkRoute).unwrap().acknowledged(up).unwrap();
        let told = async {
            while changes.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), told).await.unwrap();
        watch.abort();
    }

    #[test]
    fn a_list_that_the_kernel_breaks_off_is_an_error() {
        let (ours, kernel) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let netlink = Netlink { socket: ours.into(), sequence: 1 };
        let answer = |error: i32| {
            for (kind, payload) in [(20, [7; 4]), (NLMSG_DONE, error.to_ne_bytes())] {
                kernel.send(&Message::new(kind, 0).body(&payload).finish(0, 1)).unwrap();
            }
            let mut seen = 0;
            let outcome = netlink.receive(1, |_, _| seen += 1);
            assert_eq!(seen, 1);
            outcome.map_err(|error| error.raw_os_error())
        };
        assert_eq!(answer(0), Ok(()));
        assert_eq!(answer(-libc::ENOMEM), Err(Some(libc::ENOMEM)));
    }

    #[test]
    fn lengths_that_lie_end_the_parse() {
        assert!(next_message(&[0; 15]).is_none());
        assert!(next_message(&[8; 16]).is_none());
        let shorter_than_its_header = [8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(next_message(&shorter_than_its_header).is_none());
        assert_eq!(attributes(&[3, 0, 1, 0, 1, 1, 1, 1]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0]).count(), 0);
        let two = [5, 0, 1, 0, 42, 0, 0, 0, 4, 0, 2, 0x80];
        assert_eq!(attributes(&two).collect::<Vec<_>>(), [(1, &[42][..]), (2, &[][..])]);
    }
}
