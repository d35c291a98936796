//! What of the mesh's settings others go by than who compiles objects: the admission.

use std::collections::BTreeSet;
use std::sync::Arc;

use config::policy::MeshConfig;

/// The settings in force, as those see them who don't compile.
#[derive(Clone, Debug, Default)]
pub struct InForce {
    /// The settings; `None` where there are none, and the defaults hold.
    pub settings: Option<Arc<MeshConfig>>,
    /// Names of revisions that mean this one at present.
    pub tags: Arc<BTreeSet<String>>,
}

impl InForce {
    /// Takes what is in force now; whether something is otherwise than before.
    pub fn update(&mut self, settings: Option<&MeshConfig>, tags: &BTreeSet<String>) -> bool {
        let same_settings = self.settings.as_deref() == settings;
        let same_tags = *self.tags == *tags;
        if !same_settings {
            self.settings = settings.cloned().map(Arc::new);
        }
        if !same_tags {
            self.tags = Arc::new(tags.clone());
        }
        !(same_settings && same_tags)
    }
}
