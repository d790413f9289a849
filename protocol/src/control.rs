//! Orders to spawners, and the sign of life of a spawner.

use crate::{Size, VERSION};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// An order to every spawner that listens. Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ControlMessage {
    /// Version of the message: 1.
    pub version: u32,
    /// The order.
    #[serde(flatten)]
    pub control: Control,
}

impl From<Control> for ControlMessage {
    fn from(control: Control) -> Self {
        Self {
            version: VERSION,
            control,
        }
    }
}

/// The orders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "control", rename_all = "snake_case")]
pub enum Control {
    /// End this request, wherever it is.
    Cancel {
        /// The request.
        request_id: String,
    },
    /// End this request: the budget that pays for it is used up.
    Unpaid {
        /// The request.
        request_id: String,
    },
    /// Take no more jobs; finish the ones that run.
    Drain {
        /// The spawner that is meant; none means all.
        #[serde(default)]
        spawner: Option<String>,
    },
}

/// What a spawner says about itself while it lives. Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Heartbeat {
    /// Version of the message: 1.
    pub version: u32,
    /// Name of the spawner.
    pub spawner: String,
    /// How many workers it may run.
    pub capacity: u32,
    /// How many it runs.
    pub running: u32,
    /// What all its workers together may use; none from a spawner that does not say.
    #[serde(default)]
    pub size: Option<Size>,
    /// What those that run may use.
    #[serde(default)]
    pub used: Option<Size>,
    /// Whether it takes no more jobs, and ends when those that run have ended: it is nobody's hope.
    #[serde(default)]
    pub draining: bool,
    /// Versions of what it uses: `artel`, `sandbox`, `git`, ….
    #[serde(default)]
    pub versions: BTreeMap<String, String>,
    /// When it said so.
    pub at: Timestamp,
}
