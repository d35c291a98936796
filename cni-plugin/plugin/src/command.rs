//! The commands.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::{self, Failure, Patience};
use crate::environment::{Command, Environment, Pod};
use crate::error::{CniError, Code};
use crate::network::{self, Network};
use crate::result;

/// All together well within the two minutes that the kubelet gives a request.
const ADD: Patience = Patience { reach: Duration::from_secs(10), answer: Duration::from_secs(30) };
const CHECK: Patience = Patience { reach: Duration::from_secs(2), answer: Duration::from_secs(10) };
/// Clean-ups don't wait: the agent looks for what is gone by itself.
const RELEASE: Patience = Patience { reach: Duration::ZERO, answer: Duration::from_secs(5) };

/// Does what the runtime asks for. Returns what to print; or an error, and the version to word it in.
pub fn execute(environment: &Environment, input: &[u8]) -> Result<String, (Option<String>, CniError)> {
    match environment.command {
        Command::Version => return Ok(versions(input)),
        Command::Del => {
            // A configuration that can't be read is no reason to keep a pod from ending.
            if let Ok(network) = Network::read(input) {
                let _ = agent::ask(&network.socket, "/cmddel", &attachment(environment), RELEASE);
            }
            return Ok(String::new());
        }
        Command::Add | Command::Check | Command::Gc | Command::Status => {}
    }
    let network = Network::read(input).map_err(|error| (network::version_of(input), error))?;
    let version = network.version;
    let done = match environment.command {
        Command::Add => add(environment, network),
        Command::Check => check(environment, network),
        Command::Gc => gc(network),
        _ => status(&network),
    };
    done.map_err(|error| (Some(version.to_owned()), error))
}

/// The version of the answer is that of the question.
fn versions(input: &[u8]) -> String {
    let version = network::version_of(input).unwrap_or_else(|| network::NEWEST.to_owned());
    format!("{}\n", json!({ "cniVersion": version, "supportedVersions": network::VERSIONS }))
}

fn add(environment: &Environment, mut network: Network) -> Result<String, CniError> {
    let mut result = result::in_version(previous(&mut network)?, network.version)?;
    if let Some(pod) = concerned(environment, &network) {
        let mut body = attachment(environment);
        if let Some(body) = body.as_object_mut() {
            body.insert("IPs".to_owned(), result::addresses(&mut result)?.into());
        }
        agent::ask(&network.socket, "/cmdadd", &body, ADD).map_err(|failure| match failure {
            Failure::Refused(error) => error,
            Failure::Away(why) => CniError::new(
                Code::TryAgainLater,
                format!(
                    "pod {}/{} waits for the Culvert node agent, so that it doesn't start outside the mesh: {why}",
                    pod.namespace, pod.name
                ),
            )
            .details(
                "look at the culvert-node pod of this node; namespaces whose pods may start without it are in \
                 excludeNamespaces of the CNI configuration",
            ),
        })?;
    }
    Ok(format!("{result}\n"))
}

fn check(environment: &Environment, mut network: Network) -> Result<String, CniError> {
    let mut result = previous(&mut network)?;
    if concerned(environment, &network).is_some() {
        let mut body = attachment(environment);
        if let Some(body) = body.as_object_mut() {
            body.insert("IPs".to_owned(), result::addresses(&mut result)?.into());
        }
        agent::ask(&network.socket, "/cmdcheck", &body, CHECK).map_err(|failure| match failure {
            Failure::Refused(error) => error,
            Failure::Away(why) => {
                let message =
                    format!("whether the pod is captured can't be seen: the node agent is away: {why}");
                CniError::new(Code::TryAgainLater, message)
            }
        })?;
    }
    Ok(String::new())
}

/// Tells the agent which attachments stay. Away, it finds out by itself when it is back.
fn gc(network: Network) -> Result<String, CniError> {
    let Some(valid) = network.valid_attachments else {
        let message = "GC without cni.dev/valid-attachments: nothing is released";
        return Err(CniError::new(Code::InvalidNetwork, message));
    };
    match agent::ask(&network.socket, "/cmdgc", &json!({ "ValidAttachments": valid }), RELEASE) {
        Ok(_) | Err(Failure::Away(_)) => Ok(String::new()),
        Err(Failure::Refused(error)) => Err(error),
    }
}

/// Whether pods can be added. A runtime makes the whole node unready of a no, and takes the pods that run there out of
/// their services: so an agent that is only away for a while, whose socket is still there, is no reason. ADD waits for
/// it. After the node's start there is no socket until there is an agent.
fn status(network: &Network) -> Result<String, CniError> {
    match agent::ask(&network.socket, "/status", &json!({}), CHECK) {
        Ok(_) => Ok(String::new()),
        Err(Failure::Refused(error)) => Err(error),
        Err(Failure::Away(_)) if Path::new(&network.socket).exists() => Ok(String::new()),
        Err(Failure::Away(why)) => {
            let message = format!("there is no Culvert node agent yet: {why}");
            Err(CniError::new(Code::NotAvailable, message)
                .details("look at the culvert-node pod of this node"))
        }
    }
}

/// The pod, if the mesh may be concerned with it.
fn concerned<'e>(environment: &'e Environment, network: &Network) -> Option<&'e Pod> {
    environment.pod.as_ref().filter(|pod| !network.excluded.contains(&pod.namespace))
}

fn previous(network: &mut Network) -> Result<Value, CniError> {
    network.previous.take().ok_or_else(|| {
        CniError::new(
            Code::InvalidNetwork,
            "prevResult is missing: culvert-cni makes no interface of its own",
        )
        .details("chain it behind the plugin that does, in one list of plugins")
    })
}

/// What the agent is told of an attachment, in the words of Istio's agent and some more.
fn attachment(environment: &Environment) -> Value {
    let pod = environment.pod.clone().unwrap_or_default();
    json!({
        "Netns": environment.netns,
        "PodName": pod.name,
        "PodNamespace": pod.namespace,
        "PodUID": pod.uid,
        "ContainerID": environment.container,
        "IfName": environment.interface,
    })
}
