//! The small HTTP/1.1 server behind the admin, readiness and metrics ports.
//!
//! Everything that a client can make it hold has a limit: connections, the size and the time of a request's head
//! and body, the time that a handler runs, and the time that a response may wait for a reader. When all
//! connections are taken the oldest one is closed for the new one, so that a client that sits on connections
//! can't lock out a probe.

mod connection;
mod routes;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::header::{
    ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HOST, HeaderValue, ORIGIN,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::time::Instant;

use connection::{Connections, StallGuard};

pub use http::{Method, StatusCode};
pub use routes::{HandlerFuture, Routes};

/// So long a port that is taken is asked for again.
const ENDING: Duration = Duration::from_secs(2);

/// What a client may take up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// The size of a request's head, in bytes; at least 8,192 (hyper's least buffer).
    pub head_bytes: usize,
    /// The size of a request's body.
    pub body_bytes: usize,
    /// From the connection, or the response before, to the end of the request's head.
    pub head_time: Duration,
    /// For a request's body.
    pub body_time: Duration,
    /// For the handler; a route may have its own.
    pub handler_time: Duration,
    /// How long a response may wait for a reader that takes nothing.
    pub stall_time: Duration,
    /// Whether requests must name an address or `localhost` as the host, and must not come from another page: a page
    /// in a browser that resolves its own name to a loopback address is then refused, and so is one that sends
    /// requests to this port without seeing the answers.
    pub local_host_only: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            head_bytes: 16 << 10,
            body_bytes: 64 << 10,
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(10),
            handler_time: Duration::from_secs(30),
            stall_time: Duration::from_secs(30),
            local_host_only: false,
        }
    }
}

/// A request, read to its end.
#[derive(Debug)]
pub struct Request {
    head: http::request::Parts,
    body: Bytes,
    peer: Option<SocketAddr>,
}

impl Request {
    /// The method.
    #[must_use]
    pub fn method(&self) -> &Method {
        &self.head.method
    }

    /// The path, not decoded.
    #[must_use]
    pub fn path(&self) -> &str {
        self.head.uri.path()
    }

    /// The first value of `key` in the query, percent-decoded; an empty one for a key without a value.
    #[must_use]
    pub fn query(&self, key: &str) -> Option<String> {
        let pairs = self.head.uri.query().unwrap_or_default().split('&');
        let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.find(|(k, _)| decode(k) == key).map(|(_, value)| decode(value))
    }

    /// The `Accept` header.
    #[must_use]
    pub fn accept(&self) -> Option<&str> {
        self.head.headers.get(ACCEPT)?.to_str().ok()
    }

    /// The `Authorization` header.
    #[must_use]
    pub fn authorization(&self) -> Option<&str> {
        self.head.headers.get(AUTHORIZATION)?.to_str().ok()
    }

    /// Where the client is; `None` on a Unix socket.
    #[must_use]
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> &Bytes {
        &self.body
    }
}

/// Decodes `%xx` and `+` of a query (WHATWG URL, application/x-www-form-urlencoded). What is no valid escape stays
/// as it is, what is no UTF-8 becomes U+FFFD.
fn decode(text: &str) -> String {
    let hex = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
        u8::from_str_radix(digits, 16).ok()
    };
    let mut out = Vec::with_capacity(text.len());
    let mut left = text.as_bytes();
    while let [byte, rest @ ..] = left {
        left = rest;
        match (byte, rest) {
            (b'+', _) => out.push(b' '),
            (b'%', [a, b, rest @ ..]) if let Some(value) = hex(&[*a, *b]) => {
                out.push(value);
                left = rest;
            }
            (byte, _) => out.push(*byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A response.
#[derive(Debug)]
pub struct Response {
    status: StatusCode,
    content_type: &'static str,
    content_encoding: Option<&'static str>,
    body: Body,
}

impl Response {
    /// A response of this type and content.
    #[must_use]
    pub fn new(status: StatusCode, content_type: &'static str, content: impl Into<Bytes>) -> Self {
        let body = Body::Whole(Some(content.into()));
        Self { status, content_type, content_encoding: None, body }
    }

    /// A response in plain text.
    #[must_use]
    pub fn text(status: StatusCode, content: impl Into<Bytes>) -> Self {
        Self::new(status, "text/plain; charset=utf-8", content)
    }

    /// A value as JSON, indented for people.
    #[must_use]
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(mut text) => {
                text.push(b'\n');
                Self::new(StatusCode::OK, "application/json", text)
            }
            Err(e) => {
                Self::text(StatusCode::INTERNAL_SERVER_ERROR, format!("can't be written as JSON: {e}\n"))
            }
        }
    }

    /// A response whose content `write` produces piece by piece, on a thread where it may block: for what is too
    /// large to hold as a whole. When the client goes, its writes fail. Must be called on a tokio runtime.
    #[must_use]
    pub fn stream(
        content_type: &'static str,
        write: impl FnOnce(&mut dyn io::Write) -> io::Result<()> + Send + 'static,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            let mut out = io::BufWriter::with_capacity(32 << 10, Pieces(sender.clone()));
            if let Err(e) = write(&mut out).and_then(|()| io::Write::flush(&mut out)) {
                // The content's length is not announced, so only a broken connection tells the client.
                let _ = sender.blocking_send(Err(e));
            }
        });
        Self { status: StatusCode::OK, content_type, content_encoding: None, body: Body::Pieces(receiver) }
    }

    /// Declares that the content is compressed.
    #[must_use]
    pub fn encoded(mut self, encoding: &'static str) -> Self {
        self.content_encoding = Some(encoding);
        self
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    fn into_http(self) -> http::Response<Body> {
        let mut response = http::Response::new(self.body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
        if let Some(encoding) = self.content_encoding {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
        }
        response
    }
}

struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl io::Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(Bytes::copy_from_slice(piece))).map_err(gone)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
enum Body {
    Whole(Option<Bytes>),
    Pieces(mpsc::Receiver<io::Result<Bytes>>),
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Whole(content) => Poll::Ready(content.take().map(|c| Ok(Frame::data(c)))),
            Self::Pieces(pieces) => pieces.poll_recv(cx).map(|piece| Some(piece?.map(Frame::data))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(content) => SizeHint::with_exact(content.as_ref().map_or(0, |c| c.len() as u64)),
            Self::Pieces(_) => SizeHint::default(),
        }
    }
}

/// Listens on `address`. Where the machine has no IPv6, `[::]` means all IPv4 addresses. A port that is taken may be that of a
/// process which is just ending, and whose place this one takes: it is asked for again for [`ENDING`].
///
/// # Errors
/// The address can't be had; the error names it.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let until = Instant::now() + ENDING;
    loop {
        match bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                tokio::time::sleep(ENDING / 40).await;
            }
            result => {
                return result.map_err(|e| io::Error::new(e.kind(), format!("listening on {address}: {e}")));
            }
        }
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(e)
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && matches!(e.raw_os_error(), Some(nix::libc::EAFNOSUPPORT | nix::libc::EADDRNOTAVAIL)) =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        result => result,
    }
}

/// Serves `routes` on `listener`, on the runtime that it is called on, until the future is dropped.
pub async fn serve(listener: TcpListener, routes: Routes, limits: Limits) {
    let connections = Connections::new(limits.connections);
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true); // only a matter of speed
                connections.admit(serve_connection(stream, Some(peer), routes.clone(), limits));
            }
            Err(error) => pause_after(&error).await,
        }
    }
}

/// As [`serve`], on a Unix socket: who may connect is what the socket's file says.
pub async fn serve_unix(listener: UnixListener, routes: Routes, limits: Limits) {
    let connections = Connections::new(limits.connections);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => connections.admit(serve_connection(stream, None, routes.clone(), limits)),
            Err(error) => pause_after(&error).await,
        }
    }
}

/// As [`serve`], where `secure` first makes each connection one that is secured, such as by TLS. It may take as long as
/// the head of a request.
pub async fn serve_secured<S, F>(
    listener: TcpListener,
    secure: impl Fn(TcpStream) -> F,
    routes: Routes,
    limits: Limits,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Future<Output = io::Result<S>> + Send + 'static,
{
    let connections = Connections::new(limits.connections);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true); // only a matter of speed
        let (secured, routes) = (secure(stream), routes.clone());
        connections.admit(async move {
            match tokio::time::timeout(limits.head_time, secured).await {
                Ok(Ok(stream)) => serve_connection(stream, Some(peer), routes, limits).await,
                Ok(Err(error)) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a connection was not secured");
                }
                Err(_) => tracing::debug!("a connection was not secured in time"),
            }
        });
    }
}

/// Out of descriptors, as a rule: the listener itself is sound.
async fn pause_after(error: &io::Error) {
    tracing::warn!(error = error as &dyn std::error::Error, "accept failed");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn serve_connection<S>(stream: S, peer: Option<SocketAddr>, routes: Routes, limits: Limits)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let io = TokioIo::new(StallGuard::new(stream, limits.stall_time));
    let service = service_fn(move |request| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(respond(request, peer, &routes, limits).await.into_http()) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_bytes.max(8 << 10))
        .max_headers(64)
        .serve_connection(io, service)
        .await;
    if let Err(error) = served {
        tracing::debug!(error = &error as &dyn std::error::Error, "connection to a local port failed");
    }
}

async fn respond(
    request: http::Request<Incoming>,
    peer: Option<SocketAddr>,
    routes: &Routes,
    limits: Limits,
) -> Response {
    let (head, body) = request.into_parts();
    if limits.local_host_only
        && let Err(reason) = check_local(&head)
    {
        return Response::text(StatusCode::FORBIDDEN, reason);
    }
    let body = match tokio::time::timeout(limits.body_time, Limited::new(body, limits.body_bytes).collect())
        .await
    {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => {
            return Response::text(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is too large\n");
        }
        Ok(Err(e)) => return Response::text(StatusCode::BAD_REQUEST, format!("reading the body: {e}\n")),
        Err(_) => return Response::text(StatusCode::REQUEST_TIMEOUT, "the request's body took too long\n"),
    };
    routes.answer(Request { head, body, peer }, limits.handler_time).await
}

/// Refuses what a browser sends on behalf of a page that is not this port's own. Programs that are no browsers send
/// neither `Origin` nor `Sec-Fetch-Site`.
fn check_local(head: &http::request::Parts) -> Result<(), &'static str> {
    let parse = |text: &str| text.parse::<http::uri::Authority>().ok();
    let in_header = || parse(head.headers.get(HOST)?.to_str().ok()?);
    let host = head.uri.authority().cloned().or_else(in_header);
    let Some(host) = host.filter(|host| is_local(host.host())) else {
        return Err("this port answers only requests whose Host is an address or localhost\n");
    };
    // Browsers have sent it with each POST for years (Fetch, "append a request `Origin` header"); `null` is one, too.
    // Whatever forwards the port, the browser sees the same host in both.
    let own = |origin: &HeaderValue| {
        let origin = origin.to_str().ok().and_then(|text| parse(text.strip_prefix("http://")?));
        origin.is_some_and(|origin| {
            origin.host().eq_ignore_ascii_case(host.host())
                && origin.port_u16().unwrap_or(80) == host.port_u16().unwrap_or(80)
        })
    };
    if !head.headers.get_all(ORIGIN).iter().all(own) {
        return Err(
            "the header Origin says that another page sent this request: this port takes none from pages\n",
        );
    }
    // Also with what has no `Origin`: images, forms with GET, links (Fetch Metadata, section 2.3). `same-site` is
    // another port of this machine.
    let direct = |site: &HeaderValue| matches!(site.as_bytes(), b"none" | b"same-origin");
    if !head.headers.get_all("sec-fetch-site").iter().all(direct) {
        return Err(
            "the header Sec-Fetch-Site says that another page led here: enter the address by hand, this port \
                    takes no requests from pages\n",
        );
    }
    Ok(())
}

fn is_local(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        for (text, decoded) in [
            ("a%20b+c", "a b c"),
            ("%", "%"),
            ("%4", "%4"),
            ("%zz", "%zz"),
            ("%+1", "% 1"),
            ("%ff", "\u{fffd}"),
            ("%c3%a4", "ä"),
        ] {
            assert_eq!(decode(text), decoded, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_that_is_about_to_be_free_is_waited_for() {
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = held.local_addr().unwrap();
        let refused = listen(address).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        assert!(refused.to_string().contains(&address.to_string()), "{refused}");
        let ends = async {
            tokio::time::sleep(ENDING / 2).await;
            drop(held);
        };
        let (found, ()) = tokio::join!(listen(address), ends);
        assert_eq!(found.unwrap().local_addr().unwrap(), address);
    }
}
