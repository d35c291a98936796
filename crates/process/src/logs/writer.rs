//! Writes lines to a file or standard output without ever making the caller wait.
//!
//! Callers append to a bounded buffer in memory; one thread carries it out. When the disk is full or the reader
//! of a pipe stands still, lines are dropped and counted, and a line that says how many follows once writing
//! works again. Nothing else happens to the process.
//!
//! A file that was renamed, as log rotation does, is left when the writer is told to open its target again. One that is
//! opened by the thread holds up nobody who starts a writer, and may be let go of while there is nothing to write.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What waits in memory at most. Half a second of a very busy node's access log.
pub const BUFFER_LIMIT_BYTES: usize = 4 << 20;

/// A buffer that grew beyond this in a burst is given back afterwards.
const BUFFER_KEPT_BYTES: usize = 64 << 10;

/// How long the thread gathers lines before it writes them. Woken for each line, it would cost the threads that carry
/// connections a system call a connection, and the machine two switches of threads.
const GATHER: Duration = Duration::from_millis(5);

/// How long a reader that has no room (`EAGAIN` on a pipe that someone made non-blocking) is left alone.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// How long a file that can't be opened is left alone.
const OPEN_PAUSE: Duration = Duration::from_secs(1);

/// Where lines go.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Target {
    /// Standard output.
    #[default]
    Stdout,
    /// A file, appended to, made when absent.
    File(PathBuf),
}

impl Target {
    fn open(&self) -> io::Result<File> {
        match self {
            // A descriptor of its own: `std::io::Stdout` has a lock that a blocked write would hold.
            Self::Stdout => Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
            Self::File(path) => OpenOptions::new().append(true).create(true).open(path),
        }
    }
}

#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    /// Whether the thread is carrying bytes out right now.
    writing: bool,
    closed: bool,
    /// The target is let go of whenever nothing is pending.
    rests: bool,
}

struct Shared {
    pending: Mutex<Pending>,
    /// Something is pending, or the writer was closed.
    filled: Condvar,
    /// A batch was carried out.
    emptied: Condvar,
    limit: usize,
    /// The target is to be opened again before the next line is written.
    reopen: AtomicBool,
    dropped: Arc<AtomicU64>,
    failures: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes lines. Cloning shares it.
#[derive(Clone)]
pub struct LogWriter(Arc<Shared>);

impl std::fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogWriter").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

impl LogWriter {
    /// Opens `target` and starts the thread. `notice` makes the line, with its end, that tells of dropped ones.
    ///
    /// # Errors
    /// The file can't be opened or the thread not be started.
    pub fn start(target: &Target, notice: fn(u64) -> String) -> io::Result<Self> {
        let target = target.clone();
        Self::start_with(target.open()?, move |_| target.open().map(Some), BUFFER_LIMIT_BYTES, notice)
    }

    /// As [`LogWriter::start`], on something that is open, with a limit in bytes of what waits.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start_on(
        sink: impl Write + Send + 'static,
        limit: usize,
        notice: fn(u64) -> String,
    ) -> io::Result<Self> {
        Self::start_with(sink, |_| Ok(None), limit, notice)
    }

    /// As [`LogWriter::start`], but the thread opens the file, once there is something to write: a slow disk, or a pipe that
    /// nobody reads, holds up nobody else. Lines are dropped while it can't be opened, which is tried once a second.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start_later(path: PathBuf, notice: fn(u64) -> String) -> io::Result<Self> {
        let again = Again::default();
        let later =
            move || Later { target: Target::File(path.clone()), file: None, again: Arc::clone(&again) };
        let open = move |why| {
            let later = later();
            if why == Why::Asked {
                later.set_again(None);
            }
            Ok::<_, io::Error>(later)
        };
        Self::start_with(open(Why::Asked)?, move |why| open(why).map(Some), BUFFER_LIMIT_BYTES, notice)
    }

    /// `open` opens the target again; `None` where that makes no sense.
    fn start_with<W: Write + Send + 'static>(
        sink: W,
        open: impl Fn(Why) -> io::Result<Option<W>> + Send + 'static,
        limit: usize,
        notice: fn(u64) -> String,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            pending: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            limit,
            reopen: AtomicBool::new(false),
            dropped: Arc::default(),
            failures: AtomicU64::new(0),
        });
        let of_thread = shared.clone();
        let mut carrier = Carrier { sink, open, used: false, mid_line: false, reported: 0, notice };
        std::thread::Builder::new().name("log-writer".into()).spawn(move || carrier.run(&of_thread))?;
        Ok(Self(shared))
    }

    /// Appends a line, which must end in a line feed. `false` when there was no room and it was dropped.
    pub fn write_line(&self, line: &[u8]) -> bool {
        let mut pending = self.0.lock();
        if pending.closed || pending.bytes.len() + line.len() > self.0.limit {
            drop(pending);
            self.0.dropped.fetch_add(1, Relaxed);
            return false;
        }
        let was_empty = pending.bytes.is_empty();
        pending.bytes.extend_from_slice(line);
        let wake = was_empty && !pending.writing;
        drop(pending);
        if wake {
            self.0.filled.notify_one();
        }
        true
    }

    /// Opens the target again before the next line is written. Where that fails, the old one stays, and the failure is
    /// counted.
    pub fn reopen(&self) {
        self.0.reopen.store(true, Relaxed);
    }

    /// While it rests, a writer that was started by [`LogWriter::start_later`] has its file open no longer than it writes.
    pub fn rest(&self, rests: bool) {
        self.0.lock().rests = rests;
        self.0.filled.notify_one();
    }

    /// Whether it rests.
    #[must_use]
    pub fn is_resting(&self) -> bool {
        self.0.lock().rests
    }

    /// How many lines were dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Relaxed)
    }

    /// The count of dropped lines, which goes on as long as somebody has the writer.
    #[must_use]
    pub fn drops(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.0.dropped)
    }

    /// How many writes failed.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Relaxed)
    }

    /// Waits until what was appended so far is written, but no longer than `limit`. Blocks the thread: for the
    /// end of the process. `false` when the time was up.
    #[must_use]
    pub fn flush(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut pending = self.0.lock();
        while pending.writing || !pending.bytes.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            pending = self.0.emptied.wait_timeout(pending, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Writes what is pending and ends the thread; later lines are dropped.
    pub fn close(&self) {
        self.0.lock().closed = true;
        self.0.filled.notify_one();
    }
}

/// Why a target is opened again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Why {
    /// Somebody said so: it is tried at once.
    Asked,
    /// There is nothing to write, and it is let go of.
    Rests,
}

/// When to try again to open a file that could not be opened; what rests keeps it.
type Again = Arc<Mutex<Option<Instant>>>;

/// A file that is opened by whoever writes to it.
struct Later {
    target: Target,
    file: Option<File>,
    again: Again,
}

impl Later {
    fn open(&mut self) -> io::Result<&mut File> {
        let again = *self.again.lock().unwrap_or_else(PoisonError::into_inner);
        if again.is_some_and(|again| Instant::now() < again) {
            return Err(ErrorKind::NotConnected.into());
        }
        let opened = match self.file.take() {
            Some(file) => file,
            None => self.target.open().inspect_err(|error| {
                if again.is_none() {
                    tracing::error!(file = ?self.target, %error, "a log is not written: it can't be opened");
                }
                self.set_again(Some(Instant::now() + OPEN_PAUSE));
            })?,
        };
        if again.is_some() {
            self.set_again(None);
        }
        Ok(self.file.insert(opened))
    }

    fn set_again(&self, again: Option<Instant>) {
        *self.again.lock().unwrap_or_else(PoisonError::into_inner) = again;
    }
}

impl Write for Later {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.open()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread's side.
struct Carrier<W, O> {
    sink: W,
    open: O,
    /// Whether something was written since the target was opened.
    used: bool,
    /// Whether the last write broke off inside a line.
    mid_line: bool,
    /// How many dropped lines a notice has told of.
    reported: u64,
    notice: fn(u64) -> String,
}

impl<W: Write, O: Fn(Why) -> io::Result<Option<W>>> Carrier<W, O> {
    fn run(&mut self, shared: &Shared) {
        let mut batch = Vec::new();
        loop {
            let mut pending = shared.lock();
            pending.writing = false;
            shared.emptied.notify_all();
            while pending.bytes.is_empty() && !pending.closed {
                if pending.rests && std::mem::take(&mut self.used) {
                    drop(pending);
                    self.reopen(shared, Why::Rests);
                    pending = shared.lock();
                    continue;
                }
                pending = shared.filled.wait(pending).unwrap_or_else(PoisonError::into_inner);
            }
            if pending.bytes.is_empty() {
                return;
            }
            pending.writing = true;
            if !pending.closed {
                drop(pending);
                std::thread::sleep(GATHER);
                pending = shared.lock();
            }
            std::mem::swap(&mut pending.bytes, &mut batch);
            drop(pending);
            if shared.reopen.swap(false, Relaxed) {
                self.reopen(shared, Why::Asked);
            }
            self.used = true;
            self.carry_out(&batch, shared);
            batch.clear();
            batch.shrink_to(BUFFER_KEPT_BYTES);
        }
    }

    fn reopen(&mut self, shared: &Shared, why: Why) {
        match (self.open)(why) {
            Ok(Some(sink)) => (self.sink, self.mid_line) = (sink, false),
            Ok(None) => {}
            Err(_) => {
                shared.failures.fetch_add(1, Relaxed);
            }
        }
    }

    fn carry_out(&mut self, batch: &[u8], shared: &Shared) {
        let dropped = shared.dropped.load(Relaxed);
        if dropped > self.reported {
            let notice = (self.notice)(dropped - self.reported);
            match self.write_all(notice.as_bytes()) {
                Ok(()) => self.reported = dropped,
                Err(_) => self.count_failure(batch, shared),
            }
            if self.reported < dropped {
                return;
            }
        }
        if let Err(written) = self.write_all(batch) {
            self.count_failure(batch.get(written..).unwrap_or_default(), shared);
        }
    }

    /// Counts the lines that were not written to their end.
    fn count_failure(&self, unwritten: &[u8], shared: &Shared) {
        let lines = unwritten.iter().filter(|b| **b == b'\n').count();
        shared.failures.fetch_add(1, Relaxed);
        shared.dropped.fetch_add(lines as u64, Relaxed);
    }

    /// Writes `bytes`; `Err` with how many were written.
    fn write_all(&mut self, bytes: &[u8]) -> Result<(), usize> {
        if self.mid_line {
            match self.write_some(b"\n") {
                Ok(1) => self.mid_line = false,
                _ => return Err(0),
            }
        }
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match self.write_some(rest) {
                Ok(n) if n > 0 => {
                    written += n;
                    self.mid_line = bytes.get(written.saturating_sub(1)) != Some(&b'\n');
                }
                _ => return Err(written),
            }
        }
        Ok(())
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.sink.write(bytes) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => std::thread::sleep(RETRY_PAUSE),
                result => return result,
            }
        }
    }
}
