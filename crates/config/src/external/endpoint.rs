//! What a ServiceEntry's endpoint, a WorkloadEntry and a WorkloadGroup's template have in common.

use std::sync::Arc;

use model::{Locality, Str};

use super::host::{Address, read_address};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced};
use crate::labels::Labels;
use crate::metadata::{is_label_key, is_label_value, is_subdomain};

/// `WorkloadEntry.spec`, and what has its form.
pub static ENDPOINT: Schema = Schema {
    name: "WorkloadEntry.spec",
    fields: &[
        enforced("address"),
        enforced("ports"),
        enforced("labels"),
        enforced("serviceAccount"),
        enforced("network"),
        enforced("locality"),
        enforced("weight"),
    ],
};

/// An endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EntryEndpoint {
    /// Where it is; `None` when only its network is known, so that it can be reached through a gateway only.
    pub address: Option<Address>,
    /// Its ports by the names of the service's.
    pub ports: Box<[(Str, u16)]>,
    /// Its labels.
    pub labels: Labels,
    /// Its service account.
    pub service_account: Str,
    /// Its network, empty for the default one.
    pub network: Str,
    /// Where it runs.
    pub locality: Arc<Locality>,
    /// Its weight among the endpoints of a service.
    pub weight: u32,
}

impl EntryEndpoint {
    /// The port behind a service's port of this name.
    #[must_use]
    pub fn port(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|(n, _)| **n == *name).map(|(_, p)| *p)
    }
}

/// Reads an endpoint. `is_template` says that it has no address yet.
pub fn read(fields: &mut Fields<'_, '_>, is_template: bool) -> EntryEndpoint {
    let address = read_place(fields, is_template);
    let mut ports = Vec::new();
    if let Some(cursor) = fields.take("ports") {
        cursor.entries(|name, mut value| {
            if name.is_empty() {
                value.invalid("a port needs a name", "");
            }
            let name = value.context().pool.string(name);
            ports.extend(value.integer(1..=u16::MAX).map(|p| (name, p)));
        });
    }
    let labels = read_labels(fields, "labels");
    let service_account = match fields.take("serviceAccount") {
        Some(mut cursor) => {
            if cursor.node().as_str().is_some_and(|t| !is_subdomain(t)) {
                cursor.invalid("is not the name of a service account", "");
            }
            let text = cursor.node().as_str().unwrap_or_default();
            let account = cursor.context().pool.string(text);
            cursor.string();
            account
        }
        None => fields.context().pool.string("default"),
    };
    let network = fields.string("network").unwrap_or_default();
    let network = fields.context().pool.string(network);
    let locality = fields.take("locality").map(read_locality).unwrap_or_default();
    // 0 is what the field is when nothing is said (protobuf), so it is no weight of its own, as in Istio.
    let weight = fields.integer("weight", 0..=u32::MAX).unwrap_or_default().max(1);
    EntryEndpoint {
        address,
        ports: ports.into(),
        labels,
        service_account,
        network,
        locality: locality.into(),
        weight,
    }
}

fn read_place(fields: &mut Fields<'_, '_>, is_template: bool) -> Option<Address> {
    let has_network = fields.take("network").is_some_and(|c| c.node().as_str() != Some(""));
    match fields.take("address") {
        Some(mut cursor) if is_template => {
            cursor.invalid("a template has no address", "remove it: each workload brings its own");
            None
        }
        Some(cursor) if cursor.node().as_str() != Some("") => read_address(cursor),
        _ if is_template => None,
        _ if has_network => {
            let message = "without an address it can be reached through a gateway of its network only, and there is \
                           none: it takes no traffic";
            fields.report(Code::WithoutEffect, message, "give its address");
            None
        }
        _ => {
            fields.report(Code::MissingField, "the address is missing", "");
            None
        }
    }
}

/// Reads the labels that an object is given.
pub fn read_labels(fields: &mut Fields<'_, '_>, name: &'static str) -> Labels {
    let mut pairs = Vec::new();
    if let Some(cursor) = fields.take(name) {
        cursor.entries(|key, mut value| {
            if !is_label_key(key) {
                value.invalid("the key is not [prefix/]name with a name of at most 63 characters", "");
            }
            if value.node().as_str().is_some_and(|v| !is_label_value(v)) {
                value.invalid("not at most 63 letters, digits, '-', '_' and '.'", "");
            }
            pairs.extend(value.string().map(|v| (key, v)));
        });
    }
    fields.context().pool.labels(pairs)
}

/// `region`, `region/zone` or `region/zone/subzone`.
fn read_locality(mut cursor: Cursor<'_, '_>) -> Locality {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return Locality::default();
    };
    let parts: Vec<&str> = text.split('/').collect();
    if parts.len() > 3 || parts.first().is_some_and(|p| p.is_empty()) {
        cursor.invalid(format_args!("{text:?} is not region/zone/subzone"), "");
        return Locality::default();
    }
    let pool = &mut cursor.context().pool;
    let mut part = |index: usize| pool.string(parts.get(index).copied().unwrap_or_default());
    Locality { region: part(0), zone: part(1), subzone: part(2), ..Locality::default() }
}
