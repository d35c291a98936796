//! A server of 1 KB.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use hbone::{Control, ServerCounters, ServerSettings, TunnelHeaders};
use identity::HandshakeLimits;
use model::SpiffeId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::carry::{self, Carry};

/// What is served, and where.
#[derive(Args, Debug)]
pub struct Served {
    /// What is around HTTP
    #[arg(long, default_value = "plain")]
    carry: Carry,
    /// Where
    #[arg(long)]
    listen: SocketAddr,
    /// As of `load`
    #[arg(long, default_value = ".")]
    certificates: PathBuf,
    /// Who we are in tunnels
    #[arg(long, default_value = "spiffe://cluster.local/ns/bench/sa/cart")]
    identity: SpiffeId,
}

/// Serves until it is ended.
pub async fn serve(served: Served) -> io::Result<()> {
    let mtls = match served.carry {
        Carry::Mtls => Some(TlsAcceptor::from(carry::server(&served.certificates)?)),
        Carry::Plain | Carry::Hbone => None,
    };
    let tunnels = match served.carry {
        Carry::Hbone => Some(carry::authority(&served.certificates)?),
        Carry::Plain | Carry::Mtls => None,
    };
    let counters = Arc::new(ServerCounters::default());
    // Who can connect finds the CA made.
    let listener = TcpListener::bind(served.listen).await?;
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (mtls, tunnels, own) = (mtls.clone(), tunnels.clone(), served.identity.clone());
        let counters = Arc::clone(&counters);
        tokio::spawn(async move {
            match (mtls, tunnels) {
                (Some(acceptor), _) => answers(acceptor.accept(tcp).await?).await,
                (None, Some(certificates)) => {
                    let limits = HandshakeLimits::default();
                    let tls = identity::accept(tcp, &certificates, &own, limits).await;
                    tunnelled(tls.map_err(io::Error::other)?, &counters).await
                }
                (None, None) => answers(tcp).await,
            }
        });
    }
}

async fn tunnelled(tls: identity::TlsStream<TcpStream>, counters: &Arc<ServerCounters>) -> io::Result<()> {
    let settings = ServerSettings::default();
    hbone::serve(tls, &settings, &Control::default(), counters, |incoming| {
        tokio::spawn(async move {
            match incoming.accept(&TunnelHeaders::default()) {
                Ok(tunnel) => answers(tunnel).await,
                Err(error) => Err(io::Error::other(error)),
            }
        });
    })
    .await;
    Ok(())
}

/// Answers requests without bodies, one after the other.
async fn answers(mut io: impl net::Io) -> io::Result<()> {
    let body = "x".repeat(1024);
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut input = Vec::with_capacity(4096);
    while io.read_buf(&mut input).await? > 0 {
        if input.ends_with(b"\r\n\r\n") {
            input.clear();
            io.write_all(answer.as_bytes()).await?;
            io.flush().await?;
        }
    }
    Ok(())
}
