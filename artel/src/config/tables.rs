//! The tables of `artel.toml`: read with their defaults, and refused with the line in which something nobody knows stands.

use figment::Figment;
use figment::providers::Serialized;
use figment::value::Value;
use serde::de::DeserializeOwned;

use super::{Config, Error};
use crate::place::line_of;

impl Config {
    /// A table of `artel.toml`, or its default.
    pub fn table<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T, Error> {
        match self.figment.find_value(name) {
            Ok(value) => self.typed(name, &value),
            Err(_) => Ok(T::default()),
        }
    }

    fn typed<T: DeserializeOwned>(&self, name: &str, value: &Value) -> Result<T, Error> {
        value.deserialize().map_err(|error: figment::Error| {
            let mut keys: Vec<&str> = std::iter::once(name)
                .chain(error.path.iter().map(String::as_str))
                .collect();
            if let figment::error::Kind::UnknownField(field, _) = &error.kind
                && keys.last() != Some(&field.as_str())
            {
                keys.push(field);
            }
            self.misfit(&keys, error.kind.to_string())
        })
    }

    /// The table `[policy]`: what the crew may do. Names that nobody knows are refused, so that a slip of the pen does not
    /// lift a cap.
    pub fn policy(&self) -> Result<nodes::Policy, Error> {
        // Over the defaults, so that one limit can be named without the others.
        let value = Figment::from(Serialized::default("policy", nodes::Policy::default()))
            .merge(&self.figment)
            .find_value("policy");
        let policy = match value {
            Ok(value) => self.typed("policy", &value)?,
            Err(_) => nodes::Policy::default(),
        };
        let known = serde_json::to_value(nodes::Policy::default()).unwrap_or_default();
        if let Ok(given) = self.figment.find_value("policy") {
            let mut keys = vec!["policy"];
            if stranger(&given, &known, &mut keys) {
                let siblings = keys[1..keys.len() - 1]
                    .iter()
                    .fold(&known, |table, key| &table[*key]);
                let names: Vec<_> = siblings
                    .as_object()
                    .into_iter()
                    .flat_map(serde_json::Map::keys)
                    .map(String::as_str)
                    .collect();
                return Err(self.misfit(
                    &keys,
                    format!("nobody knows that name; known are {}", names.join(", ")),
                ));
            }
        }
        Ok(policy)
    }

    fn misfit(&self, keys: &[&str], message: String) -> Error {
        let found = self.files.iter().find_map(|file| {
            let line = line_of(&std::fs::read_to_string(file).ok()?, keys)?;
            Some(format!("{}, line {line}", file.display()))
        });
        Error::Table {
            place: found.unwrap_or_else(|| "artel.toml".to_owned()),
            name: keys.join("."),
            message,
        }
    }
}

/// Whether a table has a name that is not in `known`; `keys` then lead to it.
fn stranger<'a>(given: &'a Value, known: &serde_json::Value, keys: &mut Vec<&'a str>) -> bool {
    let (Value::Dict(_, given), serde_json::Value::Object(known)) = (given, known) else {
        return false;
    };
    for (name, value) in given {
        keys.push(name);
        match known.get(name) {
            None => return true,
            Some(known) if stranger(value, known, keys) => return true,
            Some(_) => {
                keys.pop();
            }
        }
    }
    false
}
