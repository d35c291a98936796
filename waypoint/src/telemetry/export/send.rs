//! One batch: a POST of HTTP/1.1, or a unary call of gRPC.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use model::Str;

/// What is read of an answer.
const MAX_ANSWER: usize = 64 * 1024;

/// Why a batch was not taken.
#[derive(Debug, thiserror::Error)]
pub(in crate::telemetry) enum SendError {
    /// The collector did not answer in time.
    #[error("no answer in time")]
    Timeout,
    /// No connection.
    #[error("no connection: {0}")]
    Connect(#[source] io::Error),
    /// What came is no HTTP.
    #[error("the answer is no HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// What came is no HTTP/2.
    #[error("the answer is no HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    /// The settings name what can't be sent.
    #[error("the request can't be made: {0}")]
    Request(#[from] http::Error),
    /// The collector refused it.
    #[error("the collector answered with the status {0}")]
    Status(u16),
    /// The collector refused it, in the words of gRPC.
    #[error("the collector answered with the gRPC status {0}: {1}")]
    Grpc(String, String),
}

/// Whom a batch goes to.
pub(in crate::telemetry) struct Target<'a> {
    pub authority: String,
    pub headers: &'a [(Str, Str)],
}

fn add_headers<B>(request: &mut Request<B>, target: &Target<'_>) -> Result<(), SendError> {
    for (name, value) in target.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(http::Error::from)?;
        let value = HeaderValue::from_str(value).map_err(http::Error::from)?;
        request.headers_mut().append(name, value);
    }
    Ok(())
}

/// Posts `body` to `path`.
pub(super) async fn post(
    io: Box<dyn net::Io>,
    target: &Target<'_>,
    path: &str,
    kind: &'static str,
    body: Vec<u8>,
) -> Result<(), SendError> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::HOST, &target.authority)
        .header(header::CONTENT_TYPE, kind)
        .header(header::USER_AGENT, "culvert")
        .body(Full::new(Bytes::from(body)))?;
    add_headers(&mut request, target)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await?;
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await;
    let status = match response {
        Ok(response) => {
            let status = response.status();
            // What it says beside its status is of no use; reading it lets the collector end in peace.
            let _ = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            status
        }
        Err(error) => {
            driver.abort();
            return Err(error.into());
        }
    };
    driver.abort();
    if status.is_success() { Ok(()) } else { Err(SendError::Status(status.as_u16())) }
}

/// Calls a unary method with one message, on a connection of its own.
pub(super) async fn grpc(
    io: Box<dyn net::Io>,
    target: &Target<'_>,
    method: &str,
    message: Vec<u8>,
) -> Result<(), SendError> {
    let (client, connection) = h2::client::handshake(io).await?;
    let driver = tokio::spawn(connection);
    let answered = call(client, (target, method), message).await;
    driver.abort();
    answered.map(drop)
}

/// Calls a unary method with one message, and returns its answer.
pub(in crate::telemetry) async fn call(
    client: h2::client::SendRequest<Bytes>,
    (target, method): (&Target<'_>, &str),
    message: Vec<u8>,
) -> Result<Vec<u8>, SendError> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{}{method}", target.authority))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, "culvert")
        .body(())?;
    add_headers(&mut request, target)?;
    let (response, mut body) = client.ready().await?.send_request(request, false)?;
    let mut left = BytesMut::with_capacity(message.len() + 5);
    left.put_u8(0);
    left.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    left.extend_from_slice(&message);
    let mut left = left.freeze();
    while !left.is_empty() {
        body.reserve_capacity(left.len());
        let Some(room) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await else { break };
        let part = left.split_to(room?.min(left.len()));
        body.send_data(part, left.is_empty())?;
    }
    let response = response.await?;
    if response.status() != http::StatusCode::OK {
        return Err(SendError::Status(response.status().as_u16()));
    }
    let headers = response.headers().clone();
    let mut answer = response.into_body();
    let mut read = Vec::new();
    while let Some(data) = answer.data().await {
        let data = data?;
        answer.flow_control().release_capacity(data.len())?;
        read.extend_from_slice(&data);
        if read.len() > MAX_ANSWER {
            break;
        }
    }
    let trailers = answer.trailers().await?.unwrap_or(headers);
    let text = |name: &str| trailers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    match text("grpc-status").as_str() {
        // The message is behind five bytes of frame.
        "0" => Ok(read.split_off(read.len().min(5))),
        status => Err(SendError::Grpc(status.to_owned(), text("grpc-message"))),
    }
}
