//! The control plane's own certificate, for ADS and the CA (15012) and the webhooks (15017), from its own CA: renewed
//! at half of its life, and at once when another root signs.

use std::time::Duration;

use identity::{ServingKey, Timestamp, Validity};

use super::current::Current;

/// How often the clock is looked at, since it jumps; and the wait after a failure.
const LOOK: Duration = Duration::from_secs(30);

/// The names by which a Service is called from anywhere in the cluster.
#[must_use]
pub fn service_names(service: &str, namespace: &str, cluster_domain: &str) -> Vec<String> {
    let mut names = vec![
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}"),
        format!("{service}.{namespace}.svc.{cluster_domain}"),
        service.to_owned(),
    ];
    names.dedup();
    names
}

/// Keeps `key` set to a certificate for `names` that is valid and of the signer in force. Runs until the process ends.
pub async fn keep_serving(current: Current, key: ServingKey, names: Vec<String>, validity: Validity) {
    let mut changes = current.subscribe();
    let mut renew_at = 0;
    let mut signer = None;
    loop {
        changes.mark_unchanged();
        let now = current.clock().now();
        if let Some(in_force) = current.get() {
            let other = signer.as_deref() != Some(in_force.authority.serial());
            if other || now.as_secs() >= renew_at {
                match in_force.authority.issue_server(&names, validity, now) {
                    Ok((issued, not_after)) => match key.set(issued) {
                        Ok(()) => {
                            let left = not_after.as_secs().saturating_sub(now.as_secs());
                            renew_at = now.as_secs().saturating_add(left / 2);
                            signer = Some(in_force.authority.serial().to_owned());
                            tracing::info!(
                                not_after = %Timestamp(not_after),
                                root = %in_force.authority.root(),
                                "serving certificate issued"
                            );
                        }
                        Err(error) => tracing::error!("the serving certificate can't be used: {error}"),
                    },
                    Err(error) => tracing::error!("the serving certificate was not issued: {error}"),
                }
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}
