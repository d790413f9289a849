//! One turn of a conversation: what brainstorm works with. Says things, keeps them, asks people and takes questions back.

use graph::{Context, NodeError};
use ports::{Event, NoticeSeverity, OpenWait, Role, SaidKind, StatusReport};
use serde_json::json;

use crate::{
    Crew, Scope,
    architect::pretty,
    conversation::{About, Conversation, Line, Open},
    person, prompts,
};

/// How much of the talk stands in a prompt, in bytes.
const PROMPT_TALK_BYTES: usize = 96 * 1024;
/// How much of the record stands in a prompt, in bytes.
const PROMPT_RECORD_BYTES: usize = 16 * 1024;

/// One turn of a conversation.
pub(crate) struct Talk<'a> {
    /// Who takes it.
    pub(crate) crew: &'a Crew,
    /// Where.
    pub(crate) ctx: &'a Context,
    /// The state as it becomes.
    pub(crate) now: Conversation,
    /// The lines that it added.
    pub(crate) said: Vec<Line>,
    /// What makes this turn's replies unique.
    pub(crate) key: String,
    /// How much was said in it.
    pub(crate) replies: u32,
}

impl Talk<'_> {
    pub(crate) fn scope(&self) -> &Scope {
        &self.now.scope
    }

    /// Says once that there is a project.
    pub(crate) fn found(&mut self) -> Result<(), NodeError> {
        if self.now.founded {
            return Ok(());
        }
        self.now.founded = true;
        if let Some(owner) = self.now.owner.clone() {
            self.scope()
                .tell(self.ctx, Event::ProjectFounded { owner })?;
        }
        Ok(())
    }

    pub(crate) fn say(&mut self, kind: SaidKind, text: impl Into<String>) -> Result<(), NodeError> {
        let text = self.crew.vault.redact(&text.into());
        self.replies += 1;
        let key = format!("{}#{}", self.key, self.replies);
        self.scope().say(self.ctx, kind, key, text.clone())?;
        self.heard("crew", text);
        Ok(())
    }

    pub(crate) fn reply(&mut self, text: impl Into<String>) -> Result<(), NodeError> {
        self.say(SaidKind::Reply, text)
    }

    /// Keeps a line of the talk.
    pub(crate) fn heard(&mut self, who: &str, text: String) {
        self.said.push(Line {
            who: who.to_owned(),
            text,
        });
    }

    /// A signal that no front end of ours has written.
    pub(crate) fn unreadable(
        &self,
        kind: &str,
        error: &serde_json::Error,
    ) -> Result<(), NodeError> {
        self.scope().notify(
            self.ctx,
            NoticeSeverity::Warning,
            format!("signal.{kind}"),
            format!("A signal of kind `{kind}` to project {} could not be read and was passed over: {error}", self.scope().project),
        )
    }

    /// What the record knows; a record that cannot be read is no reason to be silent.
    pub(crate) async fn record(&self) -> Result<Option<StatusReport>, NodeError> {
        let outcome = self
            .ctx
            .step("record", |_| async {
                Ok::<_, NodeError>(self.crew.record.status(&self.scope().project).await)
            })
            .await?;
        Ok(outcome.unwrap_or_else(|failure| {
            tracing::warn!(project = %self.scope().project, %failure, "the record cannot be read");
            None
        }))
    }

    pub(crate) fn prompt(
        &self,
        record: Option<&StatusReport>,
        must_propose: bool,
    ) -> Result<String, NodeError> {
        let proposal = match (&self.now.open, &self.now.draft) {
            (
                Some(Open {
                    about: About::Proposal { proposal },
                    ..
                }),
                _,
            )
            | (_, Some(proposal)) => Some(pretty(proposal)),
            _ => None,
        };
        let record = record.map(|report| {
            let text = pretty(report);
            text[..text.floor_char_boundary(PROMPT_RECORD_BYTES.min(text.len()))].to_owned()
        });
        let running = self
            .now
            .running
            .as_ref()
            .map(|running| format!("{} ({})", running.job, running.work.title()));
        let mut bytes = 0;
        let all: Vec<&Line> = self.now.lines.iter().chain(&self.said).collect();
        let fits = all
            .iter()
            .rev()
            .take_while(|line| {
                bytes += line.text.len();
                bytes <= PROMPT_TALK_BYTES
            })
            .count();
        prompts::render(
            Role::Brainstorm.as_str(),
            "turn",
            json!({
                "spec": self.now.spec.as_ref().map(pretty),
                "proposal": proposal,
                "running": running,
                "record": record,
                "lines": all[all.len() - fits..],
                "must_propose": must_propose,
            }),
        )
    }

    /// Asks a person, and goes on listening.
    pub(crate) fn open(
        &mut self,
        mut wait: OpenWait,
        about: About,
        yes: bool,
    ) -> Result<(), NodeError> {
        self.withdraw()?;
        self.now.asked += 1;
        wait.id = person::wait_id(self.ctx, self.now.asked);
        wait.question = self.crew.vault.redact(&wait.question);
        person::open(self.ctx, self.scope(), &wait)?;
        self.heard("crew", wait.question.clone());
        self.now.open = Some(Open { wait, about, yes });
        Ok(())
    }

    /// Takes an open question back: something newer takes its place.
    pub(crate) fn withdraw(&mut self) -> Result<(), NodeError> {
        if let Some(open) = self.now.open.take() {
            person::close(self.ctx, self.scope(), &open.wait.id, None, None)?;
        }
        Ok(())
    }

    pub(crate) fn close(
        &mut self,
        open: &Open,
        answer: Option<String>,
        by: &str,
    ) -> Result<(), NodeError> {
        self.now.open = None;
        let by = Some(by.to_owned()).filter(|by| !by.is_empty());
        person::close(self.ctx, self.scope(), &open.wait.id, answer, by)
    }
}
