//! Where settings come from: the environment, `.env`, `artel.toml`, defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::{Error, TABLES};
use crate::place::{line_at, place};
use crate::settings;

/// One layer of settings that are texts, such as the environment.
pub(super) struct Layer {
    name: String,
    values: BTreeMap<String, String>,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let dict: Dict = self
            .values
            .iter()
            .map(|(name, value)| (name.to_lowercase(), Value::from(value.clone())))
            .collect();
        Ok(Profile::Default.collect(dict))
    }
}

impl Layer {
    /// What the environment says. A secret may stand in a file that `NAME_FILE` names.
    pub(super) fn environment() -> Result<Self, Error> {
        let said = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self::from_variables(said)
    }

    pub(super) fn from_variables(said: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let mut values = BTreeMap::new();
        for setting in settings::all() {
            let named = format!("{}_FILE", setting.name);
            let is_setting = settings::all().any(|other| other.name == named);
            let value = match said(setting.name) {
                Some(value) => Some(value),
                None if setting.secret && !is_setting => said(&named)
                    .map(|file| secret_file(&named, &file))
                    .transpose()?,
                None => None,
            };
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                values.insert(setting.name.to_owned(), value);
            }
        }
        Ok(Self {
            name: "the environment".to_owned(),
            values,
        })
    }

    pub(super) fn defaults() -> Self {
        Self {
            name: "default".to_owned(),
            values: settings::all()
                .filter(|setting| !setting.default.is_empty())
                .map(|setting| (setting.name.to_owned(), setting.default.to_owned()))
                .collect(),
        }
    }

    pub(super) fn dotenv(path: &Path) -> Result<Option<Self>, Error> {
        if !path.is_file() {
            return Ok(None);
        }
        let file_error = |error: dotenvy::Error| dotenv_error(path, &error);
        let mut values = BTreeMap::new();
        for pair in dotenvy::from_path_iter(path).map_err(file_error)? {
            let (name, value) = pair.map_err(file_error)?;
            if settings::all().any(|setting| setting.name == name) && !value.is_empty() {
                values.insert(name, value);
            }
        }
        Ok(Some(Self {
            name: path.display().to_string(),
            values,
        }))
    }
}

/// A secret that stands in a file; what is around it does not count.
fn secret_file(name: &str, file: &str) -> Result<String, Error> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => Err(Error::File {
            place: format!("{file} (from {name})"),
            message: error.to_string(),
        }),
    }
}

pub(super) fn home_folder() -> Result<PathBuf, Error> {
    let named = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(data) = named("XDG_DATA_HOME") {
        return Ok(PathBuf::from(data).join("artel"));
    }
    named("HOME")
        .map(|home| PathBuf::from(home).join(".local/share/artel"))
        .ok_or(Error::NoHome)
}

/// What is wrong with a `.env`, without its text: that may be half a secret.
fn dotenv_error(path: &Path, error: &dotenvy::Error) -> Error {
    let mut place = path.display().to_string();
    let message = match error {
        dotenvy::Error::LineParse(line, _) => {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if let Some(index) = text.lines().position(|other| other.contains(line.trim())) {
                place = format!("{place}, line {}", index + 1);
            }
            "a line like NAME=value is expected, with quotes around a value that has spaces"
                .to_owned()
        }
        other => other.to_string(),
    };
    Error::File { place, message }
}

pub(super) fn toml_layer(path: &Path) -> Result<Option<Figment>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let file_error = |place: String, message: &str| Error::File {
        place,
        message: message.trim().replace('\n', " "),
    };
    let name = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| file_error(name.to_string(), &error.to_string()))?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let line = error.span().map(|span| line_at(&text, span.start));
        let place = line.map_or_else(|| name.to_string(), |line| format!("{name}, line {line}"));
        file_error(place, error.message())
    })?;
    for key in table.keys() {
        let known = |key: &str| {
            TABLES.contains(&key)
                || settings::all().any(|setting| setting.name.to_lowercase() == key)
        };
        if !known(key) {
            let advice = if known(&key.to_lowercase()) {
                format!("write it in small letters here: {}", key.to_lowercase())
            } else {
                String::new()
            };
            return Err(Error::Unknown {
                place: place(path, &[key]),
                name: key.clone(),
                advice,
            });
        }
    }
    Ok(Some(Figment::from(Toml::file_exact(path))))
}
