//! A real Kubernetes on this machine, and the scenarios that are run on it.
#![forbid(unsafe_code)]
