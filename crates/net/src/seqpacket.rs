//! Unix sockets that keep the bounds of packets, each of which may carry one descriptor (unix(7), `SOCK_SEQPACKET`
//! and `SCM_RIGHTS`): how a node agent hands network namespaces to the node proxy.
//!
//! Invariants:
//! * a packet is received whole, or its connection fails: nothing that was cut off is taken for a packet;
//! * a descriptor that is received is close-on-exec, and closed when nobody takes it: a peer can't fill our table;
//! * a listener is put in the place of an older socket without a moment in which there is none.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, socketpair, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// `SCM_MAX_FD`: no packet has more descriptors (kernel include/net/scm.h). With room for all of them none is cut off,
/// and none is received without an owner.
const MOST_DESCRIPTORS: usize = 253;

/// A packet that was received.
#[derive(Debug)]
pub struct Packet {
    /// Its content; never empty.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
}

/// One end of a connection. Sending and receiving take `&self`; packets of several senders don't mix.
#[derive(Debug)]
pub struct Seqpacket {
    socket: AsyncFd<OwnedFd>,
}

impl Seqpacket {
    /// Connects to the listener at `path`. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// Nothing listens there (`NotFound`, `ConnectionRefused`), too many wait to be accepted (`WouldBlock`), or the
    /// path is longer than 107 bytes.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = new_socket()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::from_fd(socket)
    }

    /// Two ends that are connected with each other. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self::from_fd(a)?, Self::from_fd(b)?))
    }

    fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        Ok(Self { socket: register(socket, interest)? })
    }

    /// The user and the process at the other end, as they were when it connected.
    ///
    /// # Errors
    /// The kernel's.
    pub fn peer(&self) -> io::Result<(u32, i32)> {
        let credentials = getsockopt(&self.socket, sockopt::PeerCredentials)?;
        Ok((credentials.uid(), credentials.pid()))
    }

    /// Sends one packet, with a descriptor if there is one. Waits while the peer's queue is full. Cancelled, it has
    /// sent all or nothing.
    ///
    /// # Errors
    /// The peer is gone (`BrokenPipe`), the packet is empty (`InvalidInput`) or larger than the kernel takes.
    pub async fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if bytes.is_empty() {
            // Its reader could not tell it from the end.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an empty packet"));
        }
        let descriptors: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        let send = |socket: &OwnedFd| {
            let parts = [IoSlice::new(bytes)];
            let sent = sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
            // The kernel sends packets whole.
            if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
        };
        self.socket.async_io(Interest::WRITABLE, send).await
    }

    /// Waits for a packet of at most `limit` bytes; `None` when the peer has closed. Cancelling loses nothing.
    ///
    /// # Errors
    /// The packet is longer, or carries more than one descriptor (`InvalidData`): it is lost, and the connection
    /// should be given up. Or the kernel's.
    pub async fn receive(&self, limit: usize) -> io::Result<Option<Packet>> {
        self.socket.async_io(Interest::READABLE, |socket| receive(socket.as_fd(), limit)).await
    }
}

impl AsFd for Seqpacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

fn receive(socket: BorrowedFd<'_>, limit: usize) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; limit];
    let mut control = cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let (len, flags, descriptors) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        // Owned before anything can fail, so that they are closed then.
        let mut descriptors = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                descriptors.extend(received.into_iter().map(own));
            }
        }
        (message.bytes, message.flags, descriptors)
    };
    let refused = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return refused(format!("a packet of more than {limit} bytes"));
    }
    if descriptors.len() > 1 {
        return refused("a packet with more than one descriptor".to_owned());
    }
    if len == 0 {
        return Ok(None);
    }
    bytes.truncate(len);
    Ok(Some(Packet { bytes, descriptor: descriptors.into_iter().next() }))
}

#[expect(unsafe_code, reason = "the kernel hands descriptors over as numbers")]
fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: callers pass what the kernel has just put into our table for them; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// A listening socket. Dropping it leaves its path: a successor may be there by then.
#[derive(Debug)]
pub struct SeqpacketListener {
    socket: AsyncFd<OwnedFd>,
}

impl SeqpacketListener {
    /// Listens at `path`, which only the user of this process may connect to. A socket that is there is replaced;
    /// who is connected to it stays connected. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The directory is missing or not writable, the path is longer than 102 bytes, or something that is no socket
    /// is there (`AlreadyExists`).
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => {
                let message = format!("{} is there and is no socket", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
            }
            _ => {}
        }
        let socket = new_socket()?;
        // Bound beside it and moved: whoever connects finds the old one or the new one, never none, and never one
        // that does not listen yet.
        let beside = path.with_extension("next");
        if let Err(error) = fs::remove_file(&beside)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        bind(socket.as_raw_fd(), &UnixAddr::new(&beside)?)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        fs::rename(&beside, path)?;
        Ok(Self { socket: register(socket, Interest::READABLE)? })
    }

    /// Waits for a connection. Cancelling loses nothing.
    ///
    /// # Errors
    /// The kernel's; out of descriptors, as a rule: the listener itself is sound.
    pub async fn accept(&self) -> io::Result<Seqpacket> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let accept = |socket: &OwnedFd| Ok(own(accept4(socket.as_raw_fd(), flags)?));
        Seqpacket::from_fd(self.socket.async_io(Interest::READABLE, accept).await?)
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

#[expect(unsafe_code, reason = "the only way to have tokio wait for a socket that it has no type for")]
pub(crate) fn register(socket: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open, and stays the same one until it is dropped with what it is moved into.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}
