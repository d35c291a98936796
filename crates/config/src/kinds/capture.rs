//! What a pod's annotations say of the capture of its traffic. A value that cannot be read refuses the pod: it
//! is neither captured with less than it asks for nor left out with more.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use model::Str;

use crate::diagnostic::Severity;
use crate::fields::{Context, Fields};
use crate::labels::Pool;
use crate::metadata::{Annotation, Metadata};
use crate::resource::{self, Reading, Resource};
use crate::tree::{self, Limits};

/// How a pod's traffic is captured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Capture {
    /// The pod's network namespace (`culvert.dev/netns`), where no node agent tells it.
    pub netns: Option<PathBuf>,
    /// What is left out.
    pub exclusions: Exclusions,
    /// Whether its DNS requests are answered by the mesh (`ambient.istio.io/dns-capture`).
    pub dns_capture: bool,
    /// Whether connections to it are left alone (`ambient.istio.io/bypass-inbound-capture`).
    pub bypass_inbound: bool,
}

impl Capture {
    /// The annotation by which connections to `port` are left alone, or with `None` those to any port.
    #[must_use]
    pub fn leaves_alone(&self, port: Option<u16>) -> Option<&'static str> {
        let within = |list: &[PortRange]| {
            list.iter().any(|range| port.is_none_or(|port| (range.first..=range.last).contains(&port)))
        };
        if self.bypass_inbound {
            return Some("ambient.istio.io/bypass-inbound-capture");
        }
        if within(&self.exclusions.exclude_inbound_ports) {
            return Some("traffic.sidecar.istio.io/excludeInboundPorts");
        }
        let included = self.exclusions.include_inbound_ports.as_deref()?;
        let all = included.contains(&PortRange { first: 1, last: u16::MAX });
        let left = if port.is_some() { !within(included) } else { !all };
        left.then_some("traffic.sidecar.istio.io/includeInboundPorts")
    }
}

impl Default for Capture {
    fn default() -> Self {
        Self { netns: None, exclusions: Exclusions::default(), dns_capture: true, bypass_inbound: false }
    }
}

impl Capture {
    /// Of a pod's annotations, where nothing else of the pod is at hand. Others than those on capture are passed over.
    ///
    /// # Errors
    /// Which annotation can't be read, and why.
    pub fn of_annotations(annotations: &BTreeMap<String, String>) -> Result<Self, String> {
        if annotations.is_empty() {
            return Ok(Self::default());
        }
        let object = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "pod", "namespace": "default", "annotations": annotations },
        });
        let (text, file): (String, Arc<str>) = (object.to_string(), "annotations".into());
        let document = tree::Text { text: &text, lines_before: 0 };
        let node = tree::parse(document, &Limits::default()).map_err(|error| error.to_string())?;
        let node = node.ok_or("nothing is there")?;
        let mut pool = Pool::default();
        let mut context = Context::new(&file, document, &mut pool);
        match resource::read(&node, &mut context) {
            Reading::Object(_, Resource::Pod(pod)) => Ok(pod.capture.map_or_else(Self::default, |c| *c)),
            _ => {
                let found = context.take_diagnostics();
                let errors = found.iter().filter(|d| d.severity == Severity::Error);
                let texts: Vec<String> = errors.map(|d| format!("{}: {}", d.field, d.message)).collect();
                Err(texts.join("; "))
            }
        }
    }
}

/// Traffic that is not captured (`traffic.sidecar.istio.io/…`, in the annotations' words).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exclusions {
    /// `excludeInboundPorts`: connections to these ports are left alone.
    pub exclude_inbound_ports: Box<[PortRange]>,
    /// `includeInboundPorts`: only connections to these are captured; `None` for all.
    pub include_inbound_ports: Option<Box<[PortRange]>>,
    /// `excludeOutboundPorts`: connections to these ports are left alone.
    pub exclude_outbound_ports: Box<[PortRange]>,
    /// `includeOutboundPorts`: connections to these ports are captured whatever their address.
    pub include_outbound_ports: Box<[PortRange]>,
    /// `excludeOutboundIPRanges`: connections to these addresses are left alone.
    pub exclude_outbound_ranges: Box<[IpNet]>,
    /// `includeOutboundIPRanges`: only connections to these are captured; `None` for all.
    pub include_outbound_ranges: Option<Box<[IpNet]>>,
    /// `excludeInterfaces`: traffic through these interfaces is left alone.
    pub exclude_interfaces: Box<[Str]>,
    /// `istio.io/reroute-virtual-interfaces`, formerly `kubevirtInterfaces`: interfaces inside the pod, of virtual
    /// machines and containers in it, whose traffic is the pod's outgoing traffic.
    pub virtual_interfaces: Box<[Str]>,
}

/// Ports from `first` to `last`, both included; never 0, never empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

const PREFIX: &str = "traffic.sidecar.istio.io/";

/// As many as one set of the kernel's rules should hold.
const MOST_ITEMS: usize = 256;

/// Reads the annotations; `None` when none of them is set.
pub(super) fn read(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Box<Capture>> {
    let mut capture = Capture::default();
    for annotation in &metadata.annotations {
        if let Some(name) = annotation.key.strip_prefix(PREFIX) {
            exclusion(name, annotation, &mut capture.exclusions, fields);
        } else if annotation.key == "istio.io/reroute-virtual-interfaces" {
            exclusion("kubevirtInterfaces", annotation, &mut capture.exclusions, fields);
        }
    }
    let dns = metadata.boolean_annotation("ambient.istio.io/dns-capture", fields);
    let bypass = metadata.boolean_annotation("ambient.istio.io/bypass-inbound-capture", fields);
    capture.dns_capture = dns.unwrap_or(true);
    capture.bypass_inbound = bypass.unwrap_or(false);
    capture.netns = metadata.annotation("culvert.dev/netns").and_then(|a| netns(a, fields));
    (capture != Capture::default()).then(|| Box::new(capture))
}

fn exclusion(
    name: &str,
    annotation: &Annotation<'_>,
    exclusions: &mut Exclusions,
    fields: &mut Fields<'_, '_>,
) {
    let mut all_or = |parsed: Result<Vec<PortRange>, String>| match parsed {
        Ok(list) => Some(list.into()),
        Err(message) => {
            annotation.invalid(fields, &message, "");
            None
        }
    };
    let value = annotation.value.trim();
    match name {
        "excludeInboundPorts" => exclusions.exclude_inbound_ports = all_or(ports(value)).unwrap_or_default(),
        "excludeOutboundPorts" => {
            exclusions.exclude_outbound_ports = all_or(ports(value)).unwrap_or_default();
        }
        "includeOutboundPorts" => {
            exclusions.include_outbound_ports = all_or(ports(value)).unwrap_or_default();
        }
        "includeInboundPorts" if value == "*" => {}
        "includeInboundPorts" => exclusions.include_inbound_ports = all_or(ports(value)),
        "includeOutboundIPRanges" if value == "*" => {}
        "includeOutboundIPRanges" | "excludeOutboundIPRanges" => match ranges(value) {
            Ok(list) if name == "excludeOutboundIPRanges" => exclusions.exclude_outbound_ranges = list.into(),
            Ok(list) => exclusions.include_outbound_ranges = Some(list.into()),
            Err(message) => annotation.invalid(fields, &message, ""),
        },
        "excludeInterfaces" | "kubevirtInterfaces" => match interfaces(value) {
            Ok(list) if name == "excludeInterfaces" => exclusions.exclude_interfaces = list.into(),
            Ok(list) => exclusions.virtual_interfaces = list.into(),
            Err(message) => annotation.invalid(fields, &message, ""),
        },
        _ => annotation.invalid(fields, "there is no such annotation", "see the list of annotations"),
    }
}

/// The items of a comma-separated list.
fn items(value: &str) -> Result<Vec<&str>, String> {
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let items: Vec<&str> = value.split(',').map(str::trim).collect();
    if items.len() > MOST_ITEMS {
        return Err(format!("{} items, and at most {MOST_ITEMS} are taken", items.len()));
    }
    if items.iter().any(|item| item.is_empty()) {
        return Err("an item is empty".to_owned());
    }
    Ok(items)
}

/// `80,8000-8010`.
fn ports(value: &str) -> Result<Vec<PortRange>, String> {
    let port = |text: &str| {
        // `parse` would take a sign.
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u16>().ok().filter(|p| digits && *p > 0)
    };
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        match (port(first.trim()), port(last.trim())) {
            (Some(first), Some(last)) if first <= last => Ok(PortRange { first, last }),
            _ => Err(format!("{item:?} is neither a port nor a range of ports such as 8000-8010")),
        }
    };
    items(value)?.into_iter().map(range).collect()
}

fn ranges(value: &str) -> Result<Vec<IpNet>, String> {
    let range = |item: &str| {
        let single = || item.parse::<std::net::IpAddr>().map(IpNet::from);
        let net = item.parse::<IpNet>().or_else(|_| single());
        net.map(|n| n.trunc()).map_err(|_| format!("{item:?} is neither an address nor a range of addresses"))
    };
    items(value)?.into_iter().map(range).collect()
}

fn interfaces(value: &str) -> Result<Vec<Str>, String> {
    // IFNAMSIZ is 16 with the terminating zero (linux/if.h). The kernel takes more characters; the languages of nft
    // and iptables give meaning to them.
    let valid = |name: &str| {
        (1..=15).contains(&name.len())
            && !matches!(name, "." | "..")
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let name = |item: &str| {
        if valid(item) { Ok(item.into()) } else { Err(format!("{item:?} is no name of an interface")) }
    };
    items(value)?.into_iter().map(name).collect()
}

fn netns(annotation: &Annotation<'_>, fields: &mut Fields<'_, '_>) -> Option<PathBuf> {
    let path = Path::new(annotation.value);
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain && !annotation.value.contains('\0') {
        return Some(path.to_owned());
    }
    annotation.invalid(fields, "not an absolute path", "such as /run/netns/NAME");
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_numbers_and_ranges() {
        let range = |first, last| PortRange { first, last };
        assert_eq!(ports("80, 8000-8010"), Ok(vec![range(80, 80), range(8000, 8010)]));
        assert_eq!(ports(""), Ok(vec![]));
        for bad in ["0", "70000", "+80", "-80", "10-5", "80,", "a", "*", "80 81", "1-2-3"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
        assert!(ports(&vec!["1"; 300].join(",")).is_err());
    }

    #[test]
    fn ranges_are_of_both_families() {
        let found = ranges("10.0.0.1/8, fd00::/8,192.0.2.1").unwrap();
        let texts: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"]);
        for bad in ["10.0.0.0/33", "x", "10.0.0.0/8,"] {
            assert!(ranges(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interfaces_are_names_that_the_kernel_takes() {
        assert!(interfaces("eth0,net1").is_ok());
        for bad in ["a/b", "0123456789abcdef", "..", "a b", "a\"b", "eth0;x", "eth+", "é"] {
            assert!(interfaces(bad).is_err(), "{bad}");
        }
    }
}
