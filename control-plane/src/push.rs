//! From changes of the model to resources of the proxies, once each, for both audiences: proxies of Istio's make get
//! what they can enforce, our own get all.
//!
//! What Istio's wire can't say is never left out in silence. A policy that such a proxy could not enforce as it stands is
//! replaced, for those proxies alone, by one that refuses everything in its scope: an unknown policy would be skipped
//! there. A policy that is only tried (`istio.io/dry-run`) is not sent to them, because those before 1.29 enforce it. A
//! service loses its session affinity towards them. All of that is said in [`Push::exceptions`].
//!
//! The same goes to a proxy of ours that is too old for a field ([`Features`]): it would skip the field, and enforce
//! something else. The condition `Enforced` names it.

mod reach;
mod waypoints;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use model::{Action, Change, Policy, PolicyKey, Rule, Service, Workload};
use prost::Message;
use proto::wire::waypoint::Reachable;
use proto::wire::workload::{Address, address};
use proto::{
    ADDRESS_TYPE_URL, AUTHENTICATION_TYPE_URL, AUTHORIZATION_TYPE_URL, AUTHORIZER_TYPE_URL, EncodeError,
    Extensions, Features, HTTP_POLICY_TYPE_URL, HTTP_SERVICE_TYPE_URL, MESH_SETTINGS_TYPE_URL,
    RATE_LIMIT_TYPE_URL, REACHABLE_TYPE_URL, TRAFFIC_TYPE_URL,
};
use xds::server::{Change as Update, Generation, Resource, Server};

use reach::Reach;
use waypoints::Waypoints;
pub use waypoints::{Enforcers, MOST_BYTES};

/// The types that are served, in the order in which new ones are sent; what goes is removed in the reverse order. What is
/// named comes before who names it: settings before policies, policies before the workloads that list them; and what a
/// waypoint does for a service last, when all is there that it is done with: who authorizes, policies, how and where
/// its back ends are spoken to. So no request is let through by a route whose policies are not there yet, and none fails
/// because it is sent to what is not known yet.
pub const TYPES: [&str; 10] = [
    MESH_SETTINGS_TYPE_URL,
    AUTHORIZATION_TYPE_URL,
    AUTHORIZER_TYPE_URL,
    AUTHENTICATION_TYPE_URL,
    RATE_LIMIT_TYPE_URL,
    HTTP_POLICY_TYPE_URL,
    TRAFFIC_TYPE_URL,
    ADDRESS_TYPE_URL,
    REACHABLE_TYPE_URL,
    HTTP_SERVICE_TYPE_URL,
];

/// As many as are worth reading. Those of policies are all kept: their conditions are made of them.
const MOST_EXCEPTIONS: usize = 1000;

/// Where resources go.
pub trait Sink {
    /// Takes changes; the generation that they are a part of.
    fn apply(&self, changes: Vec<Update>) -> Generation;
}

impl Sink for Server {
    fn apply(&self, changes: Vec<Update>) -> Generation {
        Self::apply(self, changes)
    }
}

/// What proxies of another make are told otherwise, by the resource's name.
#[derive(Clone, Debug, Default)]
pub struct Exceptions(Arc<Mutex<BTreeMap<Arc<str>, String>>>);

impl Exceptions {
    /// All of them: the resource and what is otherwise.
    #[must_use]
    pub fn list(&self) -> BTreeMap<Arc<str>, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is otherwise about a resource.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn set(&self, name: &Arc<str>, what: Option<String>) {
        self.set_up_to(MOST_EXCEPTIONS, name, what);
    }

    fn set_up_to(&self, most: usize, name: &Arc<str>, what: Option<String>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match what {
            None => {
                all.remove(name);
            }
            Some(what) => {
                if all.get(name) != Some(&what) && (all.len() < most || all.contains_key(name)) {
                    tracing::warn!(resource = &**name, what, "proxies of another make are told otherwise");
                    all.insert(name.clone(), what);
                }
            }
        }
    }
}

/// Encodes changes and gives them on.
pub struct Push<S> {
    sink: S,
    exceptions: Exceptions,
    waypoints: Waypoints,
    enforcers: Enforcers,
    reach: Reach,
    encoded: u64,
}

impl<S: Sink> Push<S> {
    /// For a sink that knows nothing yet.
    #[must_use]
    pub fn new(sink: S, exceptions: Exceptions) -> Self {
        let enforcers = Enforcers::default();
        let waypoints = Waypoints::new(MOST_BYTES, enforcers.clone());
        Self { sink, exceptions, waypoints, enforcers, reach: Reach::default(), encoded: 0 }
    }

    /// Which waypoints enforce which policies.
    #[must_use]
    pub fn enforcers(&self) -> &Enforcers {
        &self.enforcers
    }

    /// What proxies of another make are told otherwise.
    #[must_use]
    pub fn exceptions(&self) -> &Exceptions {
        &self.exceptions
    }

    /// How many resources were encoded so far.
    #[must_use]
    pub fn encoded(&self) -> u64 {
        self.encoded
    }

    /// How many workloads were looked at so far for who of the waypoints is sent them.
    #[must_use]
    pub fn looks(&self) -> u64 {
        self.reach.looks()
    }

    /// Gives changes on; the generation that has them all.
    pub fn push(&mut self, changes: &[Change]) -> Generation {
        let of_waypoints = changes.iter().filter(|change| self.waypoints.take(change)).count();
        self.encoded += of_waypoints as u64;
        let mut updates = Vec::new();
        if of_waypoints > 0 {
            updates = self.waypoints.updates(&self.exceptions);
            for (waypoint, service, wants) in self.waypoints.moves() {
                self.reach.want(&waypoint, &service, wants);
            }
            self.reach.wish(self.waypoints.wishes());
        }
        if let Some(labels) = self.waypoints.new_labels() {
            self.reach.relabel(&labels);
        }
        for change in changes {
            updates.extend(self.encode(change));
            match change {
                Change::SetWorkload(workload) => self.reach.set(workload),
                Change::RemoveWorkload(uid) => self.reach.remove(uid, &mut updates),
                Change::SetService(service) => self.reach.service(&service.key(), Some(service)),
                Change::RemoveService(key) => self.reach.service(key, None),
                _ => {}
            }
        }
        let Self { reach, waypoints, .. } = self;
        let asked = |label: &str| waypoints.asks_about(label);
        let encoded = |workload: &Workload| {
            let message = proto::encode_workload(workload).ok()?;
            let workload = Some(proto::with_labels(message, &workload.labels, asked));
            Some(Reachable { workload }.encode_to_vec().into())
        };
        self.encoded += reach.settle(encoded, &mut updates) as u64;
        self.sink.apply(updates)
    }

    fn encode(&mut self, change: &Change) -> Option<Update> {
        self.encoded += 1;
        Some(match change {
            Change::SetWorkload(workload) => self.workload(workload),
            Change::SetService(service) => Update::Set(self.service(service)),
            Change::SetPolicy(policy) => Update::Set(self.policy(policy)),
            Change::SetSettings(settings) => {
                let body: Bytes = proto::encode_settings(settings).encode_to_vec().into();
                Update::Set(Resource {
                    type_url: MESH_SETTINGS_TYPE_URL,
                    name: proto::MESH_SETTINGS_NAME.into(),
                    aliases: Vec::new(),
                    scope: None,
                    plain: None,
                    culvert: Some(body),
                    needs: Features::NONE,
                })
            }
            Change::RemoveWorkload(uid) => {
                self.exceptions.set(uid, None);
                Update::Remove { type_url: ADDRESS_TYPE_URL, name: uid.clone() }
            }
            Change::RemoveService(key) => self.remove(ADDRESS_TYPE_URL, proto::service_name(key).into()),
            Change::RemovePolicy(key) => self.remove(AUTHORIZATION_TYPE_URL, policy_name(key)),
            // What waypoints are told is staged for each of them.
            _ => {
                self.encoded -= 1;
                return None;
            }
        })
    }

    fn remove(&self, type_url: &'static str, name: Arc<str>) -> Update {
        self.exceptions.set(&name, None);
        Update::Remove { type_url, name }
    }

    fn workload(&self, workload: &Workload) -> Update {
        let name: Arc<str> = workload.uid.clone();
        let message = match proto::encode_workload(workload) {
            Ok(message) => message,
            // A name that no API server takes. Unknown, its traffic is refused where it is captured.
            Err(error) => {
                self.exceptions.set(&name, Some(format!("not sent at all: {error}")));
                return Update::Remove { type_url: ADDRESS_TYPE_URL, name };
            }
        };
        let address = Address { r#type: Some(address::Type::Workload(message)) };
        let body = Bytes::from(address.encode_to_vec());
        Update::Set(Resource {
            type_url: ADDRESS_TYPE_URL,
            name,
            aliases: proto::workload_aliases(workload).map(Arc::from).collect(),
            // A waypoint gets those that it needs under names of its own.
            scope: Some(workload.namespace.clone()),
            culvert: Some(body.clone()),
            plain: Some(body),
            needs: Features::NONE,
        })
    }

    fn service(&self, service: &Service) -> Resource {
        let name: Arc<str> = proto::service_name(&service.key()).into();
        let body = |service: &Service, extensions| -> Result<Bytes, EncodeError> {
            let message = proto::encode_service(service, extensions)?;
            Ok(Address { r#type: Some(address::Type::Service(message)) }.encode_to_vec().into())
        };
        let culvert = body(service, Extensions::Culvert);
        let mut otherwise = culvert.as_ref().err().map(|error| format!("not sent at all: {error}"));
        let plain = body(service, Extensions::None).or_else(|error| {
            let without = Service { session_affinity: None, ..service.clone() };
            let lesser = body(&without, Extensions::None);
            let what = if lesser.is_ok() { "session affinity is not kept" } else { "not sent" };
            otherwise.get_or_insert_with(|| format!("{what}: {error}"));
            lesser
        });
        self.exceptions.set(&name, otherwise);
        Resource {
            type_url: ADDRESS_TYPE_URL,
            name,
            aliases: proto::service_aliases(service).map(Arc::from).collect(),
            // Which of all has an address is decided where they are known.
            scope: None,
            plain: plain.ok(),
            culvert: culvert.ok(),
            needs: Features::of_service(service),
        }
    }

    fn policy(&self, policy: &Policy) -> Resource {
        let name = policy_name(&policy.key);
        let body = |policy: &Policy, extensions| -> Result<Bytes, EncodeError> {
            Ok(proto::encode_policy(policy, extensions)?.encode_to_vec().into())
        };
        let (plain, otherwise) = if policy.dry_run {
            (None, Some("not sent: older ones would enforce what is only to be tried".to_owned()))
        } else {
            match body(policy, Extensions::None) {
                Ok(plain) => (Some(plain), None),
                Err(error) => {
                    let closed = body(&refusing_all(policy), Extensions::None).ok();
                    (closed, Some(format!("everything in its scope is refused: {error}")))
                }
            }
        };
        let culvert = body(policy, Extensions::Culvert)
            .or_else(|_| body(&refusing_all(policy), Extensions::Culvert))
            .ok();
        self.exceptions.set_up_to(usize::MAX, &name, otherwise);
        Resource {
            type_url: AUTHORIZATION_TYPE_URL,
            name,
            aliases: Vec::new(),
            // Whose scope a policy is for can't be told from its namespace: it may be the root's.
            scope: None,
            plain,
            culvert,
            needs: Features::of_policy(policy),
        }
    }
}

fn policy_name(key: &PolicyKey) -> Arc<str> {
    proto::policy_name(key).into()
}

/// What stands for a policy that the receiver could not enforce: a rule without clauses matches everything.
fn refusing_all(policy: &Policy) -> Policy {
    Policy { action: Action::Deny, rules: Box::new([Rule::default()]), ..policy.clone() }
}
