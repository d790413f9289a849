//! `artel chat`: a conversation at the terminal. The same conversation as in Telegram, seen from another place.

use std::io::IsTerminal;
use std::time::Duration;

use graph::JournalFilter;
use ports::{Answered, FrontDesk, Incoming, ProjectId};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::app::App;
use crate::cli::ChatArgs;
use crate::follow::Doing;
use crate::lines::typed_answer;
use crate::words;

use super::{Context, me, project_of, talk};

const HELP: &str = "what you type goes to the crew; /status, /cancel, /answer WAIT TEXT, /quit";
/// Entries that are read together.
const PAGE: usize = 200;
const PATIENCE: Duration = Duration::from_millis(300);

/// Talks until the end of input or `/quit`.
pub(super) async fn run(context: &Context, args: ChatArgs) -> anyhow::Result<u8> {
    let app = context.app().await?;
    talk::begin(context, &app)?;
    let mut project = match &args.project {
        Some(name) => Some(project_of(&app, Some(name)).await?),
        None => None,
    };
    if !context.json && std::io::stdin().is_terminal() {
        words::say(HELP);
    }
    let printer = context.printer();
    let mut doing = Doing::begin(&app).await?;
    let mut cursor = app.books.journal().end().await?;
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let mut typing = true;
    loop {
        tokio::select! {
            line = input.next_line(), if typing => match line? {
                Some(line) if line.trim() == "/quit" => break,
                Some(line) if line.trim().is_empty() => {}
                Some(line) => heed(context, &app, &mut project, &line).await?,
                None => typing = false,
            },
            () = tokio::time::sleep(PATIENCE) => {}
        }
        // Looked at before the entries: when all was quiet then, they are all there is.
        let over = !typing && idle(&app, project.as_ref()).await?;
        if let Some(project) = &project {
            let filter = JournalFilter::stream(project.as_str());
            for entry in app.engine.journal().read(&filter, cursor, PAGE).await? {
                cursor = entry.cursor;
                printer.entry(&entry);
            }
        }
        // After the end of input the crew still finishes what it has begun.
        if over {
            break;
        }
        doing.keep().await?;
    }
    doing.finish().await;
    Ok(0)
}

async fn idle(app: &App, project: Option<&ProjectId>) -> anyhow::Result<bool> {
    match project {
        None => Ok(true),
        Some(project) => crate::follow::is_quiet(app, project).await,
    }
}

async fn heed(
    context: &Context,
    app: &App,
    project: &mut Option<ProjectId>,
    line: &str,
) -> anyhow::Result<()> {
    let note = |text: &str| context.say(&serde_json::json!({ "note": text }), text);
    let line = line.trim();
    let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match (command, project.as_ref()) {
        ("/status", Some(id)) => {
            let report = app.desk.status(id).await?;
            context.say(&report, super::show::status_text(&report).trim_end());
        }
        ("/cancel", Some(id)) => {
            if !app.desk.cancel(id, &me()).await? {
                note("no job is running");
            }
        }
        ("/answer", _) => {
            let (wait, text) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let id = ports::WaitId::new(wait);
            let row = app.store.wait(&id).await?;
            let choice = row.and_then(|row| talk::chosen(&row, text));
            let answer = typed_answer(choice.as_deref(), text.trim(), &me());
            if app.desk.answer(&id, answer).await? != Answered::Accepted {
                note("nothing waits for that any more");
            }
        }
        ("/status" | "/cancel", None) => note("say what you want first"),
        (word, _) if word.starts_with('/') => note(HELP),
        _ => {
            let incoming = Incoming {
                key: talk::key(),
                project: project.clone(),
                from: me(),
                text: line.to_owned(),
                yes: false,
            };
            match app.desk.message(incoming).await {
                Ok(id) => *project = Some(id),
                Err(failure) => note(&failure.to_string()),
            }
        }
    }
    Ok(())
}
