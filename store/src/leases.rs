//! Leases of a process that is known to be dead.

use sea_query::{Expr, ExprTrait, Query};

use crate::{Result, Store};

impl Store {
    /// Lets every lease on an errand or a delivery end now, so that the next process goes on at once. For whoever knows that
    /// nobody else works on this database, because it holds the right to.
    ///
    /// A message that the dead process had handed to its server, but not yet recorded, is sent once more.
    pub async fn break_leases(&self) -> Result<()> {
        for (table, status) in [("errands", "running"), ("deliveries", "sending")] {
            let over = Query::update()
                .table(table)
                .value("lease_ms", 0_i64)
                .and_where(Expr::col("status").eq(status))
                .take();
            self.db.execute(&over).await?;
        }
        Ok(())
    }
}
