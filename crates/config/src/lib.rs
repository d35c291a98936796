//! The users' resources: reading them with positions, checking them, and compiling them into the model.
#![forbid(unsafe_code)]

pub mod diagnostic;
pub mod fields;
pub mod tree;
