//! The command line: `[--workspace DIR] [--task FILE] [NAME | command -- PROGRAM ARG…]`.

use crate::adapters::{self, Adapter};
use crate::agent::{self, Agent};
use crate::broker::{Broker, Report};
use crate::command;
use crate::environment::Environment;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str =
    "usage: artel-agent [--workspace DIR] [--task FILE] [NAME | command -- PROGRAM ARG…]";

/// What the command line asks for.
struct Arguments {
    workspace: PathBuf,
    task: Option<PathBuf>,
    agent: Choice,
}

/// Who does the work.
enum Choice {
    /// The agent in this program.
    BuiltIn,
    /// Somebody else's.
    External(&'static Adapter),
    /// This argument vector.
    Command(Vec<OsString>),
}

/// Runs the agent, or the `command` adapter, to its report. `args` are those after the program's
/// name and sub-commands.
///
/// Exit codes: 0 success was reported, 1 anything else was reported or could not be, 2 bad use.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = args.into_iter().peekable();
    match args.peek().and_then(|arg| arg.to_str()) {
        Some("--version") => {
            println!("artel-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some("--help") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let arguments = match parse(args) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("artel-agent: {message}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let environment = match Environment::from_process() {
        Ok(environment) => environment,
        Err(error) => {
            eprintln!("artel-agent: {error}");
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("artel-agent: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    let code = runtime.block_on(run(arguments, environment));
    // A command that reads for ever must not keep us: what is left ends with the process.
    runtime.shutdown_background();
    code
}

async fn run(arguments: Arguments, environment: Environment) -> ExitCode {
    let broker = match Broker::new(&environment) {
        Ok(broker) => broker,
        Err(error) => {
            eprintln!("artel-agent: {error}");
            return ExitCode::from(2);
        }
    };
    let workspace = arguments.workspace;
    let task = arguments
        .task
        .unwrap_or_else(|| workspace.join(".artel/TASK.md"));
    let mut built_in = None;
    let report = match arguments.agent {
        Choice::Command(argv) => command::run(&argv, &workspace, &task, &environment).await,
        Choice::External(adapter) => {
            adapters::run(adapter, &workspace, &task, &environment, &broker).await
        }
        Choice::BuiltIn => {
            let options = agent::Options::new(workspace, task, environment);
            let agent = built_in.insert(Agent::new(options, broker.clone()));
            agent.run().await
        }
    };
    println!("artel-agent: {}", report.line());
    let told = broker.report(&report).await;
    if let (Ok(()), Some(agent)) = (&told, &built_in)
        && let Err(error) = agent.reported()
    {
        eprintln!("artel-agent: {error}; the next attempt may report the same once more");
    }
    match told {
        Ok(()) if matches!(report, Report::Succeeded { .. }) => ExitCode::SUCCESS,
        Ok(()) => ExitCode::from(1),
        Err(error) => {
            eprintln!("artel-agent: the result could not be reported: {error}");
            ExitCode::from(1)
        }
    }
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        workspace: PathBuf::from("/workspace"),
        task: None,
        agent: Choice::BuiltIn,
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = |name: &str| args.next().ok_or(format!("{name} needs a value"));
        match arg.to_str() {
            Some("--workspace") => arguments.workspace = value("--workspace")?.into(),
            Some("--task") => arguments.task = Some(value("--task")?.into()),
            Some("command") => {
                if args.next().as_deref() != Some("--".as_ref()) {
                    return Err("`command` is followed by `--` and the program".to_owned());
                }
                let argv: Vec<OsString> = args.by_ref().collect();
                if argv.is_empty() {
                    return Err("`command --` needs a program".to_owned());
                }
                arguments.agent = Choice::Command(argv);
            }
            Some("artel-agent") => arguments.agent = Choice::BuiltIn,
            other => match other.and_then(adapters::named) {
                Some(adapter) => arguments.agent = Choice::External(adapter),
                None => return Err(format!("unknown argument {}", arg.display())),
            },
        }
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &[&str]) -> Result<Arguments, String> {
        parse(line.iter().map(OsString::from))
    }

    #[test]
    fn everything_behind_the_dashes_is_the_command() {
        let parsed = words(&["--workspace", "/w", "command", "--", "sh", "--task"]).unwrap();
        assert_eq!(parsed.workspace, PathBuf::from("/w"));
        assert!(matches!(parsed.agent, Choice::Command(argv) if argv == ["sh", "--task"]));
        assert!(matches!(words(&[]).unwrap().agent, Choice::BuiltIn));
    }

    #[test]
    fn every_adapter_is_chosen_by_its_name() {
        for adapter in adapters::ALL {
            let parsed = words(&["--workspace", "/w", adapter.name]).unwrap();
            assert!(matches!(parsed.agent, Choice::External(found) if found.name == adapter.name));
        }
        let parsed = words(&["artel-agent"]).unwrap();
        assert!(matches!(parsed.agent, Choice::BuiltIn));
    }

    #[test]
    fn bad_use_is_named() {
        for (line, said) in [
            (&["--workspace"][..], "--workspace needs a value"),
            (&["command", "sh"], "`--`"),
            (&["command", "--"], "needs a program"),
            (&["--verbose"], "unknown argument --verbose"),
        ] {
            let error = words(line).err().unwrap();
            assert!(error.contains(said), "{line:?}: {error}");
        }
    }
}
