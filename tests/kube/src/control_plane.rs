//! etcd, API server, controller manager and scheduler, in a network namespace of their own.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::lab::{API_PORT, CLUSTER_CIDR, CONTROL_PLANE_IP, CONTROL_PLANE_IP6, Lab, SERVICE_CIDR};
use crate::process::{Recorded, WITH_FEW_COLLECTIONS, finish, in_netns, output};
use crate::report::wait_for;

const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEER: &str = "http://127.0.0.1:2380";

/// The names of its processes, in the order in which they are ended.
pub const PROCESSES: [&str; 4] = ["scheduler", "controller-manager", "apiserver", "etcd"];

/// Starts all four; returns when the API server is ready.
///
/// # Errors
/// One does not come up.
pub fn start(lab: &Lab) -> Result<()> {
    let netns = lab.control_plane_netns();
    output("ip", &["netns", "add", &netns])?;
    let address = format!("{CONTROL_PLANE_IP}/24");
    let address6 = format!("{CONTROL_PLANE_IP6}/64");
    for words in [
        &["link", "set", "lo", "up"][..],
        &["link", "add", "br0", "type", "bridge"],
        &["addr", "add", &address, "dev", "br0"],
        &["addr", "add", &address6, "dev", "br0", "nodad"],
        &["link", "set", "br0", "up"],
    ] {
        output("ip", &[&["-n", &netns], words].concat())?;
    }
    let forward = ["-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
    finish(in_netns(&netns, "sysctl").args(forward))?;

    run(lab, "etcd", "etcd", &etcd(lab))?;
    let apiserver = run(lab, "apiserver", "kube-apiserver", &apiserver(lab))?;
    let kubeconfig = lab.pki("admin.kubeconfig");
    wait_for("the API server", Duration::from_secs(90), || {
        if apiserver.pid().is_none() {
            bail!("the API server has ended: see {}", lab.log("apiserver.log").display());
        }
        let mut ready = in_netns(&netns, lab.bin("kubectl"));
        ready.arg("--kubeconfig").arg(&kubeconfig).args(["get", "--raw", "/readyz"]);
        Ok(finish(&mut ready).map_err(|e| e.to_string()))
    })?;
    start_controllers(lab)
}

/// Starts the controller manager and the scheduler.
///
/// # Errors
/// One can't be started.
pub fn start_controllers(lab: &Lab) -> Result<()> {
    let pki = |file: &str| lab.pki(file).display().to_string();
    let as_user = |name: &str| {
        let config = pki(&format!("{name}.kubeconfig"));
        ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"]
            .map(|flag| format!("--{flag}={config}"))
            .to_vec()
    };
    let mut arguments = as_user("controller-manager");
    arguments.extend([
        "--use-service-account-credentials".to_owned(),
        format!("--service-account-private-key-file={}", pki("sa.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        format!("--cluster-cidr={CLUSTER_CIDR}"),
        format!("--service-cluster-ip-range={SERVICE_CIDR}"),
        "--leader-elect=false".to_owned(),
        // A node that reboots is to be noticed within a test's patience.
        "--node-monitor-grace-period=20s".to_owned(),
    ]);
    run(lab, "controller-manager", "kube-controller-manager", &arguments)?;
    let mut arguments = as_user("scheduler");
    arguments.push("--leader-elect=false".to_owned());
    run(lab, "scheduler", "kube-scheduler", &arguments)?;
    Ok(())
}

fn run(lab: &Lab, name: &str, program: &str, arguments: &[String]) -> Result<Recorded> {
    let program = lab.bin(program);
    let mut command: Command = in_netns(&lab.control_plane_netns(), &program);
    command.args(arguments).envs(WITH_FEW_COLLECTIONS);
    Recorded::start(lab, name, &command).with_context(|| format!("starting {}", program.display()))
}

fn etcd(lab: &Lab) -> Vec<String> {
    vec![
        format!("--data-dir={}", lab.run("etcd").display()),
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        format!("--listen-peer-urls={ETCD_PEER}"),
        format!("--initial-advertise-peer-urls={ETCD_PEER}"),
        format!("--initial-cluster=default={ETCD_PEER}"),
    ]
}

fn apiserver(lab: &Lab) -> Vec<String> {
    let mut arguments: Vec<String> = [
        ("client-ca-file", "ca.crt"),
        ("tls-cert-file", "apiserver.crt"),
        ("tls-private-key-file", "apiserver.key"),
        ("kubelet-client-certificate", "apiserver-kubelet-client.crt"),
        ("kubelet-client-key", "apiserver-kubelet-client.key"),
        ("kubelet-certificate-authority", "ca.crt"),
        ("service-account-key-file", "sa.pub"),
        ("service-account-signing-key-file", "sa.key"),
        ("requestheader-client-ca-file", "front-proxy-ca.crt"),
        ("proxy-client-cert-file", "front-proxy-client.crt"),
        ("proxy-client-key-file", "front-proxy-client.key"),
    ]
    .iter()
    .map(|(flag, file)| format!("--{flag}={}", lab.pki(file).display()))
    .collect();
    let settings = [
        ("etcd-servers", ETCD),
        ("advertise-address", CONTROL_PLANE_IP),
        ("bind-address", "0.0.0.0"),
        ("kubelet-preferred-address-types", "InternalIP"),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        ("requestheader-allowed-names", "front-proxy-client"),
        ("requestheader-username-headers", "X-Remote-User"),
        ("requestheader-group-headers", "X-Remote-Group"),
        ("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        // No kube-proxy here: webhooks and aggregated APIs are called at their pods' addresses.
        ("enable-aggregator-routing", "true"),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction"),
        ("service-cluster-ip-range", SERVICE_CIDR),
        ("allow-privileged", "true"),
    ];
    arguments.extend(settings.iter().map(|(flag, value)| format!("--{flag}={value}")));
    arguments.push(format!("--secure-port={API_PORT}"));
    arguments
}
