//! The node agent: enrols the pods of a node.
#![forbid(unsafe_code)]

fn main() {}
