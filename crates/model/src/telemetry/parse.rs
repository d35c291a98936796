//! Reading expressions, with their types.

use std::iter::Peekable;
use std::str::CharIndices;

use super::expression::{Calculation, Comparison, Node};
use super::facts::{Attribute, Headers, Type};
use crate::http::Regex;

/// The longest expression, in bytes.
const MAX_LENGTH: usize = 4096;
/// How deep it may be nested.
const MAX_DEPTH: u32 = 48;

/// Why an expression was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("near character {at}: {what}")]
pub struct InvalidExpression {
    /// The place of the character, from 1.
    pub at: usize,
    /// What is wrong there.
    pub what: String,
}

/// Parses `source`.
pub(super) fn parse(source: &str) -> Result<(Node, Type), InvalidExpression> {
    if source.len() > MAX_LENGTH {
        let what = format!("the expression is longer than {MAX_LENGTH} bytes");
        return Err(InvalidExpression { at: 1, what });
    }
    let mut parser = Parser { tokens: tokens(source)?, at: 0, depth: 0, end: source.chars().count() + 1 };
    let whole = parser.conditional()?;
    if let Some((token, at)) = parser.tokens.get(parser.at) {
        return Err(InvalidExpression { at: *at, what: format!("{} is too much", token.shown()) });
    }
    parser.value(whole)
}

#[derive(Clone, PartialEq, Debug)]
enum Token {
    Name(String),
    Int(i64),
    Float(f64),
    Text(String),
    Sign(&'static str),
}

impl Token {
    fn shown(&self) -> String {
        match self {
            Self::Name(name) => format!("{name:?}"),
            Self::Int(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Text(text) => format!("{text:?}"),
            Self::Sign(sign) => format!("{sign:?}"),
        }
    }
}

/// Longer signs first.
const SIGNS: [&str; 22] = [
    "&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "+", "-", "*", "/", "%", "?", ":", "(", ")", "[", "]",
    ",", ".",
];

fn tokens(source: &str) -> Result<Vec<(Token, usize)>, InvalidExpression> {
    let mut tokens = Vec::new();
    let mut characters = source.char_indices().peekable();
    let mut place = 1;
    while let Some(&(start, c)) = characters.peek() {
        let at = place;
        let rest = source.get(start..).unwrap_or_default();
        let length = if c.is_whitespace() {
            c.len_utf8()
        } else if c.is_ascii_alphabetic() || c == '_' {
            let length = length_of(rest, |c| c.is_ascii_alphanumeric() || c == '_');
            tokens.push((Token::Name(rest.get(..length).unwrap_or_default().to_owned()), at));
            length
        } else if c.is_ascii_digit() {
            let length = length_of(rest, |c| c.is_ascii_alphanumeric() || c == '.');
            tokens.push((number(rest.get(..length).unwrap_or_default(), at)?, at));
            length
        } else if matches!(c, '"' | '\'') {
            let (text, length) = quoted(rest, at)?;
            tokens.push((Token::Text(text), at));
            length
        } else {
            let sign = SIGNS.into_iter().find(|sign| rest.starts_with(sign));
            let sign =
                sign.ok_or_else(|| InvalidExpression { at, what: format!("{c:?} means nothing here") })?;
            tokens.push((Token::Sign(sign), at));
            sign.len()
        };
        place += advance(&mut characters, start + length);
    }
    Ok(tokens)
}

/// Goes on to the byte `to`; says how many characters that were.
fn advance(characters: &mut Peekable<CharIndices<'_>>, to: usize) -> usize {
    let mut count = 0;
    while characters.next_if(|(at, _)| *at < to).is_some() {
        count += 1;
    }
    count
}

fn length_of(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

fn number(text: &str, at: usize) -> Result<Token, InvalidExpression> {
    let number = if text.contains('.') {
        text.parse().ok().map(Token::Float)
    } else {
        text.parse().ok().map(Token::Int)
    };
    number.ok_or_else(|| InvalidExpression { at, what: format!("{text:?} is no number") })
}

/// A text in quotes, with its length in the source.
fn quoted(rest: &str, at: usize) -> Result<(String, usize), InvalidExpression> {
    let mut characters = rest.char_indices();
    let quote = characters.next().map_or('"', |(_, c)| c);
    let mut text = String::new();
    while let Some((place, c)) = characters.next() {
        let c = match c {
            c if c == quote => return Ok((text, place + c.len_utf8())),
            '\\' => match characters.next().map(|(_, c)| c) {
                Some('n') => '\n',
                Some('t') => '\t',
                Some('r') => '\r',
                Some(c @ ('\\' | '"' | '\'' | '`' | '?')) => c,
                _ => {
                    return Err(InvalidExpression { at, what: "an escape that there is not".to_owned() });
                }
            },
            c => c,
        };
        text.push(c);
    }
    Err(InvalidExpression { at, what: "a text without an end".to_owned() })
}

/// A part of an expression.
enum Part {
    Value(Node, Type),
    /// The beginning of an attribute's name, which alone has no value.
    Name(String),
    /// Fields, by a map of them.
    Headers(Headers),
    List(Vec<(Node, Type)>),
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: u32,
    /// The place behind the last character.
    end: usize,
}

type Parsed<T> = Result<T, InvalidExpression>;

impl Parser {
    fn place(&self) -> usize {
        self.tokens.get(self.at).map_or(self.end, |(_, at)| *at)
    }

    fn wrong<T>(&self, what: impl Into<String>) -> Parsed<T> {
        let at = self.tokens.get(self.at.saturating_sub(1)).map_or(1, |(_, at)| *at);
        Err(InvalidExpression { at, what: what.into() })
    }

    fn take(&mut self, sign: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some((Token::Sign(s), _)) if *s == sign);
        self.at += usize::from(found);
        found
    }

    fn one_of<T: Copy>(&mut self, signs: &[(&str, T)]) -> Option<T> {
        signs.iter().find(|(sign, _)| self.take(sign)).map(|(_, means)| *means)
    }

    fn expect(&mut self, sign: &str) -> Parsed<()> {
        if self.take(sign) {
            return Ok(());
        }
        Err(InvalidExpression { at: self.place(), what: format!("{sign:?} is missing") })
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.wrong("it is nested too deeply");
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// What has a value by itself.
    fn value(&self, part: Part) -> Parsed<(Node, Type)> {
        match part {
            Part::Value(node, kind) => Ok((node, kind)),
            Part::Name(name) => self.unknown(&name),
            Part::Headers(_) => self.wrong("the fields are no value: name one, as in request.headers['x']"),
            Part::List(_) => self.wrong("a list has no value here"),
        }
    }

    fn unknown<T>(&self, name: &str) -> Parsed<T> {
        let group = name.split('.').next().unwrap_or_default();
        let like = Attribute::ALL.iter().map(|(n, ..)| *n).filter(|n| n.split('.').next() == Some(group));
        let known: Vec<&str> = like.collect();
        let known = if known.is_empty() {
            "request, response, connection, source, destination, upstream and xds are known".to_owned()
        } else {
            format!("known are {}", known.join(", "))
        };
        self.wrong(format!("{name} can't be told here; {known}"))
    }

    fn of_type(&self, part: Part, wanted: Type) -> Parsed<Box<Node>> {
        let (node, kind) = self.value(part)?;
        if kind == wanted {
            return Ok(Box::new(node));
        }
        self.wrong(format!("a value of type {wanted:?} is needed here, and this is of type {kind:?}"))
    }

    fn conditional(&mut self) -> Parsed<Part> {
        self.deeper(|parser| {
            let when = parser.any()?;
            if !parser.take("?") {
                return Ok(when);
            }
            let when = parser.of_type(when, Type::Bool)?;
            let then = parser.conditional()?;
            let (then, kind) = parser.value(then)?;
            parser.expect(":")?;
            let other = parser.conditional()?;
            let other = parser.of_type(other, kind)?;
            Ok(Part::Value(Node::If(when, Box::new(then), other), kind))
        })
    }

    fn any(&mut self) -> Parsed<Part> {
        let mut left = self.all()?;
        while self.take("||") {
            let a = self.of_type(left, Type::Bool)?;
            let right = self.all()?;
            left = Part::Value(Node::Or(a, self.of_type(right, Type::Bool)?), Type::Bool);
        }
        Ok(left)
    }

    fn all(&mut self) -> Parsed<Part> {
        let mut left = self.relation()?;
        while self.take("&&") {
            let a = self.of_type(left, Type::Bool)?;
            let right = self.relation()?;
            left = Part::Value(Node::And(a, self.of_type(right, Type::Bool)?), Type::Bool);
        }
        Ok(left)
    }

    fn relation(&mut self) -> Parsed<Part> {
        const COMPARISONS: [(&str, Comparison); 6] = [
            ("==", Comparison::Equal),
            ("!=", Comparison::NotEqual),
            ("<=", Comparison::LessOrEqual),
            (">=", Comparison::GreaterOrEqual),
            ("<", Comparison::Less),
            (">", Comparison::Greater),
        ];
        let left = self.sum()?;
        if matches!(self.tokens.get(self.at), Some((Token::Name(name), _)) if name == "in") {
            self.at += 1;
            return self.membership(left);
        }
        let Some(how) = self.one_of(&COMPARISONS) else { return Ok(left) };
        let (a, kind) = self.value(left)?;
        let right = self.sum()?;
        let (b, other) = self.value(right)?;
        if !comparable(kind, other) {
            return self
                .wrong(format!("a value of type {kind:?} can't be compared to one of type {other:?}"));
        }
        Ok(Part::Value(Node::Compare(how, Box::new(a), Box::new(b)), Type::Bool))
    }

    fn membership(&mut self, left: Part) -> Parsed<Part> {
        let node = match self.sum()? {
            Part::Headers(of) => Node::HasHeader(of, self.of_type(left, Type::Text)?),
            Part::List(list) => {
                let (what, kind) = self.value(left)?;
                if list.iter().any(|(_, other)| !comparable(kind, *other)) {
                    return self.wrong(format!("a value of type {kind:?} can't be in this list"));
                }
                Node::OneOf(Box::new(what), list.into_iter().map(|(node, _)| node).collect())
            }
            Part::Value(..) | Part::Name(_) => return self.wrong("nothing can be in this"),
        };
        Ok(Part::Value(node, Type::Bool))
    }

    fn sum(&mut self) -> Parsed<Part> {
        self.calculation(&[("+", Calculation::Add), ("-", Calculation::Subtract)], Self::product)
    }

    fn product(&mut self) -> Parsed<Part> {
        let signs = [("*", Calculation::Multiply), ("/", Calculation::Divide), ("%", Calculation::Remainder)];
        self.calculation(&signs, Self::unary)
    }

    fn calculation(
        &mut self,
        signs: &[(&str, Calculation)],
        part: impl Fn(&mut Self) -> Parsed<Part>,
    ) -> Parsed<Part> {
        let mut left = part(self)?;
        while let Some(how) = self.one_of(signs) {
            let (a, kind) = self.value(left)?;
            let right = part(self)?;
            let b = self.of_type(right, kind)?;
            let numbers = kind == Type::Int || (kind == Type::Float && how != Calculation::Remainder);
            if !numbers && (kind != Type::Text || how != Calculation::Add) {
                return self.wrong(format!("values of type {kind:?} can't be calculated with like this"));
            }
            left = Part::Value(Node::Calculate(how, Box::new(a), b), kind);
        }
        Ok(left)
    }

    fn unary(&mut self) -> Parsed<Part> {
        self.deeper(|parser| {
            if parser.take("!") {
                let of = parser.unary()?;
                return Ok(Part::Value(Node::Not(parser.of_type(of, Type::Bool)?), Type::Bool));
            }
            if parser.take("-") {
                let of = parser.unary()?;
                return match parser.value(of)? {
                    (node, kind @ (Type::Int | Type::Float)) => {
                        Ok(Part::Value(Node::Negative(Box::new(node)), kind))
                    }
                    _ => parser.wrong("only a number can be negative"),
                };
            }
            parser.member()
        })
    }

    fn member(&mut self) -> Parsed<Part> {
        let mut part = self.primary()?;
        loop {
            if self.take(".") {
                let Some((Token::Name(name), _)) = self.tokens.get(self.at).cloned() else {
                    return self.wrong("a name is missing behind the point");
                };
                self.at += 1;
                part = if self.take("(") { self.method(part, &name)? } else { self.select(part, &name)? };
            } else if self.take("[") {
                let Part::Headers(of) = part else { return self.wrong("only fields have names in brackets") };
                let name = self.conditional()?;
                let name = Box::new(lowered(*self.of_type(name, Type::Text)?));
                self.expect("]")?;
                part = Part::Value(Node::Header(of, name), Type::Text);
            } else {
                return Ok(part);
            }
        }
    }

    fn select(&self, part: Part, name: &str) -> Parsed<Part> {
        match part {
            Part::Name(before) => {
                let whole = format!("{before}.{name}");
                Ok(match whole.as_str() {
                    "request.headers" => Part::Headers(Headers::Request),
                    "response.headers" => Part::Headers(Headers::Response),
                    _ => match Attribute::named(&whole) {
                        Some((attribute, kind)) => Part::Value(Node::Attribute(attribute), kind),
                        None => Part::Name(whole),
                    },
                })
            }
            Part::Headers(of) => {
                let name = Box::new(Node::Text(name.to_ascii_lowercase().as_str().into()));
                Ok(Part::Value(Node::Header(of, name), Type::Text))
            }
            Part::Value(..) | Part::List(_) => self.wrong(format!("it has no part {name:?}")),
        }
    }

    fn method(&mut self, part: Part, name: &str) -> Parsed<Part> {
        let on = self.of_type(part, Type::Text)?;
        if name == "size" {
            self.expect(")")?;
            return Ok(Part::Value(Node::Size(on), Type::Int));
        }
        let argument = self.conditional()?;
        let argument = self.of_type(argument, Type::Text)?;
        self.expect(")")?;
        let node = match (name, *argument) {
            ("startsWith", argument) => Node::StartsWith(on, Box::new(argument)),
            ("endsWith", argument) => Node::EndsWith(on, Box::new(argument)),
            ("contains", argument) => Node::Contains(on, Box::new(argument)),
            ("matches", Node::Text(pattern)) => {
                // Of the whole text, where CEL's is of any part.
                match Regex::new(&pattern).and_then(|_| Regex::new(&format!("(?s:.*)(?:{pattern})(?s:.*)"))) {
                    Ok(regex) => Node::Matches(on, regex),
                    Err(error) => return self.wrong(error.to_string()),
                }
            }
            ("matches", _) => return self.wrong("the pattern of matches must be a text"),
            _ => return self.wrong(format!("there is no function {name}")),
        };
        Ok(Part::Value(node, Type::Bool))
    }

    fn primary(&mut self) -> Parsed<Part> {
        let Some((token, at)) = self.tokens.get(self.at).cloned() else {
            return Err(InvalidExpression { at: self.end, what: "something is missing".to_owned() });
        };
        self.at += 1;
        Ok(match token {
            Token::Int(value) => Part::Value(Node::Int(value), Type::Int),
            Token::Float(value) => Part::Value(Node::Float(value), Type::Float),
            Token::Text(value) => Part::Value(Node::Text(value.as_str().into()), Type::Text),
            Token::Name(name) if name == "true" || name == "false" => {
                Part::Value(Node::Bool(name == "true"), Type::Bool)
            }
            Token::Name(name) if self.take("(") => return self.function(&name),
            Token::Name(name) => Part::Name(name),
            Token::Sign("(") => {
                let inner = self.conditional()?;
                self.expect(")")?;
                inner
            }
            Token::Sign("[") => {
                let mut list = Vec::new();
                while !self.take("]") {
                    let item = self.conditional()?;
                    list.push(self.value(item)?);
                    if !self.take(",") {
                        self.expect("]")?;
                        break;
                    }
                }
                Part::List(list)
            }
            Token::Sign(sign) => {
                return Err(InvalidExpression { at, what: format!("{sign:?} can't stand here") });
            }
        })
    }

    fn function(&mut self, name: &str) -> Parsed<Part> {
        let argument = self.conditional()?;
        self.expect(")")?;
        match name {
            "has" => match argument {
                Part::Value(Node::Attribute(attribute), _) => {
                    Ok(Part::Value(Node::HasAttribute(attribute), Type::Bool))
                }
                Part::Value(Node::Header(of, name), _) => {
                    Ok(Part::Value(Node::HasHeader(of, name), Type::Bool))
                }
                Part::Name(name) => self.unknown(&name),
                _ => self.wrong("has() is of an attribute or a field"),
            },
            "size" => Ok(Part::Value(Node::Size(self.of_type(argument, Type::Text)?), Type::Int)),
            "string" => {
                let (node, _) = self.value(argument)?;
                Ok(Part::Value(Node::ToText(Box::new(node)), Type::Text))
            }
            "int" => match self.value(argument)? {
                (_, Type::Bool) => self.wrong("a truth value is no number"),
                (node, _) => Ok(Part::Value(Node::ToInt(Box::new(node)), Type::Int)),
            },
            "duration" => match self.value(argument)? {
                (Node::Text(text), _) => match seconds(&text) {
                    Some(seconds) => Ok(Part::Value(Node::Float(seconds), Type::Float)),
                    None => self.wrong(format!("{text:?} is no duration, such as \"1.5s\"")),
                },
                _ => self.wrong("duration() is of a text"),
            },
            _ => self.wrong(format!("there is no function {name}")),
        }
    }
}

fn comparable(a: Type, b: Type) -> bool {
    let number = |kind| matches!(kind, Type::Int | Type::Float);
    a == b || (number(a) && number(b))
}

fn lowered(node: Node) -> Node {
    match node {
        Node::Text(name) => Node::Text(name.to_ascii_lowercase().as_str().into()),
        other => other,
    }
}

fn seconds(text: &str) -> Option<f64> {
    let units = [("ms", 0.001), ("us", 0.000_001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let (number, factor) =
        units.into_iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    plain.then(|| number.parse::<f64>().ok()).flatten().map(|number| number * factor)
}
