//! What `istioctl analyze` says of whole sets of resources, for the analyzers of kinds that the node proxy acts on.
//! Where we differ, it is in [`DIFFERENCES`] with the reason; the analyzers of other kinds are in [`NOT_OURS`].
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use config::compile::Options;
use config::diagnostic::{Code, Severity};
use config::repository::{Content, Repository};
use serde_json::Value;

mod peer;
use peer::peer_cases;

/// Analyzers that look at what has no part in an L4 mesh of files, by the start of their name.
const NOT_OURS: &[(&str, &str)] = &[
    ("annotations.", "the list of all annotations of all of Istio's parts"),
    ("applicationUID.", "sidecars run as user 1337; the node proxy runs in no pod"),
    ("authn.BlockedCIDRs", "fetching of JWKS, which is L7"),
    ("deployment.", "Deployments: without a cluster nothing makes their pods"),
    (
        "destinationrule.CaCertificateAnalyzer",
        "without caCertificates the roots of the system are asked, never nobody",
    ),
    ("envoyfilter.", "there is no Envoy"),
    ("externalcontrolplane.", "webhooks of a control plane"),
    ("gateway.", "Gateways are not acted on"),
    ("injection.", "there is no injection"),
    ("k8sgateway.", "Gateways are not acted on"),
    ("schema.ValidationAnalyzer.VirtualService", "matches that repeat others are not looked for"),
    ("service.PortNameAnalyzer", "the names of ports decide nothing at L4"),
    ("sidecar.", "there are no sidecars"),
    ("telemetry.", "selectors of Telemetry are for sidecars, and Lightstep is not spoken to"),
    ("virtualservice.Conflicting", "of two for a host the one that is not in force is named, and not both"),
    ("virtualservice.DestinationHostAnalyzer", "gateways at the edge"),
    ("virtualservice.GatewayAnalyzer", "gateways at the edge"),
    ("webhook.", "webhooks of a control plane"),
];

/// The cases in which we differ on purpose: the id, what we say as `CODE resource`, and why.
const DIFFERENCES: &[(&str, &[&str], &str)] = &[
    (
        "038-virtualServiceDestinationRules",
        &[
            "IST0101 VirtualService default/reviews",
            "IST0101 VirtualService default/reviews-bogussubset",
            "IST0101 VirtualService default/reviews-fqdn",
            "IST0101 VirtualService default/reviews-mirror",
            "IST0101 VirtualService default/reviews-mirror-bogussubset",
            "IST0174 DestinationRule default/reviews",
        ],
        "the case has no Service reviews, which we say of every resource that names it",
    ),
    (
        "067-missing-Addresses-and-Protocol-in-Service-Entry",
        &[],
        "hosts without addresses get virtual ones, so nothing is missing (Istio's own default since 1.25)",
    ),
    (
        "103-ServiceEntry-Addresses-Allocated",
        &["IST0134 ServiceEntry default/address-allocated"],
        "status is a report and no input: each node works out the addresses, and for resolution NONE there are none",
    ),
];

/// Resources in the cases that are not valid, which the analyzers do not look at.
const INVALID: &[(&str, &str, &str)] = &[(
    "050-authorizationpolicies",
    "ServiceEntry httpbin/istio",
    "a wildcard host with resolution DNS and no endpoints: Istio's webhook refuses it (TestValidateServiceEntries-92)",
)];

/// Istio's code for ours.
fn istio_code(code: Code, kind: &str) -> Option<&'static str> {
    match code {
        Code::NamesNothing if kind == "DestinationRule" => Some("IST0174"),
        Code::NoWorkload if kind == "DestinationRule" => Some("IST0173"),
        // That no waypoint enforces it, or that another is in force.
        Code::WithoutEffect if matches!(kind, "DestinationRule" | "VirtualService") => None,
        Code::NamesNothing => Some("IST0101"),
        Code::NoWorkload => Some("IST0127"),
        Code::WithoutEffect => Some("IST0134"),
        _ => None,
    }
}

/// The cases' pods have no addresses, without which a pod in a file is no workload yet.
fn with_addresses(yaml: &str) -> String {
    let mut number = 0;
    let documents = yaml.split("\n---").map(|document| {
        let is_pod = document.lines().any(|line| line.trim_end() == "kind: Pod");
        number += 1;
        let status = if is_pod { format!("\nstatus: {{podIP: 10.0.0.{number}}}\n") } else { String::new() };
        format!("{}{status}", document.trim_end())
    });
    documents.collect::<Vec<_>>().join("\n---")
}

fn said(case: &Value) -> Vec<String> {
    let mut repository = Repository::new(Options::default());
    for (index, input) in case["inputs"].as_array().unwrap().iter().enumerate() {
        let text = with_addresses(input["yaml"].as_str().unwrap());
        repository.stage(&format!("{index}.yaml").into(), Content::Bytes(text.as_bytes()));
    }
    repository.commit();
    let review = repository.review();
    let invalid = |d: &config::diagnostic::Diagnostic| {
        let listed = |(id, resource, _): &(&str, &str, &str)| {
            case["id"] == *id && d.resource.as_ref().is_some_and(|r| r.to_string() == *resource)
        };
        INVALID.iter().any(listed)
    };
    let review: Vec<_> = review.into_iter().filter(|d| !invalid(d)).collect();
    // Entries of one host are valid each.
    let refused =
        |d: &&config::diagnostic::Diagnostic| d.severity == Severity::Error && d.code != Code::HostConflict;
    let errors: Vec<_> = review.iter().filter(refused).collect();
    assert!(errors.is_empty(), "{}: {errors:?}", case["id"]);
    let named = |d: &config::diagnostic::Diagnostic| {
        let resource = d.resource.as_ref()?;
        Some(format!("{} {resource}", istio_code(d.code, &resource.kind)?))
    };
    let mut said: Vec<_> = review.iter().filter_map(named).collect();
    said.sort();
    said
}

#[test]
fn sets_of_resources_are_judged_as_by_istioctl() {
    let Some(file) = peer_cases("analyzers.json") else { return };
    let (mut wrong, mut tried, mut met) = (Vec::new(), 0, 0);
    let mut left = std::collections::BTreeMap::new();
    for case in file["cases"].as_array().unwrap() {
        let (id, analyzer) = (case["id"].as_str().unwrap(), case["analyzer"].as_str().unwrap());
        if let Some((start, _)) = NOT_OURS.iter().find(|(start, _)| analyzer.starts_with(start)) {
            *left.entry(*start).or_insert(0) += 1;
            continue;
        }
        tried += 1;
        let got = said(case);
        let mut expected: Vec<String> = case["expect"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| format!("{} {}", e["code"].as_str().unwrap(), e["resource"].as_str().unwrap()))
            .collect();
        if let Some((_, ours, _)) = DIFFERENCES.iter().find(|(d, _, _)| *d == id) {
            met += 1;
            assert_ne!(expected, got, "{id} is listed as a difference, and is none");
            expected = ours.iter().map(|s| (*s).to_owned()).collect();
        }
        expected.sort();
        if got != expected {
            wrong.push(format!("{id} ({analyzer})\n    expected {expected:?}\n    got      {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let unmet: Vec<_> = NOT_OURS.iter().filter(|(start, _)| !left.contains_key(start)).collect();
    assert!(unmet.is_empty(), "listed as not ours, and there is no such case: {unmet:?}");
    let (all, left) = (file["cases"].as_array().unwrap().len(), left.values().sum::<usize>());
    assert_eq!((tried + left, met), (all, DIFFERENCES.len()), "{tried} tried, {left} not ours");
    assert!(tried >= 9 && all >= 56, "{tried} of {all}");
}
