//! Verdicts that nobody wants any more, while the process goes on that attached them.

use std::num::NonZeroU64;
use std::path::Path;

use ebpf::verdicts::{Tally, Verdicts};

use crate::lab::{CGROUPS, LEASE, Mesh, WAIT, accept, capture, passes, service};

/// Whether it can be removed, while other tests' pods are captured.
fn is_removed(verdicts: &Verdicts) -> bool {
    let mut attempts = (0..2000).map(|_| {
        std::thread::sleep(WAIT / 200);
        verdicts.remove().unwrap()
    });
    attempts.any(|removed| removed)
}

#[test]
fn what_nobody_wants_any_more_is_taken_away_and_comes_again() {
    let Some(mut mesh) = Mesh::new("what nobody wants any more is taken away") else { return };
    for v6 in [false, true] {
        mesh.open(v6);
        let (pair, listener) = (mesh.pair(v6), mesh.listen(v6));
        let mut client = mesh.connect(service(v6)).unwrap();
        let (mut server, _) = accept(&listener).unwrap();
        assert!(!mesh.verdicts.remove().unwrap(), "there is a pair");
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
        let [source, destination] = ["client", "server"].map(|name| mesh.lab.pod(name).netns.clone());
        assert_eq!(mesh.verdicts.end(Some(&source), Some(&destination), pair).unwrap().left, 0);
        let declined = || mesh.tally(Tally::Declined);
        let before = declined();
        assert!(mesh.connect(service(v6)).is_err());
        assert_eq!(declined(), before + 1, "the offer is looked up");
        assert!(is_removed(&mesh.verdicts));
        assert!(!mesh.pins.verdicts().exists());
        assert!(is_removed(&mesh.verdicts), "again");
        // It is captured as before, and nobody looks for an offer.
        for dialled in [service(v6), pair.destination] {
            assert!(mesh.connect(dialled).is_err());
        }
        assert_eq!(declined(), before + 1);
        assert!(accept(&listener).is_none());
        assert!(!mesh.verdicts.renew(LEASE).unwrap());

        mesh.verdicts = Verdicts::attach(&mesh.pins, Path::new(CGROUPS)).unwrap();
        let node = &mesh.lab.node("a").host.netns;
        let qualified = ["client", "server"].map(|name| {
            let pod = mesh.lab.pod(name);
            capture(&mesh.pins, pod);
            mesh.verdicts.qualify(node, &pod.netns).unwrap()
        });
        [mesh.client, mesh.server] = qualified;
        mesh.open(v6);
        let mut client = mesh.connect(service(v6)).unwrap();
        let (mut server, _) = accept(&listener).unwrap();
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
        mesh.verdicts.end(Some(&source), Some(&destination), pair).unwrap();
    }
}

/// A process that ends its verdicts, and one that begins, at once.
#[test]
fn a_successor_keeps_what_it_took_over() {
    let Some(mesh) = Mesh::new("a successor keeps what it took over") else { return };
    let attach = || Verdicts::attach(&mesh.pins, Path::new(CGROUPS)).unwrap();
    for _ in 0..20 {
        let old = attach();
        let next = std::thread::scope(|scope| {
            let next = scope.spawn(attach);
            // Nothing is there to remove, or something that is not ours any more, or we were first.
            let _ = old.remove().unwrap();
            next.join().unwrap()
        });
        assert!(next.renew(LEASE).unwrap() && !old.renew(LEASE).unwrap());
        assert!(old.allow(&mesh.client, &mesh.server, mesh.pair(false), NonZeroU64::MIN, 1).is_err());
        assert!(!old.remove().unwrap(), "it is the successor's");
        assert!(mesh.pins.verdicts().join("control").exists());
        assert!(is_removed(&next));
        assert!(!mesh.pins.verdicts().exists());
    }
}
