//! What Istio's webhook and CRDs accept, warn of and refuse. Where we differ, it is in [`DIFFERENCES`], with the reason; a
//! case that differs without being there fails, and so does one that is there and differs no more. Kinds that are not read
//! come out alike, whatever is in them ([`UNREAD`]).
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use config::diagnostic::Severity;
use config::fields::Context;
use config::labels::Pool;
use config::resource::{Reading, read};
use config::tree::{Limits, documents, parse};
use serde_json::Value;

mod peer;
use peer::peer_cases;

const KINDS: [&str; 10] = [
    "AuthorizationPolicy",
    "DestinationRule",
    "PeerAuthentication",
    "RequestAuthentication",
    "Service",
    "ServiceEntry",
    "Telemetry",
    "VirtualService",
    "WorkloadEntry",
    "WorkloadGroup",
];

/// Kinds that are not read: what we say of each object of theirs, and why.
const UNREAD: &[(&str, &str, &str)] = &[
    ("EnvoyFilter", "invalid", "there is no Envoy: refused, with what does its job"),
    ("Gateway", "warning", "gateways at the edge are not acted on, and it is said"),
    ("ProxyConfig", "warning", "there are no sidecars, and it is said"),
    ("Sidecar", "warning", "there are no sidecars, and it is said"),
    ("TrafficExtension", "invalid", "no code is loaded: refused, with what does its job"),
    ("WasmPlugin", "invalid", "no code is loaded: refused, with what does its job"),
];

/// The cases in which we differ on purpose: the id, what we say, and why.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("TestValidateVirtualService-20", "warning", EDGE),
    ("TestValidateVirtualService-31", "valid", "matches that repeat others are not looked for"),
    (
        "TestValidateVirtualService-34",
        "valid",
        "a server name that is an address matches nothing, and costs nothing",
    ),
    ("TestValidateChainingVirtualService-372", "warning", EDGE),
    (
        "TestValidateDestinationRule-54",
        "invalid",
        "a rule for some clients can't be kept by a waypoint, which speaks for all",
    ),
    ("TestValidateDestinationRule-59", "valid", EMPTY_POOL),
    ("TestValidateDestinationRule-64", "warning", SECRET),
    ("TestValidateDestinationRule-73", "warning", SECRET),
    (
        "TestValidateTelemetry-316",
        "valid",
        "of several entries of tracing each is read, and Istio reads the first",
    ),
    (
        "telemetry-valid-full",
        "invalid",
        "a metric of one's own is refused, where Envoy would have to be configured",
    ),
    ("TestValidateDestinationRule-61", "valid", EMPTY_POOL),
    ("TestValidateServiceEntries-78", "warning", WILDCARD),
    ("TestValidateServiceEntries-79", "warning", WILDCARD),
    ("TestValidateServiceEntries-84", "warning", WILDCARD),
    (
        "TestValidateServiceEntries-95",
        "warning",
        "a NONE entry without addresses is told by the request's host only",
    ),
    ("TestValidateServiceEntries-105", "invalid", UNIX),
    (
        "TestValidateServiceEntries-125",
        "invalid",
        "Istio warns and goes on; no name server and no address can stand for half a label, so the host would vanish",
    ),
    ("TestValidateServiceEntries-133", "invalid", DYNAMIC),
    ("TestValidateServiceEntries-134", "invalid", DYNAMIC),
    ("TestValidateAuthorizationPolicy-159", "warning", TARGET),
    ("TestValidateAuthorizationPolicy-160", "warning", TARGET),
    (
        "TestValidateAuthorizationPolicy-168",
        "valid",
        "in the test it is an empty `from`, which JSON of protobuf lost",
    ),
    (
        "TestValidatePeerAuthentication-309",
        "valid",
        "in the test it is an empty `portLevelMtls`, lost in the same way",
    ),
    (
        "serviceentry-valid-empty-selector",
        "warning",
        "the CRD takes it, and Istio's webhook warns of it as we do (TestValidateServiceEntries-111)",
    ),
    (
        "workloadentry-valid-missing-address-network-set",
        "warning",
        "the CRD takes it, and Istio's webhook warns of it as we do (TestValidateWorkloadEntry-38)",
    ),
    ("workloadentry-valid-uds-abstract", "invalid", UNIX),
];

const EDGE: &str = "it is for gateways at the edge only, and says so: nothing enforces it in the mesh";
const SECRET: &str = "Secrets are not fetched: what is to be mounted where is said";
const EMPTY_POOL: &str = "an empty connectionPool asks for nothing";
const WILDCARD: &str =
    "a wildcard host without addresses is told by the request's host only, which L4 does not see";
const UNIX: &str =
    "only a sidecar can connect to a socket in a pod's file system; silently having no endpoint is worse";
const DYNAMIC: &str =
    "DYNAMIC_DNS looks up each request's host, which L4 does not see: refused until there are waypoints";
const TARGET: &str =
    "a policy for a Gateway fails closed until a waypoint is there, which is worth a warning";

/// What we say of an object, and all that we say.
fn verdict(object: &Value) -> (&'static str, String) {
    let text = object.to_string();
    let document = documents(&text).next().unwrap();
    let node = parse(document, &Limits::default()).unwrap().unwrap();
    let (file, mut pool) = ("case.json".into(), Pool::default());
    let mut context = Context::new(&file, document, &mut pool);
    let reading = read(&node, &mut context);
    let diagnostics = context.take_diagnostics();
    let said: Vec<_> =
        diagnostics.iter().map(|d| format!("{} {}: {}", d.severity, d.code, d.message)).collect();
    let verdict = match reading {
        Reading::Invalid(..) | Reading::Unidentified => "invalid",
        _ if diagnostics.iter().any(|d| d.severity == Severity::Error) => "invalid",
        _ if diagnostics.iter().any(|d| d.severity == Severity::Warning) => "warning",
        _ => "valid",
    };
    (verdict, said.join("; "))
}

#[test]
fn resources_are_judged_as_by_istio() {
    let Some(file) = peer_cases("validation.json") else { return };
    let (mut wrong, mut tried, mut met) = (Vec::new(), 0, Vec::new());
    for case in file["cases"].as_array().unwrap().iter().chain(file["crdCases"].as_array().unwrap()) {
        let resource = &case["resource"];
        let kind = resource["kind"].as_str().unwrap();
        tried += 1;
        let (id, expected) = (case["id"].as_str().unwrap(), case["expect"].as_str().unwrap());
        let (ours, said) = verdict(resource);
        if let Some((_, listed, _)) = UNREAD.iter().find(|(unread, ..)| *unread == kind) {
            if ours != *listed {
                wrong.push(format!("{id}: a {kind} is {ours} instead of {listed} ({said})"));
            }
            continue;
        }
        assert!(KINDS.contains(&kind), "{id}: a {kind}");
        if let Some((id, listed, _)) = DIFFERENCES.iter().find(|(d, _, _)| *d == id) {
            met.push(*id);
            if ours != *listed || ours == expected {
                wrong.push(format!("{id}: listed as {listed} instead of {expected}, and is {ours} ({said})"));
            }
        } else if ours != expected {
            wrong.push(format!("{id}: {ours} instead of {expected} ({said})\n    {resource}"));
        }
    }
    let unmet: Vec<_> = DIFFERENCES.iter().filter(|(id, _, _)| !met.contains(id)).collect();
    assert!(unmet.is_empty(), "listed, and no such case: {unmet:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let all = ["cases", "crdCases"].map(|list| file[list].as_array().unwrap().len());
    assert!(tried == all[0] + all[1] && tried >= 243, "{tried} of {all:?} cases");
}
