//! Services that take access logs over gRPC: a queue for each, and one stream (Envoy's ALS, version 3) or one connection
//! with a call for each batch (OTLP) at a time, that go on for as long as the service takes them.
//!
//! A request never waits for a service. The queue has a limit of entries and of bytes; what finds it full is dropped and
//! counted. A batch that is not taken is sent once more on a new connection: streams have no acknowledgements. After that a
//! service is left alone for a while.

mod entry;
mod otlp;
mod stream;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::telemetry::{LogEntries, LogService};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use self::otlp::Calls;
use self::stream::{Stream, StreamError};
use super::ended::Ended;
use super::export::{Connect, Origin};
use super::named::Names;

/// Entries that wait for one service.
const QUEUE: usize = 4096;
/// Bytes that they have.
const QUEUE_BYTES: usize = 4 << 20;
/// Bytes of a batch, about: Envoy's services are used to as much.
const BATCH_BYTES: usize = 64 << 10;
/// So long the first entry of a batch waits for others.
const GATHER: Duration = Duration::from_secs(1);
/// To connect, and for a batch to be taken.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Services that there may be at a time; more than these get nothing until one of them is not named any more.
const SERVICES: usize = 16;
/// How long a service that takes nothing is left alone, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What was done with entries.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Handed to a queue.
    pub taken: AtomicU64,
    /// Dropped: the queue was full, or there was none.
    pub dropped: AtomicU64,
    /// Sent.
    pub sent: AtomicU64,
    /// Not taken by their service.
    pub failed: AtomicU64,
    /// Streams that were opened.
    pub streams: AtomicU64,
    /// Waiting now, in all queues.
    pub waiting: AtomicU64,
}

/// The way to one service. It keeps nothing open: threads remember it longer than settings are in force.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    service: LogService,
    sender: mpsc::WeakSender<Vec<u8>>,
    bytes: Arc<AtomicUsize>,
    counters: Arc<Counters>,
}

impl Queue {
    /// Hands over the entry of what has ended.
    pub fn put(&self, ended: &Ended<'_>) {
        let entry = match &self.service.entries {
            LogEntries::Otlp { body, attributes } => Some(otlp::record(body, attributes, ended)),
            _ => entry::encode(&self.service, ended),
        };
        let Some(entry) = entry else { return };
        let length = entry.len();
        let fits = self.bytes.fetch_add(length, Relaxed) + length <= QUEUE_BYTES;
        // Counted before it is there, so that it is not counted away before.
        self.counters.waiting.fetch_add(1, Relaxed);
        if fits && self.sender.upgrade().is_some_and(|sender| sender.try_send(entry).is_ok()) {
            self.counters.taken.fetch_add(1, Relaxed);
        } else {
            self.bytes.fetch_sub(length, Relaxed);
            self.counters.waiting.fetch_sub(1, Relaxed);
            self.counters.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// A service that logs go to.
struct Open {
    queue: Queue,
    /// Its work ends without this.
    _sender: mpsc::Sender<Vec<u8>>,
}

#[derive(Default)]
struct All {
    open: HashMap<LogService, Open>,
    /// What settings in force name; `None` where nobody says.
    named: Option<Names<LogService>>,
}

/// The queues of all services that logs go to.
#[derive(Default)]
pub(super) struct Queues {
    all: Mutex<All>,
    pub counters: Arc<Counters>,
}

impl Queues {
    /// Says what settings in force name: where there are too many, the others make room.
    pub fn in_force(&self, named: &Names<LogService>) {
        self.all().named = Some(named.clone());
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue of `service`; `None` if there are too many.
    pub fn open(
        &self,
        service: &LogService,
        runtime: &Handle,
        connect: &Arc<dyn Connect>,
        origin: &Origin,
    ) -> Option<Queue> {
        let All { open: all, named } = &mut *self.all();
        if let Some(open) = all.get(service) {
            return Some(open.queue.clone());
        }
        if let Some(named) = named
            && all.len() >= SERVICES
        {
            all.retain(|service, _| named.contains(service));
        }
        if all.len() >= SERVICES {
            tracing::error!(service = &*service.collector.host, SERVICES, "too many services of access logs");
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        let queue = Queue {
            service: service.clone(),
            sender: sender.downgrade(),
            bytes: Arc::default(),
            counters: Arc::clone(&self.counters),
        };
        let work = Work {
            service: service.clone(),
            connect: Arc::clone(connect),
            origin: origin.clone(),
            bytes: Arc::clone(&queue.bytes),
            counters: Arc::clone(&self.counters),
        };
        runtime.spawn(work.run(receiver));
        let open = Open { queue: queue.clone(), _sender: sender };
        all.insert(service.clone(), open);
        Some(queue)
    }
}

/// Sends what one queue gets.
struct Work {
    service: LogService,
    connect: Arc<dyn Connect>,
    origin: Origin,
    bytes: Arc<AtomicUsize>,
    counters: Arc<Counters>,
}

impl Work {
    /// Ends when nobody has the queue any more.
    async fn run(self, mut entries: mpsc::Receiver<Vec<u8>>) {
        let mut way = None;
        let mut pause = None;
        while let Some(batch) = self.gather(&mut entries).await {
            let count = batch.len() as u64;
            match self.send(&mut way, &batch).await {
                Ok(refused) => {
                    pause = None;
                    let refused = refused.min(count);
                    self.counters.failed.fetch_add(refused, Relaxed);
                    self.counters.sent.fetch_add(count - refused, Relaxed);
                }
                Err(error) => {
                    self.counters.failed.fetch_add(count, Relaxed);
                    // Once for each time that it begins to fail.
                    if pause.is_none() {
                        let (provider, host) =
                            (&*self.service.collector.provider, &*self.service.collector.host);
                        tracing::warn!(provider, host, %error, "access logs are not taken");
                    }
                    let next = pause.map_or(PAUSES.0, |last: Duration| (last * 2).min(PAUSES.1));
                    pause = Some(next);
                    tokio::time::sleep(next).await;
                }
            }
        }
    }

    async fn gather(&self, entries: &mut mpsc::Receiver<Vec<u8>>) -> Option<Vec<Vec<u8>>> {
        let first = entries.recv().await?;
        let mut size = first.len();
        let mut batch = vec![first];
        let gathered = tokio::time::sleep(GATHER);
        tokio::pin!(gathered);
        while size < BATCH_BYTES {
            let more = tokio::select! {
                more = entries.recv() => more,
                () = &mut gathered => None,
            };
            let Some(entry) = more else { break };
            size += entry.len();
            batch.push(entry);
        }
        self.bytes.fetch_sub(size, Relaxed);
        self.counters.waiting.fetch_sub(batch.len() as u64, Relaxed);
        Some(batch)
    }

    /// Sends a batch by the way that there is, else, or if that does not take it, by a new one. Says how many of it the service
    /// did not want.
    async fn send(&self, way: &mut Option<Way>, batch: &[Vec<u8>]) -> Result<u64, StreamError> {
        if let Some(open) = way {
            let sent = tokio::time::timeout(TIMEOUT, self.send_by(open, batch)).await;
            if let Ok(Ok(refused)) = sent {
                return Ok(refused);
            }
            *way = None;
        }
        let opened = tokio::time::timeout(TIMEOUT, async {
            let io = self.connect.connect(&self.service.collector).await.map_err(StreamError::Connect)?;
            let mut opened = match &self.service.entries {
                LogEntries::Otlp { .. } => Way::Calls(Calls::open(io).await?),
                _ => Way::Stream(Box::new(Stream::open(io, &self.service, &self.origin).await?)),
            };
            self.counters.streams.fetch_add(1, Relaxed);
            let refused = self.send_by(&mut opened, batch).await?;
            Ok::<_, StreamError>((opened, refused))
        });
        let (opened, refused) = opened.await.unwrap_or(Err(StreamError::Timeout))?;
        *way = Some(opened);
        Ok(refused)
    }

    async fn send_by(&self, way: &mut Way, batch: &[Vec<u8>]) -> Result<u64, StreamError> {
        match way {
            Way::Stream(stream) => stream.send(&self.service, batch).await.map(|()| 0),
            Way::Calls(calls) => Ok(calls.send(&self.service, &self.origin, batch).await?),
        }
    }
}

/// How entries go to a service.
enum Way {
    Stream(Box<Stream>),
    Calls(Calls),
}
