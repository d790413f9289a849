//! What documents are found by: comparisons of what stands at a path in them with a value.

use std::cmp::Ordering;

use serde_json::{Number, Value};

use crate::checkpoint::StorageError;

/// The most conditions of one filter.
pub const MAX_CONDITIONS: usize = 20;

/// The most names in one path.
const MAX_NAMES: usize = 20;

/// The most values of one [`Test::In`].
pub const MAX_CHOICES: usize = 100;

/// A value to compare with.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    /// JSON's null. It equals itself.
    Null,
    /// False comes before true.
    Bool(bool),
    /// By its value, exactly, whether it is written as an integer or not: what counts is the decimal number that JSON writes.
    Number(Number),
    /// By code point.
    Text(String),
}

impl From<bool> for Scalar {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Scalar {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Scalar {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

macro_rules! from_integer {
    ($($integer:ty),*) => {
        $(impl From<$integer> for Scalar {
            fn from(value: $integer) -> Self {
                Self::Number(value.into())
            }
        })*
    };
}

from_integer!(i8, i16, i32, i64, u8, u16, u32, u64, usize);

impl From<f64> for Scalar {
    /// What is not a number (or infinite) is null, as in JSON.
    fn from(value: f64) -> Self {
        Number::from_f64(value).map_or(Self::Null, Self::Number)
    }
}

/// A way into a document: names of fields, from the outermost. As text, with dots between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldPath(Vec<String>);

impl FieldPath {
    /// The names.
    pub fn fields(&self) -> &[String] {
        &self.0
    }
}

impl From<&str> for FieldPath {
    fn from(path: &str) -> Self {
        Self(path.split('.').map(str::to_owned).collect())
    }
}

impl<const N: usize> From<[&str; N]> for FieldPath {
    /// Names that may have dots in them.
    fn from(fields: [&str; N]) -> Self {
        Self(fields.into_iter().map(str::to_owned).collect())
    }
}

impl From<Vec<String>> for FieldPath {
    fn from(fields: Vec<String>) -> Self {
        Self(fields)
    }
}

/// What must hold for the value at a path. A comparison with a value of another type is false, whichever comparison it is; and so is
/// one where there is nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// It equals this.
    Eq(Scalar),
    /// It is of this one's type, and another.
    Ne(Scalar),
    /// It is greater.
    Gt(Scalar),
    /// It is greater or equal.
    Gte(Scalar),
    /// It is less.
    Lt(Scalar),
    /// It is less or equal.
    Lte(Scalar),
    /// It equals one of these.
    In(Vec<Scalar>),
    /// Something is there (null is something), or nothing is.
    Exists(bool),
}

/// What must hold at one path.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Where.
    pub path: FieldPath,
    /// What.
    pub test: Test,
}

/// Conditions, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter(Vec<Condition>);

impl Filter {
    /// No condition.
    pub fn new() -> Self {
        Self::default()
    }

    /// The conditions.
    pub fn conditions(&self) -> &[Condition] {
        &self.0
    }

    /// And this holds there.
    #[must_use]
    pub fn and(mut self, path: impl Into<FieldPath>, test: Test) -> Self {
        self.0.push(Condition {
            path: path.into(),
            test,
        });
        self
    }

    /// And it equals this.
    #[must_use]
    pub fn eq(self, path: impl Into<FieldPath>, value: impl Into<Scalar>) -> Self {
        self.and(path, Test::Eq(value.into()))
    }

    /// And it is of the same type, and another.
    #[must_use]
    pub fn ne(self, path: impl Into<FieldPath>, value: impl Into<Scalar>) -> Self {
        self.and(path, Test::Ne(value.into()))
    }

    /// And it is greater.
    #[must_use]
    pub fn gt(self, path: impl Into<FieldPath>, value: impl Into<Scalar>) -> Self {
        self.and(path, Test::Gt(value.into()))
    }

    /// And it is greater or equal.
    #[must_use]
    pub fn gte(self, path: impl Into<FieldPath>, value: impl Into<Scalar>) -> Self {
        self.and(path, Test::Gte(value.into()))
    }

    /// And it is less.
    #[must_use]
    pub fn lt(self, path: impl Into<FieldPath>, value: impl Into<Scalar>) -> Self {
        self.and(path, Test::Lt(value.into()))
    }

    /// And it is less or equal.
    #[must_use]
    pub fn lte(self, path: impl Into<FieldPath>, value: impl Into<Scalar>) -> Self {
        self.and(path, Test::Lte(value.into()))
    }

    /// And it equals one of these.
    #[must_use]
    pub fn one_of<V: Into<Scalar>>(
        self,
        path: impl Into<FieldPath>,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        self.and(path, Test::In(values.into_iter().map(Into::into).collect()))
    }

    /// And something is there, or nothing is.
    #[must_use]
    pub fn exists(self, path: impl Into<FieldPath>, exists: bool) -> Self {
        self.and(path, Test::Exists(exists))
    }

    /// Refuses what not every database can look for.
    pub(crate) fn check(&self) -> Result<(), StorageError> {
        let invalid = |what: String| Err(StorageError::InvalidFilter { what });
        if self.0.len() > MAX_CONDITIONS {
            return invalid(format!(
                "it has {} conditions, and at most {MAX_CONDITIONS} are allowed",
                self.0.len()
            ));
        }
        for Condition { path, test } in &self.0 {
            let odd = |c: char| c == '"' || c == '\\' || c.is_control();
            if path.0.is_empty()
                || path
                    .0
                    .iter()
                    .any(|name| name.is_empty() || name.contains(odd))
            {
                return invalid(format!(
                    "the path {:?} has an empty name, or a quote, a backslash or a control character in one",
                    path.0
                ));
            }
            if path.0.len() > MAX_NAMES {
                return invalid(format!("a path has more than {MAX_NAMES} names"));
            }
            if let Test::In(choices) = test
                && choices.len() > MAX_CHOICES
            {
                return invalid(format!(
                    "one of its conditions has {} values to choose from, and at most {MAX_CHOICES} are allowed",
                    choices.len()
                ));
            }
        }
        Ok(())
    }

    /// Whether all of it holds for a value.
    pub(crate) fn holds(&self, value: &Value) -> bool {
        self.0.iter().all(|condition| {
            let mut found = Some(value);
            for name in &condition.path.0 {
                found = found.and_then(|value| value.as_object()?.get(name));
            }
            condition.test.holds(found)
        })
    }
}

impl Test {
    fn holds(&self, found: Option<&Value>) -> bool {
        let compared = |with: &Scalar| found.and_then(|value| compare(value, with));
        match self {
            Self::Eq(with) => compared(with) == Some(Ordering::Equal),
            Self::Ne(with) => compared(with).is_some_and(Ordering::is_ne),
            Self::Gt(with) => compared(with).is_some_and(Ordering::is_gt),
            Self::Gte(with) => compared(with).is_some_and(Ordering::is_ge),
            Self::Lt(with) => compared(with).is_some_and(Ordering::is_lt),
            Self::Lte(with) => compared(with).is_some_and(Ordering::is_le),
            Self::In(choices) => choices
                .iter()
                .any(|with| compared(with) == Some(Ordering::Equal)),
            Self::Exists(exists) => found.is_some() == *exists,
        }
    }
}

fn compare(value: &Value, with: &Scalar) -> Option<Ordering> {
    match (value, with) {
        (Value::Null, Scalar::Null) => Some(Ordering::Equal),
        (Value::Bool(value), Scalar::Bool(with)) => Some(value.cmp(with)),
        (Value::Number(value), Scalar::Number(with)) => {
            Some(compare_numbers(&value.to_string(), &with.to_string()))
        }
        (Value::String(value), Scalar::Text(with)) => Some(value.cmp(with)),
        _ => None,
    }
}

/// A decimal number: its digits without zeros at either end, and where the point is before them.
struct Decimal<'a> {
    negative: bool,
    /// The value is 0.(digits) × 10^scale.
    scale: i64,
    digits: [&'a [u8]; 2],
}

impl<'a> Decimal<'a> {
    fn parse(text: &'a str) -> Self {
        let (negative, text) = text
            .strip_prefix('-')
            .map_or((false, text), |text| (true, text));
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let exponent: i64 = exponent.trim_start_matches('+').parse().unwrap_or(0);
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let significant = whole.trim_start_matches('0');
        let mut scale = i64::try_from(significant.len()).unwrap_or(i64::MAX) + exponent;
        let fraction = fraction.trim_end_matches('0');
        let (whole, fraction) = if significant.is_empty() {
            let rest = fraction.trim_start_matches('0');
            scale -= i64::try_from(fraction.len() - rest.len()).unwrap_or(i64::MAX);
            ("", rest)
        } else if fraction.is_empty() {
            (significant.trim_end_matches('0'), "")
        } else {
            (significant, fraction)
        };
        Self {
            negative,
            scale,
            digits: [whole.as_bytes(), fraction.as_bytes()],
        }
    }

    fn is_zero(&self) -> bool {
        self.digits.iter().all(|digits| digits.is_empty())
    }
}

/// Compares two numbers as JSON writes them, exactly.
pub(crate) fn compare_numbers(a: &str, b: &str) -> Ordering {
    let (a, b) = (Decimal::parse(a), Decimal::parse(b));
    let sign = |number: &Decimal<'_>| match (number.is_zero(), number.negative) {
        (true, _) => 0,
        (false, true) => -1,
        (false, false) => 1,
    };
    let signs = sign(&a).cmp(&sign(&b));
    if signs.is_ne() || a.is_zero() {
        return signs;
    }
    let digits = |number: &Decimal<'_>| number.digits.concat();
    let larger = a
        .scale
        .cmp(&b.scale)
        .then_with(|| digits(&a).cmp(&digits(&b)));
    if a.negative { larger.reverse() } else { larger }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_by_what_they_are_and_not_by_how_they_are_written() {
        let ascending = [
            "-1e300",
            "-12.5",
            "-12",
            "-1.5e-320",
            "0",
            "5e-324",
            "0.001",
            "0.1",
            "1",
            "1.0000000001",
            "9",
            "10",
            "100.5",
            "9007199254740991",
            "9007199254740992",
            "9007199254740993",
            "9223372036854775807",
            "9.223372036854776e18",
            "18446744073709551615",
            "1e300",
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare_numbers(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
        for (a, b) in [
            ("0", "-0.0"),
            ("1", "1.0"),
            ("100", "1e2"),
            ("100.0", "1E+2"),
            ("0.1", "1e-1"),
            ("12.50", "1.25e1"),
            ("9007199254740992", "9007199254740992.0"),
        ] {
            assert_eq!(compare_numbers(a, b), Ordering::Equal, "{a} and {b}");
        }
    }

    #[test]
    fn comparisons_of_different_types_are_false() {
        let value =
            serde_json::json!({"n": 1, "t": "1", "b": true, "z": null, "o": {"n": 2}, "l": [1]});
        for (path, with) in [
            ("n", Scalar::from("1")),
            ("n", Scalar::Null),
            ("t", 1.into()),
            ("b", 1.into()),
            ("z", false.into()),
            ("o", 2.into()),
            ("l", 1.into()),
            ("l.0", 1.into()),
            ("x", 1.into()),
        ] {
            for test in [
                Test::Eq(with.clone()),
                Test::Ne(with.clone()),
                Test::Gt(with.clone()),
                Test::Gte(with.clone()),
                Test::Lt(with.clone()),
                Test::Lte(with.clone()),
                Test::In(vec![with.clone()]),
            ] {
                let filter = Filter::new().and(path, test);
                assert!(!filter.holds(&value), "{filter:?}");
            }
        }
        assert!(
            Filter::new()
                .eq("o.n", 2.0)
                .gte("z", Scalar::Null)
                .ne("t", "2")
                .holds(&value)
        );
    }
}
