//! Follows the journal and keeps the projections: each entry once, in order, however many processes follow.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use sea_query::{Asterisk, Expr, ExprTrait as _, Query};
use serde_json::Value;
use sqlx::{Column as _, Row as _, TypeInfo as _};

use crate::db::{Columns, insert_new, int, val};
use crate::{Error, Result, Row, Store, Tx, projection};

/// The tables that are made from the journal and nothing else.
pub const PROJECTION_TABLES: [&str; 9] = [
    "projects",
    "jobs",
    "tasks",
    "pull_requests",
    "deployments",
    "waits",
    "ledger",
    "messages",
    "outbox_intents",
];

/// The one row of `projection_cursors`.
const PROJECTOR: &str = "projections";

/// Entries that are applied in one transaction while rebuilding or catching up.
const BATCH: usize = 500;

/// An entry of the journal, as far as projections need it.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalEntry {
    /// Its place in the whole journal; grows, starts above 0.
    pub cursor: i64,
    /// The stream it stands in: a project's id, or a thread's for the engine's own entries.
    pub stream: String,
    /// Its place in the stream, from 1 without gaps.
    pub number: i64,
    /// Its name, such as `task.merged`.
    pub name: String,
    /// What it says.
    pub payload: Value,
    /// When it was written.
    pub at: Timestamp,
}

/// Where entries come from.
#[async_trait]
pub trait JournalSource: Send + Sync {
    /// At most `limit` entries after a cursor, in order; none when there are no more.
    async fn read(&self, after: i64, limit: usize) -> Result<Vec<JournalEntry>, String>;
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Where the projections stand now: read on from here.
    pub cursor: i64,
    /// How many entries of the batch were applied now; the others were applied before.
    pub entries: usize,
}

/// The rows of every projection table, each as text in a stable order: what two rebuilds are compared by.
pub type Dump = BTreeMap<&'static str, Vec<String>>;

/// Applies entries to the projections.
#[derive(Clone, Debug)]
pub struct Projector {
    store: Store,
}

impl Projector {
    /// A projector for this database. Any number of them may work at the same time, in any number of processes.
    pub fn new(store: &Store) -> Self {
        Self {
            store: store.clone(),
        }
    }

    /// The last entry that was applied; 0 before the first.
    pub async fn cursor(&self) -> Result<i64> {
        let query = Query::select()
            .column("cursor")
            .from("projection_cursors")
            .and_where(Expr::col("name").eq(PROJECTOR))
            .take();
        self.store
            .db
            .fetch_optional(&query)
            .await?
            .map_or(Ok(0), |row| row.int("cursor"))
    }

    /// Applies a batch that was read after the entry `after`, and moves the cursor, in one transaction. Entries that were
    /// applied before, by this process or another, are skipped; a batch that leaves a gap is refused as [`Error::Gap`].
    pub async fn apply(&self, after: i64, entries: &[JournalEntry]) -> Result<Applied> {
        let mut tx = self.store.db.begin().await?;
        let (stands, _) = lock_cursor(&mut tx).await?;
        if stands < after {
            return Err(Error::Gap {
                stands,
                given: after,
            });
        }
        let mut cursor = stands;
        let mut applied = 0;
        for entry in entries {
            if entry.cursor > cursor {
                projection::apply(&mut tx, entry).await?;
                cursor = entry.cursor;
                applied += 1;
            }
        }
        if applied > 0 {
            let moved = Query::update()
                .table("projection_cursors")
                .value("cursor", cursor)
                .and_where(Expr::col("name").eq(PROJECTOR))
                .and_where(Expr::col("cursor").eq(stands))
                .take();
            tx.execute(&moved).await?;
            tx.commit().await?;
        }
        Ok(Applied {
            cursor,
            entries: applied,
        })
    }

    /// Applies everything that the journal holds beyond the cursor; says where the projections stand then.
    pub async fn catch_up(&self, journal: &dyn JournalSource) -> Result<i64> {
        let mut cursor = self.cursor().await?;
        loop {
            let entries = journal.read(cursor, BATCH).await.map_err(Error::Journal)?;
            if entries.is_empty() {
                return Ok(cursor);
            }
            cursor = match self.apply(cursor, &entries).await {
                Ok(applied) => applied.cursor,
                // Somebody began a rebuild meanwhile: go on from where it stands.
                Err(Error::Gap { stands, .. }) => stands,
                Err(error) => return Err(error),
            };
        }
    }

    /// Drops every projection. Until the journal is applied again up to where it was, nothing is handed to senders, so
    /// that nobody is told of a state that is long past. Deliveries stay, so that nothing is sent again afterwards.
    pub async fn reset(&self) -> Result<()> {
        let mut tx = self.store.db.begin().await?;
        let (stands, target) = lock_cursor(&mut tx).await?;
        for table in PROJECTION_TABLES {
            tx.execute(&Query::delete().from_table(table).take())
                .await?;
        }
        let restart = Query::update()
            .table("projection_cursors")
            .value("cursor", 0_i64)
            .value("target", Ord::max(stands, target))
            .and_where(Expr::col("name").eq(PROJECTOR))
            .take();
        tx.execute(&restart).await?;
        tx.commit().await
    }

    /// Drops every projection and makes it again from the journal. A crash in between is mended by [`Self::catch_up`].
    pub async fn rebuild(&self, journal: &dyn JournalSource) -> Result<i64> {
        self.reset().await?;
        self.catch_up(journal).await
    }

    /// The rows of every projection table.
    pub async fn dump(&self) -> Result<Dump> {
        let mut dump = Dump::new();
        for table in PROJECTION_TABLES {
            let query = Query::select().column(Asterisk).from(table).take();
            let rows = self.store.db.fetch_all(&query).await?;
            let mut lines = rows.iter().map(line).collect::<Result<Vec<_>>>()?;
            lines.sort();
            dump.insert(table, lines);
        }
        Ok(dump)
    }
}

/// Where the projections stand and where a rebuild has to come, held until the transaction ends.
async fn lock_cursor(tx: &mut Tx) -> Result<(i64, i64)> {
    let columns: Columns = vec![
        ("name", val(PROJECTOR)),
        ("cursor", int(0)),
        ("target", int(0)),
    ];
    tx.execute(&insert_new("projection_cursors", columns))
        .await?;
    let query = Query::select()
        .columns(["cursor", "target"])
        .from("projection_cursors")
        .and_where(Expr::col("name").eq(PROJECTOR))
        .lock_exclusive()
        .take();
    let row = tx.fetch_optional(&query).await?;
    row.map_or(Ok((0, 0)), |row| {
        Ok((row.int("cursor")?, row.int("target")?))
    })
}

/// The entry up to which everything that people should know is known: subscribers join here. `None` while a rebuild has
/// not come back to where the projections were.
pub(crate) async fn watermark(tx: &mut Tx) -> Result<(i64, bool)> {
    let query = Query::select()
        .columns(["cursor", "target"])
        .from("projection_cursors")
        .and_where(Expr::col("name").eq(PROJECTOR))
        .take();
    let (cursor, target) = match tx.fetch_optional(&query).await? {
        Some(row) => (row.int("cursor")?, row.int("target")?),
        None => (0, 0),
    };
    Ok((Ord::max(cursor, target), cursor >= target))
}

fn line(row: &Row) -> Result<String> {
    let names: Vec<(String, String)> = match row {
        Row::Sqlite(row) => row
            .columns()
            .iter()
            .map(|c| (c.name().to_owned(), c.type_info().name().to_owned()))
            .collect(),
        Row::Postgres(row) => row
            .columns()
            .iter()
            .map(|c| (c.name().to_owned(), c.type_info().name().to_owned()))
            .collect(),
    };
    let mut object = serde_json::Map::new();
    for (name, kind) in names {
        let value = match kind.as_str() {
            "REAL" | "FLOAT8" => row.opt_double(&name)?.map(Value::from),
            "INTEGER" | "INT8" => row.opt_int(&name)?.map(Value::from),
            "BOOL" => Some(Value::from(i64::from(row.flag(&name)?))),
            _ => row.opt_text(&name)?.map(Value::from),
        };
        object.insert(name, value.unwrap_or(Value::Null));
    }
    Ok(Value::Object(object).to_string())
}
