//! Which endpoint a request goes to, where the destination's policy says how.
//!
//! A [`Group`] is what the endpoints of a destination come to for one set of them and one set of ejections: immutable,
//! made when one of these changes, so that a choice walks nothing. What lasts from one to the next, and what requests
//! change, is beside it: each endpoint's [`Load`] and [`Strikes`], the destination's [`Ejections`], [`Gate`]s and
//! [`Budget`].
//!
//! ```text
//!   tier   priority: how near (failover), or all the same; the next ones take over what a tier is too unhealthy for
//!   zone   part of a tier that gets a share of its requests (distribute); one as a rule
//!   slot   an endpoint, by weight and by the load balancer
//! ```

mod circuit;
mod group;
mod hash;
mod outliers;
mod places;
mod tables;
mod warmup;
mod weighted;

pub use circuit::{Budget, Gate};
pub use group::{Balancing, Choice, Group, Load, Member};
pub use hash::hash;
pub use outliers::{Cause, Ejections, Event, Strikes};
pub use places::{Nearness, Origin};
pub use warmup::share as warmup_share;
