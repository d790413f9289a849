//! A human: a wait with buttons. A node that is at its end puts a question on the thread's [`Desk`] and goes to the node
//! `person`, which asks, waits (for days, if need be) and leads back to the node that asked.
//!
//! All human waits of the crew work alike: the event `wait.opened` names the thread and, as its interrupt, the kind of the
//! signal that answers it; see [`signal::answer`]. What `yes` approves is never asked here: policies decide before.

use std::fmt::Write as _;

use graph::{Arrived, Context, NodeError, WaitFor};
use ports::{
    Actor, Answer, Audience, Choice, Event, Failure, OpenWait, PersonId, WaitId, WaitKind,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Crew, Policy, Scope, ask, signal};

/// The node's name in the graphs of jobs and tasks.
pub const NODE: &str = "person";

/// The choice that tries again.
pub const RETRY: &str = "retry";
/// The choice that gives up.
pub const GIVE_UP: &str = "give_up";
/// The choice that raises the budget and tries again.
pub const RAISE: &str = "raise";
/// The choice that merges against the reviewer's word.
pub const MERGE: &str = "merge";
/// The choice that says that a secret is there now.
pub const CHECK: &str = "check";
/// The choice that approves.
pub const APPROVE: &str = "approve";
/// The choice that asks for changes to a proposal.
pub const CHANGE: &str = "change";
/// The choice that drops a proposal.
pub const CANCEL: &str = "cancel";

/// How much evidence stands in a question, in bytes.
const EVIDENCE_BYTES: usize = 1500;

/// A question to a person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// What is asked.
    pub wait: OpenWait,
    /// The node that gets the reply.
    pub back: String,
    /// Why it is asked, when something went wrong.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// Kinds of signals that end the wait as well.
    #[serde(default)]
    pub also: Vec<String>,
}

/// What a person replied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The value of the choice.
    pub choice: Option<String>,
    /// What was typed, redacted.
    pub text: String,
    /// Who.
    pub by: String,
    /// Why it was asked.
    pub failure: Option<Failure>,
}

impl Reply {
    /// Whether this choice was made.
    pub fn is(&self, choice: &str) -> bool {
        self.choice.as_deref() == Some(choice)
    }

    /// What was typed instead of a choice: advice for the next attempt.
    pub fn advice(&self) -> Option<&str> {
        let text = self.text.trim();
        (self.choice.is_none() && !text.is_empty()).then_some(text)
    }
}

/// Where the questions of a thread lie.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Desk {
    /// How many questions there were: every one has an id of its own.
    pub asked: u32,
    /// The open question.
    pub question: Option<Question>,
    /// The reply to it, until the node that asked has taken it.
    pub reply: Option<Reply>,
}

impl Desk {
    /// Puts a question on the desk.
    pub(crate) fn ask(&mut self, ctx: &Context, back: &str, mut wait: OpenWait) -> &mut Question {
        self.asked += 1;
        wait.id = wait_id(ctx, self.asked);
        self.reply = None;
        self.question.insert(Question {
            wait,
            back: back.to_owned(),
            failure: None,
            also: Vec::new(),
        })
    }

    /// Puts a failure on the desk that the crew cannot mend by itself: about money to the owner, about the installation to
    /// its admins, everything else to the owner.
    pub(crate) fn trouble(
        &mut self,
        crew: &Crew,
        ctx: &Context,
        policy: &Policy,
        back: &str,
        title: &str,
        failure: Failure,
    ) {
        let budget = is_budget(&failure);
        let mut question = format!("**{title}**\n\n{}", sentence(&failure.message));
        let evidence = failure.evidence.trim();
        if !evidence.is_empty() {
            let cut = &evidence
                [evidence.ceil_char_boundary(evidence.len().saturating_sub(EVIDENCE_BYTES))..];
            let _ = write!(question, "\n\n```\n{}\n```", cut.replace("```", "'''"));
        }
        let again = if budget {
            Choice::new(
                RAISE,
                &format!(
                    "Raise it by {:.2} USD and {} tokens",
                    policy.budget_raise_usd, policy.budget_raise_tokens
                ),
            )
        } else {
            Choice::new(RETRY, "Try again")
        };
        let wait = OpenWait {
            id: WaitId::new(""),
            kind: if budget {
                WaitKind::Budget
            } else {
                WaitKind::Help
            },
            question: crew.vault.redact(&question),
            options: vec![again, Choice::new(GIVE_UP, "Give up")],
            free_text: !budget,
            audience: match failure.actor {
                Actor::Admin => Audience::Admins,
                Actor::Crew | Actor::Owner => Audience::Owner,
            },
        };
        let question = self.ask(ctx, back, wait);
        question.also.push(signal::RETRY.to_owned());
        question.failure = Some(failure);
    }

    /// Takes the reply, if there is one.
    pub(crate) fn take(&mut self) -> Option<Reply> {
        self.reply.take()
    }

    /// Closes the open question unanswered, because the thread is being cancelled.
    pub(crate) fn withdraw(&mut self, ctx: &Context, scope: &Scope) -> Result<(), NodeError> {
        if let Some(question) = self.question.take() {
            close(ctx, scope, &question.wait.id, None, None)?;
        }
        Ok(())
    }
}

/// Whether a failure is about money: then the owner is asked to raise the budget.
pub(crate) fn is_budget(failure: &Failure) -> bool {
    failure.kind == "budget" || failure.kind.starts_with("budget_")
}

/// The work of the node `person`: asks the question on the desk and leaves the reply there. Gives the node to go back to.
pub(crate) async fn listen(
    crew: &Crew,
    ctx: &Context,
    scope: &Scope,
    desk: &mut Desk,
    policy: &Policy,
) -> Result<String, NodeError> {
    let Some(question) = desk.question.take() else {
        return Err(NodeError::msg("the node person was reached without a question").fatal());
    };
    forget_old_retries(ctx, &question).await?;
    open(ctx, scope, &question.wait)?;
    let mut what = WaitFor::new().signal(signal::answer(&question.wait.id));
    for kind in &question.also {
        what = what.signal(kind);
    }
    let reply = match ctx.wait_any("reply", &what).await? {
        Arrived::Signal(arrived) if arrived.kind == signal::RETRY => {
            let retry: signal::Retry = arrived.payload().unwrap_or_default();
            let choice = if question.wait.kind == WaitKind::Budget {
                // Trying again is no leave to spend more: the budget may have been raised elsewhere, and is looked at again.
                None
            } else {
                Some(RETRY.to_owned())
            };
            Answer {
                choice,
                text: String::new(),
                by: retry
                    .by
                    .as_ref()
                    .map_or_else(String::new, PersonId::to_string),
            }
        }
        Arrived::Signal(arrived) if arrived.kind == signal::SECRET => Answer {
            choice: Some(CHECK.to_owned()),
            text: String::new(),
            by: String::new(),
        },
        Arrived::Signal(arrived) => arrived.payload().unwrap_or(Answer {
            choice: None,
            text: String::new(),
            by: String::new(),
        }),
        Arrived::Child(_) | Arrived::Timer => {
            return Err(NodeError::msg("a person's reply came as something else").fatal());
        }
    };
    let reply = understood(crew, &question.wait, reply);
    if question.wait.kind == WaitKind::Budget && reply.choice.as_deref() == Some(RAISE) {
        raise_budget(crew, ctx, scope, policy, &question.wait.id, &reply.by).await?;
    }
    let shown = reply.choice.clone().unwrap_or_else(|| reply.text.clone());
    let by = Some(reply.by.clone()).filter(|by| !by.is_empty());
    close(ctx, scope, &question.wait.id, Some(shown), by)?;
    desk.reply = Some(Reply {
        choice: reply.choice,
        text: reply.text,
        by: reply.by,
        failure: question.failure,
    });
    Ok(question.back)
}

/// A "try again" that came before the question was there is not about it.
async fn forget_old_retries(ctx: &Context, question: &Question) -> Result<(), NodeError> {
    const MOST: usize = 20;
    if question.also.iter().any(|kind| kind == signal::RETRY) {
        let old = WaitFor::new().signal(signal::RETRY);
        for _ in 0..MOST {
            if ctx.try_take("old retries", &old).await?.is_none() {
                break;
            }
        }
    }
    Ok(())
}

/// An answer with its choice cleared up: a typed word that is a choice becomes one, a choice that does not exist becomes text.
pub(crate) fn understood(crew: &Crew, wait: &OpenWait, answer: Answer) -> Answer {
    let known = |choice: &String| wait.options.iter().any(|option| option.value == *choice);
    let mut text = crew.vault.redact(ask::start_of(&answer.text));
    let choice = match answer.choice {
        Some(choice) if known(&choice) => Some(choice),
        Some(other) => {
            if text.is_empty() {
                text = crew.vault.redact(ask::start_of(&other));
            }
            choice_in(wait, &text)
        }
        None => choice_in(wait, &text),
    };
    Answer {
        choice,
        text,
        by: answer.by,
    }
}

/// Words that mean yes where something can be approved.
const YES: [&str; 9] = [
    "yes", "y", "ok", "okay", "approved", "go", "go ahead", "да", "ок",
];

/// The choice that a text is, as a whole: its value, its label, or a plain yes. "not approved" is none.
pub(crate) fn choice_in(wait: &OpenWait, text: &str) -> Option<String> {
    let said = words(text);
    if said.is_empty() {
        return None;
    }
    wait.options
        .iter()
        .find(|option| {
            said == words(&option.value)
                || said == words(&option.label)
                || (option.value == APPROVE && YES.contains(&said.as_str()))
        })
        .map(|option| option.value.clone())
}

/// A text as lower-case words: `"✅ Go ahead!"` becomes `go ahead`.
fn words(text: &str) -> String {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The id of a thread's question: opaque, the same in every re-run, another one on every branch of its history.
pub(crate) fn wait_id(ctx: &Context, number: u32) -> WaitId {
    let name = format!("{}|{}|{number}", ctx.thread(), ctx.branch());
    let id = Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes());
    WaitId::new(format!("w{}", &id.simple().to_string()[..16]))
}

/// Says that a person is asked.
pub(crate) fn open(ctx: &Context, scope: &Scope, wait: &OpenWait) -> Result<(), NodeError> {
    scope.tell(
        ctx,
        Event::WaitOpened {
            wait: wait.clone(),
            thread: ctx.thread().to_string(),
            interrupt: signal::answer(&wait.id),
        },
    )
}

/// Says that the wait is over; without an answer it was withdrawn.
pub(crate) fn close(
    ctx: &Context,
    scope: &Scope,
    wait: &WaitId,
    answer: Option<String>,
    by: Option<String>,
) -> Result<(), NodeError> {
    scope.tell(
        ctx,
        Event::WaitClosed {
            wait: wait.clone(),
            answer,
            by,
        },
    )
}

/// Raises the budget above what is spent, and comes back when the ledger knows it (or after a bound: then the next call says so).
pub(crate) async fn raise_budget(
    crew: &Crew,
    ctx: &Context,
    scope: &Scope,
    policy: &Policy,
    wait: &WaitId,
    by: &str,
) -> Result<(), NodeError> {
    let spent = ctx
        .step("spent", |_| async {
            Ok::<_, NodeError>(crew.ledger.spent(&scope.project).await)
        })
        .await?;
    let spent = match spent {
        Ok(spent) => spent,
        Err(failure) => return Err(failure.into()),
    };
    let limit_usd = spent.cost_usd.max(spent.limit_usd.unwrap_or(0.0)) + policy.budget_raise_usd;
    let limit_tokens =
        spent.tokens.max(spent.limit_tokens.unwrap_or(0)) + policy.budget_raise_tokens;
    scope
        .tell_now(
            ctx,
            &format!("budget:{wait}"),
            Event::BudgetRaised {
                limit_usd: Some(limit_usd),
                limit_tokens: Some(limit_tokens),
                by: by.to_owned(),
            },
        )
        .await?;
    ctx.step("raised", |_| async {
        const POLLS: u32 = 50;
        for _ in 0..POLLS {
            if let Ok(now) = crew.ledger.spent(&scope.project).await
                && now.limit_tokens == Some(limit_tokens)
            {
                return Ok(true);
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        Ok::<_, NodeError>(false)
    })
    .await?;
    Ok(())
}

/// The text as a sentence: with a capital letter and a full stop.
pub(crate) fn sentence(text: &str) -> String {
    let text = text.trim();
    let mut chars = text.chars();
    let Some(first) = chars.next() else {
        return String::new();
    };
    let stop = if text.ends_with(['.', '!', '?', ':']) {
        ""
    } else {
        "."
    };
    format!("{}{}{stop}", first.to_uppercase(), chars.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait() -> OpenWait {
        OpenWait {
            id: WaitId::new("w1"),
            kind: WaitKind::Spec,
            question: String::new(),
            options: vec![
                Choice::new(APPROVE, "✅ Build it"),
                Choice::new(CANCEL, "Drop it"),
            ],
            free_text: true,
            audience: Audience::Owner,
        }
    }

    #[test]
    fn only_a_whole_word_is_a_choice() {
        for (text, choice) in [
            ("approve", Some(APPROVE)),
            (" Yes! ", Some(APPROVE)),
            ("build it", Some(APPROVE)),
            ("drop it.", Some(CANCEL)),
            ("not approved", None),
            ("yes, but with search", None),
            ("approve?no", None),
            ("", None),
            ("!!!", None),
        ] {
            assert_eq!(choice_in(&wait(), text).as_deref(), choice, "{text:?}");
        }
    }

    #[test]
    fn a_message_becomes_a_sentence() {
        assert_eq!(sentence("the port is taken"), "The port is taken.");
        assert_eq!(sentence("Why? "), "Why?");
        assert_eq!(sentence(""), "");
    }
}
