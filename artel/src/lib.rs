//! The program: command line, configuration, and the composition of everything else. Two binaries are made of it, `artel` and
//! `spawner`.

mod app;
mod books;
mod bus;
mod cli;
mod commands;
mod config;
mod crash;
mod desk;
mod disk;
mod errands;
mod follow;
mod health;
mod home;
mod lead;
mod lines;
mod place;
mod settings;
mod spending;
mod traces;
mod watch;
mod words;
mod work;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use ports::Plaintext;
use secrets::Redactor;

use crate::cli::{Cli, Command};
use crate::commands::Context;
use crate::config::{Config, GitHubLogin};

/// The program `artel` with its arguments, its own name first.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    run(Cli::parse_from(args))
}

/// The program `spawner` with its arguments, its own name first: what can be said to it is what can be said to
/// `artel spawner`, and `health`.
pub fn spawner(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = args.into_iter().skip(1).peekable();
    let own = ["internal", "health"];
    let first = args.peek().and_then(|word| word.to_str());
    let word = match first.and_then(|first| own.into_iter().find(|own| *own == first)) {
        Some(word) => {
            args.next();
            word
        }
        None => "spawner",
    };
    let words = ["artel", word].into_iter().map(OsString::from);
    run(Cli::parse_from(words.chain(args)))
}

fn run(cli: Cli) -> ExitCode {
    if let Command::Internal { args } = cli.command {
        return internal(args);
    }
    // One provider of cryptography for everybody, before anybody needs it.
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        words::complain("artel: another TLS provider was installed before ours");
        return ExitCode::FAILURE;
    }
    let config = match std::env::current_dir()
        .map_err(anyhow::Error::from)
        .and_then(|folder| {
            let config = Config::load(&folder)?;
            config.fits(cli.command.need())?;
            Ok(config)
        }) {
        Ok(config) => config,
        Err(error) => {
            words::complain(&format!("artel: {error:#}"));
            return ExitCode::from(2);
        }
    };
    let redactor = redactor(&config);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            words::complain(&format!("artel: the runtime cannot be started: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        let _telemetry = match telemetry(&cli, &config, &redactor) {
            Ok(guard) => guard,
            Err(error) => {
                words::complain(&format!("artel: {error}"));
                return ExitCode::from(2);
            }
        };
        let context = Context {
            config,
            redactor,
            json: cli.json,
        };
        commands::run(&context, cli).await
    });
    // Reads of standard input cannot be taken back; they do not hold up the end.
    runtime.shutdown_background();
    code
}

/// Programs that Artel starts by itself.
fn internal(args: Vec<OsString>) -> ExitCode {
    let mut args = args.into_iter();
    match args.next().as_deref().and_then(|name| name.to_str()) {
        Some("launch") => sandbox::launcher::main(args),
        // In images that carry the whole program, as `artel-inside` has it in all others.
        Some("wait") => ::spawner::runtime::wait_for_go(args),
        Some("agent") => {
            // It asks the broker over plain HTTP on loopback, but the client wants a provider all the same.
            let _ = rustls::crypto::ring::default_provider().install_default();
            worker::main(args)
        }
        Some("supervise") => {
            let _ = rustls::crypto::ring::default_provider().install_default();
            deploy::supervisor::main(args)
        }
        other => {
            words::complain(&format!(
                "artel internal: {other:?} is nothing that Artel starts"
            ));
            ExitCode::from(2)
        }
    }
}

/// Knows the configuration's own secrets, so that they leave by no exit.
fn redactor(config: &Config) -> Redactor {
    let redactor = Redactor::new();
    let github_token = match &config.github {
        Some(GitHubLogin::Token(token)) => Some(token.clone()),
        // What an app gets has a form that is known.
        Some(GitHubLogin::App(..)) | None => None,
    };
    for (name, value) in [
        ("OPENAI_API_KEY", &config.openai_api_key),
        ("ANTHROPIC_API_KEY", &config.anthropic_api_key),
        ("GITHUB_TOKEN", &github_token),
        ("TELEGRAM_BOT_TOKEN", &config.telegram_bot_token),
        ("DATABASE_URL", &config.database_url),
        ("REDIS_URL", &config.redis_url),
        ("SOPS_AGE_KEY", &config.age_key),
    ] {
        if let Some(value) = value {
            redactor.add(name, &Plaintext::new(value.expose().to_owned()));
        }
    }
    // An address is often shown in parts. A short password could be a word that people use.
    for (name, address) in [
        ("DATABASE_URL", &config.database_url),
        ("REDIS_URL", &config.redis_url),
    ] {
        let address = address.as_ref();
        if let Some(address) = address.and_then(|address| url::Url::parse(address.expose()).ok())
            && let Some(password) = address.password().filter(|password| password.len() >= 12)
        {
            redactor.add(name, &Plaintext::new(password.to_owned()));
        }
    }
    redactor
}

fn telemetry(
    cli: &Cli,
    config: &Config,
    redactor: &Redactor,
) -> Result<telemetry::Guard, telemetry::Error> {
    let quiet = !cli.command.lasts();
    let filter = match config.log_filter.as_str() {
        // How long a statement took on a busy machine is nothing that a person at a terminal can do something about.
        "" if quiet => Some("warn,sqlx=error".to_owned()),
        "" => None,
        filter => Some(filter.to_owned()),
    };
    let redactor = redactor.clone();
    telemetry::init(&telemetry::Options {
        format: if config.log_json {
            telemetry::Format::Json
        } else {
            telemetry::Format::Text
        },
        filter,
        otlp_endpoint: config.otlp_endpoint.clone(),
        // Secrets are looked for in what is seen.
        redact: Arc::new(move |text: &str| redactor.redact(&ports::plain(text)).into_owned()),
        ..telemetry::Options::new(cli.command.service())
    })
}
