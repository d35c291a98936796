//! Two applications, two pumps, one tunnel between them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use hbone::{
    AppIo, ErrorCode, Outcome, Pool, PoolSettings, PumpLimits, ServerSettings, Side, Traffic, Transport,
    TunnelError, TunnelHeaders, pump,
};
use proptest::prelude::*;
use support::{Handler, Net, request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// The proxy's side of an application's connection, which can be reset by either side.
struct App {
    io: DuplexStream,
    state: Arc<AppState>,
}

#[derive(Default)]
struct AppState {
    /// The application has reset the connection.
    broken: AtomicBool,
    /// The proxy has.
    aborted: AtomicBool,
}

impl App {
    fn check(&self) -> io::Result<()> {
        if self.state.broken.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

impl AppIo for App {
    fn abort(&mut self) {
        self.state.aborted.store(true, Ordering::SeqCst);
    }
}

impl AsyncRead for App {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for App {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// The application's end.
struct End {
    io: DuplexStream,
    state: Arc<AppState>,
}

impl End {
    /// Resets the connection: all that was not read or delivered is lost.
    fn reset(self) {
        self.state.broken.store(true, Ordering::SeqCst);
    }

    fn was_reset(&self) -> bool {
        self.state.aborted.load(Ordering::SeqCst)
    }
}

fn app(pipe: usize) -> (App, End) {
    let (near, far) = tokio::io::duplex(pipe);
    let state = Arc::<AppState>::default();
    (App { io: near, state: Arc::clone(&state) }, End { io: far, state })
}

/// A tunnel with a pump and an application at both ends.
struct Path {
    client: End,
    server: End,
    client_traffic: Arc<Traffic>,
    server_traffic: Arc<Traffic>,
    client_pump: JoinHandle<Outcome>,
    server_pump: JoinHandle<Outcome>,
    _pool: Pool<Net>,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Pipes of the applications and of the connection.
    pipes: (usize, usize, usize),
    stream_window: u32,
    idle: Option<Duration>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { pipes: (4096, 4096, 64 * 1024), stream_window: 4 << 20, idle: None }
    }
}

async fn path(shape: Shape) -> Path {
    let transport = Transport { stream_window: shape.stream_window, ..Transport::default() };
    let limits = PumpLimits { idle_timeout: shape.idle };
    let (server_app, server) = app(shape.pipes.0);
    let (tell, pumping) = oneshot::channel();
    let given = Mutex::new(Some((server_app, tell)));
    let server_traffic = Arc::<Traffic>::default();
    let traffic = Arc::clone(&server_traffic);
    let handler: Handler = Arc::new(move |incoming| {
        let (app, tell) = given.lock().unwrap().take().unwrap();
        let tunnel = incoming.accept(&TunnelHeaders::default()).unwrap();
        let traffic = Arc::clone(&traffic);
        let _ = tell.send(tokio::spawn(async move { pump(tunnel, app, traffic, limits).await }));
    });
    let mut net = Net::new(handler);
    net.pipe = shape.pipes.2;
    net.settings = ServerSettings { transport, ..ServerSettings::default() };
    let pool = Pool::new(net, PoolSettings { transport, ..PoolSettings::default() });
    let opened = pool.open(&1, &request()).await.unwrap();
    let (client_app, client) = app(shape.pipes.1);
    let client_traffic = Arc::<Traffic>::default();
    let traffic = Arc::clone(&client_traffic);
    let client_pump = tokio::spawn(async move { pump(opened.tunnel, client_app, traffic, limits).await });
    let server_pump = pumping.await.unwrap();
    Path { client, server, client_traffic, server_traffic, client_pump, server_pump, _pool: pool }
}

#[tokio::test(start_paused = true)]
async fn each_direction_ends_on_its_own() {
    let Path { mut client, mut server, client_pump, server_pump, client_traffic, server_traffic, .. } =
        path(Shape::default()).await;
    client.io.write_all(b"request").await.unwrap();
    client.io.shutdown().await.unwrap();
    let mut got = Vec::new();
    server.io.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"request");
    // Long after the client has finished, the server may still speak.
    sleep(Duration::from_secs(3600)).await;
    let answer = vec![9; 300_000];
    let write = async {
        server.io.write_all(&answer).await.unwrap();
        server.io.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let ((), read) = tokio::join!(write, client.io.read_to_end(&mut got));
    read.unwrap();
    assert!(got == answer);
    assert!(matches!(client_pump.await.unwrap(), Outcome::Finished(Side::App)));
    assert!(matches!(server_pump.await.unwrap(), Outcome::Finished(Side::Tunnel)));
    assert_eq!((client_traffic.to_tunnel(), client_traffic.from_tunnel()), (7, 300_000));
    assert_eq!((server_traffic.to_tunnel(), server_traffic.from_tunnel()), (300_000, 7));
    assert!(!client.was_reset() && !server.was_reset());
}

#[tokio::test(start_paused = true)]
async fn the_server_may_speak_and_end_first() {
    let Path { mut client, mut server, client_pump, server_pump, .. } = path(Shape::default()).await;
    server.io.write_all(b"220 ready").await.unwrap();
    server.io.shutdown().await.unwrap();
    let mut got = Vec::new();
    client.io.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"220 ready");
    client.io.write_all(b"bye").await.unwrap();
    drop(client);
    let mut got = Vec::new();
    server.io.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"bye");
    assert!(matches!(client_pump.await.unwrap(), Outcome::Finished(Side::Tunnel)));
    assert!(matches!(server_pump.await.unwrap(), Outcome::Finished(Side::App)));
}

#[tokio::test(start_paused = true)]
async fn an_applications_reset_reaches_the_other_application() {
    for client_resets in [true, false] {
        let Path { mut client, mut server, client_pump, server_pump, .. } = path(Shape::default()).await;
        client.io.write_all(b"hello").await.unwrap();
        server.io.write_all(b"hello").await.unwrap();
        client.io.read_exact(&mut [0; 5]).await.unwrap();
        server.io.read_exact(&mut [0; 5]).await.unwrap();
        let (resetting, other, pumps) = if client_resets {
            (client, server, (client_pump, server_pump))
        } else {
            (server, client, (server_pump, client_pump))
        };
        resetting.reset();
        assert!(matches!(pumps.0.await.unwrap(), Outcome::App(_)));
        let outcome = pumps.1.await.unwrap();
        let reset = TunnelError::Reset(ErrorCode::CONNECT_ERROR);
        assert!(matches!(&outcome, Outcome::Tunnel(error) if *error == reset), "{outcome}");
        assert!(other.was_reset());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_of_an_application_that_had_finished_is_seen_with_the_next_byte_for_it() {
    let Path { mut client, mut server, client_pump, server_pump, .. } = path(Shape::default()).await;
    // The server's side has finished; then its application dies.
    server.io.shutdown().await.unwrap();
    assert_eq!(client.io.read(&mut [0; 1]).await.unwrap(), 0);
    sleep(Duration::from_secs(1)).await;
    server.reset();
    client.io.write_all(b"x").await.unwrap();
    let outcome = server_pump.await.unwrap();
    assert!(matches!(outcome, Outcome::App(_)), "{outcome}");
    let outcome = client_pump.await.unwrap();
    assert!(matches!(outcome, Outcome::Tunnel(TunnelError::Reset(_))), "{outcome}");
    assert!(client.was_reset());
}

#[tokio::test(start_paused = true)]
async fn a_pump_that_is_cut_resets_both_applications() {
    let Path { client, server, client_pump, server_pump, .. } = path(Shape::default()).await;
    sleep(Duration::from_secs(1)).await;
    client_pump.abort();
    let outcome = server_pump.await.unwrap();
    assert!(matches!(outcome, Outcome::Tunnel(TunnelError::Reset(_))), "{outcome}");
    assert!(client.was_reset() && server.was_reset());
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_connection_resets_the_applications() {
    let path = path(Shape::default()).await;
    path._pool.abort(|_| true);
    for pump in [path.client_pump, path.server_pump] {
        let outcome = pump.await.unwrap();
        assert!(matches!(outcome, Outcome::Tunnel(TunnelError::Connection(_))), "{outcome}");
    }
    assert!(path.client.was_reset() && path.server.was_reset());
}

#[tokio::test(start_paused = true)]
async fn idleness_ends_a_tunnel_only_where_that_is_asked_for() {
    let mut busy = path(Shape { idle: Some(Duration::from_secs(60)), ..Shape::default() }).await;
    for _ in 0..10 {
        sleep(Duration::from_secs(40)).await;
        busy.client.io.write_all(b"x").await.unwrap();
        assert_eq!(busy.server.io.read_u8().await.unwrap(), b'x');
    }
    sleep(Duration::from_secs(121)).await;
    assert!(busy.client_pump.is_finished() && busy.server_pump.is_finished());
    let (a, b) = (busy.client_pump.await.unwrap(), busy.server_pump.await.unwrap());
    assert!(matches!((&a, &b), (Outcome::Idle, _) | (_, Outcome::Idle)), "{a} {b}");
    assert!(busy.client.was_reset() && busy.server.was_reset());

    let mut idle = path(Shape::default()).await;
    sleep(Duration::from_secs(24 * 3600)).await;
    idle.server.io.write_all(b"y").await.unwrap();
    assert_eq!(idle.client.io.read_u8().await.unwrap(), b'y');
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_stops_holds_back_the_writer_and_loses_nothing() {
    let shape = Shape { stream_window: 256 * 1024, ..Shape::default() };
    let Path { mut client, mut server, client_traffic, .. } = path(shape).await;
    let writer = tokio::spawn(async move {
        let mut block = [0; 1000];
        for at in 0..5_000 {
            block.fill(at as u8);
            client.io.write_all(&block).await.unwrap();
        }
        client.io.shutdown().await.unwrap();
        client
    });
    sleep(Duration::from_secs(60)).await;
    // The window, what waits for it, and the pipes.
    assert!(client_traffic.to_tunnel() <= 700_000, "{}", client_traffic.to_tunnel());
    let mut block = [0; 1000];
    for at in 0..5_000 {
        server.io.read_exact(&mut block).await.unwrap();
        assert!(block == [at as u8; 1000]);
    }
    assert_eq!(server.io.read(&mut block).await.unwrap(), 0);
    writer.await.unwrap();
}

/// What an application does, in turn.
#[derive(Clone, Debug)]
enum Act {
    Write { bytes: usize, piece: usize },
    Read { bytes: usize },
    Wait { millis: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    /// Finish sending, then read to the end.
    Orderly,
    /// Read to the end, then finish sending.
    AfterPeer,
    Reset,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0usize..300_000, 1usize..70_000).prop_map(|(bytes, piece)| Act::Write { bytes, piece }),
        3 => (0usize..300_000).prop_map(|bytes| Act::Read { bytes }),
        1 => (0u64..50).prop_map(|millis| Act::Wait { millis }),
    ];
    proptest::collection::vec(act, 0..6)
}

/// The byte at a position of each direction's stream.
fn byte(side: u8, at: usize) -> u8 {
    (at.wrapping_mul(31) >> 3) as u8 ^ (at as u8) ^ side
}

#[derive(Debug, Default)]
struct Result_ {
    wrote: usize,
    read: usize,
    /// The peer's end of stream was seen.
    eof: bool,
    wrong: bool,
}

/// Acts out a script: one task reads and one writes, so that two writers never wait for each other for ever.
async fn play(mut end: End, side: u8, script: Vec<Act>, ending: Ending) -> Result_ {
    let mut result = Result_::default();
    let (reading, writing) = tokio::io::split(&mut end.io);
    let (wanted, want) = mpsc::unbounded_channel();
    let (eof_seen, saw_eof) = oneshot::channel();
    let reader = async {
        let done = read_as_asked(reading, 1 - side, want, ending).await;
        let _ = eof_seen.send(());
        done
    };
    let writer = write_script(writing, side, script, wanted, ending, saw_eof);
    ((result.read, result.eof, result.wrong), result.wrote) = tokio::join!(reader, writer);
    if ending == Ending::Reset {
        end.reset();
    }
    result
}

/// Reads as many bytes as it is asked for, then to the end. How many came, whether the end did, and whether any byte
/// was not what the other side writes.
async fn read_as_asked(
    mut reading: impl AsyncRead + Unpin,
    from: u8,
    mut want: mpsc::UnboundedReceiver<usize>,
    ending: Ending,
) -> (usize, bool, bool) {
    let mut buffer = vec![0; 65_536];
    let (mut read, mut eof, mut wrong) = (0, false, false);
    let mut more = |n: usize, read: &mut usize, buffer: &[u8]| {
        wrong |= buffer[..n].iter().enumerate().any(|(at, got)| *got != byte(from, *read + at));
        *read += n;
    };
    // Whoever is asked for nothing for a second reads all the same: two applications that only write would wait
    // for each other for ever, tunnel or not.
    let patience = Duration::from_secs(1);
    loop {
        let bytes = match timeout(patience, want.recv()).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break,
            Err(_) => 100_000,
        };
        let target = read + bytes;
        while read < target && !eof {
            let room = buffer.len().min(target - read);
            match timeout(patience, reading.read(&mut buffer[..room])).await {
                Ok(Ok(0)) => eof = true,
                Ok(Ok(n)) => more(n, &mut read, &buffer),
                Ok(Err(_)) => return (read, eof, wrong),
                Err(_) => break,
            }
        }
    }
    while ending != Ending::Reset && !eof {
        match reading.read(&mut buffer).await {
            Ok(0) => eof = true,
            Ok(n) => more(n, &mut read, &buffer),
            Err(_) => break,
        }
    }
    (read, eof, wrong)
}

/// Writes what the script says, passing on what it wants read, and ends as it should. How many bytes it wrote.
async fn write_script(
    mut writing: impl AsyncWrite + Unpin,
    side: u8,
    script: Vec<Act>,
    wanted: mpsc::UnboundedSender<usize>,
    ending: Ending,
    saw_eof: oneshot::Receiver<()>,
) -> usize {
    let mut wrote = 0;
    for act in script {
        match act {
            Act::Write { bytes, piece } => {
                let data: Vec<u8> = (wrote..wrote + bytes).map(|at| byte(side, at)).collect();
                let mut left = data.as_slice();
                while !left.is_empty() {
                    match writing.write(&left[..piece.min(left.len())]).await {
                        Ok(n) => (wrote, left) = (wrote + n, &left[n..]),
                        Err(_) => return wrote,
                    }
                }
            }
            Act::Read { bytes } => drop(wanted.send(bytes)),
            Act::Wait { millis } => sleep(Duration::from_millis(millis)).await,
        }
    }
    drop(wanted);
    if ending == Ending::AfterPeer {
        let _ = saw_eof.await;
    }
    if ending != Ending::Reset {
        let _ = writing.shutdown().await;
    }
    wrote
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_read_is_what_was_written(
        client in acts(),
        server in acts(),
        endings in prop_oneof![
            4 => Just((Ending::Orderly, Ending::Orderly)),
            2 => Just((Ending::AfterPeer, Ending::Orderly)),
            2 => Just((Ending::Orderly, Ending::AfterPeer)),
            1 => Just((Ending::Reset, Ending::Orderly)),
            1 => Just((Ending::Orderly, Ending::Reset)),
            1 => Just((Ending::Reset, Ending::Reset)),
        ],
        // Through a pipe of one byte the longest of these scripts would take minutes.
        pipes in (64usize..20_000, 64usize..20_000, 100usize..100_000),
        stream_window in 65_535u32..500_000,
    ) {
        let shape = Shape { pipes, stream_window, idle: None };
        let (results, outcomes) = runtime().block_on(async {
            let path = path(shape).await;
            let client = tokio::spawn(play(path.client, 0, client, endings.0));
            let server = tokio::spawn(play(path.server, 1, server, endings.1));
            let all = async {
                (
                    (client.await.unwrap(), server.await.unwrap()),
                    (path.client_pump.await.unwrap(), path.server_pump.await.unwrap()),
                )
            };
            timeout(Duration::from_secs(3600), all).await.expect("it hangs")
        });
        let (client, server) = &results;
        prop_assert!(!client.wrong && !server.wrong, "{results:?}");
        prop_assert!(client.read <= server.wrote && server.read <= client.wrote, "{results:?}");
        if endings.0 != Ending::Reset && endings.1 != Ending::Reset {
            prop_assert!(client.eof && server.eof, "{results:?} {outcomes:?}");
            prop_assert_eq!((client.read, server.read), (server.wrote, client.wrote));
            prop_assert!(outcomes.0.is_finished() && outcomes.1.is_finished(), "{outcomes:?}");
        }
    }
}

/// A connected pair of TCP connections on loopback.
async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn tcp_resets_and_ends_pass_through() {
    for reset in [true, false] {
        let (mut server, server_side) = tcp().await;
        let given = Mutex::new(Some(server_side));
        let handler: Handler = Arc::new(move |incoming| {
            let app = given.lock().unwrap().take().unwrap();
            let tunnel = incoming.accept(&TunnelHeaders::default()).unwrap();
            tokio::spawn(async move { pump(tunnel, app, &Traffic::default(), PumpLimits::default()).await });
        });
        let pool = support::pool(Net::new(handler));
        let opened = pool.open(&1, &request()).await.unwrap();
        let (mut client, client_side) = tcp().await;
        let traffic = Traffic::default();
        let pumping = pump(opened.tunnel, client_side, &traffic, PumpLimits::default());
        let apps = async {
            client.write_all(b"hello").await.unwrap();
            server.read_exact(&mut [0; 5]).await.unwrap();
            if reset {
                server.set_zero_linger().unwrap();
                drop(server);
                let error = client.read_u8().await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            } else {
                drop(server);
                assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
                drop(client);
            }
        };
        let (outcome, ()) = tokio::join!(pumping, apps);
        assert_eq!(outcome.is_finished(), !reset, "{outcome}");
    }
}
