//! `artel.yaml`: what a repository says about itself, so that its checks and its service can be run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The manifest's place in a repository.
pub const MANIFEST_FILE: &str = "artel.yaml";

/// What a repository says about itself. It stands in the root as `artel.yaml` and is read at the commit that is checked
/// or deployed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The manifest's format, 1.
    pub version: u32,
    /// The command that checks the repository, run by `sh -c` in a sandbox in its root: exit code 0 means passed.
    pub checks: String,
    /// How the service is run.
    pub service: Service,
}

/// How a service is run. It finds `PORT`, `HOST`, `DATA_DIR` and its granted secrets in its environment, and must listen
/// on `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Program and arguments, run in the root of the released files.
    pub command: Vec<String>,
    /// A path that answers `GET` with a status below 400 when the service is ready.
    #[serde(default = "health")]
    pub health: String,
}

fn health() -> String {
    "/health".to_owned()
}

/// A manifest that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not YAML, or fields are missing, unknown or of a wrong type.
    #[error("artel.yaml cannot be read: {0}; it needs version, checks and service")]
    Malformed(#[source] serde_yaml_ng::Error),
    /// It is of another version.
    #[error("artel.yaml has version {0}, and this Artel reads version 1")]
    Version(u32),
    /// The command that starts the service is empty.
    #[error("artel.yaml names no program under service.command")]
    NoCommand,
}

impl Manifest {
    /// Reads a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let manifest: Self = serde_yaml_ng::from_str(text).map_err(ManifestError::Malformed)?;
        if manifest.version != 1 {
            return Err(ManifestError::Version(manifest.version));
        }
        if manifest
            .service
            .command
            .first()
            .is_none_or(String::is_empty)
        {
            return Err(ManifestError::NoCommand);
        }
        Ok(manifest)
    }

    /// Writes a manifest as it stands in a repository.
    pub fn to_yaml(&self) -> String {
        serde_yaml_ng::to_string(self).expect("a manifest is made of strings")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_survives_being_written() {
        let text =
            "version: 1\nchecks: python3 -m unittest\nservice:\n  command: [python3, app.py]\n";
        let manifest = Manifest::parse(text).unwrap();
        assert_eq!(manifest.service.health, "/health");
        assert_eq!(Manifest::parse(&manifest.to_yaml()).unwrap(), manifest);
    }

    #[test]
    fn a_manifest_that_cannot_be_used_says_why() {
        for (text, says) in [
            (
                "version: 2\nchecks: x\nservice: {command: [x]}",
                "version 2",
            ),
            (
                "version: 1\nchecks: x\nservice: {command: []}",
                "no program",
            ),
            ("version: 1\nservice: {command: [x]}", "checks"),
        ] {
            let error = Manifest::parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
