//! `artel doctor`: looks whether everything that Artel needs is here and works.

use std::process::Command;

use serde::Serialize;

use crate::config::SecretValue;
use crate::home::neighbours::Part;

use spawner::runtime::Runtime as _;

use super::Context;

/// What was found out about one thing.
#[derive(Serialize)]
pub(super) struct Finding {
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
        sandbox(),
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
            findings.push(finding("work", Ok(working(&app)?)));
            if let Some(url) = &context.config.redis_url {
                findings.push(finding("bus", bus(url).await));
            }
        }
        Err(error) => findings.push(finding("artel", Err(super::describe(&error).1))),
    }
    findings.push(finding("workers", workers(context).await));
    findings.push(finding("model", model(context).await));
    if let Some(token) = &context.config.telegram_bot_token {
        findings.push(finding(
            "telegram",
            telegram(token.expose(), &context.config.telegram_api_url).await,
        ));
    }
    Ok(u8::from(!show(context, &findings)))
}

/// Who does the work here.
fn working(app: &crate::app::App) -> anyhow::Result<String> {
    let all = [
        Part::Up,
        Part::Runner,
        Part::Scheduler,
        Part::Bot,
        Part::Spawner,
    ];
    let present = app.home.present(&all)?;
    if !present.is_empty() {
        return Ok(present.join(", "));
    }
    Ok(match app.home.take_work()? {
        Some(_) => {
            "nobody does the work at the moment (artel up); commands do their own".to_owned()
        }
        None => "an artel is up".to_owned(),
    })
}

/// Whether Redis answers and keeps what it is given, and which spawners live there.
async fn bus(url: &SecretValue) -> Result<String, String> {
    let transport = crate::bus::redis(url, None)
        .await
        .map_err(|e| e.to_string())?;
    if let Some(fault) = transport.may_lose().await.map_err(|e| e.to_string())? {
        return Err(fault);
    }
    let spawners = transport.spawners().await.map_err(|e| e.to_string())?;
    if spawners.is_empty() {
        return Ok("Redis answers; no spawner lives".to_owned());
    }
    let spawners: Vec<String> = spawners
        .iter()
        .map(|beat| format!("{} ({} of {})", beat.spawner, beat.running, beat.capacity))
        .collect();
    Ok(format!("Redis answers; spawners: {}", spawners.join(", ")))
}

/// Shows what was found; gives whether all of it is well.
pub(super) fn show(context: &Context, findings: &[Finding]) -> bool {
    for found in findings {
        let word = if found.ok { "ok" } else { "FAIL" };
        context.say(
            found,
            &format!("{word:<5} {:<12} {}", found.what, found.detail),
        );
    }
    findings.iter().all(|found| found.ok)
}

pub(super) fn finding(what: &'static str, result: Result<String, String>) -> Finding {
    let ok = result.is_ok();
    Finding {
        what,
        ok,
        detail: result.unwrap_or_else(|error| error),
    }
}

/// Whether commands can be confined here.
pub(super) fn sandbox() -> Finding {
    let found = sandbox::Sandbox::detect();
    finding(
        "sandbox",
        found
            .map(|sandbox| sandbox.describe())
            .map_err(|error| error.to_string()),
    )
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

/// Where workers run, and whether they can.
async fn workers(context: &Context) -> Result<String, String> {
    if context.config.docker_runtime.is_none() {
        return Ok("they run in the sandbox (SPAWNER_RUNTIME)".to_owned());
    }
    let home = std::path::Path::new("");
    match crate::work::containers(&context.config, home, "doctor").await {
        Ok(containers) => Ok(containers.map(|it| it.describe()).unwrap_or_default()),
        Err(error) => Err(super::describe(&error).1),
    }
}

async fn model(context: &Context) -> Result<String, String> {
    let config = &context.config;
    if let Some(tape) = &config.tape {
        return Ok(format!("answers come from the tape {tape}"));
    }
    let Some(url) = &config.openai_base_url else {
        return Ok(
            "none is configured, so the demo tape answers (OPENAI_BASE_URL, OPENAI_API_KEY, ARTEL_MODEL)"
                .to_owned(),
        );
    };
    let key = config.openai_api_key.as_ref().map(SecretValue::expose);
    try_model(url, key, config.model.as_deref()).await
}

/// Asks the model something small; without a name, the only one that there is.
pub(super) async fn try_model(
    url: &str,
    key: Option<&str>,
    model: Option<&str>,
) -> Result<String, String> {
    let key = key.map(|key| models::ApiKey::new(key.to_owned()));
    let model = match model {
        Some(model) => model.to_owned(),
        None => match crate::app::only_model(url, key.as_ref()).await {
            (model, None) => model,
            (_, Some(unclear)) => return Err(unclear),
        },
    };
    models::live_check(url, key.as_ref(), &model)
        .await
        .map_err(|error| error.to_string())
}

/// Asks Telegram who the bot is.
pub(super) async fn telegram(token: &str, server: &str) -> Result<String, String> {
    let api = bot::api::Api::new(token, server).map_err(|error| error.to_string())?;
    let name = api.name().await.map_err(|error| error.to_string())?;
    Ok(format!("@{name}"))
}
