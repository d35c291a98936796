//! What of a pod's traffic is captured, from its annotations: read by the reader of the whole mesh, so that what the
//! node does and what `culvert analyze` says of an annotation are one.

use std::collections::BTreeMap;

use capture::{Include, InterfaceName, PortRange, ProbeSources, Rules};
use config::kinds::Capture;

/// An annotation that can't be read. The pod is then neither captured with less than it asks for nor left out with more.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadAnnotation(String);

/// The rules that annotations of a pod ask for. With `probes`, those of the kubelet are let through.
///
/// # Errors
/// Which annotation can't be read, and why.
pub fn of(annotations: &BTreeMap<String, String>, probes: bool) -> Result<Rules, BadAnnotation> {
    let capture = Capture::of_annotations(annotations).map_err(BadAnnotation)?;
    let ports = |list: &[config::kinds::PortRange]| -> Result<Vec<PortRange>, BadAnnotation> {
        let range = |p: &config::kinds::PortRange| {
            PortRange::new(p.first, p.last).ok_or_else(|| bad(format_args!("{}-{}", p.first, p.last)))
        };
        list.iter().map(range).collect()
    };
    let e = &capture.exclusions;
    Ok(Rules {
        dns: capture.dns_capture,
        bypass_inbound: capture.bypass_inbound,
        include_inbound_ports: match &e.include_inbound_ports {
            None => Include::All,
            Some(list) => Include::Only(ports(list)?),
        },
        exclude_inbound_ports: ports(&e.exclude_inbound_ports)?,
        include_outbound_ports: ports(&e.include_outbound_ports)?,
        exclude_outbound_ports: ports(&e.exclude_outbound_ports)?,
        include_outbound_ranges: match &e.include_outbound_ranges {
            None => Include::All,
            Some(ranges) => Include::Only(ranges.to_vec()),
        },
        exclude_outbound_ranges: e.exclude_outbound_ranges.to_vec(),
        exclude_interfaces: names(&e.exclude_interfaces)?,
        virtual_interfaces: names(&e.virtual_interfaces)?,
        probes: probes.then(ProbeSources::default),
        ..Rules::default()
    })
}

fn names<S: std::ops::Deref<Target = str>>(list: &[S]) -> Result<Vec<InterfaceName>, BadAnnotation> {
    let name = |name: &S| InterfaceName::new(name).ok_or_else(|| bad(format_args!("{:?}", &**name)));
    list.iter().map(name).collect()
}

fn bad(what: impl std::fmt::Display) -> BadAnnotation {
    BadAnnotation(format!("{what} in an annotation on capture is not valid"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn annotations_become_rules() {
        let rules = of(
            &annotations(&[
                ("traffic.sidecar.istio.io/excludeOutboundPorts", "3306,8000-8010"),
                ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.9.0.0/16"),
                ("traffic.sidecar.istio.io/includeInboundPorts", "80"),
                ("ambient.istio.io/dns-capture", "false"),
                ("istio.io/reroute-virtual-interfaces", "net1,net2"),
            ]),
            true,
        )
        .unwrap();
        let range = |first, last| PortRange::new(first, last).unwrap();
        assert_eq!(rules.exclude_outbound_ports, [range(3306, 3306), range(8000, 8010)]);
        assert_eq!(rules.include_inbound_ports, Include::Only(vec![range(80, 80)]));
        assert_eq!(rules.exclude_outbound_ranges, ["10.9.0.0/16".parse().unwrap()]);
        assert_eq!(rules.virtual_interfaces.len(), 2);
        assert!(!rules.dns && rules.probes.is_some());
        assert_eq!(of(&BTreeMap::new(), false), Ok(Rules::default()));
        let bypass = of(&annotations(&[("ambient.istio.io/bypass-inbound-capture", "true")]), false).unwrap();
        assert!(bypass.bypass_inbound);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        for (key, value) in [
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "http"),
            ("traffic.sidecar.istio.io/excludeOutbundPorts", "80"),
            ("ambient.istio.io/bypass-inbound-capture", "perhaps"),
            ("istio.io/reroute-virtual-interfaces", "a b"),
            ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/40\n\"x"),
        ] {
            let error = of(&annotations(&[(key, value)]), false).unwrap_err().to_string();
            assert!(error.contains(key.rsplit('/').next().unwrap()), "{error}");
        }
    }
}
