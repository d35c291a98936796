//! The gRPC port: xDS and the CA on one server, over TLS with a certificate of the mesh's own root.
//!
//! Whoever connects proves by a token who he is, for every stream; certificates of clients are not asked for. The mesh's
//! configuration goes to node proxies and waypoints only, each as the pod that its token is bound to, and as long as that
//! pod is there. A waypoint is the Gateway whose namespace and name its service account has, and gets what is bound to
//! that one: it does not say which one it is, but for a check. A node proxy gets none of it.
//! What those may take up who prove nothing is in [`connections`].

mod connections;
mod proof;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::Extensions;
use proto::wire::core::Node;
use tonic::{Request, Status};
use xds::server::session::{audience, gateway};
use xds::server::{Admission, Authorizer, Caller, ClientStatus, Server};

pub use connections::{Connection, Limits, OfOneSource, Peer, Port, connections};
pub use proof::Proving;

use crate::ca::{Account, AuthenticationError, Authenticator, BoundPod, Pods};
use crate::gateways::Gateways;

/// How often it is looked whether the pods of streams are still there.
const LOOK: Duration = Duration::from_secs(10);
/// A stream may be there before its pod is heard of.
const LATENESS: Duration = Duration::from_secs(30);

/// Lets node proxies and waypoints in, by their tokens.
pub struct NodeProxies {
    authenticator: Arc<Authenticator>,
    cluster_id: String,
    trusted: Vec<Account>,
    gateways: Gateways,
}

impl NodeProxies {
    /// Those of these accounts.
    #[must_use]
    pub fn new(authenticator: Arc<Authenticator>, cluster_id: String, trusted: Vec<Account>) -> Self {
        Self { authenticator, cluster_id, trusted, gateways: Gateways::default() }
    }

    /// And the waypoints of these Gateways.
    #[must_use]
    pub fn and_waypoints(self, gateways: Gateways) -> Self {
        Self { gateways, ..self }
    }
}

#[tonic::async_trait]
impl Authorizer for NodeProxies {
    async fn authenticate(&self, request: &Request<()>) -> Result<Caller, Status> {
        let text = |key: &str| request.metadata().get(key).and_then(|value| value.to_str().ok());
        // As the CA has it: an empty one says nothing.
        let cluster = text("clusterid").filter(|cluster| !cluster.is_empty());
        if let Some(cluster) = cluster.filter(|cluster| *cluster != self.cluster_id) {
            return Err(Status::unauthenticated(format!(
                "this control plane is of the cluster {}, and not of {}",
                self.cluster_id,
                cluster.chars().take(100).collect::<String>()
            )));
        }
        let caller = self.authenticator.caller(text("authorization")).await.map_err(|error| match error {
            AuthenticationError::Rejected(_) => Status::unauthenticated(error.to_string()),
            AuthenticationError::Unavailable(_) => Status::unavailable(error.to_string()),
        })?;
        let known = |account: &Account| {
            account.namespace == caller.namespace && account.name == caller.service_account
        };
        let pod = name_of(&caller.namespace, caller.pod.as_ref());
        if self.trusted.iter().any(known) {
            return Ok(Caller { name: pod.into() });
        }
        let (namespace, account) = (&caller.namespace, &caller.service_account);
        if self.gateways.has(namespace, account) {
            return Ok(Caller { name: format!("{WAYPOINT}{namespace}/{account}{OF}{pod}").into() });
        }
        Err(Status::permission_denied(format!(
            "{caller} is no node proxy of this mesh: --trusted-node-accounts names those that are; nor is there a \
             Gateway {namespace}/{account} of a class of waypoints"
        )))
    }

    fn admit(&self, caller: &Caller, node: &Node) -> Result<Admission, Status> {
        // `ztunnel~IP~POD.NAMESPACE~DOMAIN`: what is counted as a proxy that enforces must be that proxy.
        let pod = node.id.split('~').nth(2).unwrap_or_default();
        match pod_of(caller) {
            Some((own, _)) if own != pod => {
                return Err(Status::permission_denied(format!(
                    "the token is of {}, and not of the pod {}",
                    caller.name,
                    shown(pod)
                )));
            }
            // Whoever has it could say to be any proxy. Our own have always one that is bound.
            None if audience(node) == Extensions::Culvert || waypoint_of(caller).is_some() => {
                return Err(Status::permission_denied(format!(
                    "the token, of {}, is not bound to a pod: use a projected service account token, as the chart does",
                    caller.name
                )));
            }
            _ => {}
        }
        let Some(own) = waypoint_of(caller) else {
            return Ok(Admission { interest: Some(Arc::new(|scope: &str| !scope.contains('/'))) });
        };
        match gateway(node) {
            Some(said) if said != own => Err(Status::permission_denied(format!(
                "the token is of the waypoint {own}, and not of {}: a waypoint runs under the service account of its \
                 Gateway's name",
                shown(said)
            ))),
            _ if audience(node) != Extensions::Culvert => Err(Status::permission_denied(format!(
                "the token is of the waypoint {own}, and the proxy knows none of our extensions: it could enforce nothing"
            ))),
            // What has a scope is another waypoint's, or a workload as nodes get them.
            _ => {
                let own: Arc<str> = own.into();
                Ok(Admission { interest: Some(Arc::new(move |scope: &str| *scope == *own)) })
            }
        }
    }
}

/// What begins the name of a caller that is a waypoint, before its Gateway; and what stands behind that.
const WAYPOINT: &str = "waypoint ";
const OF: &str = ", ";

/// The Gateway of a caller that is a waypoint, `NAMESPACE/NAME`.
#[must_use]
pub fn waypoint_of(caller: &Caller) -> Option<&str> {
    Some(caller.name.strip_prefix(WAYPOINT)?.split_once(OF)?.0)
}

fn shown(text: &str) -> String {
    text.chars().take(300).collect()
}

/// The pod that a token is bound to, or the namespace of an account whose token is bound to none.
fn name_of(namespace: &str, pod: Option<&BoundPod>) -> String {
    match pod {
        Some(pod) => format!("pod {}.{namespace} {}", pod.name, pod.uid),
        None => format!("an account of {namespace}"),
    }
}

/// Name and uid of the pod that a caller is, as [`name_of`] wrote them.
fn pod_of(caller: &Caller) -> Option<(&str, &str)> {
    let behind = caller.name.strip_prefix(WAYPOINT).and_then(|rest| rest.split_once(OF));
    behind.map_or(&*caller.name, |(_, pod)| pod).strip_prefix("pod ")?.split_once(' ')
}

/// Ends the streams of pods that are gone, and of waypoints whose Gateway is: a token is looked at when a stream begins,
/// and never again. What was said of the tokens of pods that are gone is forgotten, so that none comes back by it. Runs until
/// the process ends.
pub async fn end_streams_of_pods_that_are_gone(
    server: Server,
    pods: Arc<dyn Pods>,
    gateways: Gateways,
    authenticator: Arc<Authenticator>,
) {
    loop {
        tokio::time::sleep(LOOK).await;
        if pods.is_ready() {
            server.disconnect(|client| {
                let gone = is_of_a_pod_that_is_gone(client, &*pods);
                if let Some((_, uid)) = pod_of(&client.caller).filter(|_| gone) {
                    authenticator.forget(uid);
                }
                gone || is_of_a_gateway_that_is_gone(client, &gateways)
            });
        }
    }
}

fn is_of_a_gateway_that_is_gone(client: &ClientStatus, gateways: &Gateways) -> bool {
    let gateway = waypoint_of(&client.caller).and_then(|name| name.split_once('/'));
    gateway.is_some_and(|(namespace, name)| !gateways.has(namespace, name))
}

fn is_of_a_pod_that_is_gone(client: &ClientStatus, pods: &dyn Pods) -> bool {
    let Some((name, uid)) = pod_of(&client.caller) else { return false };
    let Some((pod, namespace)) = name.rsplit_once('.') else { return false };
    // A clock that was set back makes it younger, and it is looked at again later.
    let age = SystemTime::now().duration_since(client.connected).unwrap_or_default();
    let there = pods.pod(namespace, pod).is_some_and(|pod| pod.uid == uid && !pod.finished);
    if !there && age >= LATENESS {
        tracing::warn!(
            caller = &*client.caller.name,
            "the stream of a pod that is not there any more is ended"
        );
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::PodFacts;

    /// One pod, with uid 1.
    struct One {
        finished: bool,
    }

    impl Pods for One {
        fn is_ready(&self) -> bool {
            true
        }

        fn pod(&self, namespace: &str, name: &str) -> Option<PodFacts> {
            ((namespace, name) == ("mesh", "ztunnel.a")).then(|| PodFacts {
                uid: "1".to_owned(),
                node: None,
                service_account: "ztunnel".to_owned(),
                finished: self.finished,
            })
        }

        fn has_namespace(&self, _: &str) -> bool {
            true
        }

        fn runs_on(&self, _: &str, _: &str, _: &str) -> bool {
            false
        }
    }

    fn client(uid: &str, age: Duration) -> ClientStatus {
        let pod = BoundPod { name: "ztunnel.a".to_owned(), uid: uid.to_owned(), node: None };
        ClientStatus {
            id: xds::server::ClientId(1),
            node: Arc::default(),
            caller: Caller { name: name_of("mesh", Some(&pod)).into() },
            audience: Extensions::Culvert,
            peer: None,
            connected: SystemTime::now() - age,
            types: Vec::new(),
        }
    }

    #[test]
    fn a_stream_goes_with_its_pod() {
        let gone = |uid, age, finished| is_of_a_pod_that_is_gone(&client(uid, age), &One { finished });
        assert!(!gone("1", LATENESS, false));
        assert!(gone("1", LATENESS, true));
        assert!(gone("2", LATENESS, false), "another pod of the same name");
        assert!(!gone("2", Duration::from_secs(1), false), "it may not have been heard of");
        let unbound =
            ClientStatus { caller: Caller { name: name_of("mesh", None).into() }, ..client("1", LATENESS) };
        assert!(!is_of_a_pod_that_is_gone(&unbound, &One { finished: true }));
    }

    #[test]
    fn a_waypoint_goes_with_its_pod_and_with_its_gateway() {
        let name = format!("{WAYPOINT}mesh/w{OF}pod ztunnel.a.mesh 1");
        let of = |name: &str| ClientStatus { caller: Caller { name: name.into() }, ..client("1", LATENESS) };
        assert_eq!(
            (waypoint_of(&of(&name).caller), pod_of(&of(&name).caller)),
            (Some("mesh/w"), Some(("ztunnel.a.mesh", "1")))
        );
        assert!(is_of_a_pod_that_is_gone(&of(&name), &One { finished: true }));
        let gateways = Gateways::default();
        assert!(is_of_a_gateway_that_is_gone(&of(&name), &gateways));
        assert!(!is_of_a_gateway_that_is_gone(&client("1", LATENESS), &gateways), "a node proxy has none");
        gateways.set([("mesh".into(), "w".into())].into_iter());
        assert!(!is_of_a_gateway_that_is_gone(&of(&name), &gateways));
    }
}
