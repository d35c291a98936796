//! What can be said of a policy only when all else is known: that it is for nothing, or names what is not there.
//! Such policies are in order, and often are written before what they are for; so this is said on request, and has
//! no part in what is in force.

use model::http::ProviderAddress;
use model::{Str, StringMatch};

use super::authorization::{AuthorizationPolicy, PolicyScope};
use super::selector::Target;
use crate::compile::Finding;
use crate::diagnostic::Code;
use crate::labels::Selector;
use crate::resource::ObjectKey;

/// All else.
pub trait World {
    /// Whether there is a namespace that matches.
    fn has_namespace(&self, pattern: &StringMatch) -> bool;

    /// Whether there is such an object.
    fn has_object(&self, object: &ObjectKey) -> bool;

    /// Why nothing can be asked of a service: there is none of this host name, or it has no such port.
    fn away(&self, address: &ProviderAddress) -> Option<String>;

    /// Whether connections to what an object defines are refused, because not all that is behind it enforces the
    /// policies for it.
    fn is_closed(&self, object: &ObjectKey) -> bool;

    /// One of the workloads that a selector selects, or of all, that is in the mesh and leaves connections to it alone,
    /// all or some, and the annotation by which it does.
    fn left_alone(
        &self,
        namespace: Option<&Str>,
        selector: Option<&Selector>,
    ) -> Option<(ObjectKey, &'static str)>;

    /// The workloads of a namespace, or of all, that a selector selects, or all of them.
    fn selected(&self, namespace: Option<&Str>, selector: Option<&Selector>) -> Selected;
}

/// How many workloads are selected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Selected {
    /// None.
    Nothing,
    /// Some, and none of them is in the mesh.
    Outside,
    /// Some that are in the mesh.
    InMesh,
}

/// Looks at an AuthorizationPolicy.
pub(super) fn authorization(
    policy: &AuthorizationPolicy,
    key: &ObjectKey,
    is_root: bool,
    world: &dyn World,
) -> Vec<Finding> {
    let mut findings = match &policy.scope {
        PolicyScope::Namespace => selection(None, key, is_root, world),
        PolicyScope::Selector(selector) => selection(Some(selector), key, is_root, world),
        PolicyScope::Targets(targets) => {
            targets.iter().filter_map(|target| about_target(target, &key.namespace, world)).collect()
        }
    };
    let clauses = policy.rules.iter().flat_map(|rule| rule.clauses.iter());
    for part in clauses.flat_map(|clause| clause.matches.iter()) {
        let patterns = part.connection.namespaces.iter().chain(&part.connection.not_namespaces);
        for pattern in patterns.filter(|pattern| !world.has_namespace(pattern)) {
            findings.push(Finding {
                code: Code::NamesNothing,
                message: format!("there is no namespace {pattern}"),
                remedy: String::new(),
            });
        }
    }
    findings
}

fn about_target(target: &Target, namespace: &Str, world: &dyn World) -> Option<Finding> {
    let object = target.object(namespace)?;
    if world.has_object(&object) && !world.is_closed(&object) {
        return None;
    }
    let name = object.resource_name();
    Some(if world.has_object(&object) {
        Finding {
            code: Code::OutsideTheMesh,
            message: format!(
                "connections to {name} are refused: something behind it is outside the mesh, or in another namespace, \
                 where nothing enforces the policy"
            ),
            remedy: "deploy a waypoint for the target, or remove the policy".to_owned(),
        }
    } else {
        Finding {
            code: Code::NamesNothing,
            message: format!("its target {name} does not exist"),
            remedy: String::new(),
        }
    })
}

/// Looks at whom a policy selects.
pub(super) fn selection(
    selector: Option<&Selector>,
    key: &ObjectKey,
    is_root: bool,
    world: &dyn World,
) -> Vec<Finding> {
    // A policy for the whole mesh may well be there before the first workload.
    if is_root && selector.is_none() {
        return Vec::new();
    }
    let namespace = (!is_root).then_some(&key.namespace);
    let (code, message, remedy) = match world.selected(namespace, selector) {
        Selected::InMesh => {
            let about = |(pod, annotation): (ObjectKey, &str)| Finding {
                code: Code::OutsideTheMesh,
                message: format!(
                    "{} leaves connections to it alone ({annotation}), and nothing enforces the policy on these",
                    pod.resource_name()
                ),
                remedy: "remove the annotation, or select other workloads".to_owned(),
            };
            return world.left_alone(namespace, selector).map(about).into_iter().collect();
        }
        Selected::Nothing => (Code::NoWorkload, "it is for no workload that there is", "check the labels"),
        Selected::Outside => (
            Code::OutsideTheMesh,
            "the workloads that it is for are not in the mesh, so nothing enforces it",
            "label them, or their namespace, istio.io/dataplane-mode=ambient",
        ),
    };
    vec![Finding { code, message: message.to_owned(), remedy: remedy.to_owned() }]
}
