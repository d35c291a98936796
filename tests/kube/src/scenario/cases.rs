//! The list.

use super::{Scenario, enrolment, faults, policy, smoke, upgrade, workloads};

const fn mesh(
    name: &'static str,
    shows: &'static str,
    run: fn(&super::Stage) -> anyhow::Result<()>,
) -> Scenario {
    Scenario { name, shows, mesh: true, run }
}

/// In the order in which they run.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "smoke",
        shows: "the cluster itself: pods, services, DNS, probes, and that plaintext is seen where there is some",
        mesh: false,
        run: smoke::run,
    },
    mesh(
        "enrol",
        "a label enrols running pods, and no connection, request or download is lost",
        enrolment::enrol,
    ),
    mesh("leave", "the label's removal lets go of them, and nothing is lost", enrolment::leave),
    mesh("sidecars", "a pod with a sidecar, and one that opted out, are left alone", enrolment::left_alone),
    mesh(
        "strict",
        "STRICT refuses plaintext, and a policy on identities and ports decides the rest",
        policy::strict,
    ),
    mesh(
        "probes",
        "the kubelet's probes work under STRICT, and nobody else of the node gets in",
        policy::probes,
    ),
    mesh("network-policy", "NetworkPolicies hold for tunnels, and never lead to plaintext", policy::network),
    mesh("jobs", "Jobs that talk in their first millisecond, all of them encrypted", workloads::jobs),
    mesh(
        "sets",
        "a StatefulSet behind a headless Service, DNS, a ServiceEntry, UDP, servers that speak first",
        workloads::sets,
    ),
    mesh("real", "nginx, Redis and curl, which know nothing of a mesh", workloads::real),
    mesh("rollout", "a rolling update under load loses no request", upgrade::rollout),
    mesh("away", "the control plane is away while pods come and go", faults::control_plane_away),
    mesh("chain", "the primary CNI's configuration is rewritten without the plugin", faults::chain),
    mesh(
        "kills",
        "agent, ztunnel, containerd and kubelet killed at random, and never plaintext",
        faults::kills,
    ),
    mesh("reboot", "a node loses power and comes back, and nothing of it is plaintext", faults::reboot),
    mesh("ztunnel-upgrade", "ztunnel is replaced under load, and no request fails", upgrade::ztunnel),
    mesh("root", "the root is exchanged under load, in stages", upgrade::root),
    mesh("revision", "a second revision's control plane beside the first", upgrade::revision),
];
