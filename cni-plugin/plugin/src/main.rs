//! The CNI plugin: asks the node agent to enrol each new pod.
#![forbid(unsafe_code)]

fn main() {}
