//! Where people talk: chats of any front end, what each talks about at the moment, and which of them are for admins.

use ports::{PersonId, ProjectId};
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query};

use crate::db::{insert_new, val};
use crate::projector::watermark;
use crate::{Result, Row, Store, Tx};

/// A chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatRow {
    /// The front end, such as `telegram`.
    pub front: String,
    /// Its id there.
    pub chat: String,
    /// Who talks there, when it is one person's.
    pub person: Option<PersonId>,
    /// The project that a plain message goes to.
    pub project: Option<ProjectId>,
    /// Whether notices to admins go there.
    pub admin: bool,
}

fn read(row: &Row) -> Result<ChatRow> {
    Ok(ChatRow {
        front: row.text("front")?,
        chat: row.text("chat")?,
        person: row.opt_text("person")?.map(PersonId::new),
        project: row.opt_text("project")?.map(ProjectId::new),
        admin: row.flag("admin")?,
    })
}

fn key(front: &str, chat: &str) -> Expr {
    Expr::col("front").eq(front).and(Expr::col("chat").eq(chat))
}

async fn ensure(tx: &mut Tx, front: &str, chat: &str) -> Result<()> {
    let columns = vec![
        ("front", val(front)),
        ("chat", val(chat)),
        ("admin", val(false)),
        ("admin_since", val(0_i64)),
    ];
    tx.execute(&insert_new("chats", columns)).await?;
    Ok(())
}

impl Store {
    /// A chat, if anybody ever talked there.
    pub async fn chat(&self, front: &str, chat: &str) -> Result<Option<ChatRow>> {
        let query = Query::select()
            .column(Asterisk)
            .from("chats")
            .and_where(key(front, chat))
            .take();
        self.db
            .fetch_optional(&query)
            .await?
            .as_ref()
            .map(read)
            .transpose()
    }

    /// Remembers a chat and who talks there.
    pub async fn remember_chat(
        &self,
        front: &str,
        chat: &str,
        person: Option<&PersonId>,
    ) -> Result<()> {
        let mut tx = self.db.begin().await?;
        ensure(&mut tx, front, chat).await?;
        if let Some(person) = person {
            let update = Query::update()
                .table("chats")
                .value("person", person.as_str())
                .and_where(key(front, chat))
                .take();
            tx.execute(&update).await?;
        }
        tx.commit().await
    }

    /// What a chat talks about from now on. From its first time on, the chat hears everything that is said about that
    /// project, also while it talks about another one.
    ///
    /// Call it *before* the message is handed to the project, so that the answer finds its way.
    pub async fn set_current_project(
        &self,
        front: &str,
        chat: &str,
        project: Option<&ProjectId>,
    ) -> Result<()> {
        let mut tx = self.db.begin().await?;
        ensure(&mut tx, front, chat).await?;
        let update = Query::update()
            .table("chats")
            .value("project", project.map(ToString::to_string))
            .and_where(key(front, chat))
            .take();
        tx.execute(&update).await?;
        if let Some(project) = project {
            let (since, _) = watermark(&mut tx).await?;
            let columns = vec![
                ("front", val(front)),
                ("chat", val(chat)),
                ("project", val(project.as_str())),
                ("since", val(since)),
            ];
            tx.execute(&insert_new("chat_projects", columns)).await?;
        }
        tx.commit().await
    }

    /// The projects that a chat hears of.
    pub async fn chat_projects(&self, front: &str, chat: &str) -> Result<Vec<ProjectId>> {
        let query = Query::select()
            .column("project")
            .from("chat_projects")
            .and_where(key(front, chat))
            .order_by("project", Order::Asc)
            .take();
        let rows = self.db.fetch_all(&query).await?;
        rows.iter()
            .map(|row| Ok(ProjectId::new(row.text("project")?)))
            .collect()
    }

    /// The chats of a front end that are for admins, and no others. A chat that becomes one hears what happens from then on.
    pub async fn set_admin_chats(&self, front: &str, chats: &[String]) -> Result<()> {
        let mut tx = self.db.begin().await?;
        let (since, _) = watermark(&mut tx).await?;
        for chat in chats {
            ensure(&mut tx, front, chat).await?;
        }
        let of_front = || Expr::col("front").eq(front);
        let chosen = || Expr::col("chat").is_in(chats.iter().map(String::as_str));
        let others = Query::update()
            .table("chats")
            .value("admin", false)
            .and_where(of_front())
            .and_where(chosen().not())
            .take();
        tx.execute(&others).await?;
        let new = Query::update()
            .table("chats")
            .value("admin", true)
            .value("admin_since", since)
            .and_where(of_front())
            .and_where(chosen())
            .and_where(Expr::col("admin").eq(false))
            .take();
        tx.execute(&new).await?;
        tx.commit().await
    }
}
