//! File mode or a cluster: the flags of each, which of them belong together, and what is missing of them.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use identity::ServerAddress;
use model::TrustDomain;

/// Flags and variables as they were given.
#[derive(Args, Debug, Clone)]
// The process's own settings are called the same.
#[group(id = "source")]
pub struct RawSettings {
    /// File mode: directory of manifests (Kubernetes and istio.io YAML); watched for changes
    #[arg(long, env = "CULVERT_CONFIG_DIR", value_name = "DIR")]
    pub config_dir: Option<PathBuf>,
    /// Control planes, the preferred one first; turns file mode off
    #[arg(long, env = "XDS_ADDRESS", value_name = "https://HOST:PORT", value_delimiter = ',')]
    pub xds_address: Vec<String>,
    /// In a cluster: where the CA is; by default where the control plane is
    #[arg(long, env = "CA_ADDRESS", value_name = "https://HOST:PORT", value_delimiter = ',')]
    pub ca_address: Vec<String>,
    /// In a cluster: the token that says who we are; its audience is istio-ca
    #[arg(
        long,
        env = "CULVERT_TOKEN_FILE",
        value_name = "FILE",
        default_value = "/var/run/secrets/tokens/istio-token"
    )]
    pub token_file: PathBuf,
    /// In a cluster: the roots that control plane, CA and peers are judged by
    #[arg(
        long,
        env = "CULVERT_ROOT_FILE",
        value_name = "FILE",
        default_value = "/var/run/secrets/istio/root-cert.pem"
    )]
    pub root_file: PathBuf,
    /// In a cluster: its name, as the control plane knows it
    #[arg(long, env = "CLUSTER_ID", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// In a cluster: the network that the pods here are on, where there are several
    #[arg(long, env = "NETWORK", value_name = "NAME", default_value = "")]
    pub network: String,
    /// In a cluster: the mesh's trust domain, for as long as the control plane does not say it (Istio's doesn't)
    #[arg(long, env = "TRUST_DOMAIN", value_name = "DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// In a cluster: the name of the proxy's own pod
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub pod_name: Option<String>,
    /// In a cluster: the namespace of the proxy's own pod
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE")]
    pub pod_namespace: Option<String>,
    /// In a cluster: the address of the proxy's own pod
    #[arg(long, env = "INSTANCE_IP", value_name = "ADDR")]
    pub instance_ip: Option<IpAddr>,
    /// File mode: directory of the CA: roots.pem, ca.pem, ca.key; made on first use, best on a tmpfs
    #[arg(long, env = "CULVERT_CA_DIR", value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Lifetime of workload certificates, in seconds; they are renewed at half of it
    #[arg(long, env = "CULVERT_CERTIFICATE_TTL", default_value_t = 86_400, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(10..=31_536_000))]
    pub certificate_ttl: u64,
    /// Directory on a tmpfs that only root can enter: keeps certificates over a restart
    #[arg(long, env = "CULVERT_KEY_DIR", value_name = "DIR")]
    pub key_dir: Option<PathBuf>,
    /// Directory of what the next process has to know of this one. ztunnel in file mode: which pods are captured, best on
    /// a file system that is empty after a restart of the machine. In a cluster: the last good configuration
    #[arg(long, env = "CULVERT_STATE_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub state_dir: PathBuf,
}

/// What is served, and by whose word.
#[derive(Clone, Debug)]
pub enum Mode {
    /// A directory of manifests.
    Files(FileMode),
    /// A control plane and its CA.
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
    /// The cluster's name.
    pub cluster: model::Str,
    /// The network that the pods here are on.
    pub network: model::Str,
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
    pub fn of(flags: &RawSettings) -> anyhow::Result<Self> {
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

    fn files(flags: &RawSettings, config_dir: PathBuf) -> anyhow::Result<Self> {
        let ca_dir = flags.ca_dir.clone();
        let ca_dir =
            ca_dir.context("--ca-dir (or CULVERT_CA_DIR) is missing: file mode has a CA of its own")?;
        ensure!(
            flags.ca_address.is_empty(),
            "--ca-address (or CA_ADDRESS) is set beside --config-dir: file mode has a CA of its own, in --ca-dir"
        );
        Ok(Self::Files(FileMode { config_dir, ca_dir }))
    }

    fn cluster(flags: &RawSettings) -> anyhow::Result<Self> {
        ensure!(
            flags.ca_dir.is_none(),
            "--ca-dir (or CULVERT_CA_DIR) is set beside --xds-address, and belongs to file mode: certificates come from \
             --ca-address"
        );
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
            cluster: flags.cluster_id.as_str().into(),
            network: flags.network.as_str().into(),
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
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        source: RawSettings,
    }

    fn mode(arguments: &str) -> Result<Mode, String> {
        let flags = Flags::try_parse_from(["proxy"].into_iter().chain(arguments.split_whitespace()));
        Mode::of(&flags.unwrap().source).map_err(|error| format!("{error:#}"))
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
        assert_eq!(&*cluster.cluster, "Kubernetes");
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
