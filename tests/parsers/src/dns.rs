//! DNS messages.

// The module is ztunnel's own: a program has no library to take it from.
#[allow(dead_code, unreachable_pub)]
#[path = "../../../ztunnel/src/dns/wire.rs"]
mod format;

use format::{Builder, Query, Response, answers, change_ttls, kind, readdress};

/// Any message is a query that is answered within its size, a response whose times can be changed, or neither.
pub(crate) fn message(bytes: &[u8]) {
    if let Ok(query) = Query::parse(bytes) {
        let _ = (query.host_name(), query.cache_key(0), query.bare_response(0));
        let limit = query.udp_size();
        let mut builder = Builder::new(&query, 0, limit);
        for _ in 0..200 {
            builder.answer(kind::A, 1, &[192, 0, 2, 1]);
        }
        let response = builder.finish(0);
        assert!(response.len() <= limit, "{} bytes, {limit} allowed", response.len());
        assert!(Response::parse(&response).is_some(), "our own response can't be read: {response:?}");
        assert!(answers(&response, &query, query.id()), "our own response is none to its query");
    }
    if let Some(response) = Response::parse(bytes) {
        let mut changed = bytes.to_vec();
        change_ttls(&mut changed, &response.ttls_at, |_| 7);
        let again = Response::parse(&changed).expect("with other times it reads as before");
        assert_eq!((again.flags, &again.ttls_at), (response.flags, &response.ttls_at));
        assert!(again.ttl.is_none_or(|ttl| ttl <= 7), "a time was not changed");
        for other in messages() {
            if let Ok(query) = Query::parse(&other) {
                readdress(&mut changed.clone(), &query);
                let _ = answers(bytes, &query, 7);
            }
        }
    }
}

/// Queries, with and without EDNS, and a response.
pub(crate) fn messages() -> Vec<Vec<u8>> {
    let name = b"\x04cart\x04shop\x03svc\x07cluster\x05local\0";
    let query = |kind: u8, edns: bool| {
        let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)];
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&[0, kind, 0, 1]);
        if edns {
            bytes.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0]);
        }
        bytes
    };
    let mut response = query(1, false);
    (response[2], response[7]) = (0x81, 1);
    response.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
    vec![query(1, false), query(28, true), query(33, true), query(255, false), response]
}
