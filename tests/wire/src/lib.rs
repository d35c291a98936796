//! Tests of the whole way from manifests to a proxy that is fed by WDS; see `tests/`.
#![forbid(unsafe_code)]
