//! The users' resources: reading them with positions, checking them, and compiling them into the model.
#![forbid(unsafe_code)]

pub mod compile;
pub mod diagnostic;
pub mod directory;
pub mod external;
pub mod fields;
pub mod form;
mod headers;
pub mod json;
pub mod keys;
pub mod kinds;
pub mod labels;
pub mod metadata;
pub mod policy;
pub mod repository;
pub mod resource;
pub mod routes;
mod store;
pub mod tree;
