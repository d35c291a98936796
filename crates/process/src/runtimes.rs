//! The two runtimes of a proxy: the data plane's, and the control plane's (configuration, admin, metrics), so that
//! a scrape or a large update never delays traffic. And the limits of the process that concern them.

use std::num::NonZeroUsize;
use std::str::FromStr;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};

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

/// The runtime that carries traffic.
///
/// # Errors
/// The threads can't be started.
pub fn data_plane(threads: WorkerThreads) -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(threads.resolve(processors()))
        .thread_name("data-plane")
        .enable_all()
        .build()
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
    fn threads_have_names() {
        let runtime = data_plane("1".parse().unwrap()).unwrap();
        let name = runtime.block_on(async {
            tokio::spawn(async { std::thread::current().name().map(str::to_owned) }).await.unwrap()
        });
        assert_eq!(name.as_deref(), Some("data-plane"));
    }

    #[test]
    fn the_descriptor_limit_is_raised_to_the_hard_one() {
        let limit = raise_descriptor_limit().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (limit, limit));
    }
}
