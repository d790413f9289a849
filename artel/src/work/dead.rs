//! What processes held that died on this data folder is let go.

use std::sync::Arc;

use protocol::Transport;

use crate::app::App;
use crate::home::Home;
use crate::home::neighbours::Part;

/// The name under which a process has leases that works on a data folder alone.
pub(super) fn alone(home: &Home) -> String {
    format!("home:{}", home.path().display())
}

/// Lets go of what processes held that died on this data folder, so that nobody waits for their leases to run out.
pub(super) async fn bury_the_dead(app: &App) -> anyhow::Result<()> {
    let home = app.home.clone();
    for gone in tokio::task::spawn_blocking(move || home.gone()).await?? {
        let runs = app.engine.checkpointer().break_leases(&gone.name).await?;
        let leases = app.store.bury_process(&gone.name).await?;
        let messages = match app.bus.transport() {
            Some(transport) => transport.abandon(&gone.name).await?,
            None => 0,
        };
        tracing::warn!(
            process = gone.name,
            runs,
            ?leases,
            messages,
            "{} died; what it held is free",
            gone.name
        );
        gone.forget();
    }
    Ok(())
}

/// The same for a process without a database: the jobs that a spawner held which died on this data folder are offered again at
/// once, and its workers adopted, if they outlived it.
pub(super) async fn take_over_jobs(
    home: &Home,
    transport: &Arc<dyn Transport>,
) -> anyhow::Result<()> {
    let home = home.clone();
    for gone in tokio::task::spawn_blocking(move || home.gone()).await?? {
        let messages = transport.abandon(&gone.name).await?;
        tracing::warn!(
            process = gone.name,
            messages,
            "{} died; the jobs that it held are free",
            gone.name
        );
        // What others held besides jobs is found by whoever has the database.
        if gone
            .name
            .starts_with(&format!("{}-", Part::Spawner.as_str()))
        {
            gone.forget();
        }
    }
    Ok(())
}
