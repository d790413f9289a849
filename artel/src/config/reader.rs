//! Reads settings out of the layers, and says what is wrong with one.

use figment::Figment;
use figment::value::Value;

use super::{Error, SecretValue};
use crate::place::place;
use crate::settings;

/// A value as text, whatever it was in TOML.
pub(super) fn text_of(value: &Value) -> String {
    match value {
        Value::String(_, text) => text.clone(),
        Value::Array(_, items) => items.iter().map(text_of).collect::<Vec<_>>().join(","),
        Value::Bool(_, truth) => truth.to_string(),
        Value::Num(_, number) => number
            .to_i128()
            .map(|n| n.to_string())
            .or_else(|| number.to_u128().map(|n| n.to_string()))
            .or_else(|| number.to_f64().map(|n| n.to_string()))
            .unwrap_or_default(),
        Value::Char(_, c) => c.to_string(),
        Value::Dict(..) | Value::Empty(..) => String::new(),
    }
}

pub(super) struct Reader<'a> {
    pub(super) figment: &'a Figment,
}

impl Reader<'_> {
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let value = self.figment.find_value(&name.to_lowercase()).ok()?;
        // A JSON array in the environment stays a text; one in TOML becomes JSON again.
        let text = match &value {
            Value::Array(_, items) if name.ends_with("_COMMAND") => {
                serde_json::to_string(&items.iter().map(text_of).collect::<Vec<_>>()).ok()?
            }
            other => text_of(other),
        };
        let text = text.trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    pub(super) fn source(&self, name: &str) -> String {
        self.figment
            .find_metadata(&name.to_lowercase())
            .map_or_else(
                || "default".to_owned(),
                |metadata| match &metadata.source {
                    Some(figment::Source::File(path)) => place(path, &[&name.to_lowercase()]),
                    _ => metadata.name.to_string(),
                },
            )
    }

    pub(super) fn error(&self, name: &str, expected: &str) -> Error {
        let secret = settings::all().any(|setting| setting.name == name && setting.secret);
        let value = self.text(name).unwrap_or_default();
        Error::Value {
            name: name.to_owned(),
            source_name: self.source(name),
            value: if secret {
                "(not shown)".to_owned()
            } else {
                value
            },
            expected: expected.to_owned(),
        }
    }

    pub(super) fn parse_opt<T>(
        &self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        self.text(name)
            .map(|text| parse(&text).ok_or_else(|| self.error(name, expected)))
            .transpose()
    }

    pub(super) fn parse<T>(
        &self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, Error> {
        self.parse_opt(name, expected, parse)?
            .ok_or_else(|| self.error(name, expected))
    }

    pub(super) fn url(&self, name: &str) -> Result<Option<String>, Error> {
        self.parse_opt(
            name,
            "an address beginning with http:// or https:// is expected",
            |text| {
                let url = url::Url::parse(text).ok()?;
                matches!(url.scheme(), "http" | "https")
                    .then(|| text.trim_end_matches('/').to_owned())
            },
        )
    }

    pub(super) fn secret(&self, name: &str) -> Option<SecretValue> {
        self.text(name).map(SecretValue::new)
    }

    pub(super) fn numbers(&self, name: &str) -> Result<Vec<i64>, Error> {
        Ok(self
            .parse_opt(
                name,
                "whole numbers separated by commas are expected",
                |text| {
                    text.split(',')
                        .map(str::trim)
                        .filter(|part| !part.is_empty())
                        .map(|part| part.parse().ok())
                        .collect::<Option<Vec<i64>>>()
                },
            )?
            .unwrap_or_default())
    }
}
