//! Language models behind the ports [`ports::Models`] and [`ports::WorkerModels`].
//!
//! Two things answer: a [`Provider`], which asks any OpenAI-compatible endpoint, and a [`Player`], which answers from a
//! [`Tape`]. A [`Recorder`] stands in front of either and writes a tape of what was answered. Whoever answers counts what it
//! took in the project's ledger, within a budget that reserves before it spends ([`Budgets`]).
//!
//! Of `async-openai` only the request types are used, over our own HTTP client. Its response types refuse what real endpoints
//! answer (a finish reason that is not on its list, `content` as a list of parts, a missing `usage` or `created`), its client
//! hides the status, `Retry-After` and the end of a stream, retries by itself, and logs an answer that it cannot parse. What
//! comes in is therefore read as plain JSON, tolerantly, in `wire`.
//!
//! Not here: prompts and the validation of structured answers (`nodes`), and keys of workers (`spawner`).
//!
//! The program installs rustls' default crypto provider once, before it makes a [`Provider`].

mod account;
mod backoff;
mod budget;
mod check;
mod config;
mod endpoint;
mod meter;
mod provider;
mod quirks;
mod record;
mod sse;
mod tape;
mod wire;

pub use budget::{Budgets, Estimate, Reservation};
pub use check::{live_check, offered_models};
pub use config::{
    ApiKey, BudgetLimits, Config, ConfigError, EndpointConfig, ModelChoice, Price, RetryConfig,
    RoleConfig, Speaks, TimeoutConfig,
};
pub use provider::Provider;
pub use record::{Recorder, Redact};
pub use tape::{Player, Tape, TapeError};
