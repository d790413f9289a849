//! `artel init`: the first run. Asks for what is needed, tries each live, and writes it where only this user reads it.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;

use crate::cli::InitArgs;
use crate::config::SecretValue;
use crate::home::Home;
use crate::settings;
use crate::words;

use super::{Context, doctor, terminal};

/// Asks, tries, writes.
pub(super) async fn run(context: &Context, args: InitArgs) -> anyhow::Result<u8> {
    let config = &context.config;
    let home = Home::open(&config.home)?;
    let mut values = BTreeMap::new();
    for pair in &args.set {
        let Some((name, value)) = pair.split_once('=') else {
            anyhow::bail!("--set {pair:?} is not NAME=VALUE");
        };
        anyhow::ensure!(
            settings::all().any(|setting| setting.name == name),
            "{name:?} is no setting; `artel config check` lists them"
        );
        values.insert(name.to_owned(), value.to_owned());
    }

    let known = |values: &BTreeMap<String, String>, name: &str, fallback: Option<&str>| {
        values
            .get(name)
            .cloned()
            .or_else(|| fallback.map(str::to_owned))
    };
    let mut url = known(
        &values,
        "OPENAI_BASE_URL",
        config.openai_base_url.as_deref(),
    );
    let mut model = known(&values, "ARTEL_MODEL", config.model.as_deref());
    let mut key = known(
        &values,
        "OPENAI_API_KEY",
        config.openai_api_key.as_ref().map(SecretValue::expose),
    );
    let mut token = known(
        &values,
        "TELEGRAM_BOT_TOKEN",
        config.telegram_bot_token.as_ref().map(SecretValue::expose),
    );
    let ask = !args.no_input && std::io::stdin().is_terminal();
    if ask {
        words::say("An OpenAI-compatible endpoint, with /v1; nothing for the demo tape.");
        url = terminal::ask("OPENAI_BASE_URL", url.as_deref())?;
        if url.is_some() {
            model = terminal::ask("ARTEL_MODEL", model.as_deref())?;
            if key.is_none() {
                key = terminal::ask_secret("OPENAI_API_KEY")
                    .ok()
                    .map(|key| key.expose().to_owned());
            }
        }
        words::say("A Telegram bot's token (from BotFather); nothing for the terminal only.");
        if token.is_none() {
            token = terminal::ask_secret("TELEGRAM_BOT_TOKEN")
                .ok()
                .map(|token| token.expose().to_owned());
        }
    }

    let mut findings = Vec::new();
    let tried = match &url {
        Some(url) => doctor::try_model(url, key.as_deref(), model.as_deref()).await,
        None => Ok("none: the demo tape answers".to_owned()),
    };
    findings.push(doctor::finding("model", tried));
    let server =
        known(&values, "TELEGRAM_API_URL", Some(&config.telegram_api_url)).unwrap_or_default();
    let tried = match &token {
        Some(token) => doctor::telegram(token, &server).await,
        None => Ok("none: talk with `artel chat`".to_owned()),
    };
    findings.push(doctor::finding("telegram", tried));
    findings.push(doctor::sandbox());
    if !doctor::show(context, &findings) && !args.force {
        anyhow::bail!("nothing was written; mend what failed, or add --force");
    }

    for (name, value) in [
        ("OPENAI_BASE_URL", url),
        ("ARTEL_MODEL", model),
        ("OPENAI_API_KEY", key),
        ("TELEGRAM_BOT_TOKEN", token),
    ] {
        if let Some(value) = value {
            values.insert(name.to_owned(), value);
        }
    }
    let file = home.join(".env");
    write(&file, &values)?;
    context.say(
        &serde_json::json!({"file": file}),
        &format!(
            "written to {}; next: artel up, or artel chat",
            file.display()
        ),
    );
    Ok(0)
}

/// Replaces the file as a whole, readable for this user alone; settings that it had and that were not asked for stay.
fn write(file: &std::path::Path, values: &BTreeMap<String, String>) -> anyhow::Result<()> {
    let mut all = BTreeMap::new();
    if file.is_file() {
        for pair in dotenvy::from_path_iter(file)? {
            let (name, value) = pair?;
            all.insert(name, value);
        }
    }
    all.extend(values.clone());
    let part = file.with_extension("part");
    let mut out = std::fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)?;
    writeln!(
        out,
        "# Written by `artel init`. `artel config check` explains each setting."
    )?;
    for (name, value) in all {
        let quoted = value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('$', "\\$");
        writeln!(out, "{name}=\"{quoted}\"")?;
    }
    out.sync_all()?;
    std::fs::rename(&part, file)?;
    Ok(())
}
