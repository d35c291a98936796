//! Flags and environment.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use model::http::WaypointKey;

use crate::http::{ForwardedFor, Underscores};

/// The waypoint of a Culvert mesh: takes the traffic of the services that are bound to it, out of HBONE tunnels, routes and
/// polices its HTTP, and passes it on to their endpoints.
///
/// In a cluster (`--xds-address`) the configuration comes from a control plane and the certificate from its CA. In file mode
/// (`--config-dir`) it needs no Kubernetes: manifests come from a directory, which is watched.
#[derive(Parser, Debug, Clone)]
#[command(name = "waypoint", version)]
pub struct Flags {
    /// The Gateway that this waypoint is; its name is that of the service account, too
    #[arg(long, env = "CULVERT_GATEWAY", value_name = "NAMESPACE/NAME", value_parser = gateway)]
    pub gateway: WaypointKey,
    /// Where configuration and certificates come from.
    #[command(flatten)]
    pub source: source::RawSettings,
    /// The node that this process runs on (`spec.nodeName`): near endpoints come first where that is asked for
    #[arg(long, env = "NODE_NAME", value_name = "NAME", default_value = "")]
    pub node: String,
    /// Where tunnels are taken
    #[arg(long, env = "CULVERT_HBONE_ADDRESS", value_name = "ADDR:PORT", default_value = "[::]:15008")]
    pub hbone_address: SocketAddr,
    /// For the first bytes of a connection to a port of which nothing says what is spoken there; then it is passed on as
    /// TCP, whose servers may speak first
    #[arg(long, env = "CULVERT_DETECT_TIMEOUT", value_name = "TIME", default_value = "1s",
          value_parser = process::settings::duration)]
    pub detect_timeout: Duration,
    /// For a connection of bytes on which nothing passes, where no DestinationRule has an idleTimeout; 0s is without end
    #[arg(long, env = "CULVERT_TCP_IDLE_TIMEOUT", value_name = "TIME", default_value = "1h",
          value_parser = process::settings::duration)]
    pub tcp_idle_timeout: Duration,
    /// How long connections are still taken after SIGTERM, until those who choose endpoints have heard of it
    #[arg(long, env = "CULVERT_DRAIN_DELAY", value_name = "TIME", default_value = "1s",
          value_parser = process::settings::duration)]
    pub drain_delay: Duration,
    /// What becomes of X-Forwarded-For
    #[arg(long, env = "CULVERT_X_FORWARDED_FOR", value_name = "WHAT", default_value = "keep")]
    pub forwarded_for: ForwardedForFlag,
    /// Tell applications the client's identity in X-Forwarded-Client-Cert
    #[arg(long, env = "CULVERT_FORWARD_CLIENT_CERT")]
    pub forward_client_cert: bool,
    /// What becomes of header fields with an underscore in their name
    #[arg(long, env = "CULVERT_HEADER_UNDERSCORES", value_name = "WHAT", default_value = "allow")]
    pub underscores: UnderscoresFlag,
    /// Connections of peers, each with many tunnels
    #[arg(long, env = "CULVERT_MAX_PEERS", value_name = "N", default_value_t = 16_384)]
    pub max_peers: usize,
    /// What all of the project's binaries understand.
    #[command(flatten)]
    pub shared: process::settings::RawSettings,
}

/// See [`ForwardedFor`].
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ForwardedForFlag {
    /// Pass it on as it came
    Keep,
    /// Add the client's address
    Append,
    /// Put the client's address in its place
    Replace,
}

/// See [`Underscores`].
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnderscoresFlag {
    /// Pass them on
    Allow,
    /// Remove them
    Drop,
    /// Refuse the request
    Reject,
}

impl Flags {
    /// The engine's settings.
    #[must_use]
    pub fn engine(&self) -> crate::http::Settings {
        crate::http::Settings {
            forwarded_for: match self.forwarded_for {
                ForwardedForFlag::Keep => ForwardedFor::Keep,
                ForwardedForFlag::Append => ForwardedFor::Append,
                ForwardedForFlag::Replace => ForwardedFor::Replace,
            },
            forward_client_cert: self.forward_client_cert,
            underscores: match self.underscores {
                UnderscoresFlag::Allow => Underscores::Allow,
                UnderscoresFlag::Drop => Underscores::Drop,
                UnderscoresFlag::Reject => Underscores::Reject,
            },
            ..crate::http::Settings::default()
        }
    }
}

fn gateway(text: &str) -> Result<WaypointKey, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(WaypointKey { namespace: namespace.into(), name: name.into() })
        }
        _ => Err("write the Gateway's namespace and name, such as shop/waypoint".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn flags(arguments: &str) -> Result<Flags, String> {
        Flags::try_parse_from(["waypoint"].into_iter().chain(arguments.split_whitespace()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_waypoint_knows_whose_it_is() {
        let flags = flags("--gateway shop/wp --config-dir d --ca-dir c").unwrap();
        assert_eq!(flags.gateway.to_string(), "shop/wp");
        assert_eq!(flags.hbone_address.port(), 15008);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_to_write() {
        for (arguments, words) in [
            ("--config-dir d --ca-dir c", "--gateway"),
            ("--gateway wp", "shop/waypoint"),
            ("--gateway shop/", "shop/waypoint"),
            ("--gateway shop/wp --detect-timeout soon", "500ms"),
            ("--gateway shop/wp --forwarded-for yes", "append"),
        ] {
            let error = flags(arguments).unwrap_err();
            assert!(error.contains(words), "{arguments}: {error}");
        }
    }
}
