//! Asks a silent peer whether it is still there.
//!
//! ```text
//!            no frame for `interval`: PING
//!   Watching ────────────────────────────▶ Asked ── no PONG and no frame for `timeout` ──▶ dead
//!       ▲                                    │
//!       └────────────── PONG, or any frame ──┘
//! ```

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
    seen: u64,
    interval: Duration,
    timeout: Duration,
}

impl Keepalive {
    pub(crate) fn new(ping: PingPong, settings: &Transport) -> Self {
        let timer = Box::pin(sleep(settings.ping_interval));
        let (interval, timeout) = (settings.ping_interval, settings.ping_timeout);
        Self { ping, timer, asked: false, seen: 0, interval, timeout }
    }

    /// Ready when the peer is dead. `progress` changes with every frame from the peer.
    pub(crate) fn poll_dead(&mut self, cx: &mut Context<'_>, progress: u64) -> Poll<()> {
        if self.asked && self.ping.poll_pong(cx).is_ready() {
            // Answered, or the connection is gone, which its own task sees.
            self.watch(progress);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if progress != self.seen {
                self.watch(progress);
            } else if self.asked {
                return Poll::Ready(());
            } else {
                self.ask(cx);
            }
        }
        Poll::Pending
    }

    fn ask(&mut self, cx: &mut Context<'_>) {
        // The answer to an earlier PING may still lie there, if other frames came first; only one PING can be
        // under way. Another error means that the connection is ending.
        if self.ping.send_ping(Ping::opaque()).is_err() && self.ping.poll_pong(cx).is_ready() {
            let _ = self.ping.send_ping(Ping::opaque());
        }
        let _ = self.ping.poll_pong(cx);
        self.asked = true;
        self.timer.as_mut().reset(Instant::now() + self.timeout);
    }

    fn watch(&mut self, progress: u64) {
        self.asked = false;
        self.seen = progress;
        self.timer.as_mut().reset(Instant::now() + self.interval);
    }
}
