//! The programs of verdicts: loaded, and attached or put in the place of older ones.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::MapType;
use aya::programs::{CgroupSockAddr, Program, SchedClassifier, SockOps};
use aya::{Ebpf, EbpfLoader};
use nix::sys::statfs::statfs;

use super::device::{DEVICE, is_attached};
use crate::layout::{
    CONNECTIONS_LIMIT, Control, Dialled, ENDED_LIMIT, Neighbours, OFFERS_LIMIT, OfferEntry, PairKey, Record,
    TALLIES, VERDICTS_LIMIT, VerdictEntry,
};
use crate::pod::Shape;
use crate::sys::{self, AttachType};
use crate::{Error, objects};

/// `CGROUP2_SUPER_MAGIC` (kernel include/uapi/linux/magic.h).
const MAGIC: i64 = 0x6367_7270;
/// The machine's own cgroup namespace (kernel include/linux/proc_ns.h, `PROC_CGROUP_INIT_INO`).
const MACHINES_CGROUPS: &str = "cgroup:[4026531835]";

/// The maps as the programs declare them.
const MAPS: [Shape; 8] = [
    Shape("control", MapType::Array, 4, size_of::<Control>(), 1),
    Shape("verdicts", MapType::Hash, size_of::<PairKey>(), size_of::<VerdictEntry>(), VERDICTS_LIMIT),
    Shape("neighbours", MapType::Hash, size_of::<Neighbours>(), 4, VERDICTS_LIMIT),
    Shape("offers", MapType::Hash, size_of::<Dialled>(), size_of::<OfferEntry>(), OFFERS_LIMIT),
    Shape("connections", MapType::Hash, 8, size_of::<Record>(), CONNECTIONS_LIMIT),
    Shape("open", MapType::Array, 4, 8, 1),
    Shape("ended", MapType::Queue, 0, size_of::<Record>(), ENDED_LIMIT),
    Shape("tallies", MapType::PerCpuArray, 4, 8, TALLIES),
];

/// The programs at the root of the cgroups. The one that grants comes last: all that it needs is there by then.
pub(super) const AT_ROOT: [(&str, AttachType); 5] = [
    ("watch", AttachType::SockOps),
    ("peer_name4", AttachType::GetPeerName4),
    ("peer_name6", AttachType::GetPeerName6),
    ("connect4", AttachType::Connect4),
    ("connect6", AttachType::Connect6),
];

/// The root of the machine's cgroups: at `path`, or where systems have it that use both versions, or mounted nowhere.
pub(super) fn cgroup_root(path: &Path) -> Result<File, Error> {
    for path in [path.to_owned(), path.join("unified")] {
        // The root alone has no type.
        if is_cgroups(&path) && !path.join("cgroup.type").exists() {
            return File::open(&path).map_err(Error::io("open", path.display()));
        }
    }
    let failed =
        || Error::io("find", format!("the root of the machine's cgroups (version 2) at {}", path.display()));
    let ours = fs::read_link("/proc/thread-self/ns/cgroup").map_err(failed())?;
    if ours != Path::new(MACHINES_CGROUPS) {
        let why = io::Error::other("that is another one's, and so would be what is mounted here");
        return Err(failed()(why));
    }
    net::mounts::detached(c"cgroup2").map(File::from).map_err(failed())
}

fn is_cgroups(path: &Path) -> bool {
    // The type's width differs between machines.
    #[allow(clippy::unnecessary_cast, reason = "it is i64 on some machines")]
    statfs(path).is_ok_and(|found| found.filesystem_type().0 as i64 == MAGIC)
}

/// Loads the programs with the maps of `directory` and attaches them, but for that of devices: it takes the place of older ones,
/// and is returned.
pub(super) fn attach(directory: &Path, root: &File) -> Result<OwnedFd, Error> {
    if MAPS.iter().any(|shape| shape.is_other(directory)) {
        // Of another build. What they let by ends: nobody renews their lease, and their sockets are ended as strays.
        fs::remove_dir_all(directory).map_err(Error::io("remove", directory.display()))?;
        fs::create_dir_all(directory).map_err(Error::io("make", directory.display()))?;
    }
    let mut loaded = EbpfLoader::new()
        .default_map_pin_directory(directory)
        .load(objects::VERDICTS)
        .map_err(|error| Error::Load(Box::new(error)))?;
    let from_pod = device_program(&mut loaded)?;
    replace_on_devices(directory, from_pod.as_fd())?;
    let target = sys::descriptor(root.as_fd());
    let cgroup = root.metadata().map_err(Error::io("look at", "the root of the cgroups"))?.ino();
    for (name, kind) in AT_ROOT {
        let program = root_program(&mut loaded, name)?;
        let path = directory.join(format!("link-{name}"));
        if let Ok(link) = sys::open(&path) {
            if sys::link_cgroup(link.as_fd()).is_ok_and(|id| id == cgroup) {
                sys::link_update(link.as_fd(), program)
                    .map_err(Error::io("replace the program of", path.display()))?;
                continue;
            }
            fs::remove_file(&path).map_err(Error::io("remove", path.display()))?;
        }
        let link = sys::link_create(program, target, kind).map_err(Error::io("attach", name))?;
        sys::pin(link.as_fd(), &path).map_err(Error::io("pin", path.display()))?;
    }
    Ok(from_pod)
}

/// Puts the program in the place of those that devices have.
fn replace_on_devices(directory: &Path, program: BorrowedFd<'_>) -> Result<(), Error> {
    let entries = fs::read_dir(directory).map_err(Error::io("list", directory.display()))?;
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| is_of_device(path)) {
        let link = sys::open(&path).map_err(Error::io("open", path.display()))?;
        if is_attached(link.as_fd()).is_some() {
            sys::link_update(link.as_fd(), program)
                .map_err(Error::io("replace the program of", path.display()))?;
        } else {
            fs::remove_file(&path).map_err(Error::io("remove", path.display()))?;
        }
    }
    Ok(())
}

/// Whether all programs at the root of the cgroups are there.
pub(super) fn stand(directory: &Path) -> bool {
    let attached = |(name, _): &(&str, AttachType)| {
        sys::open(&directory.join(format!("link-{name}")))
            .is_ok_and(|link| sys::link_cgroup(link.as_fd()).is_ok_and(|cgroup| cgroup != 0))
    };
    AT_ROOT.iter().all(attached)
}

/// Whether the maps are as these programs declare them.
pub(super) fn fit(directory: &Path) -> bool {
    MAPS.iter().all(|shape| directory.join(shape.0).exists() && !shape.is_other(directory))
}

/// Removes the names of programs whose devices are gone.
pub(super) fn sweep_devices(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries.filter(|path| is_of_device(path)) {
        let is_gone = sys::open(&path).is_ok_and(|link| is_attached(link.as_fd()).is_none());
        if is_gone && let Err(error) = fs::remove_file(&path) {
            tracing::warn!(link = %path.display(), %error, "what a device that is gone left can't be removed");
        }
    }
}

/// Whether the program of a device is there that is not gone.
pub(super) fn has_devices(directory: &Path) -> bool {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let attached = |path: PathBuf| sys::open(&path).is_ok_and(|link| is_attached(link.as_fd()).is_some());
    entries.filter(|path| is_of_device(path)).any(attached)
}

pub(super) fn is_of_device(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(DEVICE))
}

fn device_program(loaded: &mut Ebpf) -> Result<OwnedFd, Error> {
    const NAME: &str = "from_pod";
    let program: &mut SchedClassifier = find(loaded, NAME)?.try_into().map_err(Error::program(NAME))?;
    crate::load(NAME, || program.load())?;
    let fd = program.fd().map_err(Error::program(NAME))?;
    fd.as_fd().try_clone_to_owned().map_err(Error::io("keep", NAME))
}

fn root_program<'a>(loaded: &'a mut Ebpf, name: &'static str) -> Result<BorrowedFd<'a>, Error> {
    let fd = match find(loaded, name)? {
        Program::SockOps(program) => {
            let program: &mut SockOps = program;
            crate::load(name, || program.load())?;
            program.fd()
        }
        other => {
            let program: &mut CgroupSockAddr = other.try_into().map_err(Error::program(name))?;
            crate::load(name, || program.load())?;
            program.fd()
        }
    };
    Ok(fd.map_err(Error::program(name))?.as_fd())
}

fn find<'a>(loaded: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, Error> {
    let absent = || Error::program(name)(aya::programs::ProgramError::UnexpectedProgramType);
    loaded.program_mut(name).ok_or_else(absent)
}
