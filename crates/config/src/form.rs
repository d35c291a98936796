//! What the values of fields are, for the kinds of our own: their definitions in a cluster are made of the tables of fields,
//! by the limits and words that the parsers read them by.

/// What a value is, in a kind of our own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// A text of at least one character.
    Text,
    /// A text, perhaps empty, of so many characters at most.
    UpTo(u32),
    /// A name of so many characters at most.
    Name(u32),
    /// Nothing but an empty text; with what is said otherwise.
    Empty(&'static str),
    /// One of these words.
    Words(&'static [&'static str]),
    /// A whole number from 1 up to this one.
    Count(u32),
    /// Whether something is so.
    Flag,
    /// A time of at least 1ms, such as `1.5s`.
    Time,
}

/// The words of a table that a parser reads them by.
#[must_use]
#[allow(clippy::indexing_slicing, reason = "counted up to the length, in a constant")]
pub const fn words_of<T: Copy, const N: usize>(table: &[(&'static str, T); N]) -> [&'static str; N] {
    let mut words = [""; N];
    let mut at = 0;
    while at < N {
        words[at] = table[at].0;
        at += 1;
    }
    words
}
