//! Whether a server of HTTP/2 takes WebSocket on its streams, which its first frame says (RFC 8441 section 3): known once that
//! has come.

use std::sync::{Mutex, PoisonError};
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
}

impl Offer {
    pub(crate) fn new(ping: Option<PingPong>) -> Self {
        Self { ping: Mutex::new(ping), known: CancellationToken::new() }
    }

    /// Whether it takes them; asked with a PING, once, where it has not said so yet. One that does not answer within `limit`
    /// does not.
    pub(crate) async fn is_made(&self, send: &SendRequest<Bytes>, limit: Duration) -> bool {
        if !send.is_extended_connect_protocol_enabled() {
            let ping = self.ping.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(mut ping) = ping {
                let known = self.known.clone().drop_guard();
                // Not given up with the request that asks first: others may wait for it.
                tokio::spawn(async move {
                    let _known = known;
                    // An error is the connection's end.
                    let _ = ping.ping(Ping::opaque()).await;
                });
            }
            let _ = timeout(limit, self.known.cancelled()).await;
        }
        send.is_extended_connect_protocol_enabled()
    }
}
