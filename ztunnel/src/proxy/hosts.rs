//! Addresses of endpoints that are known by a host name (ServiceEntry with resolution DNS).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::failure::Failure;

/// The system's resolver does not tell how long its answers hold; DNS of service meshes is asked again after
/// seconds, not minutes, because endpoints move.
const FRESH: Duration = Duration::from_secs(10);
/// An old answer serves this long while the resolver fails (RFC 8767 allows days; an address that stopped
/// answering is found out by connecting).
const STALE: Duration = Duration::from_secs(3600);
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
const REMEMBERED: usize = 4096;

#[derive(Debug)]
struct Answer {
    addresses: Vec<IpAddr>,
    at: Instant,
}

/// Resolves host names with a bounded cache.
#[derive(Debug, Default)]
pub struct Hosts {
    answers: Mutex<HashMap<String, Answer>>,
}

impl Hosts {
    /// An address of `host`, of the family of `client` where there is one; which of several is up to `random`.
    ///
    /// # Errors
    /// The name can't be resolved, and no old answer is left.
    pub async fn resolve(
        &self,
        host: &str,
        port: u16,
        client: IpAddr,
        random: u64,
    ) -> Result<SocketAddr, Failure> {
        let addresses = self.addresses(host).await?;
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(IpAddr::is_ipv4);
        let (first, second) = if client.to_canonical().is_ipv4() { (v4, v6) } else { (v6, v4) };
        let list = if first.is_empty() { second } else { first };
        let index = usize::try_from(random % list.len().max(1) as u64).unwrap_or(0);
        let ip = list.get(index).ok_or_else(|| Failure::Resolve(host.to_owned(), "no address".into()))?;
        Ok(SocketAddr::new(*ip, port))
    }

    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, Failure> {
        if let Some(known) = self.known(host, FRESH) {
            return Ok(known);
        }
        let looked_up = tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, 0))).await;
        let reason = match looked_up {
            Ok(Ok(found)) => {
                let mut addresses: Vec<IpAddr> = found.map(|a| a.ip().to_canonical()).collect();
                addresses.sort();
                addresses.dedup();
                if !addresses.is_empty() {
                    self.remember(host, addresses.clone());
                    return Ok(addresses);
                }
                "no address".to_owned()
            }
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs()),
        };
        self.known(host, STALE).ok_or_else(|| Failure::Resolve(host.to_owned(), reason))
    }

    fn known(&self, host: &str, age: Duration) -> Option<Vec<IpAddr>> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(host).filter(|a| a.at.elapsed() < age).map(|a| a.addresses.clone())
    }

    fn remember(&self, host: &str, addresses: Vec<IpAddr>) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= REMEMBERED && !answers.contains_key(host) {
            answers.retain(|_, a| a.at.elapsed() < FRESH);
            if answers.len() >= REMEMBERED {
                answers.clear(); // every name is fresh: start over rather than grow
            }
        }
        answers.insert(host.to_owned(), Answer { addresses, at: Instant::now() });
    }
}
