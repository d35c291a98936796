//! Changes of fields, whose values may have Envoy's `%COMMANDS%` in them.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::SystemTime;

use model::http::{Command, FieldText, Format, FormatPart, is_authority};

use crate::http::decide::{Connection, Decided, Record};
use crate::http::head::{Fields, Known, RequestHead, Version, is_field_value, reads_as};
use crate::http::hygiene::CLIENT_CERT;

/// Changes of fields, in order. Names and plain values are valid ones.
#[derive(Clone, Debug, Default)]
pub struct Edits(pub Vec<Edit>);

/// One change.
#[derive(Clone, Debug)]
pub enum Edit {
    /// All fields of the name go.
    Remove(Box<str>),
    /// In the place of all fields of the name.
    Set(Box<str>, Value),
    /// Beside those that are there.
    Add(Box<str>, Value),
}

/// What a field becomes.
#[derive(Clone, Debug)]
pub enum Value {
    /// This.
    Plain(Box<[u8]>),
    /// What the commands come to; without any, the field is not set.
    Made(Box<Format>),
}

/// What commands are answered from.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// The request.
    pub request: &'a RequestHead,
    /// The connection that it came by.
    pub connection: &'a Connection,
    /// What was decided.
    pub decided: &'a Decided,
    /// How it went, once there is a response.
    pub record: Option<&'a Record>,
}

/// As much of a made value is kept: a header field that is longer would not get through.
const LONGEST: usize = 16 * 1024;

impl Edits {
    /// Makes the changes in a response.
    pub fn apply(&self, fields: &mut Fields, facts: &Facts<'_>) {
        for edit in &self.0 {
            edit.apply(fields, facts);
        }
    }

    /// The fields that an answer of our own gets: what is to be made of a response has none to be made of.
    #[must_use]
    pub fn plain_fields(&self) -> Box<[(Box<str>, Box<str>)]> {
        let plain = self.0.iter().filter_map(|edit| match edit {
            Edit::Set(name, Value::Plain(value)) | Edit::Add(name, Value::Plain(value)) => {
                Some((name.clone(), String::from_utf8_lossy(value).as_ref().into()))
            }
            _ => None,
        });
        plain.collect()
    }

    /// Takes out of an informational response what is removed from the response, or has another value there.
    pub(crate) fn withhold(&self, fields: &mut Fields) {
        for edit in self.0.iter().filter(|edit| !matches!(edit, Edit::Add(..))) {
            fields.remove(edit.name());
        }
    }

    /// Makes the changes in a request.
    pub fn apply_to_request(&self, request: &mut RequestHead, connection: &Connection, decided: &Decided) {
        for edit in &self.0 {
            let facts = Facts { request, connection, decided, record: None };
            match edit.value(&facts, None) {
                None => request.fields.remove(edit.name()),
                // Who the client is, is not a route's to say: its service may be another's.
                Some(_) if reads_as(edit.name(), CLIENT_CERT) => {}
                // The authority is no field of ours.
                Some(value) if edit.name().eq_ignore_ascii_case(b"host") => {
                    if let (true, Ok(host)) = (is_authority(&value), std::str::from_utf8(&value)) {
                        request.set_authority(host);
                    }
                }
                Some(value) => edit.put(&mut request.fields, &value),
            }
        }
    }
}

impl Edit {
    /// Makes the change. Commands of the response are answered from the fields that are changed.
    fn apply(&self, fields: &mut Fields, facts: &Facts<'_>) {
        let Some(value) = self.value(facts, Some(fields)) else { return fields.remove(self.name()) };
        self.put(fields, &value);
    }

    fn name(&self) -> &[u8] {
        match self {
            Self::Remove(name) | Self::Set(name, _) | Self::Add(name, _) => name.as_bytes(),
        }
    }

    /// What the field becomes; `None` where it goes.
    fn value(&self, facts: &Facts<'_>, response: Option<&Fields>) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::Remove(_) => None,
            Self::Set(_, Value::Plain(value)) | Self::Add(_, Value::Plain(value)) => {
                Some(Cow::Borrowed(&**value))
            }
            Self::Set(_, Value::Made(format)) | Self::Add(_, Value::Made(format)) => {
                Some(Cow::Owned(made(format, facts, response)))
            }
        }
    }

    /// Puts the field, unless it is one that says how the message is framed or what becomes of the connection.
    fn put(&self, fields: &mut Fields, value: &[u8]) {
        if Known::of(self.name()).is_engines() {
            return;
        }
        if matches!(self, Self::Set(..)) {
            fields.remove(self.name());
        }
        // Commands that come to nothing set nothing.
        if !value.is_empty() || matches!(self, Self::Set(_, Value::Plain(_)) | Self::Add(_, Value::Plain(_)))
        {
            fields.push(self.name(), value);
        }
    }
}

impl Value {
    /// Of a text that may have commands in it; of one that is no format, the text as it is.
    #[must_use]
    pub fn of(text: &[u8]) -> Self {
        let format = std::str::from_utf8(text).ok().and_then(|text| Format::parse(text).ok());
        match format {
            Some(format) => match format.plain() {
                Some(plain) => Self::Plain(plain.as_bytes().into()),
                None => Self::Made(Box::new(format)),
            },
            None => Self::Plain(text.into()),
        }
    }
}

/// What a format comes to as a field's value.
fn made(format: &Format, facts: &Facts<'_>, response: Option<&Fields>) -> Vec<u8> {
    let mut out = Vec::new();
    for part in format.parts() {
        match part {
            FormatPart::Text(text) => out.extend_from_slice(text.as_bytes()),
            FormatPart::Command(command) => command_value(command, facts, response, &mut out),
        }
    }
    out.truncate(LONGEST);
    if is_field_value(&out) { out } else { Vec::new() }
}

/// Appends what `command` comes to; nothing where there is no such thing. `response` are the response's fields.
pub fn command_value(command: &Command, facts: &Facts<'_>, response: Option<&Fields>, out: &mut Vec<u8>) {
    let (request, connection) = (facts.request, facts.connection);
    match command {
        Command::Request(field) => {
            text_of(field, out, |name| match name {
                ":method" => Some(request.method().as_bytes().into()),
                ":authority" | "host" => Some(request.authority().as_bytes().into()),
                ":path" => Some(request.target().as_bytes().into()),
                ":scheme" => Some(request.scheme().as_bytes().into()),
                name => request.fields.joined(name.as_bytes()),
            });
        }
        Command::Response(field) => {
            if let Some(response) = response {
                text_of(field, out, |name| response.joined(name.as_bytes()));
            }
        }
        Command::Trailer(_) | Command::Nothing => {}
        Command::Client => show(out, &connection.client),
        Command::ClientIp => show(out, &connection.client.ip()),
        Command::ClientPort => show(out, &connection.client.port()),
        Command::Destination => show(out, &connection.destination),
        Command::DestinationIp => show(out, &connection.destination.ip()),
        Command::DestinationPort => show(out, &connection.destination.port()),
        Command::ClientIdentity => show_some(out, connection.identity.as_ref()),
        Command::ServerName => show_some(out, connection.server_name.as_ref()),
        Command::Protocol => out.extend_from_slice(match request.version {
            Version::Http1 => b"HTTP/1.1",
            Version::Http2 => b"HTTP/2",
        }),
        Command::StartTime(format) => start_time(format.as_deref(), facts.record, out),
        Command::Route => {
            if let Some(route) = &facts.decided.route {
                show(out, &route.id);
            }
        }
        Command::Host => show_some(out, hostname()),
        Command::Trace => {
            if let Some(span) = &facts.decided.trace {
                show(out, &format_args!("{:032x}", span.trace));
            }
        }
        Command::Backend => show_some(out, backend(facts.decided)),
        Command::Duration
        | Command::Status
        | Command::StatusDetails
        | Command::Unconnected
        | Command::Flags
        | Command::GrpcStatus
        | Command::BytesReceived
        | Command::BytesSent
        | Command::Endpoint
        | Command::EndpointIp
        | Command::Attempts => {
            if let Some(record) = facts.record {
                recorded(command, record, out);
            }
        }
    }
}

fn recorded(command: &Command, record: &Record, out: &mut Vec<u8>) {
    let endpoint = || record.target.as_ref().map(|target| target.address);
    match command {
        Command::Duration => show(out, &record.started.elapsed().as_millis()),
        Command::Status => show(out, &record.status),
        Command::StatusDetails => out.extend_from_slice(record.detail.as_bytes()),
        Command::Unconnected => show_some(out, record.unconnected.as_deref()),
        Command::Flags => show(out, &record.flag),
        Command::GrpcStatus => show_some(out, record.grpc_status),
        Command::BytesReceived => show(out, &record.received),
        Command::BytesSent => show(out, &record.sent),
        Command::Endpoint => show_some(out, endpoint()),
        Command::EndpointIp => show_some(out, endpoint().as_ref().map(SocketAddr::ip)),
        Command::Attempts => show(out, &record.tries),
        _ => {}
    }
}

/// The back end that the route chose, as `port|subset|host`.
fn backend(decided: &Decided) -> Option<String> {
    let model::http::RouteAction::Forward(forward) = &decided.route.as_ref()?.action else { return None };
    match &forward.backends().get(decided.backend?)?.to {
        model::http::BackendRef::Service { service, port, subset } => {
            Some(format!("outbound|{port}|{}|{}", subset.as_deref().unwrap_or_default(), service.hostname))
        }
        _ => None,
    }
}

fn show(out: &mut Vec<u8>, value: &dyn fmt::Display) {
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = write!(text, "{value}");
    out.extend_from_slice(text.as_bytes());
}

fn show_some<T: fmt::Display>(out: &mut Vec<u8>, value: Option<T>) {
    if let Some(value) = value {
        show(out, &value);
    }
}

fn text_of<'a>(field: &FieldText, out: &mut Vec<u8>, get: impl Fn(&str) -> Option<Cow<'a, [u8]>>) {
    let value = get(&field.name).or_else(|| get(field.or.as_deref()?));
    if let Some(value) = value {
        let most = field.most.unwrap_or(usize::MAX).min(value.len());
        out.extend_from_slice(value.get(..most).unwrap_or_default());
    }
}

/// When the request came: `%s` are seconds, `%3f`, `%6f` and `%9f` parts of one; anything else is given as RFC 3339 has it.
fn start_time(format: Option<&str>, record: Option<&Record>, out: &mut Vec<u8>) {
    let ago = record.map(|record| record.started.elapsed()).unwrap_or_default();
    let at = SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH);
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let text = match format {
        Some(format) if format.contains("%s") => format
            .replace("%s", &since.as_secs().to_string())
            .replace("%3f", &format!("{:03}", since.subsec_millis()))
            .replace("%6f", &format!("{:06}", since.subsec_micros()))
            .replace("%9f", &format!("{:09}", since.subsec_nanos())),
        _ => {
            let seconds = rustls_pki_types::UnixTime::since_unix_epoch(since);
            let text = identity::Timestamp(seconds).to_string();
            format!("{}.{:03}Z", text.trim_end_matches('Z'), since.subsec_millis())
        }
    };
    out.extend_from_slice(text.as_bytes());
}

/// The name of the machine, or the pod, that the proxy runs on.
fn hostname() -> Option<&'static str> {
    static NAME: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    NAME.get_or_init(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
        Some(name.trim().to_owned())
    })
    .as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(fields: &Fields) -> Vec<String> {
        fields.iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
    }

    #[test]
    fn no_edit_says_how_a_message_is_framed() {
        let taken = [
            "Content-Length",
            "transfer-encoding",
            "connection",
            "keep-alive",
            "proxy-connection",
            "te",
            "trailer",
            "upgrade",
            "http2-settings",
            "expect",
        ];
        let value = || Value::Plain(b"chunked".as_slice().into());
        let each = taken
            .into_iter()
            .flat_map(|name| [Edit::Set(name.into(), value()), Edit::Add(name.into(), value())]);
        let edits = Edits(each.chain([Edit::Add("x-a".into(), value())]).collect());
        let connection = Connection {
            client: SocketAddr::from(([127, 0, 0, 1], 1)),
            destination: SocketAddr::from(([127, 0, 0, 1], 2)),
            identity: None,
            server_name: None,
            secure: false,
            said: None,
        };
        let (mut request, decided) = (RequestHead::default(), Decided::default());
        request.fields.push(b"te", b"trailers");
        edits.apply_to_request(&mut request, &connection, &decided);
        assert_eq!(names(&request.fields), ["te", "x-a"]);
        assert_eq!(request.fields.joined(b"te").as_deref(), Some(&b"trailers"[..]));
        let mut fields = Fields::default();
        let facts = Facts { request: &request, connection: &connection, decided: &decided, record: None };
        edits.apply(&mut fields, &facts);
        assert_eq!(names(&fields), ["x-a"]);
    }

    #[test]
    fn no_edit_says_who_the_client_is() {
        let value = || Value::Plain(b"URI=spiffe://cluster.local/ns/a/sa/root".as_slice().into());
        let names = ["x-forwarded-client-cert", "X-Forwarded-Client-Cert", "x_forwarded_client_cert"];
        let each = names
            .into_iter()
            .flat_map(|name| [Edit::Set(name.into(), value()), Edit::Add(name.into(), value())]);
        let connection = Connection {
            client: SocketAddr::from(([127, 0, 0, 1], 1)),
            destination: SocketAddr::from(([127, 0, 0, 1], 2)),
            identity: None,
            server_name: None,
            secure: false,
            said: None,
        };
        let (mut request, decided) = (RequestHead::default(), Decided::default());
        request.fields.push(CLIENT_CERT, b"URI=spiffe://cluster.local/ns/web/sa/front");
        let before = request.fields.joined(CLIENT_CERT).map(Cow::into_owned);
        Edits(each.collect()).apply_to_request(&mut request, &connection, &decided);
        assert_eq!(self::names(&request.fields), ["x-forwarded-client-cert"]);
        assert_eq!(request.fields.joined(CLIENT_CERT).map(Cow::into_owned), before);
        // Not to say it is allowed.
        let removed = Edits(vec![Edit::Remove("x-forwarded-client-cert".into())]);
        removed.apply_to_request(&mut request, &connection, &decided);
        assert!(self::names(&request.fields).is_empty());
    }

    #[test]
    fn a_host_is_set_to_an_authority_only() {
        let connection = Connection {
            client: SocketAddr::from(([127, 0, 0, 1], 1)),
            destination: SocketAddr::from(([127, 0, 0, 1], 2)),
            identity: None,
            server_name: None,
            secure: false,
            said: None,
        };
        let decided = Decided::default();
        for (value, expected) in [
            ("b:80", "b:80"),
            ("b/x", "a"),
            ("u@b", "a"),
            ("b?x", "a"),
            ("b#x", "a"),
            ("b\\x", "a"),
            ("", "a"),
        ] {
            let mut request = RequestHead::default();
            request.set_authority("a");
            request.fields.push(b"x-host", value.as_bytes());
            let edits = Edits(vec![Edit::Set("host".into(), Value::of(b"%REQ(x-host)%"))]);
            edits.apply_to_request(&mut request, &connection, &decided);
            assert_eq!(request.authority(), expected, "{value}");
        }
    }
}
