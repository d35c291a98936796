//! `culvert what-if`: what would be decided over a connection, or over a request where a waypoint decides, by the files or
//! the cluster's objects alone, as they are or with a change.
//! The decision is `model`'s, as in ztunnel and in waypoints.

mod request;

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use config::diagnostic::Severity;
use model::{
    Allow, Connection, Decision, Destination, DryRun, GatewayAddress, GatewayTarget, Mesh, NetworkAddress,
    OriginalDst, OutboundMode, Service, ServiceKey, SpiffeId, TunnelProtocol, Workload,
};
use serde::Serialize;

use crate::connections::is_generated_for;
use crate::files::{Compiled, Files, Sources};
use crate::table::{Output, print, printable};
use request::RequestArgs;

/// More endpoints than this are counted, not listed.
const LISTED: usize = 20;

/// What would be decided over a connection, or a request where a waypoint decides, by the manifests or the cluster as they
/// are, or with a changed file; the exit code is 1 where it would be refused
// `--token` is the request's here.
#[derive(Args, Debug)]
#[command(mut_arg("api_token", |token| token.long("api-token")))]
pub struct WhatIfArgs {
    #[command(flatten)]
    sources: Sources,
    /// Who connects: namespace/name of a pod, or of what it is a pod of; an address, or a SPIFFE ID
    #[arg(long, value_name = "WHO")]
    source: String,
    /// To what: namespace/name of a service, a pod, or of what it is a pod of; a host name, or an address
    #[arg(long, value_name = "WHERE")]
    destination: String,
    /// The port that is dialled: a service's for a service, the workload's own for a workload
    #[arg(long)]
    port: u16,
    #[command(flatten)]
    request: RequestArgs,
    /// Decide also with this file, which replaces the file of its name and the objects of its objects' names
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Who connects, as one mesh knows it.
struct Source {
    shown: String,
    identity: Option<SpiffeId>,
    ip: IpAddr,
    in_mesh: bool,
}

/// What is decided for one endpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
struct Verdict {
    workload: String,
    address: String,
    carried: &'static str,
    allowed: bool,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    /// Of a waypoint the route that takes it, of what it leads to the back end.
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dry_run: Vec<String>,
}

/// What is decided by one state of the files.
#[derive(Clone, Debug, Serialize)]
struct Answer {
    files: String,
    source: String,
    destination: String,
    allowed: bool,
    endpoints: Vec<Verdict>,
}

/// Runs the command.
pub fn run(args: &WhatIfArgs) -> Result<ExitCode> {
    let files = args.sources.read()?;
    let compiled = files.compile()?;
    warn(&compiled)?;
    let mut answers = vec![answer(args, &compiled, "as it is".to_owned())?];
    if !args.with.is_empty() {
        let changed = files.compile_with(&Files::read(&args.with)?)?;
        let names: Vec<_> = args.with.iter().map(|p| p.display().to_string()).collect();
        answers.push(answer(args, &changed, format!("with {}", names.join(", ")))?);
    }
    match args.output.document(&answers)? {
        Some(document) => print(&document)?,
        None => print(&printable(&text(&answers)?))?,
    }
    let allowed = answers.last().is_some_and(|a| a.allowed);
    Ok(if allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A decision by files of which a part is not in force is said to be one, and what of a cluster it is not by.
fn warn(compiled: &Compiled) -> Result<()> {
    let note = compiled.left_out.note();
    if !note.is_empty() {
        use std::io::Write;
        writeln!(std::io::stderr(), "note: {}", printable(&note))?;
    }
    let errors = compiled.diagnostics.iter().filter(|d| d.severity == Severity::Error).count();
    if errors > 0 {
        use std::io::Write;
        writeln!(
            std::io::stderr(),
            "note: {errors} errors in the files, and what they are in is not in force: culvert analyze lists them"
        )?;
    }
    Ok(())
}

fn answer(args: &WhatIfArgs, compiled: &Compiled, files: String) -> Result<Answer> {
    let mesh = &compiled.mesh;
    let source = source(mesh, &args.source)?;
    let (destination, endpoints) = destination(mesh, &args.destination, args.port)?;
    let mut hop = None;
    let mut verdicts: Vec<Verdict> = match endpoints {
        // Only those in the mesh are led to a waypoint: others dial what is behind it.
        Endpoints::Known { waypoint: Some(gateway), service, .. } if source.in_mesh => {
            match service.and_then(|key| mesh.service(&key).zip(mesh.http_service(&key))) {
                Some((service, http)) => {
                    let passed = request::pass(&args.request, compiled, &source, service, args.port, http)?;
                    hop = Some(passed.hop);
                    passed.next
                }
                None => vec![through(mesh, &gateway, &destination)?],
            }
        }
        Endpoints::Known { list, .. } => {
            list.iter().map(|(w, port)| decide(compiled, &source, w, *port)).collect()
        }
        Endpoints::Unknown(at) => vec![outside(mesh, at)],
    };
    verdicts.sort_by(|a, b| (&a.workload, &a.route).cmp(&(&b.workload, &b.route)));
    verdicts.splice(0..0, hop);
    if verdicts.is_empty() {
        bail!("{destination} has no endpoint: nothing would be decided, the connection would fail");
    }
    let allowed = verdicts.iter().all(|v| v.allowed);
    Ok(Answer { files, source: source.shown, destination, allowed, endpoints: verdicts })
}

fn source(mesh: &Mesh, who: &str) -> Result<Source> {
    if let Ok(identity) = who.parse::<SpiffeId>() {
        let of = |w: &&Arc<Workload>| w.identity().is_ok_and(|i| i == identity) && !w.addresses.is_empty();
        let workload = mesh.workloads().filter(of).min_by(|a, b| a.uid.cmp(&b.uid));
        let ip = workload.and_then(|w| w.addresses.first().copied());
        let at = ip.map_or("no workload has it: no address is known".to_owned(), |ip| ip.to_string());
        let shown = format!("{identity} ({at})");
        let ip = ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        return Ok(Source { shown, identity: Some(identity), ip, in_mesh: true });
    }
    if let Ok(ip) = who.parse::<IpAddr>() {
        return Ok(match mesh.workload_at(&NetworkAddress::new("".into(), ip)) {
            Some(workload) => of_workload(workload, ip),
            None => Source { shown: format!("{ip}, no workload"), identity: None, ip, in_mesh: false },
        });
    }
    let named = workloads_named(mesh, who);
    // One of them stands for all where they have the same account; in a rollout they may not.
    let other = |first: &&Arc<Workload>| named.iter().find(|w| w.identity().ok() != first.identity().ok());
    if let Some((first, other)) = named.first().and_then(|first| Some((first, other(first)?))) {
        bail!(
            "the pods of {who} do not all have the same service account: name one of them, {0}/{1} or {0}/{2} for example",
            first.namespace,
            first.name(),
            other.name()
        );
    }
    let workload = named.iter().find(|w| !w.addresses.is_empty()).or(named.first()).with_context(|| {
        format!(
            "there is no workload {who}: name a pod, or what it is a pod of, as namespace/name, or give an address or a SPIFFE \
             ID"
        )
    })?;
    let ip = workload.addresses.first().copied();
    Ok(of_workload(workload, ip.with_context(|| format!("{who} has no address"))?))
}

fn of_workload(workload: &Workload, ip: IpAddr) -> Source {
    let in_mesh = workload.tunnel == TunnelProtocol::Hbone;
    let identity = workload.identity().ok().filter(|_| in_mesh);
    let who = identity.as_ref().map_or("not in the mesh: no identity".to_owned(), ToString::to_string);
    Source { shown: format!("{}/{} {ip}, {who}", workload.namespace, workload.name()), identity, ip, in_mesh }
}

/// The workload of this name, or those of this Deployment, StatefulSet, Job, …
fn workloads_named<'m>(mesh: &'m Mesh, who: &str) -> Vec<&'m Arc<Workload>> {
    let Some((namespace, name)) = who.split_once('/') else { return Vec::new() };
    let all = |named: &dyn Fn(&Workload) -> bool| {
        let there = mesh.workloads().filter(|w| *w.namespace == *namespace && named(w));
        let mut found: Vec<_> = there.collect();
        found.sort_by(|a, b| a.uid.cmp(&b.uid));
        found
    };
    let mut found = all(&|w| *w.name() == *name);
    found.truncate(1);
    if found.is_empty() {
        found = all(&|w| *w.workload_name() == *name);
    }
    if found.is_empty() {
        // StatefulSets and DaemonSets have no name in a mesh's configuration.
        found = all(&|w| is_generated_for(w.name(), name));
    }
    found
}

enum Endpoints {
    Known {
        list: Vec<(Arc<Workload>, u16)>,
        /// What connections to it pass first.
        waypoint: Option<GatewayAddress>,
        /// The service, if it is one.
        service: Option<ServiceKey>,
    },
    Unknown(SocketAddr),
}

fn destination(mesh: &Mesh, wanted: &str, port: u16) -> Result<(String, Endpoints)> {
    if let Ok(ip) = wanted.parse::<IpAddr>() {
        let at = SocketAddr::new(ip, port);
        return match mesh.destination(&"".into(), OriginalDst::new(at)) {
            Destination::Service(service) => of_service(mesh, &service, port),
            Destination::Workload(workload) => Ok(of_pod(&workload, port)),
            Destination::Unknown => Ok((at.to_string(), Endpoints::Unknown(at))),
        };
    }
    let named = |s: &&Arc<Service>| match wanted.split_once('/') {
        Some((namespace, name)) => *s.namespace == *namespace && *s.name == *name,
        None => *s.hostname == *wanted,
    };
    let service = mesh.services().filter(named).min_by(|a, b| a.key().cmp(&b.key()));
    let workloads = workloads_named(mesh, wanted);
    match (service, workloads.as_slice()) {
        // Where a pod has the name, too, the port tells which is meant; a service and its Deployment mostly share theirs.
        (Some(service), []) => of_service(mesh, service, port),
        (Some(service), found) if service.port(port).is_some() || !is_pod(found, wanted) => {
            of_service(mesh, service, port)
        }
        (_, [workload]) => Ok(of_pod(workload, port)),
        (_, [first, ..]) => {
            ensure!(
                workloads.iter().all(|w| w.waypoint == first.waypoint),
                "the pods of {wanted} do not all have the same waypoint: name one of them, {}/{} for example",
                first.namespace,
                first.name()
            );
            Ok((
                format!("workload {}/{}:{port}", first.namespace, first.workload_name()),
                Endpoints::Known {
                    list: workloads.iter().map(|w| (Arc::clone(w), port)).collect(),
                    waypoint: first.waypoint.as_deref().cloned(),
                    service: None,
                },
            ))
        }
        (None, []) => bail!(
            "there is no service or workload {wanted}: name it as namespace/name, or give a host name or an address"
        ),
    }
}

/// Whether what was found is the pod of this name itself.
fn is_pod(found: &[&Arc<Workload>], wanted: &str) -> bool {
    let name = wanted.split_once('/').map(|(_, name)| name);
    matches!(found, [one] if Some(one.name()) == name)
}

fn of_service(mesh: &Mesh, service: &Service, port: u16) -> Result<(String, Endpoints)> {
    if service.port(port).is_none() {
        let ports: Vec<_> = service.ports.iter().map(|p| p.port.to_string()).collect();
        bail!("service {} has no port {port}: it has {}", service.key(), ports.join(", "));
    }
    let set = mesh.endpoints(&service.key()).cloned().unwrap_or_default();
    let known = set.as_slice().iter().filter_map(|e| Some((e.workload.clone(), set.target_port(e, port)?)));
    let known = Endpoints::Known {
        list: known.collect(),
        waypoint: service.waypoint.clone(),
        service: Some(service.key()),
    };
    Ok((format!("service {}:{port}", service.hostname), known))
}

fn of_pod(workload: &Arc<Workload>, port: u16) -> (String, Endpoints) {
    let shown = format!("workload {}/{}:{port}", workload.namespace, workload.name());
    (
        shown,
        Endpoints::Known {
            list: vec![(workload.clone(), port)],
            waypoint: workload.waypoint.as_deref().cloned(),
            service: None,
        },
    )
}

/// What becomes of a connection that has to pass a waypoint, as in ztunnel: it goes nowhere where there is none.
fn through(mesh: &Mesh, waypoint: &GatewayAddress, destination: &str) -> Result<Verdict> {
    let (name, found) = match &waypoint.target {
        GatewayTarget::Service(key) => (key.to_string(), mesh.service(key).is_some()),
        GatewayTarget::Address(at) => {
            (at.ip.to_string(), mesh.service_at(at).is_some() || mesh.workload_at(at).is_some())
        }
    };
    if found {
        bail!(
            "connections to {destination} pass the waypoint {name}, which decides: the files don't say what"
        );
    }
    Ok(Verdict {
        workload: "(none)".to_owned(),
        address: destination.to_owned(),
        carried: "nothing",
        allowed: false,
        reason: format!(
            "a policy is for it that not all of its endpoints enforce, and its waypoint {name} is not ready"
        ),
        ..Verdict::default()
    })
}

fn decide(compiled: &Compiled, source: &Source, workload: &Workload, port: u16) -> Verdict {
    let same_family = workload.addresses.iter().find(|a| a.is_ipv4() == source.ip.is_ipv4());
    let ip = same_family.or(workload.addresses.first()).copied();
    let name = format!("{}/{}", workload.namespace, workload.name());
    let address =
        ip.map_or_else(|| workload.hostname.to_string(), |ip| SocketAddr::new(ip, port).to_string());
    // A tunnel ends at ztunnel whatever the pod leaves alone.
    let capture = compiled.captures.get(&workload.uid).filter(|_| !source.in_mesh);
    let left_alone = capture.and_then(|capture| capture.leaves_alone(Some(port)));
    let undecided = if workload.tunnel == TunnelProtocol::Hbone {
        left_alone.map(|annotation| format!("not captured ({annotation}): nothing is decided there"))
    } else {
        Some("not in the mesh: nothing is decided there".to_owned())
    };
    if let Some(reason) = undecided {
        let (carried, allowed) = ("plaintext", true);
        return Verdict { workload: name, address, carried, allowed, reason, ..Verdict::default() };
    }
    let destination = SocketAddr::new(ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port);
    let connection = Connection::new(source.identity.clone(), source.ip, destination);
    let decision = compiled.mesh.authorize(workload, &connection);
    let carried = if source.in_mesh { "hbone" } else { "plaintext" };
    explained(name, address, carried, &decision)
}

fn explained(workload: String, address: String, carried: &'static str, decision: &Decision) -> Verdict {
    let (allowed, reason, policy) = match &decision.outcome {
        Ok(permit) => {
            let policy = match permit.reason() {
                Allow::Matched(rule) => Some(rule.policy.to_string()),
                Allow::NoAllowPolicies => None,
            };
            (true, permit.reason().to_string(), policy)
        }
        Err(deny) => (false, deny.to_string(), deny.policy().map(ToString::to_string)),
    };
    let dry_run = trials(&decision.dry_run);
    Verdict { workload, address, carried, allowed, reason, policy, dry_run, route: None }
}

/// What dry-run policies would change, in words.
fn trials(dry_run: &[DryRun]) -> Vec<String> {
    let one = |d: &DryRun| match &d.would {
        Ok(allow) => format!("if {} were enforced: {allow}", d.policy),
        Err(deny) => format!("if {} were enforced: {deny}", d.policy),
    };
    dry_run.iter().map(one).collect()
}

/// An address of which nothing is known.
fn outside(mesh: &Mesh, at: SocketAddr) -> Verdict {
    let (allowed, reason) = match mesh.settings().outbound {
        OutboundMode::AllowAny => (true, "not known to the mesh: passed through (ALLOW_ANY)"),
        OutboundMode::RegistryOnly => (false, "not known to the mesh: REGISTRY_ONLY"),
    };
    Verdict {
        workload: "(unknown)".to_owned(),
        address: at.to_string(),
        carried: "plaintext",
        allowed,
        reason: reason.to_owned(),
        ..Verdict::default()
    }
}

fn text(answers: &[Answer]) -> Result<String> {
    let mut text = String::new();
    for answer in answers {
        writeln!(text, "{}:", answer.files)?;
        writeln!(text, "  from  {}", answer.source)?;
        writeln!(text, "  to    {}", answer.destination)?;
        for v in answer.endpoints.iter().take(LISTED) {
            let word = if v.allowed { "allowed" } else { "refused" };
            writeln!(text, "  {word} at {} {} over {}", v.workload, v.address, v.carried)?;
            writeln!(text, "        {}", v.reason)?;
            if let Some(route) = &v.route {
                writeln!(text, "        route: {route}")?;
            }
            for line in &v.dry_run {
                writeln!(text, "        dry run: {line}")?;
            }
        }
        if answer.endpoints.len() > LISTED {
            let refused = answer.endpoints.iter().filter(|v| !v.allowed).count();
            writeln!(text, "  … {} endpoints in all, {refused} of them refuse", answer.endpoints.len())?;
        }
    }
    if let [before, after] = answers {
        let same = before.endpoints == after.endpoints;
        writeln!(text, "{}", if same { "no difference" } else { "the decision, or its reason, changes" })?;
    }
    Ok(text)
}
