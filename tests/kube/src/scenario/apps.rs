//! Pods of the applications (`tools/app`, and Debian's servers), as objects for the API server.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::lab::Node;
use crate::lab_images::APPS;

/// A pod that is about to be made.
#[derive(Clone, Debug)]
pub struct App {
    /// The pod's name, and its label `app`.
    pub name: String,
    node: Option<&'static str>,
    account: String,
    command: Vec<String>,
    labels: Vec<(String, String)>,
    container: Value,
}

/// What a client has done and seen (`tools/app/client.go`).
#[derive(Clone, Debug, Deserialize)]
pub struct Job {
    /// hold, load, dial or download.
    pub kind: String,
    /// With what.
    pub target: String,
    /// Connections or requests begun.
    pub started: u64,
    /// Messages, requests or bytes that came back as they should.
    pub good: u64,
    /// Connections lost, or requests failed.
    pub failed: u64,
    /// The longest that an answer took, in milliseconds.
    pub longest_ms: u64,
    /// Why the last failure failed.
    pub last_error: String,
    /// A download that has ended.
    pub done: bool,
}

impl App {
    fn new(name: &str, command: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            node: None,
            account: "default".to_owned(),
            command: command.iter().map(|w| (*w).to_owned()).collect(),
            labels: Vec::new(),
            container: json!({}),
        }
    }

    /// HTTP on 8080, TCP echo on 9000, a server that speaks first on 9001, UDP on 9002; ready when it listens.
    #[must_use]
    pub fn server(name: &str) -> Self {
        let mut this = Self::new(name, &["app", "serve"]);
        this.container = json!({
            "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1},
        });
        this
    }

    /// Talks all the time, by the arguments of `app client`.
    #[must_use]
    pub fn client(name: &str, arguments: &[&str]) -> Self {
        Self::new(name, &[&["app", "client"], arguments].concat())
    }

    /// Does nothing but wait for commands.
    #[must_use]
    pub fn idle(name: &str) -> Self {
        Self::new(name, &["app", "pause"])
    }

    /// Another program of the image.
    #[must_use]
    pub fn program(name: &str, command: &[&str]) -> Self {
        Self::new(name, command)
    }

    /// Where it runs.
    #[must_use]
    pub fn on(mut self, node: &Node) -> Self {
        self.node = Some(node.name);
        self
    }

    /// Its ServiceAccount, which the stage makes.
    #[must_use]
    pub fn account(mut self, account: &str) -> Self {
        account.clone_into(&mut self.account);
        self
    }

    /// A further label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Further fields of the container, or others in place of its own.
    #[must_use]
    pub fn container(mut self, fields: &Value) -> Self {
        merge(&mut self.container, fields);
        self
    }

    /// Its ServiceAccount's name.
    #[must_use]
    pub fn account_name(&self) -> &str {
        &self.account
    }

    fn metadata(&self) -> Value {
        let mut labels = serde_json::Map::new();
        labels.insert("app".into(), json!(self.name));
        labels.extend(self.labels.iter().map(|(k, v)| (k.clone(), json!(v))));
        json!({"labels": labels})
    }

    fn spec(&self) -> Value {
        let mut container = container("app", &self.command);
        merge(&mut container, &self.container);
        let mut spec = json!({
            "serviceAccountName": self.account,
            "terminationGracePeriodSeconds": 5,
            "containers": [container],
        });
        if let Some(node) = self.node {
            // Past the scheduler's work, and through its rules: taints hold.
            spec["nodeSelector"] = json!({"kubernetes.io/hostname": node});
        }
        spec
    }

    /// As a bare pod.
    #[must_use]
    pub fn pod(&self) -> Value {
        let mut metadata = self.metadata();
        metadata["name"] = json!(self.name);
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec()})
    }

    /// As what a Deployment, StatefulSet or Job makes pods of.
    #[must_use]
    pub fn template(&self) -> Value {
        json!({"metadata": self.metadata(), "spec": self.spec()})
    }

    /// As a Deployment that never has fewer ready pods than it should.
    #[must_use]
    pub fn deployment(&self, replicas: u32) -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": self.name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": self.name}},
                "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "template": self.template(),
            },
        })
    }
}

/// A container of the applications' image. It knows its namespace, for what its messages carry.
#[must_use]
pub fn container(name: &str, command: &[String]) -> Value {
    let namespace = json!({"fieldRef": {"fieldPath": "metadata.namespace"}});
    json!({
        "name": name, "image": APPS, "imagePullPolicy": "Never", "command": command,
        "env": [{"name": "E2E_NAMESPACE", "valueFrom": namespace}],
    })
}

/// A Service of the ports of [`App::server`], for the pods labelled `app=NAME`.
#[must_use]
pub fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [
            {"name": "http", "port": 8080}, {"name": "tcp-echo", "port": 9000},
            {"name": "tcp-hello", "port": 9001}, {"name": "udp", "port": 9002, "protocol": "UDP"},
        ]},
    })
}

/// Lays `over` on `under`, field by field.
fn merge(under: &mut Value, over: &Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                merge(under.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::NODES;

    #[test]
    fn an_app_is_where_and_who_it_is_told_to_be() {
        let app = App::server("web").on(&NODES[1]).account("shop").label("tier", "front");
        let app = app.container(&json!({"readinessProbe": {"periodSeconds": 2}}));
        let pod = app.pod();
        assert_eq!(pod["metadata"]["labels"], json!({"app": "web", "tier": "front"}));
        assert_eq!(pod["spec"]["nodeSelector"]["kubernetes.io/hostname"], "node2");
        assert_eq!(pod["spec"]["serviceAccountName"], "shop");
        let probe = &pod["spec"]["containers"][0]["readinessProbe"];
        assert_eq!((&probe["periodSeconds"], &probe["httpGet"]["port"]), (&json!(2), &json!(8080)));
        assert_eq!(app.deployment(3)["spec"]["template"]["spec"], pod["spec"]);
    }
}
