//! From resources to the model, incrementally: a changed object costs work for what it touches.
//!
//! # How it works
//! Everything that has an address and labels is an [`Instance`]: a pod, a WorkloadEntry, an endpoint that an
//! EndpointSlice or a ServiceEntry lists. Everything that has a host name and endpoints is a [`Definition`]. The
//! compiler joins the two, attaches the policies, and gives out [`model::Change`]s.
//!
//! # How policies hook in
//! `crate::policy` keeps what it needs of its own resources and says, for each that is set or removed, what
//! follows, as [`Effects`]: changes of the model that stand for themselves (`SetPolicy`, `RemovePolicy`,
//! `SetSettings`), and which workloads' list of policies has to be made again, as [`Affected`]. The compiler finds
//! these workloads by its indexes and asks, for each, for its `Workload.policies` by namespace and labels. So
//! `crate::policy` has a state with three functions, all pure:
//!
//! ```text
//! fn set(&mut self, key: &ObjectKey, resource: …) -> Effects
//! fn remove(&mut self, key: &ObjectKey) -> Effects
//! fn attached(&self, namespace: &str, labels: &Labels) -> Vec<PolicyKey>    // sorted, no key twice
//! ```
//!
//! # How external workloads and services hook in
//! `crate::external` turns a WorkloadEntry or ServiceEntry into instances and definitions and sets them under the
//! resource's own key: [`Effects::instances`] and [`Effects::definitions`] are all that the resource makes; what it
//! made before and makes no more is removed.

mod instance;

pub use instance::{
    Affected, Definition, Effects, Finding, Instance, Membership, Names, PortRule, Rank, RuleTarget,
};
