//! Buttons under a question: opaque tokens, each with an owner, an expiry and the exact revision that was shown. A wait is
//! answered by one press, whoever's and on whichever of its buttons.

use jiff::Timestamp;
use ports::{Audience, PersonId, WaitId};
use sea_query::{Asterisk, Expr, ExprTrait as _, Query};
use uuid::Uuid;

use crate::db::{insert, val, word};
use crate::{Error, Result, Store};

/// The buttons of one question to be shown in one place.
#[derive(Clone, Debug)]
pub struct NewButton<'a> {
    /// The wait.
    pub wait: &'a WaitId,
    /// What pressing it means.
    pub choice: &'a str,
    /// Who is asked.
    pub audience: Audience,
    /// The one person who may press it; `None`: everybody of the audience.
    pub owner: Option<&'a PersonId>,
    /// The revision of the question that is shown, as the delivery names it.
    pub revision: i64,
    /// Until when.
    pub expires_at: Timestamp,
}

/// A button that was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Button {
    /// Its opaque token, 22 characters of URL-safe text: what the front end puts into the button.
    pub token: String,
}

/// A press that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Press {
    /// The wait that it answers.
    pub wait: WaitId,
    /// What was chosen.
    pub choice: String,
    /// The revision of the question that was shown.
    pub revision: i64,
}

/// Why a press does not count.
#[derive(Debug, thiserror::Error)]
pub enum ButtonRefusal {
    /// Nobody knows this button.
    #[error("this button is unknown; ask for the question again with /status")]
    Unknown,
    /// It is somebody else's.
    #[error("this button is for somebody else")]
    NotYours,
    /// Its time is over.
    #[error("this button has expired; ask for the question again with /status")]
    Expired,
    /// The question was answered by a button before.
    #[error("this was answered already: {choice}")]
    Used {
        /// What was chosen.
        choice: String,
        /// Who pressed.
        by: PersonId,
    },
    /// The question was answered otherwise, asked anew or withdrawn.
    #[error("this question is closed; nothing was changed")]
    Closed,
    /// The database failed.
    #[error(transparent)]
    Database(#[from] Error),
}

impl Store {
    /// Stores a button before it is shown.
    pub async fn new_button(&self, new: &NewButton<'_>) -> Result<Button> {
        let token = Uuid::new_v4().simple().to_string();
        let columns = vec![
            ("token", val(token.as_str())),
            ("wait", val(new.wait.as_str())),
            ("choice", val(new.choice)),
            ("audience", val(word(&new.audience))),
            ("owner", val(new.owner.map(ToString::to_string))),
            ("revision", val(new.revision)),
            ("expires_ms", val(new.expires_at.as_millisecond())),
        ];
        self.db.execute(&insert("buttons", columns)).await?;
        Ok(Button { token })
    }

    /// Somebody pressed a button. `press` is the press's own unique key, such as `telegram:{update_id}`: the same press
    /// told twice counts once and gets the same answer, so that a crash between here and the answer loses nothing.
    pub async fn press_button(
        &self,
        token: &str,
        by: &PersonId,
        press: &str,
    ) -> Result<Press, ButtonRefusal> {
        let mut tx = self.db.begin().await?;
        let now = tx.now_ms();
        let this = || {
            Query::select()
                .column(Asterisk)
                .expr_as(
                    Expr::case(Expr::col("expires_ms").lte(now.clone()), 1_i64).finally(0_i64),
                    "expired",
                )
                .from("buttons")
                .and_where(Expr::col("token").eq(token))
                .take()
        };
        let Some(row) = tx.fetch_optional(&this()).await? else {
            return Err(ButtonRefusal::Unknown);
        };
        let wait = row.text("wait")?;
        let answer = Press {
            wait: WaitId::new(wait.as_str()),
            choice: row.text("choice")?,
            revision: row.int("revision")?,
        };
        let standing = Query::select()
            .column("standing")
            .from("people")
            .and_where(Expr::col("id").eq(by.as_str()))
            .take();
        let standing = match tx.fetch_optional(&standing).await? {
            Some(row) => row.text("standing")?,
            None => "stranger".to_owned(),
        };
        let audience: Audience = row.word("audience")?;
        let theirs = match row.opt_text("owner")? {
            Some(owner) => owner == by.as_str(),
            None => true,
        };
        let may = match audience {
            Audience::Owner => matches!(standing.as_str(), "allowed" | "admin"),
            Audience::Admins => standing == "admin",
        };
        if !theirs || !may {
            return Err(ButtonRefusal::NotYours);
        }
        if row.int("expired")? == 1 && row.opt_text("used_key")?.as_deref() != Some(press) {
            return Err(ButtonRefusal::Expired);
        }
        // Every button of the wait at once: whoever comes second waits for this row and then finds it used.
        let used = Query::update()
            .table("buttons")
            .value("used_ms", now.clone())
            .value("used_by", by.as_str())
            .value("used_key", press)
            .value("chosen", answer.choice.as_str())
            .and_where(Expr::col("wait").eq(wait.as_str()))
            .and_where(Expr::col("used_ms").is_null())
            .take();
        if tx.execute(&used).await? == 0 {
            let Some(row) = tx.fetch_optional(&this()).await? else {
                return Err(ButtonRefusal::Unknown);
            };
            let by = PersonId::new(row.opt_text("used_by")?.unwrap_or_default());
            let choice = row.opt_text("chosen")?.unwrap_or_default();
            return if row.opt_text("used_key")?.as_deref() == Some(press) {
                Ok(answer)
            } else {
                Err(ButtonRefusal::Used { choice, by })
            };
        }
        // A question that was shown once more after it was answered has buttons that nobody pressed.
        let earlier = Query::select()
            .columns(["used_by", "chosen"])
            .from("buttons")
            .and_where(Expr::col("wait").eq(wait.as_str()))
            .and_where(Expr::col("used_key").ne(press))
            .limit(1)
            .take();
        if let Some(row) = tx.fetch_optional(&earlier).await? {
            return Err(ButtonRefusal::Used {
                choice: row.opt_text("chosen")?.unwrap_or_default(),
                by: PersonId::new(row.opt_text("used_by")?.unwrap_or_default()),
            });
        }
        let closed = Query::select()
            .column("id")
            .from("waits")
            .and_where(Expr::col("id").eq(wait.as_str()))
            .and_where(Expr::col("status").eq("closed"))
            .take();
        if tx.fetch_optional(&closed).await?.is_some() {
            return Err(ButtonRefusal::Closed);
        }
        tx.commit().await?;
        Ok(answer)
    }
}
