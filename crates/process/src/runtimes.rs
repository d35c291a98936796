//! The runtimes of a proxy: the data plane's, one for each of its threads, and the control plane's (configuration, admin, metrics), so that
//! a scrape or a large update never delays traffic. And the limits of the process that concern them.

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::str::FromStr;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::watch;

/// The environment variable that sets the number of the data plane's threads.
pub const WORKER_THREADS_VARIABLE: &str = "ZTUNNEL_WORKER_THREADS";

/// The least number of data-plane threads that is chosen when nobody says otherwise.
const MIN_THREADS: usize = 2;

/// How many threads: a number, or a share of the processors that the process may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WorkerThreads {
    /// This many.
    Count(NonZeroUsize),
    /// This many hundredths of the processors, rounded up.
    Percent(u32),
}

impl Default for WorkerThreads {
    /// A quarter of the processors; [`WorkerThreads::resolve`] never makes it less than two threads.
    fn default() -> Self {
        Self::Percent(25)
    }
}

/// Why a text is no number of threads.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no number of threads: write a number from 1 to 1024, or a percentage from 1% to 100%")]
pub struct InvalidWorkerThreads(String);

impl FromStr for WorkerThreads {
    type Err = InvalidWorkerThreads;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidWorkerThreads(text.chars().take(50).collect());
        let trimmed = text.trim();
        if let Some(percent) = trimmed.strip_suffix('%') {
            let percent = percent.trim().parse().map_err(|_| invalid())?;
            return if (1..=100).contains(&percent) { Ok(Self::Percent(percent)) } else { Err(invalid()) };
        }
        match trimmed.parse::<NonZeroUsize>() {
            Ok(count) if count.get() <= 1024 => Ok(Self::Count(count)),
            _ => Err(invalid()),
        }
    }
}

impl WorkerThreads {
    /// The number, on this many processors.
    #[must_use]
    pub fn resolve(self, processors: usize) -> usize {
        match self {
            Self::Count(count) => count.get(),
            Self::Percent(percent) => (processors * percent as usize).div_ceil(100).max(MIN_THREADS),
        }
    }
}

/// How many processors the process may use, by its affinity and its cgroup's quota; at least one.
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

thread_local! {
    static WORKER: Cell<usize> = const { Cell::new(0) };
}

/// The threads that carry traffic, each with a runtime of its own. A connection stays on the thread that it begins on,
/// with all its tasks: no wake-up and no lock crosses threads, and its packets leave from one processor in order
/// (a task that moves between threads makes TCP see reordering, also on loopback, and send again).
#[derive(Debug)]
pub struct Workers {
    handles: Vec<Handle>,
    /// Closed when dropped, which ends the threads.
    _alive: watch::Sender<()>,
}

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// They can't be started.
    pub fn start(threads: WorkerThreads) -> std::io::Result<Self> {
        let alive = watch::Sender::new(());
        let mut handles = Vec::new();
        for index in 0..threads.resolve(processors()) {
            let runtime = Builder::new_current_thread().max_blocking_threads(4).enable_all().build()?;
            handles.push(runtime.handle().clone());
            let mut ended = alive.subscribe();
            std::thread::Builder::new().name(format!("data-plane-{index}")).spawn(move || {
                WORKER.set(index);
                // An error is the sender's end, the only thing that happens.
                let _ = runtime.block_on(ended.changed());
                runtime.shutdown_background();
            })?;
        }
        Ok(Self { handles, _alive: alive })
    }

    /// Each thread's runtime; never empty.
    #[must_use]
    pub fn handles(&self) -> &[Handle] {
        &self.handles
    }

    /// The index among [`Workers::handles`] of the thread that this is called on; 0 on threads that are none.
    #[must_use]
    pub fn current() -> usize {
        WORKER.get()
    }
}

/// The runtime for all else: one thread, and a few for work that blocks.
///
/// # Errors
/// The threads can't be started.
pub fn control_plane() -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(8)
        .thread_name("control")
        .enable_all()
        .build()
}

/// Raises the limit of open descriptors to what the process may have. Each connection takes two or more, and the
/// usual soft limit is 1,024. Returns the limit now in force.
///
/// # Errors
/// The limit can't be read or set.
pub fn raise_descriptor_limit() -> std::io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_a_number_or_a_share() {
        for (text, processors, threads) in
            [("1", 64, 1), ("3", 2, 3), ("50%", 8, 4), ("25%", 2, 2), ("100%", 16, 16), ("10%", 64, 7)]
        {
            assert_eq!(text.parse::<WorkerThreads>().unwrap().resolve(processors), threads, "{text}");
        }
        for text in ["", "0", "-1", "0%", "101%", "%", "x", "100000", "1.5"] {
            assert!(text.parse::<WorkerThreads>().is_err(), "{text:?}");
        }
        assert_eq!(WorkerThreads::default().resolve(2), 2);
    }

    #[test]
    fn a_task_stays_on_its_worker_with_all_that_it_spawns() {
        let workers = Workers::start("2".parse().unwrap()).unwrap();
        let control = control_plane().unwrap();
        for (index, handle) in workers.handles().iter().enumerate() {
            let here = || (Workers::current(), std::thread::current().name().map(str::to_owned));
            let task =
                handle.spawn(async move { (here(), tokio::spawn(async move { here() }).await.unwrap()) });
            let expected = (index, Some(format!("data-plane-{index}")));
            assert_eq!(control.block_on(task).unwrap(), (expected.clone(), expected));
        }
    }

    #[test]
    fn the_descriptor_limit_is_raised_to_the_hard_one() {
        let limit = raise_descriptor_limit().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (limit, limit));
    }
}
