//! ztunnel's own metrics, beside the L4 telemetry: read from where the numbers are kept when somebody scrapes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use process::metrics::{Description, Kind, Registry};

use crate::node::Node;
use crate::proxy::Proxy;
use crate::proxy::threads::ThreadCounts;

/// Registers all of them.
pub fn register(registry: &Registry, proxy: &Arc<Proxy>, node: &Arc<Node>) {
    let number = |name, help, kind, read: Read| {
        let (proxy, node) = (proxy.clone(), node.clone());
        registry.collect(Description { name, help, kind }, move |out| {
            out.integer(&|_| {}, read(&proxy, &node));
        });
    };
    let gauge = |name, help, read| number(name, help, Kind::Gauge, read);
    let counter = |name, help, read| number(name, help, Kind::Counter, read);
    connections(&gauge, &counter);
    descriptors(&gauge, &counter);
    memory(&gauge, &counter);
    pool(&gauge, &counter);
    inbound(&gauge, &counter);
    hosts(&gauge, &counter);
    certificates(&gauge, &counter);
    let state = proxy.state.clone();
    let help = "The mesh that this proxy is of";
    registry.collect(Description { name: "culvert_mesh_info", help, kind: Kind::Gauge }, move |out| {
        let mesh = state.mesh();
        let settings = mesh.settings();
        out.integer(
            &|labels| {
                labels.pair("mesh_id", settings.mesh_id());
                labels.pair("trust_domain", settings.trust_domains.own.as_str());
            },
            1,
        );
    });
    captured(registry, node);
    threads(registry, proxy, &counter);
    verdicts(registry, proxy, (&gauge, &counter));
    let node = node.clone();
    registry.collect(
        Description { name: "culvert_pods", help: "Pods of this node by capture state", kind: Kind::Gauge },
        move |out| {
            let (enrolled, pending) = node.counts();
            out.integer(&|labels| labels.pair("state", "enrolled"), enrolled);
            out.integer(&|labels| labels.pair("state", "pending"), pending);
        },
    );
}

/// What the programs of eBPF count.
fn captured(registry: &Registry, node: &Arc<Node>) {
    let help = "What capture by eBPF did, by pod: connections captured, refused and dropped, by reason; escaped_inbound and \
                escaped_outbound should have been captured, were not, and were refused";
    let node = node.clone();
    let description = Description { name: "culvert_capture_events", help, kind: Kind::Counter };
    registry.collect(description, move |out| {
        node.capture_counters(|namespace, name, counter, number| {
            let labels = |labels: &mut process::metrics::LabelWriter<'_>| {
                labels.pair("namespace", namespace);
                labels.pair("pod", name);
                labels.pair("what", counter.as_str());
            };
            out.integer(&labels, number);
        });
    });
}

/// What the threads of the data plane have to do.
fn threads(registry: &Registry, proxy: &Arc<Proxy>, counter: Register<'_>) {
    type Number = fn(ThreadCounts) -> usize;
    let gauges: [(&str, &str, Number); 3] = [
        ("culvert_thread_connections", "Connections that a thread of the data plane carries", |c| c.open),
        (
            "culvert_thread_waiting",
            "What others have given a thread of the data plane, and it has not looked at",
            |c| c.waiting,
        ),
        (
            "culvert_thread_stalled",
            "1 while a thread of the data plane does not get to what it is given, else 0",
            |c| usize::from(c.is_stalled),
        ),
    ];
    for (name, help, number) in gauges {
        let proxy = proxy.clone();
        registry.collect(Description { name, help, kind: Kind::Gauge }, move |out| {
            for (thread, counts) in proxy.threads.counts().enumerate() {
                out.integer(&|labels| labels.pair("thread", &thread.to_string()), number(counts) as u64);
            }
        });
    }
    counter(
        "culvert_accepts_kept",
        "Connections that stayed where they were accepted, since too much waited for the thread that they were for",
        Box::new(|p, _| p.threads.kept()),
    );
    counter(
        "culvert_accepts_moved",
        "Times that another thread went on to accept a pod's connections",
        Box::new(|p, _| p.threads.moved()),
    );
    counter(
        "culvert_accepts_rescued",
        "Listeners that were taken from a thread of the data plane that stood still",
        Box::new(|p, _| p.threads.rescued()),
    );
    counter(
        "culvert_thread_stalls",
        "Times that a thread of the data plane was found to stand still",
        Box::new(|p, _| p.threads.stalls()),
    );
}

/// What passes by verdicts in the kernel.
fn verdicts(registry: &Registry, proxy: &Arc<Proxy>, (gauge, counter): (Register<'_>, Register<'_>)) {
    macro_rules! number {
        ($register:ident, $name:literal, $help:literal, $of:expr) => {
            $register($name, $help, Box::new(|p, _| $of(p.verdicts.counts())));
        };
    }
    type C = crate::verdicts::Counts;
    number!(gauge, "culvert_verdict_ways", "Addresses that lead pods past ztunnel", |c: C| c.written.0);
    number!(gauge, "culvert_verdict_pairs", "Pairs that the kernel may let pass", |c: C| c.written.1);
    number!(gauge, "culvert_verdict_limit", "Ways, and pairs, that there may be", |c: C| c.limits.0);
    number!(gauge, "culvert_verdict_source_limit", "The same of one source", |c: C| c.limits.1);
    gauge(
        "culvert_verdict_sources_full",
        "Sources that have as many",
        Box::new(|p, _| p.verdicts.full_sources()),
    );
    number!(gauge, "culvert_verdict_pods", "Pods that may be ends of them", |c: C| c.pods.0);
    number!(gauge, "culvert_verdict_pods_unfit", "Pods that may not, for now", |c: C| c.pods.1);
    number!(gauge, "culvert_verdict_sockets_open", "Sockets known of what passes", |c: C| c.open);
    number!(counter, "culvert_verdict_sockets_ended", "Sockets that passed, and ended", |c: C| c.passed);
    number!(counter, "culvert_verdict_sockets_untold", "Ended, and of an unknown way", |c: C| c.untold);
    number!(counter, "culvert_verdict_no_room", "Pairs for which there was no place", |c: C| c
        .crowded
        .no_room);
    number!(gauge, "culvert_verdict_stuck", "1 while some can't be taken back", |c: C| c.stuck.into());
    let help = "Ways that gave their place: to another of their source, or where all were given to one of another source";
    let description = Description { name: "culvert_verdict_displaced", help, kind: Kind::Counter };
    let of = proxy.clone();
    registry.collect(description, move |out| {
        let crowded = of.verdicts.counts().crowded;
        out.integer(&|labels| labels.pair("to", "own"), crowded.of_source);
        out.integer(&|labels| labels.pair("to", "others"), crowded.of_all);
    });
    let proxy = proxy.clone();
    let help = "What the programs of verdicts did, in connections and packets";
    let description = Description { name: "culvert_verdict_events", help, kind: Kind::Counter };
    registry.collect(description, move |out| {
        for (what, number) in proxy.verdicts.tallies() {
            out.integer(&|labels| labels.pair("what", what), number);
        }
    });
}

type Read = Box<dyn Fn(&Proxy, &Node) -> u64 + Send + Sync>;
type Register<'a> = &'a dyn Fn(&'static str, &'static str, Read);

fn connections(gauge: Register<'_>, counter: Register<'_>) {
    gauge(
        "istio_tcp_sockets_open",
        "Connections that are carried now",
        Box::new(|p, _| p.registry.open_count() as u64),
    );
    gauge("istio_active_proxy_count", "Pods whose traffic is carried", Box::new(|_, n| n.counts().0 as u64));
    gauge(
        "culvert_pods_leaving",
        "Pods that left the mesh and are still redirected for their open connections",
        Box::new(|_, n| n.leaving_counts().0 as u64),
    );
    gauge(
        "culvert_pods_not_released",
        "Pods that left the mesh and whose redirection could not be removed: their traffic is refused",
        Box::new(|_, n| n.leaving_counts().1 as u64),
    );
    gauge("istio_pending_proxy_count", "Pods that wait to be enrolled", Box::new(|_, n| n.counts().1 as u64));
    counter("istio_proxies_started", "Pods that were enrolled", Box::new(|_, n| n.totals().0));
    counter("istio_proxies_stopped", "Pods that were un-enrolled", Box::new(|_, n| n.totals().1));
    gauge(
        "culvert_connections_before_enrolment",
        "Connections alive at enrolment that go on outside the mesh",
        Box::new(|_, n| n.adopted() as u64),
    );
    counter(
        "culvert_accept_failures",
        "Times that a connection could not be accepted for lack of descriptors or memory",
        Box::new(|p, _| p.accepts.failed.load(Ordering::Relaxed)),
    );
    gauge(
        "culvert_series_known",
        "Series that connections of the last seconds counted in, found without their labels; of all threads",
        Box::new(|p, _| p.handles.count() as u64),
    );
    counter(
        "culvert_connections_cut",
        "Connections ended because policy, identity or trust no longer allowed them",
        Box::new(|p, _| p.registry.cut_count() + p.verdicts.cut()),
    );
    gauge(
        "culvert_connections_waiting",
        "Connections that wait for what the control plane has not told yet",
        Box::new(|p, _| p.state.waiting() as u64),
    );
    counter(
        "culvert_connections_not_known",
        "Connections refused because the control plane did not tell in time what they needed",
        Box::new(|p, _| p.state.given_up()),
    );
    gauge(
        "culvert_mesh_generation",
        "Snapshots of the configuration put in force since the start",
        Box::new(|p, _| p.state.mesh().generation()),
    );
    gauge("culvert_workloads", "Workloads known", Box::new(|p, _| p.state.mesh().workload_count() as u64));
}

/// What connections have of the kernel.
fn descriptors(gauge: Register<'_>, counter: Register<'_>) {
    gauge(
        "culvert_connection_descriptors",
        "Descriptors of the connections that are carried",
        Box::new(|p, _| p.room.taken() as u64),
    );
    gauge(
        "culvert_connection_descriptors_limit",
        "Descriptors that carried connections may have",
        Box::new(|p, _| p.room.limit() as u64),
    );
    counter(
        "culvert_connections_without_room",
        "Connections refused because their pod, or all together, had as many as they may",
        Box::new(|p, _| p.room.refused()),
    );
    gauge(
        "culvert_splice_pipes",
        "Pipes that data of unencrypted connections passes through, in use or kept for the next",
        Box::new(|_, _| net::pipes().existing as u64),
    );
    gauge(
        "culvert_splice_pipes_limit",
        "Pipes that there may be; connections beyond copy",
        Box::new(|_, _| net::pipes().limit as u64),
    );
    counter(
        "culvert_splice_pipes_missing",
        "Times that data was copied because there was no pipe for it",
        Box::new(|_, _| net::pipes().without),
    );
    gauge(
        "culvert_sockets_in_stock",
        "Sockets made in advance in the namespaces of pods that connect, or are connected to, often",
        Box::new(|_, _| net::sockets_in_stock() as u64),
    );
}

/// What waits in tunnels, of both directions.
fn memory(gauge: Register<'_>, counter: Register<'_>) {
    gauge(
        "culvert_hbone_held_bytes",
        "Bytes in tunnels that were received and not taken",
        Box::new(|p, _| p.limits.memory.held() as u64),
    );
    gauge(
        "culvert_hbone_held_limit_bytes",
        "Bytes that tunnels may hold",
        Box::new(|p, _| p.limits.memory.limit() as u64),
    );
    gauge(
        "culvert_hbone_holders",
        "Tunnels that hold bytes which were not taken",
        Box::new(|p, _| p.limits.memory.holders() as u64),
    );
    counter(
        "culvert_hbone_tunnels_cut",
        "Tunnels cut because what they held was not taken, and memory was needed",
        Box::new(|p, _| p.limits.memory.cut()),
    );
}

fn pool(gauge: Register<'_>, counter: Register<'_>) {
    macro_rules! pool {
        ($register:ident, $name:literal, $help:literal, $field:ident) => {
            $register($name, $help, Box::new(|p, _| p.tunnels.count(|counters| &counters.$field)));
        };
    }
    pool!(gauge, "culvert_hbone_pool_connections", "Pooled HBONE connections", connections_now);
    pool!(gauge, "culvert_hbone_pool_streams", "Tunnels open over pooled connections", streams_now);
    pool!(gauge, "culvert_hbone_pool_waiting", "Callers that wait for a connection", waiting_now);
    pool!(counter, "culvert_hbone_pool_connects", "HBONE connections made", connections);
    pool!(counter, "culvert_hbone_pool_connects_failed", "HBONE connections that failed", connects_failed);
    pool!(counter, "culvert_hbone_pool_reused", "Tunnels opened on a connection that was there", reused);
    pool!(counter, "culvert_hbone_pool_refused", "Tunnels that the peer refused", refused);
    pool!(counter, "culvert_hbone_pool_retried", "Requests sent again on another connection", retried);
    pool!(counter, "culvert_hbone_pool_overloaded", "Callers turned away by a limit", overloaded);
    pool!(counter, "culvert_hbone_pool_idle_closed", "Connections closed for idleness", idle_closed);
    pool!(counter, "culvert_hbone_pool_going_away", "Connections that a peer drained", going_away);
    pool!(counter, "culvert_hbone_pool_ping_timeouts", "Connections whose peer fell silent", ping_timeouts);
}

fn inbound(gauge: Register<'_>, counter: Register<'_>) {
    macro_rules! server {
        ($register:ident, $name:literal, $help:literal, $field:ident) => {
            $register($name, $help, Box::new(|p, _| p.server_counters.$field.get()));
        };
    }
    server!(gauge, "culvert_hbone_inbound_connections", "HBONE connections of peers", connections_now);
    server!(counter, "culvert_hbone_inbound_accepted", "HBONE connections accepted", connections);
    server!(
        counter,
        "culvert_hbone_inbound_handshakes_failed",
        "Peers that did not begin HTTP/2",
        handshakes_failed
    );
    gauge(
        "culvert_hbone_inbound_limit",
        "HBONE connections that peers may have",
        Box::new(|p, _| p.peers.limit() as u64),
    );
    counter(
        "culvert_hbone_inbound_made_room",
        "Connections without tunnels that were closed so that others have room",
        Box::new(|p, _| p.peers.closed()),
    );
    counter(
        "culvert_hbone_inbound_without_room",
        "HBONE connections refused because there were as many as there may be",
        Box::new(|p, _| p.peers.refused()),
    );
    server!(counter, "culvert_hbone_inbound_floods", "Connections ended because of a flood", floods);
    server!(
        counter,
        "culvert_hbone_inbound_protocol_errors",
        "Connections that broke HTTP/2",
        protocol_errors
    );
    gauge(
        "culvert_tls_handshakes_active",
        "Inbound TLS handshakes under way",
        Box::new(|p, _| p.handshakes.active() as u64),
    );
    counter(
        "culvert_tls_handshakes_failed",
        "Inbound TLS handshakes that failed",
        Box::new(|p, _| p.tls.failed_handshakes()),
    );
    counter(
        "culvert_tls_handshakes",
        "TLS handshakes completed, both directions",
        Box::new(|p, _| p.tls.handshakes()),
    );
}

fn hosts(gauge: Register<'_>, counter: Register<'_>) {
    gauge(
        "culvert_host_lookups_active",
        "Lookups of endpoints' host names under way",
        Box::new(|p, _| p.hosts.counts().under_way),
    );
    counter(
        "culvert_host_lookups",
        "Lookups of endpoints' host names",
        Box::new(|p, _| p.hosts.counts().lookups),
    );
    counter(
        "culvert_host_lookups_failed",
        "Lookups of endpoints' host names that brought no address",
        Box::new(|p, _| p.hosts.counts().failed),
    );
    counter(
        "culvert_host_stale_answers",
        "Connections to an address of a host name that was looked up some time ago",
        Box::new(|p, _| p.hosts.counts().stale),
    );
    counter(
        "culvert_host_refused",
        "Connections that a limit of lookups of host names kept from an answer",
        Box::new(|p, _| p.hosts.counts().refused),
    );
}

fn certificates(gauge: Register<'_>, counter: Register<'_>) {
    gauge(
        "culvert_certificates",
        "Identities with a valid certificate",
        Box::new(|p, _| p.tls.certificates().counts().valid),
    );
    gauge(
        "culvert_certificates_failing",
        "Identities whose last renewal failed",
        Box::new(|p, _| p.tls.certificates().counts().failing),
    );
    gauge(
        "culvert_certificate_oldest_age_seconds",
        "Age of the oldest certificate",
        Box::new(|p, _| p.tls.certificates().counts().oldest_age_s.unwrap_or(0)),
    );
    gauge(
        "culvert_certificate_first_expiry_seconds",
        "Time until the first certificate expires",
        Box::new(|p, _| p.tls.certificates().counts().first_expiry_s.unwrap_or(0)),
    );
    counter(
        "culvert_certificates_issued",
        "Certificates issued",
        Box::new(|p, _| p.tls.certificates().counts().issued_total),
    );
    counter(
        "culvert_certificate_failures",
        "Attempts to issue that failed",
        Box::new(|p, _| p.tls.certificates().counts().failed_total),
    );
}
