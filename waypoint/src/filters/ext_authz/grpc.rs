//! Asking by gRPC: `envoy.service.auth.v3.Authorization/Check`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use model::http::BodyCheck;
use proto::wire::core::header_value_option::HeaderAppendAction;
use proto::wire::core::{Address, HeaderValueOption, SocketAddress, address, socket_address};
use proto::wire::ext_authz::attribute_context::{HttpRequest, Peer, Request, TlsSession};
use proto::wire::ext_authz::check_response::HttpResponse;
use proto::wire::ext_authz::{
    AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
};

use super::{Answer, Changes, Shown, permitted};
use crate::http::decide::{Connection, Edit, Endpoints, Flag, Response, Value};
use crate::http::head::{RequestHead, Version};
use crate::upstream::call::{CallError, call_grpc};

const METHOD: &str = "/envoy.service.auth.v3.Authorization/Check";

pub(super) async fn ask(
    endpoints: &dyn Endpoints,
    authority: &str,
    request: &RequestHead,
    connection: &Connection,
    body: Option<(BodyCheck, Shown)>,
    limit: Duration,
) -> Result<Answer, CallError> {
    let question = question(request, connection, body, SystemTime::now());
    let answer: CheckResponse =
        call_grpc(endpoints, connection, (authority, METHOD), &question, limit).await?;
    Ok(judged(answer))
}

fn question(
    request: &RequestHead,
    connection: &Connection,
    body: Option<(BodyCheck, Shown)>,
    now: SystemTime,
) -> CheckRequest {
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    let pseudo = [
        (":method", request.method()),
        (":authority", request.authority()),
        (":path", request.target()),
        (":scheme", request.scheme()),
    ];
    headers.extend(pseudo.map(|(name, value)| (name.to_owned(), value.to_owned())));
    for (name, value) in request.fields.iter() {
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        // As in Envoy, what is no text is shown with marks; lines of one name are joined.
        let value = String::from_utf8_lossy(value);
        headers
            .entry(name)
            .and_modify(|known| {
                known.push(',');
                known.push_str(&value);
            })
            .or_insert_with(|| value.clone().into_owned());
    }
    let size = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(-1);
    let (mut text, mut raw) = (String::new(), Vec::new());
    if let Some((check, shown)) = body {
        headers.insert("x-envoy-auth-partial-body".to_owned(), (!shown.whole).to_string());
        if check.as_bytes {
            raw = shown.bytes.to_vec();
        } else {
            text = String::from_utf8_lossy(&shown.bytes).into_owned();
        }
    }
    let http = HttpRequest {
        id: headers.get("x-request-id").cloned().unwrap_or_default(),
        method: request.method().to_owned(),
        path: request.target().to_owned(),
        host: request.authority().to_owned(),
        scheme: request.scheme().to_owned(),
        size,
        protocol: if request.version == Version::Http2 { "HTTP/2" } else { "HTTP/1.1" }.to_owned(),
        body: text,
        raw_body: raw,
        headers,
        ..HttpRequest::default()
    };
    let principal = connection.identity.as_deref().map(ToString::to_string).unwrap_or_default();
    let source = Peer { address: Some(of(connection.client)), principal, ..Peer::default() };
    let destination = Peer { address: Some(of(connection.destination)), ..Peer::default() };
    let sni = connection.server_name.as_deref().map(|sni| TlsSession { sni: sni.to_owned() });
    CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(source),
            destination: Some(destination),
            request: Some(Request { time: Some(now.into()), http: Some(http) }),
            context_extensions: BTreeMap::new(),
            tls_session: sni,
        }),
    }
}

fn of(address: SocketAddr) -> Address {
    let port = socket_address::PortSpecifier::PortValue(address.port().into());
    let socket = SocketAddress { address: address.ip().to_string(), port_specifier: Some(port) };
    Address { address: Some(address::Address::SocketAddress(socket)) }
}

fn judged(answer: CheckResponse) -> Answer {
    let code = answer.status.as_ref().map_or(0, |status| status.code);
    match (code, answer.http_response) {
        (0, Some(HttpResponse::OkResponse(ok))) => Answer::Allowed(changes(ok)),
        (0, None) => Answer::Allowed(Changes::default()),
        (_, Some(HttpResponse::ErrorResponse(_))) => {
            Answer::Failed(format!("it failed with the code {code}"))
        }
        // A refusal beside a good status is no agreement.
        (_, Some(HttpResponse::DeniedResponse(denied))) => Answer::Denied(refusal(denied)),
        (_, Some(HttpResponse::OkResponse(_)) | None) => {
            Answer::Denied(refusal(DeniedHttpResponse::default()))
        }
    }
}

fn changes(ok: OkHttpResponse) -> Changes {
    let removed = ok.headers_to_remove.into_iter().map(|name| name.to_ascii_lowercase());
    let removed = removed.filter(|name| permitted(name, b"")).map(|name| Edit::Remove(name.into()));
    let set = ok.headers.iter().filter_map(|option| edit(option, false));
    Changes {
        request: set.chain(removed).collect(),
        set_parameters: ok
            .query_parameters_to_set
            .into_iter()
            .map(|p| (escaped(&p.key), escaped(&p.value)))
            .collect(),
        remove_parameters: ok.query_parameters_to_remove.iter().map(|name| escaped(name)).collect(),
        response: ok.response_headers_to_add.iter().filter_map(|option| edit(option, true)).collect(),
    }
}

/// The change that an option asks for. Where it does not say how, a field of the request is set, one of the response is
/// added, as in Envoy.
fn edit(option: &HeaderValueOption, adds: bool) -> Option<Edit> {
    let header = option.header.as_ref()?;
    let name = header.key.to_ascii_lowercase();
    let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
    if !permitted(&name, value) {
        tracing::debug!(name, "an authorizer's header was passed over");
        return None;
    }
    let (name, value) = (name.into_boxed_str(), Value::Plain(value.into()));
    let add = match (option.append, option.append_action()) {
        (Some(append), _) => append,
        (None, HeaderAppendAction::AppendIfExistsOrAdd) => adds,
        (None, _) => false,
    };
    Some(if add { Edit::Add(name, value) } else { Edit::Set(name, value) })
}

fn refusal(denied: DeniedHttpResponse) -> Response {
    let code = denied.status.map(|status| status.code).and_then(|code| u16::try_from(code).ok());
    let status = code.filter(|code| (200..600).contains(code)).unwrap_or(403);
    let field = |option: &HeaderValueOption| match edit(option, true)? {
        Edit::Set(name, Value::Plain(value)) | Edit::Add(name, Value::Plain(value)) => {
            Some((name, std::str::from_utf8(&value).ok()?.into()))
        }
        _ => None,
    };
    let fields = denied.headers.iter().filter_map(field).collect();
    Response { status, fields, body: denied.body.into(), flag: Flag::Decided("UAEX") }
}

/// A part of a query, with what would end it escaped.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use bytes::Bytes;
    use proto::wire::core::{HeaderValue, QueryParameter};
    use proto::wire::ext_authz::HttpStatus;
    use proto::wire::rpc::Status;

    use super::*;

    fn connection() -> Connection {
        Connection {
            client: "10.0.0.1:4000".parse().unwrap(),
            destination: "10.9.0.1:80".parse().unwrap(),
            identity: Some(std::sync::Arc::new("spiffe://cluster.local/ns/a/sa/b".parse().unwrap())),
            server_name: None,
            secure: false,
            said: None,
        }
    }

    #[test]
    fn an_authorizer_is_told_of_the_whole_request() {
        let mut request = RequestHead::default();
        request.set_method("POST");
        request.set_authority("shop");
        request.set_target("/buy?n=1");
        for (name, value) in
            [("Accept", "a"), ("accept", "b"), ("Content-Length", "7"), ("X-Request-Id", "r")]
        {
            request.fields.push(name.as_bytes(), value.as_bytes());
        }
        let check = BodyCheck { max_bytes: 3, allow_partial: true, as_bytes: false };
        let shown = Shown { bytes: Bytes::from_static(b"abc"), whole: false };
        let asked = question(&request, &connection(), Some((check, shown)), SystemTime::UNIX_EPOCH);
        let attributes = asked.attributes.unwrap();
        assert_eq!(attributes.source.unwrap().principal, "spiffe://cluster.local/ns/a/sa/b");
        let http = attributes.request.unwrap().http.unwrap();
        assert_eq!((&*http.method, &*http.path, &*http.host, &*http.id), ("POST", "/buy?n=1", "shop", "r"));
        assert_eq!((http.size, &*http.body, http.headers["accept"].as_str()), (7, "abc", "a,b"));
        assert_eq!(http.headers["x-envoy-auth-partial-body"], "true");
    }

    fn option(key: &str, value: &str, append: Option<bool>) -> HeaderValueOption {
        let header = HeaderValue { key: key.into(), value: value.into(), ..HeaderValue::default() };
        HeaderValueOption { header: Some(header), append, ..HeaderValueOption::default() }
    }

    #[test]
    fn an_agreement_changes_the_request_as_far_as_it_may() {
        let ok = OkHttpResponse {
            headers: vec![
                option("X-A", "new", None),
                option("x-b", "more", Some(true)),
                option(":path", "/admin", None),
                option("host", "other", None),
                option("transfer-encoding", "chunked", None),
                option("x-c", "a\r\nb: c", None),
            ],
            headers_to_remove: vec!["X-Gone".into(), "content-length".into()],
            response_headers_to_add: vec![option("x-r", "1", None)],
            query_parameters_to_set: vec![QueryParameter { key: "n".into(), value: "a&b".into() }],
            query_parameters_to_remove: vec!["gone".into()],
        };
        let answer = CheckResponse {
            status: Some(Status::default()),
            http_response: Some(HttpResponse::OkResponse(ok)),
        };
        let Answer::Allowed(changes) = judged(answer) else { panic!("refused") };
        let mut request = RequestHead::default();
        request.set_target("/p?n=1&gone=2&k=3");
        for name in ["x-a", "x-b", "x-gone", "content-length"] {
            request.fields.push(name.as_bytes(), b"old");
        }
        changes.apply(&mut request);
        let fields: Vec<_> = request
            .fields
            .iter()
            .map(|(n, v)| String::from_utf8_lossy(&[n, b"=", v].concat()).into_owned())
            .collect();
        assert_eq!(fields, ["x-b=old", "content-length=old", "x-a=new", "x-b=more"]);
        assert_eq!(request.target(), "/p?k=3&n=a%26b");
        assert_eq!(changes.response.len(), 1);
    }

    #[test]
    fn what_is_no_agreement_refuses() {
        let denied = |code, status: Option<i32>| {
            let denied = DeniedHttpResponse {
                status: status.map(|code| HttpStatus { code }),
                headers: vec![option("x-why", "no", None)],
                body: "no".into(),
            };
            judged(CheckResponse {
                status: Some(Status { code, ..Status::default() }),
                http_response: Some(HttpResponse::DeniedResponse(denied)),
            })
        };
        for (answer, wanted) in [
            (denied(7, Some(401)), 401),
            (denied(7, None), 403),
            (denied(7, Some(7)), 403),
            (denied(0, None), 403),
        ] {
            let Answer::Denied(response) = answer else { panic!("allowed") };
            assert_eq!((response.status, response.fields.len()), (wanted, 1));
        }
        let bare = |code| {
            judged(CheckResponse { status: Some(Status { code, ..Status::default() }), http_response: None })
        };
        assert!(matches!(bare(7), Answer::Denied(response) if response.status == 403));
        assert!(matches!(bare(0), Answer::Allowed(_)));
    }
}
