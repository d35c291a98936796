//! What a node proxy holds of a workload: the snapshot and its indexes, read from the wire as it comes.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use model::{Change, Mesh};
use proto::wire::workload as wire;
use proto::{Decoded, Decoder, Elided};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static BLOCKS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator as they come; only sizes are counted beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        BLOCKS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        BLOCKS.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A pod as clusters have them: a hundred of a service, on two thousand nodes.
fn pod(number: u32) -> wire::Workload {
    let (service, namespace) = (number / 100, number / 5000);
    let name = format!("app-{service}-5f6d8c9b7-{number:08x}");
    let ports = wire::PortList {
        ports: vec![wire::Port { service_port: 80, target_port: 8080, ..Default::default() }],
    };
    wire::Workload {
        uid: format!("Kubernetes//Pod/team-{namespace}/{name}"),
        name,
        namespace: format!("team-{namespace}"),
        addresses: vec![vec![10, (number >> 16) as u8, (number >> 8) as u8, number as u8]],
        tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
        service_account: format!("app-{service}"),
        node: format!("node-{}", number % 2000),
        canonical_name: format!("app-{service}"),
        canonical_revision: "v1".to_owned(),
        workload_name: format!("app-{service}"),
        services: [(format!("team-{namespace}/app-{service}.team-{namespace}.svc.cluster.local"), ports)]
            .into(),
        ..Default::default()
    }
}

#[test]
fn a_workload_takes_little() {
    const PODS: u32 = 50_000;
    const PART: u32 = 5000;
    let before = (LIVE.load(Ordering::Relaxed), BLOCKS.load(Ordering::Relaxed));
    let mut decoder = Decoder::new(Elided::default());
    let mut mesh = Mesh::default();
    for part in 0..PODS / PART {
        let read = |number| match decoder
            .address(&wire::Address { r#type: Some(wire::address::Type::Workload(pod(number))) })
        {
            Ok(Decoded::Workload(workload)) => Change::SetWorkload(Arc::new(workload)),
            other => panic!("{other:?}"),
        };
        let changes: Vec<Change> = (part * PART..(part + 1) * PART).map(read).collect();
        mesh = mesh.apply(changes);
    }
    decoder.sweep();
    assert_eq!(mesh.workload_count(), PODS as usize);
    let of_one = |now: usize, before: usize| (now - before) as f64 / f64::from(PODS);
    let bytes = of_one(LIVE.load(Ordering::Relaxed), before.0);
    let blocks = of_one(BLOCKS.load(Ordering::Relaxed), before.1);
    // 16 bytes of a block are the allocator's.
    assert!(bytes + 16.0 * blocks < 240.0, "{bytes:.0} bytes in {blocks:.2} blocks");
    drop(decoder);
}
