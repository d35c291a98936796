//! Waypoints of a cluster: what a Gateway of a waypoint class asks for is deployed, kept, and said in its status.
//!
//! ```text
//!   Gateways, and what is made of them ──▶ controller ──▶ gateway (read, check)
//!                                                         overrides (ConfigMap) ──▶ form ──▶ server-side apply
//!                                                         status ◀── Deployment, Service
//! ```
//!
//! * The leader alone does it, for the Gateways of its revision: those that name it in `istio.io/rev`; those that name
//!   none are the revision's that is, or is tagged, `default`.
//! * Nothing that somebody else made is taken over: what has the Gateway's name and is not the Gateway's is named in the
//!   status. What is made is the Gateway's, and goes with it.
//! * What was deployed stays as it is while a Gateway, or its ConfigMap, has errors.

mod classes;
mod form;
mod gateway;
mod overrides;
mod status;

use std::sync::Arc;
use std::time::Duration;

use config::resource::Kind;
use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Client;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, Preconditions,
};
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::watcher;
use process::metrics::{Counter, Handle, Registry};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::ca::Namespaces;
use crate::in_force::InForce;
use crate::source::{Pause, chain, find, jittered};
pub use form::Settings;
use gateway::Gateway;
pub use overrides::Overrides;
use status::Outcome;

use self::classes::Classes;

/// Who owns, in the API server's records, the fields that are applied.
pub const MANAGER: &str = "culvert.dev/waypoints";

/// How many Gateways are looked at at a time.
const AT_A_TIME: u16 = 4;
/// How long changes are taken together.
const SETTLE: Duration = Duration::from_millis(200);
/// How often a Gateway is looked at whose ConfigMap may have changed: ConfigMaps of users are read one by one, and by
/// name, not watched.
const CONFIG_MAPS: Duration = Duration::from_secs(10);
/// How often any other is looked at, for what nobody tells.
const ALL: Duration = Duration::from_secs(300);
/// How soon one is looked at again that could not be deployed.
const AGAIN: Duration = Duration::from_secs(10);
/// How long one look may take: a Gateway is not looked at twice at a time, and so not at all while one doesn't end.
const LOOK: Duration = Duration::from_secs(60);
/// How often it is looked whether the classes are there.
const CLASSES: Duration = Duration::from_secs(60);
/// How often it is looked whether the Gateway API is there.
const NOT_SERVED: Duration = Duration::from_secs(5);

/// See the module's documentation.
pub struct Deployer {
    /// The API server.
    pub client: Client,
    /// What waypoints are made of.
    pub settings: Settings,
    /// The tags of the revision.
    pub in_force: watch::Receiver<InForce>,
    /// The namespaces that the control plane reads.
    pub namespaces: Namespaces,
    /// Whether this control plane leads.
    pub leads: watch::Receiver<bool>,
}

/// What is counted.
struct Counts {
    looks: Handle<(), Counter>,
    errors: Handle<(), Counter>,
}

impl Deployer {
    /// Runs until the process ends.
    pub async fn run(mut self, metrics: Registry) {
        let counts = Arc::new(Counts {
            looks: metrics.counter("culvertd_waypoint_looks", "Times that a Gateway was looked at"),
            errors: metrics.counter(
                "culvertd_waypoint_errors",
                "Times that a Gateway could not be deployed, or its status not be written",
            ),
        });
        loop {
            if self.leads.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            let mut leads = self.leads.clone();
            tokio::select! {
                () = self.lead(&counts) => {}
                ended = leads.wait_for(|leads| !*leads) => {
                    if ended.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Does it as long as it is called for.
    async fn lead(&mut self, counts: &Arc<Counts>) {
        let kind = self.gateways().await;
        self.settings.can_sleep = self.kubelets_can_sleep().await;
        let classes = GroupVersionKind::gvk(&kind.group, &kind.version, "GatewayClass");
        let classes = ApiResource::from_gvk_with_plural(&classes, "gatewayclasses");
        let site = Arc::new(Site {
            classes: Classes::new(self.client.clone(), classes),
            kind,
            client: self.client.clone(),
            settings: self.settings.clone(),
            in_force: self.in_force.clone(),
            namespaces: self.namespaces.clone(),
            counts: counts.clone(),
        });
        tokio::join!(keep_classes(&site), site.clone().control());
    }

    /// The kind, once the API server has it.
    async fn gateways(&self) -> ApiResource {
        let mut pause = Pause::default();
        loop {
            let Some(spec) = Kind::Gateway.spec() else { return std::future::pending().await };
            match find(&self.client, spec).await {
                Ok(Some(found)) => return found,
                Ok(None) => tokio::time::sleep(jittered(NOT_SERVED)).await,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "whether there are Gateways can't be looked at");
                    tokio::time::sleep(pause.next()).await;
                }
            }
        }
    }

    /// Whether the cluster has `preStop.sleep` (on by default from 1.30).
    async fn kubelets_can_sleep(&self) -> bool {
        let Ok(version) = self.client.apiserver_version().await else { return false };
        let number = |text: &str| text.trim_end_matches('+').parse::<u32>().unwrap_or_default();
        (number(&version.major), number(&version.minor)) >= (1, 30)
    }
}

async fn keep_classes(site: &Site) {
    let mut pause = Pause::default();
    loop {
        match site.classes.keep().await {
            Ok(()) => {
                pause = Pause::default();
                tokio::time::sleep(jittered(CLASSES)).await;
            }
            Err(error) => {
                site.counts.errors.inc();
                tracing::warn!(error = chain(&error), "the GatewayClasses of waypoints can't be kept");
                tokio::time::sleep(pause.next()).await;
            }
        }
    }
}

/// What Gateways are deployed with.
struct Site {
    client: Client,
    kind: ApiResource,
    classes: Classes,
    settings: Settings,
    in_force: watch::Receiver<InForce>,
    namespaces: Namespaces,
    counts: Arc<Counts>,
}

impl Site {
    /// Looks at each Gateway when it, or what is made of it, changes.
    async fn control(self: Arc<Self>) {
        let all: Api<DynamicObject> = Api::all_with(self.client.clone(), &self.kind);
        let (key, value) = form::MANAGED;
        let made = || watcher::Config::default().labels(&format!("{key}={value}"));
        let client = || self.client.clone();
        let controller = Controller::new_with(all, watcher::Config::default(), self.kind.clone())
            .with_config(Config::default().concurrency(AT_A_TIME).debounce(SETTLE))
            .owns(Api::<Deployment>::all(client()), made())
            .owns(Api::<Service>::all(client()), made())
            .owns(Api::<ServiceAccount>::all(client()), made())
            .owns(Api::<PodDisruptionBudget>::all(client()), made())
            .owns(Api::<HorizontalPodAutoscaler>::all(client()), made());
        let retry = |_: Arc<DynamicObject>, _: &kube::Error, _: Arc<Self>| Action::requeue(jittered(AGAIN));
        let looks = controller.run(
            |gateway, site| async move { site.look_in_time(&gateway).await },
            retry,
            self.clone(),
        );
        pin_mut!(looks);
        while let Some(look) = looks.next().await {
            if let Err(error) = look {
                self.counts.errors.inc();
                tracing::warn!(error = chain(&error), "a waypoint can't be looked after now");
            }
        }
    }

    /// Looks at a Gateway, and gives that up where it doesn't end.
    async fn look_in_time(&self, object: &DynamicObject) -> Result<Action, kube::Error> {
        let Ok(looked) = tokio::time::timeout(LOOK, self.look(object)).await else {
            self.counts.errors.inc();
            tracing::warn!(
                gateway = ?object.metadata.name,
                namespace = ?object.metadata.namespace,
                limit = ?LOOK,
                "a waypoint could not be looked after in time; it is tried again"
            );
            return Ok(Action::requeue(jittered(AGAIN)));
        };
        looked
    }

    /// Looks at a Gateway.
    async fn look(&self, object: &DynamicObject) -> Result<Action, kube::Error> {
        self.counts.looks.inc();
        let gateway = Gateway::read(object);
        if gateway.going || !self.is_ours(&gateway) {
            return Ok(Action::requeue(ALL));
        }
        if !self.classes.is_ours(&gateway.class).await? {
            return Ok(Action::requeue(ALL));
        }
        let outcome = self.deploy(&gateway).await?;
        self.write(&gateway, &outcome).await?;
        Ok(Action::requeue(jittered(match &outcome {
            Outcome::NotApplied(_) => AGAIN,
            // Deployments tell; but somebody waits for it.
            Outcome::Deployed { available, wanted, updated, .. } if available < wanted || !updated => AGAIN,
            _ if gateway.parameters.is_some() => CONFIG_MAPS,
            _ => ALL,
        })))
    }

    /// Whether a Gateway is of this revision, and of a namespace that is read.
    fn is_ours(&self, gateway: &Gateway) -> bool {
        let tags = self.in_force.borrow().tags.clone();
        let revision = gateway.revision.as_deref().unwrap_or("default");
        let is_named = revision == self.settings.revision || tags.contains(revision);
        is_named && self.namespaces.borrow().contains(&gateway.namespace)
    }

    async fn deploy(&self, gateway: &Gateway) -> Result<Outcome, kube::Error> {
        if let Err((reason, message)) = gateway.check() {
            return Ok(Outcome::NotAccepted(reason, message));
        }
        let own = match self.overrides(gateway).await? {
            Ok(own) => own,
            Err(message) => return Ok(Outcome::NotAccepted("InvalidParameters", message)),
        };
        let objects = form::objects(gateway, &self.settings, &own);
        // What is of people's making is tried first, so that a mistake in one object does not change the others.
        let own_making = gateway.parameters.is_some();
        for object in objects.iter().filter(|_| own_making) {
            match self.apply(gateway, object, true).await? {
                Ok(_) => {}
                Err(Refused::Invalid(message)) => {
                    return Ok(Outcome::NotAccepted("InvalidParameters", message));
                }
                Err(Refused::Other(message)) => return Ok(Outcome::NotApplied(message)),
            }
        }
        let mut applied = Vec::new();
        for object in &objects {
            match self.apply(gateway, object, false).await? {
                Ok(object) => applied.push(object),
                Err(Refused::Invalid(message) | Refused::Other(message)) => {
                    return Ok(Outcome::NotApplied(message));
                }
            }
        }
        if !objects.iter().any(|object| kind_of(object) == "HorizontalPodAutoscaler") {
            self.end_autoscaling(gateway).await?;
        }
        Ok(outcome(&applied))
    }

    /// What a Gateway's ConfigMap wants otherwise; with what is wrong with it.
    async fn overrides(&self, gateway: &Gateway) -> Result<Result<Overrides, String>, kube::Error> {
        let name = match &gateway.parameters {
            None => return Ok(Ok(Overrides::default())),
            Some(Err(wrong)) => return Ok(Err(format!("spec.infrastructure.parametersRef: {wrong}"))),
            Some(Ok(name)) => name,
        };
        let place = format!("ConfigMap {}/{name}", gateway.namespace);
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &gateway.namespace);
        let Some(map) = maps.get_opt(name).await? else { return Ok(Err(format!("there is no {place}"))) };
        let data = map.data.unwrap_or_default();
        let read = Overrides::of_data(data.iter().map(|(key, text)| (key.as_str(), text.as_str())));
        Ok(read.map_err(|wrong| format!("{place}: {wrong}")))
    }

    /// Applies an object, or only tries to; the object as it is then, or why not.
    async fn apply(
        &self,
        gateway: &Gateway,
        object: &Value,
        only_try: bool,
    ) -> Result<Result<DynamicObject, Refused>, kube::Error> {
        let api = self.api(object, &gateway.namespace);
        let name = format!("{} {}/{}", kind_of(object), gateway.namespace, gateway.name);
        if let Some(there) = api.get_metadata_opt(&gateway.name).await?
            && !is_made_of(&there.metadata, gateway)
        {
            let message = format!(
                "there is a {name} that is not this Gateway's: delete it, or give the Gateway another name"
            );
            return Ok(Err(Refused::Other(message)));
        }
        let parameters = PatchParams { dry_run: only_try, ..PatchParams::apply(MANAGER).force() };
        match api.patch(&gateway.name, &parameters, &Patch::Apply(object)).await {
            Ok(object) => Ok(Ok(object)),
            // A value of another type than its field is 500 to the server, and its words are all that tells.
            Err(kube::Error::Api(status))
                if [400, 422].contains(&status.code) || status.message.contains("typed patch object") =>
            {
                Ok(Err(Refused::Invalid(format!("{name}: {}", status.message))))
            }
            // A quota, an admission, a right that is missing; a namespace that is being deleted.
            Err(kube::Error::Api(status)) if [403, 409].contains(&status.code) => {
                Ok(Err(Refused::Other(format!("{name}: {}", status.message))))
            }
            Err(error) => Err(error),
        }
    }

    fn api(&self, object: &Value, namespace: &str) -> Api<DynamicObject> {
        let version = object.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind_of(object)));
        Api::namespaced_with(self.client.clone(), namespace, &kind)
    }

    /// Removes an autoscaler that is not wanted any more.
    async fn end_autoscaling(&self, gateway: &Gateway) -> Result<(), kube::Error> {
        let api: Api<HorizontalPodAutoscaler> = Api::namespaced(self.client.clone(), &gateway.namespace);
        let Some(there) = api.get_metadata_opt(&gateway.name).await? else { return Ok(()) };
        if !is_made_of(&there.metadata, gateway) {
            return Ok(());
        }
        let uid = there.metadata.uid.clone();
        let same = Preconditions { uid, resource_version: None };
        let parameters = DeleteParams { preconditions: Some(same), ..DeleteParams::default() };
        match api.delete(&gateway.name, &parameters).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn write(&self, gateway: &Gateway, outcome: &Outcome) -> Result<(), kube::Error> {
        let Some(new) = status::status(gateway, outcome, &now()) else { return Ok(()) };
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &gateway.namespace, &self.kind);
        let patch = Patch::Merge(json!({ "metadata": { "uid": gateway.uid }, "status": new }));
        match api.patch_status(&gateway.name, &PatchParams::default(), &patch).await {
            Ok(_) => Ok(()),
            // It is gone, or another one of its name; that is looked at for itself.
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Why an object could not be applied.
enum Refused {
    /// It is not as the API server wants objects of its kind.
    Invalid(String),
    /// For another reason.
    Other(String),
}

fn kind_of(object: &Value) -> &str {
    object.get("kind").and_then(Value::as_str).unwrap_or_default()
}

/// Whether an object was made of a Gateway, and not of an earlier one of its name.
fn is_made_of(
    metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    gateway: &Gateway,
) -> bool {
    metadata.owner_references.iter().flatten().any(|owner| owner.uid == gateway.uid)
}

/// What has become of the objects that were applied.
fn outcome(applied: &[DynamicObject]) -> Outcome {
    let of = |kind: &str| {
        applied.iter().find(|o| o.types.as_ref().is_some_and(|t| t.kind == kind)).map(|o| &o.data)
    };
    let (service, deployment) = (of("Service"), of("Deployment"));
    let number = |path: &str| {
        deployment.and_then(|data| data.pointer(path)).and_then(Value::as_i64).unwrap_or_default()
    };
    let addresses = service.and_then(|data| data.pointer("/spec/clusterIPs")).and_then(Value::as_array);
    let addresses = addresses.into_iter().flatten().filter_map(Value::as_str);
    let wanted = number("/spec/replicas");
    Outcome::Deployed {
        addresses: addresses.filter(|address| *address != "None").map(str::to_owned).collect(),
        available: number("/status/availableReplicas"),
        wanted,
        updated: number("/status/updatedReplicas") >= wanted,
    }
}

/// The time, as conditions have it.
fn now() -> String {
    k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
