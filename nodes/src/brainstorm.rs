//! Brainstorm: tells a new project, a change, a question, a wish and an order apart, answers, asks (few questions, with
//! suggested answers), proposes, waits for the approval without going deaf, and starts the job. What it knows of a running job
//! comes from the record; when no model can answer, the record answers by itself.

use graph::{Arrived, Context, NodeError, WaitFor};
use ports::{
    Actor, Answer, Audience, Choice, Event, Failure, JobKind, NoticeSeverity, OpenWait,
    ProjectSpec, Role, SaidKind, Slug, StatusReport, WaitId, WaitKind,
};

use crate::{
    Crew,
    answers::{BrainstormTurn, ClarifyingQuestion, OrderWord},
    ask::{self, Question},
    conversation::{About, Conversation, Line, Open, Proposal},
    dispatch::Then,
    person,
    signal::{self, Message, Order, OrderKind},
    talk::Talk,
    texts,
};

/// The longest message that is read, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// The choice that takes the first suggestion of every question.
const SUGGESTED: &str = "suggested";

/// Takes one thing out of the mailbox and does what it asks for.
pub(crate) async fn work(
    crew: &Crew,
    before: &Conversation,
    ctx: &Context,
) -> Result<(Then, Conversation, Vec<Line>), NodeError> {
    before.scope.known(ctx)?;
    let mut talk = Talk {
        crew,
        ctx,
        now: before.clone(),
        said: Vec::new(),
        key: String::new(),
        replies: 0,
    };
    talk.found()?;
    let mut what = WaitFor::new().signal(signal::MESSAGE).signal(signal::ORDER);
    if let Some(open) = &before.open {
        what = what.signal(signal::answer(&open.wait.id));
    }
    if let Some(running) = &before.running {
        what = what.child(running.job.as_str());
    }
    let mut then = Then::Listen;
    match ctx.wait_any("mailbox", &what).await? {
        Arrived::Signal(arrived) => {
            talk.key.clone_from(&arrived.key);
            tracing::info!(key = arrived.key, kind = arrived.kind, "taken up");
            if arrived.kind == signal::MESSAGE {
                match arrived.payload::<Message>() {
                    Ok(message) => talk.message(message).await?,
                    Err(error) => talk.unreadable(&arrived.kind, &error)?,
                }
            } else if arrived.kind == signal::ORDER {
                match arrived.payload::<Order>() {
                    Ok(order) => then = talk.order(order).await?,
                    Err(error) => talk.unreadable(&arrived.kind, &error)?,
                }
            } else {
                match arrived.payload::<Answer>() {
                    Ok(answer) => talk.answered(answer).await?,
                    Err(error) => talk.unreadable(&arrived.kind, &error)?,
                }
            }
        }
        Arrived::Child(end) => {
            talk.key = format!("{}:ended", end.name);
            talk.job_ended(&end)?;
        }
        Arrived::Timer => {}
    }
    Ok((then, talk.now, talk.said))
}

impl Talk<'_> {
    async fn message(&mut self, message: Message) -> Result<(), NodeError> {
        let text = message.text.trim();
        let too_long = text.len() > MAX_MESSAGE_BYTES;
        let kept = if too_long { ask::start_of(text) } else { text };
        let text = self.crew.vault.redact(kept);
        self.scope().tell(
            self.ctx,
            Event::MessageReceived {
                key: message.key.clone(),
                from: message.from.clone(),
                text: text.clone(),
            },
        )?;
        if text.is_empty() {
            return self.reply(
                "That message was empty. Write in a sentence what you want built or changed.",
            );
        }
        if too_long {
            let kib = message.text.len().div_ceil(1024);
            return self.reply(format!(
                "That message has {kib} KiB, and I read at most 64 KiB at once. Send what matters most, or send it in parts."
            ));
        }
        self.heard(message.from.as_str(), text.clone());
        let mut clarified = false;
        if let Some(open) = self.now.open.clone() {
            if let Some(choice) = person::choice_in(&open.wait, &text) {
                let answer = Answer {
                    choice: Some(choice),
                    text: String::new(),
                    by: message.from.to_string(),
                };
                return self.decided(open, answer).await;
            }
            if open.about == About::Clarify {
                self.close(&open, Some(text.clone()), message.from.as_str())?;
                clarified = true;
            }
        }
        let message = Message { text, ..message };
        self.think(message, clarified).await
    }

    /// Decides about the latest message. `clarified`: it answers clarifying questions.
    async fn think(&mut self, message: Message, clarified: bool) -> Result<(), NodeError> {
        let aside = self.now.running.is_some() || (!clarified && is_question(&message.text));
        let (thread, turn) = if aside {
            ("conversation/aside", self.now.asides)
        } else {
            ("conversation", self.now.turns)
        };
        let record = self.record().await?;
        let must_propose = message.yes || self.now.rounds >= self.crew.policy.max_clarify_rounds;
        let prompt = self.prompt(record.as_ref(), must_propose)?;
        let (exists, runs) = (self.now.spec.is_some(), self.now.running.is_some());
        let told = ask::typed::<BrainstormTurn>(
            self.crew,
            self.ctx,
            Question {
                role: Role::Brainstorm,
                scope: &self.now.scope,
                thread,
                turn,
                step: "think",
                prompt,
                since: Vec::new(),
            },
            |turn| fits(turn, exists, runs, must_propose),
        )
        .await?;
        if aside {
            self.now.asides += told.turns;
        } else {
            let free = u32::from(matches!(told.answer, Ok(BrainstormTurn::Answer { .. })));
            self.now.turns += told.turns.saturating_sub(free);
        }
        match told.answer {
            Ok(turn) => self.act(turn, &message, record.as_ref()).await,
            Err(failure) => self.speechless(&failure, message, aside, record.as_ref()),
        }
    }

    async fn act(
        &mut self,
        turn: BrainstormTurn,
        message: &Message,
        record: Option<&StatusReport>,
    ) -> Result<(), NodeError> {
        match turn {
            BrainstormTurn::Answer { text } => self.reply(text),
            BrainstormTurn::Ask { questions } => self.ask(&questions, message.yes),
            BrainstormTurn::ProposeProject { spec } => {
                self.propose(Proposal::Project { spec }, message.yes).await
            }
            BrainstormTurn::ProposeChange { change } => {
                self.propose(Proposal::Change { change }, message.yes).await
            }
            BrainstormTurn::Steer { text } => self.steer(&text, message),
            BrainstormTurn::Order { order } => {
                let what = match order {
                    OrderWord::Deploy => OrderKind::Deploy,
                    OrderWord::Cancel => OrderKind::Cancel,
                    OrderWord::Retry => OrderKind::Retry { task: None },
                    OrderWord::Status => {
                        return self.reply(texts::status(record, &self.now));
                    }
                };
                let order = Order {
                    key: message.key.clone(),
                    by: message.from.clone(),
                    yes: message.yes,
                    what,
                };
                self.order(order).await.map(|_| ())
            }
        }
    }

    /// No model could answer: the record can, and money can be asked for.
    fn speechless(
        &mut self,
        failure: &Failure,
        message: Message,
        aside: bool,
        record: Option<&StatusReport>,
    ) -> Result<(), NodeError> {
        if person::is_budget(failure) && self.now.open.is_none() {
            return self.ask_for_budget(failure, message);
        }
        if failure.actor == Actor::Admin && failure.kind != "not_on_tape" {
            self.scope().notify(
                self.ctx,
                NoticeSeverity::Warning,
                failure.kind.clone(),
                person::sentence(&failure.message),
            )?;
        }
        if aside {
            let why = match self.crew.models.tape() {
                Some(tape) => format!("I am playing the {tape} tape, which has no answer to that."),
                None => format!(
                    "No model could answer just now: {}",
                    person::sentence(&failure.message)
                ),
            };
            let status = texts::status(record, &self.now);
            return self.reply(format!("{why} Here is where things stand:\n\n{status}"));
        }
        self.say(
            SaidKind::Trouble,
            format!(
                "I could not work on that: {} Your message is kept; write again when it is mended.",
                person::sentence(&failure.message)
            ),
        )
    }

    fn ask(&mut self, questions: &[ClarifyingQuestion], yes: bool) -> Result<(), NodeError> {
        self.now.rounds += 1;
        let options = match questions {
            [one] => one
                .options
                .iter()
                .enumerate()
                .map(|(n, option)| Choice::new(&(n + 1).to_string(), option))
                .collect(),
            many if many.iter().all(|question| !question.options.is_empty()) => {
                vec![Choice::new(SUGGESTED, "Take the first suggestions")]
            }
            _ => Vec::new(),
        };
        let wait = OpenWait {
            id: WaitId::new(""),
            kind: WaitKind::Clarify,
            question: texts::questions(questions),
            options,
            free_text: true,
            audience: Audience::Owner,
        };
        self.open(wait, About::Clarify, yes)
    }

    async fn propose(&mut self, proposal: Proposal, yes: bool) -> Result<(), NodeError> {
        self.withdraw()?;
        self.now.draft = None;
        let text = texts::proposal(&proposal, self.crew.tape_note().as_deref());
        if yes || !self.crew.policy.approve_spec {
            let by = if yes { "policy:yes" } else { "policy" };
            self.say(SaidKind::News, format!("{text}\n\nApproved beforehand."))?;
            return self.approve(proposal, by, yes).await;
        }
        let breaking = matches!(&proposal, Proposal::Change { change } if change.breaking);
        let wait = OpenWait {
            id: WaitId::new(""),
            kind: if breaking {
                WaitKind::BreakingChange
            } else {
                WaitKind::Spec
            },
            question: text,
            options: vec![
                Choice::new(person::APPROVE, "Build it"),
                Choice::new(person::CHANGE, "Change something"),
                Choice::new(person::CANCEL, "Drop it"),
            ],
            free_text: true,
            audience: Audience::Owner,
        };
        self.open(wait, About::Proposal { proposal }, yes)
    }

    fn ask_for_budget(&mut self, failure: &Failure, message: Message) -> Result<(), NodeError> {
        let policy = &self.crew.policy;
        let wait = OpenWait {
            id: WaitId::new(""),
            kind: WaitKind::Budget,
            question: format!(
                "**The budget is used up.**\n\n{}",
                person::sentence(&failure.message)
            ),
            options: vec![
                Choice::new(
                    person::RAISE,
                    &format!(
                        "Raise it by {:.2} USD and {} tokens",
                        policy.budget_raise_usd, policy.budget_raise_tokens
                    ),
                ),
                Choice::new(person::GIVE_UP, "Leave it"),
            ],
            free_text: false,
            audience: Audience::Owner,
        };
        let yes = message.yes;
        self.open(wait, About::Budget { message }, yes)
    }

    /// An answer on the wait's own way: a button, or a text given to it.
    async fn answered(&mut self, answer: Answer) -> Result<(), NodeError> {
        let Some(open) = self.now.open.clone() else {
            return Ok(());
        };
        let answer = person::understood(self.crew, &open.wait, answer);
        self.decided(open, answer).await
    }

    async fn decided(&mut self, open: Open, answer: Answer) -> Result<(), NodeError> {
        let choice = answer.choice.as_deref();
        match open.about.clone() {
            About::Clarify => {
                let text = match choice {
                    Some(SUGGESTED) => "I take the first suggestion of every question.".to_owned(),
                    Some(value) => open
                        .wait
                        .options
                        .iter()
                        .find(|option| option.value == value)
                        .map_or_else(|| value.to_owned(), |option| option.label.clone()),
                    None => answer.text.clone(),
                };
                self.close(&open, Some(text.clone()), &answer.by)?;
                self.think_about_answer(&open, &answer, text, true).await
            }
            About::Proposal { proposal } => match choice {
                Some(person::APPROVE) => {
                    self.close(&open, Some(person::APPROVE.to_owned()), &answer.by)?;
                    self.approve(proposal, &answer.by, open.yes).await
                }
                Some(person::CANCEL) => {
                    self.close(&open, Some(person::CANCEL.to_owned()), &answer.by)?;
                    self.now.rounds = 0;
                    self.reply("Dropped. Nothing was built or changed.")
                }
                Some(person::CHANGE) => {
                    self.close(&open, Some(person::CHANGE.to_owned()), &answer.by)?;
                    self.now.draft = Some(proposal);
                    self.reply("What should be different? Write it in your own words.")
                }
                _ => {
                    self.close(&open, Some(answer.text.clone()), &answer.by)?;
                    self.now.draft = Some(proposal);
                    let text = answer.text.clone();
                    self.think_about_answer(&open, &answer, text, true).await
                }
            },
            About::Budget { message } => {
                if choice == Some(person::RAISE) {
                    let policy = self.crew.policy.clone();
                    person::raise_budget(
                        self.crew,
                        self.ctx,
                        &self.now.scope,
                        &policy,
                        &open.wait.id,
                        &answer.by,
                    )
                    .await?;
                    self.close(&open, Some(person::RAISE.to_owned()), &answer.by)?;
                    return self.think(message, false).await;
                }
                self.close(&open, Some(person::GIVE_UP.to_owned()), &answer.by)?;
                self.reply(
                    "All right, nothing more is spent. Your message is kept; write again to go on.",
                )
            }
        }
    }

    /// An answer that has to be thought about, as if it had been a message.
    async fn think_about_answer(
        &mut self,
        open: &Open,
        answer: &Answer,
        text: String,
        clarified: bool,
    ) -> Result<(), NodeError> {
        if text.trim().is_empty() {
            return self.reply("I got no answer. Write it in your own words.");
        }
        self.heard(&answer.by, text.clone());
        let message = Message {
            key: self.key.clone(),
            from: answer.by.as_str().into(),
            text,
            yes: open.yes,
        };
        self.think(message, clarified).await
    }

    async fn approve(&mut self, proposal: Proposal, by: &str, yes: bool) -> Result<(), NodeError> {
        self.now.rounds = 0;
        self.now.draft = None;
        let work = match proposal {
            Proposal::Project { spec } => {
                let slug = self.slug(&spec).await?;
                self.scope().tell(
                    self.ctx,
                    Event::SpecApproved {
                        slug: slug.to_string(),
                        spec: spec.clone(),
                        by: by.to_owned(),
                    },
                )?;
                self.now.slug = Some(slug);
                self.now.spec = Some(spec.clone());
                JobKind::New { spec }
            }
            Proposal::Change { change } => JobKind::Change { change },
        };
        self.begin(work, yes)
    }

    /// A short name that no other project has; should the record be out of reach, the project's id is one.
    async fn slug(&self, spec: &ProjectSpec) -> Result<Slug, NodeError> {
        let project = &self.scope().project;
        let wanted = Slug::from_title(&spec.name);
        let slug = self
            .ctx
            .step("slug", |_| async {
                Ok::<_, NodeError>(self.crew.record.free_slug(project, &wanted).await)
            })
            .await?;
        Ok(slug.unwrap_or_else(|_| Slug::from_title(project.as_str())))
    }
}

/// Whether what the model made of a message is possible at this moment.
fn fits(turn: &BrainstormTurn, exists: bool, runs: bool, must_propose: bool) -> Result<(), String> {
    match turn {
        BrainstormTurn::Ask { .. } if must_propose => Err(
            "turn: no more questions may be asked; propose, and state every assumption".to_owned(),
        ),
        BrainstormTurn::ProposeProject { .. } if exists => {
            Err("turn: the project exists; use propose_change".to_owned())
        }
        BrainstormTurn::ProposeChange { .. } if !exists => {
            Err("turn: there is no project to change yet; use propose_project".to_owned())
        }
        BrainstormTurn::Steer { .. } if !runs => Err(
            "turn: no job is running, so nothing can be steered; use propose_change, propose_project or answer"
                .to_owned(),
        ),
        _ => Ok(()),
    }
}

/// Whether a text reads as a plain question, and not as a request in the form of one. It decides which turn of a tape
/// answers, never what a message means: that is the model's to say.
fn is_question(text: &str) -> bool {
    const LONGEST: usize = 400;
    const REQUESTS: [&str; 20] = [
        "can you",
        "could you",
        "would you",
        "will you",
        "can we",
        "could we",
        "can it",
        "could it",
        "please",
        "i want",
        "i'd like",
        "how about",
        "what about",
        "what if",
        "let's",
        "why not",
        "можешь",
        "можно",
        "сделай",
        "добавь",
    ];
    let text = text.trim().to_lowercase();
    if text.len() > LONGEST {
        return false;
    }
    if text == "status" {
        return true;
    }
    text.ends_with('?') && REQUESTS.iter().all(|request| !text.contains(request))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_the_form_of_a_question_is_none() {
        for text in [
            "How far are you?",
            "what does it do?",
            "Status",
            "Как дела?",
        ] {
            assert!(is_question(text), "{text}");
        }
        for text in [
            "Can you add search?",
            "Build me a notes service",
            "How about a search?",
            "",
        ] {
            assert!(!is_question(text), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_now_is_refused_with_the_way_out() {
        let steer = BrainstormTurn::Steer { text: "x".into() };
        assert!(fits(&steer, true, true, false).is_ok());
        assert!(
            fits(&steer, true, false, false)
                .unwrap_err()
                .contains("propose_change")
        );
        let ask = BrainstormTurn::Ask { questions: vec![] };
        assert!(fits(&ask, false, false, true).is_err());
    }
}
