//! How near endpoints are, and what share of the requests the parts of a destination get.

use std::sync::Arc;

use model::http::LocalitySetting;
use model::{HealthPolicy, LoadBalancing, LoadBalancingMode, Locality, Str, Workload};

use crate::balancer::Client;
use crate::partition::agrees;

/// Where the proxy is that chooses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// Its place.
    pub client: Client,
    /// Its labels.
    pub labels: Arc<[(Str, Str)]>,
}

/// What tells near endpoints from far ones.
#[derive(Clone, Copy, Debug)]
pub struct Nearness<'a> {
    /// What the service says (`trafficDistribution`, `internalTrafficPolicy`).
    pub service: &'a LoadBalancing,
    /// What the destination's policy says of localities.
    pub setting: Option<&'a LocalitySetting>,
    /// Whether it may say which endpoints come first: only where those that fail are left out.
    pub failover: bool,
}

/// Where an endpoint belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rank {
    /// Lower is nearer.
    pub(crate) tier: u32,
    /// The part of the tier.
    pub(crate) zone: u32,
}

/// Ranks endpoints for a proxy.
#[derive(Debug)]
pub(crate) struct Ranking<'a> {
    origin: &'a Origin,
    nearness: Nearness<'a>,
    /// Where the requests of the proxy's locality go: patterns and shares, the most specific first.
    shares: Vec<(&'a str, u32)>,
}

impl<'a> Ranking<'a> {
    pub(crate) fn new(origin: &'a Origin, nearness: Nearness<'a>) -> Self {
        let here = &origin.client.locality;
        let distribute = nearness.setting.map_or(&[][..], |setting| &setting.distribute);
        let mine = distribute.iter().find(|distribution| matches(&distribution.from, here));
        let mut shares: Vec<(&str, u32)> =
            mine.map_or(&[][..], |mine| &mine.to).iter().map(|(to, share)| (&**to, *share)).collect();
        let specific = |pattern: &str| pattern.split('/').filter(|part| *part != "*").count();
        shares.sort_by_key(|(pattern, _)| std::cmp::Reverse(specific(pattern)));
        Self { origin, nearness, shares }
    }

    /// The share of each zone; one zone has all, where nothing is distributed.
    pub(crate) fn shares(&self) -> Vec<u32> {
        if self.shares.is_empty() { vec![1] } else { self.shares.iter().map(|(_, share)| *share).collect() }
    }

    /// Whether unready endpoints are taken too.
    pub(crate) fn takes_unready(&self) -> bool {
        self.nearness.service.health == HealthPolicy::AllowAll
    }

    /// Where an endpoint belongs; `None` where no request goes to it.
    pub(crate) fn rank(&self, workload: &Workload, labels: &[(Str, Str)]) -> Option<Rank> {
        let service = self.nearness.service;
        let scopes = service.scopes.iter();
        let agreeing = scopes.take_while(|scope| agrees(**scope, &self.origin.client, workload)).count();
        let missing = u32::try_from(service.scopes.len() - agreeing).unwrap_or(u32::MAX);
        if service.mode == LoadBalancingMode::Strict && missing > 0 {
            return None;
        }
        if !self.shares.is_empty() {
            let zone = self.shares.iter().position(|(to, _)| matches(to, &workload.locality))?;
            return Some(Rank { tier: 0, zone: u32::try_from(zone).ok()? });
        }
        let own = service.mode == LoadBalancingMode::Failover;
        let tier = match self.nearness.setting {
            Some(setting) if setting.disabled || !setting.distribute.is_empty() => 0,
            Some(setting) if self.nearness.failover => self.failover(setting, workload, labels),
            // The service's own word goes before what holds where nothing is said.
            None if self.nearness.failover && !own => {
                self.failover(&LocalitySetting::default(), workload, labels)
            }
            _ if own => missing,
            _ => 0,
        };
        Some(Rank { tier, zone: 0 })
    }

    /// The order of failover (Istio's `localityLbSetting`).
    fn failover(&self, setting: &LocalitySetting, workload: &Workload, labels: &[(Str, Str)]) -> u32 {
        let (here, there) = (&self.origin.client.locality, &workload.locality);
        let by_region = match () {
            () if here.region != there.region => {
                let mine = setting.failover.iter().filter(|(from, _)| *from == here.region);
                let mut targets = mine.map(|(_, to)| to).peekable();
                let named = targets.peek().is_some();
                if named && !targets.any(|to| *to == there.region) { 4 } else { 3 }
            }
            () if here.zone != there.zone => 2,
            () if here.subzone != there.subzone => 1,
            () => 0,
        };
        let wanted = &setting.failover_priority;
        if wanted.is_empty() {
            return by_region;
        }
        let agreeing = wanted.iter().take_while(|wanted| {
            let (key, value) = wanted.split_once('=').map_or((&***wanted, None), |(k, v)| (k, Some(v)));
            let theirs =
                place_label(key, &workload.locality, [&workload.network, &workload.cluster, workload.node()])
                    .or_else(|| label(labels, key));
            let client = &self.origin.client;
            let ours = value.or_else(|| {
                place_label(key, &client.locality, [&client.network, &client.cluster, &client.node])
                    .or_else(|| label(&self.origin.labels, key))
            });
            ours.unwrap_or_default() == theirs.unwrap_or_default()
        });
        let missing = u32::try_from(wanted.len() - agreeing.count()).unwrap_or(u32::MAX);
        // Regions order what the labels leave equal.
        if setting.failover.is_empty() { missing } else { missing.saturating_mul(5) + by_region }
    }
}

fn label<'a>(labels: &'a [(Str, Str)], key: &str) -> Option<&'a str> {
    labels.iter().find(|(k, _)| **k == *key).map(|(_, value)| &**value)
}

/// Labels that say where something is; a workload's are known without its labels.
fn place_label<'a>(
    key: &str,
    locality: &'a Locality,
    [network, cluster, node]: [&'a Str; 3],
) -> Option<&'a str> {
    let value = match key {
        "topology.kubernetes.io/region" => &locality.region,
        "topology.kubernetes.io/zone" => &locality.zone,
        "topology.istio.io/subzone" => &locality.subzone,
        "topology.istio.io/network" => network,
        "topology.istio.io/cluster" => cluster,
        "kubernetes.io/hostname" => node,
        _ => return None,
    };
    Some(value)
}

/// Whether a locality is one of `pattern`: `region/zone/subzone`, of which the last parts may be missing or `*`.
fn matches(pattern: &str, locality: &Locality) -> bool {
    let own = [&locality.region, &locality.zone, &locality.subzone];
    pattern.split('/').zip(own).all(|(part, own)| part == "*" || *part == **own)
}
