//! What accepts connections from a listener of a pod, and gives each to the thread that is to carry it.
//!
//! One task at a time. It runs on the first thread that is not busy, and goes on as another task when that is another one: no
//! connection waits for a thread that has much to do while others have time. What it accepts is registered with the
//! runtime that carries it from the beginning.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use net::AcceptLoop;
use process::shutdown::Shutdown;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

use super::{OnThread, Shares};

/// Accepts until the process drains or it is stopped. The listener goes first then: a successor, or a reset, takes over.
pub struct Acceptor<H> {
    /// Who carries what.
    pub shares: Shares,
    /// When to end.
    pub shutdown: Shutdown,
    /// As many connections that wait are still taken at the end. Where a successor may listen beside us, what is new is
    /// his, and what waits here would be reset.
    pub at_last: usize,
    /// Makes of a connection what carries it to its end, in a task of its own.
    pub handle: H,
}

/// The task that accepts, whichever it is by now. Clones are handles to the same.
#[derive(Clone, Default)]
pub struct Accepting(Arc<Mutex<Task>>);

#[derive(Default)]
struct Task {
    current: Option<AbortHandle>,
    is_stopped: bool,
}

impl From<AbortHandle> for Accepting {
    fn from(task: AbortHandle) -> Self {
        Self(Arc::new(Mutex::new(Task { current: Some(task), is_stopped: false })))
    }
}

impl Accepting {
    /// Has it accept no more.
    pub fn stop(&self) {
        let mut task = self.task();
        task.is_stopped = true;
        task.current.iter().for_each(AbortHandle::abort);
    }

    /// Whether it has ended: the listener is closed then.
    pub fn is_over(&self) -> bool {
        self.task().current.as_ref().is_none_or(AbortHandle::is_finished)
    }

    fn go_on(&self, begin: impl FnOnce() -> AbortHandle) {
        let mut task = self.task();
        if !task.is_stopped {
            task.current = Some(begin());
        }
    }

    fn task(&self) -> MutexGuard<'_, Task> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H, Fut> Acceptor<H>
where
    H: Fn(TcpStream, SocketAddr) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    /// Begins, on the first thread.
    ///
    /// # Errors
    /// The listener can't be registered with its runtime.
    pub fn start(self, mut listener: AcceptLoop) -> std::io::Result<Accepting> {
        listener.move_to(self.shares.runtime(0))?;
        let task = Accepting::default();
        self.go_on(task.clone(), listener, 0);
        Ok(task)
    }

    fn go_on(self, task: Accepting, listener: AcceptLoop, here: usize) {
        let runtime = self.shares.runtime(here).clone();
        task.clone().go_on(|| runtime.spawn(self.accept(task, listener, here)).abort_handle());
    }

    /// On the thread of rank `here`.
    async fn accept(self, task: Accepting, mut listener: AcceptLoop, here: usize) {
        let shutdown = self.shutdown.clone();
        // Until all that waited has been taken.
        let _hold = shutdown.hold();
        let mut draining = std::pin::pin!(shutdown.draining());
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut draining => break,
                accepted = listener.next_for(|| self.shares.place(here)) => accepted,
            };
            self.begin(accepted);
            let next = self.shares.accepts_next(here);
            // A thread that can't have the listener has to do without.
            if next != here && listener.move_to(self.shares.runtime(next)).is_ok() {
                self.shares.0.threads.moved.fetch_add(1, Ordering::Relaxed);
                return self.go_on(task, listener, next);
            }
        }
        for _ in 0..self.at_last {
            let Some(accepted) = listener.take_waiting(|| self.shares.place(here)) else { return };
            self.begin(accepted);
        }
    }

    fn begin(&self, (stream, peer, place): (TcpStream, SocketAddr, OnThread)) {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let runtime = place.as_ref().clone();
        // It is under way also before its thread has looked at it.
        let kept = (place, self.shutdown.hold());
        runtime.spawn((self.handle)(stream, peer).map(move |()| drop(kept)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::disallowed_types,
        reason = "who connects here is no task of the runtimes that are watched"
    )]

    use std::net::{TcpListener as StdListener, TcpStream as StdStream};
    use std::sync::mpsc;
    use std::time::Duration;

    use process::runtimes::Workers;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpSocket;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
    use tokio::time::{Instant, sleep, timeout};

    use super::super::Threads;
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    struct Bench {
        _workers: Workers,
        threads: Arc<Threads>,
        shutdown: Shutdown,
        at: SocketAddr,
        accepting: Accepting,
        /// On which thread each connection is carried, as they begin.
        carried: UnboundedReceiver<usize>,
    }

    impl Bench {
        /// A listener whose first thread is the second one. A connection is carried until its client closes.
        fn start(count: usize) -> Self {
            let workers = Workers::start(count.to_string().parse().unwrap()).unwrap();
            let threads = Arc::new(Threads::new(&workers));
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
            let listener = socket.listen(1024).unwrap();
            let at = listener.local_addr().unwrap();
            let shutdown = Shutdown::new(PATIENCE);
            let (tell, carried) = unbounded_channel();
            let handle = move |mut stream: TcpStream, peer: SocketAddr| {
                let tell = tell.clone();
                async move {
                    assert_eq!(stream.peer_addr().unwrap(), peer);
                    tell.send(Workers::current()).unwrap();
                    let _ = stream.read(&mut [0]).await;
                }
            };
            let shares = Shares::new(threads.clone(), 1, threads.share());
            let acceptor = Acceptor { shares, shutdown: shutdown.clone(), at_last: 1000, handle };
            // Measured, a thread would be busy or not as the machine has it.
            let later = Instant::now() + 100 * PATIENCE;
            for thread in &threads.all {
                thread.pace.lock().unwrap().measured = Some((later, Duration::ZERO));
            }
            let accepting = acceptor.start(AcceptLoop::new(listener, Arc::default())).unwrap();
            Self { _workers: workers, threads, shutdown, at, accepting, carried }
        }

        /// Connects; the connection, and the thread that carries it.
        async fn connect(&mut self) -> (TcpStream, usize) {
            let stream = TcpStream::connect(self.at).await.unwrap();
            (stream, timeout(PATIENCE, self.carried.recv()).await.unwrap().unwrap())
        }

        fn open(&self) -> Vec<usize> {
            self.threads.counts().map(|counts| counts.open).collect()
        }

        /// Has a thread do nothing until what is returned is dropped.
        async fn hang(&self, thread: usize) -> mpsc::Sender<()> {
            let (hold, held) = mpsc::channel();
            let (tell, hangs) = tokio::sync::oneshot::channel();
            self.threads.runtime(thread).spawn(async move {
                tell.send(()).unwrap();
                let _ = held.recv();
            });
            hangs.await.unwrap();
            hold
        }

        fn set_busy(&self, thread: usize, busy: bool) {
            let until = Instant::now() + if busy { PATIENCE } else { Duration::ZERO };
            self.threads.thread(thread).pace.lock().unwrap().busy_until = Some(until);
        }
    }

    async fn eventually(what: &str, holds: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < until, "it is still not so that {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_share_is_on_one_thread_and_what_is_more_on_all() {
        let mut bench = Bench::start(3);
        let share = bench.threads.share();
        let (mut open, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..3 * share + 6 {
            let (stream, thread) = bench.connect().await;
            open.push(stream);
            threads.push(thread);
        }
        for (nth, thread) in [1, 2, 0].into_iter().enumerate() {
            assert!(threads[nth * share..][..share].iter().all(|t| *t == thread), "{nth}: {threads:?}");
        }
        assert_eq!(threads[3 * share..], [1, 2, 0, 1, 2, 0]);
        // An attempt that finds nothing has a place for that moment.
        eventually("each carries as many", || bench.open() == [share + 2; 3]).await;
        // Those of the first thread that end make room on it.
        drop(open.drain(..share).collect::<Vec<_>>());
        eventually("they have ended", || bench.open() == [share + 2, 2, share + 2]).await;
        assert_eq!(bench.connect().await.1, 1);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_thread_that_is_busy() {
        let mut bench = Bench::start(2);
        assert_eq!(bench.connect().await.1, 1);
        bench.set_busy(1, true);
        let (_open, thread) = bench.connect().await;
        eventually("another accepts", || bench.threads.moved() == 1).await;
        assert_eq!(thread, 0);
        // So busy that it would accept nothing.
        let hold = bench.hang(1).await;
        let (_another, thread) = bench.connect().await;
        assert_eq!(thread, 0);
        drop(hold);
        bench.set_busy(1, false);
        assert_eq!(bench.connect().await.1, 1, "it has time, and room");
        eventually("the first accepts again", || bench.threads.moved() == 2).await;
        let _hold = bench.hang(0).await;
        assert_eq!(bench.connect().await.1, 1);
    }

    #[tokio::test]
    async fn a_listener_is_closed_when_it_is_stopped_wherever_it_is_by_then() {
        let mut bench = Bench::start(2);
        bench.set_busy(1, true);
        let (mut open, _) = bench.connect().await;
        eventually("another accepts", || bench.threads.moved() == 1).await;
        assert!(StdListener::bind(bench.at).is_err(), "it listens");
        bench.accepting.stop();
        eventually("it is over", || bench.accepting.is_over()).await;
        drop(StdListener::bind(bench.at).unwrap());
        assert!(
            timeout(Duration::from_millis(100), open.read(&mut [0])).await.is_err(),
            "what is open goes on"
        );
        // One that would go on meanwhile does not.
        bench.accepting.go_on(|| unreachable!("it was stopped"));
    }

    #[tokio::test]
    async fn all_that_waits_is_taken_when_the_process_drains() {
        let mut bench = Bench::start(2);
        let hold = bench.hang(1).await;
        let waiting: Vec<_> = (0..200).map(|_| StdStream::connect(bench.at).unwrap()).collect();
        bench.shutdown.drain();
        drop(hold);
        eventually("it is over", || bench.accepting.is_over()).await;
        for _ in &waiting {
            timeout(PATIENCE, bench.carried.recv()).await.unwrap().unwrap();
        }
        assert!(StdStream::connect(bench.at).is_err());
    }
}
