//! Commands that only look.

use anyhow::Context as _;
use graph::{HistoryFilter, ThreadFilter};
use ports::{FrontDesk, StatusReport, threads};

use crate::cli::{ForkArgs, ReplayArgs};
use crate::words::{self, print_json};

use super::{Context, project_of};

/// `artel projects`.
pub(super) async fn projects(context: &Context) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let projects = app.desk.projects().await?;
    if context.json {
        projects.iter().for_each(print_json);
    } else if projects.is_empty() {
        words::say("no projects yet: artel new \"what you want\"");
    } else {
        for project in projects {
            words::say(&format!(
                "{:<24} {:<10} {}",
                project.slug,
                project.status,
                project.url.as_deref().unwrap_or("-")
            ));
        }
    }
    Ok(0)
}

/// `artel status`.
pub(super) async fn status(context: &Context, project: Option<&str>) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let project = project_of(&app, project).await?;
    let report = app.desk.status(&project).await?;
    if context.json {
        print_json(&report);
    } else {
        words::say(status_text(&report).trim_end());
    }
    Ok(0)
}

/// The record of a project for people.
pub(super) fn status_text(report: &StatusReport) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let project = &report.project;
    let _ = writeln!(
        text,
        "{} ({}, {}): {}",
        project.name, project.slug, project.id, project.status
    );
    let mut line = |name: &str, value: Option<&str>| {
        if let Some(value) = value {
            let _ = writeln!(text, "  {name:<11} {value}");
        }
    };
    line("url", project.url.as_deref());
    line("repository", project.repository.as_deref());
    let spent = match project.cost_usd {
        Some(cost) => format!("{cost:.2} USD, {} tokens", project.tokens),
        None => format!("{} tokens (no price is known)", project.tokens),
    };
    line("cost", Some(&spent));
    if let Some(job) = &report.job {
        let _ = writeln!(
            text,
            "{}: {}{}",
            job.id,
            job.status,
            job.node
                .as_ref()
                .map(|node| format!(", at {node}"))
                .unwrap_or_default()
        );
    }
    for task in &report.tasks {
        let request = task.pull_request.as_ref().map_or_else(
            || "no pull request".to_owned(),
            |request| format!("pull request #{} {}", request.number, request.status),
        );
        let after: Vec<_> = task.depends_on.iter().map(ports::TaskId::as_str).collect();
        let _ = writeln!(
            text,
            "  {:<16} {:<10} {request}, attempts {}, reviews {}{}  {}",
            task.id.as_str(),
            task.status,
            task.attempts,
            task.review_rounds,
            if after.is_empty() {
                String::new()
            } else {
                format!(", after {}", after.join(", "))
            },
            task.title,
        );
        if let Some(worker) = &task.worker {
            let by = worker.spawner.as_deref().unwrap_or("nobody yet");
            let words = worker.in_words(jiff::Timestamp::now());
            let _ = writeln!(text, "  {:<16} worker {words}, with {by}", "");
        }
    }
    for release in &report.deployments {
        let sha: String = release.sha.as_str().chars().take(8).collect();
        let _ = writeln!(
            text,
            "release {} {sha} {} {} {}",
            release.release, release.status, release.url, release.at
        );
    }
    for wait in &report.waits {
        let _ = writeln!(text, "waits for you ({}): {}", wait.id, wait.question);
        let _ = writeln!(
            text,
            "  artel answer {} {}",
            wait.id,
            wait.options.join(" | ")
        );
    }
    text
}

/// `artel graph`.
pub(super) async fn graph(context: &Context, format: &str) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let picture = app.picture()?;
    let text = match format {
        "dot" => picture.to_dot(),
        "svg" => picture.to_svg(),
        _ => picture.to_mermaid(),
    };
    context.say(&serde_json::json!({"format": format, "text": text}), &text);
    Ok(0)
}

/// `artel threads`.
pub(super) async fn threads(context: &Context, project: Option<&str>) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let prefix = match project {
        Some(name) => Some(threads::conversation(&project_of(&app, Some(name)).await?)),
        None => None,
    };
    for thread in app
        .engine
        .threads(&ThreadFilter {
            prefix,
            ..ThreadFilter::default()
        })
        .await?
    {
        if context.json {
            print_json(&thread_json(&thread));
        } else {
            let waits: Vec<_> = thread.waits.iter().map(|wait| wait.name.as_str()).collect();
            words::say(&format!(
                "{:<40} {:<13} {:<10} step {:<4} {}",
                thread.id.to_string(),
                thread.graph,
                status_word(&thread),
                thread.step,
                if waits.is_empty() {
                    String::new()
                } else {
                    format!("waits: {}", waits.join(", "))
                }
            ));
        }
    }
    Ok(0)
}

fn status_word(thread: &graph::ThreadInfo) -> String {
    format!("{:?}", thread.status).to_lowercase()
}

fn thread_json(thread: &graph::ThreadInfo) -> serde_json::Value {
    serde_json::json!({
        "id": thread.id,
        "graph": thread.graph,
        "status": status_word(thread),
        "branch": thread.branch,
        "checkpoint": thread.checkpoint,
        "step": thread.step,
        "waits": thread.waits,
        "lease": thread.lease.as_ref().map(|lease| format!("{lease:?}")),
        "error": thread.error,
        "updated_at": thread.updated_at,
    })
}

/// `artel history`.
pub(super) async fn history(context: &Context, thread: &str) -> anyhow::Result<u8> {
    let app = context.app().await?;
    for checkpoint in app.engine.history(thread, HistoryFilter::default()).await? {
        if context.json {
            print_json(&checkpoint);
        } else {
            words::say(&format!(
                "{:<6} branch {:<3} step {:<4} {:<24} next: {}",
                checkpoint.checkpoint,
                checkpoint.branch,
                checkpoint.step,
                checkpoint.at.to_string(),
                checkpoint.next.join(", ")
            ));
        }
    }
    Ok(0)
}

fn checkpoint_number(text: &str) -> anyhow::Result<u64> {
    text.parse().with_context(|| {
        format!("{text:?} is no checkpoint: take a number from `artel history THREAD`")
    })
}

/// `artel replay`.
pub(super) async fn replay(context: &Context, args: ReplayArgs) -> anyhow::Result<u8> {
    anyhow::ensure!(
        args.live,
        "a replay asks models and the forge again, so say that you want that: artel replay {} {} --live",
        args.thread,
        args.checkpoint
    );
    let fork = ForkArgs {
        thread: args.thread,
        checkpoint: args.checkpoint,
        update: "{}".to_owned(),
        as_node: None,
        head: true,
    };
    self::fork(context, fork).await
}

/// `artel fork`.
pub(super) async fn fork(context: &Context, args: ForkArgs) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let update: serde_json::Value = serde_json::from_str(&args.update)
        .context("--update is not a JSON object of channels, such as {\"yes\": true}")?;
    let checkpoint = checkpoint_number(&args.checkpoint)?;
    let branch = app
        .engine
        .fork(
            args.thread.as_str(),
            checkpoint,
            args.as_node.as_deref(),
            &update,
        )
        .await?;
    if args.head {
        app.engine.set_head(args.thread.as_str(), branch).await?;
    }
    if context.json {
        print_json(
            &serde_json::json!({"thread": args.thread, "branch": branch, "head": args.head}),
        );
    } else if args.head {
        words::say(&format!(
            "{} goes on from branch {branch} when somebody does the work (artel up)",
            args.thread
        ));
    } else {
        words::say(&format!(
            "branch {branch} of {}; with --head the thread goes on from it",
            args.thread
        ));
    }
    Ok(0)
}

/// `artel config check`.
pub(super) fn config(context: &Context) -> u8 {
    for setting in context.config.explain() {
        if context.json {
            print_json(&setting);
        } else {
            words::say(&format!(
                "{:<28} {:<32} {}",
                setting.name,
                setting.value.as_deref().unwrap_or("-"),
                setting.source
            ));
            words::say(&format!("{:<28} {}", "", setting.about));
        }
    }
    0
}
