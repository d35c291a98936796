//! Whether a server of HTTP/2 takes WebSocket on its streams, which its first frame says (RFC 8441 section 3): known once that
//! has come.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// What a server says.
pub(crate) struct Offer {
    /// Until it is used: the answer comes after the server's first frame.
    ping: Mutex<Option<PingPong>>,
    known: CancellationToken,
    /// The connection has ended before it was known.
    ended: Arc<AtomicBool>,
}

/// Why it is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unknown {
    /// The connection has ended.
    Ended,
    /// The server says nothing.
    Silent,
}

impl Offer {
    pub(crate) fn new(ping: Option<PingPong>) -> Self {
        Self { ping: Mutex::new(ping), known: CancellationToken::new(), ended: Arc::default() }
    }

    /// Whether it takes them; asked with a PING, once, where it has not said so yet.
    ///
    /// # Errors
    /// The connection ends before that is known, or it is not known within `limit`.
    pub(crate) async fn is_made(&self, send: &SendRequest<Bytes>, limit: Duration) -> Result<bool, Unknown> {
        if !send.is_extended_connect_protocol_enabled() {
            let ping = self.ping.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(mut ping) = ping {
                let (known, ended) = (self.known.clone().drop_guard(), Arc::clone(&self.ended));
                // Not given up with the request that asks first: others may wait for it.
                tokio::spawn(async move {
                    let _known = known;
                    // An error is the connection's end.
                    ended.store(ping.ping(Ping::opaque()).await.is_err(), Relaxed);
                });
            }
            timeout(limit, self.known.cancelled()).await.map_err(|_| Unknown::Silent)?;
        }
        let made = send.is_extended_connect_protocol_enabled();
        if !made && self.ended.load(Relaxed) { Err(Unknown::Ended) } else { Ok(made) }
    }
}
