//! Filters of a rule: of HTTPRoute, and, as far as it has them, of GRPCRoute.

use std::time::Duration;

use http::HeaderName;
use model::Str;
use model::http::{
    Authority, Cors, HeaderEdit, HeaderEdits, HostRewrite, Origin, PathRewrite, Pattern, Percent, Redirect,
};

use super::reference::{BackendDraft, MIRRORED, read_backend};
use super::value::{edited_name, edited_value, is_the_clients, listed, path, word};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, refused};

pub(super) static FILTER: Schema = Schema {
    name: "HTTPRoute.spec.rules[].filters[]",
    fields: &[
        enforced("type"),
        nested("requestHeaderModifier", &MODIFIER),
        nested("responseHeaderModifier", &MODIFIER),
        nested("requestMirror", &MIRROR),
        nested("requestRedirect", &REDIRECT),
        nested("urlRewrite", &REWRITE),
        nested("cors", &CORS),
        refused(
            "externalAuth",
            "external authorization is asked for by policies",
            "use an AuthorizationPolicy with the action CUSTOM",
        ),
        refused("extensionRef", "there is no filter that it could refer to", "remove it"),
    ],
};

pub(super) static GRPC_FILTER: Schema = Schema {
    name: "GRPCRoute.spec.rules[].filters[]",
    fields: &[
        enforced("type"),
        nested("requestHeaderModifier", &MODIFIER),
        nested("responseHeaderModifier", &MODIFIER),
        nested("requestMirror", &MIRROR),
        refused("extensionRef", "there is no filter that it could refer to", "remove it"),
    ],
};

static MODIFIER: Schema = Schema {
    name: "HTTPHeaderFilter",
    fields: &[nested("set", &HEADER), nested("add", &HEADER), enforced("remove")],
};
static HEADER: Schema = Schema { name: "HTTPHeader", fields: &[enforced("name"), enforced("value")] };
static MIRROR: Schema = Schema {
    name: "HTTPRequestMirrorFilter",
    fields: &[nested("backendRef", &MIRRORED), enforced("percent"), nested("fraction", &FRACTION)],
};
static FRACTION: Schema =
    Schema { name: "Fraction", fields: &[enforced("numerator"), enforced("denominator")] };
static REDIRECT: Schema = Schema {
    name: "HTTPRequestRedirectFilter",
    fields: &[
        enforced("scheme"),
        enforced("hostname"),
        nested("path", &PATH),
        enforced("port"),
        enforced("statusCode"),
    ],
};
static REWRITE: Schema =
    Schema { name: "HTTPURLRewriteFilter", fields: &[enforced("hostname"), nested("path", &PATH)] };
static PATH: Schema = Schema {
    name: "HTTPPathModifier",
    fields: &[enforced("type"), enforced("replaceFullPath"), enforced("replacePrefixMatch")],
};
static CORS: Schema = Schema {
    name: "HTTPCORSFilter",
    fields: &[
        enforced("allowOrigins"),
        enforced("allowCredentials"),
        enforced("allowMethods"),
        enforced("allowHeaders"),
        enforced("exposeHeaders"),
        enforced("maxAge"),
    ],
};

/// What the filters of a rule, or of a back end, come to.
#[derive(Default)]
pub(super) struct Filters {
    pub request_headers: Option<HeaderEdits>,
    pub response_headers: Option<HeaderEdits>,
    pub mirrors: Vec<(BackendDraft, Percent)>,
    pub redirect: Option<Redirect>,
    pub host: Option<HostRewrite>,
    pub path: Option<PathRewrite>,
    pub cors: Option<Cors>,
}

/// A kind of filter.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Request,
    Response,
    Mirror,
    Redirect,
    Rewrite,
    Cors,
}

/// Where each type has its settings.
const FIELDS: [(&str, Type); 6] = [
    ("requestHeaderModifier", Type::Request),
    ("responseHeaderModifier", Type::Response),
    ("requestMirror", Type::Mirror),
    ("requestRedirect", Type::Redirect),
    ("urlRewrite", Type::Rewrite),
    ("cors", Type::Cors),
];

/// The filters of HTTPRoute.
pub(super) const HTTP: [(&str, Type); 6] = [
    ("RequestHeaderModifier", Type::Request),
    ("ResponseHeaderModifier", Type::Response),
    ("RequestMirror", Type::Mirror),
    ("RequestRedirect", Type::Redirect),
    ("URLRewrite", Type::Rewrite),
    ("CORS", Type::Cors),
];

/// The filters of GRPCRoute.
pub(super) const GRPC: [(&str, Type); 3] = [
    ("RequestHeaderModifier", Type::Request),
    ("ResponseHeaderModifier", Type::Response),
    ("RequestMirror", Type::Mirror),
];

/// Reads `filters` of a rule.
pub(super) fn read(owner: &mut Fields<'_, '_>, namespace: &Str, types: &[(&str, Type)]) -> Filters {
    let mut filters = Filters::default();
    let mut seen = Vec::new();
    owner.each("filters", |item| {
        let Some(mut fields) = item.fields() else { return };
        let Some(kind) = fields.required("type").and_then(|c| word(c, types)) else { return };
        if kind != Type::Mirror && seen.contains(&kind) {
            fields.report(Code::InvalidValue, "a filter of this type is there already", "put both into one");
        }
        seen.push(kind);
        read_one(&mut fields, kind, namespace, &mut filters);
        let known = |other: Type| other != kind && types.iter().any(|(_, t)| *t == other);
        for (name, _) in FIELDS.iter().filter(|(_, other)| known(*other)) {
            if let Some(mut other) = fields.take(name) {
                other.invalid("does not go with this type", "make a filter of its own type of it");
            }
        }
    });
    if filters.redirect.is_some() && (filters.path.is_some() || filters.host.is_some()) {
        let message = "a rule redirects or rewrites, not both";
        owner.report(Code::InvalidValue, message, "remove one of RequestRedirect and URLRewrite");
    }
    filters
}

fn read_one(fields: &mut Fields<'_, '_>, kind: Type, namespace: &Str, filters: &mut Filters) {
    match kind {
        Type::Request => {
            filters.request_headers =
                fields.required("requestHeaderModifier").and_then(|c| modifier(c, true));
        }
        Type::Response => {
            filters.response_headers =
                fields.required("responseHeaderModifier").and_then(|c| modifier(c, false));
        }
        Type::Mirror => {
            filters.mirrors.extend(fields.required("requestMirror").and_then(|c| mirror(c, namespace)));
        }
        Type::Redirect => filters.redirect = fields.required("requestRedirect").and_then(redirect),
        Type::Rewrite => {
            let Some(mut rewrite) = fields.required("urlRewrite").and_then(Cursor::fields) else { return };
            let host = rewrite.take("hostname").and_then(hostname);
            filters.host = host.and_then(|host| Authority::new(&host)).map(HostRewrite::To);
            filters.path = rewrite.take("path").and_then(modified_path);
        }
        Type::Cors => filters.cors = fields.required("cors").and_then(cors),
    }
}

fn modifier(cursor: Cursor<'_, '_>, of_request: bool) -> Option<HeaderEdits> {
    let mut fields = cursor.fields()?;
    let mut edits: Vec<HeaderEdit> = Vec::new();
    let mut names: Vec<HeaderName> = Vec::new();
    let mut once = |cursor: &mut Fields<'_, '_>, name: &HeaderName| {
        if names.contains(name) {
            let message = format!("the header {name} is changed twice, and in which order is not defined");
            cursor.report(Code::InvalidValue, message, "change it once");
        }
        names.push(name.clone());
    };
    for set in [true, false] {
        fields.each(if set { "set" } else { "add" }, |item| {
            let Some(mut header) = item.fields() else { return };
            let name = header.required("name").and_then(|mut cursor| {
                let text = cursor.node().as_str().filter(|_| of_request);
                let taken = text.is_some_and(|name| is_the_clients(&mut cursor, name));
                if taken { None } else { edited_name(cursor) }
            });
            let value = header.required("value").and_then(edited_value);
            let (Some(name), Some(value)) = (name, value) else { return };
            once(&mut header, &name);
            edits.push(if set { HeaderEdit::Set(name, value) } else { HeaderEdit::Add(name, value) });
        });
    }
    let mut removed = Vec::new();
    fields.each("remove", |item| removed.extend(edited_name(item)));
    for name in removed {
        once(&mut fields, &name);
        edits.push(HeaderEdit::Remove(name));
    }
    Some(HeaderEdits(edits.into()))
}

fn mirror(cursor: Cursor<'_, '_>, namespace: &Str) -> Option<(BackendDraft, Percent)> {
    let mut fields = cursor.fields()?;
    let backend = fields
        .required("backendRef")
        .and_then(Cursor::fields)
        .and_then(|mut backend| read_backend(&mut backend, namespace));
    let percent = fields.integer("percent", 0..=100_u32).map(|p| Percent::of(p, 100));
    let fraction = fields.object("fraction").and_then(|mut fraction| {
        let numerator = fraction.required("numerator").and_then(|c| c.integer(0..=u32::MAX))?;
        let denominator = fraction.integer("denominator", 1..=u32::MAX).unwrap_or(100);
        if numerator > denominator {
            fraction.report(Code::InvalidValue, "the numerator is greater than the denominator", "");
        }
        Some(Percent::of(numerator, denominator))
    });
    if percent.is_some() && fraction.is_some() {
        fields.report(Code::InvalidValue, "percent and fraction are both set", "remove one");
    }
    Some((backend?, percent.or(fraction).unwrap_or(Percent::ALL)))
}

const STATUSES: [u16; 5] = [301, 302, 303, 307, 308];

fn redirect(cursor: Cursor<'_, '_>) -> Option<Redirect> {
    let mut fields = cursor.fields()?;
    let scheme = fields.take("scheme").and_then(|c| word(c, &[("http", "http"), ("https", "https")]));
    let host = fields.take("hostname").and_then(hostname);
    let path = fields.take("path").and_then(modified_path);
    let port = fields.integer("port", 1..=u16::MAX);
    let status = fields.take("statusCode").and_then(|mut cursor| {
        let node = cursor.node();
        let wanted = STATUSES.iter().copied().find(|s| node.value == crate::tree::Value::Int(i64::from(*s)));
        if wanted.is_none() {
            cursor.invalid("is no redirect", "write 301, 302, 303, 307 or 308");
        }
        wanted
    });
    // The scheme implies the port, unless neither is given: then the port is the listener's, here the request's.
    let port = port.or(scheme.map(|_| 0));
    Some(Redirect { status: status.unwrap_or(302), scheme: scheme.map(Into::into), host, port, path })
}

fn hostname(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    if !crate::metadata::is_subdomain(text) {
        cursor.invalid(format_args!("{text:?} is no host name"), "write a name without wildcard and port");
        return None;
    }
    Some(cursor.context().pool.string(text))
}

fn modified_path(cursor: Cursor<'_, '_>) -> Option<PathRewrite> {
    let mut fields = cursor.fields()?;
    let full = fields
        .required("type")
        .and_then(|c| word(c, &[("ReplaceFullPath", true), ("ReplacePrefixMatch", false)]))?;
    let (wanted, other) = if full {
        ("replaceFullPath", "replacePrefixMatch")
    } else {
        ("replacePrefixMatch", "replaceFullPath")
    };
    if let Some(mut cursor) = fields.take(other) {
        cursor.invalid(format_args!("does not go with this type"), format!("set {wanted}"));
    }
    let cursor = fields.required(wanted)?;
    if full {
        return path(cursor).map(PathRewrite::Full);
    }
    // An empty prefix is the root.
    if cursor.node().as_str() == Some("") {
        return Some(PathRewrite::Segments("".into()));
    }
    path(cursor).map(|prefix| PathRewrite::Segments(prefix.trim_end_matches('/').into()))
}

fn cors(cursor: Cursor<'_, '_>) -> Option<Cors> {
    let mut fields = cursor.fields()?;
    let mut cors = Cors::default();
    let mut origins = Vec::new();
    fields.each("allowOrigins", |item| origins.extend(origin(item)));
    if origins.len() > 1 && origins.contains(&Origin::Text(Pattern::Present)) {
        fields.report(Code::InvalidValue, "allowOrigins has * beside others", "write * alone");
    }
    cors.origins = origins.into();
    cors.credentials = fields.boolean("allowCredentials").unwrap_or(false);
    let mut list = |name| -> Box<[Str]> {
        let items = listed(&mut fields, name);
        if items.len() > 1 && items.iter().any(|item| &**item == "*") {
            fields.report(Code::InvalidValue, format!("{name} has * beside others"), "write * alone");
        }
        items.into()
    };
    cors.methods = list("allowMethods");
    cors.headers = list("allowHeaders");
    cors.expose = list("exposeHeaders");
    // The CRD's default.
    let seconds = fields.integer("maxAge", 1..=u32::MAX).unwrap_or(5);
    cors.max_age = Some(Duration::from_secs(u64::from(seconds)));
    Some(cors)
}

fn origin(mut cursor: Cursor<'_, '_>) -> Option<Origin> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    if text == "*" {
        return Some(Origin::Text(Pattern::Present));
    }
    let host = text.split_once("://").map(|(_, host)| host).filter(|h| !h.is_empty() && !h.contains('/'));
    if host.is_none() {
        cursor.invalid(format_args!("{text:?} is no origin"), "write https://example.com, or *");
        return None;
    }
    let pool = &mut cursor.context().pool;
    Some(match text.split_once('*') {
        Some((before, after)) => Origin::Wildcard { before: pool.string(before), after: pool.string(after) },
        None => Origin::Text(Pattern::Exact(pool.string(text))),
    })
}
