//! A switch of protocols: from the answer that makes it both sides carry bytes. Either side may be a connection of HTTP/1.1
//! (RFC 9110 section 7.8) or, for WebSocket, a stream of HTTP/2 (RFC 8441).

use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine as _;

use super::Exchange;
use crate::http::channel::Channel;
use crate::http::decide::{Flag, Protocol, Target};
use crate::http::failure::{Class, Failure};
use crate::http::h1::Framing;
use crate::http::h2_heads::WEBSOCKET;
use crate::http::head::{Fields, Known, RequestHead};
use crate::http::limit::Limit;
use crate::http::pump::Pump;
use crate::upstream::pool::{Lease, Pool, PoolError};

impl Exchange<'_> {
    /// Whether what the client asks for can be asked of a server of HTTP/2, where a stream carries nothing before the switch.
    fn asks_for_websocket(&self, method: &str) -> bool {
        let asked = self.hop.upgrade.as_deref();
        asked.is_some_and(|asked| asked.eq_ignore_ascii_case(WEBSOCKET.as_bytes()))
            && self.framing == Framing::None
            && method == "GET"
    }

    /// A way to `target` for `request`.
    pub(super) fn way<'a>(
        &self,
        pool: &'a Pool,
        target: &'a Arc<Target>,
        request: &'a RequestHead,
        fresh: bool,
    ) -> impl Future<Output = Result<Lease, PoolError>> + use<'a> {
        let (framing, asks) = (self.framing, self.asks_for_websocket(request.method()));
        async move {
            if asks && target.protocol == Protocol::Http2 {
                match pool.websocket(target, request).await {
                    // Of HTTP/1.1 it is a request that may be answered without a switch.
                    Err(PoolError::NoSwitch) if !request.extended => {}
                    way => return way,
                }
            }
            pool.get(target, request, framing, fresh).await
        }
    }

    /// Whether the endpoint switches to the protocol that it was asked for.
    pub(super) fn is_asked_for(&self) -> bool {
        let Some(asked) = &self.hop.upgrade else { return false };
        let mut chosen = self.reply.fields.members(Known::Upgrade);
        chosen.next().is_some_and(|chosen| chosen.eq_ignore_ascii_case(asked)) && chosen.next().is_none()
    }

    /// Takes a stream's success for the switch that it is; any other one is none, which a client of HTTP/2 could not tell.
    pub(super) fn take_switch(&mut self, lease: &Lease) -> Result<(), Failure> {
        if !matches!(self.reply.status, 200..=299) {
            return Ok(());
        }
        if lease.switches {
            self.reply.status = 101;
        } else if self.request.extended {
            self.reply.clear();
            return Err(Failure::NO_SWITCH);
        }
        Ok(())
    }

    /// Passes the switch on.
    pub(super) fn switch(&mut self, lease: &mut Lease) {
        let protocol = self.hop.upgrade.take().unwrap_or_default();
        match &mut *self.client {
            Channel::H1(client) => {
                self.reply.fields.push(b"connection", b"upgrade");
                self.reply.fields.push(b"upgrade", &protocol);
                if lease.switches {
                    accept(&self.request.fields, &mut self.reply.fields);
                }
                self.reply.write(client.head_output());
                client.end_head(Framing::None, false, false);
                client.switch();
            }
            client @ Channel::H2(_) => {
                self.reply.status = 200;
                self.reply.fields.remove(b"sec-websocket-accept");
                // That the stream is gone shows when it is read.
                let _ = client.send_response(&self.reply, Framing::Chunked, false, false, false);
            }
        }
        if let Channel::H1(server) = &mut lease.channel {
            server.switch();
        }
        self.upload = Pump::new(false);
        // They were for a response, and there is none that could end.
        (self.whole, self.this_try) = (Limit::default(), Limit::default());
    }

    /// Ready when a side that has ended its half, so that nothing more is read of it, has given up the other one too. Of
    /// HTTP/1.1 the end of a connection is that of a half.
    pub(super) fn poll_reset(
        &mut self,
        cx: &mut Context<'_>,
        lease: &mut Lease,
        download: &Pump,
    ) -> Poll<Failure> {
        if matches!(self.client, Channel::H2(_)) && self.poll_gone(cx).is_ready() {
            return Poll::Ready(Failure::CLIENT_GONE);
        }
        if download.is_read()
            && !self.upload.done
            && matches!(lease.channel, Channel::H2(_))
            && lease.channel.poll_gone(cx).is_ready()
        {
            let detail = "upstream_reset_after_response_started";
            return Poll::Ready(Failure::new(503, Flag::UpstreamRemoteReset, detail, Class::Final));
        }
        Poll::Pending
    }
}

/// What a server of HTTP/1.1 shows that it has understood (RFC 6455 section 4.2.2); one of HTTP/2 says it by its success.
fn accept(request: &Fields, reply: &mut Fields) {
    let Some(key) = request.values(b"sec-websocket-key").next() else { return };
    let whole = [key.trim_ascii(), b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &whole);
    let value = base64::engine::general_purpose::STANDARD.encode(hash.as_ref());
    reply.set(b"sec-websocket-accept", value.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::{Fields, accept};

    #[test]
    fn a_key_is_accepted_as_the_specification_says() {
        // Its example (RFC 6455 section 1.3).
        let (mut request, mut reply) = (Fields::default(), Fields::default());
        request.push(b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ==");
        reply.push(b"sec-websocket-accept", b"of somebody else");
        accept(&request, &mut reply);
        let said: Vec<_> = reply.values(b"sec-websocket-accept").collect();
        assert_eq!(said, [b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]);
    }
}
