//! Errands as rows: work of minutes, stored before it is started, claimed under a lease, its outcome kept until it was
//! delivered as a signal. Doing the work and sending the signal is the program's part.

use std::time::Duration;

use ports::{Errand, ErrandOutcome, Failure};
use sea_query::{Asterisk, Expr, ExprTrait as _, LockBehavior, LockType, Order, Query};
use uuid::Uuid;

use crate::db::{insert_new, json, ms, val};
use crate::{Result, Store};

/// How often an errand is begun. One that never ends, because whoever does it dies, ends as failed. A process that dies of
/// something else counts as well, hence the generous number.
pub const MAX_ERRAND_ATTEMPTS: i64 = 20;

/// An errand that is ours to do until its lease ends.
#[derive(Clone, Debug, PartialEq)]
pub struct ClaimedErrand {
    /// What is to be done.
    pub errand: Errand,
    /// Proves that it is ours: whoever claims it after our lease gets another one.
    pub token: String,
    /// Which try this is, from 1.
    pub attempt: u32,
}

/// Where an errand stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrandStatus {
    /// Nobody does it yet.
    Queued,
    /// Somebody does it, or died over it.
    Running,
    /// It ended.
    Done,
    /// It was taken back.
    Cancelled,
}

/// Whether an outcome counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// It is recorded.
    Recorded,
    /// The errand was taken back, or somebody else has the lease: the outcome is dropped.
    Refused,
}

/// An outcome that its sender has not got yet.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrandReply {
    /// The errand's key, and the signal's.
    pub key: String,
    /// The thread that gets the signal.
    pub reply_to: String,
    /// The signal's payload.
    pub outcome: ErrandOutcome,
}

fn of(key: &str) -> Expr {
    Expr::col("id").eq(key)
}

impl Store {
    /// Stores an errand; the same key twice is one errand.
    pub async fn hand_over_errand(&self, errand: &Errand) -> Result<()> {
        let columns = vec![
            ("id", val(errand.key.as_str())),
            ("reply_to", val(errand.reply_to.as_str())),
            ("work", val(json(&errand.work))),
            ("status", val("queued")),
            ("attempts", val(0_i64)),
            ("delivered", val(false)),
            ("handed_ms", self.db.now_ms()),
        ];
        self.db.execute(&insert_new("errands", columns)).await?;
        Ok(())
    }

    /// Takes the oldest errand that nobody does, or whose lease ran out. One that was begun too often ends as failed.
    pub async fn claim_errand(&self, lease: Duration) -> Result<Option<ClaimedErrand>> {
        let mut tx = self.db.begin().await?;
        loop {
            let now = tx.now_ms();
            let query = Query::select()
                .column(Asterisk)
                .from("errands")
                .and_where(
                    Expr::col("status").eq("queued").or(Expr::col("status")
                        .eq("running")
                        .and(Expr::col("lease_ms").lte(now.clone()))),
                )
                .order_by("handed_ms", Order::Asc)
                .order_by("id", Order::Asc)
                .limit(1)
                .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked)
                .take();
            let Some(row) = tx.fetch_optional(&query).await? else {
                tx.commit().await?;
                return Ok(None);
            };
            let key = row.text("id")?;
            let attempts = row.int("attempts")? + 1;
            if attempts > MAX_ERRAND_ATTEMPTS {
                let failure = Failure::new(
                    "errand_lost",
                    format!(
                        "the errand {key} was begun {MAX_ERRAND_ATTEMPTS} times and never ended; look into the log of `artel up` for what took it down"
                    ),
                )
                .actor(ports::Actor::Admin);
                let given_up = Query::update()
                    .table("errands")
                    .value("status", "done")
                    .value("outcome", json(&ErrandOutcome::Failed(failure)))
                    .value("ended_ms", now)
                    .value("lease_token", None::<String>)
                    .and_where(of(&key))
                    .take();
                tx.execute(&given_up).await?;
                continue;
            }
            let token = Uuid::new_v4().simple().to_string();
            let claim = Query::update()
                .table("errands")
                .value("status", "running")
                .value("attempts", attempts)
                .value("lease_ms", now.add(ms(lease)))
                .value("lease_token", token.as_str())
                .and_where(of(&key))
                .take();
            tx.execute(&claim).await?;
            let errand = Errand {
                reply_to: row.text("reply_to")?,
                work: row.json("work")?,
                key,
            };
            tx.commit().await?;
            return Ok(Some(ClaimedErrand {
                errand,
                token,
                attempt: u32::try_from(attempts).unwrap_or(u32::MAX),
            }));
        }
    }

    /// Keeps a lease for longer. `false`: the errand was taken back, or somebody else has it; stop working on it.
    pub async fn renew_errand(&self, key: &str, token: &str, lease: Duration) -> Result<bool> {
        let renew = Query::update()
            .table("errands")
            .value("lease_ms", self.db.now_ms().add(ms(lease)))
            .and_where(of(key))
            .and_where(Expr::col("status").eq("running"))
            .and_where(Expr::col("lease_token").eq(token))
            .take();
        Ok(self.db.execute(&renew).await? == 1)
    }

    /// Gives an errand back undone, as a process does that ends in order; the try is not counted.
    pub async fn give_back_errand(&self, key: &str, token: &str) -> Result<()> {
        let give_back = Query::update()
            .table("errands")
            .value("status", "queued")
            .value("attempts", Expr::col("attempts").sub(1_i64))
            .value("lease_ms", None::<i64>)
            .value("lease_token", None::<String>)
            .and_where(of(key))
            .and_where(Expr::col("status").eq("running"))
            .and_where(Expr::col("lease_token").eq(token))
            .take();
        self.db.execute(&give_back).await?;
        Ok(())
    }

    /// Records an outcome, if the errand is still ours.
    pub async fn finish_errand(
        &self,
        key: &str,
        token: &str,
        outcome: &ErrandOutcome,
    ) -> Result<Finished> {
        let finish = Query::update()
            .table("errands")
            .value("status", "done")
            .value("outcome", json(outcome))
            .value("ended_ms", self.db.now_ms())
            .value("lease_token", None::<String>)
            .and_where(of(key))
            .and_where(Expr::col("status").eq("running"))
            .and_where(Expr::col("lease_token").eq(token))
            .take();
        Ok(match self.db.execute(&finish).await? {
            0 => Finished::Refused,
            _ => Finished::Recorded,
        })
    }

    /// Takes an errand back; one that ended stays as it is. Whoever does it learns of it from [`Store::renew_errand`].
    pub async fn cancel_errand(&self, key: &str) -> Result<()> {
        let cancel = Query::update()
            .table("errands")
            .value("status", "cancelled")
            .value("outcome", json(&ErrandOutcome::Cancelled))
            .value("ended_ms", self.db.now_ms())
            .value("lease_token", None::<String>)
            .and_where(of(key))
            .and_where(Expr::col("status").is_in(["queued", "running"]))
            .take();
        self.db.execute(&cancel).await?;
        Ok(())
    }

    /// Where an errand stands.
    pub async fn errand_status(&self, key: &str) -> Result<Option<ErrandStatus>> {
        let query = Query::select()
            .column("status")
            .from("errands")
            .and_where(of(key))
            .take();
        let Some(row) = self.db.fetch_optional(&query).await? else {
            return Ok(None);
        };
        Ok(Some(match row.text("status")?.as_str() {
            "queued" => ErrandStatus::Queued,
            "running" => ErrandStatus::Running,
            "cancelled" => ErrandStatus::Cancelled,
            _ => ErrandStatus::Done,
        }))
    }

    /// Outcomes that are not delivered yet, oldest first, at most `limit`.
    pub async fn undelivered_errands(&self, limit: u64) -> Result<Vec<ErrandReply>> {
        let query = Query::select()
            .columns(["id", "reply_to", "outcome"])
            .from("errands")
            .and_where(Expr::col("delivered").eq(false))
            .and_where(Expr::col("status").is_in(["done", "cancelled"]))
            .order_by("ended_ms", Order::Asc)
            .order_by("id", Order::Asc)
            .limit(limit)
            .take();
        self.db
            .read(&query, |row| {
                Ok(ErrandReply {
                    key: row.text("id")?,
                    reply_to: row.text("reply_to")?,
                    outcome: row.json("outcome")?,
                })
            })
            .await
    }

    /// The outcome became a signal.
    pub async fn errand_delivered(&self, key: &str) -> Result<()> {
        let delivered = Query::update()
            .table("errands")
            .value("delivered", true)
            .and_where(of(key))
            .take();
        self.db.execute(&delivered).await?;
        Ok(())
    }
}
