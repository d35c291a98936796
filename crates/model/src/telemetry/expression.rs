//! Expressions over what is known of a request: the part of CEL that filters and labels of Telemetry need. They are
//! parsed and checked for their types once, and worked out without an allocation for each request that is only
//! compared.
//!
//! As in CEL, `&&` and `||` decide by the side that can be told: `response.code >= 400 || request.useragent == 'x'`
//! holds for a failed request without that field.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::facts::{Attribute, Facts, Headers, Missing, Type, Value};
use super::parse::{self, InvalidExpression};
use crate::Str;
use crate::http::Regex;

/// An expression that was checked.
#[derive(Clone)]
pub struct Expression {
    source: Str,
    node: Arc<Node>,
    kind: Type,
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.source, f)
    }
}

/// What an expression is made of. Types fit: the parser has seen to that.
#[derive(Debug)]
pub(super) enum Node {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Str),
    Attribute(Attribute),
    /// The name is in lower case if it is a constant.
    Header(Headers, Box<Node>),
    HasAttribute(Attribute),
    HasHeader(Headers, Box<Node>),
    Not(Box<Node>),
    Negative(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    If(Box<Node>, Box<Node>, Box<Node>),
    Compare(Comparison, Box<Node>, Box<Node>),
    Calculate(Calculation, Box<Node>, Box<Node>),
    OneOf(Box<Node>, Vec<Node>),
    StartsWith(Box<Node>, Box<Node>),
    EndsWith(Box<Node>, Box<Node>),
    Contains(Box<Node>, Box<Node>),
    Matches(Box<Node>, Regex),
    Size(Box<Node>),
    ToText(Box<Node>),
    ToInt(Box<Node>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Calculation {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

impl Expression {
    /// Parses and checks `source`.
    ///
    /// # Errors
    /// It is no expression, asks for what is not known here, or compares what can't be compared.
    pub fn new(source: &str) -> Result<Self, InvalidExpression> {
        let (node, kind) = parse::parse(source)?;
        Ok(Self { source: source.into(), node: Arc::new(node), kind })
    }

    /// As it was written.
    #[must_use]
    pub fn source(&self) -> &Str {
        &self.source
    }

    /// The type of its value.
    #[must_use]
    pub fn kind(&self) -> Type {
        self.kind
    }

    /// Whether it holds; what can't be told does not.
    #[must_use]
    pub fn holds(&self, facts: &dyn Facts) -> bool {
        matches!(self.node.value(facts), Ok(Value::Bool(true)))
    }

    /// Its value as text; `None` where it can't be told.
    #[must_use]
    pub fn text<'a>(&'a self, facts: &'a dyn Facts) -> Option<Cow<'a, str>> {
        self.node.value(facts).ok().map(text_of)
    }
}

fn text_of(value: Value<'_>) -> Cow<'_, str> {
    match value {
        Value::Bool(value) => Cow::Borrowed(if value { "true" } else { "false" }),
        Value::Int(value) => Cow::Owned(value.to_string()),
        Value::Float(value) => Cow::Owned(value.to_string()),
        Value::Text(value) => value,
    }
}

impl Node {
    fn value<'a>(&'a self, facts: &'a dyn Facts) -> Result<Value<'a>, Missing> {
        Ok(match self {
            Self::Bool(value) => Value::Bool(*value),
            Self::Int(value) => Value::Int(*value),
            Self::Float(value) => Value::Float(*value),
            Self::Text(value) => Value::Text(Cow::Borrowed(value)),
            Self::Attribute(attribute) => facts.attribute(*attribute)?,
            Self::Header(of, name) => Value::Text(facts.header(*of, &name.lower(facts)?)?),
            Self::HasAttribute(attribute) => Value::Bool(facts.attribute(*attribute).is_ok()),
            Self::HasHeader(of, name) => Value::Bool(facts.header(*of, &name.lower(facts)?).is_ok()),
            Self::Not(of) => Value::Bool(!of.truth(facts)?),
            Self::Negative(of) => match of.value(facts)? {
                Value::Int(value) => Value::Int(value.checked_neg().ok_or(Missing)?),
                Value::Float(value) => Value::Float(-value),
                _ => return Err(Missing),
            },
            Self::And(a, b) => Value::Bool(either(a.truth(facts), || b.truth(facts), false)?),
            Self::Or(a, b) => Value::Bool(either(a.truth(facts), || b.truth(facts), true)?),
            Self::If(when, then, other) => {
                if when.truth(facts)? {
                    then.value(facts)?
                } else {
                    other.value(facts)?
                }
            }
            Self::Compare(how, a, b) => Value::Bool(compare(*how, &a.value(facts)?, &b.value(facts)?)?),
            Self::Calculate(how, a, b) => calculate(*how, a.value(facts)?, b.value(facts)?)?,
            Self::OneOf(what, list) => {
                let what = what.value(facts)?;
                let mut found = Ok(false);
                for one in list {
                    let same = one.value(facts).and_then(|one| compare(Comparison::Equal, &what, &one));
                    found = either(found, || same, true);
                }
                Value::Bool(found?)
            }
            Self::StartsWith(a, b) => Value::Bool(a.string(facts)?.starts_with(&*b.string(facts)?)),
            Self::EndsWith(a, b) => Value::Bool(a.string(facts)?.ends_with(&*b.string(facts)?)),
            Self::Contains(a, b) => Value::Bool(a.string(facts)?.contains(&*b.string(facts)?)),
            Self::Matches(a, regex) => Value::Bool(regex.matches(a.string(facts)?.as_bytes())),
            Self::Size(a) => Value::Int(i64::try_from(a.string(facts)?.chars().count()).unwrap_or(i64::MAX)),
            Self::ToText(a) => Value::Text(text_of(a.value(facts)?)),
            Self::ToInt(a) => Value::Int(to_int(a.value(facts)?)?),
        })
    }

    fn truth(&self, facts: &dyn Facts) -> Result<bool, Missing> {
        match self.value(facts)? {
            Value::Bool(value) => Ok(value),
            _ => Err(Missing),
        }
    }

    fn string<'a>(&'a self, facts: &'a dyn Facts) -> Result<Cow<'a, str>, Missing> {
        match self.value(facts)? {
            Value::Text(value) => Ok(value),
            _ => Err(Missing),
        }
    }

    /// The name of a field.
    fn lower<'a>(&'a self, facts: &'a dyn Facts) -> Result<Cow<'a, str>, Missing> {
        let name = self.string(facts)?;
        Ok(if name.bytes().any(|b| b.is_ascii_uppercase()) {
            Cow::Owned(name.to_ascii_lowercase())
        } else {
            name
        })
    }
}

/// `&&` (`decisive` is false) and `||` (true): a side that is decisive decides, whatever the other comes to.
fn either(
    a: Result<bool, Missing>,
    b: impl FnOnce() -> Result<bool, Missing>,
    decisive: bool,
) -> Result<bool, Missing> {
    if a == Ok(decisive) {
        return a;
    }
    match (a, b()) {
        (_, Ok(b)) if b == decisive => Ok(b),
        (Ok(_), b) => b,
        (missing, _) => missing,
    }
}

fn compare(how: Comparison, a: &Value<'_>, b: &Value<'_>) -> Result<bool, Missing> {
    let order = match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => a.cmp(b),
        (Value::Text(a), Value::Text(b)) => a.as_bytes().cmp(b.as_bytes()),
        (Value::Int(a), Value::Int(b)) => a.cmp(b),
        (Value::Int(a), Value::Float(b)) => (*a as f64).partial_cmp(b).ok_or(Missing)?,
        (Value::Float(a), Value::Int(b)) => a.partial_cmp(&(*b as f64)).ok_or(Missing)?,
        (Value::Float(a), Value::Float(b)) => a.partial_cmp(b).ok_or(Missing)?,
        _ => return Err(Missing),
    };
    Ok(match how {
        Comparison::Equal => order.is_eq(),
        Comparison::NotEqual => order.is_ne(),
        Comparison::Less => order.is_lt(),
        Comparison::LessOrEqual => order.is_le(),
        Comparison::Greater => order.is_gt(),
        Comparison::GreaterOrEqual => order.is_ge(),
    })
}

/// What overflows, or divides by nothing, has no value.
fn calculate<'a>(how: Calculation, a: Value<'a>, b: Value<'a>) -> Result<Value<'a>, Missing> {
    Ok(match (a, b) {
        (Value::Text(a), Value::Text(b)) => Value::Text(Cow::Owned(format!("{a}{b}"))),
        (Value::Int(a), Value::Int(b)) => {
            let value = match how {
                Calculation::Add => a.checked_add(b),
                Calculation::Subtract => a.checked_sub(b),
                Calculation::Multiply => a.checked_mul(b),
                Calculation::Divide => a.checked_div(b),
                Calculation::Remainder => a.checked_rem(b),
            };
            Value::Int(value.ok_or(Missing)?)
        }
        (Value::Float(a), Value::Float(b)) => Value::Float(match how {
            Calculation::Add => a + b,
            Calculation::Subtract => a - b,
            Calculation::Multiply => a * b,
            Calculation::Divide => a / b,
            Calculation::Remainder => return Err(Missing),
        }),
        _ => return Err(Missing),
    })
}

fn to_int(value: Value<'_>) -> Result<i64, Missing> {
    match value {
        Value::Int(value) => Ok(value),
        Value::Float(value) if value.is_finite() && value.abs() < 9e18 => Ok(value as i64),
        Value::Text(text) => text.parse().map_err(|_| Missing),
        Value::Float(_) | Value::Bool(_) => Err(Missing),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    struct Request;

    impl Facts for Request {
        fn attribute(&self, attribute: Attribute) -> Result<Value<'_>, Missing> {
            Ok(match attribute {
                Attribute::ResponseCode => Value::Int(404),
                Attribute::RequestMethod => Value::Text("GET".into()),
                Attribute::RequestUrlPath => Value::Text("/v1beta3/x".into()),
                Attribute::RequestDuration => Value::Float(1.5),
                Attribute::ConnectionMtls => Value::Bool(true),
                _ => return Err(Missing),
            })
        }

        fn header(&self, _: Headers, name: &str) -> Result<Cow<'_, str>, Missing> {
            if name == "x-debug" { Ok("1".into()) } else { Err(Missing) }
        }
    }

    #[test]
    fn expressions_hold_or_not() {
        for (text, holds) in [
            ("response.code >= 400", true),
            ("response.code >= 400 && response.code < 404", false),
            ("connection.mtls && request.url_path.contains('v1beta3')", true),
            // Whatever can be told decides, on either side.
            ("request.useragent == 'x' || response.code == 404", true),
            ("!(request.useragent == 'x' && response.code == 200)", true),
            ("request.useragent == 'x' || response.code == 200", false),
            ("!has(request.useragent) || !(request.useragent.startsWith('Amazon'))", true),
            ("request.headers['X-Debug'] == '1' && 'x-debug' in request.headers", true),
            ("has(request.headers.nope)", false),
            ("request.method in ['POST', 'GET']", true),
            ("request.duration > duration('1s')", true),
            ("request.url_path.matches('^/v1(beta)?[0-9]')", true),
            ("request.url_path.matches('nope|/x')", true),
            ("size(request.method) == 3 && request.method.size() == 3", true),
            ("(response.code > 499 ? 'bad' : 'good') + '!' == \"good!\"", true),
            ("response.code % 100 == 4 && -response.code + 1 == -403", true),
            ("int('7') * 2 == 14 && string(response.code) == '404'", true),
            ("response.code / 0 == 1", false),
            ("9223372036854775807 + 1 > 0", false),
        ] {
            assert_eq!(Expression::new(text).unwrap().holds(&Request), holds, "{text}");
        }
        let label = Expression::new("request.method + ' ' + string(response.code)").unwrap();
        assert_eq!(label.text(&Request).as_deref(), Some("GET 404"));
        assert_eq!(Expression::new("request.referer").unwrap().text(&Request), None);
    }

    #[test]
    fn what_can_not_be_evaluated_is_refused_with_its_place() {
        for (text, part) in [
            ("", "missing"),
            ("response.code >=", "missing"),
            ("response.nope == 1", "response.nope can't be told here; known are response.code"),
            ("filter_state['x'] == 'y'", "only fields"),
            ("node.id == 'x'", "request, response, connection"),
            ("response.code == '400'", "can't be compared"),
            ("response.code && true", "Bool is needed"),
            ("request.method.matches(request.path)", "must be a text"),
            ("request.method.matches('(')", "regular expression"),
            ("request.method.lower('x')", "no function lower"),
            ("1 # 2", "means nothing"),
            ("'open", "without an end"),
            ("true true", "too much"),
            ("[1, 2]", "no value"),
        ] {
            let error = Expression::new(text).unwrap_err();
            assert!(error.what.contains(part), "{text}: {error}");
        }
        assert_eq!(Expression::new("ä == # 2").unwrap_err().at, 1, "characters, not bytes");
        assert_eq!(Expression::new("1 == 'ä' # 2").unwrap_err().at, 10, "characters, not bytes");
        assert!(Expression::new(&"(".repeat(4000)).is_err());
        assert!(Expression::new(&"!".repeat(4000)).is_err());
        assert!(Expression::new(&format!("'{}'", "x".repeat(5000))).is_err());
    }
}
