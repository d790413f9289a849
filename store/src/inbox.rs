//! What front ends received, stored raw before it is acknowledged, and handled once.

use jiff::Timestamp;
use sea_query::{Asterisk, Expr, ExprTrait as _, Func, Order, Query};

use crate::db::{insert_new, val};
use crate::{Result, Store};

/// How often an update is tried before it is put aside.
pub const MAX_INBOX_ATTEMPTS: i64 = 5;

/// Whether an update was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is stored now.
    New,
    /// It was stored before.
    Known,
}

/// An update as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboxRow {
    /// The front end's own unique number.
    pub update_id: i64,
    /// The text, as it came.
    pub raw: String,
    /// How often it was tried.
    pub attempts: i64,
    /// What went wrong last.
    pub error: Option<String>,
    /// When it came.
    pub received_at: Timestamp,
}

/// What becomes of an update that could not be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InboxFailure {
    /// It is tried again.
    Again,
    /// It was tried often enough and is put aside; an admin should hear of it.
    Dead,
}

fn of(front: &str, update_id: i64) -> Expr {
    Expr::col("front")
        .eq(front)
        .and(Expr::col("update_id").eq(update_id))
}

impl Store {
    /// Stores an update before it is acknowledged.
    pub async fn store_update(&self, front: &str, update_id: i64, raw: &str) -> Result<Stored> {
        let columns = vec![
            ("front", val(front)),
            ("update_id", val(update_id)),
            ("raw", val(raw)),
            ("status", val("new")),
            ("attempts", val(0_i64)),
            ("received_ms", self.db.now_ms()),
        ];
        Ok(
            match self.db.execute(&insert_new("inbox", columns)).await? {
                0 => Stored::Known,
                _ => Stored::New,
            },
        )
    }

    /// The largest update id that is stored: Telegram's offset is one more.
    pub async fn last_update_id(&self, front: &str) -> Result<Option<i64>> {
        let query = Query::select()
            .expr_as(Func::max(Expr::col("update_id")), "last")
            .from("inbox")
            .and_where(Expr::col("front").eq(front))
            .take();
        match self.db.fetch_optional(&query).await? {
            Some(row) => row.opt_int("last"),
            None => Ok(None),
        }
    }

    /// Updates that nobody handled yet, oldest first, at most `limit`.
    pub async fn unhandled_updates(&self, front: &str, limit: u64) -> Result<Vec<InboxRow>> {
        let query = Query::select()
            .column(Asterisk)
            .from("inbox")
            .and_where(Expr::col("front").eq(front))
            .and_where(Expr::col("status").eq("new"))
            .order_by("update_id", Order::Asc)
            .limit(limit)
            .take();
        self.db
            .read(&query, |row| {
                Ok(InboxRow {
                    update_id: row.int("update_id")?,
                    raw: row.text("raw")?,
                    attempts: row.int("attempts")?,
                    error: row.opt_text("error")?,
                    received_at: row.time("received_ms")?,
                })
            })
            .await
    }

    /// Counts a try *before* it is made, so that an update that takes the process down is put aside too. `false`: it was
    /// tried often enough, or is no longer to be handled.
    pub async fn begin_update(&self, front: &str, update_id: i64) -> Result<bool> {
        let begin = Query::update()
            .table("inbox")
            .value("attempts", Expr::col("attempts").add(1_i64))
            .and_where(of(front, update_id))
            .and_where(Expr::col("status").eq("new"))
            .and_where(Expr::col("attempts").lt(MAX_INBOX_ATTEMPTS))
            .take();
        if self.db.execute(&begin).await? == 1 {
            return Ok(true);
        }
        self.bury(front, update_id).await?;
        Ok(false)
    }

    async fn bury(&self, front: &str, update_id: i64) -> Result<u64> {
        let dead = Query::update()
            .table("inbox")
            .value("status", "dead")
            .value("handled_ms", self.db.now_ms())
            .and_where(of(front, update_id))
            .and_where(Expr::col("status").eq("new"))
            .and_where(Expr::col("attempts").gte(MAX_INBOX_ATTEMPTS))
            .take();
        self.db.execute(&dead).await
    }

    /// The update was handled; it is not handled again.
    pub async fn update_handled(&self, front: &str, update_id: i64) -> Result<()> {
        let handled = Query::update()
            .table("inbox")
            .value("status", "handled")
            .value("error", None::<String>)
            .value("handled_ms", self.db.now_ms())
            .and_where(of(front, update_id))
            .and_where(Expr::col("status").eq("new"))
            .take();
        self.db.execute(&handled).await?;
        Ok(())
    }

    /// The update could not be handled; `error` says why, without anything secret.
    pub async fn update_failed(
        &self,
        front: &str,
        update_id: i64,
        error: &str,
    ) -> Result<InboxFailure> {
        let noted = Query::update()
            .table("inbox")
            .value("error", error)
            .and_where(of(front, update_id))
            .and_where(Expr::col("status").eq("new"))
            .take();
        self.db.execute(&noted).await?;
        Ok(match self.bury(front, update_id).await? {
            0 => InboxFailure::Again,
            _ => InboxFailure::Dead,
        })
    }

    /// Keeps with an update what was decided about it before it is carried out, so that a second try does the same.
    pub async fn rewrite_update(&self, front: &str, update_id: i64, raw: &str) -> Result<()> {
        let rewrite = Query::update()
            .table("inbox")
            .value("raw", raw)
            .and_where(of(front, update_id))
            .take();
        self.db.execute(&rewrite).await?;
        Ok(())
    }

    /// Puts an update back whose handling was broken off by the end of the program: that was no try.
    pub async fn release_update(&self, front: &str, update_id: i64) -> Result<()> {
        let release = Query::update()
            .table("inbox")
            .value("attempts", Expr::col("attempts").sub(1_i64))
            .and_where(of(front, update_id))
            .and_where(Expr::col("status").eq("new"))
            .and_where(Expr::col("attempts").gt(0_i64))
            .take();
        self.db.execute(&release).await?;
        Ok(())
    }

    /// Blanks the raw text of an update that carried a secret, once the secret is in the vault.
    pub async fn forget_update(&self, front: &str, update_id: i64) -> Result<()> {
        let forget = Query::update()
            .table("inbox")
            .value("raw", "{}")
            .and_where(of(front, update_id))
            .take();
        self.db.execute(&forget).await?;
        Ok(())
    }
}
