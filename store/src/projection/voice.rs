//! What was said and what is to be said: the tables of messages and of the outbox's intents. An intent is a fact of the
//! journal; whether it was delivered is kept apart (see `outbox`).

use jiff::SignedDuration;
use ports::{Audience, NoticeSeverity, OpenWait, PersonId, ProjectId, Recorded, SaidKind};
use sea_query::{Expr, ExprTrait as _, Order, Query};

use super::{Fold, update};
use crate::Result;
use crate::db::{insert_new, int, upsert, val, word};

/// Notices that are the same are one message with a count for this long; then a new message calls again.
const FOLDING: SignedDuration = SignedDuration::from_hours(24);

/// A new intent, or a new revision of one.
pub(super) struct Intent<'a> {
    pub(super) id: &'a str,
    pub(super) project: &'a str,
    pub(super) job: Option<String>,
    pub(super) audience: Audience,
    pub(super) kind: &'a str,
    pub(super) body: &'a str,
    pub(super) wait: Option<&'a str>,
    pub(super) notice: Option<(NoticeSeverity, &'a str)>,
}

impl Intent<'_> {
    /// Writes it, if it is not there: one intent, one message. Says whether it is new.
    pub(super) async fn write(&self, fold: &mut Fold<'_>) -> Result<bool> {
        let statement = insert_new("outbox_intents", self.columns(fold));
        Ok(fold.tx.execute(&statement).await? == 1)
    }

    fn columns(&self, fold: &Fold<'_>) -> crate::db::Columns {
        vec![
            ("id", val(self.id)),
            ("seq", val(fold.seq)),
            ("revision", val(fold.seq)),
            ("project", val(self.project)),
            ("job", val(self.job.clone())),
            ("audience", val(word(&self.audience))),
            ("kind", val(self.kind)),
            ("body", val(self.body)),
            ("wait", val(self.wait)),
            ("severity", val(self.notice.map(|(s, _)| word(&s)))),
            ("fingerprint", val(self.notice.map(|(_, f)| f))),
            ("times", int(1)),
            ("closed", val(false)),
            ("first_ms", val(fold.at_ms)),
            ("last_ms", val(fold.at_ms)),
        ]
    }
}

async fn message(
    fold: &mut Fold<'_>,
    project: &str,
    kind: &str,
    author: Option<&str>,
    key: &str,
    body: &str,
) -> Result<()> {
    let columns = vec![
        ("seq", val(fold.seq)),
        ("project", val(project)),
        ("kind", val(kind)),
        ("author", val(author)),
        ("message_key", val(key)),
        ("body", val(body)),
        ("said_ms", val(fold.at_ms)),
    ];
    fold.tx.execute(&insert_new("messages", columns)).await?;
    Ok(())
}

pub(super) async fn heard(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    key: &str,
    from: &PersonId,
    text: &str,
) -> Result<()> {
    message(
        fold,
        project.as_str(),
        "message",
        Some(from.as_str()),
        key,
        text,
    )
    .await
}

pub(super) async fn said(
    fold: &mut Fold<'_>,
    recorded: &Recorded,
    key: &str,
    to: Audience,
    kind: SaidKind,
    text: &str,
) -> Result<()> {
    let project = recorded.project.as_str();
    let kind = word(&kind);
    let new = Intent {
        id: &format!("said:{project}:{key}"),
        project,
        job: recorded.job.as_ref().map(ToString::to_string),
        audience: to,
        kind: &kind,
        body: text,
        wait: None,
        notice: None,
    }
    .write(fold)
    .await?;
    if new && to == Audience::Owner {
        message(fold, project, &kind, None, key, text).await?;
    }
    Ok(())
}

fn of_wait(wait: &str) -> String {
    format!("wait:{wait}")
}

pub(super) async fn asked(fold: &mut Fold<'_>, recorded: &Recorded, wait: &OpenWait) -> Result<()> {
    let project = recorded.project.as_str();
    if wait.audience == Audience::Owner {
        let key = wait.id.as_str();
        message(fold, project, "question", None, key, &wait.question).await?;
    }
    let intent = Intent {
        id: &of_wait(wait.id.as_str()),
        project,
        job: recorded.job.as_ref().map(ToString::to_string),
        audience: wait.audience,
        kind: "question",
        body: &wait.question,
        wait: Some(wait.id.as_str()),
        notice: None,
    };
    // Asked again under the same id, it is open again.
    let statement = upsert("outbox_intents", &["id"], intent.columns(fold));
    fold.tx.execute(&statement).await?;
    Ok(())
}

/// The question is shown without its buttons from now on.
pub(super) async fn answered(
    fold: &mut Fold<'_>,
    project: &str,
    wait: &str,
    answer: Option<&str>,
    by: Option<&str>,
) -> Result<()> {
    if let Some(answer) = answer {
        message(fold, project, "answer", by, wait, answer).await?;
    }
    let columns = vec![
        ("closed", val(true)),
        ("revision", val(fold.seq)),
        ("last_ms", val(fold.at_ms)),
    ];
    let this = Expr::col("id").eq(of_wait(wait));
    fold.tx
        .execute(&update("outbox_intents", columns, this))
        .await?;
    Ok(())
}

/// A notice to admins; the same notice again within a day is counted on the message that stands.
pub(super) async fn notice(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    severity: NoticeSeverity,
    fingerprint: &str,
    text: &str,
) -> Result<()> {
    let query = Query::select()
        .columns(["id", "times", "first_ms"])
        .from("outbox_intents")
        .and_where(Expr::col("fingerprint").eq(fingerprint))
        .and_where(Expr::col("severity").eq(word(&severity)))
        .order_by("seq", Order::Desc)
        .limit(1)
        .take();
    let window = i64::try_from(FOLDING.as_millis()).unwrap_or(i64::MAX);
    if let Some(row) = fold.tx.fetch_optional(&query).await?
        && fold.at_ms - row.int("first_ms")? < window
    {
        let columns = vec![
            ("body", val(text)),
            ("times", val(row.int("times")? + 1)),
            ("revision", val(fold.seq)),
            ("last_ms", val(fold.at_ms)),
        ];
        let this = Expr::col("id").eq(row.text("id")?);
        fold.tx
            .execute(&update("outbox_intents", columns, this))
            .await?;
        return Ok(());
    }
    Intent {
        id: &format!("notice:{fingerprint}:{}", fold.seq),
        project: project.as_str(),
        job: None,
        audience: Audience::Admins,
        kind: "notice",
        body: text,
        wait: None,
        notice: Some((severity, fingerprint)),
    }
    .write(fold)
    .await?;
    Ok(())
}

/// Whatever thread failed, an admin hears of it.
pub(super) async fn thread_failed(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    thread: &str,
    error: &str,
) -> Result<()> {
    let text = format!(
        "The thread `{thread}` failed and stands still: {error}\nMend the cause, then `artel retry {project}` lets it go on from its last step."
    );
    let fingerprint = format!("thread.failed:{thread}");
    notice(fold, project, NoticeSeverity::Critical, &fingerprint, &text).await
}
