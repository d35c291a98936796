//! What peers can make us hold, and what idle connections cost. One test at a time: they look at the process's
//! resident memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::time::Duration;

use hbone::{
    Closed, Control, Memory, Pool, PoolSettings, PumpLimits, ServerSettings, Traffic, Transport, pump,
};
use support::raw::*;
use support::{Net, echo, hostile_over, request, resident};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;

const FLOW_CONTROL_ERROR: u32 = 3;

async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

#[tokio::test(start_paused = true)]
async fn header_blocks_without_end_are_cut_off() {
    let _alone = alone().await;
    // A block that goes on, in pieces of the size given.
    for size in [0, 1, 1000, 16_000] {
        let (mut raw, served) = hostile_over(1 << 20, ServerSettings::default(), echo());
        raw.begin().await;
        let before = resident();
        raw.send(HEADERS, 0, 1, &[]).await;
        let mut piece = Vec::new();
        while piece.len() + 40 < size {
            piece.extend(block(&[("x-filler", "0123456789")]));
        }
        for _ in 0..20_000 {
            if raw.io.write_all(&frame(CONTINUATION, 0, 1, &piece)).await.is_err() {
                break;
            }
        }
        let closed = timeout(Duration::from_secs(60), served.task).await.expect("never ended").unwrap();
        assert!(matches!(closed, Closed::Protocol(_)), "{size}: {closed:?}");
        assert!(resident() < before + (32 << 20), "{size}: {} to {}", before, resident());
    }
}

#[tokio::test(start_paused = true)]
async fn a_header_bomb_is_bounded_by_its_decoded_size() {
    let _alone = alone().await;
    let (mut raw, served) = hostile_over(1 << 20, ServerSettings::default(), echo());
    raw.begin().await;
    // One entry of 3,000 bytes in the dynamic table, and then 60,000 references of one byte to it.
    let mut bomb = vec![0x40];
    bomb.extend(&block(&[("x", &"y".repeat(3000))])[1..]);
    bomb.extend(std::iter::repeat_n(0xbe, 60_000));
    let before = resident();
    raw.send(HEADERS, END_HEADERS, 1, &bomb).await;
    let answer = raw.next_answer().await;
    match answer {
        Some(frame) if frame.kind == GOAWAY => {
            let closed = served.task.await.unwrap();
            assert!(matches!(closed, Closed::Protocol(_)), "{closed:?}");
        }
        Some(frame) => assert!(Raw::is_status(&frame, 431) || frame.kind == RST_STREAM, "{frame:?}"),
        None => panic!("no answer"),
    }
    assert!(resident() < before + (32 << 20));
}

#[tokio::test(start_paused = true)]
async fn a_flood_from_a_peer_that_reads_no_answers_fills_no_memory() {
    let _alone = alone().await;
    for bytes in [frame(PING, 0, 0, &[0; 8]), frame(SETTINGS, 0, 0, &[])] {
        let (mut raw, served) = hostile_over(4096, ServerSettings::default(), echo());
        raw.begin().await;
        let before = resident();
        let many = bytes.repeat(1000);
        let write = async { while raw.io.write_all(&many).await.is_ok() {} };
        // The server stops reading when it can't answer, and finds the peer dead.
        let _ = timeout(Duration::from_secs(300), write).await;
        let closed = timeout(Duration::from_secs(1), served.task).await.expect("never ended").unwrap();
        assert!(matches!(closed, Closed::Flood(_) | Closed::PingTimeout), "{closed:?}");
        assert!(resident() < before + (16 << 20));
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_writer_is_bounded_by_its_window() {
    let _alone = alone().await;
    // The application reads nothing; the peer sends until its windows are used up.
    let settings = ServerSettings {
        transport: Transport {
            stream_window: 256 * 1024,
            connection_window: 1 << 20,
            ..Transport::default()
        },
        ..ServerSettings::default()
    };
    let handler = support::to_app(|app| async move {
        let _app = app;
        std::future::pending::<()>().await;
    });
    let (mut raw, served) = hostile_over(1 << 20, settings, handler);
    raw.begin().await;
    raw.connect(1, "10.0.0.1:80").await;
    while let Some(answer) = raw.next_answer().await {
        if Raw::is_status(&answer, 200) {
            break;
        }
    }
    // Exactly the window is fine, in frames of a few bytes too: they are gathered, not kept one by one.
    let before = resident();
    for _ in 0..(256 * 1024 / 4) {
        raw.send(DATA, 0, 1, b"abcd").await;
    }
    raw.send(PING, 0, 0, &[7; 8]).await;
    loop {
        let frame = raw.next().await.unwrap();
        if frame.kind == PING && frame.payload == [7; 8] {
            break;
        }
    }
    assert!(resident() < before + (16 << 20), "{before} to {}", resident());
    // One byte more breaks the stream, not the connection.
    raw.send(DATA, 0, 1, b"x").await;
    let answer = raw.next_answer().await.unwrap();
    assert_eq!((answer.kind, answer.stream, answer.code()), (RST_STREAM, 1, FLOW_CONTROL_ERROR));
    assert!(!served.task.is_finished());
}

#[tokio::test(start_paused = true)]
async fn an_attacker_with_many_stalled_tunnels_is_bounded_by_what_all_may_hold() {
    let _alone = alone().await;
    const STREAMS: u32 = 400;
    let memory = Memory::with_limit(8 << 20);
    let settings = ServerSettings {
        transport: Transport { stream_window: 256 * 1024, memory, ..Transport::default() },
        ..ServerSettings::default()
    };
    // The first application takes all, the others nothing.
    let first = std::sync::atomic::AtomicBool::new(true);
    let handler = support::to_app(move |mut app| {
        let first = first.swap(false, std::sync::atomic::Ordering::SeqCst);
        async move {
            if first {
                let _ = tokio::io::copy(&mut app, &mut tokio::io::sink()).await;
            }
            std::future::pending::<()>().await;
        }
    });
    let (mut raw, served) = hostile_over(1 << 20, settings, handler);
    raw.begin().await;
    while raw.next().await.unwrap().kind != SETTINGS {}
    raw.send(SETTINGS, ACK, 0, &[]).await;
    let before = resident();
    for stream in 0..STREAMS {
        raw.connect(2 * stream + 1, "10.0.0.1:80").await;
    }
    settle(&mut raw).await;
    // Single bytes for those that stall, each in a buffer with much for the one that does not.
    for round in 0..15 {
        for stream in 1..STREAMS {
            raw.send(DATA, 0, 2 * stream + 1, b"x").await;
            raw.send(DATA, 0, 1, &[0; 8000]).await;
            if stream % 16 == 0 {
                settle(&mut raw).await;
            }
        }
        assert!(memory.held() < 1 << 20, "{round}: {}", memory.held());
    }
    assert!(resident() < before + (24 << 20), "{before} to {}", resident());
    // And then all that the windows allow, 100 MiB.
    for stream in 1..STREAMS {
        for _ in 0..15 {
            raw.send(DATA, 0, 2 * stream + 1, &[0; 16_000]).await;
        }
        settle(&mut raw).await;
        assert!(memory.held() <= memory.limit(), "{} are held", memory.held());
    }
    println!("{} to {}", before, resident());
    assert!(resident() < before + (48 << 20), "{before} to {}", resident());
    assert!(memory.cut() > 300, "{} were cut", memory.cut());
    assert!(!served.task.is_finished());
}

/// Lets the server take all that was sent, and reads what it says.
async fn settle(raw: &mut Raw) {
    raw.send(PING, 0, 0, &[9; 8]).await;
    loop {
        let frame = raw.next().await.unwrap();
        if frame.kind == PING && frame.payload == [9; 8] {
            break;
        }
    }
}

/// The size of what a function returns.
fn size_of_output<A, B, C, D, O>(_: impl Fn(A, B, C, D) -> O) -> usize {
    size_of::<O>()
}

#[test]
fn futures_that_live_as_long_as_a_connection_are_small() {
    let pump = size_of_output(|tunnel, app: TcpStream, traffic: &'static Traffic, limits| {
        hbone::pump(tunnel, app, traffic, limits)
    });
    let serve = size_of_output(
        |io: TcpStream, settings: &'static ServerSettings, control: &'static Control, counters| {
            hbone::serve(io, settings, control, counters, |_| {})
        },
    );
    println!("pump {pump}, serve {serve}, tunnel {}", size_of::<hbone::Tunnel>());
    assert!(pump <= 288, "{pump} bytes for each tunnel");
    assert!(serve <= 1792, "{serve} bytes for each connection that is served");
    assert!(size_of::<hbone::Tunnel>() <= 112, "{}", size_of::<hbone::Tunnel>());
}

#[tokio::test]
async fn idle_tunnels_and_connections_cost_little() {
    let _alone = alone().await;
    // An application on both sides of each tunnel, and 64 KiB once in each direction, so that whatever is kept of
    // buffers is there.
    let handler = support::to_app(|mut app| async move {
        let mut block = vec![0; 64 * 1024];
        app.read_exact(&mut block).await.unwrap();
        app.write_all(&block).await.unwrap();
        drop(block);
        let _ = app.read_u8().await;
    });
    let settings = PoolSettings { spread: 1, ..PoolSettings::default() };
    let pool = Pool::new(Net::new(handler), settings);
    let mut apps = Vec::new();
    // The first ones pay for what is shared.
    let mut before = 0;
    for count in 0..1100 {
        if count == 100 {
            before = resident();
        }
        let opened = pool.open(&1, &request()).await.unwrap();
        let (near, mut far) = tokio::io::duplex(8 * 1024);
        tokio::spawn(
            async move { pump(opened.tunnel, near, &Traffic::default(), PumpLimits::default()).await },
        );
        let mut block = vec![0; 64 * 1024];
        far.write_all(&block).await.unwrap();
        far.read_exact(&mut block).await.unwrap();
        apps.push(far);
    }
    let each = (resident() - before) / 1000;
    println!("{each} bytes for an idle tunnel, both ends and both applications' pipes");
    // Four pipes of 8 KiB each are the test's own.
    assert!(each < 4 * 8 * 1024 + 9 * 1024, "{each}");

    // Connections with a tunnel each.
    let before = resident();
    let mut tunnels = Vec::new();
    for key in 10..510 {
        tunnels.push(pool.open(&key, &request()).await.unwrap());
    }
    let each = (resident() - before) / 500;
    println!("{each} bytes for an idle connection with a tunnel, both ends");
    assert!(each < 64 * 1024, "{each}");
}
