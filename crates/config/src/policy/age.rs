//! Which of several objects was there first.

use model::Str;

/// An object's place among others of its kind: the oldest first, those that don't say when they were made last, and
/// by namespace and name among equals. Files that people write say nothing of their age, so there the names decide.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Age {
    /// Whether the time is not known.
    unknown: bool,
    /// Seconds since 1970, and nanoseconds.
    time: (i64, u32),
    /// The namespace.
    pub namespace: Str,
    /// The name.
    pub name: Str,
}

impl Age {
    /// The place of an object that was made at `created` (RFC 3339). A text that is no time counts as none.
    #[must_use]
    pub fn new(created: &str, namespace: Str, name: Str) -> Self {
        let time = parse_time(created);
        Self { unknown: time.is_none(), time: time.unwrap_or_default(), namespace, name }
    }
}

/// Reads a time of RFC 3339: `2026-11-20T10:00:00Z`, with a fraction or another offset where there is one.
fn parse_time(text: &str) -> Option<(i64, u32)> {
    let number = |range: std::ops::Range<usize>| {
        let digits = text.get(range)?;
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<i64>().ok())?
    };
    let is = |at: usize, wanted: &[u8]| text.as_bytes().get(at).is_some_and(|b| wanted.contains(b));
    let separators =
        is(4, b"-") && is(7, b"-") && is(10, b"Tt ") && is(13, b":") && is(16, b":") && is(19, b"Zz+-.");
    if !separators {
        return None;
    }
    let days = days(number(0..4)?, number(5..7)?, number(8..10)?)?;
    let seconds = number(11..13)? * 3600 + number(14..16)? * 60 + number(17..19)?;
    let mut rest = text.get(19..)?;
    let mut nanoseconds = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction.find(|c: char| !c.is_ascii_digit())?;
        let (digits, after) = fraction.split_at_checked(end)?;
        nanoseconds = format!("{:0<9}", digits.get(..9).unwrap_or(digits)).parse().ok()?;
        rest = after;
    }
    let offset = match rest {
        "Z" | "z" => 0,
        _ => {
            let (sign, time) = match rest.as_bytes().first()? {
                b'+' => (1, rest.get(1..)?),
                b'-' => (-1, rest.get(1..)?),
                _ => return None,
            };
            // Two digits each, like all that is before: any number would overflow what it is made into.
            let two = |part: &str| {
                let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
                part.parse::<i64>().ok().filter(|_| digits)
            };
            let (hours, minutes) = time.split_once(':')?;
            sign * (two(hours)? * 3600 + two(minutes)? * 60)
        }
    };
    Some((days * 86_400 + seconds - offset, nanoseconds))
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, by counting years from March on, so that the leap day
/// is a year's last.
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    if !((1..=12).contains(&month) && (1..=31).contains(&day)) {
        return None;
    }
    let year = if month > 2 { year } else { year - 1 };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let leap_days = year / 4 - year / 100 + year / 400;
    Some(year * 365 + leap_days + day_of_year - 719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_every_form_of_the_rfc() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some((0, 0))),
            ("2000-02-29T12:34:56Z", Some((951_827_696, 0))),
            ("2026-11-20T10:00:00Z", Some((1_795_168_800, 0))),
            ("2026-11-20T12:00:00+02:00", Some((1_795_168_800, 0))),
            ("2026-11-20T07:30:00.25-02:30", Some((1_795_168_800, 250_000_000))),
            ("2026-11-20", None),
            ("2026-11-20T10:00:00", None),
            ("2026-13-20T10:00:00Z", None),
            ("2026-11-20T10:00:00+9223372036854775807:00", None),
            ("2026-11-20T10:00:00+00:9223372036854775807", None),
            ("2026-11-20T10:00:00+-5:00", None),
            ("2026-11-20T10:00:00-+5:00", None),
            ("2026-11-20T10:00:00+1:00", None),
            ("9999-12-31T23:59:59-99:99", Some((253_402_663_139, 0))),
            ("yesterday", None),
            ("２０２６-11-20T10:00:00Z", None),
            ("", None),
        ] {
            assert_eq!(parse_time(text), expected, "{text}");
        }
    }

    #[test]
    fn the_oldest_comes_first_and_the_undated_last() {
        let age = |created: &str, name: &str| Age::new(created, "ns".into(), name.into());
        let mut ages = [
            age("", "a"),
            age("2026-01-02T00:00:00Z", "b"),
            age("2026-01-01T00:00:00Z", "d"),
            age("2026-01-01T00:00:00Z", "c"),
            age("", "0"),
        ];
        ages.sort();
        let names: Vec<&str> = ages.iter().map(|a| &*a.name).collect();
        assert_eq!(names, ["c", "d", "b", "0", "a"]);
    }
}
