//! A request, or a connection of bytes, that has ended, with all that is known of it: what labels, filters, log lines and
//! spans are made of. Of a connection the record has no status and the head is empty.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;
use std::time::Duration;

use model::telemetry::{Attribute, Headers, Missing, Value};
use model::{Mesh, NetworkAddress, Str, Workload};

use crate::http::decide::{Connection, Decided, Flag, Record};
use crate::http::head::{Fields, RequestHead, Version};

/// A request or a connection that has ended.
pub(super) struct Ended<'a> {
    /// Whether it is a connection that shows no requests.
    pub is_connection: bool,
    pub mesh: &'a Mesh,
    pub network: &'a Str,
    pub request: &'a RequestHead,
    /// The response's fields; empty ones where there was none.
    pub response: &'a Fields,
    pub connection: &'a Connection,
    pub decided: &'a Decided,
    pub record: &'a Record,
    pub duration: Duration,
    source: OnceCell<Option<Arc<Workload>>>,
}

impl<'a> Ended<'a> {
    pub fn new(
        (mesh, network): (&'a Mesh, &'a Str),
        (request, response): (&'a RequestHead, &'a Fields),
        connection: &'a Connection,
        decided: &'a Decided,
        record: &'a Record,
    ) -> Self {
        let duration = record.started.elapsed();
        let source = OnceCell::new();
        Self {
            is_connection: false,
            mesh,
            network,
            request,
            response,
            connection,
            decided,
            record,
            duration,
            source,
        }
    }

    /// A connection.
    pub fn of_connection(
        place: (&'a Mesh, &'a Str),
        heads: (&'a RequestHead, &'a Fields),
        connection: &'a Connection,
        decided: &'a Decided,
        record: &'a Record,
    ) -> Self {
        Self { is_connection: true, ..Self::new(place, heads, connection, decided, record) }
    }

    /// The client's workload.
    pub fn source(&self) -> Option<&Arc<Workload>> {
        let find = || {
            let address = NetworkAddress::new(self.network.clone(), self.connection.client.ip());
            self.mesh.workload_at(&address).or(self.connection.said.as_ref()).cloned()
        };
        self.source.get_or_init(find).as_ref()
    }

    /// What the endpoint is that it was sent to at last.
    pub fn about(&self) -> Option<&'a Arc<crate::http::decide::About>> {
        self.record.target.as_ref()?.about.as_ref()
    }

    /// Envoy's response flags.
    pub fn flags(&self) -> Cow<'static, str> {
        let own = flags(self.record.flag, self.record.retries_exhausted);
        match &*own {
            _ if !self.decided.delayed => own,
            "-" => Cow::Borrowed("DI"),
            flags => Cow::Owned(format!("DI,{flags}")),
        }
    }

    /// What it was for: the service of the endpoint that it was sent to, else that which has the address.
    pub fn service(&self) -> Option<&'a model::ServiceKey> {
        let of_endpoint = self.about().and_then(|about| about.service.as_ref());
        of_endpoint.or_else(|| self.decided.service.as_ref().map(|service| &service.service))
    }

    /// Why it went as it did, in Envoy's words.
    pub fn details(&self) -> &'static str {
        match self.record.detail {
            "" if self.record.flag == Flag::NoRoute => "route_not_found",
            "" if self.record.flag == Flag::Decided("NC") => "cluster_not_found",
            "" if self.record.flag == Flag::Decided("FI") => "fault_filter_abort",
            "" if self.is_connection => "-",
            "" if self.record.target.is_some() => "via_upstream",
            "" => "direct_response",
            detail => detail,
        }
    }

    /// The back end as Istio names clusters of a waypoint.
    pub fn cluster(&self) -> Option<String> {
        let about = self.about()?;
        let service = about.service.as_ref()?;
        let kind = if self.is_connection { "tcp" } else { "http" };
        let subset = about.subset.as_deref().map_or_else(|| kind.to_owned(), |s| format!("{kind}/{s}"));
        Some(format!("inbound-vip|{}|{subset}|{}", about.port, service.hostname))
    }

    pub fn route(&self) -> Option<String> {
        let of_stream = || self.decided.stream.as_ref().map(|route| route.id.to_string());
        self.decided.route.as_ref().map(|route| route.id.to_string()).or_else(of_stream)
    }

    /// A field of the request, or what HTTP/2 has as one.
    fn field(&self, name: &str) -> Option<Cow<'_, str>> {
        if self.is_connection {
            return None;
        }
        let text = match name {
            ":method" => self.request.method(),
            ":path" => self.request.target(),
            ":authority" | "host" => self.request.authority(),
            ":scheme" => self.request.scheme(),
            _ => return joined(&self.request.fields, name),
        };
        Some(Cow::Borrowed(text))
    }
}

/// Envoy's response flags.
pub(super) fn flags(flag: Flag, exhausted: bool) -> Cow<'static, str> {
    let own = match flag {
        Flag::None if exhausted => return Cow::Borrowed("URX"),
        Flag::None => return Cow::Borrowed("-"),
        flag => flag,
    };
    if exhausted { Cow::Owned(format!("URX,{own}")) } else { Cow::Owned(own.to_string()) }
}

/// Envoy's flags in the order in which it counts them.
const FLAGS: [&str; 28] = [
    "LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC", "URX",
    "SI", "IH", "DPE", "UMSDR", "RFCF", "NFCF", "DT", "UPE", "NC", "OM", "DF", "DR",
];

/// The place of a flag in Envoy's order, from 0; `None` for what is none of its flags.
pub(super) fn place_of_flag(flag: &str) -> Option<usize> {
    FLAGS.iter().position(|known| *known == flag)
}

/// The bits that Envoy has for its response flags.
fn bits(flags: &str) -> i64 {
    flags.split(',').filter_map(place_of_flag).map(|place| 1 << place).sum()
}

fn joined<'f>(fields: &'f Fields, name: &str) -> Option<Cow<'f, str>> {
    let mut values = fields.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()));
    let (_, first) = values.next()?;
    let first = std::str::from_utf8(first).ok()?;
    Some(values.fold(Cow::Borrowed(first), |joined, (_, next)| {
        Cow::Owned(format!("{joined},{}", String::from_utf8_lossy(next)))
    }))
}

fn size(bytes: u64) -> Value<'static> {
    Value::Int(i64::try_from(bytes).unwrap_or(i64::MAX))
}

fn text<T: std::fmt::Display>(value: Option<T>) -> Result<Value<'static>, Missing> {
    value.map(|value| Value::Text(Cow::Owned(value.to_string()))).ok_or(Missing)
}

impl model::telemetry::Facts for Ended<'_> {
    fn attribute(&self, attribute: Attribute) -> Result<Value<'_>, Missing> {
        let (request, record, connection) = (self.request, self.record, self.connection);
        let field = |name| self.field(name).map(Value::Text).ok_or(Missing);
        if self.is_connection && needs_request(attribute) {
            return Err(Missing);
        }
        Ok(match attribute {
            Attribute::RequestPath => Value::Text(request.target().into()),
            Attribute::RequestUrlPath => Value::Text(request.path().into()),
            Attribute::RequestQuery => Value::Text(request.query().into()),
            Attribute::RequestHost => Value::Text(request.authority().into()),
            Attribute::RequestScheme => Value::Text(request.scheme().into()),
            Attribute::RequestMethod => Value::Text(request.method().into()),
            Attribute::RequestReferer => field("referer")?,
            Attribute::RequestUserAgent => field("user-agent")?,
            Attribute::RequestId => field("x-request-id")?,
            Attribute::RequestProtocol => Value::Text(protocol(request.version).into()),
            Attribute::RequestSize => size(record.received),
            Attribute::RequestTotalSize => size(record.received + request.fields.size() as u64),
            Attribute::RequestDuration => Value::Float(self.duration.as_secs_f64()),
            Attribute::ResponseCode => Value::Int(record.status.into()),
            Attribute::ResponseCodeDetails => Value::Text(self.details().into()),
            Attribute::ResponseFlags => Value::Int(bits(&self.flags())),
            Attribute::ResponseGrpcStatus => Value::Int(record.grpc_status.ok_or(Missing)?.into()),
            Attribute::ResponseSize => size(record.sent),
            Attribute::ResponseTotalSize => size(record.sent + self.response.size() as u64),
            Attribute::ConnectionMtls => Value::Bool(connection.identity.is_some()),
            Attribute::ConnectionServerName => text(connection.server_name.as_ref())?,
            Attribute::ConnectionPeer => text(connection.identity.as_ref())?,
            Attribute::SourceAddress => text(Some(connection.client))?,
            Attribute::SourcePort => Value::Int(connection.client.port().into()),
            Attribute::SourceWorkload => text(self.source().map(|w| w.shared_workload_name()))?,
            Attribute::SourceNamespace => text(self.source().map(|w| w.namespace.clone()))?,
            Attribute::DestinationAddress => text(Some(connection.destination))?,
            Attribute::DestinationPort => Value::Int(connection.destination.port().into()),
            Attribute::UpstreamAddress => text(record.target.as_ref().map(|target| target.address))?,
            Attribute::UpstreamPort => {
                Value::Int(record.target.as_ref().ok_or(Missing)?.address.port().into())
            }
            Attribute::UpstreamAttempts => Value::Int(record.tries.into()),
            Attribute::RouteName => text(self.route())?,
            Attribute::ClusterName => text(self.cluster())?,
        })
    }

    fn header(&self, of: Headers, name: &str) -> Result<Cow<'_, str>, Missing> {
        match of {
            Headers::Request => self.field(name),
            Headers::Response => joined(self.response, name),
        }
        .ok_or(Missing)
    }
}

/// Whether a connection that shows no request has nothing of the kind.
fn needs_request(attribute: Attribute) -> bool {
    matches!(
        attribute,
        Attribute::RequestPath
            | Attribute::RequestUrlPath
            | Attribute::RequestQuery
            | Attribute::RequestHost
            | Attribute::RequestScheme
            | Attribute::RequestMethod
            | Attribute::RequestProtocol
            | Attribute::ResponseCode
    )
}

pub(super) fn protocol(version: Version) -> &'static str {
    match version {
        Version::Http1 => "HTTP/1.1",
        Version::Http2 => "HTTP/2",
    }
}
