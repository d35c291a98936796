//! A client for a proxy's loopback servers, which are reached inside its network namespace, or in a pod of a cluster by
//! port forwarding.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::cluster::{Cluster, PodName};
use crate::netns;

/// Where a proxy's admin server is unless a flag says otherwise.
pub const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
/// Where its metrics are.
pub const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);
/// Where it says whether it is ready.
pub const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);

/// A dump of a large mesh takes seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// 100,000 workloads are some 60 MB.
const MOST_BYTES: usize = 512 << 20;

/// One of a proxy's servers.
#[derive(Clone, Debug)]
pub enum Address {
    /// On this machine.
    Here {
        /// The network namespace that it listens in; `None` for the caller's.
        namespace: Option<PathBuf>,
        /// The address in it.
        at: SocketAddr,
    },
    /// In a pod.
    Pod {
        /// Its cluster.
        cluster: Arc<Cluster>,
        /// The pod.
        pod: PodName,
        /// Its port.
        port: u16,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here { namespace: Some(namespace), at } => write!(f, "{at} in {}", namespace.display()),
            Self::Here { namespace: None, at } => at.fmt(f),
            Self::Pod { pod, .. } => write!(f, "pod {} on {}", pod.name, pod.node),
        }
    }
}

impl Address {
    /// The node, where it is known.
    pub fn node(&self) -> &str {
        match self {
            Self::Here { .. } => "",
            Self::Pod { pod, .. } => &pod.node,
        }
    }

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
        serde_json::from_slice(&bytes).with_context(|| format!("{self} answered {path} with no JSON"))
    }

    fn request(&self, method: http::Method, path: &str) -> Result<Bytes> {
        let (status, bytes) = match self {
            Self::Pod { cluster, pod, port } => cluster.ask_pod(pod, *port, method, path)?,
            Self::Here { namespace, at } => self.ask_here(namespace.as_ref(), *at, method, path)?,
        };
        if status != http::StatusCode::OK {
            let text = String::from_utf8_lossy(&bytes);
            bail!("the proxy at {self} answered {path} with {status}: {}", text.trim())
        }
        Ok(bytes)
    }

    fn ask_here(
        &self,
        namespace: Option<&PathBuf>,
        at: SocketAddr,
        method: http::Method,
        path: &str,
    ) -> Result<(http::StatusCode, Bytes)> {
        let ask = || {
            let exchange =
                async { exchange(TcpStream::connect(at).await?, &at.to_string(), method, path).await };
            netns::block_on(async { timeout(LIMIT, exchange).await }).map_err(anyhow::Error::from)
        };
        match netns::run_in(namespace.map(PathBuf::as_path), ask)?? {
            Ok(answer) => answer.with_context(|| {
                format!(
                    "no proxy answers at {self}. A ztunnel's admin address is in the network namespace of its node, a \
                     waypoint's in that of its pod: name that with --netns (see `ip netns`), and another address with \
                     --admin; for one in a cluster give --context or --kubeconfig"
                )
            }),
            Err(_) => bail!("the proxy at {self} did not answer {path} within {LIMIT:?}"),
        }
    }
}

/// One request over `stream`, which ends with it.
///
/// # Errors
/// The stream breaks, or the answer is too large.
pub async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: &str,
    method: http::Method,
    path: &str,
) -> Result<(http::StatusCode, Bytes)> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, host)
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
    let bytes = body.map_err(io::Error::other)?.to_bytes();
    drop(sender);
    driver.abort();
    Ok((status, bytes))
}
