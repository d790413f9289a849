//! Delivering what the crew says. The intents are a projection of the journal; what is kept here is what became of each in
//! each chat, so that a rebuild of the projections sends nothing again.
//!
//! A delivery is handed out under a lease, one at a time for each chat, so that messages keep their order. A process that
//! dies with one in hand leaves it to the next after the lease: this is the one place where a message can come twice.

use std::time::Duration;

use jiff::Timestamp;
use ports::{Audience, JobId, NoticeSeverity, ProjectId, WaitId};
use sea_query::{Asterisk, Expr, ExprTrait as _, JoinType, OnConflict, Order, Query};

use crate::db::{insert, int, val};
use crate::projector::watermark;
use crate::{Error, Result, Row, Store, Tx, WaitRow};

/// How long a sender has for one message before somebody else may send it.
const LEASE: Duration = Duration::from_mins(1);

/// How long a progress message is left as it is after an edit.
pub const PROGRESS_PACE: Duration = Duration::from_millis(1500);

/// What kind of message an intent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntentKind {
    /// An answer to what somebody said.
    Reply,
    /// Something that happened.
    News,
    /// The end of a job.
    Result,
    /// The crew could not do what a message asked for.
    Trouble,
    /// A question with its choices; once closed, it is shown without them.
    Question,
    /// A job's progress: one message that is edited in place.
    Progress,
    /// A notice to admins; repetitions are counted on the same message.
    Notice,
}

impl IntentKind {
    fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "reply" => Self::Reply,
            "news" => Self::News,
            "result" => Self::Result,
            "trouble" => Self::Trouble,
            "question" => Self::Question,
            "progress" => Self::Progress,
            "notice" => Self::Notice,
            other => {
                return Err(Error::Unreadable {
                    column: "kind",
                    value: other.to_owned(),
                });
            }
        })
    }
}

/// Something to send, or to edit, in one chat.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivery {
    /// The intent's key.
    pub intent: String,
    /// The front end.
    pub front: String,
    /// The chat.
    pub chat: String,
    /// The revision that is to be shown.
    pub revision: i64,
    /// The message to edit; `None`: send a new one.
    pub message_id: Option<String>,
    /// Tries so far.
    pub attempts: u32,
    /// The project.
    pub project: ProjectId,
    /// The job, when it is about one.
    pub job: Option<JobId>,
    /// Who it is for.
    pub audience: Audience,
    /// What kind of message.
    pub kind: IntentKind,
    /// The text, as Markdown.
    pub text: String,
    /// The wait of a question, with its choices and, once closed, its answer.
    pub wait: Option<WaitRow>,
    /// How pressing a notice is.
    pub severity: Option<NoticeSeverity>,
    /// How often a notice came.
    pub times: u64,
    /// When it was said first.
    pub at: Timestamp,
}

impl Store {
    /// What a front end is to send now: at most one delivery for each chat, and at most `limit`. Each one is the caller's
    /// for a minute, and ends with [`Store::delivery_sent`], [`Store::retry_delivery`] or [`Store::delivery_failed`].
    ///
    /// Nothing is handed out for a chat that has to be left alone for a while, nor while projections are being rebuilt.
    pub async fn next_deliveries(&self, front: &str, limit: usize) -> Result<Vec<Delivery>> {
        let mut tx = self.db.begin().await?;
        let (everything_to, settled) = watermark(&mut tx).await?;
        if !settled {
            return Ok(Vec::new());
        }
        let rows = due(&mut tx, front, limit).await?;
        if rows.is_empty() {
            advance(&mut tx, front, everything_to).await?;
            tx.commit().await?;
            return Ok(Vec::new());
        }
        let mut chats: Vec<String> = Vec::new();
        let mut deliveries = Vec::new();
        for row in &rows {
            let chat = row.text("chat")?;
            if chats.contains(&chat) || deliveries.len() >= limit {
                continue;
            }
            let revision = row.int("revision")?;
            if claim(&mut tx, &row.text("id")?, revision, front, &chat).await? {
                deliveries.push(read(&mut tx, front, row).await?);
            }
            chats.push(chat);
        }
        tx.commit().await?;
        Ok(deliveries)
    }

    /// It was sent, or edited: `message_id` is the message that shows it.
    pub async fn delivery_sent(&self, delivery: &Delivery, message_id: &str) -> Result<()> {
        let sent = Query::update()
            .table("deliveries")
            .value("status", "sent")
            .value("revision", delivery.revision)
            .value("message_id", message_id)
            .value("attempts", Expr::col("attempts").add(1_i64))
            .value("next_try_ms", None::<i64>)
            .value("lease_ms", None::<i64>)
            .value("last_error", None::<String>)
            .value("sent_ms", self.db.now_ms())
            .and_where(of(delivery))
            .and_where(Expr::col("revision").lte(delivery.revision))
            .take();
        self.db.execute(&sent).await?;
        Ok(())
    }

    /// A part of it was sent: `message_id` names the messages that show it so far, and the caller has another minute for the
    /// rest. Whoever takes the delivery next finds them in [`Delivery::message_id`].
    pub async fn delivery_progress(&self, delivery: &Delivery, message_id: &str) -> Result<()> {
        let progress = Query::update()
            .table("deliveries")
            .value("message_id", message_id)
            .value("lease_ms", self.db.now_ms().add(int(LEASE.as_millis())))
            .and_where(of(delivery))
            .and_where(Expr::col("revision").lt(delivery.revision))
            .take();
        self.db.execute(&progress).await?;
        Ok(())
    }

    /// It could not be sent now. The whole chat is left alone until then, so that nothing overtakes it.
    pub async fn retry_delivery(
        &self,
        delivery: &Delivery,
        after: Duration,
        error: &str,
    ) -> Result<()> {
        let later = Query::update()
            .table("deliveries")
            .value("status", "retry")
            .value("attempts", Expr::col("attempts").add(1_i64))
            .value("next_try_ms", self.db.now_ms().add(int(after.as_millis())))
            .value("lease_ms", None::<i64>)
            .value("last_error", error)
            .and_where(of(delivery))
            .take();
        self.db.execute(&later).await?;
        Ok(())
    }

    /// It will never be sent, such as to a chat that blocked us. A later revision of the same intent is tried again.
    pub async fn delivery_failed(&self, delivery: &Delivery, error: &str) -> Result<()> {
        let failed = Query::update()
            .table("deliveries")
            .value("status", "failed")
            .value("revision", delivery.revision)
            .value("attempts", Expr::col("attempts").add(1_i64))
            .value("next_try_ms", None::<i64>)
            .value("lease_ms", None::<i64>)
            .value("last_error", error)
            .and_where(of(delivery))
            .take();
        self.db.execute(&failed).await?;
        Ok(())
    }

    /// The message that shows a wait in a chat, if it was sent there.
    pub async fn message_of_wait(
        &self,
        front: &str,
        chat: &str,
        wait: &WaitId,
    ) -> Result<Option<String>> {
        let query = Query::select()
            .column("message_id")
            .from("deliveries")
            .and_where(Expr::col("intent").eq(format!("wait:{wait}")))
            .and_where(Expr::col("front").eq(front))
            .and_where(Expr::col("chat").eq(chat))
            .take();
        match self.db.fetch_optional(&query).await? {
            Some(row) => row.opt_text("message_id"),
            None => Ok(None),
        }
    }
}

fn of(delivery: &Delivery) -> Expr {
    Expr::col("intent")
        .eq(delivery.intent.as_str())
        .and(Expr::col("front").eq(delivery.front.as_str()))
        .and(Expr::col("chat").eq(delivery.chat.as_str()))
}

/// Whether the chat has not seen the newest revision of intent `i`, as its delivery `d` says.
fn unseen() -> Expr {
    Expr::col(("d", "revision"))
        .is_null()
        .or(Expr::col(("d", "revision")).lt(Expr::col(("i", "revision"))))
}

/// A question that was closed before anybody saw it is not asked.
fn worth_sending() -> Expr {
    Expr::col(("i", "closed"))
        .eq(false)
        .or(Expr::col(("d", "message_id")).is_not_null())
}

/// Intents whose newest revision a chat has not seen, in the order in which they were said.
async fn due(tx: &mut Tx, front: &str, limit: usize) -> Result<Vec<Row>> {
    let now = tx.now_ms();
    // Progress is only worth its newest state, and servers count edits.
    let not_too_soon = Expr::col(("i", "kind"))
        .ne("progress")
        .or(Expr::col(("d", "sent_ms")).is_null())
        .or(Expr::col(("d", "sent_ms")).lte(now.clone().sub(int(PROGRESS_PACE.as_millis()))));
    let held = Query::select()
        .expr(Expr::val(1_i64))
        .from_as("deliveries", "h")
        .and_where(Expr::col(("h", "front")).equals(("c", "front")))
        .and_where(Expr::col(("h", "chat")).equals(("c", "chat")))
        .and_where(
            Expr::col(("h", "next_try_ms"))
                .gt(now.clone())
                .or(Expr::col(("h", "lease_ms")).gt(now)),
        )
        .take();
    let for_them = Expr::col(("i", "audience"))
        .eq("owner")
        .and(Expr::col(("i", "revision")).gt(Expr::col(("s", "since"))));
    let for_admins = Expr::col(("i", "audience"))
        .eq("admins")
        .and(Expr::col(("c", "admin")).eq(true))
        .and(Expr::col(("i", "revision")).gt(Expr::col(("c", "admin_since"))));
    let query = Query::select()
        .column(("i", Asterisk))
        .column(("c", "chat"))
        .column(("d", "message_id"))
        .expr_as(Expr::col(("d", "attempts")).if_null(0_i64), "attempts")
        .from_as("outbox_intents", "i")
        .join_as(
            JoinType::InnerJoin,
            "chats",
            "c",
            Expr::col(("c", "front")).eq(front),
        )
        .join_as(
            JoinType::LeftJoin,
            "chat_projects",
            "s",
            Expr::col(("s", "front"))
                .equals(("c", "front"))
                .and(Expr::col(("s", "chat")).equals(("c", "chat")))
                .and(Expr::col(("s", "project")).equals(("i", "project"))),
        )
        .join_as(
            JoinType::LeftJoin,
            "deliveries",
            "d",
            Expr::col(("d", "intent"))
                .equals(("i", "id"))
                .and(Expr::col(("d", "front")).equals(("c", "front")))
                .and(Expr::col(("d", "chat")).equals(("c", "chat"))),
        )
        .and_where(for_them.or(for_admins))
        .and_where(unseen())
        .and_where(worth_sending())
        .and_where(not_too_soon)
        .and_where(Expr::exists(held).not())
        .order_by(("i", "seq"), Order::Asc)
        .limit(
            limit
                .saturating_mul(20)
                .max(20)
                .try_into()
                .unwrap_or(u64::MAX),
        )
        .take();
    tx.fetch_all(&query).await
}

/// Nothing is due: what chats have seen by now need not be looked through again.
///
/// Whether a chat has seen everything is asked in the very statement that moves it on, because other senders are at work
/// meanwhile. What somebody is sending right now counts as unseen, so that a question closed at this moment is retired.
async fn advance(tx: &mut Tx, front: &str, everything_to: i64) -> Result<()> {
    let now = tx.now_ms();
    let unseen = |chat: &'static str, since: &'static str, audience: &'static str| {
        let in_hand = Expr::col(("d", "lease_ms")).gt(now.clone());
        Query::select()
            .expr(Expr::val(1_i64))
            .from_as("outbox_intents", "i")
            .join_as(
                JoinType::LeftJoin,
                "deliveries",
                "d",
                Expr::col(("d", "intent"))
                    .equals(("i", "id"))
                    .and(Expr::col(("d", "front")).equals((chat, "front")))
                    .and(Expr::col(("d", "chat")).equals((chat, "chat"))),
            )
            .and_where(Expr::col(("i", "audience")).eq(audience))
            .and_where(Expr::col(("i", "revision")).gt(Expr::col((chat, since))))
            .and_where(unseen())
            .and_where(worth_sending().or(in_hand))
            .take()
    };
    let mut of_project = unseen("chat_projects", "since", "owner");
    of_project.and_where(Expr::col(("i", "project")).equals(("chat_projects", "project")));
    let subscriptions = Query::update()
        .table("chat_projects")
        .value("since", everything_to)
        .and_where(Expr::col("front").eq(front))
        .and_where(Expr::col("since").lt(everything_to))
        .and_where(Expr::exists(of_project).not())
        .take();
    tx.execute(&subscriptions).await?;
    let admins = Query::update()
        .table("chats")
        .value("admin_since", everything_to)
        .and_where(Expr::col("front").eq(front))
        .and_where(Expr::col("admin").eq(true))
        .and_where(Expr::col("admin_since").lt(everything_to))
        .and_where(Expr::exists(unseen("chats", "admin_since", "admins")).not())
        .take();
    tx.execute(&admins).await?;
    Ok(())
}

/// Takes a delivery, unless another process has it, has sent it, or was told to wait, since we looked.
async fn claim(tx: &mut Tx, intent: &str, revision: i64, front: &str, chat: &str) -> Result<bool> {
    let now = tx.now_ms();
    let until = now.clone().add(int(LEASE.as_millis()));
    let columns = vec![
        ("intent", val(intent)),
        ("front", val(front)),
        ("chat", val(chat)),
        ("revision", val(0_i64)),
        ("status", val("sending")),
        ("attempts", val(0_i64)),
        ("lease_ms", until),
    ];
    let over = |column: &'static str| {
        Expr::col(("deliveries", column))
            .is_null()
            .or(Expr::col(("deliveries", column)).lte(now.clone()))
    };
    let statement = insert("deliveries", columns)
        .on_conflict(
            OnConflict::columns(["intent", "front", "chat"])
                .update_columns(["status", "lease_ms"])
                .action_and_where(Expr::col(("deliveries", "revision")).lt(revision))
                .action_and_where(over("lease_ms"))
                .action_and_where(over("next_try_ms"))
                .to_owned(),
        )
        .take();
    Ok(tx.execute(&statement).await? == 1)
}

async fn read(tx: &mut Tx, front: &str, row: &Row) -> Result<Delivery> {
    let wait = match row.opt_text("wait")? {
        Some(id) => {
            let query = Query::select()
                .column(Asterisk)
                .from("waits")
                .and_where(Expr::col("id").eq(id))
                .take();
            tx.fetch_optional(&query)
                .await?
                .as_ref()
                .map(WaitRow::read)
                .transpose()?
        }
        None => None,
    };
    let severity = match row.opt_text("severity")? {
        Some(_) => Some(row.word("severity")?),
        None => None,
    };
    Ok(Delivery {
        intent: row.text("id")?,
        front: front.to_owned(),
        chat: row.text("chat")?,
        revision: row.int("revision")?,
        message_id: row.opt_text("message_id")?,
        attempts: u32::try_from(row.count("attempts")?).unwrap_or(u32::MAX),
        project: ProjectId::new(row.text("project")?),
        job: row.opt_text("job")?.map(JobId::new),
        audience: row.word("audience")?,
        kind: IntentKind::parse(&row.text("kind")?)?,
        text: row.text("body")?,
        wait,
        severity,
        times: row.count("times")?,
        at: row.time("first_ms")?,
    })
}
