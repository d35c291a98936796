//! The status of a Gateway that is a waypoint, as the Gateway API has it. Pure.

use serde_json::{Value, json};

use super::gateway::{Gateway, Listener};
use crate::status::conditions::Condition;
use crate::status::put_in;

/// What has become of a Gateway.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It is not taken as it stands: reason and message. What was made of it before stays.
    NotAccepted(&'static str, String),
    /// What is made of it can't be applied: the API server's words.
    NotApplied(String),
    /// It is deployed.
    Deployed {
        /// The addresses of its Service.
        addresses: Vec<String>,
        /// Pods that serve.
        available: i64,
        /// Pods that are asked for.
        wanted: i64,
        /// Whether the pods that serve are of the newest version.
        updated: bool,
    },
}

/// The status; `None` when the Gateway has it already. `now` is the time (RFC 3339).
#[must_use]
pub fn status(gateway: &Gateway, outcome: &Outcome, now: &str) -> Option<Value> {
    let (accepted, programmed) = judge(outcome);
    let old = &*gateway.status;
    let list = |value: &Value, path: &str| {
        value.pointer(path).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let conditions = put_in(&list(old, "/conditions"), &[&accepted, &programmed], gateway.generation, now);
    let known = list(old, "/listeners");
    let listeners = gateway.listeners.iter().map(|listener| {
        let before = known.iter().find(|entry| entry.get("name").is_some_and(|name| *name == listener.name));
        let before = before.map(|entry| list(entry, "/conditions")).unwrap_or_default();
        let conditions = of_listener(listener, &programmed);
        json!({
            "name": listener.name,
            // Routes are attached to the services that are bound, not to the Gateway.
            "supportedKinds": [],
            "attachedRoutes": 0,
            "conditions": put_in(&before, &conditions.iter().collect::<Vec<_>>(), gateway.generation, now),
        })
    });
    let addresses: Vec<Value> = match outcome {
        Outcome::Deployed { addresses, .. } => {
            addresses.iter().map(|ip| json!({ "type": "IPAddress", "value": ip })).collect()
        }
        // What serves goes on to serve.
        Outcome::NotAccepted(..) | Outcome::NotApplied(_) => list(old, "/addresses"),
    };
    let new = json!({
        "conditions": conditions,
        "listeners": listeners.collect::<Vec<_>>(),
        "addresses": addresses,
    });
    let is_same = ["conditions", "listeners", "addresses"]
        .iter()
        .all(|field| list(old, &format!("/{field}")) == list(&new, &format!("/{field}")));
    (!is_same).then_some(new)
}

/// Whether the Gateway is accepted, and whether it serves.
fn judge(outcome: &Outcome) -> (Condition, Condition) {
    let is = |kind, holds, reason, message: String| Condition {
        kind,
        holds: Some(holds),
        reason,
        message: message.chars().take(2000).collect(),
        parent: None,
    };
    let accepted = |message: &str| is("Accepted", true, "Accepted", message.to_owned());
    match outcome {
        Outcome::NotAccepted(reason, message) => (
            is("Accepted", false, *reason, message.clone()),
            is("Programmed", false, "Invalid", "the Gateway is not accepted".to_owned()),
        ),
        Outcome::NotApplied(message) => {
            (accepted("deployed by culvertd"), is("Programmed", false, "Invalid", message.clone()))
        }
        Outcome::Deployed { addresses, available, wanted, updated } => {
            let pods = format!("{available} of {wanted} pods are available");
            let programmed = if addresses.is_empty() {
                is("Programmed", false, "AddressNotAssigned", "its Service has no address yet".to_owned())
            } else if *available == 0 {
                is("Programmed", false, "Pending", format!("{pods}: what is bound to it is refused"))
            } else {
                let rest = if *updated { "" } else { "; a new version is rolled out" };
                is("Programmed", true, "Programmed", format!("{pods}{rest}"))
            };
            (accepted("deployed by culvertd"), programmed)
        }
    }
}

fn of_listener(listener: &Listener, programmed: &Condition) -> Vec<Condition> {
    let is = |kind, holds, reason, message: &str| Condition {
        kind,
        holds: Some(holds),
        reason,
        message: message.to_owned(),
        parent: None,
    };
    let accepted = if listener.is_fine() {
        is("Accepted", true, "Accepted", "")
    } else {
        let message = "a waypoint listens for HBONE on port 15008, and for nothing else";
        is("Accepted", false, "UnsupportedProtocol", message)
    };
    let serves = programmed.holds == Some(true) && listener.is_fine();
    let reason = match programmed.reason {
        "Programmed" if !serves => "Invalid",
        // A listener has no such reason of its own.
        "AddressNotAssigned" => "Pending",
        reason => reason,
    };
    vec![
        accepted,
        is("Programmed", serves, reason, ""),
        is("ResolvedRefs", true, "ResolvedRefs", ""),
        is("Conflicted", false, "NoConflicts", ""),
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::gateway::tests::{gateway, spec};
    use super::*;

    fn deployed(address: &str, available: i64) -> Outcome {
        let addresses = if address.is_empty() { Vec::new() } else { vec![address.to_owned()] };
        Outcome::Deployed { addresses, available, wanted: 2, updated: true }
    }

    fn condition<'s>(status: &'s Value, kind: &str) -> (&'s str, &'s str) {
        let all = status["conditions"].as_array().unwrap();
        let found = all.iter().find(|c| c["type"] == kind).unwrap();
        (found["status"].as_str().unwrap(), found["reason"].as_str().unwrap())
    }

    #[test]
    fn it_is_programmed_when_it_has_an_address_and_a_pod_that_serves() {
        let gateway = gateway(&spec());
        for (outcome, wanted) in [
            (deployed("", 0), ("False", "AddressNotAssigned")),
            (deployed("10.0.0.1", 0), ("False", "Pending")),
            (deployed("10.0.0.1", 1), ("True", "Programmed")),
        ] {
            let status = status(&gateway, &outcome, "now").unwrap();
            assert_eq!(condition(&status, "Programmed"), wanted);
            assert_eq!(condition(&status, "Accepted"), ("True", "Accepted"));
            let listener = &status["listeners"][0];
            assert_eq!((&listener["name"], &listener["attachedRoutes"]), (&json!("mesh"), &json!(0)));
            assert_eq!(listener["supportedKinds"], json!([]));
            assert_eq!(condition(listener, "Programmed").0, wanted.0);
            assert_eq!(condition(listener, "Conflicted"), ("False", "NoConflicts"));
            assert_eq!(status["conditions"][0]["observedGeneration"], 3);
        }
    }

    #[test]
    fn what_is_not_accepted_says_why_and_keeps_its_address() {
        let mut gateway = gateway(&spec());
        let first = status(&gateway, &deployed("10.0.0.1", 1), "then").unwrap();
        gateway.status = Arc::new(first.clone());
        assert_eq!(status(&gateway, &deployed("10.0.0.1", 1), "now"), None, "nothing new");
        let outcome = Outcome::NotAccepted("InvalidParameters", "no such key".to_owned());
        let second = status(&gateway, &outcome, "now").unwrap();
        assert_eq!(condition(&second, "Accepted"), ("False", "InvalidParameters"));
        assert_eq!(condition(&second, "Programmed"), ("False", "Invalid"));
        assert_eq!(second["addresses"], first["addresses"]);
    }

    #[test]
    fn a_listener_that_is_none_of_a_waypoint_is_named() {
        let mut other = spec();
        other["listeners"][0]["protocol"] = json!("HTTP");
        let gateway = gateway(&other);
        let (reason, message) = gateway.check().unwrap_err();
        let status = status(&gateway, &Outcome::NotAccepted(reason, message), "now").unwrap();
        assert_eq!(condition(&status, "Accepted"), ("False", "ListenersNotValid"));
        assert_eq!(condition(&status["listeners"][0], "Accepted"), ("False", "UnsupportedProtocol"));
        assert_eq!(condition(&status["listeners"][0], "Programmed"), ("False", "Invalid"));
    }
}
