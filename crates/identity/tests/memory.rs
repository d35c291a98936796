//! What an idle connection holds.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use identity::{HandshakeLimits, TlsStream, accept, connect};
use mesh::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator as they come; only sizes are counted beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

type Pair = (TlsStream<TcpStream>, TlsStream<TcpStream>);

async fn open(mesh: &Mesh, listener: &TcpListener) -> Pair {
    let a = TcpStream::connect(listener.local_addr().unwrap());
    let (a, (b, _)) = tokio::try_join!(a, listener.accept()).unwrap();
    let (web, db, limits) = (id("shop/sa/web"), id("shop/sa/db"), HandshakeLimits::default());
    let (a, b) = tokio::join!(
        connect(a, &mesh.certificates, &web, db.clone().into(), limits),
        accept(b, &mesh.certificates, &db, limits)
    );
    (a.unwrap(), b.unwrap())
}

/// Moves a lot, so that every buffer was in use, then leaves the receiver waiting.
async fn exercise(from: &mut TlsStream<TcpStream>, to: &mut TlsStream<TcpStream>) {
    let data = vec![7; 1_000_000];
    let mut got = vec![0; data.len()];
    let send = async {
        from.write_all(&data).await.unwrap();
        from.flush().await.unwrap();
    };
    let receive = async {
        to.read_exact(&mut got).await.unwrap();
        let mut byte = [0];
        let more = tokio::time::timeout(Duration::from_millis(1), to.read(&mut byte)).await;
        assert!(more.is_err(), "it waits");
    };
    tokio::join!(send, receive);
}

#[tokio::test]
async fn an_idle_connection_holds_keys_and_no_buffers() {
    const CONNECTIONS: usize = 50;
    let mesh = Mesh::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // What is allocated once and kept.
    let (mut a, mut b) = open(&mesh, &listener).await;
    exercise(&mut a, &mut b).await;
    exercise(&mut b, &mut a).await;
    let mut connections = Vec::with_capacity(CONNECTIONS);
    let before = LIVE.load(Ordering::Relaxed);
    for _ in 0..CONNECTIONS {
        let (mut a, mut b) = open(&mesh, &listener).await;
        exercise(&mut a, &mut b).await;
        exercise(&mut b, &mut a).await;
        connections.push((a, b));
    }
    let each = (LIVE.load(Ordering::Relaxed) - before) / CONNECTIONS / 2;
    println!("{each} bytes an idle end of a connection, the runtime's share of its socket included");
    assert!(each < 4000, "{each} bytes an idle end of a connection");
}
