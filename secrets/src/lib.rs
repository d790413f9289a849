//! The vault: values that people entrust to us, encrypted with age, reached by handles, and kept out of every text.
//!
//! - [`Vault`] keeps values in the product's database and hands one out only for a handle that was granted, telling an
//!   [`Audit`] first.
//! - [`Identity`] is the age key that opens them; it lives in a file of its own, never in the database.
//! - [`Redactor`] replaces known values, and whatever looks like a well-known kind of token, before a text leaves us.
//!
//! A value is a [`ports::Plaintext`] from the front end to the deployer: it cannot be printed, serialized or compared.
//!
//! Not here: the tables' creation (see `migrations/`), and where the record of a resolution is kept (see [`Audit`]).

mod envelope;
mod error;
mod forms;
mod identity;
mod name;
mod redactor;
mod vault;

pub use error::Error;
pub use identity::{IDENTITY_FILE, Identity, IdentitySource};
pub use name::{MAX_VALUE_BYTES, check_name, check_value};
pub use redactor::{MAX_KNOWN_VALUES, Redactor, SHORTEST_REDACTED_BYTES};
pub use vault::{Audit, Database, MAX_SECRETS, Vault};
