//! What the crew says to people, as short Markdown made from data: proposals, questions, results, where things stand.

use std::fmt::Write as _;

use ports::{AcceptanceCheck, Check, JobKind, JobStatus, Need, StatusReport};

use crate::{
    answers::ClarifyingQuestion,
    conversation::{About, Conversation, Open, Proposal},
    job::JobOutcome,
    person::sentence,
};

/// How much evidence stands in a result, in bytes.
const EVIDENCE_BYTES: usize = 1500;

/// How many lines of one kind a text lists.
const MAX_LINES: usize = 20;

/// A proposal for the owner to approve. `tape` says where it comes from, if not from a model.
pub(crate) fn proposal(proposal: &Proposal, tape: Option<&str>) -> String {
    let tape = tape.map_or_else(String::new, |tape| format!(" ({tape})"));
    let mut text = String::new();
    match proposal {
        Proposal::Project { spec } => {
            let _ = writeln!(
                text,
                "**{}**{tape}\n\n{}\n",
                spec.name,
                sentence(&spec.goal)
            );
            list(&mut text, "It will", spec.features.iter().cloned());
            list(
                &mut text,
                "It is done when",
                spec.acceptance.iter().map(check),
            );
            list(&mut text, "It needs", spec.needs.iter().filter_map(need));
            list(&mut text, "Mind", spec.risks.iter().cloned());
        }
        Proposal::Change { change } => {
            let _ = writeln!(
                text,
                "**{}**{tape}\n\n{}\n",
                change.title,
                sentence(&change.description)
            );
            if change.breaking {
                let _ = writeln!(
                    text,
                    "This changes something that people who use the service rely on.\n"
                );
            }
            list(
                &mut text,
                "It is done when",
                change.acceptance.iter().map(check),
            );
            list(&mut text, "It needs", change.needs.iter().filter_map(need));
        }
    }
    text.trim_end().to_owned()
}

/// Clarifying questions, numbered when there are several, with their suggested answers.
pub(crate) fn questions(questions: &[ClarifyingQuestion]) -> String {
    let mut text = String::new();
    for (n, question) in questions.iter().enumerate() {
        if questions.len() > 1 {
            let _ = write!(text, "{}. ", n + 1);
        }
        let _ = writeln!(text, "{}", question.question.trim());
        if !question.options.is_empty() {
            let _ = writeln!(text, "   Suggested: {}", question.options.join(" / "));
        }
    }
    text.trim_end().to_owned()
}

/// How a job ended.
pub(crate) fn result(work: &JobKind, outcome: &JobOutcome, tape: Option<&str>) -> String {
    let title = work.title();
    let tape = tape.map_or_else(String::new, |tape| format!(" ({tape})"));
    match outcome.status {
        JobStatus::Deployed => match &outcome.url {
            Some(url) => {
                format!("**{title}** is live: {url}{tape}\nAll its acceptance checks passed.")
            }
            None => format!("**{title}** is done{tape}."),
        },
        JobStatus::Cancelled => {
            format!("**{title}** was stopped. What was merged before stays merged.")
        }
        JobStatus::Failed => {
            let mut text = format!("**{title}** failed{tape}.");
            if let Some(failure) = &outcome.failure {
                let _ = write!(text, " {}", sentence(&failure.message));
                let evidence = failure.evidence.trim();
                if !evidence.is_empty() {
                    let start =
                        evidence.ceil_char_boundary(evidence.len().saturating_sub(EVIDENCE_BYTES));
                    let _ = write!(
                        text,
                        "\n\n```\n{}\n```",
                        evidence[start..].replace("```", "'''")
                    );
                }
            }
            text.push_str("\n\nSay \"retry\" to try again, or tell me what should be different.");
            text
        }
    }
}

/// Where things stand, from the record and from the conversation itself.
pub(crate) fn status(record: Option<&StatusReport>, talk: &Conversation) -> String {
    let mut text = String::new();
    if let Some(report) = record {
        let project = &report.project;
        let _ = write!(text, "**{}**: {}", project.name, project.status);
        if let Some(url) = &project.url {
            let _ = write!(text, " at {url}");
        }
        text.push('\n');
        if let Some(job) = &report.job {
            let at = job
                .node
                .as_ref()
                .map_or_else(String::new, |node| format!(", at {node}"));
            let _ = writeln!(text, "{} is {}{at}.", job.id, job.status);
        }
        for task in report.tasks.iter().take(MAX_LINES) {
            let _ = write!(text, "- {} (`{}`): {}", task.title, task.id, task.status);
            if let Some(worker) = &task.worker {
                let _ = write!(text, ", worker {}", worker.phase);
            }
            text.push('\n');
        }
        for wait in report.waits.iter().take(MAX_LINES) {
            let question = wait.question.lines().next().unwrap_or_default();
            let _ = writeln!(text, "Waiting for you: {question}");
        }
    } else if let Some(running) = &talk.running {
        let _ = writeln!(
            text,
            "{} is running: **{}**.",
            running.job,
            running.work.title()
        );
    }
    if record.is_none_or(|report| report.waits.is_empty())
        && let Some(Open { about, .. }) = &talk.open
    {
        text.push_str(match about {
            About::Clarify => "My questions wait for your answer.\n",
            About::Proposal { .. } => "My proposal waits for your approval.\n",
            About::Budget { .. } => "The budget is used up and waits to be raised.\n",
        });
    }
    for queued in &talk.queue {
        let _ = writeln!(text, "Next: **{}**", queued.work.title());
    }
    if text.is_empty() {
        "Nothing is under way. Tell me what you want built.".to_owned()
    } else {
        text.trim_end().to_owned()
    }
}

fn list(text: &mut String, title: &str, items: impl Iterator<Item = String>) {
    let items: Vec<String> = items.collect();
    if items.is_empty() {
        return;
    }
    let _ = writeln!(text, "{title}:");
    for item in items.iter().take(MAX_LINES) {
        let _ = writeln!(text, "- {item}");
    }
    if items.len() > MAX_LINES {
        let _ = writeln!(text, "- … and {} more", items.len() - MAX_LINES);
    }
    text.push('\n');
}

fn check(check: &AcceptanceCheck) -> String {
    match &check.check {
        Check::Http {
            method,
            path,
            expect,
            ..
        } => format!(
            "{} (`{method} {path}` answers {})",
            check.name, expect.status
        ),
        Check::Command { argv, .. } => format!("{} (`{}` succeeds)", check.name, argv.join(" ")),
    }
}

fn need(need: &Need) -> Option<String> {
    match need {
        Need::Port => None,
        Need::Secret { name, description } => {
            Some(format!("the secret `{name}`: {}", sentence(description)))
        }
    }
}
