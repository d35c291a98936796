//! Services and workloads outside Kubernetes' own: ServiceEntry, WorkloadEntry, WorkloadGroup, and the virtual
//! addresses that ServiceEntries without one get.

pub mod endpoint;
pub mod host;
pub mod service_entry;
pub mod state;
pub mod vip;
pub mod workload_entry;
pub mod workload_group;

pub use service_entry::ServiceEntry;
pub use state::External;
pub use workload_entry::WorkloadEntry;
