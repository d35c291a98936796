//! The certificate authority: the roots that proxies trust, and what its control planes say of it.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde_json::Value;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Finding, Grade, text, time_of};
use crate::cluster::Cluster;
use crate::proxy_status::MONITORING;

/// A root that ends sooner is worth a word.
const ROOT_LEFT: Duration = Duration::from_secs(90 * 86_400);
/// And so is a certificate that signs, of those that somebody has given.
const GIVEN_LEFT: Duration = Duration::from_secs(30 * 86_400);
/// Control planes that are asked: each has the same authority, or says why not.
const ASKED: usize = 3;

/// What is to be said of it.
///
/// # Errors
/// The API server can't be asked, or the roots can't be read.
pub(super) fn findings(cluster: &Cluster, now: SystemTime) -> Result<Vec<Finding>> {
    let mut found = roots(cluster, now)?;
    for pod in cluster.pods("culvertd")?.iter().take(ASKED) {
        // One that doesn't answer is a finding of its own.
        let Ok(Some(said)) = cluster.pod_json(pod, MONITORING, "/debug/ca") else { continue };
        for finding in signer(&said, now) {
            if !found.iter().any(|known| known.detail == finding.detail) {
                found.push(finding);
            }
        }
    }
    Ok(found)
}

/// What a control plane says of the authority that it signs by.
fn signer(said: &Value, now: SystemTime) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut problem = |error: &str| {
        if !error.is_empty() {
            let remedy =
                "correct the Secret: what was in force before stays in force, if there was something";
            found.push(Finding::new("certificates", Grade::Problem, error, remedy));
        }
    };
    problem(text(said, "/error"));
    problem(text(said, "/givenError"));
    let expires = text(said, "/expires");
    let mut ends = said.get("roots").and_then(Value::as_array).into_iter().flatten();
    let is_a_roots = ends.any(|root| text(root, "/notAfter") == expires);
    let left = time_of(expires).map(|end| end.duration_since(now).unwrap_or_default());
    if let Some(left) = left.filter(|left| !is_a_roots && *left < GIVEN_LEFT) {
        let hours = left.as_secs() / 3600;
        let detail =
            format!("the certificate that signs, or one above it, ends in {hours} hours ({expires})");
        let remedy = "put a new one into the Secret cacerts in time: nobody else can renew it";
        let grade = if left.is_zero() { Grade::Problem } else { Grade::Note };
        found.push(Finding::new("certificates", grade, detail, remedy));
    }
    found
}

/// When the roots that proxies trust end.
fn roots(cluster: &Cluster, now: SystemTime) -> Result<Vec<Finding>> {
    let path = format!("/api/v1/namespaces/{}/configmaps/culvert-ca-root-cert", cluster.system);
    let Some(map) = cluster.find(&path)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    let pem = text(&map, "/data/root-cert.pem");
    let blocks = x509_parser::pem::Pem::iter_from_buffer(pem.as_bytes());
    for block in blocks {
        let block = block.context("ConfigMap culvert-ca-root-cert: root-cert.pem is not PEM")?;
        let (_, root) = X509Certificate::from_der(&block.contents)
            .context("ConfigMap culvert-ca-root-cert: root-cert.pem holds no certificate")?;
        let end = u64::try_from(root.validity().not_after.timestamp()).unwrap_or_default();
        let left =
            (SystemTime::UNIX_EPOCH + Duration::from_secs(end)).duration_since(now).unwrap_or_default();
        let (subject, days) = (root.subject().to_string(), left.as_secs() / 86_400);
        found.push(if left.is_zero() {
            let remedy = "rotate the root: nothing that it signed is trusted any more";
            Finding::new("certificates", Grade::Problem, format!("root {subject} has expired"), remedy)
        } else if left < ROOT_LEFT {
            let detail = format!("root {subject} ends in {days} days");
            Finding::new("certificates", Grade::Note, detail, "rotate the root in time")
        } else {
            Finding::new("certificates", Grade::Ok, format!("root {subject} is good for {days} days"), "")
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_authority_that_is_not_taken_over_or_ends_soon_is_said() {
        let now = time_of("2026-01-01T00:00:00Z").unwrap();
        let said = |expires: &str, given: Value| {
            let roots = json!([{ "id": "a", "notAfter": "2026-01-20T00:00:00Z" }]);
            let said = json!({ "expires": expires, "roots": roots, "error": null, "givenError": given });
            signer(&said, now).into_iter().map(|f| (f.grade, f.detail)).collect::<Vec<_>>()
        };
        assert_eq!(said("2027-01-01T00:00:00Z", Value::Null), []);
        // Said of the root already.
        assert_eq!(said("2026-01-20T00:00:00Z", Value::Null), []);
        let ends = said("2026-01-02T00:00:00Z", Value::Null);
        assert!(matches!(&ends[..], [(Grade::Note, detail)] if detail.contains("24 hours")), "{ends:?}");
        let given = said("2027-01-01T00:00:00Z", json!("Secret x/cacerts: no key"));
        assert_eq!(given, [(Grade::Problem, "Secret x/cacerts: no key".to_owned())]);
    }
}
