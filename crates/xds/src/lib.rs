//! Delta xDS, client and server.
#![forbid(unsafe_code)]
