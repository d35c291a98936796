//! Views for people and for `culvert`, on the metrics port. Who asks them must come from the pod itself, as a
//! port-forward does: they tell what runs where.

use std::sync::{Arc, Mutex, PoisonError};

use process::http::{Request, Response, Routes, StatusCode};
use proto::Extensions;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use xds::server::{ClientStatus, Server};

use crate::ca::Ca;
use crate::objects::unknown_fields;
use crate::push::Exceptions;
use crate::registry::{Ask, Overview, Registry};
use crate::status::{Followers, proxy_name};

/// What the views are of.
#[derive(Clone)]
pub struct Views {
    /// The streams.
    pub server: Server,
    /// The policies.
    pub followers: Followers,
    /// What is known of the cluster.
    pub overview: Arc<Mutex<Overview>>,
    /// What proxies of another make are told otherwise.
    pub exceptions: Exceptions,
    /// The CA.
    pub ca: Ca,
    /// For questions to the registry.
    pub asks: mpsc::Sender<Ask>,
    /// This control plane.
    pub pod: Arc<str>,
    /// Its revision.
    pub revision: Arc<str>,
    /// Who leads.
    pub leader: watch::Receiver<Option<String>>,
}

impl Views {
    /// Adds the views.
    #[must_use]
    pub fn routes(self, routes: Routes) -> Routes {
        let views = Arc::new(self);
        let page = |read: fn(&Views) -> Value| {
            let views = views.clone();
            move |request: Request| {
                let views = views.clone();
                async move { local(&request).unwrap_or_else(|| Response::json(&read(&views))) }
            }
        };
        let asked = |read: fn(&Registry) -> Value| {
            let views = views.clone();
            move |request: Request| {
                let views = views.clone();
                async move {
                    match local(&request) {
                        Some(refused) => refused,
                        None => views.ask(read).await,
                    }
                }
            }
        };
        routes
            .get("/version", "version, revision, and who leads", page(Self::version))
            .get("/debug/syncz", "proxies, and what each was sent and has acknowledged", page(Self::syncz))
            .get("/debug/policies", "policies, and which proxies enforce them", page(Self::policies))
            .get("/debug/registry", "what is known of the cluster", page(Self::registry))
            .get("/debug/ca", "the certificate authority", page(Self::ca))
            .get("/debug/diagnostics", "what is said of the cluster's objects", asked(diagnostics))
            .get("/debug/settings", "the mesh's settings in force", asked(settings))
    }

    fn version(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "revision": &*self.revision,
            "pod": &*self.pod,
            "leader": *self.leader.borrow(),
        })
    }

    fn syncz(&self) -> Value {
        self.server.clients().iter().map(client).collect()
    }

    fn policies(&self) -> Value {
        serde_json::to_value(self.followers.local(&self.server)).unwrap_or_default()
    }

    fn registry(&self) -> Value {
        let overview = self.overview.lock().unwrap_or_else(PoisonError::into_inner).clone();
        json!({
            "cluster": overview,
            "unknownFields": unknown_fields(),
            "otherMakesAreToldOtherwise": self.exceptions.list(),
        })
    }

    fn ca(&self) -> Value {
        let (status, domains) = (self.ca.current().status(), self.ca.current().domains());
        let in_force = self.ca.current().get();
        let roots = in_force.as_ref().map(|i| i.record.roots.as_slice()).unwrap_or_default();
        let bundle = identity::TrustBundle::new(roots, (*domains).clone()).ok();
        let roots: Vec<Value> = bundle.iter().flat_map(|bundle| {
            let root = |root: &identity::Root| {
                json!({ "id": root.id.to_string(), "notAfter": identity::Timestamp(root.not_after).to_string() })
            };
            bundle.snapshot().roots().iter().map(root).collect::<Vec<_>>()
        }).collect();
        json!({
            "trustDomain": domains.own.to_string(),
            "roots": roots,
            "signing": status.root,
            "signer": status.signer,
            "expires": status.expires,
            "rotation": status.rotation.as_deref().unwrap_or("none"),
            "error": status.error,
            "givenError": status.given_error,
        })
    }

    async fn ask(&self, read: fn(&Registry) -> Value) -> Response {
        let (answer, answered) = oneshot::channel();
        let ask: Ask = Box::new(move |registry| {
            // The one who asked may be gone.
            let _ = answer.send(read(registry));
        });
        match self.asks.send(ask).await {
            Ok(()) => match answered.await {
                Ok(value) => Response::json(&value),
                Err(_) => Response::text(StatusCode::SERVICE_UNAVAILABLE, "the process is ending\n"),
            },
            Err(_) => Response::text(StatusCode::SERVICE_UNAVAILABLE, "the process is ending\n"),
        }
    }
}

/// Refuses who does not come from the pod itself.
fn local(request: &Request) -> Option<Response> {
    let loopback = request.peer().is_some_and(|peer| peer.ip().to_canonical().is_loopback());
    (!loopback).then(|| {
        let text = "this page is for requests from the pod itself: use kubectl port-forward\n";
        Response::text(StatusCode::FORBIDDEN, text)
    })
}

fn diagnostics(registry: &Registry) -> Value {
    serde_json::to_value(registry.repository().review()).unwrap_or_default()
}

fn settings(registry: &Registry) -> Value {
    let settings = registry.repository().settings();
    json!({
        "trustDomain": settings.trust_domains.own.to_string(),
        "trustDomainAliases": settings.trust_domains.aliases.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "rootNamespace": &*settings.root_namespace,
        "clusterDomain": &*settings.cluster_domain,
        "outbound": format!("{:?}", settings.outbound),
    })
}

fn client(client: &ClientStatus) -> Value {
    let metadata = |key: &str| {
        let field = client.node.metadata.as_ref()?.fields.get(key)?;
        match field.kind.as_ref()? {
            prost_types::value::Kind::StringValue(text) => Some(text.chars().take(256).collect::<String>()),
            _ => None,
        }
    };
    let types = client.types.iter().map(|t| {
        let of_type = json!({
            "sent": t.sent.to_string(),
            "acked": t.acked.to_string(),
            "wildcard": t.wildcard,
            "names": t.names,
            "nack": t.last_nack.as_deref().filter(|_| !t.rejected.is_empty() || t.blurred.is_some()),
            "rejected": t.rejected.iter().map(|r| json!({ "name": &*r.name, "reason": &*r.reason })).collect::<Vec<_>>(),
        });
        (t.type_url.to_string(), of_type)
    });
    let since = k8s_openapi::jiff::Timestamp::try_from(client.connected).ok();
    json!({
        "id": client.node.id,
        "name": proxy_name(client),
        "node": metadata("NODE_NAME"),
        "version": metadata("CULVERT_VERSION"),
        "extensions": client.audience == Extensions::Culvert,
        "caller": &*client.caller.name,
        "address": client.peer.map(|peer| peer.ip().to_canonical().to_string()),
        "connectedSince": since.map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        "types": types.collect::<serde_json::Map<String, Value>>(),
    })
}
