//! The command line: what can be typed, and nothing of what it does.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Need;

/// A crew that turns a described project into a running service, on your own machine.
#[derive(Parser, Debug)]
#[command(
    name = "artel",
    version,
    max_term_width = 100,
    propagate_version = true
)]
pub struct Cli {
    /// Print JSON, one object a line.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Set Artel up: asks for a model, a key and a bot token, and tries each.
    Init(InitArgs),
    /// Run everything: bot, runs, workers, health. Stops with Ctrl-C; deployed services go on.
    Up(UpArgs),
    /// Run threads, as one of any number of such processes on one PostgreSQL and one Redis.
    Runner,
    /// Do what one process at a time does for all: checks, deploys, results of workers; take over when another one ends.
    Scheduler,
    /// Speak with people over Telegram, and nothing else; take over when another one ends.
    Bot,
    /// Run coding workers for the jobs on the bus; also the program `spawner`. Needs no database.
    Spawner,
    /// Ask the process that answers at ARTEL_HTTP_ADDR how it is: for health checks.
    Health,
    /// Talk with the crew about a project, new or old.
    Chat(ChatArgs),
    /// Describe a new project and have it built.
    New(NewArgs),
    /// Say something about a project: a change, a question, an order.
    Say(SayArgs),
    /// List the projects.
    Projects,
    /// Show a project: its job, tasks, pull requests, cost and URL. Without a name: the latest.
    Status(OptionalProject),
    /// Deploy what is merged once more.
    Deploy(ProjectAndYes),
    /// Go back to the last good release.
    Rollback(ProjectArg),
    /// Stop a project's service.
    Stop(ProjectArg),
    /// Start a project's service again.
    Start(ProjectArg),
    /// Stop a project's service and delete its releases and its data; the repository stays.
    Remove(RemoveArgs),
    /// Put a finished project away: its service stops, it leaves the lists.
    Archive(ProjectArg),
    /// Stop the running job of a project, workers included.
    Cancel(ProjectArg),
    /// Try again what failed: a task, or the job.
    Retry(RetryArgs),
    /// Say yes to what waits.
    Approve(WaitArg),
    /// Say no to what waits.
    Reject(WaitArg),
    /// Answer what waits in your own words.
    Answer(AnswerArgs),
    /// Show what a project's crew did; with --service, what its service wrote.
    Logs(LogsArgs),
    /// Clone a project's repository.
    Clone(CloneArgs),
    /// Change what is recorded of a project.
    #[command(subcommand)]
    Project(ProjectCommand),
    /// Secrets of projects: set, list, remove. Values are never shown.
    #[command(subcommand)]
    Secrets(SecretsCommand),
    /// Draw the crew.
    Graph(GraphArgs),
    /// List the engine's threads.
    Threads(OptionalProject),
    /// Show the checkpoints of a thread, newest first.
    History(ThreadArg),
    /// Run a thread again from a checkpoint on a branch of its own, on recorded answers.
    Replay(ReplayArgs),
    /// Branch a thread off at a checkpoint, with a change to its state.
    Fork(ForkArgs),
    /// Bring the database up to this version.
    Migrate(MigrateArgs),
    /// Look whether everything that Artel needs is here and works.
    Doctor,
    /// The configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Run Artel as a service of this user.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Build the demo: a service from recorded answers, then a change to it.
    Demo,
    /// What Artel starts by itself.
    #[command(hide = true)]
    Internal {
        /// Which program, and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 1..)]
        args: Vec<std::ffi::OsString>,
    },
}

impl Command {
    /// What has to be configured for it.
    pub fn need(&self) -> Need {
        match self {
            Self::Runner | Self::Scheduler => Need::Servers,
            Self::Bot => Need::Bot,
            Self::Spawner => Need::Bus,
            Self::Init(_)
            | Self::Config(_)
            | Self::Service(_)
            | Self::Health
            | Self::Internal { .. } => Need::Nothing,
            _ => Need::Data,
        }
    }

    /// Whether it goes on until it is told to stop.
    pub fn lasts(&self) -> bool {
        matches!(
            self,
            Self::Up(_) | Self::Runner | Self::Scheduler | Self::Bot | Self::Spawner
        )
    }

    /// The name that traces have it under.
    pub fn service(&self) -> &'static str {
        match self {
            Self::Runner => "artel-runner",
            Self::Scheduler => "artel-scheduler",
            Self::Bot => "artel-bot",
            Self::Spawner => "artel-spawner",
            _ => "artel",
        }
    }
}

/// `artel init`.
#[derive(Args, Debug)]
pub struct InitArgs {
    /// Take everything from the environment and from --set, ask nothing.
    #[arg(long)]
    pub no_input: bool,
    /// A setting to write, such as ARTEL_MODEL=my-model; may be repeated.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Write the settings even when trying them failed.
    #[arg(long)]
    pub force: bool,
}

/// `artel up`.
#[derive(Args, Debug, Default)]
pub struct UpArgs {
    /// Record every model's answer into a tape.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
}

/// `artel chat`.
#[derive(Args, Debug)]
pub struct ChatArgs {
    /// The project; without one, what you say first founds a new one.
    pub project: Option<String>,
}

/// `artel new`.
#[derive(Args, Debug)]
pub struct NewArgs {
    /// What you want, in your own words; `-` reads it from standard input.
    pub text: String,
    /// Approve specification, plan and deploy within the budget; never money beyond it.
    #[arg(long)]
    pub yes: bool,
    /// Record every model's answer into a tape.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
}

/// `artel say`.
#[derive(Args, Debug)]
pub struct SayArgs {
    /// The project: its name or id.
    pub project: String,
    /// What you want, in your own words; `-` reads it from standard input.
    pub text: String,
    /// Approve what comes of it, within the budget.
    #[arg(long)]
    pub yes: bool,
    /// Record every model's answer into a tape.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
}

/// A project.
#[derive(Args, Debug)]
pub struct ProjectArg {
    /// The project: its name or id.
    pub project: String,
}

/// A project, or the latest.
#[derive(Args, Debug)]
pub struct OptionalProject {
    /// The project: its name or id.
    pub project: Option<String>,
}

/// A project and consent.
#[derive(Args, Debug)]
pub struct ProjectAndYes {
    /// The project: its name or id.
    pub project: String,
    /// Approve what comes of it, within the budget.
    #[arg(long)]
    pub yes: bool,
}

/// `artel remove`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// The project: its name or id.
    pub project: String,
    /// Do it without asking.
    #[arg(long)]
    pub yes: bool,
}

/// `artel retry`.
#[derive(Args, Debug)]
pub struct RetryArgs {
    /// The project: its name or id.
    pub project: String,
    /// The task; without one, whatever waits for it.
    pub task: Option<String>,
}

/// A wait.
#[derive(Args, Debug)]
pub struct WaitArg {
    /// The wait's id, as `artel status` shows it.
    pub wait: String,
}

/// `artel answer`.
#[derive(Args, Debug)]
pub struct AnswerArgs {
    /// The wait's id, as `artel status` shows it.
    pub wait: String,
    /// The answer.
    pub text: String,
}

/// `artel logs`.
#[derive(Args, Debug)]
pub struct LogsArgs {
    /// The project: its name or id.
    pub project: String,
    /// Go on showing what comes.
    #[arg(short, long)]
    pub follow: bool,
    /// What the deployed service wrote, instead of what the crew did.
    #[arg(long)]
    pub service: bool,
    /// What the workers of this task say, instead: phases, their output, addresses that they were refused.
    #[arg(short, long, value_name = "TASK", conflicts_with = "service")]
    pub task: Option<String>,
    /// End when the crew has nothing left to do but wait for people; the exit code says how it ended.
    #[arg(long, hide = true)]
    pub until_idle: bool,
    /// How many lines of the past.
    #[arg(short = 'n', long, default_value_t = 200)]
    pub lines: usize,
}

/// `artel clone`.
#[derive(Args, Debug)]
pub struct CloneArgs {
    /// The project: its name or id.
    pub project: String,
    /// Where to; by default a folder of the project's name.
    pub dir: Option<PathBuf>,
}

/// `artel project …`.
#[derive(Subcommand, Debug)]
pub enum ProjectCommand {
    /// Set a field.
    Set {
        /// The project: its name or id.
        project: String,
        /// What: `status` (deployed, stopped, archived) or `repo`.
        #[arg(value_parser = ["status", "repo"])]
        field: String,
        /// The new value.
        value: String,
    },
}

/// `artel secrets …`.
#[derive(Subcommand, Debug)]
pub enum SecretsCommand {
    /// Store a secret; the value is read from the terminal without showing it, or from standard input.
    Set {
        /// The project: its name or id.
        project: String,
        /// Its name, such as WEATHER_API_KEY.
        name: String,
    },
    /// List the names.
    List {
        /// The project: its name or id.
        project: String,
    },
    /// Delete a secret.
    Remove {
        /// The project: its name or id.
        project: String,
        /// Its name.
        name: String,
    },
}

/// `artel graph`.
#[derive(Args, Debug)]
pub struct GraphArgs {
    /// As what: mermaid, dot or svg.
    #[arg(long, default_value = "mermaid", value_parser = ["mermaid", "dot", "svg"])]
    pub format: String,
}

/// A thread.
#[derive(Args, Debug)]
pub struct ThreadArg {
    /// The thread, as `artel threads` shows it.
    pub thread: String,
}

/// `artel replay`.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// The thread.
    pub thread: String,
    /// The checkpoint to begin at, as `artel history` shows it.
    pub checkpoint: String,
    /// Ask the world again instead of using recorded answers.
    #[arg(long)]
    pub live: bool,
}

/// `artel fork`.
#[derive(Args, Debug)]
pub struct ForkArgs {
    /// The thread.
    pub thread: String,
    /// The checkpoint to branch off at.
    pub checkpoint: String,
    /// Channels to set, as a JSON object.
    #[arg(long, default_value = "{}")]
    pub update: String,
    /// The node as which the channels are set.
    #[arg(long)]
    pub as_node: Option<String>,
    /// Make the new branch the head, so that the thread goes on from it.
    #[arg(long)]
    pub head: bool,
}

/// `artel migrate`.
#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// Throw away what is made from the journal (the record, the ledger, the intents of the outbox) and make it again; nothing
    /// is sent twice.
    #[arg(long)]
    pub rebuild_projections: bool,
}

/// `artel config …`.
#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Explain every value and where it came from.
    Check,
}

/// `artel service …`.
#[derive(Subcommand, Debug)]
pub enum ServiceCommand {
    /// Write a systemd unit of this user that runs `artel up`, so that it survives a reboot.
    Install,
}
