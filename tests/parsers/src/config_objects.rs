//! Objects as an API server writes them.

use std::sync::Arc;

use config::compile::{Options, Origin};
use config::json::ObjectSeed;
use config::repository::{ObjectContent, Repository};
use config::resource::KINDS;
use serde::de::DeserializeSeed;

/// JSON of any form is read as an object of every kind: nothing but broken JSON is refused while it is decoded, and what
/// was made of an object is gone with it.
pub(crate) fn object(bytes: &[u8]) {
    for spec in KINDS {
        let told = std::cell::Cell::new(0);
        let count = |_: &'static str, _: &str| told.set(told.get() + 1);
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let Ok(decoded) = (ObjectSeed { kind: spec.kind, unknown: &count }).deserialize(&mut json) else {
            return;
        };
        assert!(told.get() <= bytes.len(), "told of more fields than there are");
        let mut repository = Repository::new(Options {
            origin: Origin::Cluster,
            node: Some("n1".into()),
            ..Options::default()
        });
        let origin: Arc<str> = "object".into();
        let content = ObjectContent::Node { node: &decoded.node, version: "1", text: "" };
        repository.stage_object(&origin, content);
        repository.commit();
        for diagnostic in repository.review_of(&origin) {
            assert!(diagnostic.to_string().len() < 20_000, "nobody reads so much");
        }
        repository.stage_object(&origin, ObjectContent::Gone);
        repository.commit();
        assert_eq!(repository.object_count(), 0, "something of the object is left");
        assert_eq!(repository.diagnostics(), []);
    }
}

pub(crate) fn objects() -> Vec<Vec<u8>> {
    let texts = [
        r#"{"metadata": {"name": "a", "namespace": "b", "uid": "1", "resourceVersion": "2", "generation": 3,
            "labels": {"app": "a"}, "annotations": {"ambient.istio.io/redirection": "enabled"}, "managedFields": [{}]},
            "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "http", "containerPort": 80}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}}"#,
        r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "namespace": "b"}, "spec": {"clusterIP":
            "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"app": "a"}, "ports": [{"port": 80, "targetPort": "http"}]}}"#,
        r#"{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "a"}, "spec": {"action":
            "DENY", "rules": [{"from": [{"source": {"namespaces": ["x"]}}], "when": [{"key": "source.ip", "values": ["::1"]}]}]}}"#,
        r#"{"metadata": null, "spec": [[1.5, 99999999999999999999, -1]], "status": {"a": "\u00e9"}}"#,
    ];
    crate::seeds_of(&texts)
}
