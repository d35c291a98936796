//! PeerAuthentication (`security.istio.io`): whether a workload takes connections without an identity.
//!
//! The mode of a workload is that of the policy that selects it, else that of its namespace, else that of the root
//! namespace, else PERMISSIVE; UNSET passes the question on. Where several hold at one level, the oldest does, by
//! `creationTimestamp` and then by name. STRICT is enforced as a DENY policy on connections without an identity,
//! which the workloads list that it holds for: see [`super::mode`].

use std::collections::BTreeMap;

use model::Str;

use super::selector::{SELECTOR, read_selector};
use crate::diagnostic::Code;
use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::labels::Selector;
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::PeerAuthentication,
    group: "security.istio.io",
    versions: &["v1", "v1beta1"],
    name: "PeerAuthentication",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "PeerAuthentication",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

static SPEC: Schema = Schema {
    name: "PeerAuthentication.spec",
    fields: &[nested("mtls", &MTLS), nested("selector", &SELECTOR), nested("portLevelMtls", &MTLS)],
};

static MTLS: Schema = Schema { name: "PeerAuthentication.spec.mtls", fields: &[enforced("mode")] };

/// A PeerAuthentication.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAuthentication {
    /// Which workloads of its namespace it is for; `None` for all of them, or of the mesh in the root namespace.
    pub selector: Option<Selector>,
    /// The mode; `None` for that of the level above.
    pub mode: Option<Mode>,
    /// The modes of ports of the workload.
    pub ports: BTreeMap<u16, Mode>,
    /// When it was made (RFC 3339), empty when not said.
    pub created: Str,
}

impl PeerAuthentication {
    /// STRICT on all ports of what is selected.
    pub(crate) fn strict(selector: Option<Selector>) -> Self {
        Self { selector, mode: Some(Mode::Strict), ports: BTreeMap::new(), created: Str::default() }
    }
}

/// What a workload, or a port of it, takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// Connections with and without an identity. DISABLE is the same here: HBONE always proves one.
    Permissive,
    /// Connections with an identity only.
    Strict,
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let created = fields.context().pool.string(metadata.created);
    let mut spec = fields.required("spec")?.fields()?.without_nulls();
    let selector = read_selector(&mut spec);
    let mode = spec.object("mtls").and_then(read_mode);
    let mut ports = BTreeMap::new();
    if let Some(mut cursor) = spec.take("portLevelMtls") {
        if selector.is_none() {
            cursor.invalid("only a policy with a selector may have modes for ports", "add a selector");
        }
        if cursor.node().value == crate::tree::Value::Mapping(Vec::new()) {
            cursor.invalid("is empty", "remove it, or name a port and its mode");
        }
        cursor.entries(|key, mut value| {
            let digits = !key.is_empty() && key.bytes().all(|b| b.is_ascii_digit());
            match key.parse::<u16>().ok().filter(|p| digits && *p > 0) {
                None => {
                    value.invalid(format_args!("{key:?} is not a port"), "write a number from 1 to 65535");
                }
                Some(port) => {
                    let mode = value.fields().and_then(read_mode);
                    ports.extend(mode.map(|m| (port, m)));
                }
            }
        });
    }
    Some(Resource::PeerAuthentication(Box::new(PeerAuthentication { selector, mode, ports, created })))
}

fn read_mode(fields: Fields<'_, '_>) -> Option<Mode> {
    let mut fields = fields.without_nulls();
    let mut cursor = fields.take("mode")?;
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    match text {
        "UNSET" => None,
        "PERMISSIVE" => Some(Mode::Permissive),
        "STRICT" => Some(Mode::Strict),
        "DISABLE" => {
            let message =
                "DISABLE acts as PERMISSIVE: peers in the mesh still connect through HBONE, with identity";
            cursor.report(
                Code::ActsOtherwise,
                message,
                "write PERMISSIVE, or take the workload out of the mesh",
            );
            Some(Mode::Permissive)
        }
        other => {
            cursor
                .invalid(format_args!("{other:?} is no mode"), "write STRICT, PERMISSIVE, DISABLE or UNSET");
            None
        }
    }
}
