//! Log entries as Envoy has them (`envoy.data.accesslog.v3`): the messages and fields that we write, with their numbers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use model::telemetry::{Facts, Headers, LogEntries, LogService};
use prost::Message;

use crate::http::head::Version;
use crate::telemetry::ended::{Ended, place_of_flag};

/// A text of an entry is cut here, in bytes, so that a client's paths do not fill the queue.
const LONGEST: usize = 4096;

#[derive(Clone, PartialEq, Message)]
struct HttpEntry {
    #[prost(message, optional, tag = "1")]
    common: Option<Common>,
    /// 2 is HTTP/1.1, 3 is HTTP/2.
    #[prost(int32, tag = "2")]
    protocol_version: i32,
    #[prost(message, optional, tag = "3")]
    request: Option<Request>,
    #[prost(message, optional, tag = "4")]
    response: Option<Response>,
}

#[derive(Clone, PartialEq, Message)]
struct TcpEntry {
    #[prost(message, optional, tag = "1")]
    common: Option<Common>,
    #[prost(message, optional, tag = "2")]
    connection: Option<Bytes>,
}

#[derive(Clone, PartialEq, Message)]
struct Bytes {
    #[prost(uint64, tag = "1")]
    received: u64,
    #[prost(uint64, tag = "2")]
    sent: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Common {
    #[prost(message, optional, tag = "2")]
    downstream_remote_address: Option<Address>,
    #[prost(message, optional, tag = "3")]
    downstream_local_address: Option<Address>,
    #[prost(message, optional, tag = "4")]
    tls: Option<Tls>,
    #[prost(message, optional, tag = "5")]
    start_time: Option<prost_types::Timestamp>,
    #[prost(message, optional, tag = "13")]
    upstream_remote_address: Option<Address>,
    #[prost(string, tag = "15")]
    upstream_cluster: String,
    #[prost(bytes = "vec", optional, tag = "16")]
    response_flags: Option<Vec<u8>>,
    #[prost(string, tag = "18")]
    upstream_transport_failure_reason: String,
    #[prost(string, tag = "19")]
    route_name: String,
    #[prost(message, optional, tag = "20")]
    downstream_direct_remote_address: Option<Address>,
    #[prost(message, optional, tag = "23")]
    duration: Option<prost_types::Duration>,
    #[prost(uint32, tag = "24")]
    attempts: u32,
    #[prost(string, tag = "25")]
    connection_termination_details: String,
    #[prost(string, tag = "26")]
    stream_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(message, optional, tag = "1")]
    socket: Option<SocketAddress>,
}

#[derive(Clone, PartialEq, Message)]
struct SocketAddress {
    #[prost(string, tag = "2")]
    address: String,
    /// One of several ways to name a port, so it is there even when it is 0.
    #[prost(uint32, optional, tag = "3")]
    port: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct Tls {
    #[prost(string, tag = "3")]
    server_name: String,
    #[prost(message, optional, tag = "5")]
    peer: Option<Certificate>,
}

#[derive(Clone, PartialEq, Message)]
struct Certificate {
    #[prost(message, repeated, tag = "1")]
    names: Vec<AltName>,
}

#[derive(Clone, PartialEq, Message)]
struct AltName {
    #[prost(string, optional, tag = "1")]
    uri: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(int32, tag = "1")]
    method: i32,
    #[prost(string, tag = "2")]
    scheme: String,
    #[prost(string, tag = "3")]
    authority: String,
    #[prost(string, tag = "5")]
    path: String,
    #[prost(string, tag = "6")]
    user_agent: String,
    #[prost(string, tag = "7")]
    referer: String,
    #[prost(string, tag = "8")]
    forwarded_for: String,
    #[prost(string, tag = "9")]
    request_id: String,
    #[prost(string, tag = "10")]
    original_path: String,
    #[prost(uint64, tag = "11")]
    headers_bytes: u64,
    #[prost(uint64, tag = "12")]
    body_bytes: u64,
    #[prost(btree_map = "string, string", tag = "13")]
    headers: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    code: Option<u32>,
    #[prost(uint64, tag = "2")]
    headers_bytes: u64,
    #[prost(uint64, tag = "3")]
    body_bytes: u64,
    #[prost(btree_map = "string, string", tag = "4")]
    headers: BTreeMap<String, String>,
    #[prost(string, tag = "6")]
    code_details: String,
}

/// `envoy.config.core.v3.RequestMethod`, from 1 on.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// The entry of what has ended, for `service`; `None` where that takes none of its kind.
pub(super) fn encode(service: &LogService, ended: &Ended<'_>) -> Option<Vec<u8>> {
    let of_connections = service.entries == LogEntries::Connections;
    if of_connections != ended.is_connection {
        return None;
    }
    let mut common = common(ended);
    Some(if ended.is_connection {
        common.connection_termination_details = match ended.details() {
            "-" => String::new(),
            details => details.to_owned(),
        };
        let connection = Bytes { received: ended.record.received, sent: ended.record.sent };
        TcpEntry { common: Some(common), connection: Some(connection) }.encode_to_vec()
    } else {
        let request = request(service, ended);
        common.stream_id.clone_from(&request.request_id);
        HttpEntry {
            common: Some(common),
            protocol_version: match ended.request.version {
                Version::Http1 => 2,
                Version::Http2 => 3,
            },
            request: Some(request),
            response: Some(response(service, ended)),
        }
        .encode_to_vec()
    })
}

fn common(ended: &Ended<'_>) -> Common {
    let (connection, record) = (ended.connection, ended.record);
    let began = SystemTime::now().checked_sub(ended.duration).unwrap_or(SystemTime::UNIX_EPOCH);
    let client = address(connection.client);
    let uri = connection.identity.as_ref().map(|id| AltName { uri: Some(id.to_string()) });
    let peer = uri.map(|name| Certificate { names: vec![name] });
    let tls = (peer.is_some() || connection.server_name.is_some())
        .then(|| Tls { server_name: connection.server_name.as_deref().unwrap_or_default().to_owned(), peer });
    Common {
        downstream_remote_address: Some(client.clone()),
        downstream_local_address: Some(address(connection.destination)),
        tls,
        start_time: Some(began.into()),
        upstream_remote_address: record.target.as_ref().map(|target| address(target.address)),
        upstream_cluster: ended.cluster().unwrap_or_default(),
        response_flags: flags(&ended.flags()),
        upstream_transport_failure_reason: record.unconnected.as_deref().map(cut).unwrap_or_default(),
        route_name: ended.route().unwrap_or_default(),
        downstream_direct_remote_address: Some(client),
        duration: duration(ended.duration),
        attempts: record.tries,
        connection_termination_details: String::new(),
        stream_id: String::new(),
    }
}

fn address(at: SocketAddr) -> Address {
    let socket = SocketAddress { address: at.ip().to_string(), port: Some(at.port().into()) };
    Address { socket: Some(socket) }
}

fn duration(of: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(of).ok()
}

/// `ResponseFlags`: a field for each, numbered as Envoy counts them. All are booleans but one, which is a message that
/// says who refused.
fn flags(flags: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for place in flags.split(',').filter_map(place_of_flag) {
        let number = u64::try_from(place).unwrap_or_default() + 1;
        if number == UNAUTHORIZED {
            prost::encoding::encode_varint(number << 3 | 2, &mut out);
            out.extend_from_slice(&[2, 1 << 3, EXTERNAL_SERVICE]);
        } else {
            prost::encoding::encode_varint(number << 3, &mut out);
            out.push(1);
        }
    }
    (!out.is_empty()).then_some(out)
}

const UNAUTHORIZED: u64 = 13;
const EXTERNAL_SERVICE: u8 = 1;

/// The text, of the length that entries may have.
pub(super) fn cut(text: &str) -> String {
    text.get(..text.floor_char_boundary(LONGEST)).unwrap_or_default().to_owned()
}

fn request(service: &LogService, ended: &Ended<'_>) -> Request {
    let head = ended.request;
    let field = |name| ended.header(Headers::Request, name).map(|value| cut(&value)).unwrap_or_default();
    let method = METHODS.iter().position(|method| *method == head.method());
    let original = ended.decided.original.as_ref().map(|original| cut(&original.target));
    Request {
        method: method.and_then(|place| i32::try_from(place + 1).ok()).unwrap_or_default(),
        scheme: head.scheme().to_owned(),
        authority: cut(head.authority()),
        path: cut(head.target()),
        user_agent: field("user-agent"),
        referer: field("referer"),
        forwarded_for: field("x-forwarded-for"),
        request_id: field("x-request-id"),
        original_path: original.unwrap_or_default(),
        headers_bytes: head.fields.size() as u64,
        body_bytes: ended.record.received,
        headers: shown(service, Headers::Request, ended),
    }
}

fn response(service: &LogService, ended: &Ended<'_>) -> Response {
    let status = ended.record.status;
    Response {
        code: (status > 0).then_some(status.into()),
        headers_bytes: ended.response.size() as u64,
        body_bytes: ended.record.sent,
        headers: shown(service, Headers::Response, ended),
        code_details: ended.details().to_owned(),
    }
}

fn shown(service: &LogService, of: Headers, ended: &Ended<'_>) -> BTreeMap<String, String> {
    let names = match (&service.entries, of) {
        (LogEntries::Requests { request_headers, .. }, Headers::Request) => &**request_headers,
        (LogEntries::Requests { response_headers, .. }, Headers::Response) => response_headers,
        _ => &[],
    };
    let one = |name: &model::Str| Some((name.to_string(), cut(&ended.header(of, name).ok()?)));
    names.iter().filter_map(one).collect()
}
