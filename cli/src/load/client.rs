//! The generator's side.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hdrhistogram::Histogram;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, timeout, timeout_at};

use super::{EXCHANGE_BYTES, GRACE, Live, Outcome, Plan, Shape, Talk};

/// How long a connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection that failed waits before it is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(5);
/// What a bulk sender hands over at once.
const BULK_BUFFER: usize = 128 * 1024;
/// An answer's headers end within this.
const MOST_HEADER_BYTES: usize = 16 * 1024;

/// What the workers saw; they share it, being on one thread.
struct Tally {
    requests: u64,
    bytes: u64,
    failures: BTreeMap<String, u64>,
    latency: Histogram<u64>,
}

impl Tally {
    fn new() -> io::Result<Self> {
        // 1 ns to a minute, to one part in a thousand.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(io::Error::other)?;
        Ok(Self { requests: 0, bytes: 0, failures: BTreeMap::new(), latency })
    }
}

fn what_failed(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::Other => error.to_string(),
        kind => kind.to_string(),
    }
}

/// The measured time.
#[derive(Clone, Copy)]
struct Window {
    from: Instant,
    to: Instant,
}

/// What a worker needs to know.
#[derive(Clone)]
struct Work {
    target: SocketAddr,
    talk: Rc<Spoken>,
    window: Window,
    live: Arc<Live>,
    tally: Rc<RefCell<Tally>>,
}

impl Work {
    fn over(&self) -> bool {
        self.live.stopped() || Instant::now() >= self.window.to
    }

    fn answered(&self, since: Instant) {
        self.live.answered.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        if since >= self.window.from && now <= self.window.to {
            let mut tally = self.tally.borrow_mut();
            tally.requests += 1;
            tally.latency.saturating_record((now - since).as_nanos().try_into().unwrap_or(u64::MAX));
        }
    }

    fn failed(&self, error: &io::Error) {
        self.live.failed.fetch_add(1, Ordering::Relaxed);
        *self.tally.borrow_mut().failures.entry(what_failed(error)).or_default() += 1;
    }

    fn opened(&self) {
        self.live.opened.fetch_add(1, Ordering::Relaxed);
    }
}

/// A [`Talk`] made ready.
struct Spoken {
    request: Vec<u8>,
    /// The answer's length; `None` until the first HTTP answer of a connection tells it.
    answer: Option<usize>,
}

impl Spoken {
    fn of(talk: &Talk) -> Self {
        match talk {
            Talk::Exchange => Self { request: vec![b'q'; EXCHANGE_BYTES], answer: Some(EXCHANGE_BYTES) },
            Talk::Http { host, path } => Self {
                request: format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: culvert\r\n\r\n").into(),
                answer: None,
            },
        }
    }
}

/// Runs the plan in the calling thread's namespace.
pub(super) async fn drive(plan: &Plan, live: &Arc<Live>) -> io::Result<Outcome> {
    // What a bulk stream sends is counted from its first byte.
    let warm_up = if matches!(plan.shape, Shape::Bulk { .. }) { Duration::ZERO } else { plan.warm_up };
    let from = Instant::now() + warm_up;
    let window = Window { from, to: from + plan.duration };
    let work = Work {
        target: plan.target,
        talk: Rc::new(Spoken::of(&plan.talk)),
        window,
        live: live.clone(),
        tally: Rc::new(RefCell::new(Tally::new()?)),
    };
    let local = LocalSet::new();
    local.run_until(dispatch(plan.shape, work)).await
}

/// One connection and one request on it.
pub(super) async fn once(plan: &Plan) -> io::Result<Duration> {
    let talk = Spoken::of(&plan.talk);
    let since = Instant::now();
    let mut line = Line::open(plan.target, &talk).await?;
    line.ask(&talk.request).await?;
    Ok(since.elapsed())
}

async fn dispatch(shape: Shape, work: Work) -> io::Result<Outcome> {
    let mut workers: JoinSet<io::Result<()>> = JoinSet::new();
    match shape {
        Shape::Closed { connections, reconnect } => {
            for _ in 0..connections {
                workers.spawn_local(closed_loop(work.clone(), reconnect));
            }
        }
        Shape::Idle { connections } => {
            for _ in 0..connections {
                workers.spawn_local(idle_connection(work.clone()));
            }
        }
        Shape::Connects { parallel } => {
            for _ in 0..parallel {
                workers.spawn_local(connect_loop(work.clone()));
            }
        }
        Shape::Bulk { streams } => {
            for _ in 0..streams {
                workers.spawn_local(bulk_stream(work.clone()));
            }
        }
        Shape::Open { connections, rate } => {
            let mut lanes = Vec::new();
            for _ in 0..connections {
                let (due, dues) = mpsc::unbounded_channel();
                lanes.push(due);
                workers.spawn_local(open_lane(work.clone(), dues));
            }
            workers.spawn_local(pace(work.clone(), rate, lanes));
        }
    }
    collect(workers, &work).await
}

async fn collect(mut workers: JoinSet<io::Result<()>>, work: &Work) -> io::Result<Outcome> {
    let mut last = Instant::now();
    let mut give_up = work.window.to + GRACE;
    loop {
        // The stop flag is looked at by the workers; one that waits for an answer does not see it.
        match timeout(Duration::from_millis(100), workers.join_next()).await {
            Ok(None) => break,
            Ok(Some(ended)) => {
                ended.map_err(io::Error::other)??;
                last = Instant::now();
            }
            Err(_) if work.live.stopped() => give_up = give_up.min(Instant::now() + GRACE),
            Err(_) => {}
        }
        if Instant::now() >= give_up {
            let stuck = workers.len() as u64;
            *work.tally.borrow_mut().failures.entry("no answer".to_owned()).or_default() += stuck;
            break;
        }
    }
    let tally = std::mem::replace(&mut *work.tally.borrow_mut(), Tally::new()?);
    // A bulk stream ends when the receiver has all, which is after the window; a stopped run ends before it.
    let end = if tally.bytes > 0 || work.live.stopped() { last } else { work.window.to };
    Ok(Outcome {
        requests: tally.requests,
        answered: work.live.answered(),
        connections: work.live.opened.load(Ordering::Relaxed),
        bytes: tally.bytes,
        elapsed: end.saturating_duration_since(work.window.from).max(Duration::from_millis(1)),
        failures: tally.failures,
        latency: tally.latency,
    })
}

async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(target))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the connect took too long"))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection and the length of its answers.
struct Line {
    stream: TcpStream,
    answer: Option<usize>,
    buffer: Vec<u8>,
}

impl Line {
    async fn open(target: SocketAddr, talk: &Spoken) -> io::Result<Self> {
        let stream = connect(target).await?;
        Ok(Self { stream, answer: talk.answer, buffer: vec![0; 4 * EXCHANGE_BYTES] })
    }

    /// One request and its whole answer.
    async fn ask(&mut self, request: &[u8]) -> io::Result<()> {
        self.stream.write_all(request).await?;
        let mut have = 0;
        while self.answer.is_none_or(|wanted| have < wanted) {
            let free = self.buffer.get_mut(have..).unwrap_or_default();
            if free.is_empty() {
                have = self.make_room(have)?;
                continue;
            }
            let got = self.stream.read(free).await?;
            if got == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the answer"));
            }
            have += got;
            if self.answer.is_none() {
                self.answer = answer_length(self.buffer.get(..have).unwrap_or_default())?;
            }
        }
        Ok(())
    }

    /// Only the first answer of a connection is looked at; of the others the bytes are counted.
    fn make_room(&mut self, have: usize) -> io::Result<usize> {
        let length = self.answer.unwrap_or(MOST_HEADER_BYTES);
        if self.buffer.len() >= length {
            return Err(io::Error::other("an answer without an end of headers"));
        }
        self.buffer.resize(length, 0);
        Ok(have)
    }
}

/// The whole length of an HTTP/1.1 answer, once its headers are there.
fn answer_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") {
        return Err(io::Error::other(format!("answered {status:?}")));
    }
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or_else(|| io::Error::other("an answer without Content-Length"))?;
    Ok(Some(end + 4 + length))
}

async fn closed_loop(work: Work, reconnect: bool) -> io::Result<()> {
    while !work.over() {
        match Line::open(work.target, &work.talk).await {
            Ok(mut line) => {
                work.opened();
                while !work.over() {
                    let since = Instant::now();
                    match line.ask(&work.talk.request).await {
                        Ok(()) => work.answered(since),
                        Err(e) => {
                            work.failed(&e);
                            break;
                        }
                    }
                }
            }
            Err(e) => work.failed(&e),
        }
        if !reconnect {
            break;
        }
        if !work.over() {
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }
    Ok(())
}

async fn connect_loop(work: Work) -> io::Result<()> {
    while !work.over() {
        let since = Instant::now();
        let one = async {
            let mut line = Line::open(work.target, &work.talk).await?;
            line.ask(&work.talk.request).await
        };
        match one.await {
            Ok(()) => {
                work.opened();
                work.answered(since);
            }
            Err(e) => {
                work.failed(&e);
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        }
    }
    Ok(())
}

async fn idle_connection(work: Work) -> io::Result<()> {
    let since = Instant::now();
    let one = async {
        let mut line = Line::open(work.target, &work.talk).await?;
        line.ask(&work.talk.request).await?;
        work.opened();
        work.answered(since);
        while !work.over() {
            // A peer that closes it meanwhile is a failure: nothing else is to be read.
            match timeout(Duration::from_millis(500), line.stream.readable()).await {
                Err(_) => {}
                Ok(_) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed while idle")),
            }
        }
        Ok(())
    };
    if let Err(e) = one.await {
        work.failed(&e);
    }
    Ok(())
}

async fn bulk_stream(work: Work) -> io::Result<()> {
    let data = vec![b'b'; BULK_BUFFER];
    let one = async {
        let mut stream = connect(work.target).await?;
        while !work.over() {
            stream.write_all(&data).await?;
        }
        stream.shutdown().await?;
        timeout_at(work.window.to + GRACE, stream.read_u64())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the sink did not confirm"))?
    };
    match one.await {
        Ok(total) => {
            work.opened();
            work.tally.borrow_mut().bytes += total;
        }
        Err(e) => work.failed(&e),
    }
    Ok(())
}

/// Says when each request is due. Its clock is a timer descriptor: the runtime's own timers count milliseconds.
async fn pace(work: Work, rate: u32, lanes: Vec<mpsc::UnboundedSender<Instant>>) -> io::Result<()> {
    let interval = Duration::from_secs(1) / rate.max(1);
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    let start = Instant::now();
    timer.set(Expiration::Interval(TimeSpec::from_duration(interval)), TimerSetTimeFlags::empty())?;
    let timer = watch(timer.into())?;
    let mut due = start;
    let mut lane = lanes.iter().cycle();
    while !work.over() {
        let mut ready = timer.readable().await?;
        let mut expired = [0; 8];
        match nix::unistd::read(ready.get_inner(), &mut expired) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN) => {
                ready.clear_ready();
                continue;
            }
            Err(e) => return Err(e.into()),
        }
        for _ in 0..u64::from_ne_bytes(expired) {
            due += interval;
            if let Some(lane) = lane.next() {
                // A lane whose connection failed is gone; the failure is counted there.
                let _ = lane.send(due);
            }
        }
    }
    Ok(())
}

// The successor is unsafe to call, for types that don't own their descriptor; this one does.
#[expect(deprecated)]
fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(descriptor)
}

async fn open_lane(work: Work, mut dues: mpsc::UnboundedReceiver<Instant>) -> io::Result<()> {
    let mut line = match Line::open(work.target, &work.talk).await {
        Ok(line) => line,
        Err(e) => {
            work.failed(&e);
            return Ok(());
        }
    };
    work.opened();
    while let Some(due) = dues.recv().await {
        match line.ask(&work.talk.request).await {
            Ok(()) => work.answered(due),
            Err(e) => {
                work.failed(&e);
                return Ok(());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{self, serve_load};

    #[test]
    fn an_answers_length_is_its_headers_and_its_body() {
        let head = b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 12\r\n\r\n";
        assert_eq!(answer_length(head).unwrap(), Some(head.len() + 12));
        assert_eq!(answer_length(b"HTTP/1.1 200 OK\r\nContent-Le").unwrap(), None);
        assert!(answer_length(b"HTTP/1.1 503 No\r\nContent-Length: 1\r\n\r\n").is_err());
        assert!(answer_length(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").is_err());
    }

    fn plan(port: u16, shape: Shape) -> Plan {
        Plan {
            namespace: None,
            target: ([127, 0, 0, 1], port).into(),
            talk: Talk::Exchange,
            shape,
            duration: Duration::from_millis(300),
            warm_up: Duration::from_millis(20),
        }
    }

    #[test]
    fn every_shape_measures_against_the_server_on_loopback() {
        std::thread::spawn(|| crate::netns::block_on(serve_load([127, 0, 0, 1].into())).unwrap().unwrap());
        let one = Shape::Closed { connections: 1, reconnect: false };
        for _ in 0..200 {
            if load::once(&plan(load::EXCHANGE_PORT, one)).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let closed =
            load::run(plan(load::EXCHANGE_PORT, Shape::Closed { connections: 4, reconnect: false })).unwrap();
        assert!(closed.requests > 100, "{}", closed.requests);
        assert_eq!(closed.failures_shown(), "none");
        assert_eq!(closed.connections, 4);
        let open = load::run(plan(load::EXCHANGE_PORT, Shape::Open { connections: 4, rate: 1000 })).unwrap();
        assert!((200..=310).contains(&open.requests), "{}", open.requests);
        let connects = load::run(plan(load::EXCHANGE_PORT, Shape::Connects { parallel: 4 })).unwrap();
        assert!(connects.requests > 50 && connects.failed() == 0);
        let bulk = load::run(plan(load::SINK_PORT, Shape::Bulk { streams: 2 })).unwrap();
        assert!(bulk.bytes > 10_000_000 && bulk.gigabits() > 0.1, "{}", bulk.bytes);
        // Nobody listens there: failures are counted, and the run ends.
        let none = load::run(plan(1, Shape::Closed { connections: 1, reconnect: true })).unwrap();
        assert!(none.requests == 0 && none.failed() > 3, "{}", none.failures_shown());
    }
}
