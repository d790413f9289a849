//! What the bot itself says; the crew's words come from the journal.

use std::fmt::Write as _;

use ports::{Failure, ProjectRecord, StatusReport};

/// The commands, as the menu and `/help` show them.
pub(crate) const COMMANDS: &[(&str, &str)] = &[
    (
        "new",
        "a new project: describe it after the command or in the next message",
    ),
    ("projects", "your projects"),
    ("project", "NAME: talk about this project from now on"),
    ("status", "tasks, pull requests, cost and address"),
    ("deploy", "deploy what is merged once more"),
    ("rollback", "go back to the last good release"),
    ("retry", "try again what failed"),
    ("cancel", "stop the running job"),
    (
        "secret",
        "NAME VALUE: give the project a secret; the message is deleted",
    ),
    ("help", "this list"),
];

/// `/start`.
pub(crate) fn start(tape: Option<&str>) -> String {
    let mut text = "Hello! Describe what you want to have built: a crew plans it, writes and reviews the code, deploys it here and answers \
                    with its address. Your next message extends it.\n\n"
        .to_owned();
    if let Some(tape) = tape {
        let _ = write!(
            text,
            "No model is configured, so answers come **from the {tape} tape**: whatever you describe becomes the demo's project.\n\n"
        );
    }
    text + &help()
}

/// `/help`.
pub(crate) fn help() -> String {
    COMMANDS
        .iter()
        .fold(String::new(), |mut text, (name, about)| {
            let _ = writeln!(text, "- /{name}: {about}");
            text
        })
}

/// What the front desk could not do, in the words of this front end.
pub(crate) fn failure(failure: &Failure) -> String {
    sentence(&failure.message.replace("`artel projects`", "/projects"))
}

/// A text with a capital letter and a full stop.
pub(crate) fn sentence(text: &str) -> String {
    let text = text.trim();
    let mut chars = text.chars();
    let Some(first) = chars.next() else {
        return "Something went wrong.".to_owned();
    };
    let stop = if text.ends_with(['.', '!', '?', ':', '…']) {
        ""
    } else {
        "."
    };
    format!("{}{}{stop}", first.to_uppercase(), chars.as_str())
}

/// `/projects`.
pub(crate) fn projects(projects: &[ProjectRecord]) -> String {
    if projects.is_empty() {
        return "There are no projects yet: describe one.".to_owned();
    }
    projects.iter().fold(String::new(), |mut text, project| {
        let _ = write!(
            text,
            "- **{}** (`{}`): {}",
            project.name, project.slug, project.status
        );
        if let Some(url) = &project.url {
            let _ = write!(text, ", {url}");
        }
        text + "\n"
    })
}

/// `/status`.
pub(crate) fn status(report: &StatusReport) -> String {
    let project = &report.project;
    let mut text = format!("**{}**: {}\n\n", project.name, project.status);
    if let Some(url) = &project.url {
        let _ = writeln!(text, "- Address: {url}");
    }
    if let Some(job) = &report.job {
        let _ = write!(text, "- {}: {}", job.id, job.status);
        if let Some(node) = &job.node {
            let _ = write!(text, ", at {node}");
        }
        text.push('\n');
    }
    for task in &report.tasks {
        let _ = write!(text, "- {} (`{}`): {}", task.title, task.id, task.status);
        if let Some(request) = &task.pull_request {
            let _ = write!(
                text,
                ", pull request #{} {}",
                request.number, request.status
            );
        }
        if task.review_rounds > 0 {
            let _ = write!(text, ", {} review(s)", task.review_rounds);
        }
        if let Some(worker) = &task.worker {
            let now = jiff::Timestamp::now();
            let _ = write!(text, ", worker {}", worker.in_words(now));
        }
        text.push('\n');
    }
    for wait in &report.waits {
        let _ = writeln!(
            text,
            "- Waits for you: {}",
            wait.question.lines().next().unwrap_or_default()
        );
    }
    let _ = match project.cost_usd {
        Some(cost) => write!(text, "- Spent: {cost:.2} USD, {} tokens", project.tokens),
        None => write!(text, "- Spent: {} tokens", project.tokens),
    };
    text
}
