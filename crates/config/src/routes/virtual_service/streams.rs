//! The entries of a VirtualService for connections: `tls` and `tcp`.

use ipnet::IpNet;
use model::Str;
use model::http::{RouteId, SourceMatch};

use super::{DESTINATION, MESH, destination, read_source, weighted};
use crate::diagnostic::Code;
use crate::fields::{Fields, Schema, enforced, nested, refused};
use crate::policy::pattern::parse_range;
use crate::routes::BackendDraft;

pub(super) static TLS: Schema = Schema {
    name: "VirtualService.spec.tls[]",
    fields: &[nested("match", &TLS_MATCH), nested("route", &ROUTE_DESTINATION)],
};
static TLS_MATCH: Schema = Schema {
    name: "TLSMatchAttributes",
    fields: &[
        enforced("sniHosts"),
        enforced("destinationSubnets"),
        enforced("port"),
        enforced("sourceLabels"),
        enforced("sourceNamespace"),
        enforced("gateways"),
    ],
};
pub(super) static TCP: Schema = Schema {
    name: "VirtualService.spec.tcp[]",
    fields: &[nested("match", &TCP_MATCH), nested("route", &ROUTE_DESTINATION)],
};
static TCP_MATCH: Schema = Schema {
    name: "L4MatchAttributes",
    fields: &[
        enforced("destinationSubnets"),
        enforced("port"),
        enforced("sourceLabels"),
        enforced("sourceNamespace"),
        enforced("gateways"),
        refused("sourceSubnet", "upstream ignores it", "use sourceNamespace or sourceLabels"),
    ],
};
static ROUTE_DESTINATION: Schema =
    Schema { name: "RouteDestination", fields: &[nested("destination", &DESTINATION), enforced("weight")] };

/// An entry of `tls` or `tcp`.
#[derive(Clone, PartialEq, Debug)]
pub struct StreamEntry {
    /// Where it is written.
    pub id: RouteId,
    /// Whether it is for connections that begin with a TLS handshake.
    pub tls: bool,
    /// What it asks of a connection; one must hold.
    pub matches: Box<[StreamMatchDraft]>,
    /// Where connections go.
    pub backends: Box<[BackendDraft]>,
}

/// What an entry of `tls` or `tcp` asks of a connection.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StreamMatchDraft {
    /// The port.
    pub port: Option<u16>,
    /// Server names that the client may name: one, or `*.` and what it ends with. Empty: any, or none.
    pub sni: Box<[Str]>,
    /// Where it may go to.
    pub destinations: Box<[IpNet]>,
    /// The client.
    pub source: Option<Box<SourceMatch>>,
}

/// Reads an entry of `tls` or `tcp`; `None` when none of its matches is for the mesh.
pub(super) fn read(
    entry: &mut Fields<'_, '_>,
    id: RouteId,
    namespace: &Str,
    tls: bool,
    mesh: bool,
) -> Option<StreamEntry> {
    let (mut matches, mut any) = (Vec::new(), false);
    entry.each("match", |item| {
        any = true;
        let Some(mut fields) = item.fields() else { return };
        let sni = if tls { fields.string_list("sniHosts") } else { Vec::new() };
        if tls && sni.is_empty() {
            fields.report(Code::MissingField, "a match of a TLS route needs sniHosts", "");
        }
        let mut destinations = Vec::new();
        fields.each("destinationSubnets", |mut item| match item.node().as_str().and_then(parse_range) {
            Some(range) => destinations.push(range),
            None => item.invalid("is neither an IP address nor a range", ""),
        });
        let port = fields.integer("port", 1..=u16::MAX);
        let source = read_source(&mut fields);
        let gateways = fields.string_list("gateways");
        if if gateways.is_empty() { mesh } else { gateways.contains(&MESH) } {
            let sni = sni.into_iter().map(|s| Str::from(s.to_ascii_lowercase().as_str())).collect();
            matches.push(StreamMatchDraft { port, sni, destinations: destinations.into(), source });
        }
    });
    if tls && !any {
        entry.report(Code::MissingField, "a TLS route needs a match with sniHosts", "");
    }
    if !any && mesh {
        matches.push(StreamMatchDraft::default());
    }
    let mut backends = Vec::new();
    entry.each("route", |item| {
        let Some(mut fields) = item.fields() else { return };
        let backend = fields.required("destination").and_then(|c| destination(c, namespace));
        let weight = fields.integer("weight", 0..=i32::MAX.unsigned_abs());
        backends.extend(backend.map(|b| (weight, BackendDraft { weight: weight.unwrap_or(0), ..b })));
    });
    if backends.is_empty() {
        entry.report(Code::MissingField, "a route needs a destination", "");
    }
    let backends = weighted(entry, backends);
    (!matches.is_empty()).then(|| StreamEntry { id, tls, matches: matches.into(), backends })
}
