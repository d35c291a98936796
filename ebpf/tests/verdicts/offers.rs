//! What is dialled leads to several pods.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

use ebpf::layout::OFFER_ENDPOINTS;
use ebpf::verdicts::{Offer, Pair, Qualified, Tally};

use crate::lab::{Mesh, PORT, WAIT, accept, capture, generation, listen, passes, service};

/// A service that both `server` and `evil` serve, which is as good as others here.
struct Served {
    mesh: Mesh,
    second: Qualified,
    v6: bool,
    /// By the servers' order.
    listeners: [TcpListener; 2],
}

impl Served {
    fn new(mesh: Mesh, v6: bool) -> Self {
        capture(&mesh.pins, mesh.lab.pod("evil"));
        let node = &mesh.lab.node("a").host.netns;
        let second = mesh.verdicts.qualify(node, &mesh.lab.pod("evil").netns).unwrap();
        mesh.open(v6);
        let listeners = ["server", "evil"].map(|pod| {
            let host = mesh.lab.pod(pod);
            listen(&host.netns, (host.ip(v6), PORT).into())
        });
        let served = Self { mesh, second, v6, listeners };
        served.allow_second();
        served
    }

    fn pairs(&self) -> [Pair; 2] {
        let first = self.mesh.pair(self.v6);
        let destination = SocketAddr::new(self.mesh.lab.pod("evil").ip(self.v6), PORT);
        [first, Pair { destination, ..first }]
    }

    fn allow_second(&self) {
        let [_, pair] = self.pairs();
        self.mesh.verdicts.allow(&self.mesh.client, &self.second, pair, generation(1), 8000).unwrap();
    }

    fn offer(&self, weights: &[u32]) {
        let pairs = self.pairs();
        let endpoints = pairs.iter().map(|pair| pair.destination).zip(weights.iter().copied()).collect();
        let offer = Offer { source: pairs[0].source, endpoints, bind: false };
        self.mesh.verdicts.offer(&self.mesh.client, service(self.v6), &offer).unwrap();
        let offers = self.mesh.verdicts.offers().unwrap();
        assert!(offers.contains(&(self.mesh.client.cookie, service(self.v6), offer)), "{offers:?}");
    }

    /// How often each server, and none, was reached by so many connections.
    fn reached(&self, connections: usize) -> [usize; 3] {
        let mut counts = [0; 3];
        for _ in 0..connections {
            let Ok(client) = self.mesh.connect(service(self.v6)) else {
                counts[2] += 1;
                continue;
            };
            assert_eq!(client.peer_addr().unwrap(), service(self.v6));
            counts[self.accepted().0] += 1;
        }
        counts
    }

    /// Which server a connection got to.
    fn accepted(&self) -> (usize, TcpStream, SocketAddr) {
        for _ in 0..1000 {
            for (number, listener) in self.listeners.iter().enumerate() {
                if let Ok((stream, peer)) = listener.accept() {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(WAIT)).unwrap();
                    return (number, stream, peer);
                }
            }
            std::thread::sleep(WAIT / 1000);
        }
        panic!("it got nowhere");
    }

    /// Opens connections until each server has one.
    fn one_each(&self) -> [(TcpStream, TcpStream); 2] {
        let mut found = [None, None];
        while found.iter().any(Option::is_none) {
            let client = self.mesh.connect(service(self.v6)).unwrap();
            let (number, server, peer) = self.accepted();
            assert_eq!(peer, client.local_addr().unwrap());
            found[number] = Some((client, server));
        }
        found.map(Option::unwrap)
    }
}

fn alive((client, server): &mut (TcpStream, TcpStream)) -> bool {
    passes(client, server) && passes(server, client)
}

#[test]
fn endpoints_are_taken_by_their_weights() {
    for v6 in [false, true] {
        let Some(mesh) = Mesh::new("endpoints are taken by their weights") else { return };
        let served = Served::new(mesh, v6);
        const MANY: usize = 400;
        for (weights, share) in [([1, 1], 0.5), ([3, 1], 0.75), ([1, 7], 0.125), ([u32::MAX - 1, 1], 1.0)] {
            served.offer(&weights);
            let [first, second, none] = served.reached(MANY);
            assert_eq!((first + second, none), (MANY, 0));
            // Farther off than six standard deviations is no chance.
            let wanted = MANY as f64 * share;
            let deviation = (MANY as f64 * share * (1.0 - share)).sqrt();
            assert!((first as f64 - wanted).abs() <= 6.0 * deviation, "{weights:?}: {first} of {MANY}");
        }
        // The second alone, and the last of as many as there may be.
        let [first, second] = served.pairs().map(|pair| pair.destination);
        let mut endpoints = vec![(first, 1); OFFER_ENDPOINTS];
        *endpoints.last_mut().unwrap() = (second, 1_000_000);
        let offer = Offer { source: served.pairs()[0].source, endpoints, bind: false };
        served.mesh.verdicts.offer(&served.mesh.client, service(v6), &offer).unwrap();
        assert!(served.reached(40)[1] >= 38);
        let too_many = Offer { endpoints: vec![(first, 1); OFFER_ENDPOINTS + 1], ..offer };
        assert!(served.mesh.verdicts.offer(&served.mesh.client, service(v6), &too_many).is_err());
    }
}

#[test]
fn an_endpoint_that_is_revoked_is_ztunnels_to_refuse_and_the_others_go_on() {
    for v6 in [false, true] {
        let Some(mesh) = Mesh::new("an endpoint that is revoked is ztunnel's to refuse") else { return };
        let served = Served::new(mesh, v6);
        let Served { mesh, .. } = &served;
        served.offer(&[1, 1]);
        let [mut kept, mut ended] = served.one_each();
        assert!(alive(&mut kept) && alive(&mut ended));
        let [_, second] = served.pairs();
        assert!(mesh.verdicts.revoke(second).unwrap());
        assert!(!alive(&mut ended) && alive(&mut kept));
        let before = mesh.tally(Tally::Declined);
        let [first, other, none] = served.reached(64);
        assert_eq!((other, first + none), (0, 64));
        assert!(first > 0 && none > 0, "there is no ztunnel here");
        assert_eq!(mesh.tally(Tally::Declined) - before, none as u64);
        let [client, server] = ["client", "evil"].map(|pod| mesh.lab.pod(pod).netns.clone());
        let over = mesh.verdicts.end(Some(&client), Some(&server), second).unwrap();
        assert_eq!((over.destroyed, over.left), (2, 0));
        assert!(alive(&mut kept));
        // What is forgotten is not taken either.
        let [_, other, none] = served.reached(32);
        assert!(other == 0 && none > 0);
        // Without it all go to the first; with it again, to both. What is open goes on all the while.
        served.offer(&[1]);
        assert_eq!(served.reached(32), [32, 0, 0]);
        served.allow_second();
        served.offer(&[1, 1]);
        let [first, second, none] = served.reached(64);
        assert!(first > 0 && second > 0 && none == 0);
        assert!(alive(&mut kept));
    }
}

/// While offers are written anew, each connection gets to one of the servers.
#[test]
fn endpoints_come_and_go_under_connections() {
    for v6 in [false, true] {
        let Some(mesh) = Mesh::new("endpoints come and go under connections") else { return };
        let served = Served::new(mesh, v6);
        served.offer(&[1, 1]);
        let [mut one, mut other] = served.one_each();
        let is_over = AtomicBool::new(false);
        let counts = std::thread::scope(|scope| {
            let changes = scope.spawn(|| {
                let mut changes = 0;
                while !is_over.load(Ordering::Relaxed) {
                    served.offer([&[1, 1][..], &[1], &[2, 5]][changes % 3]);
                    changes += 1;
                }
                changes
            });
            let mut counts = [0; 3];
            for _ in 0..20 {
                let more = served.reached(10);
                counts.iter_mut().zip(more).for_each(|(count, more)| *count += more);
                if !(alive(&mut one) && alive(&mut other)) {
                    counts[2] += 1;
                }
            }
            is_over.store(true, Ordering::Relaxed);
            assert!(changes.join().unwrap() > 10);
            counts
        });
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2] == 0, "{counts:?}");
        assert_eq!(served.mesh.tally(Tally::Declined), 0);
        assert!(accept(&served.listeners[0]).is_none(), "each was counted once");
    }
}
