//! Which route takes a connection that carries no HTTP, or of which nobody looks for it: by the server name of its TLS
//! handshake, by where it goes, and by its client.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Forward, RouteId, SourceFacts, SourceMatch};
use crate::Str;

/// A connection, as far as routes ask of it.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'a> {
    /// The server name of its TLS handshake; `None` where it begins with none, or names no server.
    pub sni: Option<&'a str>,
    /// Whether it begins with a TLS handshake.
    pub tls: bool,
    /// The address that the client dialled.
    pub destination: IpAddr,
}

/// A server name that a route asks for; case is of no matter.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ServerName {
    /// This one. In lower case.
    Exact(Str),
    /// Those that end with it, which starts with a dot (`*.example.com`). In lower case.
    Below(Str),
}

impl ServerName {
    /// Reads a host name, of which the first label may be `*`. `None` for `*` alone: it asks for nothing.
    #[must_use]
    pub fn parse(host: &str) -> Option<Self> {
        let host = host.to_ascii_lowercase();
        match host.strip_prefix('*') {
            Some("") => None,
            Some(below) => Some(Self::Below(below.into())),
            None => Some(Self::Exact(host.as_str().into())),
        }
    }

    /// Whether `name` is one of them.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let name = name.as_bytes();
        match self {
            Self::Exact(wanted) => wanted.as_bytes().eq_ignore_ascii_case(name),
            Self::Below(end) => name
                .len()
                .checked_sub(end.len())
                .filter(|rest| *rest > 0)
                .and_then(|at| name.get(at..))
                .is_some_and(|tail| tail.eq_ignore_ascii_case(end.as_bytes())),
        }
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Below(end) => write!(f, "*{end}"),
        }
    }
}

/// What a route asks of a connection; all of it must hold. Nothing at all holds for every connection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StreamMatch {
    /// Whether it has to begin with a TLS handshake.
    pub tls: bool,
    /// Server names, of which the handshake names one; empty for any, or none.
    pub names: Box<[ServerName]>,
    /// Where it goes; empty for anywhere.
    pub destinations: Box<[IpNet]>,
    /// The client; boxed, because few ask.
    pub source: Option<Box<SourceMatch>>,
}

impl StreamMatch {
    /// Whether `stream`, from `source`, is one that the route takes.
    #[must_use]
    pub fn holds(&self, stream: &Stream<'_>, source: &SourceFacts<'_>) -> bool {
        let named = || stream.sni.is_some_and(|sni| self.names.iter().any(|name| name.matches(sni)));
        let goes = |range: &IpNet| range.contains(&stream.destination);
        (!self.tls || stream.tls)
            && (self.names.is_empty() || named())
            && (self.destinations.is_empty() || self.destinations.iter().any(goes))
            && self.source.as_ref().is_none_or(|s| s.holds(source))
    }
}

impl fmt::Display for StreamMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut part = |f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>| {
            write!(f, "{}{text}", std::mem::replace(&mut separator, ", "))
        };
        if self.tls && self.names.is_empty() {
            part(f, format_args!("TLS"))?;
        }
        for (place, name) in self.names.iter().enumerate() {
            match place {
                0 => part(f, format_args!("server name {name}"))?,
                _ => write!(f, " or {name}")?,
            }
        }
        for range in &self.destinations {
            part(f, format_args!("to {range}"))?;
        }
        if let Some(source) = &self.source {
            part(f, format_args!("{source}"))?;
        }
        if separator.is_empty() { f.write_str("every connection") } else { Ok(()) }
    }
}

/// A route of connections: of a rule of a TCPRoute or TLSRoute, or of an entry of a VirtualService's `tcp` or `tls`.
#[derive(Clone, PartialEq, Debug)]
pub struct StreamRoute {
    /// Where it is written.
    pub id: RouteId,
    /// Where connections go. Of the back ends' changes of fields there are none.
    pub to: Forward,
}

/// Routes of connections in order of precedence.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StreamTable {
    entries: Box<[(StreamMatch, Arc<StreamRoute>)]>,
}

/// What [`StreamTable::select`] found.
#[derive(Clone, Copy, Debug)]
pub enum SelectedStream<'t> {
    /// There are no routes: the connection goes to the service itself.
    Itself,
    /// This route takes it: what of it held, and its place in the order of precedence.
    Route {
        /// The route.
        route: &'t Arc<StreamRoute>,
        /// What of it held.
        matched: &'t StreamMatch,
        /// Its place in the order of precedence.
        position: usize,
    },
    /// There are routes, and none takes it: it is refused.
    Nothing,
}

impl StreamTable {
    /// A table of `entries`, the ones that win first. Each route's matches are entries of their own.
    #[must_use]
    pub fn new(entries: Vec<(StreamMatch, Arc<StreamRoute>)>) -> Self {
        Self { entries: entries.into() }
    }

    /// The entries, in order of precedence.
    #[must_use]
    pub fn entries(&self) -> &[(StreamMatch, Arc<StreamRoute>)] {
        &self.entries
    }

    /// The route for `stream` from `source`: that of the first entry that holds.
    #[must_use]
    pub fn select(&self, stream: &Stream<'_>, source: &SourceFacts<'_>) -> SelectedStream<'_> {
        if self.entries.is_empty() {
            return SelectedStream::Itself;
        }
        let found = self.entries.iter().enumerate().find(|(_, (when, _))| when.holds(stream, source));
        found.map_or(SelectedStream::Nothing, |(position, (matched, route))| SelectedStream::Route {
            route,
            matched,
            position,
        })
    }

    /// Whether a route asks for a server name or for TLS: then the handshake has to be read first.
    #[must_use]
    pub fn asks_for_tls(&self) -> bool {
        self.entries.iter().any(|(when, _)| when.tls || !when.names.is_empty())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::http::Forward;

    fn table(matches: Vec<StreamMatch>) -> StreamTable {
        let route = Arc::new(StreamRoute { id: RouteId::default(), to: Forward::new(Vec::new()) });
        StreamTable::new(matches.into_iter().map(|when| (when, route.clone())).collect())
    }

    fn place(table: &StreamTable, sni: Option<&str>, to: &str) -> Option<usize> {
        let stream = Stream { sni, tls: sni.is_some(), destination: to.parse().unwrap() };
        match table.select(&stream, &SourceFacts::default()) {
            SelectedStream::Route { position, .. } => Some(position),
            SelectedStream::Itself | SelectedStream::Nothing => None,
        }
    }

    #[test]
    fn names_are_exact_or_below_a_domain() {
        for (host, name, wanted) in [
            ("a.example.com", "A.example.com", true),
            ("a.example.com", "b.example.com", false),
            ("*.Example.com", "a.example.COM", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "xexample.com", false),
        ] {
            assert_eq!(ServerName::parse(host).unwrap().matches(name), wanted, "{host} for {name}");
        }
        assert_eq!(ServerName::parse("*"), None);
    }

    #[test]
    fn the_first_that_holds_takes_a_connection() {
        let names = |host: &str| ServerName::parse(host).into_iter().collect();
        let table = table(vec![
            StreamMatch { tls: true, names: names("a.example.com"), ..StreamMatch::default() },
            StreamMatch { tls: true, names: names("*.example.com"), ..StreamMatch::default() },
            StreamMatch { destinations: ["10.1.0.0/16".parse().unwrap()].into(), ..StreamMatch::default() },
        ]);
        assert_eq!(place(&table, Some("a.example.com"), "10.0.0.1"), Some(0));
        assert_eq!(place(&table, Some("b.example.com"), "10.0.0.1"), Some(1));
        assert_eq!(place(&table, None, "10.1.2.3"), Some(2));
        assert_eq!(place(&table, None, "10.0.0.1"), None);
        assert!(table.asks_for_tls());
    }

    #[test]
    fn without_routes_the_service_takes_it_and_with_them_nothing_else() {
        let stream = Stream { sni: None, tls: false, destination: "10.0.0.1".parse().unwrap() };
        let facts = SourceFacts::default();
        assert!(matches!(StreamTable::default().select(&stream, &facts), SelectedStream::Itself));
        let tls = table(vec![StreamMatch { tls: true, ..StreamMatch::default() }]);
        assert!(matches!(tls.select(&stream, &facts), SelectedStream::Nothing));
    }
}
