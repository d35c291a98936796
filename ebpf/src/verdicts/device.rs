//! The node's end of a pod's device, where the pod's packets are looked at: inside the pod its owner could undo it.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use net::Netns;
use net::netlink::{Message, Netlink, attributes, u32_at};
use nix::sys::socket::SockProtocol;

use crate::pins::cookie;
use crate::sys::{self, AttachType};
use crate::{Error, Pins, Pod};

/// The names of these links begin so.
pub(super) const DEVICE: &str = "link-device-";

const RTM_GETLINK: u16 = 18;
const RTM_NEWLINK: u16 = 16;
const RTM_GETQDISC: u16 = 38;
const RTM_GETNSID: u16 = 90;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const TCA_KIND: u16 = 1;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// `IFF_UP`.
const UP: u32 = 1;
/// The loopback device is the first of every namespace (kernel `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// Lengths of `ifinfomsg` and `tcmsg`, and of `rtgenmsg` with its padding.
const LINK: usize = 16;
const QDISC: usize = 20;
const GENERIC: usize = 4;

/// A pod whose connections can do without a proxy.
#[derive(Clone, Debug)]
pub struct Qualified {
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// The node's end of its device.
    pub device: u32,
    /// Its own end.
    pub inside: u32,
    /// Its network namespace.
    pub netns: Netns,
    /// Some of what it sends is not captured, and may reach a pair's server by another way, with the same addresses: it would be
    /// dropped there. Such a pod is not to be the source of a pair.
    pub exempts: bool,
}

/// Why connections of a pod need a proxy.
#[derive(Debug)]
pub enum Why {
    /// It is not captured by eBPF, or by programs that know nothing of the node's verdicts.
    NotCaptured,
    /// It has no device that is up, or several.
    Devices(usize),
    /// Its device is of this kind, not veth.
    NotVeth(String),
    /// The other end of its device is not in the node's own namespace.
    NotOnNode,
    /// Others have programs on the node's end of its device, which would be passed by.
    OthersPrograms,
    /// The node's end of its device has a queue of this kind, which would be passed by.
    Queue(String),
    /// Another process captures it, and has not noted that it qualifies.
    NotNoted,
    /// That process has made maps anew since these were taken.
    OtherMaps,
    /// It can't be told, or the program can't be attached.
    Failed(Error),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotCaptured => {
                f.write_str("it is not captured by eBPF programs that know the node's verdicts")
            }
            Self::Devices(0) => f.write_str("it has no device that is up"),
            Self::Devices(several) => write!(f, "it has {several} devices that are up, and may have one"),
            Self::NotVeth(kind) => {
                let kind = if kind.is_empty() { "a device without a kind" } else { kind };
                write!(f, "its device is {kind}, not veth: its packets can't be looked at on the node")
            }
            Self::NotOnNode => {
                f.write_str("the other end of its device is not in the node's network namespace")
            }
            Self::OthersPrograms => f.write_str(
                "others have programs on the node's end of its device, which packets would pass by",
            ),
            Self::Queue(kind) => {
                write!(f, "the node's end of its device has the queue {kind}, which packets would pass by")
            }
            Self::NotNoted => {
                f.write_str("whoever captures it has not found it fit (/pods of the node agent says why)")
            }
            Self::OtherMaps => f.write_str(
                "whoever captures it has made the maps anew: they are for the ztunnel that comes next",
            ),
            Self::Failed(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for Why {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed(error) => Some(error),
            _ => None,
        }
    }
}

impl From<Error> for Why {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What netlink says of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Device {
    index: u32,
    is_up: bool,
    kind: String,
    /// The other end's index, and how its namespace is called here if it is another one.
    peer: Option<u32>,
    peer_netns: Option<u32>,
}

pub(super) fn qualify(
    pins: &Pins,
    directory: &Path,
    program: &OwnedFd,
    node: &Netns,
    pod: &Netns,
) -> Result<Qualified, Why> {
    let captured = Pod::find(pins, pod).filter(|pod| pod.shares(directory)).ok_or(Why::NotCaptured)?;
    let mut devices = devices(pod).map_err(Error::io("list the devices of", pod))?;
    devices.retain(|device| device.is_up && device.index != LOOPBACK);
    let [inside] = devices.as_slice() else { return Err(Why::Devices(devices.len())) };
    if inside.kind != "veth" {
        return Err(Why::NotVeth(inside.kind.clone()));
    }
    let device =
        on_node(node, pod, inside).map_err(Error::io("look for the node's end of a device of", pod))?;
    let device = device.ok_or(Why::NotOnNode)?;
    attach(directory, program, node, device)?;
    Ok(Qualified {
        cookie: cookie(pod)?,
        device,
        inside: inside.index,
        netns: pod.clone(),
        exempts: captured.exempts(),
    })
}

/// The index of the node's end of a device, if there is one: each end has to say that the other one is it.
fn on_node(node: &Netns, pod: &Netns, inside: &Device) -> io::Result<Option<u32>> {
    let Some(peer) = inside.peer else { return Ok(None) };
    let all = devices(node)?;
    let Some(found) = all.iter().find(|device| device.index == peer) else { return Ok(None) };
    let leads_back = found.kind == "veth" && found.peer == Some(inside.index);
    // The kernel gave the pod's namespace a number when it listed the device.
    let is_pods = found.peer_netns.is_some() && found.peer_netns == number_of(node, pod)?;
    Ok((leads_back && is_pods && found.is_up).then_some(peer))
}

/// Takes the program off all ends on the node of a pod's devices.
pub(super) fn release_all(directory: &Path, node: &Netns, pod: &Netns) -> Result<(), Error> {
    let failed = || Error::io("look for the node's ends of the devices of", pod);
    for inside in devices(pod).map_err(failed())? {
        if let Some(device) = on_node(node, pod, &inside).map_err(failed())? {
            release(directory, device)?;
        }
    }
    Ok(())
}

/// Attaches the program to a device of the node's, if there is none but ours, and no queue: what goes straight into the other pod's
/// device passes by what comes after us where it came from, and all that is on the way out of the node's end of the other.
fn attach(directory: &Path, program: &OwnedFd, node: &Netns, device: u32) -> Result<(), Why> {
    let path = link(directory, device);
    let ours = sys::open(&path).ok().and_then(|link| is_attached(link.as_fd()));
    let is_ours = ours == Some(device);
    let failed = |action| Error::io(action, format!("device {device} of the node"));
    let programs = |kind| {
        let found = node.run(|| sys::programs_on(device, kind)).and_then(|found| found);
        found.map_err(failed("list the programs of"))
    };
    let ingress = programs(AttachType::TcxIngress)?.saturating_sub(u32::from(is_ours));
    if ingress > 0 || programs(AttachType::TcxEgress)? > 0 {
        return Err(Why::OthersPrograms);
    }
    match queue(node, device).map_err(failed("list the queues of"))? {
        // A place for filters of traffic control, of the kind before links.
        Some(kind) if kind == "clsact" || kind == "ingress" => return Err(Why::OthersPrograms),
        Some(kind) => return Err(Why::Queue(kind)),
        None => {}
    }
    if is_ours {
        return Ok(());
    }
    if path.exists() {
        fs::remove_file(&path).map_err(Error::io("remove", path.display()))?;
    }
    let made = node
        .run(|| sys::link_create(program.as_fd(), device, AttachType::TcxIngress))
        .and_then(|made| made)
        .map_err(failed("attach a program to"))?;
    sys::pin(made.as_fd(), &path).map_err(Error::io("pin", path.display()))?;
    Ok(())
}

pub(super) fn release(directory: &Path, device: u32) -> Result<(), Error> {
    let path = link(directory, device);
    // A link without a name is detached too, but in the kernel's own time.
    if let Ok(link) = sys::open(&path)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        tracing::debug!(link = %path.display(), %error, "the program is detached when its name is gone");
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path.display())(error))
        }
        _ => Ok(()),
    }
}

fn link(directory: &Path, device: u32) -> PathBuf {
    directory.join(format!("{DEVICE}{device}"))
}

/// The device that a link is attached to, unless it is gone.
pub(super) fn is_attached(link: BorrowedFd<'_>) -> Option<u32> {
    sys::link_info(link).ok().map(|info| info.target).filter(|target| *target != 0)
}

fn open(netns: &Netns) -> io::Result<Netlink> {
    Netlink::open(netns, SockProtocol::NetlinkRoute)
}

fn devices(netns: &Netns) -> io::Result<Vec<Device>> {
    let mut found = Vec::new();
    open(netns)?.dump(Message::new(RTM_GETLINK, 0).body(&[0; LINK]), |kind, payload| {
        if kind == RTM_NEWLINK {
            found.extend(Device::read(payload));
        }
    })?;
    Ok(found)
}

impl Device {
    /// An `ifinfomsg`: family, type, index, flags, change; then attributes.
    fn read(payload: &[u8]) -> Option<Self> {
        let number = |wanted| attribute(payload, LINK, wanted).and_then(|value| u32_at(value, 0));
        let info = attribute(payload, LINK, IFLA_LINKINFO).unwrap_or_default();
        let kind = attribute(info, 0, IFLA_INFO_KIND).unwrap_or_default();
        Some(Self {
            index: u32_at(payload, 4)?,
            is_up: u32_at(payload, 8)? & UP != 0,
            kind: String::from_utf8_lossy(kind).trim_end_matches('\0').to_owned(),
            peer: number(IFLA_LINK),
            peer_netns: number(IFLA_LINK_NETNSID),
        })
    }
}

/// How `netns` calls `other`.
fn number_of(netns: &Netns, other: &Netns) -> io::Result<Option<u32>> {
    let fd = u32::try_from(other.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let message = Message::new(RTM_GETNSID, 0).body(&[0; GENERIC]).attribute(NETNSA_FD, &fd.to_ne_bytes());
    let mut number = None;
    open(netns)?.get(message, |_, payload| {
        number = attribute(payload, GENERIC, NETNSA_NSID).and_then(|value| u32_at(value, 0));
    })?;
    // -1: it has none.
    Ok(number.filter(|number| *number != u32::MAX))
}

/// The kind of one of a device's queues that does something, if there is one.
fn queue(netns: &Netns, device: u32) -> io::Result<Option<String>> {
    let mut found = None;
    open(netns)?.dump(Message::new(RTM_GETQDISC, 0).body(&[0; QDISC]), |_, payload| {
        // A `tcmsg`: family and padding, index, handle, parent, info.
        let kind = attribute(payload, QDISC, TCA_KIND).unwrap_or_default();
        let kind = String::from_utf8_lossy(kind).trim_end_matches('\0').to_owned();
        if u32_at(payload, 4) == Some(device) && !["", "noqueue", "noop"].contains(&kind.as_str()) {
            found = Some(kind);
        }
    })?;
    Ok(found)
}

fn attribute(payload: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    attributes(payload.get(header..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}
