//! Enrolment: listeners, redirection, and the connections that lived before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use capture::{Include, InterfaceName, PortRange, ProbeSources, Rules};
use model::Str;
use net::{AcceptLoop, DatagramOptions, ListenOptions, Netns, ProxyUdpSocket};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::redirection::{Begun, Verified};
use super::slot::{Enrolled, PodState, SETTLING_INTERVAL, VERIFY_INTERVAL};
use super::{Enrolment, Node};
use crate::dns;
use crate::proxy::pod::LocalPod;
use crate::proxy::threads::Shares;
use crate::proxy::threads::accepting::{Accepting, Acceptor};
use crate::proxy::{self, DNS_PORT, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, Proxy};

/// As many connections that wait are still taken when a listener closes.
const LAST_ACCEPTED: usize = 1024;

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnrolError {
    #[error("network namespace: {0}")]
    Netns(#[from] net::netns::OpenError),
    #[error("{0}")]
    Socket(#[from] net::SocketError),
    #[error("a listener for the threads of the data plane: {0}")]
    Listener(#[source] std::io::Error),
    #[error("redirection: {0}")]
    Capture(#[from] capture::Error),
    #[error("the network namespace is ztunnel's own: to capture its traffic would be to cut the node off")]
    Own,
    #[error("the network namespace is that of the pod {0}, which is enrolled in it")]
    Taken(Str),
    #[error("{0} is not a valid exclusion")]
    Exclusion(String),
    #[error("the task of the enrolment failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl Node {
    /// Listeners, then redirection, then the connections that lived before.
    pub(super) async fn enrol(&self, enrolment: &Enrolment) -> Result<Enrolled, EnrolError> {
        let netns = enrolment.netns.open()?;
        if netns.same(&Netns::current()?) {
            return Err(EnrolError::Own);
        }
        self.check_free(enrolment, &netns)?;
        let name = format!("{}/{}", enrolment.namespace, enrolment.name);
        let returning = self.returning(&enrolment.subject, &netns);
        let is_back = returning.is_some();
        let pod =
            returning.unwrap_or_else(|| Arc::new(LocalPod::new(enrolment.subject.clone(), netns.clone())));
        self.prepare_certificate(&pod);
        // Closes what listens already when something fails from here on.
        let mut enrolled = Enrolled {
            accepting: Vec::new(),
            pod: pod.clone(),
            served: None,
            rules: Rules::default(),
            ipv6: None,
            since: Instant::now(),
            devices: self.redirection.devices(&netns),
            verify_at: Instant::now()
                + if self.redirection.is_agents() { SETTLING_INTERVAL } else { VERIFY_INTERVAL },
            trouble: None,
            adopted: Vec::new(),
            drifts: 0,
        };
        let ready = self.rules(enrolment).and_then(|rules| {
            enrolled.rules = rules;
            self.listen(&mut enrolled.accepting, &pod, enrolment)
        });
        // Also when it isn't: the pod is closed then, and not open.
        let (redirection, rules) = (self.redirection.clone(), enrolled.rules.clone());
        let begun = tokio::task::spawn_blocking(move || redirection.begin(&netns, &name, &rules));
        let Begun { ipv6, adopted } = flatten(begun.await)?;
        ready?;
        (enrolled.ipv6, enrolled.adopted) = (ipv6, adopted);
        enrolled.served = Some(self.proxy.locals.enter(pod.clone()));
        if is_back {
            self.returned(&pod.netns);
            // Policies may have changed while it was no workload of the mesh.
            self.proxy.recheck().await;
        }
        self.started.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            pod = %format_args!("{}/{}", enrolment.namespace, enrolment.name),
            netns = %enrolment.netns,
            backend = self.redirection.name(),
            ipv6 = ?enrolled.ipv6,
            connections_alive = enrolled.adopted.len(),
            "pod enrolled"
        );
        Ok(enrolled)
    }

    /// Has the pod's certificate issued, so that its first connection need not wait for it.
    fn prepare_certificate(&self, pod: &LocalPod) {
        let (state, tls, subject) = (self.proxy.state.clone(), self.proxy.tls.clone(), pod.subject.clone());
        tokio::spawn(async move {
            // The trust domain may not be known before.
            state.completed().await;
            let workload = subject.source(&state.mesh());
            let Some(id) = workload.ok().and_then(|w| w.identity().ok()) else { return };
            if let Err(error) = tls.certificates().get(&id).await {
                tracing::warn!(%id, %error, "no certificate yet; it is tried again");
            }
        });
    }

    /// The pod's listeners, whose first thread is the same.
    fn listen(
        &self,
        tasks: &mut Vec<Accepting>,
        pod: &Arc<LocalPod>,
        enrolment: &Enrolment,
    ) -> Result<(), EnrolError> {
        if self.redirection.is_agents()
            && let Err(error) = net::move_queues(&pod.netns)
        {
            // Few connections wait there: the newer listener gets all that is new.
            tracing::debug!(netns = %pod.netns, %error, "what waits for a listener that closes will be reset");
        }
        let first = self.proxy.threads.next_first();
        tasks.push(self.accept(first, pod, OUTBOUND_PORT, proxy::outbound::handle)?);
        tasks.push(self.accept(first, pod, PLAINTEXT_PORT, proxy::plaintext::handle)?);
        tasks.push(self.accept(first, pod, HBONE_PORT, proxy::inbound::handle)?);
        if enrolment.dns_capture {
            // One thread serves a pod's queries.
            let worker = self.proxy.threads.runtime(first);
            let _context = worker.enter();
            let any = any(DNS_PORT);
            let listen = self.listen_options();
            let options = DatagramOptions {
                mark: listen.mark,
                transparent: listen.transparent,
                reuse_port: listen.reuse_port,
                ..DatagramOptions::default()
            };
            let udp = ProxyUdpSocket::bind(&pod.netns, any, &options)?;
            let tcp = net::listen(&pod.netns, any, &listen)?;
            let client = self.dns_client(enrolment);
            let (told, stopped) = tokio::sync::oneshot::channel();
            let (shutdown, hold) = (self.proxy.shutdown.clone(), self.proxy.shutdown.hold());
            let ending = async move {
                let mut draining = std::pin::pin!(shutdown.draining());
                tokio::select! { () = &mut draining => {} _ = stopped => {} }
            };
            let serving = self.dns.clone().serve_udp(udp, client.clone(), ending);
            let serving = worker.spawn(async move {
                serving.await;
                drop(hold);
            });
            tasks.push(Accepting::told(serving.abort_handle(), told));
            tasks.push(worker.spawn(self.dns.clone().serve_tcp(tcp, client)).abort_handle().into());
        }
        Ok(())
    }

    /// A successor listens beside us where the node agent redirects, which tells both of the pod. Where this process
    /// does, there is only one, and a port that is taken is taken by somebody else.
    fn listen_options(&self) -> ListenOptions {
        let reuse_port = self.redirection.is_agents();
        // Without netfilter a connection arrives with the address that was dialled, which is another's.
        ListenOptions {
            mark: Some(net::ZTUNNEL_MARK),
            transparent: true,
            reuse_port,
            ..ListenOptions::default()
        }
    }

    /// The rules that a pod is redirected by, whoever writes them.
    fn rules(&self, enrolment: &Enrolment) -> Result<Rules, EnrolError> {
        // The node agent lets the kubelet's probes through.
        let probes = self.redirection.is_agents().then(ProbeSources::default);
        Ok(Rules { probes, ..rules(enrolment)? })
    }

    /// Two pods can't share a network namespace. Where ports may be shared, the kernel would not tell.
    fn check_free(&self, enrolment: &Enrolment, netns: &Netns) -> Result<(), EnrolError> {
        if !self.redirection.is_agents() {
            return Ok(());
        }
        let pods = self.pods();
        let other = pods.values().find(|slot| {
            let here = matches!(&slot.state, PodState::Enrolled(enrolled) if enrolled.pod.netns.same(netns));
            here && slot.enrolment.key != enrolment.key
        });
        let name = |e: &Enrolment| format!("{}/{}", e.namespace, e.name).into();
        other.map_or(Ok(()), |slot| Err(EnrolError::Taken(name(&slot.enrolment))))
    }

    fn accept<F, Fut>(
        &self,
        first: usize,
        pod: &Arc<LocalPod>,
        port: u16,
        handle: F,
    ) -> Result<Accepting, EnrolError>
    where
        F: Fn(Arc<Proxy>, Arc<LocalPod>, TcpStream, SocketAddr) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let threads = &self.proxy.threads;
        let (unpaced, share) = match port {
            // The pod's own connections come from inside of it.
            OUTBOUND_PORT => (true, threads.share()),
            // Each carries what a thread of a peer has for the pod: all threads, evenly.
            HBONE_PORT => (!self.proxy.limits.pace_tunnels, 0),
            _ => (false, threads.share()),
        };
        let options = ListenOptions { unpaced, ..self.listen_options() };
        let listener =
            AcceptLoop::new(net::listen(&pod.netns, any(port), &options)?, self.proxy.accepts.clone());
        let (proxy, of) = (self.proxy.clone(), pod.clone());
        let acceptor = Acceptor {
            shares: Shares::new(threads.clone(), first, share),
            shutdown: self.proxy.shutdown.clone(),
            at_last: if pod.subject.claim.is_some() { LAST_ACCEPTED } else { 0 },
            handle: move |stream, peer| handle(proxy.clone(), of.clone(), stream, peer),
        };
        acceptor.start(listener).map_err(EnrolError::Listener)
    }

    /// The pod as the DNS proxy sees it.
    fn dns_client(&self, enrolment: &Enrolment) -> Arc<dns::Client> {
        let mesh = self.proxy.state.mesh_owned();
        let workload = enrolment.subject.known(&mesh);
        let of = |part: fn(&model::Workload) -> Str| workload.map_or_else(|| "".into(), |w| part(w));
        self.dns.client(dns::ClientSettings {
            namespace: enrolment.namespace.clone(),
            network: of(|w| w.network.clone()),
            addresses: enrolment.addresses.clone().unwrap_or_default(),
            canonical_service: of(model::Workload::shared_canonical_name),
            canonical_revision: of(|w| w.canonical_revision.clone()),
            upstreams: self.upstreams.clone(),
            upstreams_from: None,
            ask_original: false,
        })
    }

    /// Sees to it that the rules are as they should be. `installed` are those that were.
    pub(super) async fn verify(
        &self,
        enrolment: &Enrolment,
        netns: &Netns,
        installed: Rules,
        is_new: bool,
    ) -> Result<Verified, EnrolError> {
        let wanted = Rules { refused: installed.refused.clone(), ..self.rules(enrolment)? };
        let (redirection, netns) = (self.redirection.clone(), netns.clone());
        let verifying =
            tokio::task::spawn_blocking(move || redirection.verify(&netns, wanted, &installed, is_new));
        let verified = flatten(verifying.await)?;
        let pod = format_args!("{}/{}", enrolment.namespace, enrolment.name);
        match &verified {
            Verified::Standing | Verified::LookedAt(_) => {}
            Verified::Changed(..) => tracing::info!(%pod, "the pod's redirection follows its manifest"),
            Verified::Restored(drift, _) => {
                tracing::warn!(%pod, %drift, "somebody changed the pod's redirection; it is restored");
            }
        }
        Ok(verified)
    }
}

/// One error for what failed and what did not get to its end.
pub(super) fn flatten<T>(
    result: Result<Result<T, capture::Error>, tokio::task::JoinError>,
) -> Result<T, EnrolError> {
    Ok(result??)
}

/// All addresses of both families.
fn any(port: u16) -> SocketAddr {
    SocketAddr::from(([0_u16; 8], port))
}

/// The rules that a pod's enrolment asks for.
fn rules(enrolment: &Enrolment) -> Result<Rules, EnrolError> {
    let ports = |list: &[config::kinds::PortRange]| -> Result<Vec<PortRange>, EnrolError> {
        let range = |p: &config::kinds::PortRange| {
            PortRange::new(p.first, p.last)
                .ok_or_else(|| EnrolError::Exclusion(format!("{}-{}", p.first, p.last)))
        };
        list.iter().map(range).collect()
    };
    let e = &enrolment.exclusions;
    let interface =
        |name: &Str| InterfaceName::new(name).ok_or_else(|| EnrolError::Exclusion(name.to_string()));
    let interfaces = |list: &[Str]| list.iter().map(interface).collect::<Result<Vec<_>, _>>();
    Ok(Rules {
        dns: enrolment.dns_capture,
        bypass_inbound: enrolment.bypass_inbound,
        include_inbound_ports: match &e.include_inbound_ports {
            None => Include::All,
            Some(list) => Include::Only(ports(list)?),
        },
        exclude_inbound_ports: ports(&e.exclude_inbound_ports)?,
        include_outbound_ports: ports(&e.include_outbound_ports)?,
        exclude_outbound_ports: ports(&e.exclude_outbound_ports)?,
        include_outbound_ranges: e
            .include_outbound_ranges
            .as_ref()
            .map_or(Include::All, |l| Include::Only(l.to_vec())),
        exclude_outbound_ranges: e.exclude_outbound_ranges.to_vec(),
        exclude_interfaces: interfaces(&e.exclude_interfaces)?,
        virtual_interfaces: interfaces(&e.virtual_interfaces)?,
        ..Rules::default()
    })
}
