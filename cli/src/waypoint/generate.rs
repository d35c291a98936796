//! The Gateway of a waypoint.

use serde_json::{Map, Value, json};

use super::Wanted;
use crate::tag::REVISION;

/// The classes of waypoints; the first is that of what is generated.
pub const CLASSES: [&str; 2] = ["culvert-waypoint", "istio-waypoint"];
/// The label of a Gateway that says which traffic passes the waypoint.
pub const FOR: &str = "istio.io/waypoint-for";

/// Which traffic passes a waypoint.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum For {
    /// To services
    Service,
    /// To pods, by their own addresses
    Workload,
    /// Both
    All,
    /// Neither
    None,
}

impl For {
    fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Workload => "workload",
            Self::All => "all",
            Self::None => "none",
        }
    }
}

/// Reads a waypoint's name: its Service has it too (RFC 1035, section 2.3.1).
pub fn name(text: &str) -> Result<String, &'static str> {
    let begins = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    let ends = text.bytes().last().is_some_and(|b| b != b'-');
    let rest = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if begins && ends && rest && text.len() <= 63 {
        Ok(text.to_owned())
    } else {
        Err(
            "a name has at most 63 lower-case letters, digits and hyphens, begins with a letter and does not end in a hyphen",
        )
    }
}

/// The Gateway that is wanted.
pub fn gateway(wanted: &Wanted, namespace: Option<&str>) -> Value {
    let mut labels = Map::new();
    if let Some(traffic) = wanted.traffic {
        labels.insert(FOR.to_owned(), traffic.as_str().into());
    }
    if let Some(revision) = &wanted.revision {
        labels.insert(REVISION.to_owned(), revision.as_str().into());
    }
    let mut metadata = Map::new();
    if !labels.is_empty() {
        metadata.insert("labels".to_owned(), labels.into());
    }
    metadata.insert("name".to_owned(), wanted.name.as_str().into());
    if let Some(namespace) = namespace {
        metadata.insert("namespace".to_owned(), namespace.into());
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {
            "gatewayClassName": "culvert-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        },
    })
}

#[cfg(test)]
mod tests {
    use config::json::ObjectSeed;
    use config::resource::Kind;
    use serde::de::DeserializeSeed;

    use super::*;

    #[test]
    fn names_are_those_of_services() {
        for good in ["waypoint", "w1", "a-b"] {
            assert!(name(good).is_ok(), "{good}");
        }
        for bad in ["", "Bad_Name", "1a", "a-", "a.b", &"a".repeat(64)] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_generated_is_a_waypoint() {
        let wanted =
            Wanted { name: "w".to_owned(), traffic: Some(For::All), revision: Some("next".to_owned()) };
        let made = gateway(&wanted, Some("shop"));
        assert_eq!(made["metadata"]["labels"], json!({ FOR: "all", "istio.io/rev": "next" }));
        assert!(CLASSES.contains(&made["spec"]["gatewayClassName"].as_str().unwrap()));
        // The control plane's own reader finds nothing wrong with it.
        let decoded = ObjectSeed { kind: Kind::Gateway, unknown: &|_, key| panic!("{key}") };
        let decoded = decoded.deserialize(&made).unwrap();
        let mut repository = config::repository::Repository::new(config::compile::Options::default());
        let origin: std::sync::Arc<str> = "Gateway shop/w".into();
        let content = config::repository::ObjectContent::Node { node: &decoded.node, version: "1", text: "" };
        repository.stage_object(&origin, content);
        repository.commit();
        assert!(repository.about(&origin).is_empty(), "{:?}", repository.about(&origin));
        let bare = gateway(&Wanted { name: "w".to_owned(), traffic: None, revision: None }, None);
        assert_eq!(bare["metadata"], json!({ "name": "w" }));
    }
}
