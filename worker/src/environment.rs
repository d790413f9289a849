//! The environment of a worker: everything that it is told.

use std::time::Duration;
use url::Url;

/// What the contract of a worker gives, and the optional bounds.
#[derive(Clone)]
pub struct Environment {
    /// `ARTEL_TASK_ID`.
    pub task_id: String,
    /// `ARTEL_ATTEMPT`, from 1.
    pub attempt: u32,
    /// `ARTEL_BROKER_URL`, without a slash at the end.
    pub broker_url: String,
    /// `ARTEL_BROKER_KEY`.
    pub broker_key: String,
    /// `OPENAI_BASE_URL`, without a slash at the end.
    pub openai_base_url: String,
    /// `OPENAI_API_KEY`.
    pub openai_api_key: String,
    /// `ARTEL_MODEL`; `default` lets the broker choose.
    pub model: String,
    /// `ARTEL_THREAD`: the task's thread, sent along with every model request for tapes.
    pub thread: String,
    /// `ARTEL_BASE_SHA`: the commit that the work starts from, when it is told.
    pub base_sha: Option<String>,
    /// `ARTEL_WALL_S`: how long the attempt may take.
    pub wall: Duration,
    /// `ARTEL_IDLE_S`: how long a model request may stay silent.
    pub idle: Duration,
    /// `ARTEL_MAX_STEPS`: how many answers of the model are worked through in an attempt.
    pub max_steps: u32,
}

/// A variable that is missing or cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Not set, or empty.
    #[error(
        "the environment variable {0} is not set; a worker is started by a spawner, which sets it"
    )]
    Missing(&'static str),
    /// Set to something else.
    #[error("the environment variable {name} must be {expected}")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

impl Environment {
    /// Reads the variables of this process.
    pub fn from_process() -> Result<Self, Error> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// Reads variables from anywhere.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let text = |name: &'static str| {
            get(name)
                .filter(|value| !value.is_empty())
                .ok_or(Error::Missing(name))
        };
        let url = |name: &'static str| {
            let value = text(name)?;
            match Url::parse(&value) {
                Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => {
                    Ok(value.trim_end_matches('/').to_owned())
                }
                _ => Err(Error::Invalid {
                    name,
                    expected: "a URL that begins with http:// or https://",
                }),
            }
        };
        let number = |name: &'static str, default: u64| match get(name) {
            None => Ok(default),
            Some(value) => value.parse().ok().filter(|n| *n > 0).ok_or(Error::Invalid {
                name,
                expected: "a whole number above 0",
            }),
        };
        let small = |name: &'static str, default: u64| {
            u32::try_from(number(name, default)?).map_err(|_| Error::Invalid {
                name,
                expected: "a number below 4294967296",
            })
        };
        text("ARTEL_ATTEMPT")?;
        Ok(Self {
            task_id: text("ARTEL_TASK_ID")?,
            attempt: small("ARTEL_ATTEMPT", 1)?,
            broker_url: url("ARTEL_BROKER_URL")?,
            broker_key: text("ARTEL_BROKER_KEY")?,
            openai_base_url: url("OPENAI_BASE_URL")?,
            openai_api_key: text("OPENAI_API_KEY")?,
            model: text("ARTEL_MODEL").unwrap_or_else(|_| "default".to_owned()),
            thread: text("ARTEL_THREAD").unwrap_or_default(),
            base_sha: text("ARTEL_BASE_SHA").ok(),
            wall: Duration::from_secs(number("ARTEL_WALL_S", 3600)?),
            idle: Duration::from_secs(number("ARTEL_IDLE_S", 600)?),
            max_steps: small("ARTEL_MAX_STEPS", 120)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(changes: &[(&str, &str)]) -> Result<Environment, Error> {
        let mut variables = std::collections::HashMap::from([
            ("ARTEL_TASK_ID", "t"),
            ("ARTEL_ATTEMPT", "2"),
            ("ARTEL_BROKER_URL", "http://127.0.0.1:9/"),
            ("ARTEL_BROKER_KEY", "k"),
            ("OPENAI_BASE_URL", "http://127.0.0.1:9/v1"),
            ("OPENAI_API_KEY", "k"),
        ]);
        variables.extend(changes.iter().copied());
        Environment::from_lookup(|name| variables.get(name).map(|v| (*v).to_owned()))
    }

    #[test]
    fn the_contract_is_read() {
        let environment = read(&[]).unwrap();
        assert_eq!(environment.attempt, 2);
        assert_eq!(environment.broker_url, "http://127.0.0.1:9");
        assert_eq!(environment.model, "default");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for name in [
            "ARTEL_TASK_ID",
            "ARTEL_ATTEMPT",
            "ARTEL_BROKER_KEY",
            "OPENAI_BASE_URL",
        ] {
            assert_eq!(read(&[(name, "")]).err(), Some(Error::Missing(name)));
        }
        for (name, value) in [
            ("ARTEL_ATTEMPT", "first"),
            ("ARTEL_BROKER_URL", "/run/broker"),
        ] {
            let error = read(&[(name, value)]).err().unwrap();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
