//! A host that serves HBONE and sends back what comes through each tunnel.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hbone::{Control, Incoming, ServerCounters, ServerSettings, TunnelHeaders, serve};
use tokio::io::{AsyncWriteExt, copy, split};
use tokio::time::timeout;
use turmoil::net::{TcpListener, TcpStream};

use crate::channel::{Credentials, Peer};
use crate::log::Log;

/// The port that all servers listen on.
pub const PORT: u16 = 15008;

/// A connection that is served, with its peer.
type Served = (Control, Peer);

/// What a server is and does; outside of the simulation it is a handle to it.
#[derive(Clone)]
pub struct Server {
    /// Its host's name.
    pub name: String,
    /// Who it is and whom it trusts.
    pub credentials: Credentials,
    /// Sizes, limits and time limits.
    pub settings: ServerSettings,
    /// What it has done.
    pub counters: Arc<ServerCounters>,
    served: Arc<Mutex<Vec<Served>>>,
    draining: Arc<Mutex<Option<Duration>>>,
    log: Log,
}

impl Server {
    /// A server on the host `name`, vouched for by root 1.
    #[must_use]
    pub fn new(name: &str, settings: ServerSettings, log: &Log) -> Self {
        Self {
            name: name.into(),
            credentials: Credentials::new(name, 1),
            settings,
            counters: Arc::default(),
            served: Arc::default(),
            draining: Arc::default(),
            log: log.clone(),
        }
    }

    /// Ends all connections in good order, and those that come within a moment too.
    pub fn drain(&self, patience: Duration) {
        self.log.note(format_args!("{} drains", self.name));
        *self.draining.lock().unwrap_or_else(PoisonError::into_inner) = Some(patience);
        self.controls(|_| true).iter().for_each(|control| control.drain(patience));
    }

    /// Serves as before.
    pub fn resume(&self) {
        *self.draining.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Ends the connections of peers that are not trusted any more; how many those were.
    pub fn cut_untrusted(&self) -> usize {
        let cut = self.controls(|peer| !self.credentials.trusts(peer));
        cut.iter().for_each(Control::abort);
        cut.len()
    }

    fn controls(&self, of: impl Fn(&Peer) -> bool) -> Vec<Control> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.iter().filter(|(_, peer)| of(peer)).map(|(control, _)| control.clone()).collect()
    }

    async fn connection(self, mut io: TcpStream) {
        // Whoever connects and says nothing must not stay.
        let peer = match timeout(Duration::from_secs(10), self.credentials.accept(&mut io)).await {
            Ok(Ok(peer)) => peer,
            Ok(Err(error)) => return self.log.note(format_args!("{} refused a peer: {error}", self.name)),
            Err(_) => return self.log.note(format_args!("{} waited for a greeting in vain", self.name)),
        };
        let control = Control::default();
        if let Some(patience) = *self.draining.lock().unwrap_or_else(PoisonError::into_inner) {
            control.drain(patience);
        }
        self.served.lock().unwrap_or_else(PoisonError::into_inner).push((control.clone(), peer.clone()));
        let closed = serve(io, &self.settings, &control, &self.counters, echo).await;
        self.log.note(format_args!("{} served {} (root {}): {closed}", self.name, peer.name, peer.root));
    }
}

fn echo(incoming: Incoming) {
    tokio::spawn(async move {
        let Ok(tunnel) = incoming.accept(&TunnelHeaders::default()) else { return };
        let (mut read, mut write) = split(tunnel);
        if copy(&mut read, &mut write).await.is_ok() {
            let _ = write.shutdown().await;
        }
    });
}

/// Runs `server` on its host; for [`turmoil::Sim::host`].
///
/// # Errors
/// The port is taken.
pub async fn serve_host(server: Server) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    loop {
        let (io, _) = listener.accept().await?;
        tokio::spawn(server.clone().connection(io));
    }
}
