//! What runs inside a worker: the built-in coding agent and the adapters for others.
//!
//! All keep to the *contract of a worker*: they work in the workspace, read the task from
//! `.artel/TASK.md`, commit, and report to the broker. Everything they know comes from the
//! [`environment::Environment`]; there is no configuration file and no credential but the job's key.
//!
//! * [`agent`]: `artel-agent`, a loop between a model and one tool, a shell.
//! * [`adapters`]: Claude Code, Codex and other agents that somebody else wrote.
//! * [`command`]: runs a given argument vector and turns its exit code and Git's state into a report.
//! * [`main`]: the entry of the binary `artel-agent` and of the hidden `artel internal agent`.
//!
//! Not for: confinement (see `sandbox`), or deciding whether the work is good (Git says what was
//! done; the spawner and the reviewer look at that).

pub mod adapters;
pub mod agent;
pub mod broker;
pub mod command;
mod entry;
pub mod environment;
mod git;
mod http;

pub use entry::main;
