//! The accounts of the proxies of nodes (`--trusted-node-accounts`): which they are, and whether what they need can be
//! done where they are.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Client;
use kube::api::{Api, PostParams};

use crate::ca::{Account, CaSettings, OWN_CONFIG_MAP};
use crate::settings::Flags;

/// For a question about permissions.
const REVIEW: Duration = Duration::from_secs(10);

/// The accounts.
///
/// # Errors
/// One is no `NAMESPACE/NAME`.
pub fn accounts(flags: &Flags) -> anyhow::Result<Vec<Account>> {
    if flags.trusted_node_accounts.is_empty() {
        return Ok(CaSettings::new(&flags.namespace, &flags.cluster_id).trusted);
    }
    let accounts = flags.trusted_node_accounts.iter().map(|text| {
        text.trim().parse::<Account>().map_err(|error| anyhow::anyhow!("--trusted-node-accounts: {error}"))
    });
    accounts.collect()
}

/// The namespaces of the mesh's own pods.
#[must_use]
pub fn namespaces(flags: &Flags, accounts: &[Account]) -> BTreeSet<String> {
    let of_proxies = accounts.iter().map(|account| account.namespace.clone());
    of_proxies.chain([flags.namespace.clone()]).collect()
}

/// Makes sure of the permissions in other namespaces with node proxies: without them these would get certificates, and
/// the exchange of the root would wait for them without an end. Those of the own namespace come with the chart.
///
/// # Errors
/// Something is not permitted. That it could not be asked is told only.
pub async fn may_serve(client: &Client, flags: &Flags, accounts: &[Account]) -> anyhow::Result<()> {
    for namespace in namespaces(flags, accounts).into_iter().filter(|n| *n != flags.namespace) {
        let status = ResourceAttributes {
            resource: Some("pods".to_owned()),
            subresource: Some("status".to_owned()),
            ..ResourceAttributes::default()
        };
        let map = ResourceAttributes {
            resource: Some("configmaps".to_owned()),
            name: Some(OWN_CONFIG_MAP.to_owned()),
            ..ResourceAttributes::default()
        };
        for (what, attributes) in [("pods/status", status), ("its ConfigMap of roots", map)] {
            match tokio::time::timeout(REVIEW, may_patch(client, &namespace, attributes)).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => anyhow::bail!(
                    "--trusted-node-accounts names accounts of the namespace {namespace}, where this control plane may \
                     not patch {what}: node proxies there could not say which roots they trust, or not get the \
                     root. The chart's value controlPlane.trustedNodeAccounts names them and gives the permission"
                ),
                // It may be starting; what is missing is then told when it is needed.
                Ok(Err(error)) => tracing::warn!(namespace, "permissions could not be looked at: {error}"),
                Err(_) => tracing::warn!(namespace, "permissions could not be looked at: no answer in time"),
            }
        }
    }
    Ok(())
}

async fn may_patch(client: &Client, namespace: &str, what: ResourceAttributes) -> Result<bool, kube::Error> {
    let attributes =
        ResourceAttributes { namespace: Some(namespace.to_owned()), verb: Some("patch".to_owned()), ..what };
    let spec = SelfSubjectAccessReviewSpec {
        resource_attributes: Some(attributes),
        ..SelfSubjectAccessReviewSpec::default()
    };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}
