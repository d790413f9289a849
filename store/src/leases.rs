//! Work that one process at a time does, and what becomes of the work of a process that is known to be dead.

use std::time::Duration;

use sea_query::{Asterisk, Expr, ExprTrait, Query, UpdateStatement};
use uuid::Uuid;

use crate::db::{insert_new, ms, val};
use crate::{Result, Store};

/// The lease under which one process at a time does errands, and all else that one process does for all.
pub const SCHEDULER: &str = "scheduler";
/// The lease under which one process at a time speaks with people over Telegram.
pub const BOT: &str = "bot";

/// The rows that are held by whoever has a lease: the table, and the status of what is held.
fn held_under(lease: &str) -> Option<(&'static str, &'static str)> {
    match lease {
        SCHEDULER => Some(("errands", "running")),
        BOT => Some(("deliveries", "sending")),
        _ => None,
    }
}

fn all_free(table: &'static str, status: &'static str) -> UpdateStatement {
    Query::update()
        .table(table)
        .value("lease_ms", 0_i64)
        .and_where(Expr::col("status").eq(status))
        .take()
}

impl Store {
    /// Lets every lease on an errand or a delivery end now, so that the next process goes on at once. For whoever knows that
    /// nobody else works on this database, because it holds the right to.
    ///
    /// A message that the dead process had handed to its server, but not yet recorded, is sent once more.
    pub async fn break_leases(&self) -> Result<()> {
        for (table, status) in [SCHEDULER, BOT].into_iter().filter_map(held_under) {
            self.db.execute(&all_free(table, status)).await?;
        }
        Ok(())
    }

    /// Takes a lease that nobody holds, or whose time ran out; gives the token that proves it. `holder` is for people, and for
    /// [`Store::bury_process`].
    pub async fn take_lease(
        &self,
        name: &str,
        holder: &str,
        lease: Duration,
    ) -> Result<Option<String>> {
        let token = Uuid::new_v4().simple().to_string();
        let take = Query::update()
            .table("leases")
            .value("holder", holder)
            .value("token", token.as_str())
            .value("until_ms", self.db.now_ms().add(ms(lease)))
            .and_where(Expr::col("name").eq(name))
            .and_where(Expr::col("until_ms").lte(self.db.now_ms()))
            .take();
        if self.db.execute(&take).await? == 1 {
            return Ok(Some(token));
        }
        let unheld = insert_new(
            "leases",
            vec![
                ("name", val(name)),
                ("holder", val("")),
                ("token", val("")),
                ("until_ms", val(0_i64)),
            ],
        );
        let first = self.db.execute(&unheld).await? == 1;
        let taken = first && self.db.execute(&take).await? == 1;
        Ok(taken.then_some(token))
    }

    /// Keeps a lease for longer. `false`: somebody else has it, or may have it at any moment; stop.
    pub async fn keep_lease(&self, name: &str, token: &str, lease: Duration) -> Result<bool> {
        let keep = Query::update()
            .table("leases")
            .value("until_ms", self.db.now_ms().add(ms(lease)))
            .and_where(Expr::col("name").eq(name))
            .and_where(Expr::col("token").eq(token))
            .take();
        Ok(self.db.execute(&keep).await? == 1)
    }

    /// Gives a lease back, if it is still held with this token.
    pub async fn leave_lease(&self, name: &str, token: &str) -> Result<()> {
        let leave = Query::update()
            .table("leases")
            .value("until_ms", 0_i64)
            .value("token", "")
            .and_where(Expr::col("name").eq(name))
            .and_where(Expr::col("token").eq(token))
            .take();
        self.db.execute(&leave).await?;
        Ok(())
    }

    /// Who holds a lease now.
    pub async fn lease_holder(&self, name: &str) -> Result<Option<String>> {
        let query = Query::select()
            .column("holder")
            .from("leases")
            .and_where(Expr::col("name").eq(name))
            .and_where(Expr::col("until_ms").gt(self.db.now_ms()))
            .take();
        let row = self.db.fetch_optional(&query).await?;
        row.map(|row| row.text("holder")).transpose()
    }

    /// Lets the leases of one process end now, with the errands and deliveries that it held under them. For whoever knows
    /// that this process is dead. What another process has taken over meanwhile stays with that one.
    ///
    /// A message that the dead process had handed to its server, but not yet recorded, is sent once more.
    pub async fn bury_process(&self, holder: &str) -> Result<Vec<String>> {
        let mut tx = self.db.begin().await?;
        // Whoever takes one of them over waits until this is done, so that nothing of theirs is let go of.
        let held = Query::select()
            .column(Asterisk)
            .from("leases")
            .and_where(Expr::col("holder").eq(holder))
            .and_where(Expr::col("token").ne(""))
            .lock_exclusive()
            .take();
        let mut names = Vec::new();
        for row in tx.fetch_all(&held).await? {
            let name = row.text("name")?;
            if let Some((table, status)) = held_under(&name) {
                tx.execute(&all_free(table, status)).await?;
            }
            names.push(name);
        }
        let over = Query::update()
            .table("leases")
            .value("until_ms", 0_i64)
            .value("token", "")
            .and_where(Expr::col("holder").eq(holder))
            .take();
        tx.execute(&over).await?;
        tx.commit().await?;
        Ok(names)
    }
}
