//! What the crew talks about and what it needs from the world.
//!
//! The first half is vocabulary: ids, the specification, the plan, checks, reviews, deployments and the events of the
//! journal. The second half is the ports: one trait for each thing outside (models, forge, workers, vault, deployer,
//! allocations, errands, the record). Crates that implement a port depend on this one; `nodes` depends on nothing else.
//!
//! Not here: any behaviour of the crew (see `nodes`) and any implementation.

mod check;
mod deployment;
mod desk;
mod errand;
mod event;
mod failure;
mod forge;
mod id;
mod manifest;
mod model;
mod plan;
mod record;
mod secret;
mod spec;
mod text;
mod wait;
mod worker;

pub use check::{AcceptanceCheck, Check, CheckResult, CheckStatus, HttpExpectation, json_contains};
pub use deployment::{
    Allocations, DeployRequest, Deployer, Deployment, DeploymentStatus, ServiceState,
};
pub use desk::{Answered, FrontDesk, Incoming, ServiceOrder};
pub use errand::{Errand, ErrandOutcome, ErrandWork, Errands};
pub use event::{
    Audience, Event, JobKind, JobStatus, NoticeSeverity, Recorded, ReviewVerdict, SaidKind,
    TaskSummary,
};
pub use failure::{Actor, Failure};
pub use forge::{
    ChecksReport, Diff, FileChange, Forge, MergeOutcome, NewPullRequest, PullRequest,
    PullRequestStatus, RebaseOutcome, Repository,
};
pub use id::{JobId, PersonId, ProjectId, RequestId, Sha, Slug, TaskId, WaitId, threads};
pub use manifest::{MANIFEST_FILE, Manifest, ManifestError, Service};
pub use model::{
    LEAST_OUTPUT, Ledger, Message, ModelAnswer, ModelCall, ModelError, Models, Role, Schema,
    Speaker, Spend, Spent, Usage, WireAnswer, WireCall, WireError, WireFormat, WirePiece,
    WorkerAnswer, WorkerCall, WorkerModels, WorkerTerms, fair_output,
};
pub use plan::{Plan, PlannedTask};
pub use record::{
    DeploymentRecord, JobRecord, ProjectRecord, PullRequestRecord, Record, StatusReport,
    TaskRecord, WaitRecord, WorkerRecord,
};
pub use secret::{Plaintext, SecretHandle, SecretResolver, Vault};
pub use spec::{ChangeRequest, Need, ProjectSpec};
pub use text::plain;
pub use wait::{Answer, Choice, OpenWait, WaitKind};
pub use worker::{RESULT_SIGNAL, Workers};

/// What a port could not do, when no more precise error type exists: what happened, where, and what to do.
pub type Result<T, E = Failure> = std::result::Result<T, E>;
