//! Asks a silent peer whether it is still there.
//!
//! ```text
//!            no frame for `interval`: PING
//!   Watching ────────────────────────────▶ Asked ── no PONG and no frame for `timeout` ──▶ dead
//!       ▲                                    │
//!       └────────────── PONG, or any frame ──┘
//! ```
//!
//! The timer is not set anew with every frame: when it runs out, it is set to what is left.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

use crate::settings::Transport;

pub(crate) struct Keepalive {
    ping: PingPong,
    timer: Pin<Box<Sleep>>,
    asked: bool,
    /// The progress seen last, and when it was new.
    seen: u64,
    seen_at: Instant,
    interval: Duration,
    timeout: Duration,
}

impl Keepalive {
    pub(crate) fn new(ping: PingPong, settings: &Transport) -> Self {
        let timer = Box::pin(sleep(settings.ping_interval));
        let (interval, timeout) = (settings.ping_interval, settings.ping_timeout);
        Self { ping, timer, asked: false, seen: 0, seen_at: Instant::now(), interval, timeout }
    }

    /// Ready when the peer is dead. `progress` changes with every frame from the peer.
    pub(crate) fn poll_dead(&mut self, cx: &mut Context<'_>, progress: u64) -> Poll<()> {
        if progress != self.seen {
            (self.seen, self.seen_at, self.asked) = (progress, Instant::now(), false);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if self.asked {
                return Poll::Ready(());
            }
            let next = self.seen_at + self.interval;
            if next > Instant::now() {
                self.timer.as_mut().reset(next);
            } else {
                self.ask(cx);
            }
        }
        Poll::Pending
    }

    fn ask(&mut self, cx: &mut Context<'_>) {
        // The answer to the PING before lies there still, since only the frame that carries it was noted; only one
        // PING can be under way. Another error means that the connection is ending.
        if self.ping.send_ping(Ping::opaque()).is_err() && self.ping.poll_pong(cx).is_ready() {
            let _ = self.ping.send_ping(Ping::opaque());
        }
        self.asked = true;
        self.timer.as_mut().reset(Instant::now() + self.timeout);
    }
}
