//! Datagrams for a proxy: which of the namespace's addresses one came to, and replies that leave from there.
//!
//! A DNS query that capture redirected to the proxy's port reached, say, 127.0.0.1; unless the reply leaves
//! from the same address, conntrack doesn't recognise it and the resolver gets an answer from a stranger.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::Type;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::netns::Netns;
use crate::original_dst::canonical;
use crate::socket::{At, Purpose, SocketError, Step, new_bound, set_transparent, share};

/// How a datagram socket is made.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DatagramOptions {
    /// Receive and send for addresses that aren't the namespace's own (`IP_TRANSPARENT`; needs
    /// `CAP_NET_ADMIN`).
    pub transparent: bool,
    /// The mark of what is sent (`SO_MARK`; needs `CAP_NET_ADMIN`).
    pub mark: Option<u32>,
    /// Let another socket with the same option share the port: a successor process during an upgrade.
    pub reuse_port: bool,
    /// For `[::]`: leave IPv4 alone.
    pub only_v6: bool,
}

/// A datagram that was received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram {
    /// Its length in the caller's buffer, bytes.
    pub len: usize,
    /// Whether it was longer than the buffer, and its end is lost.
    pub truncated: bool,
    /// Who sent it; never IPv4-mapped.
    pub peer: SocketAddr,
    /// The address that it arrived at, after any redirection: a reply has to leave from here.
    pub local: IpAddr,
    /// The interface that it arrived by.
    pub interface: u32,
    /// The destination in its header (`IP_RECVORIGDSTADDR`). Under TPROXY this is where the client sent it;
    /// under REDIRECT the header is already rewritten, and conntrack alone knows.
    pub header_dst: Option<SocketAddr>,
}

/// A datagram socket that tells the address each datagram came to.
#[derive(Debug)]
pub struct ProxyUdpSocket {
    socket: UdpSocket,
    /// Of family v6: it wants IPv4 addresses in the mapped form.
    v6: bool,
}

impl ProxyUdpSocket {
    /// A socket on `address` in `netns`; `[::]` serves both families. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// Which step failed, and how.
    pub fn bind(netns: &Netns, address: SocketAddr, options: &DatagramOptions) -> Result<Self, SocketError> {
        let attempt = || {
            let (socket, address) = new_bound(netns, address, Type::DGRAM, |socket, address| {
                if options.reuse_port {
                    socket.set_reuse_port(true).at(Step::Option("SO_REUSEPORT"))?;
                }
                if let Some(mark) = options.mark {
                    socket.set_mark(mark).at(Step::Option("SO_MARK"))?;
                }
                if options.transparent {
                    set_transparent(socket, address)?;
                }
                if address.is_ipv6() {
                    socket.set_only_v6(options.only_v6).at(Step::Option("IPV6_V6ONLY"))?;
                    setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)
                        .at(Step::Option("IPV6_RECVPKTINFO"))?;
                    setsockopt(socket, sockopt::Ipv6OrigDstAddr, &true)
                        .at(Step::Option("IPV6_RECVORIGDSTADDR"))?;
                } else {
                    setsockopt(socket, sockopt::Ipv4PacketInfo, &true).at(Step::Option("IP_PKTINFO"))?;
                }
                if !(address.is_ipv6() && options.only_v6) {
                    setsockopt(socket, sockopt::Ipv4OrigDstAddr, &true)
                        .at(Step::Option("IP_RECVORIGDSTADDR"))?;
                }
                Ok(())
            })?;
            socket.bind(&address.into()).at(Step::Bind)?;
            if options.reuse_port {
                share(&socket);
            }
            let socket = UdpSocket::from_std(socket.into()).at(Step::Register)?;
            Ok(Self { socket, v6: address.is_ipv6() })
        };
        attempt().map_err(|(step, source)| SocketError {
            purpose: Purpose::Datagrams,
            address,
            netns: netns.clone(),
            step,
            source,
        })
    }

    /// The address that it is bound to.
    ///
    /// # Errors
    /// The kernel's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Waits for a datagram and puts it into `buffer`. Cancelling loses nothing.
    ///
    /// # Errors
    /// The kernel's. An error of an earlier reply (`ECONNREFUSED` and the like) is not reported here.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<Datagram> {
        self.socket.async_io(Interest::READABLE, || self.receive(buffer)).await
    }

    /// Sends `data` to `peer` from the address `from`, the [`Datagram::local`] of what is answered.
    ///
    /// # Errors
    /// The kernel's: `EMSGSIZE` when it doesn't fit, `ENETUNREACH`, `EPERM` when a filter drops it.
    pub async fn send(&self, data: &[u8], peer: SocketAddr, from: IpAddr) -> io::Result<usize> {
        self.socket.async_io(Interest::WRITABLE, || self.transmit(data, peer, from)).await
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Datagram> {
        let mut control =
            cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo, libc::sockaddr_in6, libc::sockaddr_in);
        let mut parts = [IoSliceMut::new(buffer)];
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut control), MsgFlags::empty())?;
        let peer = message.address.as_ref().and_then(socket_addr).ok_or(io::ErrorKind::InvalidData)?;
        let (mut local, mut interface, mut header_dst) = (None, 0, None);
        for item in message.cmsgs()? {
            match item {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    local = Some(IpAddr::V4(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())));
                    interface = info.ipi_ifindex.try_into().unwrap_or(0);
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    local = Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)).to_canonical());
                    interface = info.ipi6_ifindex;
                }
                ControlMessageOwned::Ipv4OrigDstAddr(addr) => {
                    let ip = Ipv4Addr::from(addr.sin_addr.s_addr.to_ne_bytes());
                    header_dst = Some(SocketAddr::new(ip.into(), u16::from_be(addr.sin_port)));
                }
                ControlMessageOwned::Ipv6OrigDstAddr(addr) => {
                    let ip = Ipv6Addr::from(addr.sin6_addr.s6_addr);
                    header_dst = Some(canonical(SocketAddr::new(ip.into(), u16::from_be(addr.sin6_port))));
                }
                _ => {}
            }
        }
        let local = local.ok_or(io::ErrorKind::InvalidData)?;
        let truncated = message.flags.contains(MsgFlags::MSG_TRUNC);
        Ok(Datagram { len: message.bytes, truncated, peer: canonical(peer), local, interface, header_dst })
    }

    fn transmit(&self, data: &[u8], peer: SocketAddr, from: IpAddr) -> io::Result<usize> {
        let fd = self.socket.as_raw_fd();
        let parts = [IoSlice::new(data)];
        let sent = if self.v6 {
            let (peer, from) = (mapped(peer), mapped_ip(from));
            let info =
                libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: from.octets() }, ipi6_ifindex: 0 };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &parts, &control, MsgFlags::empty(), Some(&SockaddrStorage::from(peer)))
        } else {
            let IpAddr::V4(from) = from.to_canonical() else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            let peer = SockaddrStorage::from(canonical(peer));
            sendmsg(fd, &parts, &control, MsgFlags::empty(), Some(&peer))
        };
        Ok(sent?)
    }
}

fn mapped_ip(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// The form in which a dual-stack socket wants an address. Keeps the scope of a link-local one.
fn mapped(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(addr) => SocketAddr::new(addr.ip().to_ipv6_mapped().into(), addr.port()),
        SocketAddr::V6(_) => addr,
    }
}

fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr.as_sockaddr_in().map(|addr| SocketAddrV4::new(addr.ip(), addr.port()).into());
    v4.or_else(|| {
        let addr = addr.as_sockaddr_in6()?;
        Some(SocketAddrV6::new(addr.ip(), addr.port(), addr.flowinfo(), addr.scope_id()).into())
    })
}
