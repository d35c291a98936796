//! What decisions need of others: issuers' keys, external authorizers, services that count requests.

pub mod fetch;
pub mod jwks;
pub mod keys;
