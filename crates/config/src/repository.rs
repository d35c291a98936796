//! Files in, or objects of a server, and changes of the model out: the store of objects and the compiler together. No
//! I/O; a directory of files is watched by [`crate::directory`].

use std::collections::BTreeSet;
use std::sync::Arc;

use model::{Change, Settings, Str};

use crate::compile::{Batch, Compiler, EnrolmentChange, Options};
use crate::diagnostic::{Code, Diagnostic, Severity};
use crate::kinds::Capture;
use crate::labels::Pool;
use crate::policy::{MeshConfig, NamespaceSelector};
use crate::resource::{Kind, ObjectKey, Resource};
use crate::store::{More, Store};
use crate::tree;

pub use crate::store::{Content, ObjectContent};

/// What a batch of changed files came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Steps from the model as it was to the model as it is; to be applied as one.
    pub changes: Vec<Change>,
    /// Which of the node's pods are to be captured, and how, as far as it changed.
    pub enrolments: Vec<EnrolmentChange>,
    /// What is to be said that was not said before. All there is to say: [`Repository::diagnostics`].
    pub diagnostics: Vec<Diagnostic>,
    /// The files, or origins of objects, about which something may be said otherwise than before.
    pub touched: BTreeSet<Arc<str>>,
}

/// All that is known from files, and what it compiles to.
pub struct Repository {
    store: Store,
    compiler: Compiler,
    pool: Pool,
}

impl Repository {
    /// A repository without files.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let store = Store::new(&options);
        Self { store, compiler: Compiler::new(options), pool: Pool::default() }
    }

    /// Takes what a server has given to this object, such as the address of a Service, for what a file that is staged from now on leaves
    /// out of it, as who applies it does.
    pub fn assign(&mut self, object: tree::Node<'static>) {
        self.store.assign(object);
    }

    /// Takes what a file holds now, as a part of a batch that [`Repository::commit`] ends.
    pub fn stage(&mut self, path: &Arc<str>, content: Content<'_>) {
        let compiler = &mut self.compiler;
        self.store.set_file(path, content, &mut self.pool, &mut |key, resource, pool| {
            compiler.stage(key, resource, pool);
        });
    }

    /// Takes what a server holds of one object now, as a part of a batch that [`Repository::commit`] ends. `origin`
    /// names the object in diagnostics, such as `Pod shop/web`, and must be the same each time.
    pub fn stage_object(&mut self, origin: &Arc<str>, content: ObjectContent<'_>) {
        let compiler = &mut self.compiler;
        self.store.set_object(origin, content, &mut self.pool, &mut |key, resource, pool| {
            compiler.stage(key, resource, pool);
        });
    }

    /// Takes settings that were read elsewhere, as a part of a batch that [`Repository::commit`] ends.
    pub fn stage_settings(&mut self, settings: &MeshConfig) {
        let key = ObjectKey { kind: Kind::MeshConfig, namespace: "".into(), name: "mesh".into() };
        let settings = Resource::MeshConfig(Box::new(settings.clone()));
        self.compiler.stage(&key, Some((Str::default(), settings)), &mut self.pool);
    }

    /// Compiles what the staged files changed.
    pub fn commit(&mut self) -> Outcome {
        let compiler = &mut self.compiler;
        self.store.settle(&mut self.pool, &mut |key, resource, pool| compiler.stage(key, resource, pool));
        let Batch { changes, enrolments, found } = self.compiler.commit(&mut self.pool);
        for key in &found {
            self.store.touch(key);
        }
        let compiler = &self.compiler;
        let (diagnostics, touched) = self.store.news(&Known { compiler, in_full: false });
        self.pool.sweep();
        Outcome { changes, enrolments, diagnostics, touched }
    }

    /// A batch of one file.
    pub fn apply(&mut self, path: &Arc<str>, content: Content<'_>) -> Outcome {
        self.stage(path, content);
        self.commit()
    }

    /// All there is to say, by file and place.
    #[must_use]
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        self.store.diagnostics(&self.known(false))
    }

    /// All there is to say of one file, or of the object of an origin.
    #[must_use]
    pub fn about(&self, origin: &str) -> Vec<Diagnostic> {
        self.store.about(origin, &self.known(false))
    }

    /// What was compiled, to ask how objects stand with what they name.
    #[must_use]
    pub fn standing(&self) -> &Compiler {
        &self.compiler
    }

    /// The same, and what is said of an object in order that may still not do what it is meant to, see
    /// [`Repository::review`].
    #[must_use]
    pub fn review_of(&self, origin: &str) -> Vec<Diagnostic> {
        self.store.about(origin, &self.known(true))
    }

    /// All there is to say, and beside it what is said of objects that are in order and may still not do what
    /// they are meant to: policies that select nothing, or name what is not there. Costs a look at every policy.
    #[must_use]
    pub fn review(&self) -> Vec<Diagnostic> {
        self.store.review(&self.known(true))
    }

    fn known(&self, in_full: bool) -> Known<'_> {
        Known { compiler: &self.compiler, in_full }
    }

    /// The settings in force as they are written; `None` where there are none.
    #[must_use]
    pub fn mesh_config(&self) -> Option<&MeshConfig> {
        self.compiler.mesh_config()
    }

    /// Which namespaces are read: those that one of the selectors matches; all where there are none. It is for the
    /// source of the objects to leave the others out.
    #[must_use]
    pub fn discovery(&self) -> &[NamespaceSelector] {
        self.compiler.discovery()
    }

    /// Whether a file could not be taken, or an object in it, as opposed to conflicts between objects that are
    /// each valid.
    #[must_use]
    pub fn has_bad_files(&self) -> bool {
        self.store.diagnostics(&OfItself).iter().any(|d| d.severity == Severity::Error)
    }

    /// The pods in the mesh that have annotations on what of their traffic is captured, by their uids.
    pub fn captures(&self) -> impl Iterator<Item = (&Str, &Capture)> {
        self.compiler.captures()
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        self.compiler.settings()
    }

    /// How many objects are in force.
    #[must_use]
    pub fn object_count(&self) -> usize {
        self.store.len()
    }

    /// How many objects, instances and services were looked at so far: what the changes cost.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.compiler.steps()
    }
}

/// What the compiler knows of objects; in full with what is said on request.
struct Known<'c> {
    compiler: &'c Compiler,
    in_full: bool,
}

impl More for Known<'_> {
    fn found(&self, key: &ObjectKey) -> Vec<(Code, String, String)> {
        let found = self.compiler.findings(key).cloned();
        let more = if self.in_full { self.compiler.review(key) } else { Vec::new() };
        found.chain(more).map(|f| (f.code, f.message, f.remedy)).collect()
    }

    fn has_waypoint(&self, key: &ObjectKey) -> bool {
        self.compiler.has_waypoint(key)
    }
}

/// Only what an object says of itself.
struct OfItself;

impl More for OfItself {
    fn found(&self, _: &ObjectKey) -> Vec<(Code, String, String)> {
        Vec::new()
    }

    fn has_waypoint(&self, _: &ObjectKey) -> bool {
        false
    }
}
