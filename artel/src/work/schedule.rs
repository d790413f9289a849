//! What one process at a time does for all.

use std::future::Future;
use std::sync::Arc;

use protocol::Transport;
use tokio_util::sync::CancellationToken;

use super::PATIENCE;
use super::parts::Parts;
use crate::app::App;
use crate::bus;
use crate::errands::Runner;
use crate::watch::Watch;

/// What one process at a time does for all.
pub(super) fn schedule(app: &App, transport: &Arc<dyn Transport>, parts: &mut Parts) {
    parts.add("projections", projections(app.clone()));
    let errands = Runner {
        desk: app.errands.clone(),
        forge: app.forge.clone(),
        deployer: Arc::new(app.deployer.clone()),
        engine: app.engine.clone(),
    };
    parts.add("errands", |token| async move {
        errands.run(token).await;
        Ok(())
    });
    let tally = app.bus.tally().cloned();
    let watch = Watch {
        store: app.store.clone(),
        transport: transport.clone(),
        tally: tally.clone(),
        patience: app.worker_patience,
    };
    parts.add("watch", |token| async move {
        watch.run(token).await;
        Ok(())
    });
    let (results, engine) = (transport.clone(), app.engine.clone());
    parts.add("results", |token| async move {
        bus::deliver_results(results, engine, tally, token).await;
        Ok(())
    });
}

/// Starts services again that died.
pub(super) async fn reconcile(app: &App) {
    for (project, found) in app.deployer.reconcile().await {
        match found {
            deploy::Reconciled::Started => {
                tracing::info!(%project, "a service that had died was started again");
            }
            deploy::Reconciled::Failed(failure) => {
                tracing::error!(%project, %failure, "a service could not be started again");
            }
            _ => {}
        }
    }
}

/// Keeps the projections up to date.
pub(super) fn projections(
    app: App,
) -> impl FnOnce(CancellationToken) -> std::pin::Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>
{
    move |token| {
        Box::pin(async move {
            let journal = app.engine.journal();
            loop {
                let cursor = match app.books.catch_up().await {
                    Ok(cursor) => {
                        app.moved.notify_waiters();
                        cursor
                    }
                    Err(error) => {
                        tracing::error!(%error, "the projections could not be brought up to date");
                        app.books.journal().end().await.unwrap_or_default()
                    }
                };
                tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    changed = journal.changed(cursor, PATIENCE) => {
                        if let Err(error) = changed {
                            tracing::error!(%error, "the journal cannot be read");
                            tokio::time::sleep(PATIENCE).await;
                        }
                    }
                }
            }
        })
    }
}
