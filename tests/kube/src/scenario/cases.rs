//! The list.

use super::{
    Run, Scenario, Way, commands, conformance, dual_stack, ebpf, enrolment, faults, node_local, plugin,
    policy, release, smoke, upgrade, waypoint, workloads,
};

/// Keeps to its namespace.
const fn beside(name: &'static str, shows: &'static str, run: Run) -> Scenario {
    Scenario { name, shows, way: Way::Beside, long: false, asked: false, run, after: None, gentle: false }
}

/// Changes or breaks what others need.
const fn alone(name: &'static str, shows: &'static str, run: Run) -> Scenario {
    Scenario { way: Way::Alone, ..beside(name, shows, run) }
}

/// Changes what others need, and breaks nothing.
const fn gentle(name: &'static str, shows: &'static str, run: Run) -> Scenario {
    Scenario { gentle: true, ..alone(name, shows, run) }
}

/// In the order in which they begin: the longest first.
pub const ALL: &[Scenario] = &[
    Scenario {
        way: Way::Before,
        ..beside(
            "smoke",
            "the cluster itself: pods, services, DNS, probes, and that plaintext is seen where there is some",
            smoke::run,
        )
    },
    // Says something of the suite, not of the mesh; it is for who changes the suite.
    Scenario {
        way: Way::Before,
        long: true,
        asked: true,
        ..beside(
            "by-chance",
            "the Gateway API's conformance suite without a mesh: what passes then says nothing of one",
            conformance::without_a_mesh,
        )
    },
    Scenario {
        long: true,
        ..beside(
            "conformance",
            "the Gateway API's conformance suite, on its namespaces behind waypoints",
            conformance::with_a_mesh,
        )
    },
    beside(
        "enrol",
        "a label enrols running pods, and no connection, request or download is lost",
        enrolment::enrol,
    ),
    beside(
        "waypoint",
        "a waypoint by the command line: routes, policies, no way past it, replaced under load, and gone",
        waypoint::run,
    ),
    beside("dual-stack", "IPv6 beside IPv4, for pods and services, policies too", dual_stack::run),
    beside("commands", "the command line on a mesh at work: what it says is so", commands::commands),
    beside("leave", "the label's removal lets go of them, and nothing is lost", enrolment::leave),
    beside("sidecars", "a pod with a sidecar, and one that opted out, are left alone", enrolment::left_alone),
    beside(
        "strict",
        "STRICT refuses plaintext, and a policy on identities and ports decides the rest",
        policy::strict,
    ),
    beside(
        "probes",
        "the kubelet's probes work under STRICT, and nobody else of the node gets in",
        policy::probes,
    ),
    beside(
        "network-policy",
        "NetworkPolicies hold for tunnels, and never lead to plaintext",
        policy::network,
    ),
    beside("jobs", "Jobs that talk in their first millisecond, all of them encrypted", workloads::jobs),
    beside(
        "sets",
        "a StatefulSet behind a headless Service, DNS, a ServiceEntry, UDP, servers that speak first",
        workloads::sets,
    ),
    beside("real", "nginx, Redis and curl, which know nothing of a mesh", workloads::real),
    beside("rollout", "a rolling update under load loses no request", upgrade::rollout),
    alone(
        "away",
        "two minutes without a control plane: pods come and go, a ztunnel is killed, admission is closed",
        faults::control_plane_away,
    ),
    gentle("root", "the root is exchanged under load, until the old one is gone", upgrade::root),
    alone("ebpf", "captured by eBPF: in and out, under load, with agent and ztunnel killed", ebpf::run),
    Scenario {
        after: Some(node_local::forgotten),
        ..alone(
            "node-local",
            "within a node past ztunnel (nodeLocal: kernel): denied, with agent and ztunnel killed and replaced",
            node_local::run,
        )
    },
    gentle(
        "revision",
        "a second revision's control plane gets the proxies under load, and gives them back",
        upgrade::revision,
    ),
    Scenario {
        way: Way::Last,
        ..alone(
            "release",
            "uninstalled under pods of the mesh, installed, upgraded and uninstalled by the command line",
            release::comes_and_goes,
        )
    },
    alone(
        "kills",
        "agent, ztunnel, containerd and kubelet killed at random, and never plaintext",
        faults::kills,
    ),
    alone("reboot", "a node loses power and comes back, and nothing of it is plaintext", faults::reboot),
    gentle("ztunnel-upgrade", "ztunnel is replaced under load, and no request fails", upgrade::ztunnel),
    alone(
        "plugin",
        "the CNI plugin is killed inside ADD, and no pod starts outside the mesh",
        plugin::killed,
    ),
    alone("chain", "the primary CNI's configuration is rewritten without the plugin", faults::chain),
];
