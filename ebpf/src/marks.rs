//! Marks on the connections of a namespace, set from outside of the processes that have them.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use aya::maps::HashMap;
use aya::programs::Iter;
use aya::{Ebpf, EbpfLoader};
use net::Netns;

use crate::layout::Connection;
use crate::{Error, objects};

const PROGRAM: &str = "mark_connections";

/// The program, once it is loaded: that takes longer than to run it. One runs at a time, since it has one list.
static LOADED: Mutex<Option<Ebpf>> = Mutex::new(None);

/// Sets our bits of the mark of each of the listed connections of `netns`; local end first. Those that are gone are none. What a
/// connection sends next takes the routes of its mark.
///
/// # Errors
/// The kernel has no type information, or no iterator over sockets that may set options (since 5.15).
pub fn mark(netns: &Netns, connections: &[(SocketAddr, SocketAddr, u32)]) -> Result<(), Error> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = match &mut *loaded {
        Some(loaded) => loaded,
        none => none.insert(load()?),
    };
    if connections.is_empty() {
        return Ok(());
    }
    list(loaded, connections)?;
    let program = program(loaded)?;
    let id = program.attach().map_err(Error::program(PROGRAM))?;
    let link = program.take_link(id).map_err(Error::program(PROGRAM))?;
    // An iterator is of the namespace in which it is opened.
    let outcome = netns
        .run(|| {
            let mut file = link.into_file().map_err(io::Error::other)?;
            let mut nothing = Vec::new();
            file.read_to_end(&mut nothing).map(drop)
        })
        .and_then(|read| read);
    outcome.map_err(Error::io("mark the connections of", netns))
}

fn load() -> Result<Ebpf, Error> {
    // A loader reads the type information itself, tens of megabytes: it goes before that is read for the iterator.
    let mut loaded = EbpfLoader::new().load(objects::MARKS).map_err(|error| Error::Load(Box::new(error)))?;
    let btf = aya::Btf::from_sys_fs().map_err(|error| Error::Types(Box::new(error)))?;
    let marks = program(&mut loaded)?;
    crate::load(PROGRAM, || marks.load("tcp", &btf))?;
    drop(btf);
    net::release_free();
    Ok(loaded)
}

fn program(loaded: &mut Ebpf) -> Result<&mut Iter, Error> {
    let absent = || Error::program(PROGRAM)(aya::programs::ProgramError::UnexpectedProgramType);
    loaded.program_mut(PROGRAM).ok_or_else(absent)?.try_into().map_err(Error::program(PROGRAM))
}

/// Makes the program's list this one.
fn list(loaded: &mut Ebpf, connections: &[(SocketAddr, SocketAddr, u32)]) -> Result<(), Error> {
    let Some(map) = loaded.map_mut("marks") else { return Ok(()) };
    let mut marks: HashMap<_, Connection, u32> =
        HashMap::try_from(map).map_err(Error::map("open", "marks"))?;
    let old: Vec<Connection> = marks.keys().flatten().collect();
    for key in old {
        marks.remove(&key).map_err(Error::map("write", "marks"))?;
    }
    for (local, peer, mark) in connections {
        marks.insert(Connection::new(*local, *peer), mark, 0).map_err(Error::map("write", "marks"))?;
    }
    Ok(())
}
