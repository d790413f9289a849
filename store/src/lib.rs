//! The product's own tables, on SQLite and PostgreSQL, each query defined once.
//!
//! Two kinds of tables live here. **Projections** (projects, jobs, tasks, pull requests, deployments, waits, the ledger,
//! messages, the intents of the outbox) are made from the journal by the [`Projector`] and from nothing else: they can be
//! dropped and rebuilt, and the rows are the same. **Everything else** (people, chats, the inbox, buttons, deliveries,
//! allocations, errands, leases, where workers are) is written once, where it happens.
//!
//! Not here: the engine's threads, checkpoints and journal (see `graph`), the values of secrets (see `secrets`), and any
//! decision about what to do next (see `nodes`).

mod allocations;
mod buttons;
mod chats;
mod db;
mod errands;
mod error;
mod inbox;
mod installation;
mod leases;
mod ledger;
mod open;
mod outbox;
mod people;
mod projection;
mod projector;
mod record;
mod workers;

pub use allocations::Ports;
pub use buttons::{Button, ButtonRefusal, NewButton, Press};
pub use chats::ChatRow;
pub use db::{Db, Row, Tx};
pub use errands::{ClaimedErrand, ErrandReply, ErrandStatus, Finished, MAX_ERRAND_ATTEMPTS};
pub use error::{Error, Result};
pub use inbox::{InboxFailure, InboxRow, MAX_INBOX_ATTEMPTS, Stored};
pub use leases::{BOT, SCHEDULER};
pub use ledger::{LedgerLine, LedgerSum};
pub use open::{Location, Store};
pub use outbox::{Delivery, IntentKind, PROGRESS_PACE};
pub use people::{MAX_PAIRING_ATTEMPTS, PairingCode, PairingRefusal, PersonRow, Standing};
pub use projector::{Applied, Dump, JournalEntry, JournalSource, PROJECTION_TABLES, Projector};
pub use record::{FindProject, MessageRow, ProjectDetails, WaitRow};
pub use workers::{Awaited, LINES_KEPT, SaidByWorker, WAITING, WorkerLine};
