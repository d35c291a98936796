//! Heads of HTTP/2, to and from our own form.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, COOKIE, HOST};
use http::uri::PathAndQuery;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, request, response,
};
use model::http::is_authority;

use crate::http::h1::{Framing, Refusal, check_target, parse_length};
use crate::http::head::{Fields, Known, MAX_FIELDS, RequestHead, ResponseHead, Version};

/// The protocol that a stream of HTTP/2 may be switched to.
pub(crate) const WEBSOCKET: &str = "websocket";

/// Reads a request's head; `ended` says that no body follows.
///
/// # Errors
/// It is one that HTTP/1.1 could not say, or too large.
pub(crate) fn request(
    parts: &request::Parts,
    ended: bool,
    head: &mut RequestHead,
) -> Result<Framing, Refusal> {
    head.clear();
    head.version = Version::Http2;
    if parts.headers.len() > MAX_FIELDS {
        return Err(Refusal::HeadTooLarge);
    }
    head.set_method(parts.method.as_str());
    let protocol = parts.extensions.get::<h2::ext::Protocol>();
    let is_websocket = protocol.is_some_and(|protocol| protocol.as_str().eq_ignore_ascii_case(WEBSOCKET));
    let has_target = parts.method != Method::CONNECT || is_websocket;
    let target = parts.uri.path_and_query().map_or("", PathAndQuery::as_str);
    if has_target {
        check_target(target.as_bytes())?;
    }
    // What begins with no slash is in no rule for paths, and no target of HTTP/1.1.
    let is_server_wide = target == "*" && parts.method == Method::OPTIONS;
    if has_target && !target.starts_with('/') && !is_server_wide {
        return Err(Refusal::Malformed(
            "a path that begins with no slash, and is not the asterisk of OPTIONS",
        ));
    }
    head.set_target(target);
    let authority = match (parts.uri.authority(), parts.headers.get(HOST)) {
        (Some(authority), Some(host))
            if !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes()) =>
        {
            return Err(Refusal::Malformed("a Host that is not the authority"));
        }
        (Some(authority), _) => authority.as_str().as_bytes(),
        (None, Some(host)) => host.as_bytes(),
        (None, None) => return Err(Refusal::Malformed("no authority")),
    };
    if !is_authority(authority) {
        return Err(Refusal::Malformed("an authority that is none"));
    }
    head.set_authority(std::str::from_utf8(authority).unwrap_or_default());
    if parts.headers.get_all(HOST).iter().count() > 1 {
        return Err(Refusal::Malformed("more than one Host"));
    }
    copy(&parts.headers, &mut head.fields);
    head.fields.remove_known(|known| known == Known::Host);
    if is_websocket {
        as_switch(head);
        // What comes on the stream is of the other protocol.
        return framing(&parts.headers, ended).map(|_| Framing::None);
    }
    framing(&parts.headers, ended)
}

/// Makes a request for WebSocket by HTTP/2 what it is by HTTP/1.1 (RFC 8441 section 5), as it is decided about and sent on.
fn as_switch(head: &mut RequestHead) {
    head.extended = true;
    head.set_method("GET");
    head.fields.remove_known(|known| known == Known::ContentLength);
    head.fields.push(b"connection", b"upgrade");
    head.fields.push(b"upgrade", WEBSOCKET.as_bytes());
}

/// Copies fields. Cookies, which HTTP/2 may split, become one again (RFC 9113 section 8.2.3).
fn copy(map: &HeaderMap, fields: &mut Fields) {
    let mut cookies = map.get_all(COOKIE).iter();
    let several = cookies.next().is_some() && cookies.next().is_some();
    for (name, value) in map {
        if !(several && name == COOKIE) {
            fields.push(name.as_str().as_bytes(), value.as_bytes());
        }
    }
    if several {
        let all: Vec<&[u8]> = map.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
        fields.push(b"cookie", &all.join(&b"; "[..]));
    }
}

/// Reads trailers. What would say something about the message as a whole is left out (RFC 9110 section 6.5.1).
pub(crate) fn fields(map: &HeaderMap) -> Fields {
    let mut fields = Fields::default();
    copy(map, &mut fields);
    fields.remove_known(|known| known.is_hop_by_hop() || matches!(known, Known::Host | Known::ContentLength));
    fields
}

fn framing(map: &HeaderMap, ended: bool) -> Result<Framing, Refusal> {
    let mut lengths = map.get_all(CONTENT_LENGTH).iter();
    let (length, more) = (lengths.next(), lengths.next().is_some());
    if more {
        return Err(Refusal::Malformed("more than one Content-Length"));
    }
    let length = length.map(|value| parse_length(value.as_bytes())).transpose()?;
    Ok(match length {
        _ if ended => Framing::None,
        Some(length) if length > 0 => Framing::Length(length),
        _ => Framing::Chunked,
    })
}

/// Reads a response's head.
pub(crate) fn response(parts: &response::Parts, ended: bool, head: &mut ResponseHead) -> Framing {
    head.clear();
    head.status = parts.status.as_u16();
    copy(&parts.headers, &mut head.fields);
    framing(&parts.headers, ended).unwrap_or(if ended { Framing::None } else { Framing::Chunked })
}

/// The fields as HTTP/2 has them. They share one buffer; what is no field there is left out.
pub(crate) fn map(fields: &Fields) -> HeaderMap {
    let mut values = Vec::with_capacity(fields.size());
    for (_, value) in fields.iter() {
        values.extend_from_slice(value);
    }
    let mut values = Bytes::from(values);
    let mut map = HeaderMap::with_capacity(fields.count() + 2);
    for (name, value) in fields.iter() {
        let value = values.split_to(value.len());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_maybe_shared(value)) {
            map.append(name, value);
        }
    }
    map
}

fn put_length(map: &mut HeaderMap, framing: Framing) {
    if let Framing::Length(length) = framing {
        map.insert(CONTENT_LENGTH, length.into());
    }
}

/// A response's head for a client.
pub(crate) fn to_response(head: &ResponseHead, framing: Framing) -> Response<()> {
    let mut message = Response::new(());
    *message.status_mut() = StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    *message.headers_mut() = map(&head.fields);
    put_length(message.headers_mut(), framing);
    message
}

/// A request's head for a server; `None` if HTTP/2 can't say it.
pub(crate) fn to_request(head: &RequestHead, framing: Framing) -> Option<Request<()>> {
    let uri = Uri::builder().scheme(head.scheme()).authority(head.authority()).path_and_query(head.target());
    let mut message = Request::new(());
    *message.uri_mut() = uri.build().ok()?;
    *message.method_mut() = Method::from_bytes(head.method().as_bytes()).ok()?;
    *message.headers_mut() = map(&head.fields);
    put_length(message.headers_mut(), framing);
    *message.version_mut() = http::Version::HTTP_2;
    Some(message)
}

/// The head of the request for WebSocket that `head` is by HTTP/1.1, for a server of HTTP/2 (RFC 8441 section 5). The key,
/// which has no meaning there, stays: a server that is a proxy needs it for one of HTTP/1.1 behind it.
pub(crate) fn to_switch(head: &RequestHead) -> Option<Request<()>> {
    let mut message = to_request(head, Framing::None)?;
    *message.method_mut() = Method::CONNECT;
    message.extensions_mut().insert(h2::ext::Protocol::from_static(WEBSOCKET));
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_begins_with_a_slash_or_is_the_asterisk_of_options() {
        for (method, target, taken) in [
            ("OPTIONS", "*", true),
            ("GET", "*", false),
            ("POST", "*", false),
            ("GET", "/*", true),
            ("GET", "?a", false),
            ("OPTIONS", "?a", false),
        ] {
            let uri = Uri::builder().scheme("http").authority("a").path_and_query(target).build().unwrap();
            let (parts, ()) = Request::builder().method(method).uri(uri).body(()).unwrap().into_parts();
            let mut head = RequestHead::default();
            assert_eq!(request(&parts, true, &mut head).is_ok(), taken, "{method} {target}");
        }
    }
}
