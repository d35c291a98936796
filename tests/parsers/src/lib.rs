//! Every parser of bytes from outside, as a function of bytes that panics when the parser breaks its word.
//!
//! `fuzz/` runs them under coverage guidance for as long as one likes; `tests/short_run.rs` runs the same functions
//! on their seeds and on thousands of changed ones, with every other test.
#![forbid(unsafe_code)]
// A panic is how a target says that something is wrong.
#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used, clippy::indexing_slicing)]

mod config_files;
mod config_objects;
mod decisions;
mod discovery;
mod dns;
mod http;
mod identities;
mod mutate;
mod tokens;
mod tunnels;
mod wire;

pub use mutate::Mutator;

/// A parser with what it promises.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which is that of the binary in `fuzz/`.
    pub name: &'static str,
    /// Feeds the parser, and panics if it does not keep its word.
    pub run: fn(&[u8]),
    /// Good input, to be changed.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How many inputs a short run tries.
    pub cases: usize,
}

/// All of them.
pub const TARGETS: [Target; 23] = [
    Target {
        name: "config_manifest",
        run: config_files::manifest,
        seeds: config_files::manifests,
        cases: 6000,
    },
    Target {
        name: "config_object",
        run: config_objects::object,
        seeds: config_objects::objects,
        cases: 6000,
    },
    Target { name: "spiffe_id", run: identities::spiffe_id, seeds: identities::spiffe_ids, cases: 20_000 },
    Target { name: "ca_pem", run: identities::ca_pem, seeds: identities::ca_pems, cases: 3000 },
    Target {
        name: "certificate",
        run: identities::certificate,
        seeds: identities::certificates,
        cases: 20_000,
    },
    Target {
        name: "signing_request",
        run: identities::signing_request,
        seeds: identities::signing_requests,
        cases: 3000,
    },
    Target { name: "tls_server", run: identities::tls_server, seeds: identities::client_hellos, cases: 3000 },
    Target {
        name: "tls_client",
        run: identities::tls_client,
        seeds: identities::server_flights,
        cases: 3000,
    },
    Target { name: "hbone_authority", run: tunnels::authority, seeds: tunnels::authorities, cases: 20_000 },
    Target { name: "hbone_headers", run: tunnels::headers, seeds: tunnels::header_values, cases: 20_000 },
    Target { name: "hbone_server", run: tunnels::server, seeds: tunnels::client_frames, cases: 10_000 },
    Target { name: "hbone_client", run: tunnels::client, seeds: tunnels::server_frames, cases: 10_000 },
    Target { name: "wds", run: wire::any, seeds: wire::messages, cases: 20_000 },
    Target { name: "xds_requests", run: discovery::requests, seeds: discovery::conversations, cases: 20_000 },
    Target { name: "http_request", run: http::request, seeds: http::requests, cases: 20_000 },
    Target { name: "http_response", run: http::response, seeds: http::responses, cases: 20_000 },
    Target { name: "http_chunks", run: http::chunks, seeds: http::bodies, cases: 20_000 },
    Target { name: "http_connection", run: http::connection, seeds: http::conversations, cases: 3000 },
    Target { name: "http_decision", run: decisions::request, seeds: decisions::requests, cases: 10_000 },
    Target { name: "http_matcher", run: decisions::matcher, seeds: decisions::matchers, cases: 4000 },
    Target { name: "token", run: tokens::token, seeds: tokens::tokens, cases: 3000 },
    Target { name: "jwk_set", run: tokens::key_set, seeds: tokens::key_sets, cases: 3000 },
    Target { name: "dns_message", run: dns::message, seeds: dns::messages, cases: 20_000 },
];

/// The target of this name.
///
/// # Panics
/// There is none.
#[must_use]
pub fn target(name: &str) -> Target {
    TARGETS.into_iter().find(|target| target.name == name).expect("a target of this name")
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

fn seeds_of(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
