//! Objects of the API server, decoded by the tables of `config` ([`config::json`]): what the mesh does not read of them
//! is never kept.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};

use config::json::{Decoded, ObjectSeed};
use config::resource::Kind;
use kube::api::{ApiResource, ObjectMeta};
use kube::core::DynamicResourceScope;
use serde::de::DeserializeSeed;
use serde::{Deserialize, Deserializer};

/// A kind that is watched. A type for each, because what decodes a list of objects knows only their type.
pub trait Watched: Clone + fmt::Debug + Send + Sync + 'static {
    /// The kind.
    const KIND: Kind;
}

/// Something that is done for each of several kinds.
pub trait ForKinds {
    /// Does it for one.
    fn of<W: Watched>(&mut self);
}

macro_rules! watched {
    (first: $($first:ident),* ; others: $($other:ident),* $(,)?) => {
        watched!(types: $($first,)* $($other,)*);

        /// The kinds that are watched once namespaces and the mesh's settings are known.
        pub const OTHERS: [Kind; [$(Kind::$other),*].len()] = [$(Kind::$other),*];

        /// Does something for each of [`OTHERS`].
        pub fn for_others(what: &mut impl ForKinds) {
            $(what.of::<$other>();)*
        }
    };
    (types: $($name:ident,)*) => {$(
        #[doc = concat!("The kind ", stringify!($name), ".")]
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl Watched for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}

// What the chart's ClusterRole (templates/control-plane-rbac.yaml) allows has to be the same.
watched!(
    first: Namespace, ConfigMap;
    others:
    Node,
    Pod,
    Service,
    EndpointSlice,
    ServiceAccount,
    AuthorizationPolicy,
    PeerAuthentication,
    RequestAuthentication,
    RateLimit,
    Telemetry,
    ServiceEntry,
    WorkloadEntry,
    WorkloadGroup,
    Gateway,
    HttpRoute,
    GrpcRoute,
    TcpRoute,
    TlsRoute,
    ReferenceGrant,
    VirtualService,
    DestinationRule,
);

/// An object of a kind.
#[derive(Clone, Debug)]
pub struct Object<W> {
    /// What `kube` needs to know of it: name, namespace, resource version.
    metadata: ObjectMeta,
    /// What the mesh reads of it.
    pub decoded: Decoded,
    kind: PhantomData<W>,
}

impl<'de, W: Watched> Deserialize<'de> for Object<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let decoded = ObjectSeed { kind: W::KIND, unknown: &report_unknown }.deserialize(deserializer)?;
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let metadata = ObjectMeta {
            name: some(decoded.metadata("name")),
            namespace: some(decoded.metadata("namespace")),
            resource_version: some(&decoded.bookkeeping.resource_version),
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, decoded, kind: PhantomData })
    }
}

impl<W: Watched> kube::Resource for Object<W> {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn api_version(resource: &ApiResource) -> Cow<'_, str> {
        resource.api_version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// The fields that were said to be unknown; as many as a newer server could have.
static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
const MOST_SAID: usize = 200;

/// Says, once, that a field of Kubernetes' own kinds is not known to this version.
fn report_unknown(schema: &'static str, key: &str) {
    let field: String = format!("{schema}.{key}").chars().take(200).collect();
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.len() < MOST_SAID && said.insert(field.clone()) {
        tracing::info!(field, "a newer API server's field, which this version does not know, has no effect");
    }
}

/// The fields that this version does not know and has seen.
#[must_use]
pub fn unknown_fields() -> Vec<String> {
    SAID.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
}

#[cfg(test)]
mod tests {
    use config::resource::KINDS;

    use super::*;

    #[test]
    fn every_kind_that_is_read_is_watched() {
        let of_files = [Kind::Namespace, Kind::ConfigMap, Kind::MeshConfig];
        let missing: Vec<&str> = KINDS
            .iter()
            .filter(|spec| !OTHERS.contains(&spec.kind) && !of_files.contains(&spec.kind))
            .map(|spec| spec.name)
            .collect();
        assert!(missing.is_empty(), "add them to `watched!` and to the chart's ClusterRole: {missing:?}");
    }
}
