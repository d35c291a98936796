//! Reading the fields of objects so that none is dropped.
//!
//! Each mapping of each kind has a [`Schema`]: the table of every field that upstream knows, with what the mesh
//! does with it. [`Fields`] reads a mapping by its schema. A field that is not in the table is an error with a
//! suggestion, a refused one an error with its reason, one without effect is said where a user could expect an
//! effect, and an enforced one that the parser forgets to take is an error too: dropping [`Fields`] checks that.
//! The documentation's tables are walked from the schemas, so they are what the parsers do.
//!
//! An object is valid when reading it reported no error: [`Context::is_valid`].

use std::cell::OnceCell;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::diagnostic::{Code, Diagnostic, ResourceName, Severity};
use crate::form::Form;
use crate::labels::Pool;
use crate::tree::{Entry, Node, Position, Text, Value};

/// The fields of one mapping of a kind.
#[derive(Debug)]
pub struct Schema {
    /// What the mapping is called, such as `Pod.spec`.
    pub name: &'static str,
    /// The fields; those that are set most often first, since they are looked up in order.
    pub fields: &'static [Field],
}

/// A field and what is done with it.
#[derive(Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// What is done with it.
    pub disposition: Disposition,
    /// The fields of its value, or of its value's items, where the parser reads these.
    pub nested: Option<&'static Schema>,
    /// What its value is, or its value's items are, of a kind of our own: its definition is made of that.
    pub form: Option<Form>,
    /// Whether an object of such a kind needs it.
    pub is_required: bool,
    /// The fewest and the most items, of a list.
    pub items: Option<(u32, u32)>,
}

impl Field {
    const fn new(name: &'static str, disposition: Disposition, nested: Option<&'static Schema>) -> Self {
        Self { name, disposition, nested, form: None, is_required: false, items: None }
    }

    /// The same, with what its value is.
    #[must_use]
    pub const fn of(mut self, form: Form) -> Self {
        self.form = Some(form);
        self
    }

    /// The same, that has to be there.
    #[must_use]
    pub const fn required(mut self) -> Self {
        self.is_required = true;
        self
    }

    /// The same, a list of so many.
    #[must_use]
    pub const fn items(mut self, least: u32, most: u32) -> Self {
        self.items = Some((least, most));
        self
    }
}

/// What is done with a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// The mesh acts on it.
    Enforced,
    /// The mesh has no use for it, where a user could expect one: said when it is set. With the reason.
    NotApplicable(&'static str),
    /// It is none of the mesh's business, and nobody expects it to be. With the reason.
    Silent(&'static str),
    /// It asks for what the mesh cannot do: the object is refused.
    Refused {
        /// Why.
        reason: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
}

/// A field that the mesh acts on.
#[must_use]
pub const fn enforced(name: &'static str) -> Field {
    Field::new(name, Disposition::Enforced, None)
}

/// A field that the mesh acts on, whose value (or each of whose items) is a mapping.
#[must_use]
pub const fn nested(name: &'static str, schema: &'static Schema) -> Field {
    Field::new(name, Disposition::Enforced, Some(schema))
}

/// A field without effect in the mesh, which is said when it is set.
#[must_use]
pub const fn not_applicable(name: &'static str, reason: &'static str) -> Field {
    Field::new(name, Disposition::NotApplicable(reason), None)
}

/// A field without effect in the mesh, where nobody expects one.
#[must_use]
pub const fn silent(name: &'static str, reason: &'static str) -> Field {
    Field::new(name, Disposition::Silent(reason), None)
}

/// A field that the mesh refuses.
#[must_use]
pub const fn refused(name: &'static str, reason: &'static str, remedy: &'static str) -> Field {
    Field::new(name, Disposition::Refused { reason, remedy }, None)
}

impl Schema {
    /// Calls `visit` with the path and the field for every field of this schema and of the schemas below.
    pub fn walk(&self, visit: &mut dyn FnMut(&str, &Field)) {
        self.walk_below("", visit);
    }

    fn walk_below(&self, prefix: &str, visit: &mut dyn FnMut(&str, &Field)) {
        for field in self.fields {
            let path =
                if prefix.is_empty() { field.name.to_owned() } else { format!("{prefix}.{}", field.name) };
            visit(&path, field);
            if let Some(schema) = field.nested {
                schema.walk_below(&path, visit);
            }
        }
    }
}

/// What reading a document needs and collects.
pub struct Context<'n> {
    file: &'n Arc<str>,
    document: Text<'n>,
    line_starts: OnceCell<Vec<usize>>,
    /// Shared strings and label sets.
    pub pool: &'n mut Pool,
    resource: Option<(Arc<str>, &'n str, &'n str)>,
    diagnostics: Vec<Diagnostic>,
    errors: usize,
}

impl<'n> Context<'n> {
    /// A context for one object of `document` in `file`.
    pub fn new(file: &'n Arc<str>, document: Text<'n>, pool: &'n mut Pool) -> Self {
        Self {
            file,
            document,
            line_starts: OnceCell::new(),
            pool,
            resource: None,
            diagnostics: Vec::new(),
            errors: 0,
        }
    }

    /// Names the object that later diagnostics are about.
    pub fn set_resource(&mut self, kind: Arc<str>, namespace: &'n str, name: &'n str) {
        self.resource = Some((kind, namespace, name));
    }

    fn resource(&self) -> Option<ResourceName> {
        let (kind, namespace, name) = self.resource.as_ref()?;
        Some(ResourceName { kind: kind.clone(), namespace: (*namespace).into(), name: (*name).into() })
    }

    /// Whether no error was reported so far.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.errors == 0
    }

    /// How many errors were reported so far.
    pub(crate) fn errors(&self) -> usize {
        self.errors
    }

    /// The fields of which something was said after the first `from` things that were said.
    pub(crate) fn said_of(&self, from: usize) -> impl Iterator<Item = &str> {
        self.diagnostics.iter().skip(from).map(|diagnostic| &*diagnostic.field)
    }

    /// How many things were said so far.
    pub(crate) fn said(&self) -> usize {
        self.diagnostics.len()
    }

    /// Has the object be in force in spite of `errors` errors, which are still said: what they are about is not.
    pub(crate) fn forgive(&mut self, errors: usize) {
        self.errors -= errors.min(self.errors);
    }

    /// What was reported so far; the list is empty afterwards.
    pub fn take_diagnostics(&mut self) -> Vec<Diagnostic> {
        std::mem::take(&mut self.diagnostics)
    }

    /// Reports something about the value, or field, at `position`.
    pub fn report(
        &mut self,
        code: Code,
        position: Position,
        path: &Path<'_>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.errors += usize::from(code.severity() == Severity::Error);
        let mut diagnostic = Diagnostic::about_file(code, self.file.clone(), message, remedy)
            .at(position, self.line(position.line))
            .about(self.resource());
        diagnostic.field = path.to_string();
        self.diagnostics.push(diagnostic);
    }

    /// The text of a line of the file, as far as the document has it.
    pub(crate) fn line(&self, line: u32) -> &'n str {
        let text = self.document.text;
        let starts = self.line_starts.get_or_init(|| {
            std::iter::once(0).chain(text.match_indices('\n').map(|(offset, _)| offset + 1)).collect()
        });
        let index = line.saturating_sub(self.document.lines_before + 1);
        let start = usize::try_from(index).ok().and_then(|i| starts.get(i));
        let rest = start.and_then(|s| text.get(*s..)).unwrap_or_default();
        rest.split('\n').next().unwrap_or_default()
    }
}

/// Where in an object a value stands, such as `spec.ports[0].port`.
#[derive(Clone, Copy)]
pub struct Path<'f> {
    parent: Option<&'f Path<'f>>,
    step: Step<'f>,
}

#[derive(Clone, Copy)]
enum Step<'f> {
    Root,
    Field(&'f str),
    Index(usize),
}

impl Path<'_> {
    /// The object itself.
    pub const ROOT: Path<'static> = Path { parent: None, step: Step::Root };

    /// A path in its written form.
    #[must_use]
    pub fn of(text: &str) -> Path<'_> {
        Path { parent: None, step: Step::Field(text) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
            if let (Step::Field(_), false) = (self.step, matches!(parent.step, Step::Root)) {
                f.write_str(".")?;
            }
        }
        match self.step {
            Step::Root => Ok(()),
            Step::Field(name) => f.write_str(name),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// A value at a place, to be read as some type. Reading it as another reports that and gives `None`.
pub struct Cursor<'f, 'n> {
    node: &'n Node<'n>,
    path: Path<'f>,
    schema: Option<&'static Schema>,
    context: &'f mut Context<'n>,
}

impl<'f, 'n> Cursor<'f, 'n> {
    /// A cursor at the root of an object.
    pub fn root(node: &'n Node<'n>, schema: &'static Schema, context: &'f mut Context<'n>) -> Self {
        Self { node, path: Path::ROOT, schema: Some(schema), context }
    }

    /// The value as it stands in the file.
    #[must_use]
    pub fn node(&self) -> &'n Node<'n> {
        self.node
    }

    /// Where the value starts.
    #[must_use]
    pub fn position(&self) -> Position {
        self.node.position
    }

    /// The context, for its pool.
    pub fn context(&mut self) -> &mut Context<'n> {
        self.context
    }

    /// Reports something about this value.
    pub fn report(&mut self, code: Code, message: impl Into<String>, remedy: impl Into<String>) {
        self.context.report(code, self.node.position, &self.path, message, remedy);
    }

    /// Reports something about a place within this value.
    pub(crate) fn report_at(&mut self, code: Code, position: Position, message: impl Into<String>) {
        self.context.report(code, position, &self.path, message, "");
    }

    /// Reads `node`, which this value, a string, holds in text form. Its positions must be those in the file.
    pub(crate) fn read_embedded<'m>(
        &'m mut self,
        node: &'m Node<'m>,
        schema: &'static Schema,
        read: impl FnOnce(Cursor<'_, 'm>),
    ) {
        let mut inner = Context::new(self.context.file, self.context.document, self.context.pool);
        inner.resource.clone_from(&self.context.resource);
        read(Cursor { node, path: self.path, schema: Some(schema), context: &mut inner });
        let (mut diagnostics, errors) = (inner.take_diagnostics(), inner.errors);
        self.context.diagnostics.append(&mut diagnostics);
        self.context.errors += errors;
    }

    /// Reports that the value means nothing here: `path: message`.
    pub fn invalid(&mut self, message: impl fmt::Display, remedy: impl Into<String>) {
        let message = format!("{}: {message}", self.path);
        self.report(Code::InvalidValue, message, remedy);
    }

    fn wrong_type(&mut self, wanted: &str) {
        let is = self.node.value.kind();
        let remedy = match (&self.node.value, wanted) {
            (Value::Bool(_) | Value::Int(_) | Value::Float(_), "a string") => "put it in quotes",
            _ => "",
        };
        self.report(Code::WrongType, format!("{} must be {wanted}, and is {is}", self.path), remedy);
    }

    /// The string.
    pub fn string(mut self) -> Option<&'n str> {
        let node = self.node;
        if let Value::String(text) = &node.value {
            return Some(text);
        }
        self.wrong_type("a string");
        None
    }

    /// The boolean.
    pub fn boolean(mut self) -> Option<bool> {
        if let Value::Bool(value) = self.node.value {
            return Some(value);
        }
        self.wrong_type("a boolean");
        None
    }

    /// The whole number, when it is in `range`.
    pub fn integer<T>(mut self, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        let Value::Int(value) = self.node.value else {
            self.wrong_type("an integer");
            return None;
        };
        let found = T::try_from(value).ok().filter(|v| range.contains(v));
        if found.is_none() {
            self.invalid(format_args!("{value} is not in {} to {}", range.start(), range.end()), "");
        }
        found
    }

    /// The fields of the mapping.
    pub fn fields(mut self) -> Option<Fields<'f, 'n>> {
        let node = self.node;
        let (Value::Mapping(entries), Some(schema)) = (&node.value, self.schema) else {
            self.wrong_type("a mapping");
            return None;
        };
        Some(Fields::new(entries, node.position, schema, self.path, self.context))
    }

    /// Calls `visit` with each item of the list; null items are wrong.
    pub fn each(mut self, mut visit: impl FnMut(Cursor<'_, 'n>)) {
        let node = self.node;
        let Value::Sequence(items) = &node.value else {
            self.wrong_type("a list");
            return;
        };
        for (index, node) in items.iter().enumerate() {
            let path = Path { parent: Some(&self.path), step: Step::Index(index) };
            visit(Cursor { node, path, schema: self.schema, context: self.context });
        }
    }

    /// The list of strings; without the items that are none.
    pub fn string_list(self) -> Vec<&'n str> {
        let mut list = Vec::new();
        self.each(|item| list.extend(item.string()));
        list
    }

    /// Calls `visit` with each key and value of a mapping whose keys are the user's.
    pub fn entries(mut self, mut visit: impl FnMut(&'n str, Cursor<'_, 'n>)) {
        let node = self.node;
        let Value::Mapping(entries) = &node.value else {
            self.wrong_type("a mapping");
            return;
        };
        for entry in entries {
            let path = Path { parent: Some(&self.path), step: Step::Field(&entry.key) };
            let cursor = Cursor { node: &entry.value, path, schema: self.schema, context: self.context };
            visit(&entry.key, cursor);
        }
    }

    /// The mapping of strings to strings, in the order of the file; without the values that are none.
    pub fn string_map(self) -> Vec<(&'n str, &'n str)> {
        let mut map = Vec::new();
        self.entries(|key, value| map.extend(value.string().map(|v| (key, v))));
        map
    }
}

/// The fields of a mapping. Takes by name give `None` for a field that is absent or null.
pub struct Fields<'f, 'n> {
    entries: &'n [Entry<'n>],
    position: Position,
    schema: &'static Schema,
    path: Path<'f>,
    context: &'f mut Context<'n>,
    /// A bit for each entry that need not be taken any more.
    done: u64,
}

impl<'f, 'n> Fields<'f, 'n> {
    fn new(
        entries: &'n [Entry<'n>],
        position: Position,
        schema: &'static Schema,
        path: Path<'f>,
        context: &'f mut Context<'n>,
    ) -> Self {
        let mut fields = Self { entries, position, schema, path, context, done: 0 };
        for (index, entry) in entries.iter().enumerate() {
            let known = schema.fields.iter().find(|f| f.name == entry.key);
            if matches!(known, Some(Field { disposition: Disposition::Enforced, .. })) {
                continue;
            }
            fields.done |= bit(index);
            if known.is_none() || entry.value.value != Value::Null {
                fields.say(entry, known);
            }
        }
        fields
    }

    /// Reports an entry that is not enforced.
    fn say(&mut self, entry: &'n Entry<'n>, known: Option<&Field>) {
        let path = Path { parent: Some(&self.path), step: Step::Field(&entry.key) };
        let (code, message, remedy) = match known.map(|f| f.disposition) {
            None => {
                let remedy = suggestion(self.schema, &entry.key)
                    .map_or(String::new(), |s| format!("did you mean {s}?"));
                (Code::UnknownField, format!("there is no field {path}"), remedy)
            }
            Some(Disposition::NotApplicable(reason)) => {
                (Code::FieldNotApplicable, format!("{path} has no effect: {reason}"), String::new())
            }
            Some(Disposition::Refused { reason, remedy }) => {
                (Code::FieldRefused, format!("{path} is refused: {reason}"), remedy.to_owned())
            }
            Some(Disposition::Enforced | Disposition::Silent(_)) => return,
        };
        self.context.report(code, entry.position, &path, message, remedy);
    }

    /// Where the mapping starts.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// The context, for its pool.
    pub fn context(&mut self) -> &mut Context<'n> {
        self.context
    }

    /// The same fields, of which none may be null: what a template left empty is not what was left out. For
    /// mappings whose fields restrict something, where an absent field restricts nothing.
    #[must_use]
    pub fn without_nulls(mut self) -> Self {
        let enforced = self.schema.fields.iter().filter(|f| f.disposition == Disposition::Enforced);
        enforced.for_each(|field| self.refuse_null(field.name));
        self
    }

    /// Reports a field that is there and null.
    pub fn refuse_null(&mut self, name: &'static str) {
        let is_null = |e: &&Entry<'n>| e.key == name && e.value.value == Value::Null;
        if let Some(entry) = self.entries.iter().find(is_null) {
            let path = Path { parent: Some(&self.path), step: Step::Field(name) };
            let message = format!("{path}: is empty (null), which would not restrict anything");
            let remedy = "remove the field or fill it";
            self.context.report(Code::InvalidValue, entry.position, &path, message, remedy);
        }
    }

    /// Whether no field is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(|e| e.value.value == Value::Null)
    }

    /// The value of a field. The name must be an enforced one of the schema.
    pub fn take(&mut self, name: &'static str) -> Option<Cursor<'_, 'n>> {
        let field = self.schema.fields.iter().find(|f| f.name == name);
        debug_assert!(
            field.is_some_and(|f| f.disposition == Disposition::Enforced),
            "{}.{name} is not in its schema as enforced",
            self.schema.name
        );
        let (index, entry) = self.entries.iter().enumerate().find(|(_, e)| e.key == name)?;
        self.done |= bit(index);
        if entry.value.value == Value::Null {
            return None;
        }
        let path = Path { parent: Some(&self.path), step: Step::Field(name) };
        let schema = field.and_then(|f| f.nested);
        Some(Cursor { node: &entry.value, path, schema, context: self.context })
    }

    /// The value of a field that must be there; its absence is reported.
    pub fn required(&mut self, name: &'static str) -> Option<Cursor<'_, 'n>> {
        let present = self.entries.iter().any(|e| e.key == name && e.value.value != Value::Null);
        if !present {
            let path = Path { parent: Some(&self.path), step: Step::Field(name) };
            let message = format!("{path} is missing");
            self.context.report(Code::MissingField, self.position, &path, message, "");
        }
        self.take(name)
    }

    /// A string.
    pub fn string(&mut self, name: &'static str) -> Option<&'n str> {
        self.take(name)?.string()
    }

    /// A boolean.
    pub fn boolean(&mut self, name: &'static str) -> Option<bool> {
        self.take(name)?.boolean()
    }

    /// A whole number in `range`.
    pub fn integer<T>(&mut self, name: &'static str, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        self.take(name)?.integer(range)
    }

    /// The fields of a mapping.
    pub fn object(&mut self, name: &'static str) -> Option<Fields<'_, 'n>> {
        self.take(name)?.fields()
    }

    /// The items of a list.
    pub fn each(&mut self, name: &'static str, visit: impl FnMut(Cursor<'_, 'n>)) {
        if let Some(cursor) = self.take(name) {
            cursor.each(visit);
        }
    }

    /// A list of strings; empty when absent.
    pub fn string_list(&mut self, name: &'static str) -> Vec<&'n str> {
        self.take(name).map(Cursor::string_list).unwrap_or_default()
    }

    /// A mapping of strings to strings; empty when absent.
    pub fn string_map(&mut self, name: &'static str) -> Vec<(&'n str, &'n str)> {
        self.take(name).map(Cursor::string_map).unwrap_or_default()
    }

    /// Has the object be in force in spite of `errors` errors, see [`Context::forgive`].
    pub(crate) fn forgive(&mut self, errors: usize) {
        self.context.forgive(errors);
    }

    /// Reports something about the mapping as a whole.
    pub fn report(&mut self, code: Code, message: impl Into<String>, remedy: impl Into<String>) {
        self.context.report(code, self.position, &self.path, message, remedy);
    }
}

impl Drop for Fields<'_, '_> {
    fn drop(&mut self) {
        // A parser that saw an error may well have stopped.
        if !self.context.is_valid() {
            return;
        }
        for (index, entry) in self.entries.iter().enumerate() {
            if self.done & bit(index) == 0 && entry.value.value != Value::Null {
                let path = Path { parent: Some(&self.path), step: Step::Field(&entry.key) };
                let message = format!("{path} was not read");
                self.context.report(Code::UnreadField, entry.position, &path, message, "please report it");
            }
        }
    }
}

/// Entries beyond 64 share the last bit: no schema has so many fields, so those are unknown.
fn bit(index: usize) -> u64 {
    1 << index.min(63)
}

/// The field of `schema` that is most like `name`.
fn suggestion(schema: &Schema, name: &str) -> Option<&'static str> {
    if name.len() > 64 {
        return None;
    }
    let distance = |field: &Field| edit_distance(&field.name.to_lowercase(), &name.to_lowercase());
    let best = schema.fields.iter().map(|f| (distance(f), f.name)).min()?;
    (best.0 <= name.len() / 3).then_some(best.1)
}

/// Levenshtein's distance.
pub(crate) fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (slot, y) in row.iter_mut().skip(1).zip(&b) {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = *slot;
            left = substituted.min(diagonal + 1).min(left + 1);
            *slot = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Limits, documents, parse};

    static INNER: Schema = Schema { name: "T.inner", fields: &[enforced("port"), enforced("names")] };
    static OUTER: Schema = Schema {
        name: "T",
        fields: &[
            nested("inner", &INNER),
            nested("list", &INNER),
            enforced("labels"),
            enforced("flag"),
            silent("plumbing", "it is the node's"),
            not_applicable("weight", "connections are not weighed"),
            refused("magic", "there is none", "remove it"),
        ],
    };

    fn with(text: &str, read: impl FnOnce(&mut Fields<'_, '_>)) -> Vec<String> {
        let document = documents(text).next().unwrap();
        let node = parse(document, &Limits::default()).unwrap().unwrap();
        let (file, mut pool) = ("f.yaml".into(), Pool::default());
        let mut context = Context::new(&file, document, &mut pool);
        let mut fields = Cursor::root(&node, &OUTER, &mut context).fields().unwrap();
        read(&mut fields);
        drop(fields);
        context.take_diagnostics().iter().map(|d| format!("{} {}", d.code, d.message)).collect()
    }

    #[test]
    fn every_field_is_taken_or_said() {
        let said = with("flag: true\nplumbing: {x: 1}\nweight: 1\nmagic: 1\nfalg: 2\n", |f| {
            assert_eq!(f.boolean("flag"), Some(true));
        });
        assert_eq!(
            said,
            [
                "field-not-applicable weight has no effect: connections are not weighed",
                "field-refused magic is refused: there is none",
                "unknown-field there is no field falg",
            ]
        );
        assert_eq!(with("flag: true\n", |_| ()), ["unread-field flag was not read"]);
        assert_eq!(with("flag:\nweight: null\n", |_| ()), [""; 0]);
    }

    #[test]
    fn a_typing_mistake_gets_a_suggestion() {
        assert_eq!(suggestion(&OUTER, "Lables"), Some("labels"));
        assert_eq!(suggestion(&OUTER, "something"), None);
    }

    #[test]
    fn values_of_the_wrong_type_are_named_with_their_path() {
        let said = with("inner: {port: 70000, names: [a, 1]}\nlist: [{port: x}, 7]\nlabels: {a: 1}\n", |f| {
            let mut inner = f.object("inner").unwrap();
            assert_eq!(inner.integer::<u16>("port", 1..=65535), None);
            assert_eq!(inner.string_list("names"), ["a"]);
            drop(inner);
            f.each("list", |item| {
                if let Some(mut fields) = item.fields() {
                    assert_eq!(fields.integer::<u16>("port", 1..=65535), None);
                }
            });
            assert_eq!(f.string_map("labels"), []);
            assert!(f.required("flag").is_none());
        });
        assert_eq!(
            said,
            [
                "invalid-value inner.port: 70000 is not in 1 to 65535",
                "wrong-type inner.names[1] must be a string, and is an integer",
                "wrong-type list[0].port must be an integer, and is a string",
                "wrong-type list[1] must be a mapping, and is an integer",
                "wrong-type labels.a must be a string, and is an integer",
                "missing-field flag is missing",
            ]
        );
    }

    #[test]
    fn the_table_of_fields_is_walked_from_the_schema() {
        let mut paths = Vec::new();
        OUTER.walk(&mut |path, _| paths.push(path.to_owned()));
        assert!(paths.contains(&"inner.port".to_owned()) && paths.contains(&"magic".to_owned()));
    }

    #[test]
    fn distances_are_levenshteins() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
    }
}
