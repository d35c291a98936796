//! File mode or a cluster: which of the flags belong together, and what is missing of them.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use identity::ServerAddress;
use model::TrustDomain;

use super::Flags;
use crate::zds::Here;

/// What is served, and by whose word.
#[derive(Clone, Debug)]
pub enum Mode {
    /// A directory of manifests.
    Files(FileMode),
    /// A control plane, its CA and the node agent.
    Cluster(Box<ClusterMode>),
}

/// What only file mode needs.
#[derive(Clone, Debug)]
pub struct FileMode {
    /// The manifests.
    pub config_dir: PathBuf,
    /// The local CA.
    pub ca_dir: PathBuf,
}

/// What only a cluster needs.
#[derive(Clone, Debug)]
pub struct ClusterMode {
    /// Control planes, the preferred one first.
    pub control_planes: Vec<ServerAddress>,
    /// CAs, the preferred one first.
    pub authorities: Vec<ServerAddress>,
    /// The token.
    pub token_file: PathBuf,
    /// The roots.
    pub root_file: PathBuf,
    /// The node agent.
    pub zds_socket: PathBuf,
    /// Where we are.
    pub here: Here,
    /// The trust domain, for as long as nobody else says it.
    pub trust_domain: TrustDomain,
    /// Our own pod's name.
    pub pod_name: String,
    /// Our own pod's namespace.
    pub pod_namespace: String,
    /// Our own pod's address.
    pub instance_ip: IpAddr,
}

impl Mode {
    /// Of the flags that were given.
    ///
    /// # Errors
    /// What is missing, or contradicts another.
    pub fn of(flags: &Flags) -> anyhow::Result<Self> {
        match (&flags.config_dir, flags.xds_address.is_empty()) {
            (Some(config_dir), true) => Self::files(flags, config_dir.clone()),
            (None, false) => Self::cluster(flags),
            (Some(_), false) => bail!(
                "--config-dir (or CULVERT_CONFIG_DIR) and --xds-address (or XDS_ADDRESS) are both set: the configuration \
                 comes either from files or from a control plane; leave one of them out"
            ),
            (None, true) => bail!(
                "nothing says where the configuration comes from: set --xds-address in a cluster, or --config-dir for a \
                 directory of manifests"
            ),
        }
    }

    fn files(flags: &Flags, config_dir: PathBuf) -> anyhow::Result<Self> {
        let ca_dir = flags.ca_dir.clone();
        let ca_dir =
            ca_dir.context("--ca-dir (or CULVERT_CA_DIR) is missing: file mode has a CA of its own")?;
        ensure!(
            flags.ca_address.is_empty(),
            "--ca-address (or CA_ADDRESS) is set beside --config-dir: file mode has a CA of its own, in --ca-dir"
        );
        Ok(Self::Files(FileMode { config_dir, ca_dir }))
    }

    fn cluster(flags: &Flags) -> anyhow::Result<Self> {
        for (flag, is_set, instead) in [
            ("--ca-dir (or CULVERT_CA_DIR)", flags.ca_dir.is_some(), "certificates come from --ca-address"),
            ("--cleanup", flags.cleanup, "the node agent removes the redirection"),
            ("--capture (or CULVERT_CAPTURE)", flags.capture != "auto", "the node agent redirects"),
        ] {
            ensure!(!is_set, "{flag} is set beside --xds-address, and belongs to file mode: {instead}");
        }
        let addresses = |flag: &'static str, list: &[String]| -> anyhow::Result<Vec<ServerAddress>> {
            list.iter().map(|text| text.parse().context(flag)).collect()
        };
        let control_planes = addresses("--xds-address (or XDS_ADDRESS)", &flags.xds_address)?;
        let authorities = match flags.ca_address.as_slice() {
            [] => control_planes.clone(),
            given => addresses("--ca-address (or CA_ADDRESS)", given)?,
        };
        let text = |value: &Option<String>, flag| {
            let missing = || format!("{flag} is missing: the control plane is told which pod asks");
            value.clone().filter(|value| !value.is_empty()).with_context(missing)
        };
        Ok(Self::Cluster(Box::new(ClusterMode {
            control_planes,
            authorities,
            token_file: flags.token_file.clone(),
            root_file: flags.root_file.clone(),
            zds_socket: flags.zds_socket.clone(),
            here: Here {
                node: flags.node.as_str().into(),
                cluster: flags.cluster_id.as_str().into(),
                network: flags.network.as_str().into(),
            },
            trust_domain: flags.trust_domain.parse().context("--trust-domain (or TRUST_DOMAIN)")?,
            pod_name: text(&flags.pod_name, "--pod-name (or POD_NAME)")?,
            pod_namespace: text(&flags.pod_namespace, "--pod-namespace (or POD_NAMESPACE)")?,
            instance_ip: flags.instance_ip.context(
                "--instance-ip (or INSTANCE_IP) is missing: the control plane is told which pod asks",
            )?,
        })))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn mode(arguments: &str) -> Result<Mode, String> {
        let flags = Flags::try_parse_from(
            ["ztunnel", "--node", "n1"].into_iter().chain(arguments.split_whitespace()),
        );
        Mode::of(&flags.unwrap()).map_err(|error| format!("{error:#}"))
    }

    const POD: &str = "--pod-name zt-1 --pod-namespace culvert-system --instance-ip 10.0.0.1";

    #[test]
    fn a_cluster_needs_a_control_plane_and_who_we_are() {
        let Mode::Cluster(cluster) =
            mode(&format!("--xds-address culvertd.culvert-system.svc {POD}")).unwrap()
        else {
            panic!("not a cluster")
        };
        assert_eq!(cluster.control_planes, cluster.authorities);
        assert_eq!(cluster.control_planes[0].port(), 15012);
        assert_eq!(&*cluster.here.cluster, "Kubernetes");
        let several = format!("--xds-address https://a:1,https://b:2 --xds-address c --ca-address d:4 {POD}");
        let Mode::Cluster(cluster) = mode(&several).unwrap() else { panic!("not a cluster") };
        assert_eq!((cluster.control_planes.len(), cluster.authorities[0].port()), (3, 4));
    }

    #[test]
    fn what_contradicts_itself_or_is_missing_is_named_with_the_way_out() {
        for (arguments, words) in [
            ("", ["--xds-address", "--config-dir"]),
            ("--config-dir d --ca-dir c --xds-address a", ["--config-dir", "leave one of them out"]),
            ("--config-dir d", ["--ca-dir", "CULVERT_CA_DIR"]),
            ("--config-dir d --ca-dir c --ca-address a", ["--ca-address", "--ca-dir"]),
            (&format!("--xds-address a --ca-dir c {POD}"), ["--ca-dir", "--ca-address"]),
            (&format!("--xds-address a --cleanup {POD}"), ["--cleanup", "node agent"]),
            (&format!("--xds-address a --capture nftables {POD}"), ["--capture", "node agent"]),
            (&format!("--xds-address http://a {POD}"), ["--xds-address", "https"]),
            (&format!("--xds-address a --trust-domain No! {POD}"), ["--trust-domain", "No!"]),
            ("--xds-address a", ["--pod-name", "POD_NAME"]),
            ("--xds-address a --pod-name p --pod-namespace n", ["--instance-ip", "INSTANCE_IP"]),
        ] {
            let error = mode(arguments).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{arguments}: {error}");
        }
        assert!(matches!(mode("--config-dir d --ca-dir c"), Ok(Mode::Files(_))));
    }
}
