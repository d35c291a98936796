//! From the wire to the model.
//!
//! What decides over traffic is read strictly: a value that has no meaning in the model is an error, since
//! leaving it out would change what the rest means (a match whose only address is left out matches everything).
//! What is only shown (the kind of a workload's owner, an application protocol) falls back to its default, so
//! that a newer control plane does not lose us a workload. Unknown fields are skipped; fields that are known and
//! have no place in the model are named by `not_applied`. Of what waypoints are told not even these are skipped
//! (`strict.rs`).

mod checks;
mod http;
mod http_policy;
mod policy;
mod service;
mod settings;
mod strict;
mod telemetry;
mod traffic;
mod workload;

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::http::{InvalidPattern, InvalidTemplate};
use model::telemetry::Telemetry;
use model::{
    GatewayAddress, GatewayTarget, Interner, InvalidIdentity, Locality, NetworkAddress, PortMapping,
    Profiles, Service, ServiceKey, ServiceMembership, Str, TrustDomain, Workload,
};

pub(crate) use service::protocol_text;

use crate::wire;

/// Texts of a resource's own are cut to this length (in characters) in errors.
const SHOWN: usize = 256;

/// A resource that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {field}: {problem}")]
pub struct DecodeError {
    /// The kind and name, like `workload cluster1//Pod/shop/cart-1`.
    pub resource: String,
    /// The path of the field, like `groups[0].rules[1].matches[0].source_ips[2].length`.
    pub field: String,
    /// What is wrong with it.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A field that must be there is not.
    #[error("is missing")]
    Missing,
    /// An address is neither IPv4 nor IPv6.
    #[error("has {0} bytes, an address has 4 or 16")]
    AddressLength(usize),
    /// A prefix is longer than the address.
    #[error("is {length}, a prefix of this address has at most {max} bits")]
    PrefixLength {
        /// The length.
        length: u32,
        /// What is possible.
        max: u8,
    },
    /// A gateway's address is a range.
    #[error("is a range where one address is wanted")]
    Range,
    /// A port is none.
    #[error("is {0}, ports go up to 65535")]
    Port(u32),
    /// A value that the enumeration does not have, or one that says nothing where something must be said.
    #[error("has the value {0}, which is not known")]
    Enum(i32),
    /// A name is not of the form `namespace/name`.
    #[error("is {0:?}, which is not of the form namespace/name")]
    Name(String),
    /// Not a trust domain.
    #[error(transparent)]
    TrustDomain(#[from] InvalidIdentity),
    /// A duration is negative or out of range.
    #[error("is not a duration of 0 or more")]
    Duration,
    /// These are no bytes of a message.
    #[error("can't be read: {0}")]
    Bytes(String),
    /// A message of a type of our own would be written otherwise than it came.
    #[error("has fields or values that this version does not know: who sent it is newer")]
    Newer,
    /// An entry points to a route that is not there.
    #[error("points to the route {0}, which is not there")]
    NoRoute(u32),
    /// No regular expression, or no replacement for what it finds.
    #[error(transparent)]
    Pattern(#[from] InvalidPattern),
    /// A path with wildcards is none.
    #[error(transparent)]
    Template(#[from] InvalidTemplate),
    /// It has no wildcards at all.
    #[error("is {0:?}, which has no wildcards")]
    NoTemplate(String),
    /// No name of a header field, or one with capitals where there are none.
    #[error("is {0:?}, which is no name of a header field in lower case")]
    HeaderName(String),
    /// No value of a header field.
    #[error("is no value of a header field")]
    HeaderValue,
    /// No host that a request can be for.
    #[error("is {0:?}, which is no host")]
    Authority(String),
    /// A path that is compared segment by segment ends with a slash.
    #[error("is {0:?}, which ends with a slash")]
    TrailingSlash(String),
    /// More than all.
    #[error("is {0} millionths, more than all")]
    Share(u32),
    /// A number that means nothing there.
    #[error("is {0}, which means nothing there")]
    Number(u32),
    /// A name that is not known.
    #[error("is {0:?}, which is not known")]
    NotKnown(String),
    /// A text of a form of its own is none.
    #[error("{0}")]
    Text(String),
    /// Not a number, or no finite one, or a negative one.
    #[error("is no finite number of 0 or more")]
    Finite,
}

/// A problem and the path to it, as far as it is known on the way up.
#[derive(Debug)]
pub(crate) struct Fault {
    path: String,
    problem: Problem,
}

impl Fault {
    fn new(field: &str, problem: impl Into<Problem>) -> Self {
        Self { path: field.to_owned(), problem: problem.into() }
    }

    /// The same, seen from the message that holds it in `field`.
    fn within(mut self, field: impl fmt::Display) -> Self {
        self.path = format!("{field}.{}", self.path);
        self
    }

    fn of(self, kind: &str, name: impl fmt::Display) -> DecodeError {
        let resource = format!("{kind} {}", cut(&name.to_string()));
        DecodeError { resource, field: self.path, problem: self.problem }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

/// Reads every element of a repeated field. Errors of `read` are paths below the element.
fn each<T, U>(
    list: &[T],
    field: &str,
    mut read: impl FnMut(&T) -> Result<U, Fault>,
) -> Result<Box<[U]>, Fault> {
    list.iter()
        .enumerate()
        .map(|(i, item)| read(item).map_err(|fault| fault.within(format_args!("{field}[{i}]"))))
        .collect()
}

/// What an empty field of a workload stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Elided {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// The cluster.
    pub cluster: Str,
}

impl Default for Elided {
    /// As istiod means it: `cluster.local` and `Kubernetes`.
    fn default() -> Self {
        Self { trust_domain: TrustDomain::cluster_local(), cluster: "Kubernetes".into() }
    }
}

/// A resource of the Address type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decoded {
    /// A workload.
    Workload(Workload),
    /// A service.
    Service(Service),
}

/// Reads resources of one source. Equal strings, localities, port lists, lists of services and profiles of what it reads
/// share their memory.
#[derive(Debug, Default)]
pub struct Decoder {
    elided: Elided,
    strings: Interner,
    localities: HashSet<Arc<Locality>>,
    ports: HashSet<Arc<[PortMapping]>>,
    memberships: HashSet<Arc<[ServiceMembership]>>,
    labels: HashSet<Arc<[(Str, Str)]>>,
    profiles: Profiles,
    /// What was read last, and what it came to.
    telemetry: Option<(Box<wire::waypoint::Telemetry>, Arc<Telemetry>)>,
}

impl Decoder {
    /// A decoder for a source that leaves out what `elided` says.
    #[must_use]
    pub fn new(elided: Elided) -> Self {
        Self { elided, ..Self::default() }
    }

    /// Reads a resource of the Address type.
    ///
    /// # Errors
    /// It holds neither a workload nor a service, or what it holds can't be read.
    pub fn address(&mut self, address: &wire::workload::Address) -> Result<Decoded, DecodeError> {
        use wire::workload::address::Type;
        match &address.r#type {
            Some(Type::Workload(workload)) => self.workload(workload).map(Decoded::Workload),
            Some(Type::Service(service)) => self.service(service).map(Decoded::Service),
            None => Err(Fault::new("type", Problem::Missing).of("address", "")),
        }
    }

    /// Forgets shared values that nothing else uses. To be called after a batch.
    pub fn sweep(&mut self) {
        self.profiles.sweep(); // first, since it holds the others
        self.memberships.retain(|m| Arc::strong_count(m) > 1);
        self.localities.retain(|l| Arc::strong_count(l) > 1);
        self.ports.retain(|p| Arc::strong_count(p) > 1);
        self.labels.retain(|l| Arc::strong_count(l) > 1);
        self.telemetry.take_if(|(_, shared)| Arc::strong_count(shared) == 1);
        self.strings.sweep();
    }

    fn text(&mut self, text: &str) -> Str {
        self.strings.intern(text)
    }

    fn texts(&mut self, list: &[String]) -> Box<[Str]> {
        list.iter().map(|t| self.text(t)).collect()
    }

    /// Reads `namespace/name`.
    fn qualified(&mut self, name: &str) -> Result<(Str, Str), Problem> {
        let (namespace, name) = name.split_once('/').ok_or_else(|| Problem::Name(cut(name)))?;
        Ok((self.text(namespace), self.text(name)))
    }

    fn gateway(
        &mut self,
        gateway: Option<&wire::workload::GatewayAddress>,
        field: &str,
    ) -> Result<Option<GatewayAddress>, Fault> {
        use wire::workload::gateway_address::Destination;
        let Some(gateway) = gateway else { return Ok(None) };
        let target = match &gateway.destination {
            Some(Destination::Hostname(name)) => GatewayTarget::Service(ServiceKey {
                namespace: self.text(&name.namespace),
                hostname: self.text(&name.hostname),
            }),
            Some(Destination::Address(address)) => {
                let range =
                    range(&address.address, address.length).map_err(|f| f.within("address").within(field))?;
                if range.prefix_len() != range.max_prefix_len() {
                    return Err(Fault::new("address.length", Problem::Range).within(field));
                }
                GatewayTarget::Address(NetworkAddress::new(self.text(&address.network), range.addr()))
            }
            None => return Err(Fault::new("destination", Problem::Missing).within(field)),
        };
        let hbone_mtls_port =
            port(gateway.hbone_mtls_port, "hbone_mtls_port").map_err(|f| f.within(field))?;
        Ok(Some(GatewayAddress { target, hbone_mtls_port }))
    }
}

fn port(number: u32, field: &str) -> Result<u16, Fault> {
    u16::try_from(number).map_err(|_| Fault::new(field, Problem::Port(number)))
}

fn ip(bytes: &[u8]) -> Result<IpAddr, Problem> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(v4.into())
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(IpAddr::from(v6).to_canonical())
    } else {
        Err(Problem::AddressLength(bytes.len()))
    }
}

/// Reads the fields `address` and `length` of a message; without a length it is one address. An IPv4-mapped
/// range is read as the IPv4 range that it stands for.
fn range(address: &[u8], length: Option<u32>) -> Result<IpNet, Fault> {
    let fault = |problem| Fault::new("length", problem);
    let too_long = |length, max| fault(Problem::PrefixLength { length, max });
    if let Ok(v4) = <[u8; 4]>::try_from(address) {
        let length = length.unwrap_or(32);
        let bits = u8::try_from(length).unwrap_or(u8::MAX);
        return Ipv4Net::new(v4.into(), bits).map(IpNet::V4).map_err(|_| too_long(length, 32));
    }
    let Ok(v6) = <[u8; 16]>::try_from(address) else {
        return Err(Fault::new("address", Problem::AddressLength(address.len())));
    };
    let (v6, length) = (Ipv6Addr::from(v6), length.unwrap_or(128));
    let bits = u8::try_from(length).unwrap_or(u8::MAX);
    if let (Some(v4), 96..=128) = (v6.to_ipv4_mapped(), bits) {
        return Ipv4Net::new(v4, bits - 96).map(IpNet::V4).map_err(|_| too_long(length, 128));
    }
    Ipv6Net::new(v6, bits).map(IpNet::V6).map_err(|_| too_long(length, 128))
}
