//! Code hosting.
//!
//! [`LocalForge`] keeps bare repositories on this machine and everything about pull requests inside them, as Git refs:
//! what is not a ref is not so. It works through the `git` program, with plumbing on the bare repository, and needs no
//! working tree to rebase or merge.
//!
//! Every operation ends with one compare-and-set of refs; whatever dies before it has changed nothing, and the same call
//! again does it. [`suite`] is the contract that every forge passes.
//!
//! Not here: when to merge and who reviews (see `nodes`), and the workspaces of workers (see `spawner`).

mod check_names;
mod checks;
mod clone;
mod commits;
mod diff;
mod error;
mod export;
mod git;
mod local;
mod lock;
mod merge;
mod pulls;
mod rebase;
mod repo;
pub mod suite;
mod trees;

pub use error::Error;
pub use local::{LocalForge, MAX_LISTED_FILES, MAX_READ_BYTES, Options};

/// The branch that is deployed.
pub const DEFAULT_BRANCH: &str = "main";

/// The trailer by which a commit is found again, see [`ports::Forge::commit_files`].
pub const KEY_TRAILER: &str = "Artel-Key";
