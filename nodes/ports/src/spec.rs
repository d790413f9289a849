//! What people want, written down so that it can be checked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::AcceptanceCheck;

/// What a new project is to be. Approved by its owner before anything is built.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProjectSpec {
    /// A short name for people, such as `Notes service`.
    pub name: String,
    /// One or two sentences: what it is for and for whom.
    pub goal: String,
    /// What it does, a line each.
    pub features: Vec<String>,
    /// Checks that are run after every deploy, at least one.
    pub acceptance: Vec<AcceptanceCheck>,
    /// What it needs from outside.
    #[serde(default)]
    pub needs: Vec<Need>,
    /// What kind of thing it is: `http_service` is what can be deployed.
    #[serde(default = "http_service")]
    pub kind: String,
    /// What may go wrong, and what was assumed.
    #[serde(default)]
    pub risks: Vec<String>,
}

fn http_service() -> String {
    "http_service".to_owned()
}

/// A change to a project that exists: a feature, a bug, an order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeRequest {
    /// A short title, such as `Search in notes`.
    pub title: String,
    /// What is to change and why.
    pub description: String,
    /// Checks that the changed project must pass besides those it has.
    #[serde(default)]
    pub acceptance: Vec<AcceptanceCheck>,
    /// What it needs from outside besides what the project has.
    #[serde(default)]
    pub needs: Vec<Need>,
    /// Whether users of the running project must change something.
    #[serde(default)]
    pub breaking: bool,
}

/// Something a project needs from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "need", rename_all = "snake_case")]
pub enum Need {
    /// A TCP port on the machine that serves it. Every `http_service` gets one without asking.
    Port,
    /// A secret that its owner has, such as a token for another service. The crew only ever sees a handle.
    Secret {
        /// The environment variable under which the service finds it, such as `WEATHER_API_KEY`.
        name: String,
        /// What it is and where the owner gets it.
        description: String,
    },
}
