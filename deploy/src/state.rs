//! What should be, as it is written down: `state.json`.

use jiff::Timestamp;
use ports::{
    AcceptanceCheck, Actor, CheckResult, Deployment, DeploymentStatus, Failure, ProjectId, Result,
    SecretHandle, Service, Sha,
};
use serde::{Deserialize, Serialize};

use crate::failures;
use crate::layout::{Layout, replace};

/// The format that this program writes.
const VERSION: u32 = 1;
/// Answers to orders that are remembered.
const REMEMBERED: usize = 100;

/// What can be read of every version.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Everything that the deployer knows about a project.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    pub version: u32,
    pub project: ProjectId,
    /// Where the service answers.
    pub port: u16,
    /// The release that should answer.
    pub live: Option<u64>,
    /// Whether the service was stopped on purpose.
    pub stopped: bool,
    /// The number of the last release.
    pub last_release: u64,
    /// The order that is being carried out.
    pub pending: Option<Pending>,
    /// The releases whose files are kept.
    pub releases: Vec<Release>,
    /// What was answered to which order, oldest first.
    pub answers: Vec<Answer>,
}

/// An order that was begun.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub key: String,
    pub release: u64,
    /// The release that was live when it began.
    pub before: Option<u64>,
    /// Whether the new release was made live, and only the checks of the live URL are missing.
    pub switched: bool,
    /// What was seen until then.
    pub checks: Vec<CheckResult>,
}

/// A release that can be run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Release {
    pub number: u64,
    pub sha: Sha,
    pub service: Service,
    pub secrets: Vec<SecretHandle>,
    pub acceptance: Vec<AcceptanceCheck>,
    pub status: DeploymentStatus,
    /// Whether it passed all its checks, once: only such a one is gone back to.
    pub good: bool,
    pub at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub key: String,
    pub deployment: Deployment,
}

impl State {
    pub(crate) fn new(project: ProjectId, port: u16) -> Self {
        Self {
            version: VERSION,
            project,
            port,
            live: None,
            stopped: false,
            last_release: 0,
            pending: None,
            releases: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// Reads it; `None` when nothing was ever deployed.
    pub(crate) fn load(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.state();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failures::file("reading", &path, &error)),
        };
        let broken = |what: String| {
            let message = format!("{} cannot be used: {what}", path.display());
            Failure::new("deploy_state", message).actor(Actor::Admin)
        };
        let parsed: Version =
            serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
        if parsed.version > VERSION {
            let newer = format!("it is of version {}; start a newer program", parsed.version);
            return Err(broken(newer));
        }
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| broken(error.to_string()))
    }

    /// Writes it down for good.
    pub(crate) fn save(&self, layout: &Layout) -> Result<()> {
        let path = layout.state();
        let text = serde_json::to_vec_pretty(self).map_err(|error| {
            Failure::new(
                "deploy_state",
                format!("the state cannot be written: {error}"),
            )
        })?;
        replace(&path, &text).map_err(|error| failures::file("writing", &path, &error))
    }

    pub(crate) fn answer(&self, key: &str) -> Option<Deployment> {
        let answer = self.answers.iter().find(|answer| answer.key == key)?;
        Some(answer.deployment.clone())
    }

    pub(crate) fn remember(&mut self, key: &str, deployment: Deployment) {
        let over = (self.answers.len() + 1).saturating_sub(REMEMBERED);
        self.answers.drain(..over);
        self.answers.push(Answer {
            key: key.to_owned(),
            deployment,
        });
    }

    pub(crate) fn release(&self, number: u64) -> Option<&Release> {
        self.releases
            .iter()
            .find(|release| release.number == number)
    }

    pub(crate) fn release_mut(&mut self, number: u64) -> Option<&mut Release> {
        self.releases
            .iter_mut()
            .find(|release| release.number == number)
    }

    pub(crate) fn live(&self) -> Option<&Release> {
        self.release(self.live?)
    }

    /// The last release before the live one that once passed everything.
    pub(crate) fn previous_good(&self) -> Option<&Release> {
        let live = self.live?;
        self.releases
            .iter()
            .filter(|release| release.good && release.number < live)
            .max_by_key(|release| release.number)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_state_is_refused_and_a_missing_one_is_none() {
        let home = tempfile::tempdir().expect("directory");
        let layout = Layout::new(home.path(), &ProjectId::from("p1")).expect("layout");
        layout.create().expect("created");
        assert_eq!(State::load(&layout).expect("none"), None);
        let mut state = State::new(ProjectId::from("p1"), 4000);
        state.save(&layout).expect("saved");
        assert_eq!(State::load(&layout).expect("read"), Some(state.clone()));
        state.version = VERSION + 1;
        state.save(&layout).expect("saved");
        let failure = State::load(&layout).expect_err("refused");
        assert!(failure.message.contains("newer"), "{failure}");
        std::fs::write(layout.state(), "{").expect("written");
        assert_eq!(
            State::load(&layout).expect_err("refused").kind,
            "deploy_state"
        );
    }
}
