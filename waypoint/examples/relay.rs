//! The engine by itself, for measurements: `relay LISTEN UPSTREAM [h2]`, one thread, everything to one endpoint.
#![allow(clippy::print_stderr, clippy::expect_used, clippy::indexing_slicing)]

use std::net::SocketAddr;
use std::sync::Arc;

use process::runtimes::Workers;
use tokio_util::sync::CancellationToken;
use waypoint::http::decide::{
    Call, Carrier, Connection, Decide, Decided, Decision, Endpoints, Forwarding, NoEndpoint, Picked,
    Protocol, Target,
};
use waypoint::http::head::RequestHead;
use waypoint::http::io::Io;
use waypoint::http::{Settings, Worker, serve};

struct One(Arc<Target>);

impl Endpoints for One {
    fn pick(&self, _: &Call<'_>) -> Result<Picked, NoEndpoint> {
        Ok(Picked::new(Arc::clone(&self.0)))
    }
}

struct Fixed {
    how: Arc<Forwarding>,
    endpoints: Arc<dyn Endpoints>,
}

impl Decide for Fixed {
    fn decide(&self, _: &mut RequestHead, _: &Connection, _: &mut Decided) -> Decision {
        let (how, endpoints) = (Arc::clone(&self.how), Arc::clone(&self.endpoints));
        Decision::Forward { how, endpoints, more: None }
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mut address = || args.next().and_then(|a| a.parse::<SocketAddr>().ok()).expect("an address");
    let (listen, address) = (address(), address());
    let protocol = if args.next().as_deref() == Some("h2") { Protocol::Http2 } else { Protocol::Http1 };
    let target = Arc::new(Target::new(address, protocol, Carrier::Tcp));
    let decide = Arc::new(Fixed { how: Arc::default(), endpoints: Arc::new(One(target)) });
    let workers = Workers::start("1".parse().expect("a number")).expect("threads");
    let task = workers.handles()[0].spawn(async move {
        let listener = tokio::net::TcpListener::bind(listen).await.expect("an address that is free");
        let worker = Worker::new(decide, Settings::default(), CancellationToken::new());
        while let Ok((stream, client)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let destination = listen;
            let facts = Connection {
                client,
                destination,
                identity: None,
                server_name: None,
                secure: false,
                said: None,
            };
            tokio::spawn(serve(Arc::clone(&worker), Io::Tcp(stream), facts));
        }
    });
    while !task.is_finished() {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
