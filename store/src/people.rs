//! Who may talk to the crew, and how a stranger becomes somebody: by a code that the terminal shows.

use std::time::Duration;

use jiff::Timestamp;
use ports::PersonId;
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::db::{Columns, insert, insert_new, val};
use crate::{Error, Result, Row, Store, Tx};

/// Wrong guesses after which a pairing code is worth nothing.
pub const MAX_PAIRING_ATTEMPTS: i64 = 10;

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing but entering a pairing code.
    Stranger,
    /// Founding projects and talking about them.
    Allowed,
    /// The same, and what concerns the whole installation.
    Admin,
    /// Nothing.
    Blocked,
}

impl Standing {
    fn as_str(self) -> &'static str {
        match self {
            Self::Stranger => "stranger",
            Self::Allowed => "allowed",
            Self::Admin => "admin",
            Self::Blocked => "blocked",
        }
    }

    fn parse(text: &str) -> Result<Self> {
        [Self::Stranger, Self::Allowed, Self::Admin, Self::Blocked]
            .into_iter()
            .find(|standing| standing.as_str() == text)
            .ok_or_else(|| Error::Unreadable {
                column: "standing",
                value: text.to_owned(),
            })
    }
}

/// Somebody who wrote to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersonRow {
    /// Who.
    pub id: PersonId,
    /// The name that they go by.
    pub name: String,
    /// What they may do.
    pub standing: Standing,
    /// When they entered a pairing code.
    pub paired_at: Option<Timestamp>,
}

/// A code to show on the terminal; only its hash is stored.
#[derive(Clone, PartialEq, Eq)]
pub struct PairingCode(String);

impl PairingCode {
    /// The code, for the one place that shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for PairingCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PairingCode(…)")
    }
}

/// Why a pairing code was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PairingRefusal {
    /// It is not the one that the terminal shows.
    #[error("this pairing code is wrong; enter the one that the terminal shows")]
    Wrong,
    /// It was tried too often, has expired or was used.
    #[error(
        "there is no pairing code at the moment; run `artel up` again, or `artel init`, to be shown a new one"
    )]
    NoCode,
    /// This person is blocked.
    #[error("you cannot be paired with this installation; ask its admin")]
    Blocked,
    /// The database failed.
    #[error(transparent)]
    Database(#[from] Error),
}

fn hash(code: &str) -> String {
    let plain: String = code
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_uppercase())
        .collect();
    hex::encode(Sha256::digest(plain.as_bytes()))
}

fn read(row: &Row) -> Result<PersonRow> {
    Ok(PersonRow {
        id: PersonId::new(row.text("id")?),
        name: row.text("name")?,
        standing: Standing::parse(&row.text("standing")?)?,
        paired_at: row.opt_time("paired_ms")?,
    })
}

impl Store {
    /// Remembers that somebody wrote, with the name they go by; a new person is a stranger.
    pub async fn meet(&self, person: &PersonId, name: &str) -> Result<PersonRow> {
        let mut tx = self.db.begin().await?;
        let row = meet(&mut tx, person, name).await?;
        tx.commit().await?;
        Ok(row)
    }

    /// Somebody, if they ever wrote or were given a standing.
    pub async fn person(&self, person: &PersonId) -> Result<Option<PersonRow>> {
        let query = Query::select()
            .column(Asterisk)
            .from("people")
            .and_where(Expr::col("id").eq(person.as_str()))
            .take();
        self.db
            .fetch_optional(&query)
            .await?
            .as_ref()
            .map(read)
            .transpose()
    }

    /// Everybody, by id.
    pub async fn people(&self) -> Result<Vec<PersonRow>> {
        let query = Query::select()
            .column(Asterisk)
            .from("people")
            .order_by("id", Order::Asc)
            .take();
        self.db.read(&query, read).await
    }

    /// Gives somebody a standing, whether they wrote before or not.
    pub async fn set_standing(&self, person: &PersonId, standing: Standing) -> Result<()> {
        let mut tx = self.db.begin().await?;
        meet(&mut tx, person, "").await?;
        set_standing(&mut tx, person, standing, None).await?;
        tx.commit().await
    }

    /// Makes a new pairing code; those before it are worth nothing from now on.
    pub async fn new_pairing_code(&self, valid_for: Duration) -> Result<PairingCode> {
        const ALPHABET: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";
        let random = Uuid::new_v4().into_bytes();
        // Bytes 6 and 8 of a random UUID carry its version.
        let code: String = [0, 1, 2, 3, 4, 5, 9, 10]
            .into_iter()
            .map(|i: usize| char::from(ALPHABET[usize::from(random[i] % 32)]))
            .collect();
        let mut tx = self.db.begin().await?;
        tx.execute(&Query::delete().from_table("pairing_codes").take())
            .await?;
        let now = tx.now_ms();
        let lasts = i64::try_from(valid_for.as_millis()).unwrap_or(i64::MAX / 4);
        let columns = vec![
            ("hash", val(hash(&code))),
            ("created_ms", now.clone()),
            ("expires_ms", now.add(lasts)),
            ("attempts", val(0_i64)),
        ];
        tx.execute(&insert("pairing_codes", columns)).await?;
        tx.commit().await?;
        Ok(PairingCode(format!("{}-{}", &code[..4], &code[4..])))
    }

    /// Somebody enters a code. The first who enters it right is allowed, and it is used up; an admin stays an admin.
    pub async fn pair(
        &self,
        person: &PersonId,
        name: &str,
        code: &str,
    ) -> Result<PersonRow, PairingRefusal> {
        let mut tx = self.db.begin().await?;
        let somebody = meet(&mut tx, person, name).await?;
        if somebody.standing == Standing::Blocked {
            return Err(PairingRefusal::Blocked);
        }
        let now = tx.now_ms();
        let usable = || {
            Expr::col("used_by")
                .is_null()
                .and(Expr::col("expires_ms").gt(now.clone()))
                .and(Expr::col("attempts").lt(MAX_PAIRING_ATTEMPTS))
        };
        let tried = Query::update()
            .table("pairing_codes")
            .value("attempts", Expr::col("attempts").add(1_i64))
            .and_where(usable())
            .take();
        if tx.execute(&tried).await? == 0 {
            return Err(PairingRefusal::NoCode);
        }
        let used = Query::update()
            .table("pairing_codes")
            .value("used_by", person.as_str())
            .value("used_ms", now.clone())
            .and_where(Expr::col("hash").eq(hash(code)))
            .and_where(Expr::col("used_by").is_null())
            .take();
        if tx.execute(&used).await? == 0 {
            tx.commit().await?;
            return Err(PairingRefusal::Wrong);
        }
        let standing = match somebody.standing {
            Standing::Admin => Standing::Admin,
            _ => Standing::Allowed,
        };
        set_standing(&mut tx, person, standing, Some(now)).await?;
        let query = Query::select()
            .column(Asterisk)
            .from("people")
            .and_where(Expr::col("id").eq(person.as_str()))
            .take();
        let row = tx.fetch_optional(&query).await?;
        tx.commit().await?;
        let row = row.ok_or_else(|| Error::from(sqlx::Error::RowNotFound))?;
        Ok(read(&row)?)
    }
}

async fn meet(tx: &mut Tx, person: &PersonId, name: &str) -> Result<PersonRow> {
    let now = tx.now_ms();
    let columns: Columns = vec![
        ("id", val(person.as_str())),
        ("name", val(name)),
        ("standing", val(Standing::Stranger.as_str())),
        ("seen_ms", now.clone()),
    ];
    if tx.execute(&insert_new("people", columns)).await? == 0 && !name.is_empty() {
        let seen = Query::update()
            .table("people")
            .value("name", name)
            .value("seen_ms", now)
            .and_where(Expr::col("id").eq(person.as_str()))
            .take();
        tx.execute(&seen).await?;
    }
    let query = Query::select()
        .column(Asterisk)
        .from("people")
        .and_where(Expr::col("id").eq(person.as_str()))
        .take();
    let row = tx.fetch_optional(&query).await?;
    read(&row.ok_or(sqlx::Error::RowNotFound)?)
}

async fn set_standing(
    tx: &mut Tx,
    person: &PersonId,
    standing: Standing,
    paired: Option<Expr>,
) -> Result<()> {
    let mut update = Query::update()
        .table("people")
        .value("standing", standing.as_str())
        .and_where(Expr::col("id").eq(person.as_str()))
        .take();
    if let Some(now) = paired {
        update.value("paired_ms", now);
    }
    tx.execute(&update).await?;
    Ok(())
}
