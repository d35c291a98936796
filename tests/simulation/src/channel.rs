//! The stand-in for mutual TLS: both sides say who they are and which root vouches for them, and check the other.
//!
//! ```text
//!   client ── length, "name root" ──▶ server      each side then hears the other's verdict: one byte, 1 for yes
//!   client ◀── length, "name root" ── server
//! ```

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use turmoil::net::TcpStream;

/// Who a node is, and whom it trusts. May change while connections live, as certificates and bundles do.
#[derive(Clone, Debug)]
pub struct Credentials(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
struct State {
    name: String,
    signed_by: u32,
    trusted: BTreeSet<u32>,
}

/// What the other side has proved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// The root that vouches for it.
    pub root: u32,
}

/// Why no secured connection came about.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// The network failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer is another one than was dialled.
    #[error("the peer is {0}, expected {1}")]
    Name(String, String),
    /// We don't trust the peer's root.
    #[error("the root {0} of the peer is not trusted")]
    Root(u32),
    /// The peer doesn't trust ours.
    #[error("the peer refused us")]
    Refused,
    /// What the peer said is no greeting.
    #[error("no greeting")]
    Garbage,
}

impl Credentials {
    /// A node of this name, vouched for by `root` and trusting it.
    #[must_use]
    pub fn new(name: &str, root: u32) -> Self {
        let state = State { name: name.into(), signed_by: root, trusted: BTreeSet::from([root]) };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Trusts exactly these roots from now on.
    pub fn trust(&self, roots: &[u32]) {
        self.state().trusted = roots.iter().copied().collect();
    }

    /// Has a certificate of `root` from now on.
    pub fn sign_by(&self, root: u32) {
        self.state().signed_by = root;
    }

    /// Whether a peer is trusted now.
    #[must_use]
    pub fn trusts(&self, peer: &Peer) -> bool {
        self.state().trusted.contains(&peer.root)
    }

    /// The client's side; `expected` is the name that the peer must prove.
    ///
    /// # Errors
    /// See [`Untrusted`].
    pub async fn connect(&self, io: &mut TcpStream, expected: &str) -> Result<Peer, Untrusted> {
        self.greet(io).await?;
        let peer = hear(io).await?;
        let verdict = if peer.name == expected {
            self.judge(&peer)
        } else {
            Err(Untrusted::Name(peer.name.clone(), expected.into()))
        };
        io.write_u8(u8::from(verdict.is_ok())).await?;
        verdict?;
        if io.read_u8().await? == 1 { Ok(peer) } else { Err(Untrusted::Refused) }
    }

    /// The server's side.
    ///
    /// # Errors
    /// See [`Untrusted`].
    pub async fn accept(&self, io: &mut TcpStream) -> Result<Peer, Untrusted> {
        let peer = hear(io).await?;
        self.greet(io).await?;
        let verdict = self.judge(&peer);
        io.write_u8(u8::from(verdict.is_ok())).await?;
        verdict?;
        if io.read_u8().await? == 1 { Ok(peer) } else { Err(Untrusted::Refused) }
    }

    fn judge(&self, peer: &Peer) -> Result<(), Untrusted> {
        if self.trusts(peer) { Ok(()) } else { Err(Untrusted::Root(peer.root)) }
    }

    async fn greet(&self, io: &mut TcpStream) -> io::Result<()> {
        let text = {
            let state = self.state();
            format!("{} {}", state.name, state.signed_by)
        };
        let length = u8::try_from(text.len()).map_err(io::Error::other)?;
        io.write_all(&[&[length], text.as_bytes()].concat()).await
    }
}

async fn hear(io: &mut TcpStream) -> Result<Peer, Untrusted> {
    let mut text = vec![0; usize::from(io.read_u8().await?)];
    io.read_exact(&mut text).await?;
    let text = String::from_utf8(text).map_err(|_| Untrusted::Garbage)?;
    let (name, root) = text.split_once(' ').ok_or(Untrusted::Garbage)?;
    Ok(Peer { name: name.into(), root: root.parse().map_err(|_| Untrusted::Garbage)? })
}
