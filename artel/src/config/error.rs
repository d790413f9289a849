//! What can be wrong with the configuration.

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is not what its name says.
    #[error("{place} cannot be read: {message}; mend it, or move it away to go on without it")]
    File {
        /// Which file, and which line of it.
        place: String,
        /// What is wrong. It holds nothing of the file, which may have secrets in it.
        message: String,
    },
    /// A value does not fit its setting.
    #[error("{name} (from {source_name}) is {value:?}, but {expected}")]
    Value {
        /// The setting.
        name: String,
        /// Where the value came from.
        source_name: String,
        /// The value, masked for secrets.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// A name in `artel.toml` that nobody knows.
    #[error("{place}: {name:?} is no setting{}", hint(advice))]
    Unknown {
        /// Which file, and which line of it.
        place: String,
        /// The name.
        name: String,
        /// What could be meant.
        advice: String,
    },
    /// A value in a table does not fit.
    #[error(
        "{place}: {name} cannot be used: {message}; mend that line, or take it out to go by the default"
    )]
    Table {
        /// Which file, and which line of it.
        place: String,
        /// The table and what is in it, with dots.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// `ARTEL_MODE=full`, and something is missing that would be embedded otherwise.
    #[error(
        "ARTEL_MODE=full, and these are not set: {0}; set them, or use ARTEL_MODE=embedded, where Artel brings all of them along"
    )]
    NotFull(String),
    /// A setting that is needed now has no value.
    #[error("{0}")]
    Missing(String),
    /// There is no home folder to put the data in.
    #[error("neither ARTEL_HOME nor HOME is set: set ARTEL_HOME to a folder for Artel's data")]
    NoHome,
}

fn hint(advice: &str) -> String {
    if advice.is_empty() {
        "; `artel config check` lists them all".to_owned()
    } else {
        format!("; {advice}")
    }
}
