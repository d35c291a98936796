//! WorkloadGroup (`networking.istio.io`): a template for machines that register with a control plane. Read and
//! checked; nothing registers with a directory of files.

use super::endpoint::{self, ENDPOINT};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, silent};
use crate::metadata::{METADATA, Metadata};
use crate::policy::selector::non_empty;
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::WorkloadGroup,
    group: "networking.istio.io",
    versions: &["v1", "v1beta1", "v1alpha3"],
    name: "WorkloadGroup",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "WorkloadGroup",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

static SPEC: Schema = Schema {
    name: "WorkloadGroup.spec",
    fields: &[nested("template", &ENDPOINT), nested("metadata", &OBJECT), nested("probe", &PROBE)],
};

static OBJECT: Schema =
    Schema { name: "WorkloadGroup.spec.metadata", fields: &[enforced("labels"), enforced("annotations")] };

const AGENT: &str = "the machine's agent probes its application";

static PROBE: Schema = Schema {
    name: "WorkloadGroup.spec.probe",
    fields: &[
        nested("httpGet", &HTTP_GET),
        nested("tcpSocket", &TCP_SOCKET),
        nested("exec", &EXEC),
        nested("grpc", &GRPC),
        silent("initialDelaySeconds", AGENT),
        silent("timeoutSeconds", AGENT),
        silent("periodSeconds", AGENT),
        silent("successThreshold", AGENT),
        silent("failureThreshold", AGENT),
    ],
};

static HTTP_GET: Schema = Schema {
    name: "WorkloadGroup.spec.probe.httpGet",
    fields: &[
        enforced("port"),
        nested("httpHeaders", &HEADER),
        silent("path", AGENT),
        silent("host", AGENT),
        silent("scheme", AGENT),
    ],
};

static HEADER: Schema = Schema {
    name: "WorkloadGroup.spec.probe.httpGet.httpHeaders",
    fields: &[enforced("name"), silent("value", AGENT)],
};

static TCP_SOCKET: Schema =
    Schema { name: "WorkloadGroup.spec.probe.tcpSocket", fields: &[enforced("port"), silent("host", AGENT)] };

static EXEC: Schema = Schema { name: "WorkloadGroup.spec.probe.exec", fields: &[enforced("command")] };

static GRPC: Schema =
    Schema { name: "WorkloadGroup.spec.probe.grpc", fields: &[enforced("port"), silent("service", AGENT)] };

fn parse(fields: &mut Fields<'_, '_>, _: &Metadata<'_>) -> Option<Resource> {
    let mut spec = fields.required("spec")?.fields()?;
    if let Some(mut template) = spec.required("template").and_then(Cursor::fields) {
        endpoint::read(&mut template, true);
    }
    if let Some(mut object) = spec.object("metadata") {
        endpoint::read_labels(&mut object, "labels");
        object.string_map("annotations");
    }
    if let Some(probe) = spec.object("probe") {
        read_probe(probe);
    }
    let message = "a WorkloadGroup has no effect here: nothing registers with a directory of files";
    spec.report(Code::FieldNotApplicable, message, "write a WorkloadEntry for each machine");
    Some(Resource::WorkloadGroup)
}

fn read_probe(mut probe: Fields<'_, '_>) {
    let mut ways = 0;
    for way in ["httpGet", "tcpSocket", "grpc"] {
        let Some(mut fields) = probe.object(way) else { continue };
        ways += 1;
        fields.required("port").and_then(|c| c.integer(1..=u16::MAX));
        if way != "httpGet" {
            continue;
        }
        fields.each("httpHeaders", |item| {
            let Some(mut header) = item.fields() else { return };
            let Some(mut name) = header.required("name") else { return };
            let token = |t: &str| t.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
            if name.node().as_str().is_some_and(|t| t.is_empty() || !token(t)) {
                name.invalid("is not the name of a header", "");
            }
            name.string();
        });
    }
    if let Some(mut exec) = probe.object("exec") {
        ways += 1;
        let mut words = 0;
        exec.each("command", |item| words += usize::from(non_empty(item).is_some()));
        if words == 0 {
            exec.report(Code::MissingField, "the command is missing", "");
        }
    }
    if ways != 1 {
        let message = "a probe is one of httpGet, tcpSocket, grpc and exec";
        probe.report(Code::InvalidValue, message, "");
    }
}
