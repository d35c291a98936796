//! What a source file holds: functions with their lengths, the names of modules, and allowed lints.

use anyhow::{Context, Result};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// A function, method or default method.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name, after those of the types and modules that hold it.
    pub name: String,
    /// The line of its signature.
    pub line: usize,
    /// From the signature to the closing brace.
    pub lines: usize,
}

/// What was found in a file.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The functions, those within functions too.
    pub functions: Vec<Function>,
    /// The names of the modules that it declares.
    pub modules: Vec<String>,
    /// Whether the file begins with `#![forbid(unsafe_code)]`.
    pub forbids_unsafe: bool,
    /// The lines of attributes that allow lints for a whole module or crate (`#![allow(…)]`) without a reason.
    pub silent_allows: Vec<usize>,
    path: Vec<String>,
}

impl Parsed {
    /// Parses a file's text.
    ///
    /// # Errors
    /// It is no Rust.
    pub fn new(text: &str) -> Result<Self> {
        let file = syn::parse_file(text).context("not understood as Rust")?;
        let mut parsed = Self::default();
        for attribute in &file.attrs {
            parsed.file_attribute(attribute);
        }
        parsed.visit_file(&file);
        Ok(parsed)
    }

    fn file_attribute(&mut self, attribute: &syn::Attribute) {
        let mut names = Vec::new();
        // `reason = "…"` counts as a name.
        let _ = attribute.parse_nested_meta(|meta| {
            names.extend(meta.path.segments.last().map(|s| s.ident.to_string()));
            if let Ok(value) = meta.value() {
                value.parse::<syn::Lit>()?;
            }
            Ok(())
        });
        let path = attribute.path();
        self.forbids_unsafe |= path.is_ident("forbid") && names.iter().any(|n| n == "unsafe_code");
        let allows = path.is_ident("allow") || path.is_ident("expect");
        if allows && !names.iter().any(|n| n == "reason") {
            self.silent_allows.push(attribute.span().start().line);
        }
    }

    fn function(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let start = signature.span().start().line;
        let end = body.span().end().line;
        let name =
            self.path.iter().chain([&signature.ident.to_string()]).cloned().collect::<Vec<_>>().join("::");
        self.functions.push(Function { name, line: start, lines: end + 1 - start });
    }

    fn within(&mut self, name: String, visit: impl FnOnce(&mut Self)) {
        self.path.push(name);
        visit(self);
        self.path.pop();
    }
}

impl<'ast> Visit<'ast> for Parsed {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block);
        self.within(item.sig.ident.to_string(), |this| visit::visit_item_fn(this, item));
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block);
        self.within(item.sig.ident.to_string(), |this| visit::visit_impl_item_fn(this, item));
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.function(&item.sig, body);
        }
        self.within(item.sig.ident.to_string(), |this| visit::visit_trait_item_fn(this, item));
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let name = match &*item.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|s| s.ident.to_string()),
            _ => None,
        };
        self.within(name.unwrap_or_else(|| "impl".to_owned()), |this| visit::visit_item_impl(this, item));
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.within(item.ident.to_string(), |this| visit::visit_item_trait(this, item));
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.modules.push(item.ident.to_string());
        self.within(item.ident.to_string(), |this| visit::visit_item_mod(this, item));
    }
}
