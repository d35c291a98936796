//! File systems of this process's own, mounted nowhere.
//!
//! No mount of the process is touched, and nobody else sees them; they end with their descriptor.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `FSCONFIG_CMD_CREATE` (kernel include/uapi/linux/mount.h).
const CREATE: usize = 6;
/// `MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC`.
const ATTRIBUTES: usize = 0x2 | 0x4 | 0x8;
/// `FSOPEN_CLOEXEC` and `FSMOUNT_CLOEXEC`.
const CLOEXEC: usize = 1;

/// The root of a new file system of a kind, such as `proc`: for paths below it, or below `/proc/self/fd/NUMBER`.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`, `ENODEV` where the kernel has no such kind, `ENOSYS` before Linux 5.2.
pub fn detached(kind: &'static CStr) -> io::Result<OwnedFd> {
    let context = own(call(libc::SYS_fsopen, [kind.as_ptr().expose_provenance(), CLOEXEC, 0, 0, 0])?);
    let number = usize::try_from(context.as_raw_fd()).map_err(io::Error::other)?;
    call(libc::SYS_fsconfig, [number, CREATE, 0, 0, 0])?;
    Ok(own(call(libc::SYS_fsmount, [number, CLOEXEC, ATTRIBUTES, 0, 0])?))
}

#[expect(unsafe_code, reason = "no safe wrapper of fsopen(2), fsconfig(2) and fsmount(2) exists")]
fn call(number: libc::c_long, arguments: [usize; 5]) -> io::Result<libc::c_int> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the caller above passes descriptors that are open, flags, and one pointer, to a terminated string that lives for
    // ever, whose provenance is exposed. Of the other arguments, null is what the commands ask for.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}

#[expect(unsafe_code, reason = "the kernel's answer is a number")]
fn own(fd: libc::c_int) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
