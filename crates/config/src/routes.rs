//! Routes for requests, and how their destinations are spoken to: HTTPRoute of the Gateway API, on services (GAMMA),
//! DestinationRule, and what becomes of them.
//!
//! A route's parents are services; all routes of one service are one table, in the Gateway API's order of precedence.
//! [`state`] keeps what the resources say and makes the tables again that a change touches.

pub mod destination_rule;
mod destinations;
mod filters;
pub mod gateway;
pub mod grpc_route;
mod hosts;
pub mod http_route;
mod precedence;
mod reference;
pub mod reference_grant;
mod state;
pub mod stream_route;
mod streams;
mod value;
pub mod virtual_service;
mod virtual_services;

pub use destination_rule::DestinationRule;
pub use destinations::DestinationRules;
pub use gateway::Gateway;
pub use hosts::Concerned;
pub use http_route::HttpRoute;
pub use reference::{BackendDraft, ParentKind, ParentRef, Reference, Unresolved, Why};
pub use reference_grant::{Grants, ReferenceGrant};
pub use state::{Parent, RouteDraft, Routes};
pub use stream_route::StreamRoute;
pub use value::parse_go_duration;
pub use virtual_service::VirtualService;
pub use virtual_services::VirtualServices;
