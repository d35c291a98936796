//! A directory of manifests, and the same model sent as WDS and read back, decide alike: over the connections
//! between all workloads of each of `config`'s policy cases, and of identities that none of them has.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::{Change, Connection, Mesh, Policy, SpiffeId, Workload};
use prost::Message;
use proto::{Decoder, Elided, Extensions, encode_policy, encode_service, encode_workload, wire};

/// The cases' files: what is expected, then the manifests.
fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/config/tests/cases");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    files
}

fn of_directory(file: &Path) -> Mesh {
    let text = std::fs::read_to_string(file).unwrap();
    let (_, manifests) = text.split_once("\n---\n").expect("an expectation, then manifests");
    let mut repository = Repository::new(Options::default());
    let outcome = repository.apply(&"case.yaml".into(), Content::Bytes(manifests.as_bytes()));
    Mesh::default().apply(outcome.changes)
}

/// The mesh as a proxy knows it that got `mesh` as WDS; `None` when the plain form of the protocol can't say it.
fn over_wire(mesh: &Mesh, extensions: Extensions) -> Option<Mesh> {
    let settings = mesh.settings().clone();
    let mut decoder =
        Decoder::new(Elided { trust_domain: settings.trust_domains.own.clone(), ..Elided::default() });
    let mut changes = vec![Change::SetSettings(settings.into())];
    for workload in mesh.workloads() {
        let bytes = encode_workload(workload).unwrap().encode_to_vec();
        let read = wire::workload::Workload::decode(&*bytes).unwrap();
        changes.push(Change::SetWorkload(Arc::new(decoder.workload(&read).unwrap())));
    }
    for service in mesh.services() {
        let bytes = encode_service(service, extensions).ok()?.encode_to_vec();
        let read = wire::workload::Service::decode(&*bytes).unwrap();
        changes.push(Change::SetService(Arc::new(decoder.service(&read).unwrap())));
    }
    for policy in mesh.policies() {
        let bytes = encode_policy(policy, extensions).ok()?.encode_to_vec();
        let read = wire::security::Authorization::decode(&*bytes).unwrap();
        changes.push(Change::SetPolicy(Arc::new(decoder.policy(&read).unwrap())));
    }
    Some(Mesh::default().apply(changes))
}

/// Identities, addresses and ports that the policies of a mesh tell apart, and some that they don't name.
struct Probes {
    sources: Vec<Option<SpiffeId>>,
    addresses: Vec<IpAddr>,
    ports: Vec<u16>,
}

impl Probes {
    fn of(mesh: &Mesh) -> Self {
        let mut sources: BTreeSet<Option<SpiffeId>> = BTreeSet::from([
            None,
            Some("spiffe://cluster.local/ns/nowhere/sa/nobody".parse().unwrap()),
            Some("spiffe://foreign.org/ns/a/sa/x".parse().unwrap()),
        ]);
        let mut domains: BTreeSet<String> = BTreeSet::from(["cluster.local".into(), "foreign.org".into()]);
        let settings = mesh.settings();
        domains.insert(settings.trust_domains.own.to_string());
        domains.extend(settings.trust_domains.aliases.iter().map(ToString::to_string));
        for workload in mesh.workloads() {
            for domain in &domains {
                for account in [&*workload.service_account, "x", "y"] {
                    let id = format!("spiffe://{domain}/ns/{}/sa/{account}", workload.namespace);
                    sources.insert(Some(id.parse().unwrap()));
                }
            }
        }
        let mut addresses: BTreeSet<IpAddr> =
            ["192.0.2.1", "10.0.0.1", "2001:db8::1"].iter().map(|a| a.parse().unwrap()).collect();
        let mut ports: BTreeSet<u16> = BTreeSet::from([80, 9999]);
        let matches = |p: &Policy| {
            let clauses = p.rules.iter().flat_map(|r| r.clauses.clone()).collect::<Vec<_>>();
            clauses.into_iter().flat_map(|c| c.matches.into_vec()).collect::<Vec<_>>()
        };
        for m in mesh.policies().flat_map(|p| matches(p)) {
            ports.extend(m.destination_ports.iter().chain(&m.not_destination_ports));
            addresses.extend(m.source_ips.iter().chain(&m.not_source_ips).map(|range| range.0.network()));
        }
        Self {
            sources: sources.into_iter().collect(),
            addresses: addresses.into_iter().collect(),
            ports: ports.into_iter().collect(),
        }
    }

    fn connections(&self, to: &Workload) -> Vec<Connection> {
        let mut all = Vec::new();
        for source in &self.sources {
            for address in &self.addresses {
                for port in &self.ports {
                    for ip in &to.addresses {
                        all.push(Connection::new(source.clone(), *address, SocketAddr::new(*ip, *port)));
                    }
                }
            }
        }
        all
    }
}

#[test]
fn a_directory_and_the_same_model_over_wds_decide_alike() {
    let (mut compared, mut plain, mut denied) = (0_u64, 0_u64, 0_u64);
    for case in cases() {
        let mesh = of_directory(&case);
        let probes = Probes::of(&mesh);
        let ours = over_wire(&mesh, Extensions::Culvert).expect("our own form says everything");
        let standard = over_wire(&mesh, Extensions::None);
        for workload in mesh.workloads() {
            let same = ours.workload(&workload.uid).expect("the workload arrived");
            // Labels go to waypoints alone, those that something there asks for.
            let unlabelled = Workload::clone(workload).with(|w| w.labels = same.labels.clone());
            assert_eq!(**same, unlabelled, "{}", case.display());
            for connection in probes.connections(workload) {
                let here = mesh.authorize(workload, &connection);
                let there = ours.authorize(same, &connection);
                assert_eq!(here, there, "{}: {connection:?}", case.display());
                compared += 1;
                denied += u64::from(here.outcome.is_err());
                // Lowered, a policy may have other rules, so only what is decided is the same.
                if let Some(standard) = &standard {
                    let there = standard.authorize(workload, &connection);
                    assert_eq!(
                        here.outcome.is_ok(),
                        there.outcome.is_ok(),
                        "{}: {connection:?}",
                        case.display()
                    );
                    plain += 1;
                }
            }
        }
    }
    // The comparison is worth something only if there was something to compare, decided both ways.
    assert!(compared > 1000 && plain > 1000, "{compared} and {plain} connections");
    assert!(denied > 100 && compared - denied > 100, "{denied} of {compared} denied");
}
