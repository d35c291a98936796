//! Tunnels whose application does not read, beside others that want to go on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hbone::{
    ConnectRequest, Memory, Outcome, Pool, PoolSettings, PumpLimits, ServerSettings, Traffic, Transport,
    TunnelError, TunnelHeaders, pump,
};
use support::Net;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// What the application at a tunnel's end does.
#[derive(Clone, Copy, PartialEq, Debug)]
enum App {
    /// Sends back what comes.
    Echo = 1,
    /// Takes nothing.
    Deaf,
    /// Sends without end, and takes nothing.
    Source,
    /// Takes all that comes.
    Sink,
}

async fn act(app: App, mut io: DuplexStream, taken: Arc<AtomicUsize>) {
    match app {
        App::Echo => {
            let (mut read, mut write) = tokio::io::split(io);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        }
        App::Deaf => {
            let _io = io;
            std::future::pending::<()>().await;
        }
        App::Source => {
            let block = vec![7; 64 * 1024];
            while io.write_all(&block).await.is_ok() {}
        }
        App::Sink => {
            let mut block = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = io.read(&mut block).await {
                taken.fetch_add(n, Ordering::SeqCst);
            }
        }
    }
}

/// A pool whose servers' applications do what the port of the request says.
struct World {
    pool: Pool<Net>,
    /// What sinks have taken.
    taken: Arc<AtomicUsize>,
    /// How the servers' pumps ended.
    outcomes: mpsc::UnboundedReceiver<Outcome>,
}

fn world(server: Transport, client: Transport) -> World {
    let taken = Arc::<AtomicUsize>::default();
    let (tell, outcomes) = mpsc::unbounded_channel();
    let counter = Arc::clone(&taken);
    let handler: support::Handler = Arc::new(move |incoming| {
        let port = incoming.authority.socket_addr().unwrap().port();
        let apps = [App::Echo, App::Deaf, App::Source, App::Sink];
        let app = *apps.iter().find(|app| **app as u16 == port).unwrap();
        let (near, far) = tokio::io::duplex(64 * 1024);
        tokio::spawn(act(app, far, Arc::clone(&counter)));
        let tell = tell.clone();
        tokio::spawn(async move {
            let Ok(tunnel) = incoming.accept(&TunnelHeaders::default()) else { return };
            let _ = tell.send(pump(tunnel, near, &Traffic::default(), PumpLimits::default()).await);
        });
    });
    let mut net = Net::new(handler);
    net.settings = ServerSettings { transport: server, ..ServerSettings::default() };
    let settings = PoolSettings { transport: client, spread: 1, ..PoolSettings::default() };
    World { pool: Pool::new(net, settings), taken, outcomes }
}

impl World {
    /// A tunnel to an application; what is returned is our application's end, and how the pump ends.
    async fn tunnel(&self, key: u32, to: App) -> (DuplexStream, JoinHandle<Outcome>) {
        let authority = format!("10.0.0.1:{}", to as u16).parse().unwrap();
        let request = ConnectRequest { authority, headers: TunnelHeaders::default() };
        let opened = timeout(Duration::from_secs(60), self.pool.open(&key, &request)).await.unwrap().unwrap();
        let (near, far) = tokio::io::duplex(64 * 1024);
        let pumping = tokio::spawn(async move {
            pump(opened.tunnel, near, &Traffic::default(), PumpLimits::default()).await
        });
        (far, pumping)
    }
}

async fn read(io: &mut DuplexStream, bytes: usize) {
    let mut block = vec![0; 64 * 1024];
    let mut left = bytes;
    while left > 0 {
        let n = io.read(&mut block).await.unwrap();
        assert!(n > 0, "it ended with {left} of {bytes} bytes missing");
        left = left.saturating_sub(n);
    }
}

/// Writes until nothing goes for a second.
async fn fill(io: &mut DuplexStream) -> usize {
    let block = vec![1; 64 * 1024];
    let mut filled = 0;
    while let Ok(Ok(n)) = timeout(Duration::from_secs(1), io.write(&block)).await {
        filled += n;
    }
    filled
}

#[tokio::test(start_paused = true)]
async fn downloads_that_are_not_read_hold_up_no_others() {
    let world = world(Transport::default(), Transport::default());
    let mut stalled = Vec::new();
    for _ in 0..8 {
        stalled.push(world.tunnel(1, App::Source).await);
    }
    sleep(Duration::from_secs(5)).await;
    let mut live = world.tunnel(1, App::Source).await.0;
    timeout(Duration::from_secs(60), read(&mut live, 40 << 20)).await.expect("held up by others");
    assert_eq!(world.pool.connector().made(), 1, "the test is about one connection");
    // And those that come back to it find all that was there.
    for (io, _) in &mut stalled {
        timeout(Duration::from_secs(60), read(io, 10 << 20)).await.expect("never went on");
    }
}

#[tokio::test(start_paused = true)]
async fn uploads_that_are_not_read_hold_up_no_others() {
    let world = world(Transport::default(), Transport::default());
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let (mut io, pump) = world.tunnel(1, App::Deaf).await;
        let filled = fill(&mut io).await;
        assert!((4 << 20..6 << 20).contains(&filled), "{filled}: not the stream's window");
        stalled.push((io, pump));
    }
    let (mut live, _pump) = world.tunnel(1, App::Sink).await;
    let block = vec![1; 1 << 20];
    for _ in 0..40 {
        timeout(Duration::from_secs(60), live.write_all(&block)).await.expect("held up by others").unwrap();
    }
    live.shutdown().await.unwrap();
    timeout(Duration::from_secs(60), async {
        while world.taken.load(Ordering::SeqCst) < 40 << 20 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("held up by others");
    assert_eq!(world.pool.connector().made(), 1, "the test is about one connection");
}

#[tokio::test(start_paused = true)]
async fn what_all_tunnels_hold_is_limited_and_who_reads_is_spared() {
    let memory = Memory::with_limit(8 << 20);
    let server = Transport { stream_window: 1 << 20, memory, ..Transport::default() };
    let mut world = world(server, Transport::default());
    let (mut live, live_pump) = world.tunnel(1, App::Echo).await;
    let mut most = 0;
    let mut stalled = Vec::new();
    // Many that take nothing, over several connections; one of them all the while is used.
    for n in 0..64 {
        let (mut io, pump) = world.tunnel(n % 4, App::Deaf).await;
        fill(&mut io).await;
        stalled.push((io, pump));
        most = most.max(memory.held());
        let exchange = async {
            live.write_all(&[9; 50_000]).await.unwrap();
            live.read_exact(&mut [0; 50_000]).await.unwrap();
        };
        timeout(Duration::from_secs(1), exchange).await.expect("held up by others");
    }
    assert!(most <= memory.limit() && memory.held() <= memory.limit(), "{most} of {}", memory.limit());
    // 64 MiB came, and at least one cut for each that does not fit.
    assert!((56..64).contains(&memory.cut()), "{}", memory.cut());
    assert_eq!(memory.holders() as u64, 64 - memory.cut());
    for _ in 0..memory.cut() {
        let outcome = world.outcomes.recv().await.unwrap();
        let expected =
            matches!(&outcome, Outcome::Tunnel(TunnelError::NotTaken { limit, .. }) if *limit == 8 << 20);
        assert!(expected, "{outcome}");
    }
    // The clients of those that were cut are told with a reset.
    let cut = usize::try_from(memory.cut()).unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(stalled.iter().filter(|(_, pump)| pump.is_finished()).count(), cut);
    assert!(!live_pump.is_finished());
    // All of it is given back when they end.
    drop((stalled, live));
    world.pool.abort(|_| true);
    sleep(Duration::from_secs(1)).await;
    assert_eq!((memory.held(), memory.holders()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn slow_readers_share_what_there_is_and_are_not_cut() {
    let memory = Memory::with_limit(32 << 20);
    let client = Transport { stream_window: 1 << 20, memory, ..Transport::default() };
    let world = world(Transport::default(), client);
    let mut readers = Vec::new();
    let start = Instant::now();
    // Together they would hold 100 MiB. They read 0.5 to 2.4 MB a second.
    for piece in [25_000, 80_000, 120_000].into_iter().cycle().take(100) {
        let (mut io, pump) = world.tunnel(1, App::Source).await;
        readers.push(tokio::spawn(async move {
            let mut block = vec![0; piece];
            for _ in 0..800 {
                if io.read_exact(&mut block).await.is_err() {
                    panic!("ended early: {}", pump.await.unwrap());
                }
                sleep(Duration::from_millis(50)).await;
            }
            drop(pump);
        }));
        sleep(Duration::from_millis(200)).await;
    }
    sleep(Duration::from_secs(20)).await;
    assert!(memory.held() <= memory.limit() / 2, "{} are held", memory.held());
    for reader in readers {
        reader.await.unwrap();
    }
    assert_eq!(memory.cut(), 0);
    assert!(start.elapsed() < Duration::from_secs(80), "they were held up: {:?}", start.elapsed());
    // When there is room again, whoever reads has the whole window.
    let (mut io, _pump) = world.tunnel(1, App::Source).await;
    sleep(Duration::from_secs(1)).await;
    assert!(memory.held() >= 900_000, "{}", memory.held());
    timeout(Duration::from_secs(20), read(&mut io, 20 << 20)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_ahead_of_the_answer_counts() {
    use support::raw::*;
    let memory = Memory::with_limit(1 << 20);
    let settings = ServerSettings {
        transport: Transport { stream_window: 256 * 1024, memory, ..Transport::default() },
        ..ServerSettings::default()
    };
    // Applications that can't be reached for long.
    let handler: support::Handler = Arc::new(|mut incoming| {
        tokio::spawn(async move {
            tokio::select! {
                () = sleep(Duration::from_secs(20)) => {}
                error = incoming.given_up() => {
                    assert!(matches!(error, TunnelError::NotTaken { .. }), "{error}");
                    return;
                }
            }
            let mut tunnel = incoming.accept(&TunnelHeaders::default()).unwrap();
            let mut got = Vec::new();
            tunnel.read_to_end(&mut got).await.unwrap();
            assert!(got.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
            tunnel.write_all(&(got.len() as u32).to_be_bytes()).await.unwrap();
            tunnel.shutdown().await.unwrap();
        });
    });
    let (mut raw, served) = support::hostile_over(1 << 20, settings, handler);
    raw.begin().await;
    while raw.next().await.unwrap().kind != SETTINGS {}
    raw.send(SETTINGS, ACK, 0, &[]).await;
    let data: Vec<u8> = (0..200_000).map(|at| (at % 251) as u8).collect();
    let streams = (0..40).map(|n| 2 * n + 1);
    for stream in streams.clone() {
        raw.connect(stream, "10.0.0.1:80").await;
        let pieces: Vec<_> = data.chunks(10_000).collect();
        for (at, piece) in pieces.iter().enumerate() {
            let flags = if at + 1 == pieces.len() { END_STREAM } else { 0 };
            raw.send(DATA, flags, stream, piece).await;
        }
    }
    // Windows are not what is tested here.
    raw.send(WINDOW_UPDATE, 0, 0, &(1u32 << 20).to_be_bytes()).await;
    let (mut reset, mut answered) = (0, 0);
    while reset + answered < streams.len() {
        let frame = timeout(Duration::from_secs(60), raw.next_answer()).await.unwrap();
        let Some(frame) = frame else {
            panic!("{reset} reset, {answered} answered: {:?}", served.task.await)
        };
        assert!(memory.held() <= memory.limit(), "{}", memory.held());
        match frame.kind {
            RST_STREAM => reset += 1,
            DATA if !frame.payload.is_empty() => {
                assert_eq!(frame.payload, 200_000u32.to_be_bytes());
                answered += 1;
            }
            _ => {}
        }
    }
    assert_eq!(reset as u64, memory.cut());
    assert!((3..=5).contains(&answered), "{answered} of 200,000 bytes each fit 1 MiB");
    assert_eq!(memory.held(), 0);
}
