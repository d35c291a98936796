//! What accepts connections from a listener of a pod, and gives each to the thread that is to carry it.
//!
//! One task at a time. It runs on the first thread that is not busy, and goes on as another task when that is another one: no
//! connection waits for a thread that has much to do while others have time. What it accepts is registered with the
//! runtime that carries it from the beginning.
//!
//! A task whose thread stands still can neither accept nor go on elsewhere. Another one takes its place then ([`Rescue`]), with
//! the same listener; the old one ends when its thread gets to it, and accepts nothing more.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use net::{AcceptLoop, Reach};
use process::shutdown::{Hold, Shutdown};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::watch::Rescue;
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
    /// Those before it whose threads stood still, as long as they do: no more than there are threads.
    former: Vec<AbortHandle>,
    is_stopped: bool,
    /// The rank of the thread, and what is accepted from.
    rank: usize,
    listener: Reach,
    /// How many tasks there were before. One that is not the last has no successor.
    turn: u64,
    /// Dropped, it tells a task that ends by itself to do so.
    told: Option<oneshot::Sender<()>>,
}

impl From<AbortHandle> for Accepting {
    fn from(task: AbortHandle) -> Self {
        Self(Arc::new(Mutex::new(Task { current: Some(task), ..Task::default() })))
    }
}

impl Accepting {
    /// A task that ends by itself, soon after `told` is dropped.
    pub fn told(task: AbortHandle, told: oneshot::Sender<()>) -> Self {
        Self(Arc::new(Mutex::new(Task { current: Some(task), told: Some(told), ..Task::default() })))
    }

    /// Has it accept no more.
    pub fn stop(&self) {
        let mut task = self.task();
        task.is_stopped = true;
        if task.told.take().is_none() {
            task.current.iter().for_each(AbortHandle::abort);
        }
    }

    /// Whether it has ended: the listener is closed then.
    pub fn is_over(&self) -> bool {
        let task = self.task();
        task.current.iter().chain(&task.former).all(AbortHandle::is_finished)
    }

    fn task(&self) -> MutexGuard<'_, Task> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H, Fut> Acceptor<H>
where
    H: Fn(TcpStream, SocketAddr) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    /// Begins, on the first thread that has time.
    ///
    /// # Errors
    /// The listener can't be registered with its runtime.
    pub fn start(self, mut listener: AcceptLoop) -> std::io::Result<Accepting> {
        let first = self.shares.accepts_next(0);
        listener.move_to(self.shares.runtime(first))?;
        let accepting = Accepting::default();
        let running = Arc::new(Running { acceptor: self, accepting: accepting.clone() });
        let rescue: Arc<dyn Rescue> = running.clone();
        running.acceptor.shares.0.threads.add(Arc::downgrade(&rescue));
        let turn = accepting.task().turn;
        running.go_on(listener, first, turn);
        Ok(accepting)
    }
}

/// What accepts, in one task after the other.
struct Running<H> {
    acceptor: Acceptor<H>,
    accepting: Accepting,
}

impl<H, Fut> Running<H>
where
    H: Fn(TcpStream, SocketAddr) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    /// The next task, on the thread of rank `here`, unless it was stopped, or another one took the place of `turn`.
    fn go_on(self: &Arc<Self>, listener: AcceptLoop, here: usize, turn: u64) {
        let mut task = self.accepting.task();
        if !task.is_stopped && task.turn == turn {
            self.begin_task(&mut task, listener, here);
        }
    }

    fn begin_task(self: &Arc<Self>, task: &mut Task, listener: AcceptLoop, here: usize) {
        task.turn += 1;
        (task.rank, task.listener) = (here, listener.reach());
        // From here on, so that no drain is over before it has looked.
        let hold = self.acceptor.shutdown.hold();
        let accepts = self.clone().accept(listener, here, task.turn, hold);
        task.current = Some(self.acceptor.shares.runtime(here).spawn(accepts).abort_handle());
    }

    /// On the thread of rank `here`, until all that waited has been taken.
    async fn accept(self: Arc<Self>, mut listener: AcceptLoop, here: usize, turn: u64, _hold: Hold) {
        let Acceptor { shares, shutdown, at_last, .. } = &self.acceptor;
        let mut draining = std::pin::pin!(shutdown.draining());
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut draining => break,
                accepted = listener.next_for(|| shares.place(here)) => accepted,
            };
            self.acceptor.begin(accepted);
            let next = shares.accepts_next(here);
            // A thread that can't have the listener has to do without.
            if next != here && listener.move_to(shares.runtime(next)).is_ok() {
                shares.0.threads.moved.fetch_add(1, Ordering::Relaxed);
                return self.go_on(listener, next, turn);
            }
        }
        for _ in 0..*at_last {
            let Some(accepted) = listener.take_waiting(|| shares.place(here)) else { return };
            self.acceptor.begin(accepted);
        }
    }
}

impl<H, Fut> Rescue for Running<H>
where
    H: Fn(TcpStream, SocketAddr) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    fn rescue(self: Arc<Self>) -> bool {
        let shares = &self.acceptor.shares;
        let mut task = self.accepting.task();
        if task.is_stopped || !shares.0.is_stalled(task.rank) {
            return false;
        }
        let next = shares.accepts_next(task.rank);
        if shares.0.is_stalled(next) {
            return false; // they all do
        }
        // Without a descriptor for it, the next look tries again.
        let Ok(listener) = task.listener.again(shares.runtime(next)) else { return false };
        if let Some(former) = task.current.take() {
            former.abort();
            task.former.retain(|former| !former.is_finished());
            task.former.push(former);
        }
        self.begin_task(&mut task, listener, next);
        true
    }
}

impl<H, Fut> Acceptor<H>
where
    H: Fn(TcpStream, SocketAddr) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
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
    async fn a_listener_leaves_a_thread_that_stands_still() {
        let mut bench = Bench::start(2);
        let (_open, thread) = bench.connect().await;
        assert_eq!(thread, 1);
        tokio::spawn(bench.threads.clone().watch());
        // It uses no processor, so that by what it uses it has all the time.
        let hold = bench.hang(1).await;
        for _ in 0..3 {
            assert_eq!(bench.connect().await.1, 0);
        }
        assert_eq!((bench.threads.stalls(), bench.threads.rescued()), (1, 1), "once, and for good");
        // Who comes now begins elsewhere.
        assert_eq!(bench.accepting.task().rank, 1);
        drop(hold);
        eventually("it moves again", || bench.threads.counts().all(|counts| !counts.is_stalled)).await;
        assert_eq!(bench.connect().await.1, 1, "it is the first");
        bench.accepting.stop();
        eventually("it is over, with the task that was stuck", || bench.accepting.is_over()).await;
        drop(StdListener::bind(bench.at).unwrap());
    }

    #[tokio::test]
    async fn nothing_moves_while_all_threads_stand_still() {
        let mut bench = Bench::start(2);
        tokio::spawn(bench.threads.clone().watch());
        let (hold, another) = (bench.hang(0).await, bench.hang(1).await);
        eventually("both are found to", || bench.threads.stalls() == 2).await;
        sleep(Duration::from_millis(500)).await;
        assert_eq!(bench.threads.rescued(), 0);
        let waiting = StdStream::connect(bench.at).unwrap();
        drop(hold);
        let carries = timeout(PATIENCE, bench.carried.recv()).await.unwrap();
        assert_eq!((carries, bench.threads.rescued()), (Some(0), 1));
        drop((another, waiting));
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
