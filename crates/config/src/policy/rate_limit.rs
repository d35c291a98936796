//! RateLimit (`culvert.dev`): how many requests there may be to what `targetRefs` name. A resource of ours, since Istio
//! has none; it speaks Envoy's rate-limit protocol to services that count for all waypoints.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use model::http::{
    Bucket, Count, GlobalLimit, Limit, LimitHeaders, LimitKey, LimitMatch, PathPattern, Template,
};
use model::{Str, StringMatch};

use super::authorization::PolicyScope;
use super::pattern;
use super::providers::REMEDY;
use super::review::World;
use super::selector::{TARGET_REF, non_empty, read_targets};
use crate::compile::Finding;
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, silent};
use crate::form::{Form, words_of};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::RateLimit,
    group: "culvert.dev",
    versions: &["v1alpha1"],
    name: "RateLimit",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "RateLimit",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

static SPEC: Schema = Schema {
    name: "RateLimit.spec",
    fields: &[
        nested("targetRefs", &TARGET_REF).items(0, 16),
        nested("targetRef", &TARGET_REF),
        enforced("headers").of(Form::Words(&HEADERS_WORDS)),
        nested("global", &GLOBAL),
        nested("limits", &LIMIT).items(0, MAX_LIMITS).required(),
    ],
};

static GLOBAL: Schema = Schema {
    name: "RateLimit.spec.global",
    fields: &[
        enforced("service").of(Form::Text).required(),
        enforced("port").of(Form::Count(65_535)).required(),
        enforced("domain").of(Form::Text).required(),
        enforced("timeout").of(Form::Time),
        enforced("onFailure").of(Form::Words(&ON_FAILURE_WORDS)).required(),
    ],
};

static LIMIT: Schema = Schema {
    name: "RateLimit.spec.limits[]",
    fields: &[
        enforced("name").of(Form::Name(63)).required(),
        nested("match", &MATCH),
        nested("by", &BY).items(0, MAX_PARTS),
        nested("local", &LOCAL),
        nested("global", &HITS),
        enforced("dryRun").of(Form::Flag),
    ],
};

static MATCH: Schema = Schema {
    name: "RateLimit.spec.limits[].match",
    fields: &[
        enforced("methods").of(Form::Text).items(1, 64),
        enforced("paths").of(Form::Text).items(1, 256),
        nested("headers", &HEADER).items(0, 64),
    ],
};
static HEADER: Schema = Schema {
    name: "RateLimit.spec.limits[].match.headers[]",
    fields: &[enforced("name").of(Form::Text).required(), enforced("value").of(Form::Text)],
};
static BY: Schema = Schema {
    name: "RateLimit.spec.limits[].by[]",
    fields: &[
        enforced("type").of(Form::Words(&PARTS_WORDS)).required(),
        enforced("name").of(Form::Text),
        enforced("value").of(Form::Text),
    ],
};
static LOCAL: Schema = Schema {
    name: "RateLimit.spec.limits[].local",
    fields: &[
        enforced("requests").of(Form::Count(MAX_REQUESTS)).required(),
        enforced("per").of(Form::Time).required(),
        enforced("burst").of(Form::Count(MAX_REQUESTS)),
        enforced("maxKeys").of(Form::Count(MOST_KEYS)),
    ],
};
static HITS: Schema =
    Schema { name: "RateLimit.spec.limits[].global", fields: &[enforced("hits").of(Form::Count(MAX_HITS))] };

const HEADERS: [(&str, LimitHeaders); 3] =
    [("Standard", LimitHeaders::Standard), ("Legacy", LimitHeaders::Legacy), ("None", LimitHeaders::None)];
/// Whether a request passes that nobody counted.
const ON_FAILURE: [(&str, bool); 2] = [("Allow", true), ("Deny", false)];
const PARTS: [(&str, Part); 7] = [
    ("Path", Part::Path),
    ("Method", Part::Method),
    ("Header", Part::Header),
    ("Claim", Part::Claim),
    ("Identity", Part::Identity),
    ("Address", Part::Address),
    ("Constant", Part::Constant),
];

static HEADERS_WORDS: [&str; 3] = words_of(&HEADERS);
static ON_FAILURE_WORDS: [&str; 2] = words_of(&ON_FAILURE);
static PARTS_WORDS: [&str; 7] = words_of(&PARTS);

/// What requests are told apart by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Path,
    Method,
    Header,
    Claim,
    Identity,
    Address,
    Constant,
}

/// What a resource says of the service that counts.
enum Global {
    /// Nothing.
    Unsaid,
    /// What has errors, which are reported.
    Wrong,
    /// Which it is, and how it is asked.
    Said(Arc<GlobalLimit>),
}

/// How long a service that counts is waited for, unless it is said.
const TIMEOUT: Duration = Duration::from_millis(100);
/// How many values are counted at a time, unless it is said.
const MAX_KEYS: u32 = 10_000;
/// The most that may be said.
const MOST_KEYS: u32 = 1_000_000;
/// The most limits of a resource: each costs something for each request.
const MAX_LIMITS: u32 = 64;
/// The most parts of what a limit tells requests apart by.
const MAX_PARTS: u32 = 16;
const MAX_REQUESTS: u32 = 1_000_000_000;
const MAX_HITS: u32 = 1_000_000;

/// What a RateLimit says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RateLimit {
    /// What it is for.
    pub scope: PolicyScope,
    /// Which headers tell clients of it.
    pub headers: LimitHeaders,
    /// Its limits; `None` if it has errors and nothing is known of it from before: no request passes.
    pub limits: Option<Box<[Arc<Limit>]>>,
}

impl RateLimit {
    /// One that lets no request to what is in `scope` pass.
    pub(crate) fn closed(scope: PolicyScope) -> Self {
        Self { scope, headers: LimitHeaders::None, limits: None }
    }

    /// What to say of it in the light of what is defined.
    pub(super) fn review(&self, world: &dyn World) -> Vec<Finding> {
        let global = |limit: &Arc<Limit>| match &limit.count {
            Count::Global(global) => Some((global.address.clone(), limit.dry_run, global.fail_open)),
            Count::Local(_) => None,
        };
        // All of a resource are counted by one service. One that is in force says what becomes of requests.
        let counted = self.limits.iter().flatten().filter_map(global).min_by_key(|(_, dry_run, _)| *dry_run);
        let away = counted.and_then(|(address, dry_run, fail_open)| {
            world.away(&address).map(|away| (away, dry_run || fail_open))
        });
        let finding = |(away, pass)| Finding {
            code: Code::NamesNothing,
            message: format!(
                "{away}, which spec.global names: requests that are to be counted {}",
                if pass { "pass uncounted" } else { "are refused" }
            ),
            remedy: REMEDY.to_owned(),
        };
        away.map(finding).into_iter().collect()
    }
}

fn parse(fields: &mut Fields<'_, '_>, _: &Metadata<'_>) -> Option<Resource> {
    let mut spec = fields.required("spec")?.fields()?.without_nulls();
    let targets = read_targets(&mut spec);
    if targets.is_empty() {
        let message = "spec.targetRefs is missing: a limit is for a Service, a ServiceEntry or a Gateway";
        spec.report(Code::MissingField, message, "name what it is for");
    }
    let headers = spec.take("headers").and_then(|cursor| word(cursor, &HEADERS));
    let global = match spec.object("global") {
        Some(fields) => read_global(fields.without_nulls()).map_or(Global::Wrong, |g| Global::Said(g.into())),
        None => Global::Unsaid,
    };
    let mut limits: Vec<Arc<Limit>> = Vec::new();
    if let Some(cursor) = spec.required("limits") {
        cursor.each(|mut item| {
            if limits.len() == MAX_LIMITS as usize {
                item.invalid(format_args!("is one of more than {MAX_LIMITS} limits"), "split the resource");
                return;
            }
            let limit = item.fields().and_then(|f| read_limit(f.without_nulls(), &global, &limits));
            limits.extend(limit.map(Arc::new));
        });
    }
    Some(Resource::RateLimit(Box::new(RateLimit {
        scope: PolicyScope::Targets(targets.into()),
        headers: headers.unwrap_or_default(),
        limits: Some(limits.into()),
    })))
}

fn read_global(mut fields: Fields<'_, '_>) -> Option<GlobalLimit> {
    let address = super::providers::backend(&mut fields);
    let domain = fields.required("domain").and_then(non_empty).map(Str::from);
    let timeout = fields.take("timeout").and_then(super::providers::duration);
    // What happens when nobody counts has no answer that is right for all: it is said.
    let fail_open = fields.required("onFailure").and_then(|cursor| word(cursor, &ON_FAILURE));
    Some(GlobalLimit {
        address: address?,
        domain: domain?,
        timeout: timeout.unwrap_or(TIMEOUT),
        fail_open: fail_open?,
        hits: 1,
    })
}

fn read_limit(mut fields: Fields<'_, '_>, global: &Global, others: &[Arc<Limit>]) -> Option<Limit> {
    let name = fields.required("name").and_then(|mut cursor| {
        let text = cursor.node().as_str();
        let good = |name: &str| crate::metadata::is_label(name) && others.iter().all(|o| &*o.name != name);
        if text.is_some_and(|name| !good(name)) {
            cursor.invalid("a limit has a name of letters, digits and -, which no other has", "");
            return None;
        }
        cursor.string().map(Str::from)
    });
    let on = fields.object("match").map(|f| read_match(f.without_nulls())).unwrap_or_default();
    let mut by = Vec::new();
    fields.each("by", |item| by.extend(item.fields().and_then(|f| read_key(f.without_nulls()))));
    if by.len() > MAX_PARTS as usize {
        let message = format!("a limit has more than {MAX_PARTS} parts in `by`");
        fields.report(Code::InvalidValue, message, "split it");
    }
    let local = fields.object("local").map(|f| read_bucket(f.without_nulls()));
    let hits = fields.object("global").map(|f| {
        let mut f = f.without_nulls();
        f.integer("hits", 1..=MAX_HITS).unwrap_or(1)
    });
    let dry_run = fields.boolean("dryRun").unwrap_or(false);
    let count = match (local, hits, global) {
        (Some(bucket), None, _) => Count::Local(bucket?),
        (None, Some(hits), Global::Said(global)) => {
            let limit = GlobalLimit { hits, ..(**global).clone() };
            if by.is_empty() {
                let message = "a global limit needs something in `by`: its service knows limits by it";
                fields.report(Code::MissingField, message, "add one, such as {type: Constant, name: …}");
            }
            Count::Global(if hits == 1 { global.clone() } else { Arc::new(limit) })
        }
        (None, Some(_), Global::Wrong) => return None,
        (None, Some(_), Global::Unsaid) => {
            let message = "the limit is counted by a service, and spec.global names none";
            fields.report(Code::MissingField, message, "name it, or write local");
            return None;
        }
        (Some(_), Some(_), _) | (None, None, _) => {
            let message = "a limit is counted either by each waypoint or by a service";
            fields.report(Code::InvalidValue, message, "set one of local and global");
            return None;
        }
    };
    Some(Limit { name: name?, on, by: by.into(), count, dry_run })
}

fn read_bucket(mut fields: Fields<'_, '_>) -> Option<Bucket> {
    let requests = fields.required("requests").and_then(|c| c.integer(1..=MAX_REQUESTS));
    let per = fields.required("per").and_then(super::providers::duration);
    let burst = fields.integer("burst", 1..=MAX_REQUESTS);
    let max_keys = fields.integer("maxKeys", 1..=MOST_KEYS);
    Some(Bucket {
        requests: requests?,
        per: per?,
        burst: burst.or(requests)?,
        max_keys: max_keys.unwrap_or(MAX_KEYS),
    })
}

fn read_match(mut fields: Fields<'_, '_>) -> LimitMatch {
    let methods = pattern::read_list(&mut fields, "methods", |c| non_empty(c).map(Str::from));
    let paths = pattern::read_list(&mut fields, "paths", path);
    let mut headers = Vec::new();
    fields.each("headers", |item| {
        let Some(mut fields) = item.fields().map(Fields::without_nulls) else { return };
        let name = fields.required("name").and_then(header_name);
        let value = match fields.take("value") {
            Some(cursor) => non_empty(cursor).map(StringMatch::parse),
            None => Some(StringMatch::Presence),
        };
        headers.extend(name.zip(value));
    });
    LimitMatch { methods, paths, headers: headers.into() }
}

fn path(mut cursor: Cursor<'_, '_>) -> Option<PathPattern> {
    let Some(text) = cursor.node().as_str() else {
        cursor.string();
        return None;
    };
    match Template::parse(text) {
        Ok(Some(template)) => Some(PathPattern::Template(template)),
        Ok(None) => pattern::text(cursor).map(PathPattern::Text),
        Err(error) => {
            cursor.invalid(format_args!("{text:?}: {error}"), "");
            None
        }
    }
}

fn read_key(mut fields: Fields<'_, '_>) -> Option<LimitKey> {
    let kind = fields.required("type").and_then(|cursor| word(cursor, &PARTS))?;
    let named = matches!(kind, Part::Header | Part::Claim | Part::Constant);
    for (name, meant) in [("name", named), ("value", kind == Part::Constant)] {
        if let (false, Some(mut cursor)) = (meant, fields.take(name)) {
            cursor.invalid("means nothing to this type", "remove it");
        }
    }
    Some(match kind {
        Part::Path => LimitKey::Path,
        Part::Method => LimitKey::Method,
        Part::Identity => LimitKey::Identity,
        Part::Address => LimitKey::Address,
        Part::Header => LimitKey::Header(fields.required("name").and_then(header_name)?),
        Part::Claim => {
            let claim = fields.required("name").and_then(non_empty)?;
            LimitKey::Claim(claim.split('.').map(Str::from).collect())
        }
        Part::Constant => LimitKey::Constant {
            key: fields.required("name").and_then(non_empty)?.into(),
            value: fields.required("value").and_then(non_empty)?.into(),
        },
    })
}

fn header_name(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let text = cursor.node().as_str();
    let name = text.and_then(|text| HeaderName::from_bytes(text.as_bytes()).ok());
    if name.is_none() && text.is_some() {
        cursor.invalid("is no name of a header field", "");
    }
    cursor.string()?;
    name.map(|name| name.as_str().into())
}

/// One of a few words.
fn word<T: Copy>(mut cursor: Cursor<'_, '_>, words: &[(&str, T)]) -> Option<T> {
    let text = cursor.node().as_str();
    let found = words.iter().find(|(word, _)| Some(*word) == text).map(|(_, value)| *value);
    if found.is_none() && text.is_some() {
        let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        cursor.invalid("is none of the values", format!("write one of {}", all.join(", ")));
    }
    cursor.string()?;
    found
}
