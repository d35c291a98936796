//! Many pairs that end at once.

use std::io::{self, Read};

use ebpf::verdicts::{Ended, Ending, Offer, Pair};

use crate::lab::{LEASE, Mesh, accept, dial, generation, listen, passes};

const PAIRS: u16 = 300;
/// As many of them stay, evenly among the others.
const STAY: u16 = 30;

/// Of each pod the kernel is asked twice for all of them: it walks the sockets of the whole machine for that.
#[test]
fn many_pairs_end_by_a_few_looks() {
    let Some(mesh) = Mesh::new("many pairs end by a few looks") else { return };
    let [client, server] = ["client", "server"].map(|name| mesh.lab.pod(name));
    let pair = |number: u16| {
        let v6 = !number.is_multiple_of(2);
        Pair { source: client.ip(v6), destination: (server.ip(v6), 9000 + number).into() }
    };
    assert!(mesh.verdicts.renew(LEASE).unwrap());
    let mut connections = Vec::new();
    for pair in (0..PAIRS).map(pair) {
        mesh.verdicts.allow(&mesh.client, &mesh.server, pair, generation(1), 1).unwrap();
        let offer = Offer { source: pair.source, endpoints: vec![(pair.destination, 1)], bind: false };
        mesh.verdicts.offer(&mesh.client, pair.destination, &offer).unwrap();
        let listener = listen(&server.netns, pair.destination);
        let client = dial(&client.netns, pair.destination).unwrap();
        let (server, _) = accept(&listener).unwrap();
        connections.push((client, server));
    }
    let stays = |number: &u16| number.is_multiple_of(PAIRS / STAY);
    let over: Vec<Ending<'_>> = (0..PAIRS)
        .filter(|number| !stays(number))
        .map(|number| Ending {
            pair: pair(number),
            source: Some(&client.netns),
            destination: Some(&server.netns),
        })
        .collect();
    let mut between = 0;
    let ended = mesh.verdicts.end_all(&over, &mut || between += 1);
    assert_eq!((ended.looks, between), (4, 4), "two at each pod: one that ends, one that finds nothing");
    assert_eq!(ended.pairs.len(), over.len());
    for outcome in ended.pairs {
        assert_eq!(outcome.unwrap(), Ended { destroyed: 2, left: 0 });
    }
    for (number, (client, server)) in (0..PAIRS).zip(&mut connections) {
        if stays(&number) {
            assert!(passes(client, server) && passes(server, client), "{number}");
        } else {
            for end in [client, server] {
                let error = end.read(&mut [0]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{number}");
            }
        }
    }
    let known: Vec<_> = mesh.verdicts.pairs().unwrap().into_iter().map(|(pair, _)| pair).collect();
    assert_eq!(known.len(), usize::from(STAY));
    assert!((0..PAIRS).filter(stays).all(|number| known.contains(&pair(number))));

    // Where one of the ends is gone, the other is looked at alone; one that was never written is over at once.
    let there = Ending { pair: pair(0), source: None, destination: Some(&server.netns) };
    let never = Ending { pair: pair(PAIRS), source: Some(&client.netns), destination: None };
    let ended = mesh.verdicts.end_all(&[there, never], &mut || ());
    let outcomes: Vec<_> = ended.pairs.into_iter().map(|outcome| outcome.unwrap()).collect();
    assert_eq!(outcomes, [Ended { destroyed: 1, left: 0 }, Ended { destroyed: 0, left: 0 }]);
    assert_eq!(ended.looks, 3);
}
