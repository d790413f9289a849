//! `artel logs`: what the crew did, what workers say, what a deployed service wrote.

use std::collections::VecDeque;
use std::time::Duration;

use graph::{Cursor, JournalFilter};
use ports::{ProjectId, TaskId};
use store::{LINES_KEPT, SaidByWorker};

use crate::app::App;
use crate::cli::LogsArgs;
use crate::follow::{Doing, Until, follow};
use crate::words::{self, json_line, print_json};

use super::{Context, project_of};

/// Entries that are read together.
const PAGE: usize = 1000;
/// Tasks that are named when one is not there.
const NAMED: u64 = 10;

/// `artel logs`.
pub(super) async fn logs(context: &Context, args: LogsArgs) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let project = project_of(&app, Some(&args.project)).await?;
    if args.service {
        return service_logs(context, &app, &project, &args).await;
    }
    if let Some(task) = &args.task {
        return worker_logs(context, &app, &project, &TaskId::new(task), &args).await;
    }
    let printer = context.printer();
    let journal = app.books.journal();
    let filter = JournalFilter::stream(project.as_str());
    if args.until_idle {
        let mut doing = Doing::begin(&app).await?;
        let end = follow(
            &app,
            &mut doing,
            &project,
            Cursor::START,
            Until::Idle,
            &printer,
        )
        .await;
        doing.finish().await;
        let end = end?;
        printer.end(&end);
        return Ok(end.exit_code());
    }
    // The whole past is read, a page at a time; only its end is kept.
    let mut cursor = Cursor::START;
    let mut kept = VecDeque::new();
    loop {
        let page = journal.read(&filter, cursor, PAGE).await?;
        let Some(last) = page.last() else { break };
        cursor = last.cursor;
        kept.extend(page);
        while kept.len() > args.lines {
            kept.pop_front();
        }
    }
    for entry in &kept {
        printer.entry(entry);
    }
    loop {
        if !args.follow {
            return Ok(0);
        }
        journal.changed(cursor, Duration::from_secs(1)).await?;
        for entry in journal.read(&filter, cursor, PAGE).await? {
            cursor = entry.cursor;
            printer.entry(&entry);
        }
    }
}

async fn service_logs(
    context: &Context,
    app: &App,
    project: &ProjectId,
    args: &LogsArgs,
) -> anyhow::Result<u8> {
    use ports::Deployer;
    anyhow::ensure!(
        app.deployer.state(project).await?.release.is_some(),
        "nothing of {} is deployed, so there is no service with logs; `artel status {0}` shows where it stands",
        args.project
    );
    let mut shown: Vec<String> = Vec::new();
    loop {
        let lines = app.deployer.logs(project, args.lines).await?;
        // What is new is what follows the longest end of what was shown.
        let common = (0..=shown.len().min(lines.len()))
            .rev()
            .find(|&n| shown[shown.len() - n..] == lines[..n])
            .unwrap_or(0);
        for line in &lines[common..] {
            // Secrets are looked for in what is seen.
            let line = ports::plain(line);
            let line = context.redactor.redact(&line);
            if context.json {
                print_json(&serde_json::json!({ "line": line }));
            } else {
                words::say(&line);
            }
        }
        shown = lines;
        if !args.follow {
            return Ok(0);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn worker_logs(
    context: &Context,
    app: &App,
    project: &ProjectId,
    task: &TaskId,
    args: &LogsArgs,
) -> anyhow::Result<u8> {
    let mut seen = (i64::MIN, i64::MIN);
    let mut first = true;
    loop {
        let said = app
            .store
            .said_by_workers(project, task, seen, LINES_KEPT)
            .await?;
        let said = match said {
            Some(said) => said,
            None if args.follow => {
                if first {
                    words::complain(&format!(
                        "artel: {}; waiting for one",
                        nobody(app, project, task, args).await?
                    ));
                }
                first = false;
                Vec::new()
            }
            None => anyhow::bail!(nobody(app, project, task, args).await?),
        };
        if let Some(last) = said.last() {
            seen = (last.line.at_ms, last.line.seq);
        }
        let mut lines: VecDeque<String> = VecDeque::new();
        for one in &said {
            let words = words_of(one, context.json);
            lines.extend(
                words
                    .lines()
                    .map(|line| context.redactor.redact(line).into_owned()),
            );
        }
        while first && lines.len() > args.lines {
            lines.pop_front();
        }
        first = false;
        for line in lines {
            words::say(&line);
        }
        if !args.follow {
            return Ok(0);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Says that no worker has worked at this task, and at which ones some have.
async fn nobody(
    app: &App,
    project: &ProjectId,
    task: &TaskId,
    args: &LogsArgs,
) -> anyhow::Result<String> {
    let others = app.store.tasks_with_workers(project, NAMED).await?;
    let others: Vec<_> = others.iter().map(TaskId::as_str).collect();
    let others = if others.is_empty() {
        "none has worked for it yet".to_owned()
    } else {
        format!("the last ones had {}", others.join(", "))
    };
    Ok(format!(
        "no worker of {} had a task {task}; {others}",
        args.project
    ))
}

/// What a worker said, as it is printed.
fn words_of(said: &SaidByWorker, json: bool) -> String {
    let SaidByWorker { attempt, line } = said;
    let at = jiff::Timestamp::from_millisecond(line.at_ms).unwrap_or_default();
    if json {
        return json_line(
            &serde_json::json!({"at": at, "attempt": attempt, "kind": line.kind, "text": line.text}),
        );
    }
    let text = ports::plain(&line.text);
    let time = at.strftime("%H:%M:%SZ");
    match line.kind.as_str() {
        "log" => format!("  {}", text.trim_end_matches('\n').replace('\n', "\n  ")),
        "refused" => format!("{time} attempt {attempt}: was refused {text}"),
        _ => format!("{time} attempt {attempt}: {text}"),
    }
}
