//! `culvert proxy-config`: what a waypoint knows and does, in tables.

pub mod target;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::table::{Output, Table, print};
use crate::ztunnel_config::{certificate_table, log, text};
use target::Target;

/// What a waypoint knows and does
#[derive(Args, Debug)]
pub struct ProxyConfigArgs {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    target: Target,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t, global = true)]
    output: Output,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Where it takes connections: tunnels, and in them those to the ports of the services that are bound to it
    #[command(visible_alias = "listeners")]
    Listener(Of),
    /// The routes of its services, in the order in which they are tried
    #[command(visible_alias = "routes")]
    Route(Of),
    /// The destinations that it has sent requests to, with what is under way
    #[command(visible_alias = "clusters")]
    Cluster(Of),
    /// The endpoints of these destinations
    #[command(visible_alias = "endpoints")]
    Endpoint(Of),
    /// Its certificate, and the roots that are trusted
    #[command(visible_alias = "secrets")]
    Secret {
        #[command(flatten)]
        who: Who,
    },
    /// Shows the log level, or changes it
    Log {
        #[command(flatten)]
        who: Who,
        /// A level, or directives such as `info,access=debug`
        #[arg(long)]
        level: Option<String>,
    },
}

#[derive(Args, Debug)]
struct Who {
    /// The waypoint, in a cluster: its Gateway, or one of its pods; the namespace is the context's where it is left out
    #[arg(value_name = "[NAMESPACE/]NAME")]
    waypoint: Option<String>,
}

#[derive(Args, Debug)]
struct Of {
    #[command(flatten)]
    who: Who,
    /// Only this service: NAMESPACE/NAME, or its host name
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    /// Only this port of services
    #[arg(long)]
    port: Option<u16>,
}

impl Of {
    /// Whether a service, as dumps name it (`namespace/hostname`), and a port of it are meant.
    fn is_meant(&self, service: &str, port: Option<u64>) -> bool {
        let named = |wanted: &String| {
            let (namespace, host) = service.split_once('/').unwrap_or(("", service));
            match wanted.split_once('/') {
                Some((n, name)) => n == namespace && (host == name || host.split('.').next() == Some(name)),
                None => host == wanted,
            }
        };
        self.service.as_ref().is_none_or(named)
            && self.port.is_none_or(|wanted| port.is_none_or(|port| port == u64::from(wanted)))
    }
}

/// Runs the command.
pub fn run(args: &ProxyConfigArgs) -> Result<ExitCode> {
    let page = |of: &Of, path: &str| args.target.any(of.who.waypoint.as_deref())?.json(path);
    let text = match &args.what {
        What::Listener(of) => shown(args, listeners(&page(of, "/config_dump")?, of)?, LISTENER, "listeners")?,
        What::Route(of) => shown(args, routes(&page(of, "/config_dump")?, of)?, ROUTE, "routes")?,
        What::Cluster(of) => shown(args, clusters(&page(of, "/clusters")?, of)?, CLUSTER, "destinations")?,
        What::Endpoint(of) => shown(args, endpoints(&page(of, "/clusters")?, of)?, ENDPOINT, "endpoints")?,
        What::Secret { who } => secret(args, who)?,
        What::Log { who, level } => log(&args.target.addresses(who.waypoint.as_deref())?, level.as_deref())?,
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

const LISTENER: &[&str] =
    &["SERVICE", "ADDRESSES", "PORT", "PROTOCOL", "ROUTES", "POLICIES", "TOKENS", "LIMITS"];
const ROUTE: &[&str] = &["SERVICE", "PORT", "ROUTE", "MATCH", "DOES", "WITH"];
const CLUSTER: &[&str] =
    &["SERVICE", "PORT", "SUBSET", "HEALTHY", "ELIGIBLE", "CONNECTIONS", "PENDING", "REQUESTS", "REFUSED"];
const ENDPOINT: &[&str] =
    &["SERVICE", "PORT", "SUBSET", "ADDRESS", "WORKLOAD", "HOP", "READY", "EJECTED", "WEIGHT", "REQUESTS"];

/// A row of a table, and what it was made of.
struct Row {
    cells: Vec<String>,
    of: Value,
}

fn shown(args: &ProxyConfigArgs, rows: Vec<Row>, heading: &[&str], what: &str) -> Result<String> {
    let all: Vec<&Value> = rows.iter().map(|row| &row.of).collect();
    if let Some(document) = args.output.document(&all)? {
        return Ok(document);
    }
    let mut table = Table::new(heading);
    rows.into_iter().for_each(|row| table.row(row.cells));
    Ok(if table.is_empty() { format!("no {what}\n") } else { table.to_string() })
}

fn list<'v>(value: &'v Value, key: &str) -> impl Iterator<Item = &'v Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

/// A number of things, nothing where there are none.
fn count(number: usize) -> String {
    if number == 0 { String::new() } else { number.to_string() }
}

fn number(value: &Value, key: &str) -> Option<u64> {
    value.get(key).and_then(Value::as_u64)
}

/// Each port of each service that is meant.
fn ports<'v>(dump: &'v Value, of: &'v Of) -> Result<impl Iterator<Item = (&'v Value, String, &'v Value)>> {
    let services = dump.get("services").and_then(Value::as_array);
    let services = services.context("the dump has no services: is it a waypoint's admin address?")?;
    let ports = services.iter().flat_map(|service| {
        let name = text(service, "service");
        list(service, "ports").map(move |port| (service, name.clone(), port))
    });
    Ok(ports.filter(|(_, name, port)| of.is_meant(name, number(port, "port"))))
}

fn listeners(dump: &Value, of: &Of) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    if of.service.is_none() && of.port.is_none() {
        let listen = text(dump, "listen");
        let (address, port) = listen.rsplit_once(':').unwrap_or((&listen, ""));
        let cells = ["(tunnels)", address, port, "HBONE", "", "", "", ""];
        let of = json!({ "listen": listen, "protocol": "HBONE", "gateway": text(dump, "gateway") });
        rows.push(Row { cells: cells.map(str::to_owned).into(), of });
    }
    for (service, name, port) in ports(dump, of)? {
        let routes = list(port, "routes").count() + list(port, "streams").count();
        let policies = list(service, "policies").count() + list(service, "selectedPolicies").count();
        let cells = vec![
            name.clone(),
            text(service, "addresses"),
            text(port, "port"),
            text(port, "protocol"),
            count(routes),
            count(policies),
            count(list(service, "authentication").count()),
            count(list(service, "rateLimits").count()),
        ];
        let mut all = service.clone();
        if let Some(map) = all.as_object_mut() {
            map.remove("ports");
            map.insert("port".to_owned(), port.get("port").cloned().unwrap_or_default());
            map.insert("protocol".to_owned(), port.get("protocol").cloned().unwrap_or_default());
            map.insert("routes".to_owned(), routes.into());
        }
        rows.push(Row { cells, of: all });
    }
    Ok(rows)
}

fn routes(dump: &Value, of: &Of) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (_, name, port) in ports(dump, of)? {
        let number = text(port, "port");
        let before = rows.len();
        for route in list(port, "routes").chain(list(port, "streams")) {
            let cells = [
                name.clone(),
                number.clone(),
                text(route, "route"),
                text(route, "match"),
                does(route),
                with(route),
            ];
            let mut of = route.clone();
            if let Some(map) = of.as_object_mut() {
                map.insert("service".to_owned(), name.as_str().into());
                map.insert("port".to_owned(), port.get("port").cloned().unwrap_or_default());
            }
            rows.push(Row { cells: cells.into(), of });
        }
        if rows.len() == before {
            let to = format!("{name}:{number}");
            let of = json!({ "service": name, "port": port.get("port"), "route": "default", "match": "everything",
                             "backends": [{ "to": to, "weight": 1 }] });
            let cells = [name, number, "default".to_owned(), "everything".to_owned(), to, String::new()];
            rows.push(Row { cells: cells.into(), of });
        }
    }
    Ok(rows)
}

/// Where a route leads.
fn does(route: &Value) -> String {
    if let Some(redirect) = route.get("redirect") {
        let to = ["scheme", "host", "port", "path"].map(|key| text(redirect, key));
        let to: Vec<_> = to.into_iter().filter(|part| !part.is_empty()).collect();
        return format!("redirects {} {}", text(redirect, "status"), to.join(" "));
    }
    if let Some(answer) = route.get("respond") {
        return format!("answers {}", text(answer, "status"));
    }
    let backends: Vec<_> = list(route, "backends").collect();
    let weights = backends.len() > 1;
    let one = |backend: &&Value| {
        let share = if weights { format!(" ({})", text(backend, "weight")) } else { String::new() };
        format!("{}{share}", text(backend, "to"))
    };
    if backends.is_empty() {
        "nothing: 500".to_owned()
    } else {
        backends.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

/// What else it does.
fn with(route: &Value) -> String {
    let mut parts = Vec::new();
    for (key, name) in
        [("timeout", "timeout"), ("perTryTimeout", "a try"), ("path", "path:"), ("host", "host:")]
    {
        let value = text(route, key);
        parts.extend((!value.is_empty()).then(|| format!("{name} {value}")));
    }
    if let Some(retries) = route.get("retries") {
        parts.push(format!("retries {} ({})", text(retries, "attempts"), text(retries, "on")));
    }
    if let Some(delay) = route.get("delay") {
        parts.push(format!("delay {} for {}%", text(delay, "time"), text(delay, "percent")));
    }
    if let Some(abort) = route.get("abort") {
        let status = [text(abort, "status"), text(abort, "grpcStatus")].concat();
        parts.push(format!("abort {status} for {}%", text(abort, "percent")));
    }
    for mirror in list(route, "mirrors") {
        parts.push(format!("copies {}% to {}", text(mirror, "percent"), text(mirror, "to")));
    }
    if let Some(edits) = number(route, "headerEdits") {
        parts.push(format!("{edits} header edits"));
    }
    if route.get("cors").is_some() {
        parts.push("CORS".to_owned());
    }
    parts.join("; ")
}

/// The destinations of a waypoint that are meant.
fn destinations<'v>(all: &'v Value, of: &'v Of) -> Result<impl Iterator<Item = &'v Value>> {
    let all = all.as_array().context("the page /clusters is no list: is it a waypoint's admin address?")?;
    Ok(all.iter().filter(|cluster| of.is_meant(&text(cluster, "service"), number(cluster, "port"))))
}

fn clusters(all: &Value, of: &Of) -> Result<Vec<Row>> {
    let row = |cluster: &Value| {
        let refused = cluster.get("refused").and_then(Value::as_object);
        let refused: u64 = refused.into_iter().flat_map(|map| map.values()).filter_map(Value::as_u64).sum();
        let mut cells: Vec<String> = [
            "service",
            "port",
            "subset",
            "endpointsHealthy",
            "endpointsEligible",
            "connections",
            "pending",
            "requests",
        ]
        .map(|key| text(cluster, key))
        .into();
        cells.push(refused.to_string());
        let mut of = cluster.clone();
        if let Some(map) = of.as_object_mut() {
            map.remove("endpoints");
        }
        Row { cells, of }
    };
    Ok(destinations(all, of)?.map(row).collect())
}

fn endpoints(all: &Value, of: &Of) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cluster in destinations(all, of)? {
        for endpoint in list(cluster, "endpoints") {
            let mut cells: Vec<String> = ["service", "port", "subset"].map(|key| text(cluster, key)).into();
            let tunnelled = endpoint.get("tunnelled").and_then(Value::as_bool).unwrap_or_default();
            cells.extend(["address", "workload"].map(|key| text(endpoint, key)));
            cells.push(format!(
                "{} over {}",
                text(endpoint, "protocol"),
                if tunnelled { "HBONE" } else { "TCP" }
            ));
            cells.extend(["ready", "ejected", "weight", "requests"].map(|key| text(endpoint, key)));
            let mut of = endpoint.clone();
            if let Some(map) = of.as_object_mut() {
                for key in ["service", "port", "subset"] {
                    map.insert(key.to_owned(), cluster.get(key).cloned().unwrap_or_default());
                }
            }
            rows.push(Row { cells, of });
        }
    }
    Ok(rows)
}

fn secret(args: &ProxyConfigArgs, who: &Who) -> Result<String> {
    let mut shown = String::new();
    let mut documents = Vec::new();
    let addresses = args.target.addresses(who.waypoint.as_deref())?;
    for address in &addresses {
        let dump = address.json("/config_dump")?;
        let all = dump.get("certificates").context("the dump has no certificates")?;
        if addresses.len() > 1 {
            shown.push_str(&format!("{address}:\n"));
        }
        shown.push_str(&certificate_table(all));
        documents.push(all.clone());
    }
    // One pod's is the document itself.
    let document = if documents.len() == 1 { documents.remove(0) } else { documents.into() };
    Ok(args.output.document(&document)?.unwrap_or(shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(service: Option<&str>, port: Option<u16>) -> Of {
        Of { who: Who { waypoint: None }, service: service.map(str::to_owned), port }
    }

    #[test]
    fn services_are_named_as_everywhere() {
        let name = "shop/cart.shop.svc.cluster.local";
        for wanted in ["shop/cart", "shop/cart.shop.svc.cluster.local", "cart.shop.svc.cluster.local"] {
            assert!(of(Some(wanted), None).is_meant(name, Some(80)), "{wanted}");
        }
        for wanted in ["cart", "web/cart", "shop/car", "shop"] {
            assert!(!of(Some(wanted), None).is_meant(name, Some(80)), "{wanted}");
        }
        assert!(of(None, Some(80)).is_meant(name, Some(80)) && !of(None, Some(81)).is_meant(name, Some(80)));
    }

    #[test]
    fn routes_are_shown_with_what_they_do() {
        let dump = json!({ "services": [{
            "service": "shop/cart.shop.svc.cluster.local",
            "ports": [
                { "port": 80, "routes": [
                    { "route": "HTTPRoute shop/r rule 0", "match": "path /a*", "timeout": "1s",
                      "backends": [{ "to": "shop/x:80", "weight": 9 }, { "to": "shop/y:80", "weight": 1 }],
                      "retries": { "attempts": 2, "on": ["5xx", "reset"] } },
                    { "route": "HTTPRoute shop/r rule 1", "match": "path /b*",
                      "redirect": { "status": 301, "host": "b.example" } },
                ] },
                { "port": 81 },
            ],
        }] });
        let all = of(None, None);
        let rows: Vec<Vec<String>> = routes(&dump, &all).unwrap().into_iter().map(|row| row.cells).collect();
        let does: Vec<&str> = rows.iter().map(|row| &*row[4]).collect();
        assert_eq!(
            does,
            [
                "shop/x:80 (9), shop/y:80 (1)",
                "redirects 301 b.example",
                "shop/cart.shop.svc.cluster.local:81"
            ]
        );
        assert_eq!(rows[0][5], "timeout 1s; retries 2 (5xx,reset)");
        assert!(listeners(&json!({}), &all).is_err(), "another proxy's dump");
    }
}
