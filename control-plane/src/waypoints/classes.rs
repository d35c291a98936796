//! The GatewayClasses of waypoints: made where they are not, and told that they are accepted.

use k8s_openapi::api::core::v1::Service;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::MANAGER;
use crate::status::conditions::Condition;
use crate::status::{CONTROLLER, put_in};

/// Our own class.
pub const OWN: &str = "culvert-waypoint";
/// The class that manifests for Istio name; ours where no istiod lives.
pub const ISTIO: &str = "istio-waypoint";

/// The classes of a cluster.
pub struct Classes {
    client: Client,
    api: Api<DynamicObject>,
    kind: ApiResource,
}

impl Classes {
    /// Of this kind, as the API server has it.
    #[must_use]
    pub fn new(client: Client, kind: ApiResource) -> Self {
        let api = Api::all_with(client.clone(), &kind);
        Self { client, api, kind }
    }

    /// Makes the classes that are missing, and says of ours that they are accepted.
    ///
    /// # Errors
    /// The API server refuses, or does not answer.
    pub async fn keep(&self) -> Result<(), kube::Error> {
        for name in [OWN, ISTIO] {
            let found = match self.api.get_opt(name).await? {
                Some(found) => found,
                None if name == ISTIO && self.is_istiod_here().await? => continue,
                None => self.make(name).await?,
            };
            if is_ours(&found) {
                self.accept(&found).await?;
            }
        }
        Ok(())
    }

    /// Whether a class's Gateways are ours to deploy. One that is not there is nobody's.
    ///
    /// # Errors
    /// The API server refuses, or does not answer.
    pub async fn is_ours(&self, name: &str) -> Result<bool, kube::Error> {
        Ok([OWN, ISTIO].contains(&name) && self.api.get_opt(name).await?.is_some_and(|class| is_ours(&class)))
    }

    /// An istiod would make the class, and deploy its Gateways.
    async fn is_istiod_here(&self) -> Result<bool, kube::Error> {
        let services: Api<Service> = Api::all(self.client.clone());
        let asked = ListParams::default().labels("app=istiod").limit(1);
        Ok(!services.list_metadata(&asked).await?.items.is_empty())
    }

    async fn make(&self, name: &str) -> Result<DynamicObject, kube::Error> {
        let class = json!({
            "apiVersion": self.kind.api_version, "kind": self.kind.kind, "metadata": { "name": name },
            "spec": {
                "controllerName": CONTROLLER,
                "description": "Waypoints of Culvert, deployed by the control plane",
            },
        });
        let class: DynamicObject = serde_json::from_value(class).map_err(kube::Error::SerdeError)?;
        let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        match self.api.create(&parameters, &class).await {
            Ok(made) => {
                tracing::info!(class = name, "made the GatewayClass");
                Ok(made)
            }
            // Somebody was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => self.api.get(name).await,
            Err(error) => Err(error),
        }
    }

    async fn accept(&self, class: &DynamicObject) -> Result<(), kube::Error> {
        let old = class.data.pointer("/status/conditions").and_then(Value::as_array).cloned();
        let old = old.unwrap_or_default();
        let accepted = Condition {
            kind: "Accepted",
            holds: Some(true),
            reason: "Accepted",
            message: "its Gateways are deployed by culvertd".to_owned(),
            parent: None,
        };
        let generation = class.metadata.generation.unwrap_or_default();
        let new = put_in(&old, &[&accepted], generation, &super::now());
        if new == old {
            return Ok(());
        }
        let name = class.metadata.name.as_deref().unwrap_or_default();
        let patch = Patch::Merge(json!({ "status": { "conditions": new } }));
        self.api.patch_status(name, &PatchParams::default(), &patch).await.map(drop)
    }
}

fn is_ours(class: &DynamicObject) -> bool {
    class.data.pointer("/spec/controllerName").is_some_and(|name| name == CONTROLLER)
}
