//! Commands that say something to the crew and follow what comes of it.

use std::io::Read;
use std::path::Path;

use graph::Cursor;
use nodes::person;
use ports::{Answered, Choice, FrontDesk, Incoming, ProjectId, TaskId, WaitId};
use store::WaitRow;

use crate::app::App;
use crate::cli::{NewArgs, ProjectAndYes, RetryArgs, SayArgs};
use crate::follow::{Doing, Until, follow};
use crate::lines::{End, typed_answer};
use crate::words;

use super::{Context, me};

/// The text, or what comes in on standard input.
fn words(text: &str) -> anyhow::Result<String> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut read = String::new();
    // One byte more than the desk takes, so that it can say that it is too much.
    std::io::stdin()
        .take(2 * 1024 * 1024)
        .read_to_string(&mut read)?;
    Ok(read)
}

/// A key for what is said here and now.
pub(super) fn key() -> String {
    format!("cli:{}", uuid::Uuid::now_v7())
}

/// Says something and follows it to its end.
pub(super) async fn tell(
    context: &Context,
    app: &App,
    project: Option<ProjectId>,
    text: String,
    yes: bool,
) -> anyhow::Result<End> {
    let key = key();
    let after = app.books.journal().end().await?;
    let incoming = Incoming {
        key: key.clone(),
        project,
        from: me(),
        text,
        yes,
    };
    let project = app.desk.message(incoming).await?;
    finish(context, app, &project, after, Until::Message(key)).await
}

/// Follows a project to the end of what was begun.
pub(super) async fn finish(
    context: &Context,
    app: &App,
    project: &ProjectId,
    after: Cursor,
    until: Until,
) -> anyhow::Result<End> {
    let printer = context.printer();
    let mut doing = Doing::begin(app).await?;
    let end = follow(app, &mut doing, project, after, until, &printer).await;
    doing.finish().await;
    let end = end?;
    printer.end(&end);
    Ok(end)
}

async fn open(context: &Context, record: Option<&Path>) -> anyhow::Result<App> {
    let app = App::open(context.config.clone(), context.redactor.clone(), record).await?;
    begin(context, &app)?;
    Ok(app)
}

/// Before work is taken on: what keeps it from being done ends the command, and what people should know is said. A run from
/// a tape says so, and so does one without a sandbox.
pub(super) fn begin(context: &Context, app: &App) -> anyhow::Result<()> {
    app.ready_to_work()?;
    let mut news = Vec::new();
    if let Some(tape) = &app.tape {
        news.push(format!(
            "Answers come from the {tape} tape, not from a model; everything else is real."
        ));
    }
    if let Some(reason) = &app.unconfined {
        news.push(format!(
            "Commands run UNCONFINED, with all your rights: {reason}. Only the tape that ships with Artel may do so."
        ));
    }
    for line in news {
        if context.json {
            words::complain(&format!("artel: {line}"));
        } else {
            words::say(&line);
        }
    }
    Ok(())
}

/// `artel new`.
pub(super) async fn new(context: &Context, args: NewArgs) -> anyhow::Result<u8> {
    let app = open(context, args.record.as_deref()).await?;
    let end = tell(context, &app, None, words(&args.text)?, args.yes).await?;
    Ok(end.exit_code())
}

/// `artel say`.
pub(super) async fn say(context: &Context, args: SayArgs) -> anyhow::Result<u8> {
    let app = open(context, args.record.as_deref()).await?;
    let project = app.desk.find(&args.project).await?;
    let end = tell(context, &app, Some(project), words(&args.text)?, args.yes).await?;
    Ok(end.exit_code())
}

/// `artel deploy`.
pub(super) async fn deploy(context: &Context, args: ProjectAndYes) -> anyhow::Result<u8> {
    let app = open(context, None).await?;
    let project = app.desk.find(&args.project).await?;
    let after = app.books.journal().end().await?;
    app.desk.redeploy(&project, &me(), &key(), args.yes).await?;
    Ok(finish(context, &app, &project, after, Until::Idle)
        .await?
        .exit_code())
}

/// `artel retry`.
pub(super) async fn retry(context: &Context, args: RetryArgs) -> anyhow::Result<u8> {
    let app = open(context, None).await?;
    let project = app.desk.find(&args.project).await?;
    let after = app.books.journal().end().await?;
    let task = args.task.map(TaskId::new);
    if !app.desk.retry(&project, task.as_ref(), &me()).await? {
        anyhow::bail!(
            "nothing of {} waits for another try; `artel status {}` shows where it stands",
            args.project,
            args.project
        );
    }
    Ok(finish(context, &app, &project, after, Until::Idle)
        .await?
        .exit_code())
}

/// What somebody says to a wait.
pub(super) enum Decision {
    /// The first option: yes.
    Yes,
    /// The last option: no.
    No,
    /// Words of their own, or an option's value.
    Words(String),
}

/// The values of options that mean yes and no, in the order in which they are looked for.
const YES: &[&str] = &[person::APPROVE, person::RAISE, person::RETRY, person::CHECK];
const NO: &[&str] = &[person::CANCEL, person::GIVE_UP];

/// The option that a text names, if it names one.
pub(super) fn chosen(wait: &WaitRow, text: &str) -> Option<String> {
    let text = text.trim();
    let is_named = |option: &&Choice| {
        option.value.eq_ignore_ascii_case(text) || option.label.eq_ignore_ascii_case(text)
    };
    let option = wait.options.iter().find(is_named)?;
    Some(option.value.clone())
}

/// `artel approve`, `reject` and `answer`.
pub(super) async fn decide(
    context: &Context,
    wait: &str,
    decision: Decision,
) -> anyhow::Result<u8> {
    let app = open(context, None).await?;
    let id = WaitId::new(wait);
    app.books.catch_up().await?;
    let Some(row) = app.store.wait(&id).await? else {
        anyhow::bail!("nothing waits under {wait:?}; `artel status` shows what waits");
    };
    let among = |words: &[&str]| {
        words
            .iter()
            .find_map(|word| row.options.iter().find(|option| option.value == *word))
            .map(|option| option.value.clone())
    };
    let offered: Vec<_> = row
        .options
        .iter()
        .map(|option| option.value.as_str())
        .collect();
    let (choice, text) = match decision {
        Decision::Yes => (among(YES), String::new()),
        Decision::No => (among(NO), String::new()),
        Decision::Words(text) => (chosen(&row, &text), text),
    };
    if choice.is_none() && (text.trim().is_empty() || !row.free_text) {
        anyhow::bail!(
            "this question is answered with one of: {}; write `artel answer {wait} ONE_OF_THEM`",
            offered.join(", ")
        );
    }
    let after = app.books.journal().end().await?;
    match app
        .desk
        .answer(&id, typed_answer(choice.as_deref(), &text, &me()))
        .await?
    {
        Answered::Accepted => {}
        Answered::Already => anyhow::bail!("this was answered before; nothing changed"),
        Answered::Gone => {
            anyhow::bail!("this question was withdrawn; `artel status` shows what waits now")
        }
    }
    Ok(finish(context, &app, &row.project, after, Until::Idle)
        .await?
        .exit_code())
}
