//! `artel doctor`: looks whether everything that Artel needs is here and works.

use std::process::Command;

use serde::Serialize;

use crate::follow::print_json;

use super::Context;

#[derive(Serialize)]
struct Finding {
    what: &'static str,
    ok: bool,
    detail: String,
}

/// Looks at everything; the exit code is 1 when something that is needed does not work.
pub(super) async fn run(context: &Context) -> anyhow::Result<u8> {
    let mut findings = vec![
        program("git", &["--version"], "install git 2.38 or later"),
        program(
            "python3",
            &["--version"],
            "install python3: built services and their checks use it",
        ),
        finding(
            "sandbox",
            sandbox::Sandbox::detect()
                .map(|sandbox| sandbox.describe())
                .map_err(|error| error.to_string()),
        ),
    ];
    match context.app().await {
        Ok(app) => {
            findings.push(finding(
                "data folder",
                Ok(app.home.path().display().to_string()),
            ));
            findings.push(finding(
                "disk",
                crate::disk::enough(app.home.path())
                    .map(|()| "enough room".to_owned())
                    .map_err(|error| error.to_string()),
            ));
            findings.push(finding(
                "database",
                app.books
                    .catch_up()
                    .await
                    .map(|_| app.engine.checkpointer().name().to_owned())
                    .map_err(|error| error.to_string()),
            ));
            let working = match app.home.take_work()? {
                Some(_) => "nobody does the work at the moment (artel up); commands do their own"
                    .to_owned(),
                None => "an artel is up".to_owned(),
            };
            findings.push(finding("work", Ok(working)));
        }
        Err(error) => findings.push(finding("data folder", Err(format!("{error:#}")))),
    }
    findings.push(finding("model", model(context).await));
    if let Some(token) = &context.config.telegram_bot_token {
        findings.push(finding(
            "telegram",
            telegram(token.expose(), &context.config.telegram_api_url).await,
        ));
    }
    let mut code = 0;
    for found in findings {
        if !found.ok {
            code = 1;
        }
        if context.json {
            print_json(&found);
        } else {
            println!(
                "{:<5} {:<12} {}",
                if found.ok { "ok" } else { "FAIL" },
                found.what,
                found.detail
            );
        }
    }
    Ok(code)
}

fn finding(what: &'static str, result: Result<String, String>) -> Finding {
    let ok = result.is_ok();
    Finding {
        what,
        ok,
        detail: result.unwrap_or_else(|error| error),
    }
}

fn program(name: &'static str, args: &[&str], advice: &str) -> Finding {
    let result = match Command::new(name).args(args).output() {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(output) => Err(format!("{name} ends with {}: {advice}", output.status)),
        Err(error) => Err(format!("{name} cannot be started ({error}): {advice}")),
    };
    finding(name, result)
}

async fn model(context: &Context) -> Result<String, String> {
    let config = &context.config;
    if let Some(tape) = &config.tape {
        return Ok(format!("answers come from the tape {tape}"));
    }
    match (&config.openai_base_url, &config.model) {
        (Some(url), Some(model)) => try_model(url, config.openai_api_key.as_ref().map(super::super::config::SecretValue::expose), model).await,
        _ => Ok("none is configured, so the demo tape answers (OPENAI_BASE_URL, OPENAI_API_KEY, ARTEL_MODEL)".to_owned()),
    }
}

/// Asks the model something small.
pub(super) async fn try_model(url: &str, key: Option<&str>, model: &str) -> Result<String, String> {
    let key = key.map(|key| models::ApiKey::new(key.to_owned()));
    models::live_check(url, key.as_ref(), model)
        .await
        .map_err(|error| error.to_string())
}

/// Asks Telegram who the bot is.
pub(super) async fn telegram(token: &str, server: &str) -> Result<String, String> {
    let api = bot::api::Api::new(token, server).map_err(|error| error.to_string())?;
    let name = api.name().await.map_err(|error| error.to_string())?;
    Ok(format!("@{name}"))
}
