//! A conversation: lives as long as its project. One node, brainstorm, takes one thing out of the mailbox at a time (a
//! message, an answer, an order, a job's end) and goes on listening, so it always answers, also while a job runs.

use std::sync::Arc;

use graph::{Command, CompileError, CompiledGraph, Context, END, Graph, NodeError, START, State};
use ports::{ChangeRequest, JobId, JobKind, OpenWait, PersonId, ProjectId, ProjectSpec, Slug};
use serde::{Deserialize, Serialize};

use crate::{Crew, Scope, brainstorm, dispatch::Then, job::JobOutcome, signal};

/// The graph's name.
pub const GRAPH: &str = "conversation";

/// How many lines of the talk are kept.
const KEPT_LINES: usize = 40;
/// How much of the talk is kept, in bytes.
const KEPT_BYTES: usize = 256 * 1024;

/// The state of a conversation.
#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
pub struct Conversation {
    /// Which project.
    pub scope: Scope,
    /// Who founded it.
    pub owner: Option<PersonId>,
    /// Whether the journal knows that it was founded.
    pub founded: bool,
    /// The latest of what was said.
    #[channel(reduce = keep_latest)]
    pub lines: Vec<Line>,
    /// The project's short name.
    pub slug: Option<Slug>,
    /// The approved specification, with every change that was deployed.
    pub spec: Option<ProjectSpec>,
    /// What waits for a person here.
    pub open: Option<Open>,
    /// A proposal that is being changed, so that nothing waits for its approval.
    pub draft: Option<Proposal>,
    /// Questions that had buttons: every one has an id of its own.
    pub asked: u32,
    /// Rounds of clarifying questions since the last proposal.
    pub rounds: u32,
    /// Turns that brainstorm has taken; answers to questions take none.
    pub turns: u32,
    /// Turns that it has taken aside: on plain questions, and while a job ran.
    pub asides: u32,
    /// Jobs that were started.
    pub jobs: u32,
    /// The job that runs.
    pub running: Option<Running>,
    /// Approved work that waits for the running job.
    pub queue: Vec<Queued>,
    /// The last job that ended.
    pub last: Option<Finished>,
}

/// Something that was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// A person's id, or `crew`.
    pub who: String,
    /// What, redacted.
    pub text: String,
}

/// A wait for a person in a conversation, which goes on listening meanwhile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// What is asked.
    pub wait: OpenWait,
    /// What it is about.
    pub about: About,
    /// Whether what comes of it is approved beforehand.
    pub yes: bool,
}

/// What an open wait is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "about", rename_all = "snake_case")]
pub enum About {
    /// Clarifying questions.
    Clarify,
    /// The approval of a proposal.
    Proposal {
        /// The proposal.
        proposal: Proposal,
    },
    /// Money for going on with a message.
    Budget {
        /// The message.
        message: signal::Message,
    },
}

/// What is proposed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Proposal {
    /// A new project.
    Project {
        /// What it is to be.
        spec: ProjectSpec,
    },
    /// A change.
    Change {
        /// What is to change.
        change: ChangeRequest,
    },
}

/// A job that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// Its id, and its name as a child.
    pub job: JobId,
    /// What it is about.
    pub work: JobKind,
    /// Whether it was approved beforehand.
    pub yes: bool,
}

/// Approved work that waits for its turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Queued {
    /// What it is about.
    pub work: JobKind,
    /// Whether it was approved beforehand.
    pub yes: bool,
}

/// A job that ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// Its id.
    pub job: JobId,
    /// What it was about.
    pub work: JobKind,
    /// How it ended.
    pub outcome: JobOutcome,
}

/// What a conversation is started with.
pub fn found(project: ProjectId, owner: PersonId) -> ConversationUpdate {
    ConversationUpdate::default()
        .scope(Scope::project(project))
        .owner(Some(owner))
}

/// Keeps the latest lines, within a number and a size.
fn keep_latest(lines: &mut Vec<Line>, more: Vec<Line>) {
    lines.extend(more);
    let mut bytes = 0;
    let fits = lines
        .iter()
        .rev()
        .take(KEPT_LINES)
        .take_while(|line| {
            bytes += line.text.len();
            bytes <= KEPT_BYTES
        })
        .count();
    lines.drain(..lines.len() - fits);
}

impl Conversation {
    /// What changed since `before`, and what was said, as an update.
    pub(crate) fn since(self, before: &Self, said: Vec<Line>) -> ConversationUpdate {
        let mut update = ConversationUpdate::default();
        crate::changed!(update, before, self; scope, owner, founded, slug, spec, open, draft, asked, rounds, turns, asides, jobs,
            running, queue, last);
        if said.is_empty() {
            update
        } else {
            update.lines(said)
        }
    }
}

/// The wiring of a conversation.
pub(crate) fn graph(crew: &Crew) -> Result<CompiledGraph<Conversation>, CompileError> {
    let crew = crew.clone();
    Graph::<Conversation>::builder(GRAPH)
        .node_with(
            "brainstorm",
            crate::node_options(),
            move |before: Arc<Conversation>, ctx: Context| {
                let crew = crew.clone();
                async move { listen(&crew, &before, &ctx).await }
            },
        )
        .edge(START, "brainstorm")
        .goes("brainstorm", ["brainstorm", END])
        .output(|talk: &Conversation| serde_json::to_value(&talk.last).unwrap_or_default())
        .compile()
}

async fn listen(
    crew: &Crew,
    before: &Conversation,
    ctx: &Context,
) -> Result<Command<Conversation>, NodeError> {
    let (next, now, said) = brainstorm::work(crew, before, ctx).await?;
    let command = match next {
        Then::Listen => Command::goto("brainstorm"),
        Then::End => Command::end(),
    };
    Ok(command.update(now.since(before, said)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: String) -> Line {
        Line {
            who: "crew".into(),
            text,
        }
    }

    #[test]
    fn a_talk_stays_bounded() {
        let mut lines = Vec::new();
        for n in 0..100 {
            keep_latest(&mut lines, vec![line(n.to_string())]);
        }
        assert_eq!(lines.len(), KEPT_LINES);
        assert_eq!(lines[KEPT_LINES - 1].text, "99");
        keep_latest(
            &mut lines,
            vec![line("x".repeat(KEPT_BYTES)), line("y".into())],
        );
        assert_eq!(lines, vec![line("y".into())]);
    }
}
