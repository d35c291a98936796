//! What the host of an entry's requests becomes.

use model::http::HostRewrite;

/// What the host becomes, by either of those who can say it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SetHosts {
    /// `rewrite`.
    pub rewrite: Option<HostRewrite>,
    /// `headers`.
    pub headers: Option<HostRewrite>,
}

impl SetHosts {
    /// What holds of them: `rewrite` goes before `headers` (Istio).
    pub fn in_force(&self) -> Option<HostRewrite> {
        self.rewrite.as_ref().or(self.headers.as_ref()).cloned()
    }
}
