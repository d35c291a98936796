//! Connections that this process did not carry, entered as if it had: in the registry, the metrics and the access log.
//!
//! The kernel counts, at each of a connection's two sockets: the client's is the source's view, the server's the destination's.
//! Of most it is heard once, at the end; those that live longer are found open when somebody looks, and every few seconds.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use process::metrics::tcp::TcpHandle;
use process::shutdown::Hold;
use telemetry::Meter;

use super::kernel::{Pair, Passed, Side};
use crate::connections::{Ended, Entered, Story, now_ms};
use crate::proxy::Proxy;
use crate::proxy::failure::Failure;

/// Open sockets that are entered; more are entered when they have ended.
const ENTERED: usize = 65_536;
/// Of a connection that was led to an application, and never came about.
const NOT_TAKEN: &str = "the application did not take the connection";
/// Looks that an open one is not found at before it is taken for ended: what is told of its end may be under way.
const LOOKS: u8 = 2;

/// What is told of all connections that take one way.
pub struct Stories {
    /// The source's view.
    pub outbound: Story,
    /// The destination's.
    pub inbound: Story,
    handles: [TcpHandle; 2],
}

impl Stories {
    /// Those views, with their metrics.
    pub fn new(proxy: &Proxy, outbound: Story, inbound: Story) -> Self {
        let handles = [&outbound, &inbound].map(|s| proxy.metrics.connection(&crate::telemetry::labels(s)));
        Self { outbound, inbound, handles }
    }

    /// The view of one socket, and its metrics.
    fn of(&self, proxy: &Proxy, passed: &Passed, now: Duration) -> (Story, TcpHandle) {
        let [source, destination] = &self.handles;
        let (view, handle) = match passed.side {
            Side::Source(_) => (&self.outbound, source),
            Side::Destination => (&self.inbound, destination),
        };
        let age = now.saturating_sub(passed.opened).as_millis();
        let story = Story {
            id: proxy.registry.next_id(),
            opened_ms: now_ms().saturating_sub(u64::try_from(age).unwrap_or(0)),
            source: SocketAddr::new(passed.pair.source, passed.source_port),
            ..view.clone()
        };
        (story, handle.clone())
    }
}

struct Entry {
    pair: Pair,
    opened: Duration,
    view: Entered,
    missed: u8,
    /// As one that is carried, it may go on while the process drains.
    _hold: Hold,
}

impl Entry {
    fn count(&self, passed: &Passed) {
        self.view.open.bytes.to_server.store(passed.sent, Ordering::Relaxed);
        self.view.open.bytes.to_client.store(passed.received, Ordering::Relaxed);
    }

    /// It has ended.
    fn over(mut self, proxy: &Proxy, duration: Duration, error: Option<&str>) {
        if let Some(error) = error {
            self.view.failed(error.to_owned());
        }
        let error = self.view.error().map(str::to_owned);
        proxy.log(&self.view.open, duration, error.as_ref());
    }
}

/// The open ones.
#[derive(Default)]
pub struct Records {
    open: HashMap<u64, Entry>,
    passed: u64,
    untold: u64,
}

/// What is told of a connection.
pub type Told<'a> = &'a mut dyn FnMut(&Passed) -> Option<Arc<Stories>>;

impl Records {
    /// Open sockets that are entered, sockets that have ended, and those of them of whose way nothing was known any more.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.open.len() as u64, self.passed, self.untold)
    }

    /// The pairs of which something is open.
    pub fn pairs(&self) -> HashSet<Pair> {
        self.open.values().map(|entry| entry.pair).collect()
    }

    /// Notes what is open, all of it.
    pub fn found(&mut self, proxy: &Proxy, now: Duration, open: &[Passed], told: Told<'_>) {
        for entry in self.open.values_mut() {
            entry.missed += 1;
        }
        for passed in open.iter().filter(|passed| passed.established) {
            if let Some(entry) = self.open.get_mut(&passed.socket) {
                entry.missed = 0;
                entry.count(passed);
                continue;
            }
            let stories = if self.open.len() < ENTERED { told(passed) } else { None };
            let Some(stories) = stories else { continue };
            let (story, handle) = stories.of(proxy, passed, now);
            let view = proxy.registry.enter(story, Meter::open(handle), Box::new(|| None), None);
            let (pair, opened, hold) = (passed.pair, passed.opened, proxy.shutdown.hold());
            let entry = Entry { pair, opened, view, missed: 0, _hold: hold };
            entry.count(passed);
            self.open.insert(passed.socket, entry);
        }
        for (_, entry) in self.open.extract_if(|_, entry| entry.missed > LOOKS) {
            let duration = now.saturating_sub(entry.opened);
            entry.over(proxy, duration, Some("its end was not heard of"));
        }
    }

    /// Notes why what is open of pairs comes to its end. Returns how many that are.
    pub fn cut(&mut self, over: &HashMap<Pair, &str>) -> u64 {
        let mut cut = 0;
        for entry in self.open.values_mut() {
            let Some(reason) = over.get(&entry.pair) else { continue };
            entry.view.failed(format!("cut: {reason}"));
            cut += 1;
        }
        cut
    }

    /// Notes what has ended.
    pub fn ended(&mut self, proxy: &Proxy, now: Duration, ended: &[Passed], told: Told<'_>) {
        for passed in ended {
            self.passed += 1;
            let duration = passed.closed.unwrap_or(now).saturating_sub(passed.opened);
            if let Some(entry) = self.open.remove(&passed.socket) {
                entry.count(passed);
                entry.over(proxy, duration, None);
            } else if let Some(stories) = told(passed) {
                if !passed.established {
                    let (story, _) = stories.of(proxy, passed, now);
                    let (to, reason) = (passed.pair.to, NOT_TAKEN.to_owned());
                    proxy.refused(story, &Failure::Connect { to, reason });
                    continue;
                }
                whole(proxy, &stories, passed, (now, duration));
            } else {
                self.untold += 1;
            }
        }
    }
}

/// A connection that is heard of when it has ended.
fn whole(proxy: &Proxy, stories: &Stories, passed: &Passed, (now, duration): (Duration, Duration)) {
    let (story, handle) = stories.of(proxy, passed, now);
    Meter::open(handle).close(passed.sent, passed.received);
    proxy.log_story(&story, (passed.sent, passed.received), duration, None);
    proxy.registry.remember(Ended {
        story,
        closed_ms: now_ms(),
        bytes_sent: passed.sent,
        bytes_received: passed.received,
        error: None,
    });
}
