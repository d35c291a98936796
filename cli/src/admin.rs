//! A client for ztunnel's loopback servers, which are reached inside the node's network namespace.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::netns;

/// Where ztunnel's admin server is unless a flag says otherwise.
pub const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
/// Where its metrics are.
pub const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);
/// Where it says whether it is ready.
pub const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);

/// A dump of a large mesh takes seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// 100,000 workloads are some 60 MB.
const MOST_BYTES: usize = 512 << 20;

/// One of ztunnel's servers.
#[derive(Clone, Debug)]
pub struct Address {
    /// The network namespace that it listens in; `None` for the caller's.
    pub namespace: Option<PathBuf>,
    /// The address in it.
    pub at: SocketAddr,
}

impl Address {
    /// `GET path`.
    ///
    /// # Errors
    /// Nobody answers there, or the answer is not 200. The text says what to do.
    pub fn get(&self, path: &str) -> Result<Bytes> {
        self.request(http::Method::GET, path)
    }

    /// `POST path` without a body.
    ///
    /// # Errors
    /// As [`Address::get`].
    pub fn post(&self, path: &str) -> Result<Bytes> {
        self.request(http::Method::POST, path)
    }

    /// `GET path`, read as JSON.
    ///
    /// # Errors
    /// As [`Address::get`], and when the answer is no JSON.
    pub fn json(&self, path: &str) -> Result<Value> {
        let bytes = self.get(path)?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} answered {path} with no JSON", self.at))
    }

    fn request(&self, method: http::Method, path: &str) -> Result<Bytes> {
        let ask = || {
            netns::block_on(async { timeout(LIMIT, exchange(self.at, method, path)).await })
                .map_err(anyhow::Error::from)
        };
        let answer = netns::run_in(self.namespace.as_deref(), ask)??;
        let place = self.namespace.as_ref().map(|n| format!(" in {}", n.display())).unwrap_or_default();
        match answer {
            Ok(Ok((http::StatusCode::OK, bytes))) => Ok(bytes),
            Ok(Ok((status, bytes))) => {
                let text = String::from_utf8_lossy(&bytes);
                bail!("ztunnel at {}{place} answered {path} with {status}: {}", self.at, text.trim())
            }
            Ok(Err(e)) => Err(e).with_context(|| {
                format!(
                    "no ztunnel answers at {}{place}. Its admin address is in the network namespace of its node: \
                     name that with --netns (see `ip netns`), and another address with --admin",
                    self.at
                )
            }),
            Err(_) => bail!("ztunnel at {}{place} did not answer {path} within {LIMIT:?}", self.at),
        }
    }
}

async fn exchange(at: SocketAddr, method: http::Method, path: &str) -> Result<(http::StatusCode, Bytes)> {
    let stream = TcpStream::connect(at).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, at.to_string())
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
    let bytes = body.map_err(io::Error::other)?.to_bytes();
    drop(sender);
    driver.abort();
    Ok((status, bytes))
}
