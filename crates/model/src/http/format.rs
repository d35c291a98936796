//! Texts with Envoy's `%COMMANDS%` in them, as header edits and log formats have them. Reading one is all that is done here;
//! what a command comes to is known where the request is.

use std::fmt;

use crate::Str;

/// A text with commands in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Format(Box<[FormatPart]>);

/// A part of a [`Format`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FormatPart {
    /// As it is.
    Text(Str),
    /// What the command comes to; `-` in logs, and nothing in headers, where there is no such thing.
    Command(Command),
}

/// What a format can ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `REQ(NAME?OTHER):LENGTH`: a field of the request.
    Request(FieldText),
    /// `RESP(NAME?OTHER):LENGTH`: a field of the response.
    Response(FieldText),
    /// `TRAILER(NAME?OTHER):LENGTH`: a field of the response's trailers.
    Trailer(FieldText),
    /// `METADATA`, `DYNAMIC_METADATA` and `FILTER_STATE` have nothing here that they could show.
    Nothing,
    /// `DOWNSTREAM_REMOTE_ADDRESS`, and `DOWNSTREAM_DIRECT_REMOTE_ADDRESS`: the client.
    Client,
    /// The same, without the port.
    ClientIp,
    /// The port of it.
    ClientPort,
    /// `DOWNSTREAM_LOCAL_ADDRESS`: where the client meant to connect.
    Destination,
    /// The same, without the port.
    DestinationIp,
    /// The port of it.
    DestinationPort,
    /// `DOWNSTREAM_PEER_URI_SAN`: the client's SPIFFE ID.
    ClientIdentity,
    /// `REQUESTED_SERVER_NAME`
    ServerName,
    /// `PROTOCOL`
    Protocol,
    /// `START_TIME`: when the request came; with a format of `strftime`, or else by RFC 3339 with milliseconds.
    StartTime(Option<Str>),
    /// `DURATION`: milliseconds from the request's head to the response's end.
    Duration,
    /// `RESPONSE_CODE`
    Status,
    /// `RESPONSE_CODE_DETAILS`
    StatusDetails,
    /// `UPSTREAM_TRANSPORT_FAILURE_REASON`: why there was no connection to the endpoint.
    Unconnected,
    /// `RESPONSE_FLAGS`
    Flags,
    /// `GRPC_STATUS`, and `GRPC_STATUS_NUMBER`
    GrpcStatus,
    /// `BYTES_RECEIVED`
    BytesReceived,
    /// `BYTES_SENT`
    BytesSent,
    /// `UPSTREAM_HOST`, and `UPSTREAM_REMOTE_ADDRESS`: the endpoint.
    Endpoint,
    /// The same, without the port.
    EndpointIp,
    /// `UPSTREAM_CLUSTER`: the back end.
    Backend,
    /// `UPSTREAM_REQUEST_ATTEMPT_COUNT`
    Attempts,
    /// `ROUTE_NAME`
    Route,
    /// `HOSTNAME`: that of the proxy.
    Host,
    /// `TRACE_ID`: that of the request's trace, where it has one.
    Trace,
}

/// A field that a format asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FieldText {
    /// Its name, in lower case.
    pub name: Str,
    /// The one to take where it is not there.
    pub or: Option<Str>,
    /// How many bytes of it at most.
    pub most: Option<usize>,
}

/// Why a text is no format.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidFormat {
    /// A `%` begins no command.
    #[error("a % without its end; a percent sign is written %%")]
    Open,
    /// No command is called this.
    #[error("there is no command %{0}%")]
    Unknown(String),
}

impl Format {
    /// Reads a text.
    ///
    /// # Errors
    /// What is no command.
    pub fn parse(text: &str) -> Result<Self, InvalidFormat> {
        let (mut parts, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some((before, after)) = rest.split_once('%') {
            plain.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                plain.push('%');
                rest = after;
                continue;
            }
            let end = end_of(after).ok_or(InvalidFormat::Open)?;
            let (command, after) = after.split_at_checked(end).ok_or(InvalidFormat::Open)?;
            if !plain.is_empty() {
                parts.push(FormatPart::Text(std::mem::take(&mut plain).as_str().into()));
            }
            parts.push(FormatPart::Command(
                command_of(command).ok_or_else(|| InvalidFormat::Unknown(command.to_owned()))?,
            ));
            rest = after.strip_prefix('%').unwrap_or_default();
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(FormatPart::Text(plain.as_str().into()));
        }
        Ok(Self(parts.into()))
    }

    /// Its parts.
    #[must_use]
    pub fn parts(&self) -> &[FormatPart] {
        &self.0
    }

    /// The text, where there are no commands in it.
    #[must_use]
    pub fn plain(&self) -> Option<&str> {
        match &*self.0 {
            [] => Some(""),
            [FormatPart::Text(text)] => Some(text),
            _ => None,
        }
    }
}

/// Where a command ends: a `%` within parentheses belongs to what stands there.
fn end_of(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

fn command_of(text: &str) -> Option<Command> {
    let (name, argument) = match text.split_once('(') {
        Some((name, rest)) => {
            let (argument, length) = rest.rsplit_once(')')?;
            (name, Some((argument, length)))
        }
        None => (text, None),
    };
    if let Some((argument, length)) = argument {
        return with_argument(name, argument, length);
    }
    Some(match name {
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Command::Client,
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Command::ClientIp
        }
        "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => Command::ClientPort,
        "DOWNSTREAM_LOCAL_ADDRESS" => Command::Destination,
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Command::DestinationIp,
        "DOWNSTREAM_LOCAL_PORT" => Command::DestinationPort,
        "DOWNSTREAM_PEER_URI_SAN" => Command::ClientIdentity,
        "REQUESTED_SERVER_NAME" => Command::ServerName,
        "PROTOCOL" => Command::Protocol,
        "START_TIME" => Command::StartTime(None),
        "DURATION" => Command::Duration,
        "RESPONSE_CODE" => Command::Status,
        "RESPONSE_CODE_DETAILS" => Command::StatusDetails,
        "RESPONSE_FLAGS" => Command::Flags,
        "GRPC_STATUS" | "GRPC_STATUS_NUMBER" => Command::GrpcStatus,
        "BYTES_RECEIVED" => Command::BytesReceived,
        "BYTES_SENT" => Command::BytesSent,
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Command::Endpoint,
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Command::EndpointIp,
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Command::Backend,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Command::Attempts,
        "ROUTE_NAME" => Command::Route,
        "HOSTNAME" => Command::Host,
        "TRACE_ID" => Command::Trace,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Command::Unconnected,
        "CONNECTION_TERMINATION_DETAILS"
        | "UPSTREAM_LOCAL_ADDRESS"
        | "DOWNSTREAM_PEER_SUBJECT"
        | "DOWNSTREAM_PEER_FINGERPRINT_256"
        | "DOWNSTREAM_PEER_SERIAL"
        | "DOWNSTREAM_PEER_ISSUER"
        | "DOWNSTREAM_TLS_VERSION"
        | "DOWNSTREAM_TLS_CIPHER" => Command::Nothing,
        _ => return None,
    })
}

fn with_argument(name: &str, argument: &str, length: &str) -> Option<Command> {
    let field = || {
        let most = match length.strip_prefix(':') {
            Some(digits) => Some(digits.parse().ok()?),
            None if length.is_empty() => None,
            None => return None,
        };
        let (name, or) = match argument.split_once('?') {
            Some((name, or)) => (name, Some(or)),
            None => (argument, None),
        };
        let lower = |text: &str| Str::from(text.to_ascii_lowercase().as_str());
        (!name.is_empty()).then(|| FieldText { name: lower(name), or: or.map(lower), most })
    };
    Some(match name {
        "REQ" => Command::Request(field()?),
        "RESP" => Command::Response(field()?),
        "TRAILER" => Command::Trailer(field()?),
        "START_TIME" if length.is_empty() => Command::StartTime(Some(argument.into())),
        "GRPC_STATUS" => Command::GrpcStatus,
        "METADATA" | "DYNAMIC_METADATA" | "FILTER_STATE" | "ENVIRONMENT" => Command::Nothing,
        _ => return None,
    })
}

impl fmt::Display for FieldText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.or.as_ref().map_or(Ok(()), |or| write!(f, "?{or}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn commands_and_texts_are_told_apart() {
        let format = Format::parse("100%% of %REQ(X-User?:authority):8%, at %START_TIME(%s%3f)%").unwrap();
        let field = FieldText { name: "x-user".into(), or: Some(":authority".into()), most: Some(8) };
        assert_eq!(
            format.parts(),
            [
                FormatPart::Text("100% of ".into()),
                FormatPart::Command(Command::Request(field)),
                FormatPart::Text(", at ".into()),
                FormatPart::Command(Command::StartTime(Some("%s%3f".into()))),
            ]
        );
        assert_eq!(Format::parse("a b").unwrap().plain(), Some("a b"));
        assert_eq!(Format::parse("").unwrap().plain(), Some(""));
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for text in ["50%", "%NOPE%", "%REQ%", "%REQ()%", "%REQ(a):x%", "%REQ(a%", "%START_TIME(%s):3%"] {
            assert!(Format::parse(text).is_err(), "{text}");
        }
    }
}
