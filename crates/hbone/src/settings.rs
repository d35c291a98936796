//! What a connection may cost and how long it may wait.

use std::time::Duration;

use crate::memory::Memory;

/// The largest payload of a DATA frame that we accept. With its header it fills four TLS records, so that a stream of them
/// leaves no rest that takes a record, a write and a packet of its own; longer ones would only let one stream hold up the
/// others.
pub(crate) const FRAME_SIZE: u32 = 64 * 1024 - 9;

/// The largest window of a connection (RFC 9113 section 6.9.1), of a stream, and how many of these it has room for. A
/// stream's is what one bulk transfer needs at 10 Gbit/s and 3 ms, and so there are not more streams.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
const STREAM_WINDOW: u32 = 4 << 20;
const STREAMS: u32 = 500;
const _: () = assert!(STREAMS as u64 * STREAM_WINDOW as u64 <= CONNECTION_WINDOW as u64);

/// What `h2` may keep of DATA frames that are smaller than their own description, of one connection, until their
/// tunnels' tasks take them. By itself it would be half of the connection's window.
pub(crate) const SMALL_FRAMES: usize = 8 << 20;

/// How long a stream that was reset is remembered, so that what the peer had sent by then is passed over. Longer than
/// any round trip with its queues.
pub(crate) const RESET_MEMORY: Duration = Duration::from_secs(5);

/// Flow control and frame sizes, the same for both sides of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transport {
    /// The largest frame that we accept (SETTINGS_MAX_FRAME_SIZE), 16 KiB to 16 MiB - 1. A peer that announces a
    /// frame makes us hold a buffer of its size.
    pub frame_size: u32,
    /// What a peer may send on one stream ahead of its reader: the bound of a slow reader's memory.
    pub stream_window: u32,
    /// What a peer may send on all streams of a connection ahead of their readers. Readers that are slow must not use it
    /// up, for nothing goes to the others then; so it is that of as many streams as there may be. [`Memory`] bounds
    /// what is held.
    pub connection_window: u32,
    /// What is held for slow readers, of all connections that share it.
    pub memory: Memory,
    /// What a stream may hand to the connection ahead of the network.
    pub send_buffer: usize,
    /// The largest list of headers, as RFC 9113 section 6.5.2 counts it. A longer one is answered with 431.
    pub header_list: u32,
    /// A connection on which no frame came for this long is asked with a PING.
    pub ping_interval: Duration,
    /// A connection that doesn't answer a PING in this time is dead.
    pub ping_timeout: Duration,
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            frame_size: FRAME_SIZE,
            stream_window: STREAM_WINDOW,
            connection_window: CONNECTION_WINDOW,
            memory: Memory::of_process(),
            send_buffer: 4 * FRAME_SIZE as usize,
            header_list: 16 * 1024,
            ping_interval: Duration::from_secs(15),
            ping_timeout: Duration::from_secs(15),
        }
    }
}

impl Transport {
    /// `h2` panics on sizes outside what the protocol allows, so they are brought into it here.
    pub(crate) fn frame_size(&self) -> u32 {
        self.frame_size.clamp(16_384, (1 << 24) - 1)
    }

    /// Where a tunnel's data is counted, and how much of its window may be withheld: nothing where `streams` such windows
    /// could use up the connection's, since one tunnel would wait for another then.
    pub(crate) fn memory(&self, streams: usize) -> (Memory, u32) {
        let (stream, connection) = (Self::window(self.stream_window), Self::window(self.connection_window));
        let all = u64::from(stream).saturating_mul(streams as u64);
        let withholdable = if all <= u64::from(connection) { stream } else { 0 };
        (self.memory, withholdable)
    }

    /// See [`Transport::frame_size`].
    pub(crate) fn window(size: u32) -> u32 {
        size.clamp(65_535, (1 << 31) - 1)
    }
}

/// What a server allows a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerSettings {
    /// Sizes and keep-alive.
    pub transport: Transport,
    /// Streams open at a time, and tunnels that a handler may have at a time.
    pub max_streams: u32,
    /// For the client's preface, once the connection is secured.
    pub handshake_timeout: Duration,
    /// A connection without streams is ended after this time.
    pub idle_timeout: Duration,
    /// Streams that a client may open and reset before they are answered: at once, and per second in the long run.
    pub early_resets: (u32, u32),
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            transport: Transport { ping_interval: Duration::from_secs(30), ..Transport::default() },
            max_streams: STREAMS,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(600),
            early_resets: (200, 50),
        }
    }
}

/// What a pool may hold and how long its callers wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolSettings {
    /// Sizes and keep-alive.
    pub transport: Transport,
    /// Streams on one connection, unless the peer allows fewer.
    pub max_streams: usize,
    /// Connections to one peer that the pool opens to spread load: work on several cores, and several flow-control
    /// windows. More come only when all have `max_streams`.
    pub spread: usize,
    /// Streams on each of a peer's connections from which on another is opened, up to `spread`.
    pub spread_streams: usize,
    /// Bytes a second on a connection from which on it counts as busy, and another is opened, up to `spread`.
    pub spread_bytes_per_second: u64,
    /// Connections to all peers.
    pub max_connections: usize,
    /// Callers that may wait for one peer's connection.
    pub max_waiting: usize,
    /// To connect, secure the connection and begin HTTP/2.
    pub connect_timeout: Duration,
    /// For a stream on a connection, when all are taken.
    pub queue_timeout: Duration,
    /// From sending CONNECT to its response. The peer needs time to connect to its application.
    pub response_timeout: Duration,
    /// A connection without streams is ended after this time.
    pub idle_timeout: Duration,
    /// The most that is kept of early data until the response comes.
    pub early_data: usize,
}

impl Default for PoolSettings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            transport: Transport::default(),
            max_streams: STREAMS as usize,
            spread: cores.clamp(1, 4),
            spread_streams: 4,
            spread_bytes_per_second: 32 << 20,
            max_connections: 16_384,
            max_waiting: 4096,
            connect_timeout: Duration::from_secs(10),
            queue_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(300),
            early_data: 64 * 1024,
        }
    }
}
