//! What the database checkpointers share: how values, times and numbers are written down, and how failures are told.
//!
//! Not for anything that one database does differently from the other.

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    cache::CacheSpace,
    checkpoint::{
        Channels, Entry, Source, StateRow, StateRows, StorageError, StoredPart, ThreadStatus,
        WriteKey, WriteKind,
    },
    ids::{Cursor, ThreadId},
};

/// The deepest nesting that is stored: what is deeper could be written but not be read back.
pub(crate) const DEEPEST: usize = 120;

/// The history that is listed when nobody says how much.
pub(crate) const HISTORY_LIMIT: usize = 100;

/// The threads that are listed when nobody says how many.
pub(crate) const THREADS_LIMIT: usize = 1000;

/// The threads that are deleted at once when nobody says how many.
pub(crate) const DELETE_LIMIT: usize = 100;

/// Why an inner operation stopped; it does not know yet what it was a part of.
#[derive(Debug)]
pub(crate) enum Fault {
    /// An answer for the caller.
    Said(StorageError),
    /// The database failed.
    Database(sqlx::Error),
}

impl From<StorageError> for Fault {
    fn from(error: StorageError) -> Self {
        Self::Said(error)
    }
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl Fault {
    /// What is wrong with what was read, if that is what stopped it.
    pub(crate) fn of_reading(self) -> Result<String, Self> {
        match self {
            Self::Said(StorageError::Corrupt { what }) => Ok(what),
            Self::Database(error @ (sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_))) => {
                Ok(error.to_string())
            }
            other => Err(other),
        }
    }

    /// Says which part of which thread it was that could not be read.
    pub(crate) fn in_part(self, thread: &ThreadId, part: StoredPart) -> Self {
        match self.of_reading() {
            Ok(what) => Self::Said(StorageError::Unreadable {
                thread: thread.clone(),
                part,
                what,
            }),
            Err(other) => other,
        }
    }

    /// Says which entry of the journal it was that could not be read.
    fn in_entry(self, cursor: Cursor) -> Self {
        match self.of_reading() {
            Ok(what) => Self::Said(StorageError::UnreadableEntry { cursor, what }),
            Err(other) => other,
        }
    }

    /// Tells the caller, with what was being done.
    pub(crate) fn during(self, operation: &str) -> StorageError {
        match self {
            Self::Said(error) => error,
            Self::Database(error @ (sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_))) => {
                StorageError::Corrupt {
                    what: format!("while {operation}: {error}"),
                }
            }
            Self::Database(error) => StorageError::Backend {
                operation: operation.to_owned(),
                source: Box::new(error),
            },
        }
    }
}

/// What was read, or a stand-in for it; the first thing that could not be read is noted.
pub(crate) fn or_noted<T>(
    unreadable: &mut Option<String>,
    stand_in: T,
    read: Result<T, impl Into<Fault>>,
) -> Result<T, Fault> {
    match read {
        Ok(value) => Ok(value),
        Err(error) => {
            let what = error.into().of_reading()?;
            unreadable.get_or_insert(what);
            Ok(stand_in)
        }
    }
}

/// Entries up to the first one that cannot be read; if that is the very first one, its error.
pub(crate) fn readable_entries(
    entries: impl Iterator<Item = (Cursor, Result<Entry, Fault>)>,
) -> Result<Vec<Entry>, Fault> {
    let mut readable = Vec::new();
    for (cursor, entry) in entries {
        match entry {
            Ok(entry) => readable.push(entry),
            Err(fault) if readable.is_empty() => return Err(fault.in_entry(cursor)),
            // Whoever goes on after those comes across it.
            Err(_) => break,
        }
    }
    Ok(readable)
}

/// A number for a database; databases count to 2⁶³.
pub(crate) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A number from a database.
pub(crate) fn number(int: i64) -> u64 {
    u64::try_from(int).unwrap_or(0)
}

/// A number from a database that counts branches, rounds or leases.
pub(crate) fn small(int: i64) -> u32 {
    u32::try_from(int.max(0)).unwrap_or(u32::MAX)
}

/// A number of rows for a `limit`.
pub(crate) fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// The time in microseconds since 1970, never before the given one: what waits for it must not be woken too early.
pub(crate) fn micros_after(time: Timestamp) -> i64 {
    let micros = time.as_microsecond();
    if time.as_nanosecond() > i128::from(micros) * 1000 {
        micros + 1
    } else {
        micros
    }
}

/// A time from microseconds since 1970.
pub(crate) fn time(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 {
        Timestamp::MIN
    } else {
        Timestamp::MAX
    })
}

/// A duration in microseconds.
pub(crate) fn micros(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

/// A value as JSON text.
pub(crate) fn json_text(value: &(impl Serialize + ?Sized)) -> Result<String, StorageError> {
    let text = serde_json::to_string(value).map_err(|error| StorageError::Unstorable {
        what: format!("it is not JSON: {error}"),
    })?;
    if depth(&text) > DEEPEST {
        return Err(StorageError::Unstorable {
            what: format!("it is nested more than {DEEPEST} levels deep"),
        });
    }
    Ok(text)
}

/// A value as JSON text, but nothing for an empty object.
pub(crate) fn channels_text(channels: &Channels) -> Result<Option<String>, StorageError> {
    if channels.is_empty() {
        Ok(None)
    } else {
        json_text(channels).map(Some)
    }
}

/// A value from JSON text; `what` names the row.
pub(crate) fn from_json<T: DeserializeOwned>(text: &str, what: &str) -> Result<T, StorageError> {
    serde_json::from_str(text).map_err(|error| StorageError::Corrupt {
        what: format!("{what}: {error}"),
    })
}

/// How deep the arrays and objects of a JSON text are nested.
fn depth(text: &str) -> usize {
    // Most values are shallow, and counting is quicker than walking.
    let bytes = text.as_bytes();
    let opened = bytes.iter().filter(|b| matches!(b, b'[' | b'{')).count();
    if opened <= DEEPEST {
        return opened;
    }
    let (mut deepest, mut now, mut quoted, mut escaped) = (0_usize, 0_usize, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                now += 1;
                deepest = deepest.max(now);
            }
            b']' | b'}' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// A short stand-in for a key of any length.
pub(crate) fn digest(key: &str) -> Uuid {
    first_half(Sha256::digest(key.as_bytes()).as_slice())
}

/// A short stand-in for a node of a graph.
pub(crate) fn space_digest(space: &CacheSpace) -> Uuid {
    let mut hash = Sha256::new();
    for text in [&space.graph, &space.node] {
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text.as_bytes());
    }
    first_half(hash.finalize().as_slice())
}

/// A short stand-in for the key of a pending write.
pub(crate) fn key_digest(write: &WriteKey) -> Uuid {
    let mut hash = Sha256::new();
    for text in [&write.task, &write.name] {
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text.as_bytes());
    }
    hash.update([write.kind.code()]);
    hash.update(write.round.to_be_bytes());
    first_half(hash.finalize().as_slice())
}

fn first_half(hash: &[u8]) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    Uuid::from_bytes(bytes)
}

/// Adds the items of append channels to others, in order.
pub(crate) fn append_items(to: &mut Channels, more: Channels) {
    for (name, items) in more {
        match (to.get_mut(&name), items) {
            (Some(serde_json::Value::Array(list)), serde_json::Value::Array(items)) => {
                list.extend(items);
            }
            (_, items) => {
                to.insert(name, items);
            }
        }
    }
}

/// The number under which a status is stored.
pub(crate) fn status_code(status: ThreadStatus) -> i16 {
    match status {
        ThreadStatus::Ready => 0,
        ThreadStatus::Running => 1,
        ThreadStatus::Waiting => 2,
        ThreadStatus::Done => 3,
        ThreadStatus::Failed => 4,
        ThreadStatus::Cancelled => 5,
    }
}

/// The inverse of [`status_code`].
pub(crate) fn status_from(code: i64) -> Result<ThreadStatus, StorageError> {
    Ok(match code {
        0 => ThreadStatus::Ready,
        1 => ThreadStatus::Running,
        2 => ThreadStatus::Waiting,
        3 => ThreadStatus::Done,
        4 => ThreadStatus::Failed,
        5 => ThreadStatus::Cancelled,
        _ => {
            return Err(StorageError::Corrupt {
                what: format!("a thread has the unknown status {code}"),
            });
        }
    })
}

/// How the source of a checkpoint is stored; supersteps, being most of them, cost nothing.
pub(crate) fn source_text(source: &Source) -> Option<String> {
    match source {
        Source::Step => None,
        Source::Input => Some("input".to_owned()),
        Source::Update(node) => Some(format!("update:{node}")),
    }
}

/// The inverse of [`source_text`].
pub(crate) fn source_from(text: Option<&str>) -> Result<Source, StorageError> {
    match text {
        None => Ok(Source::Step),
        Some("input") => Ok(Source::Input),
        Some(text) => text.strip_prefix("update:").map_or_else(
            || {
                Err(StorageError::Corrupt {
                    what: format!("a checkpoint has the unknown source `{text}`"),
                })
            },
            |node| Ok(Source::Update(node.to_owned())),
        ),
    }
}

/// The kind of a pending write from its code.
pub(crate) fn write_kind(code: i64) -> Result<WriteKind, StorageError> {
    u8::try_from(code)
        .ok()
        .and_then(WriteKind::from_code)
        .ok_or_else(|| StorageError::Corrupt {
            what: format!("a pending write has the unknown kind {code}"),
        })
}

/// Where a branch grew from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fork {
    pub branch: u32,
    pub from_branch: u32,
    pub checkpoint: u64,
}

/// The part of a way to a checkpoint that lies on one branch: its checkpoints up to a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub branch: u32,
    pub upto: u64,
}

/// The way to a checkpoint through the branches, newest first. Forks are few; none twice, so this ends.
pub(crate) fn lineage(forks: &[Fork], branch: u32, upto: u64) -> Vec<Segment> {
    let mut way = vec![Segment { branch, upto }];
    let mut here = branch;
    for _ in 0..forks.len() {
        let Some(fork) = forks.iter().find(|fork| fork.branch == here) else {
            break;
        };
        if fork.checkpoint == 0 {
            break;
        }
        way.push(Segment {
            branch: fork.from_branch,
            upto: fork.checkpoint.min(upto),
        });
        here = fork.from_branch;
    }
    way
}

/// Puts the rows on the way to a checkpoint (oldest first) together; `newest_snapshot` is the number of the newest one of
/// them that has a snapshot.
pub(crate) fn state_rows(
    checkpoint: u64,
    branch: u32,
    step: u64,
    plan: Option<serde_json::Value>,
    newest_snapshot: Option<u64>,
    rows: Vec<StateRow>,
) -> StateRows {
    let since_snapshot =
        newest_snapshot.map(|at| rows.iter().filter(|row| row.checkpoint > at).count() as u64);
    StateRows {
        checkpoint,
        branch,
        step,
        plan,
        since_snapshot,
        rows,
        state: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_nesting_and_not_brackets_in_strings() {
        let flat = format!("[{}]", vec!["[]"; 500].join(","));
        assert_eq!(depth(&flat), 2);
        let quoted = format!("[\"{}\\\"[\"]", "[".repeat(500));
        assert_eq!(depth(&quoted), 1);
        let deep = format!("{}{}", "[".repeat(300), "]".repeat(300));
        assert_eq!(depth(&deep), 300);
    }

    #[test]
    fn what_could_not_be_read_back_is_not_stored() {
        let mut value = serde_json::Value::Null;
        for _ in 0..DEEPEST {
            value = serde_json::json!([value]);
        }
        let text = json_text(&value).expect("as deep as is allowed");
        let back: serde_json::Value = from_json(&text, "test").expect("can be read back");
        assert_eq!(back, value);
        assert!(matches!(
            json_text(&serde_json::json!([value])),
            Err(StorageError::Unstorable { .. })
        ));
    }

    #[test]
    fn times_are_never_stored_too_early() {
        let exact = Timestamp::from_microsecond(5).expect("a time");
        assert_eq!(micros_after(exact), 5);
        let odd = Timestamp::from_nanosecond(5001).expect("a time");
        assert_eq!(micros_after(odd), 6);
        let before = Timestamp::from_nanosecond(-5001).expect("a time");
        assert_eq!(micros_after(before), -5);
    }

    #[test]
    fn the_way_to_a_checkpoint_goes_through_the_branches_it_grew_from() {
        let forks = [
            Fork {
                branch: 1,
                from_branch: 0,
                checkpoint: 5,
            },
            Fork {
                branch: 2,
                from_branch: 1,
                checkpoint: 7,
            },
            Fork {
                branch: 3,
                from_branch: 0,
                checkpoint: 0,
            },
        ];
        let seg = |branch, upto| Segment { branch, upto };
        assert_eq!(lineage(&forks, 2, 9), [seg(2, 9), seg(1, 7), seg(0, 5)]);
        assert_eq!(lineage(&forks, 0, 4), [seg(0, 4)]);
        assert_eq!(lineage(&forks, 3, 10), [seg(3, 10)]);
    }
}
