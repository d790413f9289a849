//! How values cross to PostgreSQL and back: times, JSON, and text with the one character that PostgreSQL does not take.
//!
//! Neither `text` nor `jsonb` can hold U+0000, and what people's programs print does contain it. So it is stored as two
//! characters: [`MARK`] and `0`; and `MARK` itself, which is not a character that text can mean anything by, as `MARK` and
//! `1`.

use std::{borrow::Cow, error::Error};

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{
    Decode, Encode, Postgres, Type,
    encode::IsNull,
    postgres::{
        PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueFormat, PgValueRef, types::Oid,
    },
    types::Json,
};

use crate::{
    checkpoint::{Channels, StorageError},
    stored,
};

type BoxError = Box<dyn Error + Send + Sync>;

/// Stands before a stand-in. A noncharacter: Unicode reserves it for inner use.
const MARK: char = '\u{fdd0}';

/// Microseconds from 1970 to 2000, which is where PostgreSQL begins to count.
const EPOCH: i64 = 946_684_800_000_000;

/// What stands for U+0000.
pub(super) fn nul() -> String {
    String::from_iter([MARK, '0'])
}

/// Text as PostgreSQL can hold it.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if !text.contains(['\0', MARK]) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\0' => out.extend([MARK, '0']),
            MARK => out.extend([MARK, '1']),
            c => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// The inverse of [`text`].
pub(super) fn plain(text: String) -> String {
    if !text.contains(MARK) {
        return text;
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            MARK => out.push(if chars.next() == Some('0') {
                '\0'
            } else {
                MARK
            }),
            c => out.push(c),
        }
    }
    out
}

/// Marks what `jsonb` would refuse in JSON text: `\u0000` in its strings.
fn marked(json: String) -> String {
    if !json.contains("\\u0000") && !json.contains(MARK) {
        return json;
    }
    let mut out = String::with_capacity(json.len() + 16);
    let mut rest = json.as_str();
    while let Some(at) = rest.find(['\\', MARK]) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix(MARK) {
            out.extend([MARK, '1']);
            rest = after;
        } else if let Some(after) = rest.strip_prefix("\\u0000") {
            out.extend([MARK, '0']);
            rest = after;
        } else {
            // An escape is at least two bytes, both ASCII. The four digits of another `\u` are like any other text.
            out.push_str(&rest[..2]);
            rest = &rest[2..];
        }
    }
    out.push_str(rest);
    out
}

/// The inverse of [`marked`].
fn unmarked(json: String) -> String {
    if !json.contains(MARK) {
        return json;
    }
    let mut out = String::with_capacity(json.len() + 16);
    let mut chars = json.chars();
    while let Some(c) = chars.next() {
        match c {
            MARK if chars.next() == Some('0') => out.push_str("\\u0000"),
            c => out.push(c),
        }
    }
    out
}

/// A `jsonb`: JSON text, with what PostgreSQL cannot hold marked.
#[derive(Clone, Debug)]
pub(super) struct Jsonb(String);

impl Jsonb {
    pub fn of(value: &(impl Serialize + ?Sized)) -> Result<Self, StorageError> {
        Ok(Self(marked(stored::json_text(value)?)))
    }

    /// Nothing for an empty object.
    pub fn channels(channels: &Channels) -> Result<Option<Self>, StorageError> {
        Ok(stored::channels_text(channels)?.map(|text| Self(marked(text))))
    }

    pub fn as_text(&self) -> &str {
        &self.0
    }

    /// The size of the text, in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn parse<T: DeserializeOwned>(self, what: &str) -> Result<T, StorageError> {
        stored::from_json(&unmarked(self.0), what)
    }
}

impl Type<Postgres> for Jsonb {
    fn type_info() -> PgTypeInfo {
        <Json<()> as Type<Postgres>>::type_info()
    }
}

impl PgHasArrayType for Jsonb {
    fn array_type_info() -> PgTypeInfo {
        <Json<()> as PgHasArrayType>::array_type_info()
    }
}

impl Encode<'_, Postgres> for Jsonb {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxError> {
        // The version of the binary format, of which there is one.
        buffer.push(1);
        buffer.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }
}

impl Decode<'_, Postgres> for Jsonb {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxError> {
        let binary = value.format() == PgValueFormat::Binary;
        let text = value.as_bytes()?;
        let text = match text.split_first() {
            Some((1, text)) if binary => text,
            _ if binary => return Err("an unknown version of jsonb's binary format".into()),
            _ => text,
        };
        Ok(Self(std::str::from_utf8(text)?.to_owned()))
    }
}

/// A `timestamptz`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Time(pub Timestamp);

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        // `timestamptz` in every PostgreSQL.
        PgTypeInfo::with_oid(Oid(1184))
    }
}

impl PgHasArrayType for Time {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(1185))
    }
}

impl Encode<'_, Postgres> for Time {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxError> {
        let since_2000 = self.0.as_microsecond().saturating_sub(EPOCH);
        <i64 as Encode<Postgres>>::encode_by_ref(&since_2000, buffer)
    }
}

impl Decode<'_, Postgres> for Time {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxError> {
        if value.format() != PgValueFormat::Binary {
            return Err("times are read in the binary format".into());
        }
        let since_2000 = <i64 as Decode<Postgres>>::decode(value)?;
        Ok(Self(stored::time(since_2000.saturating_add(EPOCH))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn any_text() -> impl Strategy<Value = String> {
        let c = prop_oneof![
            Just('\0'),
            Just(MARK),
            Just('\\'),
            Just('u'),
            Just('0'),
            Just('1'),
            Just('"'),
            any::<char>()
        ];
        proptest::collection::vec(c, 0..24).prop_map(|chars| chars.into_iter().collect())
    }

    proptest! {
        #[test]
        fn any_text_comes_back_and_holds_no_nul_on_the_way(given in any_text()) {
            let on_the_way = text(&given).into_owned();
            prop_assert!(!on_the_way.contains('\0'));
            prop_assert_eq!(plain(on_the_way), given);
        }

        #[test]
        fn any_json_comes_back_and_holds_no_nul_on_the_way(key in any_text(), given in any_text()) {
            let mut object = serde_json::Map::new();
            object.insert(key, Value::from(given));
            let value = Value::Object(object);
            let on_the_way = Jsonb::of(&value).expect("shallow");
            let seen: Value = serde_json::from_str(&on_the_way.0).expect("still JSON");
            for (key, given) in seen.as_object().expect("an object") {
                prop_assert!(!key.contains('\0'));
                prop_assert!(!given.as_str().expect("text").contains('\0'));
            }
            let back: Value = on_the_way.parse("test").expect("JSON");
            prop_assert_eq!(back, value);
        }
    }
}
