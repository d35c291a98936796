//! What the generator talks to, and two small programs for the demo: one that speaks first, and one on UDP.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::EXCHANGE_BYTES;

/// Where [`serve_load`] answers each [`EXCHANGE_BYTES`] with as many.
pub const EXCHANGE_PORT: u16 = 7001;
/// Where it counts what it receives and answers the end of the stream with the count.
pub const SINK_PORT: u16 = 7002;

/// Fits the burst of a test that opens all its connections at once.
const BACKLOG: u32 = 4096;
/// More connections than this at a time wait in the backlog.
const MOST_CONNECTIONS: usize = 20_000;
/// What a receiver takes at once in bulk.
const BULK_BUFFER: usize = 256 * 1024;

/// Serves both ports on `ip` until the process ends.
///
/// # Errors
/// A port is taken or the address is not ours.
pub async fn serve_load(ip: IpAddr) -> io::Result<()> {
    let exchange = listen(SocketAddr::new(ip, EXCHANGE_PORT))?;
    let sink = listen(SocketAddr::new(ip, SINK_PORT))?;
    tokio::try_join!(accept(exchange, exchange_one), accept(sink, sink_one))?;
    Ok(())
}

/// Greets every client on `address` with a line before it has said anything, then repeats what it says.
///
/// # Errors
/// As [`serve_load`].
pub async fn serve_greeting(address: SocketAddr) -> io::Result<()> {
    accept(listen(address)?, greet_one).await
}

/// Answers every datagram on `address` with the same bytes after `pong `.
///
/// # Errors
/// As [`serve_load`].
pub async fn serve_datagrams(address: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(address).await?;
    let mut buffer = [0; 2048];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).await?;
        let answer = [b"pong ", buffer.get(..length).unwrap_or_default()].concat();
        // A client that is gone is no reason to stop serving the others.
        let _ = socket.send_to(&answer, peer).await;
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let explain = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}"));
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address).map_err(explain)?;
    socket.listen(BACKLOG).map_err(explain)
}

async fn accept<F>(listener: TcpListener, serve: fn(TcpStream) -> F) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(async move {
                    // How a client leaves is its own matter.
                    let _ = serve(stream).await;
                    drop(place);
                });
            }
            // Out of descriptors: those who are here must leave first.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

async fn exchange_one(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let answer = [b'a'; EXCHANGE_BYTES];
    // Larger than a request, so that one read empties the socket and the next waits without asking first.
    let mut buffer = [0; 2 * EXCHANGE_BYTES];
    let mut have = 0;
    loop {
        let got = stream.read(&mut buffer).await?;
        if got == 0 {
            return Ok(());
        }
        have += got;
        while have >= EXCHANGE_BYTES {
            have -= EXCHANGE_BYTES;
            stream.write_all(&answer).await?;
        }
    }
}

async fn sink_one(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BULK_BUFFER];
    let mut total: u64 = 0;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            got => total += got as u64,
        }
    }
    stream.write_all(&total.to_be_bytes()).await?;
    stream.shutdown().await
}

async fn greet_one(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"220 mail.shop ready, you have said nothing yet\r\n").await?;
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}
