//! Moving bytes between two TCP connections, for traffic that passes in the clear or stays on the node.
//!
//! ```text
//!   Idle --readable--> read/splice --all written--> Idle
//!                          |  sink is full
//!                          v
//!                       Holding --writable--> Idle          end of stream --> shut the sink down --> Done
//! ```
//!
//! Invariants:
//! * an idle direction holds neither buffer nor pipe; a blocked one holds at most one of them, so a slow
//!   reader costs its peer's speed and not our memory;
//! * an end of stream is passed on only after every byte before it;
//! * whatever isn't the orderly end of both directions, dropping the future included, resets both
//!   connections, so that a truncated stream never looks complete.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use crate::pipe::Pipe;
use crate::scratch::Scratch;

/// A read of so much makes the next one a splice, and a splice of less makes the next one a read: below it,
/// copying is the cheaper of the two (`examples/copy_bench.rs`).
const BULK: usize = 16 * 1024;

/// Moves in one poll of a direction before other tasks of the thread get their turn.
const MOVES_PER_POLL: usize = 16;

/// Bytes moved so far. Written as they move, readable at any time.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// From the client to the server.
    pub to_server: AtomicU64,
    /// From the server to the client.
    pub to_client: AtomicU64,
}

/// One of the two connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The one that was accepted.
    Client,
    /// The one that was dialled.
    Server,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}

/// How it ended.
#[derive(Debug)]
pub enum End {
    /// Both directions came to their ends in order; the side named finished first.
    Finished(Side),
    /// The side named reset its connection; the other one has been reset too.
    Reset(Side),
    /// The connection of the side named failed, by time-out or unreachability as a rule; the other one has
    /// been reset.
    Failed(Side, io::Error),
}

/// Copies both ways until both ends are closed or one breaks. Dropping the future resets both connections.
pub async fn copy(client: TcpStream, server: TcpStream, counts: &ByteCounts) -> End {
    let mut pair = Pair { client, server, orderly: false };
    let (client_read, client_write) = pair.client.split();
    let (server_read, server_write) = pair.server.split();
    let mut up = Direction::new(Side::Client, client_read, server_write, &counts.to_server);
    let mut down = Direction::new(Side::Server, server_read, client_write, &counts.to_client);

    let first = poll_fn(|cx| {
        if let Poll::Ready(done) = up.poll(cx) {
            return Poll::Ready(done.map(|()| Side::Client));
        }
        down.poll(cx).map(|done| done.map(|()| Side::Server))
    });
    let first = first.await;
    (up.last, down.last) = (true, true);
    let end = match first {
        Ok(Side::Client) => finish(Side::Client, &up.source, &mut down).await,
        Ok(Side::Server) => finish(Side::Server, &down.source, &mut up).await,
        Err(broken) => broken.into(),
    };
    drop((up, down));
    pair.orderly = matches!(end, End::Finished(_));
    end
}

/// Half-closed: `ended` has finished sending, `rest` goes on. A reset by `ended` is seen by its error alone,
/// since nothing reads from it any more.
async fn finish(ended: Side, ended_source: &ReadHalf<'_>, rest: &mut Direction<'_>) -> End {
    let mut error = pin!(ended_source.ready(Interest::ERROR));
    let mut watching = true;
    let broken = poll_fn(|cx| {
        if watching && error.as_mut().poll(cx).is_ready() {
            watching = false;
            if let Ok(Some(error)) = ended_source.as_ref().take_error() {
                return Poll::Ready(Err(Broken { side: ended, error }));
            }
        }
        rest.poll(cx)
    });
    match broken.await {
        Ok(()) => End::Finished(ended),
        Err(broken) => broken.into(),
    }
}

/// Both connections, closed in order or reset.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    orderly: bool,
}

impl Drop for Pair {
    fn drop(&mut self) {
        if !self.orderly {
            let _ = self.client.set_zero_linger();
            let _ = self.server.set_zero_linger();
        }
    }
}

struct Broken {
    side: Side,
    error: io::Error,
}

impl From<Broken> for End {
    fn from(Broken { side, error }: Broken) -> Self {
        match error.kind() {
            // EPIPE: the reset was reported before, to the other direction or not at all.
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Reset(side),
            _ => Self::Failed(side, error),
        }
    }
}

/// What a direction holds between polls.
enum Held {
    Nothing,
    /// `buffer[start..end]` is yet to be written.
    Buffer {
        buffer: Scratch,
        start: usize,
        end: usize,
    },
    /// The pipe's content is yet to be written.
    Pipe(Pipe),
    /// The source has ended; the sink is yet to be told.
    End,
    /// The sink knows.
    Done,
}

struct Direction<'a> {
    from: Side,
    source: ReadHalf<'a>,
    sink: WriteHalf<'a>,
    count: &'a AtomicU64,
    held: Held,
    bulk: bool,
    /// The other direction has ended: both connections are closed with this one, which tells the sink of the end.
    last: bool,
}

impl<'a> Direction<'a> {
    fn new(from: Side, source: ReadHalf<'a>, sink: WriteHalf<'a>, count: &'a AtomicU64) -> Self {
        Self { from, source, sink, count, held: Held::Nothing, bulk: false, last: false }
    }

    /// Ready when the end of the source has been passed on, or when something broke.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        for _ in 0..MOVES_PER_POLL {
            match &mut self.held {
                Held::Nothing => ready!(self.poll_fill(cx)).map_err(|error| self.source_broke(error))?,
                Held::Buffer { .. } | Held::Pipe(_) => {
                    ready!(self.poll_drain(cx)).map_err(|error| self.sink_broke(error))?;
                }
                Held::End if self.last => self.held = Held::Done,
                Held::End => {
                    ready!(Pin::new(&mut self.sink).poll_shutdown(cx))
                        .map_err(|error| self.sink_broke(error))?;
                    self.held = Held::Done;
                }
                Held::Done => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes bytes from the source. Pending leaves nothing held.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.bulk
            && let Some(pipe) = Pipe::take()
        {
            return self.poll_splice(cx, pipe);
        }
        // Readiness first, so that an idle connection doesn't take a buffer in order to learn that it is.
        ready!(self.source.as_ref().poll_read_ready(cx))?;
        let mut buffer = Scratch::take();
        let mut target = ReadBuf::new(&mut buffer);
        ready!(Pin::new(&mut self.source).poll_read(cx, &mut target))?;
        let end = target.filled().len();
        self.bulk = end >= BULK;
        self.held = if end == 0 { Held::End } else { Held::Buffer { buffer, start: 0, end } };
        Poll::Ready(Ok(()))
    }

    fn poll_splice(&mut self, cx: &mut Context<'_>, mut pipe: Pipe) -> Poll<io::Result<()>> {
        let source = self.source.as_ref();
        loop {
            ready!(source.poll_read_ready(cx))?;
            match source.try_io(Interest::READABLE, || pipe.fill(source)) {
                Ok(0) => self.held = Held::End,
                Ok(moved) => {
                    self.bulk = moved >= BULK;
                    self.held = Held::Pipe(pipe);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Poll::Ready(Err(error)),
            }
            return Poll::Ready(Ok(()));
        }
    }

    /// Writes what is held until the sink is full.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let moved = match &mut self.held {
                Held::Buffer { buffer, start, end } if *start < *end => {
                    let rest = buffer.get(*start..*end).unwrap_or_default();
                    let moved = ready!(Pin::new(&mut self.sink).poll_write(cx, rest))?;
                    *start += moved;
                    moved
                }
                Held::Pipe(pipe) if pipe.len() > 0 => {
                    let sink = self.sink.as_ref();
                    ready!(sink.poll_write_ready(cx))?;
                    match sink.try_io(Interest::WRITABLE, || pipe.drain(sink)) {
                        Ok(moved) => moved,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                _ => {
                    self.held = Held::Nothing;
                    return Poll::Ready(Ok(()));
                }
            };
            if moved == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.count.fetch_add(moved as u64, Ordering::Relaxed);
        }
    }

    fn source_broke(&self, error: io::Error) -> Broken {
        Broken { side: self.from, error }
    }

    fn sink_broke(&self, error: io::Error) -> Broken {
        let side = match self.from {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        };
        Broken { side, error }
    }
}
