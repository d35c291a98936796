//! The annotations of a pod that change what is captured.
//!
//! The names are Istio's: those of its sidecars for ports, ranges and interfaces, and those of its ambient mode.

use std::str::FromStr;

use ipnet::IpNet;

use crate::rules::{Include, InterfaceName, LIST_LIMIT, PortRange, Rules};

/// The annotations that are understood.
pub const ANNOTATIONS: [&str; 10] = [
    "traffic.sidecar.istio.io/includeInboundPorts",
    "traffic.sidecar.istio.io/excludeInboundPorts",
    "traffic.sidecar.istio.io/includeOutboundPorts",
    "traffic.sidecar.istio.io/excludeOutboundPorts",
    "traffic.sidecar.istio.io/includeOutboundIPRanges",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
    "traffic.sidecar.istio.io/excludeInterfaces",
    "istio.io/reroute-virtual-interfaces",
    "ambient.istio.io/bypass-inbound-capture",
    "ambient.istio.io/dns-capture",
];

/// An annotation whose value can't be used. The capture of such a pod would not be what its author asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("annotation {annotation}: {value:?} is not {expected}")]
pub struct InvalidAnnotation {
    /// Its name.
    pub annotation: &'static str,
    /// The part of its value that is wrong.
    pub value: String,
    /// What it should be.
    pub expected: &'static str,
}

impl Rules {
    /// The rules that a pod's annotations ask for, on top of `self`. Other annotations are ignored.
    ///
    /// # Errors
    /// All that are wrong.
    pub fn with_annotations<'a>(
        mut self,
        annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, Vec<InvalidAnnotation>> {
        let mut wrong = Vec::new();
        for (name, value) in annotations {
            if let Some(annotation) = ANNOTATIONS.into_iter().find(|known| *known == name)
                && let Err(invalid) = self.apply(annotation, value.trim())
            {
                wrong.push(invalid);
            }
        }
        if wrong.is_empty() { Ok(self) } else { Err(wrong) }
    }

    fn apply(&mut self, annotation: &'static str, value: &str) -> Result<(), InvalidAnnotation> {
        match annotation {
            "traffic.sidecar.istio.io/includeInboundPorts" => {
                self.include_inbound_ports = include(annotation, value, PORTS)?;
            }
            "traffic.sidecar.istio.io/excludeInboundPorts" => {
                self.exclude_inbound_ports = list(annotation, value, PORTS)?;
            }
            "traffic.sidecar.istio.io/includeOutboundPorts" => {
                self.include_outbound_ports = list(annotation, value, PORTS)?;
            }
            "traffic.sidecar.istio.io/excludeOutboundPorts" => {
                self.exclude_outbound_ports = list(annotation, value, PORTS)?;
            }
            "traffic.sidecar.istio.io/includeOutboundIPRanges" => {
                self.include_outbound_ranges = include(annotation, value, RANGES)?;
            }
            "traffic.sidecar.istio.io/excludeOutboundIPRanges" => {
                self.exclude_outbound_ranges = list(annotation, value, RANGES)?;
            }
            "traffic.sidecar.istio.io/excludeInterfaces" => {
                self.exclude_interfaces = list(annotation, value, INTERFACES)?;
            }
            "istio.io/reroute-virtual-interfaces" => {
                self.virtual_interfaces = list(annotation, value, INTERFACES)?;
            }
            "ambient.istio.io/bypass-inbound-capture" => self.bypass_inbound = boolean(annotation, value)?,
            "ambient.istio.io/dns-capture" => self.dns = boolean(annotation, value)?,
            _ => {}
        }
        Ok(())
    }
}

/// How the elements of a list are read, and what they are called.
type Element<T> = (fn(&str) -> Option<T>, &'static str);

const PORTS: Element<PortRange> = (port_range, "a port (1 to 65535) or a range of ports such as 8000-8010");
const RANGES: Element<IpNet> = (ip_range, "an IP address or a CIDR range");
const INTERFACES: Element<InterfaceName> =
    (InterfaceName::new, "an interface name (up to 15 letters, digits, '-', '_' and '.')");

fn port_range(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    PortRange::new(first.parse().ok()?, last.parse().ok()?)
}

fn ip_range(text: &str) -> Option<IpNet> {
    let range =
        IpNet::from_str(text).ok().or_else(|| Some(IpNet::from(text.parse::<std::net::IpAddr>().ok()?)))?;
    Some(range.trunc())
}

fn list<T>(
    annotation: &'static str,
    value: &str,
    (read, expected): Element<T>,
) -> Result<Vec<T>, InvalidAnnotation> {
    let parts: Vec<_> = value.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.len() > LIST_LIMIT {
        let value = format!("{} entries", parts.len());
        return Err(InvalidAnnotation { annotation, value, expected: "a list of at most 1024 entries" });
    }
    let element = |part: &&str| {
        read(part).ok_or_else(|| InvalidAnnotation { annotation, value: (*part).to_owned(), expected })
    };
    parts.iter().map(element).collect()
}

fn include<T>(
    annotation: &'static str,
    value: &str,
    element: Element<T>,
) -> Result<Include<T>, InvalidAnnotation> {
    if value == "*" { Ok(Include::All) } else { list(annotation, value, element).map(Include::Only) }
}

fn boolean(annotation: &'static str, value: &str) -> Result<bool, InvalidAnnotation> {
    value.parse().map_err(|_| InvalidAnnotation {
        annotation,
        value: value.to_owned(),
        expected: "\"true\" or \"false\"",
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::rules::Plan;

    fn parse(annotations: &[(&str, &str)]) -> Result<Rules, Vec<InvalidAnnotation>> {
        Rules::default().with_annotations(annotations.iter().copied())
    }

    #[test]
    fn every_annotation_changes_its_rule() {
        let port = |first, last| PortRange::new(first, last).unwrap();
        let interface = |name| InterfaceName::new(name).unwrap();
        let rules = parse(&[
            ("traffic.sidecar.istio.io/includeInboundPorts", "80, 8000-8010"),
            ("traffic.sidecar.istio.io/excludeInboundPorts", "22"),
            ("traffic.sidecar.istio.io/includeOutboundPorts", "443"),
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "25,,587"),
            ("traffic.sidecar.istio.io/includeOutboundIPRanges", ""),
            ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.1.2.3/8,::1"),
            ("traffic.sidecar.istio.io/excludeInterfaces", "net1"),
            ("istio.io/reroute-virtual-interfaces", "virbr0"),
            ("ambient.istio.io/bypass-inbound-capture", "true"),
            ("ambient.istio.io/dns-capture", "false"),
            ("something.else/entirely", "?"),
        ]);
        let expected = Rules {
            include_inbound_ports: Include::Only(vec![port(80, 80), port(8000, 8010)]),
            exclude_inbound_ports: vec![port(22, 22)],
            include_outbound_ports: vec![port(443, 443)],
            exclude_outbound_ports: vec![port(25, 25), port(587, 587)],
            include_outbound_ranges: Include::Only(Vec::new()),
            exclude_outbound_ranges: vec!["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            exclude_interfaces: vec![interface("net1")],
            virtual_interfaces: vec![interface("virbr0")],
            bypass_inbound: true,
            dns: false,
            ..Rules::default()
        };
        assert_eq!(rules, Ok(expected));
        assert_eq!(parse(&[("traffic.sidecar.istio.io/includeInboundPorts", "*")]), Ok(Rules::default()));
    }

    proptest! {
        /// Whatever is written, it is understood or refused; what is understood can be written as rules.
        #[test]
        fn any_value_is_rules_or_a_mistake(
            annotation in select(ANNOTATIONS.to_vec()),
            value in "[0-9a-z.,:/*-]{0,40}|.{0,40}",
        ) {
            match parse(&[(annotation, &value)]) {
                Ok(rules) => drop(Plan::new(&rules)),
                Err(wrong) => prop_assert!(!wrong.is_empty()),
            }
        }
    }

    #[test]
    fn every_mistake_is_named() {
        let wrong = parse(&[
            ("traffic.sidecar.istio.io/excludeInboundPorts", "80,http"),
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "70000"),
            ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/33"),
            ("traffic.sidecar.istio.io/excludeInterfaces", "eth0;drop"),
            ("ambient.istio.io/dns-capture", "yes"),
        ])
        .unwrap_err();
        let values: Vec<_> = wrong.iter().map(|invalid| invalid.value.as_str()).collect();
        assert_eq!(values, ["http", "70000", "10.0.0.0/33", "eth0;drop", "yes"]);
        assert!(
            wrong[0]
                .to_string()
                .starts_with("annotation traffic.sidecar.istio.io/excludeInboundPorts: \"http\"")
        );
        let long = vec!["1"; LIST_LIMIT + 1].join(",");
        assert!(parse(&[("traffic.sidecar.istio.io/excludeInboundPorts", &long)]).is_err());
    }
}
