//! Which data folder a database belongs to.

use sea_query::{Asterisk, Query};

use crate::db::{insert_new, val};
use crate::{Result, Store};

impl Store {
    /// Binds the database to a data folder, by the folder's id, unless it is bound already. `false`: it belongs to another
    /// folder, whose repositories and releases its threads speak of.
    pub async fn belongs_to(&self, home: &str) -> Result<bool> {
        let bind = insert_new(
            "installation",
            vec![("one", val(1_i64)), ("home", val(home))],
        );
        self.db.execute(&bind).await?;
        let bound = Query::select().column(Asterisk).from("installation").take();
        Ok(match self.db.fetch_optional(&bound).await? {
            Some(row) => row.text("home")? == home,
            None => false,
        })
    }
}
