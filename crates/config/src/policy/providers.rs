//! `extensionProviders` and `defaultProviders` of the mesh's settings: the services that decide over requests, or take
//! traces, metrics and access logs of them.
//!
//! Only a waypoint sees requests. What the providers say is read and checked all the same, whole: a mistake in the
//! settings is found when they are written, and a policy with the action CUSTOM that names a provider which there is not
//! is told so, see [`Providers::for_custom`].

mod takers;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use model::http::{Authorizer, BodyCheck, HttpCheck, ProviderAddress};
use model::telemetry::{Exporter, LogEntries, LogFormat};
use model::{Change, Str, StringMatch};

pub(super) use takers::{log_format, log_path};

use super::review::World;
use crate::compile::Finding;
use crate::diagnostic::Code;
use crate::external::host::is_host;
use crate::fields::{Cursor, Field, Fields, Schema, enforced, nested};
use crate::metadata::is_label;

/// A provider.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Provider {
    /// Its name, the only one of its kind.
    pub name: Str,
    /// Where it is; `None` for kinds that are not reached over the network.
    pub backend: Option<ProviderAddress>,
    /// What it does.
    pub kind: ProviderKind,
}

/// What a provider does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProviderKind {
    /// Decides over requests (`envoyExtAuthzHttp`, `envoyExtAuthzGrpc`).
    Authorizer(Arc<Authorizer>),
    /// Is asked for metrics (`prometheus`).
    Prometheus,
    /// A file of log lines (`envoyFileAccessLog`).
    FileLog {
        /// Its path.
        path: Str,
        /// What a line looks like.
        format: LogFormat,
    },
    /// Takes log entries over gRPC (`envoyHttpAls`, `envoyTcpAls`, `envoyOtelAls`).
    LogService {
        /// What the log is called.
        name: Str,
        /// What it takes.
        entries: LogEntries,
    },
    /// Takes spans (`opentelemetry`, `zipkin`).
    Spans {
        /// How.
        exporter: Box<Exporter>,
        /// The longest path that an attribute shows, in bytes.
        max_tag_length: Option<u32>,
    },
    /// Does what nothing here asks for; under its field's name.
    Other(&'static str),
}

/// All providers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Providers {
    all: Vec<Provider>,
    defaults: Defaults,
}

/// The names of the providers that are used where no Telemetry says others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Defaults {
    /// For traces.
    pub tracing: Vec<Str>,
    /// For metrics.
    pub metrics: Vec<Str>,
    /// For access logs.
    pub access_logging: Vec<Str>,
}

/// What to do where something else is asked of a service that there is not.
pub(super) const REMEDY: &str = "write the host name of a Service (NAME.NAMESPACE.svc.cluster.local) or of a \
     ServiceEntry, and a port that it has";

/// Providers that there are without being defined, as upstream has them.
const BUILT_IN: [&str; 3] = ["prometheus", "stackdriver", "envoy"];

impl Providers {
    /// The providers, as they are written.
    #[must_use]
    pub fn all(&self) -> &[Provider] {
        &self.all
    }

    /// The names of the defaults.
    #[must_use]
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// The provider of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Provider> {
        self.all.iter().find(|provider| &*provider.name == name)
    }

    fn authorizers(&self) -> impl Iterator<Item = &Arc<Authorizer>> {
        self.all.iter().filter_map(|provider| match &provider.kind {
            ProviderKind::Authorizer(authorizer) => Some(authorizer),
            _ => None,
        })
    }

    /// What changes for waypoints where `new` take the place of these.
    pub(super) fn authorizer_changes(&self, new: &Self) -> Vec<Change> {
        let gone = self.authorizers().filter(|old| new.authorizers().all(|new| new.name != old.name));
        let gone = gone.map(|old| Change::RemoveAuthorizer(old.name.clone()));
        let set = new.authorizers().filter(|new| self.authorizers().all(|old| old != *new));
        gone.chain(set.map(|new| Change::SetAuthorizer(new.clone()))).collect()
    }

    /// What to say of a policy that has this provider decide.
    #[must_use]
    pub(super) fn for_custom(&self, name: &str) -> Option<Finding> {
        let message = match self.get(name).map(|provider| &provider.kind) {
            Some(ProviderKind::Authorizer(_)) => return None,
            Some(ProviderKind::Other(kind)) => {
                format!("the provider {name} is a {kind}, which decides over nothing")
            }
            Some(_) => {
                format!("the provider {name} takes what is told of requests, and decides over nothing")
            }
            None => format!("there is no provider {name} in the mesh's settings (extensionProviders)"),
        };
        let authorizers = self.all.iter().filter(|p| matches!(p.kind, ProviderKind::Authorizer(_)));
        let names: Vec<&str> = authorizers.map(|p| &*p.name).collect();
        let remedy = if names.is_empty() {
            "define it with envoyExtAuthzHttp or envoyExtAuthzGrpc".to_owned()
        } else {
            format!("define it, or name one of: {}", names.join(", "))
        };
        Some(Finding { code: Code::NamesNothing, message, remedy })
    }

    /// What to say of the settings themselves in the light of what is defined.
    pub(super) fn review(&self, world: &dyn World) -> Vec<Finding> {
        let defaults = [&self.defaults.tracing, &self.defaults.metrics, &self.defaults.access_logging];
        let unknown = |name: &&Str| self.get(name).is_none() && !BUILT_IN.contains(&&***name);
        let unknown = defaults.into_iter().flatten().filter(unknown).map(|name| Finding {
            code: Code::NamesNothing,
            message: format!("defaultProviders name {name}, and no extension provider has this name"),
            remedy: String::new(),
        });
        let away = self.all.iter().filter_map(|provider| {
            let backend = provider.backend.as_ref()?;
            Some(Finding {
                code: Code::NamesNothing,
                message: format!("{} for the extension provider {}", world.away(backend)?, provider.name),
                remedy: REMEDY.to_owned(),
            })
        });
        unknown.chain(away).collect()
    }
}

pub(super) static DEFAULTS: Schema = Schema {
    name: "MeshConfig.spec.defaultProviders",
    fields: &[enforced("tracing"), enforced("metrics"), enforced("accessLogging")],
};

pub(super) static PROVIDER: Schema = Schema {
    name: "MeshConfig.spec.extensionProviders[]",
    fields: &[
        enforced("name"),
        nested("envoyExtAuthzHttp", &AUTHZ_HTTP),
        nested("envoyExtAuthzGrpc", &AUTHZ_GRPC),
        nested("opentelemetry", &OPENTELEMETRY),
        nested("zipkin", &ZIPKIN),
        nested("prometheus", &NOTHING),
        nested("envoyFileAccessLog", &FILE_LOG),
        nested("envoyOtelAls", &OTEL_LOG),
        nested("envoyHttpAls", &HTTP_LOG),
        nested("envoyTcpAls", &TCP_LOG),
        nested("skywalking", &SKYWALKING),
        nested("datadog", &DATADOG),
        nested("lightstep", &LIGHTSTEP),
        nested("opencensus", &OPENCENSUS),
        nested("stackdriver", &STACKDRIVER),
        nested("sds", &SDS),
    ],
};

const fn schema(name: &'static str, fields: &'static [Field]) -> Schema {
    Schema { name, fields }
}

const SERVICE: Field = enforced("service");
const PORT: Field = enforced("port");
const TAG_LENGTH: Field = enforced("maxTagLength");
const TIMEOUT: Field = enforced("timeout");

static NOTHING: Schema = schema("ExtensionProvider.prometheus", &[]);
static AUTHZ_HTTP: Schema = schema(
    "ExtensionProvider.envoyExtAuthzHttp",
    &[
        SERVICE,
        PORT,
        TIMEOUT,
        enforced("pathPrefix"),
        enforced("failOpen"),
        enforced("clearRouteCache"),
        enforced("statusOnError"),
        enforced("includeHeadersInCheck"),
        enforced("includeRequestHeadersInCheck"),
        enforced("includeAdditionalHeadersInCheck"),
        nested("includeRequestBodyInCheck", &BODY),
        enforced("headersToUpstreamOnAllow"),
        enforced("headersToDownstreamOnDeny"),
        enforced("headersToDownstreamOnAllow"),
    ],
);
static AUTHZ_GRPC: Schema = schema(
    "ExtensionProvider.envoyExtAuthzGrpc",
    &[
        SERVICE,
        PORT,
        TIMEOUT,
        enforced("failOpen"),
        enforced("clearRouteCache"),
        enforced("statusOnError"),
        nested("includeRequestBodyInCheck", &BODY),
    ],
);
static BODY: Schema = schema(
    "ExtensionProvider.includeRequestBodyInCheck",
    &[enforced("maxRequestBytes"), enforced("allowPartialMessage"), enforced("packAsBytes")],
);
static HEADER: Schema =
    schema("ExtensionProvider.headers[]", &[enforced("name"), enforced("value"), enforced("envName")]);
static HTTP_SERVICE: Schema =
    schema("ExtensionProvider.http", &[enforced("path"), TIMEOUT, nested("headers", &HEADER)]);
static GRPC_SERVICE: Schema =
    schema("ExtensionProvider.grpc", &[TIMEOUT, nested("initialMetadata", &HEADER)]);
static DETECTORS: Schema = schema(
    "ExtensionProvider.resourceDetectors",
    &[nested("environment", &NO_FIELDS), nested("dynatrace", &NO_FIELDS)],
);
static NO_FIELDS: Schema = schema("ExtensionProvider.resourceDetectors.environment", &[]);
static SAMPLER: Schema = schema(
    "ExtensionProvider.dynatraceSampler",
    &[
        enforced("tenant"),
        enforced("clusterId"),
        enforced("rootSpansPerMinute"),
        nested("httpService", &SAMPLER_API),
    ],
);
static SAMPLER_API: Schema =
    schema("ExtensionProvider.dynatraceSampler.httpService", &[SERVICE, PORT, nested("http", &HTTP_SERVICE)]);
static OPENTELEMETRY: Schema = schema(
    "ExtensionProvider.opentelemetry",
    &[
        SERVICE,
        PORT,
        TAG_LENGTH,
        nested("http", &HTTP_SERVICE),
        nested("grpc", &GRPC_SERVICE),
        nested("resourceDetectors", &DETECTORS),
        enforced("serviceAttributeEnrichment"),
        nested("dynatraceSampler", &SAMPLER),
    ],
);
static ZIPKIN: Schema = schema(
    "ExtensionProvider.zipkin",
    &[
        SERVICE,
        PORT,
        TAG_LENGTH,
        enforced("enable64bitTraceId"),
        enforced("path"),
        enforced("traceContextOption"),
        TIMEOUT,
        nested("headers", &HEADER),
    ],
);
static LIGHTSTEP: Schema =
    schema("ExtensionProvider.lightstep", &[SERVICE, PORT, enforced("accessToken"), TAG_LENGTH]);
static DATADOG: Schema = schema("ExtensionProvider.datadog", &[SERVICE, PORT, TAG_LENGTH]);
static SKYWALKING: Schema = schema("ExtensionProvider.skywalking", &[SERVICE, PORT, enforced("accessToken")]);
static OPENCENSUS: Schema =
    schema("ExtensionProvider.opencensus", &[SERVICE, PORT, enforced("context"), TAG_LENGTH]);
static STACKDRIVER: Schema = schema(
    "ExtensionProvider.stackdriver",
    &[
        enforced("debug"),
        enforced("maxNumberOfAttributes"),
        enforced("maxNumberOfAnnotations"),
        enforced("maxNumberOfMessageEvents"),
        TAG_LENGTH,
        nested("logging", &LABELS),
    ],
);
static LABELS: Schema = schema("ExtensionProvider.stackdriver.logging", &[enforced("labels")]);
static LOG_FORMAT: Schema = schema("ExtensionProvider.logFormat", &[enforced("text"), enforced("labels")]);
static FILE_LOG: Schema = schema(
    "ExtensionProvider.envoyFileAccessLog",
    &[enforced("path"), nested("logFormat", &LOG_FORMAT), enforced("omitEmptyValues")],
);
static OTEL_LOG: Schema = schema(
    "ExtensionProvider.envoyOtelAls",
    &[SERVICE, PORT, enforced("logName"), nested("logFormat", &LOG_FORMAT)],
);
static TCP_LOG: Schema = schema(
    "ExtensionProvider.envoyTcpAls",
    &[SERVICE, PORT, enforced("logName"), enforced("filterStateObjectsToLog")],
);
static HTTP_LOG: Schema = schema(
    "ExtensionProvider.envoyHttpAls",
    &[
        SERVICE,
        PORT,
        enforced("logName"),
        enforced("filterStateObjectsToLog"),
        enforced("additionalRequestHeadersToLog"),
        enforced("additionalResponseHeadersToLog"),
        enforced("additionalResponseTrailersToLog"),
    ],
);
static SDS: Schema = schema("ExtensionProvider.sds", &[enforced("name"), SERVICE, PORT]);

/// Reads both fields of the settings.
pub(super) fn read(spec: &mut Fields<'_, '_>) -> Providers {
    let mut found = Providers::default();
    spec.each("extensionProviders", |item| {
        if let Some(fields) = item.fields() {
            provider(fields.without_nulls(), &mut found.all);
        }
    });
    if let Some(mut defaults) = spec.object("defaultProviders") {
        let mut names = |field| defaults.string_list(field).into_iter().map(Str::from).collect();
        found.defaults = Defaults {
            tracing: names("tracing"),
            metrics: names("metrics"),
            access_logging: names("accessLogging"),
        };
    }
    found
}

fn provider(mut fields: Fields<'_, '_>, all: &mut Vec<Provider>) {
    let name = fields.required("name").and_then(|mut cursor| {
        let text = cursor.node().as_str();
        if text.is_some_and(|name| name.is_empty() || all.iter().any(|other| &*other.name == name)) {
            cursor.invalid("a provider has a name, which no other has", "");
        }
        cursor.string()
    });
    let mut kinds = Vec::new();
    for field in PROVIDER.fields {
        if let (Some(schema), Some(cursor)) = (field.nested, fields.take(field.name)) {
            kinds.extend(of_kind(field.name, schema, cursor, name));
        }
    }
    let count = kinds.len();
    match (name, kinds.pop()) {
        (Some(name), Some((backend, kind))) if count == 1 => {
            all.push(Provider { name: name.into(), backend, kind });
        }
        (_, None) => fields.report(
            Code::MissingField,
            "a provider is of some kind, and this one of none",
            "set one of envoyExtAuthzGrpc, envoyExtAuthzHttp, opentelemetry and the others",
        ),
        (_, Some(_)) if count > 1 => {
            fields.report(
                Code::InvalidValue,
                "a provider is of one kind, and this one of several",
                "split it",
            );
        }
        _ => {}
    }
}

fn of_kind(
    name: &'static str,
    schema: &'static Schema,
    mut cursor: Cursor<'_, '_>,
    provider: Option<&str>,
) -> Option<(Option<ProviderAddress>, ProviderKind)> {
    let authorizer = name.starts_with("envoyExtAuthz");
    let told = takers::KINDS.contains(&name);
    if !authorizer && !told {
        let message = format!("a provider of the kind {name} has no effect: no proxy here speaks to one");
        cursor.report(Code::FieldNotApplicable, message, "");
    }
    let mut fields = cursor.fields()?.without_nulls();
    let has = |wanted: &str| schema.fields.iter().any(|field| field.name == wanted);
    let backend = if has("service") { backend(&mut fields) } else { None };
    let kind = if authorizer {
        let read = read_authorizer(&mut fields, name.ends_with("Http"));
        // Without an address the settings are refused, whole, which was said.
        let address = backend.clone().unwrap_or_else(|| read.address.clone());
        let name = provider.unwrap_or_default().into();
        ProviderKind::Authorizer(Arc::new(Authorizer { name, address, ..read }))
    } else if told {
        takers::read(name, &mut fields)
    } else {
        for field in schema.fields {
            check(&mut fields, field.name, field.nested);
        }
        ProviderKind::Other(name)
    };
    Some((backend, kind))
}

pub(super) fn backend(fields: &mut Fields<'_, '_>) -> Option<ProviderAddress> {
    let service = fields.required("service").and_then(|mut cursor| {
        let text = cursor.node().as_str().unwrap_or_default();
        let (namespace, host) = match text.split_once('/') {
            Some((namespace, host)) => (Some(namespace), host),
            None => (None, text),
        };
        let good = is_host(host) && namespace.is_none_or(is_label);
        if !good && cursor.node().as_str().is_some() {
            cursor.invalid("is no host name, nor NAMESPACE/HOST", "such as authz.shop.svc.cluster.local");
        }
        cursor.string()?;
        good.then(|| (namespace.map(Str::from), Str::from(host.to_ascii_lowercase())))
    });
    let port = fields.required("port").and_then(|cursor| cursor.integer(1..=u16::MAX));
    let (namespace, host) = service?;
    Some(ProviderAddress { namespace, host, port: port? })
}

/// The most of a request's body that an authorizer is shown: all of it waits in memory meanwhile.
const MAX_SHOWN_BODY: u32 = 8 << 20;

/// Reads how an authorizer is asked; its name and address are the caller's to fill in.
fn read_authorizer(fields: &mut Fields<'_, '_>, http: bool) -> Authorizer {
    let address = ProviderAddress { namespace: None, host: "".into(), port: 0 };
    Authorizer {
        name: "".into(),
        address,
        timeout: fields.take("timeout").and_then(duration),
        fail_open: fields.boolean("failOpen").unwrap_or(false),
        clear_route_cache: fields.boolean("clearRouteCache").unwrap_or(false),
        status_on_error: fields.take("statusOnError").and_then(status),
        body: fields.object("includeRequestBodyInCheck").and_then(|mut body| {
            let max_bytes = body.required("maxRequestBytes").and_then(|c| c.integer(1..=MAX_SHOWN_BODY));
            let allow_partial = body.boolean("allowPartialMessage").unwrap_or(false);
            let as_bytes = body.boolean("packAsBytes").unwrap_or(false);
            Some(BodyCheck { max_bytes: max_bytes?, allow_partial, as_bytes })
        }),
        http: http.then(|| read_http_check(fields)),
    }
}

fn read_http_check(fields: &mut Fields<'_, '_>) -> HttpCheck {
    let names = |fields: &mut Fields<'_, '_>, name| -> Box<[StringMatch]> {
        let list = fields.string_list(name).into_iter();
        list.map(|name| StringMatch::parse(&name.to_ascii_lowercase())).collect()
    };
    let path_prefix = fields.take("pathPrefix").and_then(|mut cursor| {
        let is_path = |path: &str| path.starts_with('/') && path.parse::<http::uri::PathAndQuery>().is_ok();
        if cursor.node().as_str().is_some_and(|path| !is_path(path)) {
            cursor.invalid("is no path that begins with /", "such as /check");
        }
        cursor.string()
    });
    let mut request_headers = names(fields, "includeRequestHeadersInCheck");
    let older = names(fields, "includeHeadersInCheck");
    // As upstream: the older field counts where the newer is not set.
    if request_headers.is_empty() {
        request_headers = older;
    }
    let mut additional = Vec::new();
    if let Some(cursor) = fields.take("includeAdditionalHeadersInCheck") {
        cursor.entries(|name, mut value| {
            let good = HeaderName::from_bytes(name.as_bytes()).is_ok()
                && value.node().as_str().is_none_or(|text| HeaderValue::from_str(text).is_ok());
            if !good {
                value.invalid("is no header field", "");
            }
            additional.extend(value.string().map(|text| (name.to_ascii_lowercase().into(), text.into())));
        });
    }
    HttpCheck {
        path_prefix: path_prefix.map(Str::from),
        request_headers,
        additional_headers: additional.into(),
        to_upstream_on_allow: names(fields, "headersToUpstreamOnAllow"),
        to_downstream_on_deny: names(fields, "headersToDownstreamOnDeny"),
        to_downstream_on_allow: names(fields, "headersToDownstreamOnAllow"),
    }
}

/// Checks a field of a provider that has no effect here; a name means the same type in all of them.
fn check(fields: &mut Fields<'_, '_>, name: &'static str, nested: Option<&'static Schema>) {
    match name {
        // They were read, where they are the provider's own.
        "service" | "port" => {
            let _ = fields.take(name);
        }
        "timeout" => {
            let _ = fields.take(name).and_then(duration);
        }
        "maxTagLength" | "rootSpansPerMinute" => {
            let _: Option<u32> = fields.integer(name, 0..=u32::MAX);
        }
        "clusterId" => {
            let _: Option<i32> = fields.integer(name, i32::MIN..=i32::MAX);
        }
        "maxNumberOfAttributes" | "maxNumberOfAnnotations" | "maxNumberOfMessageEvents" => {
            let _: Option<i64> = fields.integer(name, 0..=i64::MAX);
        }
        "enable64bitTraceId" | "debug" | "omitEmptyValues" => {
            let _ = fields.boolean(name);
        }
        "traceContextOption" => choice(fields.take(name), &["USE_B3", "USE_B3_WITH_W3C_PROPAGATION"]),
        "serviceAttributeEnrichment" => {
            choice(fields.take(name), &["ISTIO_CANONICAL", "OTEL_SEMANTIC_CONVENTIONS"]);
        }
        "context" => fields.each(name, |item| {
            choice(
                Some(item),
                &["UNSPECIFIED", "W3C_TRACE_CONTEXT", "GRPC_BIN", "CLOUD_TRACE_CONTEXT", "B3"],
            );
        }),
        "labels" => {
            if let Some(cursor) = fields.take(name) {
                cursor.entries(|_, _| ());
            }
        }
        "headers" | "initialMetadata" => fields.each(name, |item| {
            if let (Some(mut header), Some(schema)) = (item.fields(), nested) {
                header.required("name").map(Cursor::string);
                for field in schema.fields.iter().filter(|f| f.name != "name") {
                    let _ = header.string(field.name);
                }
            }
        }),
        _ if name.ends_with("ToLog") => {
            let _ = fields.string_list(name);
        }
        _ => match nested {
            Some(schema) => {
                if let Some(mut below) = fields.object(name) {
                    if schema.fields.iter().any(|field| field.name == "service") {
                        backend(&mut below);
                    }
                    schema.fields.iter().for_each(|field| check(&mut below, field.name, field.nested));
                }
            }
            None => {
                let _ = fields.string(name);
            }
        },
    }
}

fn choice(cursor: Option<Cursor<'_, '_>>, values: &[&str]) {
    let Some(mut cursor) = cursor else { return };
    if cursor.node().as_str().is_some_and(|text| !values.contains(&text)) {
        cursor.invalid("is none of the values", format!("write one of {}", values.join(", ")));
    }
    cursor.string();
}

/// A time as it is written in settings: a number and its unit, such as `0.5s` or `200ms`.
pub(super) fn duration(mut cursor: Cursor<'_, '_>) -> Option<Duration> {
    let text = cursor.node().as_str();
    let seconds = text.and_then(|text| {
        let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let (number, factor) =
            units.into_iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
        let plain = number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        plain.then(|| number.parse::<f64>().ok()).flatten().map(|number| number * factor)
    });
    let read = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).filter(|d| d.as_millis() > 0);
    if read.is_none() && text.is_some() {
        cursor.invalid("is no time of at least 1ms", "such as 1.5s or 200ms");
    }
    cursor.string()?;
    read
}

/// The status of an answer: a number, which upstream has as a string.
fn status(mut cursor: Cursor<'_, '_>) -> Option<u16> {
    let text = cursor.node().as_str();
    let read = text.and_then(|text| text.parse().ok()).filter(|status| (200..=599).contains(status));
    if read.is_none() && text.is_some() {
        cursor.invalid("is no status of HTTP", "such as \"403\"");
    }
    cursor.string()?;
    read
}
