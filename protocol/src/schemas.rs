//! JSON Schemas of the messages, generated from the types. The files under `protocol/schemas` are
//! these, and a test fails when they drift.

use crate::{ControlMessage, Heartbeat, SpawnRequest, WorkerEvent, WorkerResult};
use schemars::Schema;

/// File name (without folder) and schema of every message.
pub fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("spawn-request.v1.json", schemars::schema_for!(SpawnRequest)),
        ("worker-result.v1.json", schemars::schema_for!(WorkerResult)),
        ("worker-event.v1.json", schemars::schema_for!(WorkerEvent)),
        ("control.v1.json", schemars::schema_for!(ControlMessage)),
        ("heartbeat.v1.json", schemars::schema_for!(Heartbeat)),
    ]
}
