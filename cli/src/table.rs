//! Text for people: aligned columns, and the terminal's standard output.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;

use crate::yaml;

/// The form of an output.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Output {
    /// For people
    #[default]
    Text,
    /// For people with room: more columns, where there are more
    Wide,
    /// For machines
    Json,
    /// For machines, and people
    Yaml,
}

impl Output {
    /// `value` as a document; `None` where the output is for people.
    ///
    /// # Errors
    /// The value has no form in JSON.
    pub fn document(self, value: &impl Serialize) -> Result<Option<String>> {
        Ok(match self {
            Self::Text | Self::Wide => None,
            Self::Json => Some(format!("{}\n", serde_json::to_string_pretty(value)?)),
            Self::Yaml => Some(yaml::write(&serde_json::to_value(value)?, 0)),
        })
    }
}

/// Columns under a heading, each as wide as its widest cell.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row; an empty cell is shown as `-`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let shown = |cell: String| if cell.is_empty() { "-".to_owned() } else { printable(&cell) };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// Whether nothing is under the heading.
    pub fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|r| r.get(column))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                write!(line, "{cell:width$}   ")?;
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Control characters, which would command the terminal, as their escapes: names and file texts come from others.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' && c != '\t' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Writes to standard output. That nobody reads on (`| head`) is no error.
///
/// # Errors
/// The output can't be written for another reason, such as a full disk.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_commands_the_terminal() {
        let mut table = Table::new(&["NAME", "NODE"]);
        table.row(["a-long-name".to_owned(), "node-1".to_owned()]);
        table.row(["b".to_owned(), "\x1b[2J".to_owned()]);
        table.row(["c".to_owned(), String::new()]);
        assert_eq!(
            table.to_string(),
            "NAME          NODE\na-long-name   node-1\nb             \\u{1b}[2J\nc             -\n"
        );
    }
}
