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
//! `crate::external` has a state with `set` and `remove` of the same form. It turns a WorkloadEntry or ServiceEntry
//! into instances and definitions, under the resource's own key ([`Made`]): they are all that the resource makes;
//! what it made before and makes no more is removed. A change of one resource may change what others make (a
//! WorkloadGroup's entries, virtual addresses that collide): then `made` lists these too.

mod instance;

pub use instance::{
    Affected, Definition, Effects, Finding, Instance, Made, Membership, Names, PortRule, Rank, RuleTarget,
};
