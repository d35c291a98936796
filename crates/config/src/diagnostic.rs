//! What is said about the users' files: where, what is wrong, and what to do about it.
//!
//! All codes stand in one table, [`Code::ALL`], with their severity and what they mean; documentation and SARIF
//! rules are made from it.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::tree::Position;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know: something has no effect here, and that is as designed.
    Info,
    /// Probably not what was meant.
    Warning,
    /// The object, or file, is not in force as it stands.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

macro_rules! codes {
    ($($variant:ident = $text:literal, $severity:ident, $explanation:literal;)*) => {
        /// What kind of finding a diagnostic is. The text form is stable: users filter and suppress by it.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        pub enum Code {
            $(#[doc = $explanation] $variant,)*
        }

        impl Code {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The code as it is written.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// How bad it is.
            #[must_use]
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity,)* }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub fn explanation(self) -> &'static str {
                match self { $(Self::$variant => $explanation,)* }
            }
        }
    };
}

codes! {
    // files
    FileUnreadable = "file-unreadable", Error, "A file or directory cannot be read; what it last held stays in force.";
    FileTooLarge = "file-too-large", Error, "A file, or a document in it, exceeds a limit; what it last held stays in force.";
    TooManyFiles = "too-many-files", Error, "The directory holds more files than are read.";
    DirectoryGone = "directory-gone", Error, "The directory is not there; what it last held stays in force until it returns.";
    MalformedYaml = "malformed-yaml", Error, "The text is not YAML; what the file last held stays in force.";
    DuplicateKey = "duplicate-key", Error, "A key stands twice in one mapping; what the file last held stays in force.";
    TooManyDiagnostics = "too-many-diagnostics", Warning, "There is more to say about a file than is kept.";
    // objects
    NotAnObject = "not-an-object", Error, "A document is not an object with apiVersion, kind and metadata.";
    UnknownKind = "unknown-kind", Error, "The kind does not exist in a group that the mesh reads.";
    UnsupportedKind = "unsupported-kind", Warning, "The kind exists, and this version of the mesh does not act on it.";
    RefusedKind = "refused-kind", Error, "The kind asks for what the mesh does not do; what does its job is named.";
    IgnoredKind = "ignored-kind", Info, "The kind belongs to a group that has no part in the mesh.";
    UnsupportedVersion = "unsupported-version", Error, "The kind is not read in this version of its group.";
    DuplicateObject = "duplicate-object", Error, "Two objects have the same kind, namespace and name; the first stays in force.";
    LastGoodVersion = "last-good-version", Warning, "An object or file has errors, and what it was before stays in force.";
    FailsClosed = "fails-closed", Error, "A policy or namespace has errors, and nothing is known of it from before: what it is for is closed until it is corrected.";
    SidecarNamespace = "sidecar-namespace", Info, "The namespace is set up for sidecars; its pods are left alone.";
    UnknownLabelValue = "unknown-label-value", Warning, "A label that the mesh reads has a value that means nothing to it.";
    MisspeltKey = "misspelt-key", Warning, "The key of a label or annotation looks like one that is read, and is none.";
    MisplacedKey = "misplaced-key", Warning, "A label is read as an annotation only, or an annotation as a label only.";
    WaypointNotReady = "waypoint-not-ready", Warning, "Traffic is bound to a waypoint that is not there, or does not take it: it is refused.";
    ExternalName = "external-name", Info, "A service that is an alias of a host name carries no traffic of its own.";
    ServiceWithoutAddress = "service-without-address", Warning, "A service has neither a virtual address nor clusterIP None.";
    SliceUnused = "slice-unused", Warning, "An EndpointSlice, or a part of it, is not used.";
    AddressConflict = "address-conflict", Error, "Two objects have one address; the first stays in force.";
    HostConflict = "host-conflict", Error, "Two objects of a namespace define one host name; the first stays in force.";
    NetnsMissing = "netns-missing", Warning, "A pod in the mesh on this node is not captured: its network namespace is not named.";
    // policies and external services
    NeedsWaypoint = "needs-waypoint", Warning, "A policy asks for what only a waypoint can enforce; until one is deployed it fails closed for its scope.";
    RuleDropped = "rule-dropped", Warning, "Rules of a route have errors and are not in force; the others are.";
    WithoutEffect = "without-effect", Warning, "An object, or a part of it, has no effect as it stands.";
    SettingsUnread = "settings-unread", Error, "Settings of the mesh stand where they are not read, and none are in force: the defaults hold.";
    ActsOtherwise = "acts-otherwise", Warning, "A value is taken as another one, which is named.";
    PolicyConflict = "policy-conflict", Warning, "Two policies of one level are for the same workloads; the older one is in force.";
    NoWorkload = "no-workload", Warning, "A policy is for no workload that there is.";
    OutsideTheMesh = "outside-the-mesh", Warning, "A policy is for what is not in the mesh, or not in its namespace, where nothing enforces it.";
    NamesNothing = "names-nothing", Warning, "A policy names a namespace or an object that there is not.";
    AmbiguousAddress = "ambiguous-address", Warning, "Several hosts share an address, by which alone connections are told apart.";
    // fields
    UnknownField = "unknown-field", Error, "The kind has no such field; the object is not in force as it stands.";
    MissingField = "missing-field", Error, "A field that the object needs is not set.";
    WrongType = "wrong-type", Error, "A field's value is of another type than the field.";
    InvalidValue = "invalid-value", Error, "A field's value is of the right type, and means nothing there.";
    FieldRefused = "field-refused", Error, "The field asks for what the mesh cannot do, so the object is refused rather than weakened.";
    FieldNotApplicable = "field-not-applicable", Info, "The field is known and has no effect in the mesh.";
    UnreadField = "unread-field", Error, "The field should have been read and was not: a fault of the mesh, not of the file.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The object that a diagnostic is about.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Serialize)]
pub struct ResourceName {
    /// The kind.
    pub kind: Arc<str>,
    /// The namespace, empty for a kind that has none.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// One finding.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Diagnostic {
    /// What kind of finding.
    pub code: Code,
    /// How bad it is.
    pub severity: Severity,
    /// The file, as it was given or found.
    pub file: Arc<str>,
    /// The line, from 1; 0 when the whole file is meant.
    pub line: u32,
    /// The column, from 1, in characters; 0 when the whole file is meant.
    pub column: u32,
    /// The object.
    pub resource: Option<ResourceName>,
    /// The field's path in the object, such as `spec.ports[0].port`; empty when the whole object is meant.
    pub field: String,
    /// The line of the file that it is about.
    pub text: String,
    /// What is wrong, in a sentence.
    pub message: String,
    /// What to do; empty when the message says it all.
    pub remedy: String,
}

/// Lines longer than this are cut: a line may be a whole file of JSON.
const SHOWN_CHARACTERS: usize = 160;

impl Diagnostic {
    /// A finding about a whole file or directory.
    #[must_use]
    pub fn about_file(
        code: Code,
        file: Arc<str>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            code,
            severity: code.severity(),
            file,
            line: 0,
            column: 0,
            resource: None,
            field: String::new(),
            text: String::new(),
            message: message.into(),
            remedy: remedy.into(),
        }
    }

    /// The same at a place, with the line that stands there.
    #[must_use]
    pub fn at(mut self, position: Position, line: &str) -> Self {
        self.line = position.line;
        self.column = position.column;
        self.text = shown(line, position.column);
        self
    }

    /// The same about an object.
    #[must_use]
    pub fn about(mut self, resource: Option<ResourceName>) -> Self {
        self.resource = resource;
        self
    }
}

/// The part of a line around `column`, at most [`SHOWN_CHARACTERS`] of it.
fn shown(line: &str, column: u32) -> String {
    let column = usize::try_from(column).unwrap_or(usize::MAX);
    let skipped = if column > SHOWN_CHARACTERS { column - SHOWN_CHARACTERS / 2 } else { 0 };
    line.trim_end().chars().skip(skipped).take(SHOWN_CHARACTERS).collect()
}

impl fmt::Display for Diagnostic {
    /// `file:line:column: severity[code]: object: message`, the line, the remedy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        write!(f, ": {}[{}]: ", self.severity, self.code)?;
        // An object of a server is its own place.
        if let Some(resource) = self.resource.as_ref().map(ToString::to_string).filter(|r| **r != *self.file)
        {
            write!(f, "{resource}: ")?;
        }
        f.write_str(&self.message)?;
        if !self.text.trim().is_empty() {
            write!(f, "\n    | {}", self.text)?;
        }
        if !self.remedy.is_empty() {
            write!(f, "\n    = {}", self.remedy)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_kebab_case_and_unique() {
        let texts: std::collections::BTreeSet<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(texts.len(), Code::ALL.len());
        for text in texts {
            assert!(text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'), "{text}");
        }
    }

    #[test]
    fn a_diagnostic_shows_where_what_and_what_to_do() {
        let name = ResourceName { kind: "Pod".into(), namespace: "shop".into(), name: "cart".into() };
        let d = Diagnostic::about_file(
            Code::UnknownField,
            "a.yaml".into(),
            "there is no field spec.nodename",
            "did you mean nodeName?",
        )
        .at(Position { line: 3, column: 5 }, "    nodename: x\r")
        .about(Some(name));
        assert_eq!(
            d.to_string(),
            "a.yaml:3:5: error[unknown-field]: Pod shop/cart: there is no field spec.nodename\n    |     \
             nodename: x\n    = did you mean nodeName?"
        );
        assert_eq!(serde_json::to_value(&d).unwrap()["code"], "unknown-field");
    }

    #[test]
    fn a_long_line_is_shown_around_the_place() {
        let line = format!("{}HERE{}", "x".repeat(1000), "y".repeat(1000));
        let text = shown(&line, 1001);
        assert!(text.contains("HERE") && text.len() <= SHOWN_CHARACTERS, "{text}");
    }
}
