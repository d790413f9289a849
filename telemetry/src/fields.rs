//! What logs and spans call the things of the crew: the same everywhere, so that they can be joined.
//!
//! The macros of `tracing` take these as `{ fields::PROJECT } = %id`, or the same name written out.

/// The thread of the graph, in full: `{project}`, `{project}/job-1`, `{project}/job-1/storage`.
pub const THREAD: &str = "thread";
/// The project's id.
pub const PROJECT: &str = "project";
/// The job's id within its project, such as `job-1`.
pub const JOB: &str = "job";
/// The task's id within its job, such as `storage`.
pub const TASK: &str = "task";
/// The id of one attempt of a worker, as it stands in `SpawnRequest`.
pub const REQUEST: &str = "request";
/// The node of the graph, such as `architect`.
pub const NODE: &str = "node";
/// Which try this is, from 1.
pub const ATTEMPT: &str = "attempt";
/// Who in the crew asked a model: `brainstorm`, `architect`, `developer`, `reviewer`.
pub const ROLE: &str = "role";
/// The model that was asked.
pub const MODEL: &str = "model";
/// Tokens that a model read.
pub const INPUT_TOKENS: &str = "input_tokens";
/// Tokens that a model wrote.
pub const OUTPUT_TOKENS: &str = "output_tokens";
/// What went wrong, as a sentence; an error is logged once, where it is handled.
pub const ERROR: &str = "error";
