//! What `artel config check` says about every setting.

use super::Config;
use super::reader::Reader;
use crate::settings;

impl Config {
    /// Every setting with its value (masked for secrets) and where it came from.
    pub fn explain(&self) -> Vec<Explained> {
        let reader = Reader {
            figment: &self.figment,
        };
        settings::all()
            .map(|setting| {
                let value = match (setting.name, reader.text(setting.name)) {
                    ("ARTEL_HOME", _) => Some(self.home.display().to_string()),
                    (_, Some(_)) if setting.secret => Some("(set, not shown)".to_owned()),
                    (_, value) => value,
                };
                Explained {
                    name: setting.name,
                    source: if value.is_some() {
                        reader.source(setting.name)
                    } else {
                        "not set".to_owned()
                    },
                    value,
                    about: setting.about,
                }
            })
            .collect()
    }
}

/// A setting as `artel config check` shows it.
#[derive(Debug, serde::Serialize)]
pub struct Explained {
    /// The setting.
    pub name: &'static str,
    /// Its value, masked for secrets.
    pub value: Option<String>,
    /// Where it came from.
    pub source: String,
    /// What it is for.
    pub about: &'static str,
}
