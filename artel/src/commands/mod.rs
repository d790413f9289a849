//! What the subcommands do.

mod chat;
mod demo;
mod doctor;
mod init;
mod lasting;
mod logs;
mod manage;
mod show;
mod talk;
mod terminal;
mod up;

use std::process::ExitCode;

use ports::{FrontDesk, PersonId, ProjectId};
use secrets::Redactor;

use crate::app::App;
use crate::cli::{Cli, Command, ConfigCommand, GraphArgs};
use crate::config::Config;
use crate::follow::Printer;
use crate::lines::{End, EndError, EndStatus};
use crate::words::{self, print_json};

/// What a command works with.
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// Takes known secrets out of texts.
    pub redactor: Redactor,
    /// Whether to print JSON.
    pub json: bool,
}

impl Context {
    async fn app(&self) -> anyhow::Result<App> {
        App::open(self.config.clone(), self.redactor.clone(), None).await
    }

    /// Says what a command did: as an object for programs, in words for people.
    fn say(&self, value: &impl serde::Serialize, words: &str) {
        if self.json {
            print_json(value);
        } else {
            words::say(words);
        }
    }

    fn printer(&self) -> Printer {
        Printer { json: self.json }
    }
}

/// Who sits at this terminal.
pub fn me() -> PersonId {
    let name = std::env::var("USER").ok().filter(|name| !name.is_empty());
    PersonId::new(format!("local:{}", name.as_deref().unwrap_or("somebody")))
}

/// The project that somebody means; without a name, the one that changed last.
async fn project_of(app: &App, name: Option<&str>) -> anyhow::Result<ProjectId> {
    match name {
        Some(name) => Ok(app.desk.find(name).await?),
        None => app
            .desk
            .projects()
            .await?
            .into_iter()
            .next()
            .map(|project| project.id)
            .ok_or_else(|| {
                anyhow::anyhow!("there are no projects yet: artel new \"what you want\"")
            }),
    }
}

/// Runs a command; the exit code is 0, 1 failed, 2 bad use, 3 waits for a person.
pub async fn run(context: &Context, cli: Cli) -> ExitCode {
    let long = matches!(
        cli.command,
        Command::New(_)
            | Command::Say(_)
            | Command::Deploy(_)
            | Command::Retry(_)
            | Command::Approve(_)
            | Command::Reject(_)
            | Command::Answer(_)
            | Command::Demo
    );
    match dispatch(context, cli.command).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let (kind, mut message) = describe(&error);
            if message.contains("disk is full") && !message.contains("make room") {
                let home = context.config.home.display();
                message = format!("{message}; make room on the disk of {home}, then try again");
            }
            if context.json && long {
                let mut end = End::new(None, EndStatus::Failed);
                end.error = Some(EndError {
                    code: kind,
                    message,
                    action: "see `artel doctor`".to_owned(),
                });
                print_json(&end);
            } else {
                words::complain(&format!("artel: {message}"));
            }
            if is_bad_use(&error) {
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Whether the configuration has to be mended first.
fn is_bad_use(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<crate::config::Error>()
            || cause.is::<spawner::AppError>()
            || cause.is::<models::ConfigError>()
            || cause.is::<models::TapeError>()
    })
}

/// An error in a sentence, with its causes, and a stable name for it.
fn describe(error: &anyhow::Error) -> (String, String) {
    let kind = error
        .downcast_ref::<ports::Failure>()
        .map_or_else(|| "error".to_owned(), |failure| failure.kind.clone());
    let mut message = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        // Many errors already say their cause.
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
    }
    (kind, message)
}

async fn dispatch(context: &Context, command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Init(args) => init::run(context, args).await,
        Command::Up(args) => up::run(context, args).await,
        Command::Runner => lasting::runner(context).await,
        Command::Scheduler => lasting::scheduler(context).await,
        Command::Bot => lasting::bot(context).await,
        Command::Spawner => lasting::spawner(context).await,
        Command::Health => lasting::health(context).await,
        Command::Chat(args) => chat::run(context, args).await,
        Command::New(args) => talk::new(context, args).await,
        Command::Say(args) => talk::say(context, args).await,
        Command::Deploy(args) => talk::deploy(context, args).await,
        Command::Retry(args) => talk::retry(context, args).await,
        Command::Approve(args) => talk::decide(context, &args.wait, talk::Decision::Yes).await,
        Command::Reject(args) => talk::decide(context, &args.wait, talk::Decision::No).await,
        Command::Answer(args) => {
            talk::decide(context, &args.wait, talk::Decision::Words(args.text)).await
        }
        Command::Demo => demo::run(context).await,
        Command::Projects => show::projects(context).await,
        Command::Status(args) => show::status(context, args.project.as_deref()).await,
        Command::Logs(args) => logs::logs(context, args).await,
        Command::Graph(GraphArgs { format }) => show::graph(context, &format).await,
        Command::Threads(args) => show::threads(context, args.project.as_deref()).await,
        Command::History(args) => show::history(context, &args.thread).await,
        Command::Replay(args) => show::replay(context, args).await,
        Command::Fork(args) => show::fork(context, args).await,
        Command::Rollback(args) => manage::rollback(context, &args.project).await,
        Command::Stop(args) => {
            manage::service(context, &args.project, ports::ServiceOrder::Stop).await
        }
        Command::Start(args) => {
            manage::service(context, &args.project, ports::ServiceOrder::Start).await
        }
        Command::Archive(args) => {
            manage::service(context, &args.project, ports::ServiceOrder::Archive).await
        }
        Command::Remove(args) => manage::remove(context, args).await,
        Command::Cancel(args) => manage::cancel(context, &args.project).await,
        Command::Clone(args) => manage::clone(context, args).await,
        Command::Project(command) => manage::project(context, command).await,
        Command::Secrets(command) => manage::secrets(context, command).await,
        Command::Migrate(args) => manage::migrate(context, &args).await,
        Command::Service(_) => manage::install_service(context),
        Command::Doctor => doctor::run(context).await,
        Command::Config(ConfigCommand::Check) => Ok(show::config(context)),
        // Taken care of before there is a configuration.
        Command::Internal { .. } => Ok(2),
    }
}
