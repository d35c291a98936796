//! One stream of `envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs` over a connection of its own.

use std::future::poll_fn;
use std::io;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{Method, Request, header};
use model::telemetry::{LogEntries, LogService};
use prost::Message;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Origin;
use crate::telemetry::export::send::SendError;

const METHOD: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
/// So long a new stream waits for a refusal before it takes itself for accepted: services answer with a head at the end
/// only, if ever.
const REFUSED_WITHIN: Duration = Duration::from_millis(100);

/// Why entries were not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    /// It took too long.
    #[error("they were not taken in time")]
    Timeout,
    /// No connection.
    #[error("no connection: {0}")]
    Connect(#[source] io::Error),
    /// What came is no HTTP/2, or the connection broke.
    #[error("the stream broke: {0}")]
    Http2(#[from] h2::Error),
    /// The host's name is no authority.
    #[error("the request can't be made: {0}")]
    Request(#[from] http::Error),
    /// The call has failed.
    #[error("{0}")]
    Call(#[from] SendError),
    /// The service has ended the stream.
    #[error("the service has ended the stream: {0}")]
    Ended(String),
}

#[derive(Clone, PartialEq, Message)]
struct Node {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    cluster: String,
}

#[derive(Clone, PartialEq, Message)]
struct Identifier {
    #[prost(message, optional, tag = "1")]
    node: Option<Node>,
    #[prost(string, tag = "2")]
    log_name: String,
}

/// The entries are encoded already: a message within another has the form of bytes.
#[derive(Clone, PartialEq, Message)]
struct Entries {
    #[prost(bytes = "vec", repeated, tag = "1")]
    entries: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(message, optional, tag = "1")]
    identifier: Option<Identifier>,
    #[prost(message, optional, tag = "2")]
    http: Option<Entries>,
    #[prost(message, optional, tag = "3")]
    tcp: Option<Entries>,
}

/// A stream that is open.
pub(super) struct Stream {
    body: h2::SendStream<Bytes>,
    /// What the first message says of who sends.
    identifier: Option<Identifier>,
    /// Says how the service has ended it.
    ended: oneshot::Receiver<String>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Stream {
    /// Opens a stream to `service` over `io`.
    pub async fn open(
        io: Box<dyn net::Io>,
        service: &LogService,
        origin: &Origin,
    ) -> Result<Self, StreamError> {
        let authority = format!("{}:{}", service.collector.host, service.collector.port);
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{authority}{METHOD}"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .header(header::USER_AGENT, "culvert")
            .body(())?;
        let (client, connection) = h2::client::handshake(io).await?;
        let driver = tokio::spawn(async move {
            // Whoever sends is told by the stream.
            let _ = connection.await;
        });
        let sent = client.ready().await.and_then(|mut client| client.send_request(request, false));
        let (response, body) = sent.inspect_err(|_| driver.abort())?;
        let (says, ended) = oneshot::channel();
        let reader = tokio::spawn(async move {
            // The receiver may be gone.
            let _ = says.send(read(response).await);
        });
        let name = format!("{}.{}", origin.name, origin.namespace);
        let node = Node { id: name.clone(), cluster: name };
        let identifier = Identifier { node: Some(node), log_name: service.name.to_string() };
        Ok(Self { body, identifier: Some(identifier), ended, tasks: [driver, reader] })
    }

    /// Sends a message with `batch`.
    pub async fn send(&mut self, service: &LogService, batch: &[Vec<u8>]) -> Result<(), StreamError> {
        if let Ok(why) = self.ended.try_recv() {
            return Err(StreamError::Ended(why));
        }
        let is_first = self.identifier.is_some();
        let entries = Some(Entries { entries: batch.to_vec() });
        let of_connections = service.entries == LogEntries::Connections;
        let (http, tcp) = if of_connections { (None, entries) } else { (entries, None) };
        let message = Entry { identifier: self.identifier.take(), http, tcp }.encode_to_vec();
        let mut left = BytesMut::with_capacity(message.len() + 5);
        left.put_u8(0);
        left.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        left.extend_from_slice(&message);
        let mut left = left.freeze();
        while !left.is_empty() {
            self.body.reserve_capacity(left.len());
            let room = tokio::select! {
                biased;
                why = &mut self.ended => return Err(StreamError::Ended(why.unwrap_or_default())),
                room = poll_fn(|cx| self.body.poll_capacity(cx)) => room,
            };
            let Some(room) = room else { return Err(StreamError::Ended("it takes no more".to_owned())) };
            let part = left.split_to(room?.min(left.len()));
            self.body.send_data(part, false)?;
        }
        if is_first && let Ok(why) = tokio::time::timeout(REFUSED_WITHIN, &mut self.ended).await {
            return Err(StreamError::Ended(why.unwrap_or_default()));
        }
        Ok(())
    }
}

/// Waits for the stream's end, and puts it into words.
async fn read(response: h2::client::ResponseFuture) -> String {
    let response = match response.await {
        Ok(response) => response,
        Err(error) => return error.to_string(),
    };
    if response.status() != http::StatusCode::OK {
        return format!("HTTP status {}", response.status());
    }
    let head = response.headers().clone();
    let mut body = response.into_body();
    while let Some(data) = body.data().await {
        let released = data.and_then(|data| body.flow_control().release_capacity(data.len()));
        if let Err(error) = released {
            return error.to_string();
        }
    }
    let trailers = match body.trailers().await {
        Ok(trailers) => trailers.unwrap_or(head),
        Err(error) => return error.to_string(),
    };
    let text = |name: &str| trailers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    format!("gRPC status {} {}", text("grpc-status"), text("grpc-message"))
}
