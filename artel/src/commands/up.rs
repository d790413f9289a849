//! `artel up`: everything, until it is told to stop.

use std::time::Duration;

use crate::app::App;
use crate::cli::UpArgs;
use crate::home::neighbours::Part;
use crate::work::Work;

use super::Context;
use super::lasting::{Stop, right, until_told};

/// How long a pairing code is good for.
const PAIRING: Duration = Duration::from_hours(1);

/// Runs until SIGINT or SIGTERM.
pub(super) async fn run(context: &Context, args: UpArgs) -> anyhow::Result<u8> {
    let app = App::open(
        context.config.clone(),
        context.redactor.clone(),
        args.record.as_deref(),
    )
    .await?;
    app.ready_to_work()?;
    let stop = Stop::listen()?;
    let Some(held) = right(context, &app.home, app.is_shared(), &stop).await? else {
        return Ok(0);
    };
    let mut work = Work::start(&app, held, Part::Up).await?;
    work.lasts();
    let ready = work.health(&app.config, app.needs()).await?;
    let (version, home) = (env!("CARGO_PKG_VERSION"), app.home.path());
    context.say(
        &serde_json::json!({"up": true, "version": version, "home": home, "health": format!("{ready}/health")}),
        &format!(
            "artel {version} is up on {}, health at {ready}/health",
            home.display()
        ),
    );
    super::talk::begin(context, &app)?;
    if app.config.telegram_bot_token.is_some() {
        work.bot(&app).await?;
        say_pairing_code(context, &app).await?;
    } else {
        let text = "no Telegram (TELEGRAM_BOT_TOKEN is not set); talk with: artel chat";
        context.say(&serde_json::json!({ "note": text }), text);
    }
    until_told(work, &stop).await
}

/// Tells whoever sits at the terminal how to become known to the bot, when nobody is.
pub(super) async fn say_pairing_code(context: &Context, app: &App) -> anyhow::Result<()> {
    if !app.config.allowed_users.is_empty() {
        return Ok(());
    }
    let code = app.store.new_pairing_code(PAIRING).await?;
    context.say(
        &serde_json::json!({"pairing_code": code.expose()}),
        &format!(
            "send this pairing code to your bot within an hour: {}",
            code.expose()
        ),
    );
    Ok(())
}
