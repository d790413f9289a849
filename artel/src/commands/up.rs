//! `artel up`: everything, until it is told to stop.

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::cli::UpArgs;
use crate::home::Held;
use crate::work::Work;

use super::Context;

/// How often a process that waits to take over looks whether it can.
const LOOK: Duration = Duration::from_millis(200);
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
    let stop = CancellationToken::new();
    let (mut interrupt, mut terminate) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        told.cancel();
    });

    let Some(held) = wait_for_work(context, &app, &stop).await? else {
        return Ok(0);
    };
    let mut work = Work::start(&app, held).await?;
    work.lasts();
    let ready = health(&app, &mut work).await?;
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
        if app.config.allowed_users.is_empty() {
            let code = app.store.new_pairing_code(PAIRING).await?;
            context.say(
                &serde_json::json!({"pairing_code": code.expose()}),
                &format!(
                    "send this pairing code to your bot within an hour: {}",
                    code.expose()
                ),
            );
        }
    } else {
        let text = "no Telegram (TELEGRAM_BOT_TOKEN is not set); talk with: artel chat";
        context.say(&serde_json::json!({ "note": text }), text);
    }

    let broken = tokio::select! {
        () = stop.cancelled() => None,
        error = work.broken() => Some(error),
    };
    work.stop().await;
    match broken {
        None => Ok(0),
        Some(error) => Err(error),
    }
}

/// Takes the work on, after whoever does it now; `None` when told to stop before.
async fn wait_for_work(
    context: &Context,
    app: &App,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Held>> {
    let mut said = false;
    loop {
        if let Some(held) = app.home.take_work()? {
            return Ok(Some(held));
        }
        if !said {
            let text = format!(
                "another artel does the work on {}; this one takes over when it ends",
                app.home.path().display()
            );
            context.say(&serde_json::json!({ "note": text }), &text);
            said = true;
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Answers `/health`; gives the address.
async fn health(app: &App, work: &mut Work) -> anyhow::Result<String> {
    let listener = tokio::net::TcpListener::bind(app.config.http_addr).await.map_err(|error| {
        anyhow::anyhow!(
            "{} cannot be listened on: {error}; set ARTEL_HTTP_ADDR to another address, 127.0.0.1:0 for any free port",
            app.config.http_addr
        )
    })?;
    let address = format!("http://{}", listener.local_addr()?);
    let router = Router::new()
        .route("/health", get(readiness))
        .route("/health/liveness", get(|| async { "alive\n" }))
        .route("/health/readiness", get(readiness))
        .with_state(app.clone());
    work.part("health", |token| async move {
        axum::serve(listener, router)
            .with_graceful_shutdown(token.cancelled_owned())
            .await?;
        Ok(())
    });
    Ok(address)
}

async fn readiness(State(app): State<App>) -> (StatusCode, axum::Json<serde_json::Value>) {
    let database = app
        .books
        .journal()
        .end()
        .await
        .map_err(|error| error.to_string());
    let disk = crate::disk::enough(app.home.path()).map_err(|error| error.to_string());
    let fine = database.is_ok() && disk.is_ok();
    let status = if fine {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let word = |result: Result<(), String>| result.err().unwrap_or_else(|| "ok".to_owned());
    let body = serde_json::json!({
        "status": if fine { "ready" } else { "not ready" },
        "database": word(database.map(|_| ())),
        "disk": word(disk),
    });
    (status, axum::Json(body))
}
