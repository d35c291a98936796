//! The few commands of bpf(2) that aya has no safe way to: links and pins by descriptor.
//!
//! Layouts are those of `union bpf_attr` and `struct bpf_link_info` in kernel include/uapi/linux/bpf.h.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_QUERY: libc::c_long = 16;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AttachType {
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    GetPeerName4 = 29,
    GetPeerName6 = 30,
    SkLookup = 36,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// Words of the union that our commands use; the rest is zero to the kernel.
type Attributes = [u32; 8];

/// What a link is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinkInfo {
    /// The interface's index, or the namespace's inode; zero when it is gone.
    pub(crate) target: u32,
    /// `enum bpf_attach_type`.
    pub(crate) attach_type: u32,
}

/// Attaches the program `program` to an interface of the thread's namespace, or to a namespace or a cgroup by its descriptor.
/// Those that others have there stay.
pub(crate) fn link_create(program: BorrowedFd<'_>, target: u32, kind: AttachType) -> io::Result<OwnedFd> {
    let fd = call(LINK_CREATE, &mut [word(program.as_raw_fd()), target, kind as u32, 0, 0, 0, 0, 0])?;
    Ok(own(fd))
}

/// Replaces the program of a link, at once.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    call(LINK_UPDATE, &mut [word(link.as_raw_fd()), word(program.as_raw_fd()), 0, 0, 0, 0, 0, 0]).map(drop)
}

/// Detaches the program of a link, at once.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    call(LINK_DETACH, &mut [word(link.as_raw_fd()), 0, 0, 0, 0, 0, 0, 0]).map(drop)
}

/// What a link is attached to.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info = link_words(link)?;
    Ok(LinkInfo { target: info[4], attach_type: info[5] })
}

/// The number of the cgroup that a link is attached to.
pub(crate) fn link_cgroup(link: BorrowedFd<'_>) -> io::Result<u64> {
    let info = link_words(link)?;
    Ok(u64::from(info[4]) | u64::from(info[5]) << 32)
}

/// `struct bpf_link_info`: type, id, program, padding, then the kind's own words.
fn link_words(link: BorrowedFd<'_>) -> io::Result<[u32; 16]> {
    let mut info = [0_u32; 16];
    let [low, high] = address(info.as_mut_ptr().expose_provenance());
    let size = u32::try_from(size_of_val(&info)).unwrap_or(0);
    call(OBJ_GET_INFO_BY_FD, &mut [word(link.as_raw_fd()), size, low, high, 0, 0, 0, 0])?;
    Ok(info)
}

/// How many programs an interface of the thread's namespace has.
pub(crate) fn programs_on(interface: u32, kind: AttachType) -> io::Result<u32> {
    // Without room for their numbers the kernel says how many there are.
    let mut attributes = [interface, kind as u32, 0, 0, 0, 0, 0, 0];
    match call(PROG_QUERY, &mut attributes) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(0),
        Err(error) => Err(error),
        Ok(_) => Ok(attributes[6]),
    }
}

/// Keeps an object in a bpf file system under a name.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = address(path.as_ptr().expose_provenance());
    call(OBJ_PIN, &mut [low, high, word(object.as_raw_fd()), 0, 0, 0, 0, 0]).map(drop)
}

/// Opens an object by its name.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = address(path.as_ptr().expose_provenance());
    call(OBJ_GET, &mut [low, high, 0, 0, 0, 0, 0, 0]).map(own)
}

/// What tells the thread's network namespace from all others since the machine started (`SO_NETNS_COOKIE`).
#[expect(unsafe_code, reason = "no safe wrapper has this option")]
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let (mut cookie, mut size) = (0_u64, libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0));
    // SAFETY: the descriptor is open; the kernel writes as many bytes as `size` says, which `cookie` has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// The target for a namespace in [`link_create`].
pub(crate) fn descriptor(fd: BorrowedFd<'_>) -> u32 {
    word(fd.as_raw_fd())
}

fn word(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// A pointer, whose provenance is exposed, as two words of the union, low before high.
fn address(pointer: usize) -> [u32; 2] {
    let pointer = (pointer as u64).to_le_bytes();
    let [a, b, c, d, e, f, g, h] = pointer;
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

#[expect(unsafe_code, reason = "no safe wrapper of bpf(2) exists")]
fn call(command: libc::c_long, attributes: &mut Attributes) -> io::Result<RawFd> {
    // SAFETY: the kernel reads and writes the union, whose size is said. Pointers in it are to a path that is terminated
    // and to an array whose size is in the union too; both belong to the callers above and outlive the call. They are made
    // of integers there: the callers exposed their provenance, and the pointer to the array may be written through.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of::<Attributes>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        RawFd::try_from(result).map_err(io::Error::other)
    }
}

#[expect(unsafe_code, reason = "the kernel's answer is a number")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
