//! What one process at a time does for all, where several share a database: whoever has the lease does it, and another one takes
//! over when it ends, however it ends.

use std::future::Future;
use std::time::Duration;

use store::Store;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a lease holds without renewal.
const LEASE: Duration = Duration::from_secs(15);
/// How often it is renewed.
const BEAT: Duration = Duration::from_secs(3);
/// How long the database may be silent until this process takes the lease for lost; the rest of it is for coming to an end.
const SILENCE: Duration = Duration::from_secs(9);
/// How often it is looked whether it is free.
const LOOK: Duration = Duration::from_millis(500);
/// How long the work may take to end when the lease is lost.
const END: Duration = Duration::from_secs(5);

/// Does `work` whenever the lease `name` can be had, until `shutdown`. Work that ends by itself ends this, too.
pub async fn lead<F, Fut>(
    store: Store,
    name: &'static str,
    holder: String,
    shutdown: CancellationToken,
    work: F,
) -> anyhow::Result<()>
where
    F: Fn(CancellationToken) -> Fut + Send,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    let mut waits = false;
    while !shutdown.is_cancelled() {
        let token = match store.take_lease(name, &holder, LEASE).await {
            Ok(Some(token)) => token,
            Ok(None) => {
                if !std::mem::replace(&mut waits, true) {
                    tracing::info!(
                        lease = name,
                        "another process is the {name}; this one waits to take over"
                    );
                }
                pause(&shutdown).await;
                continue;
            }
            Err(error) => {
                tracing::warn!(lease = name, %error, "the lease of the {name} cannot be asked for");
                pause(&shutdown).await;
                continue;
            }
        };
        waits = false;
        tracing::info!(lease = name, "this process is the {name} now");
        let own = shutdown.child_token();
        let working = work(own.clone());
        tokio::pin!(working);
        tokio::select! {
            ended = &mut working => {
                leave(&store, name, &token).await;
                return ended;
            }
            () = lost(&store, name, &token) => {
                tracing::warn!(lease = name, "this process is the {name} no more");
                own.cancel();
                if tokio::time::timeout(END, working).await.is_err() {
                    tracing::warn!(lease = name, "the work of the {name} was broken off");
                }
            }
        }
    }
    Ok(())
}

async fn pause(shutdown: &CancellationToken) {
    let _ = tokio::time::timeout(LOOK, shutdown.cancelled()).await;
}

async fn leave(store: &Store, name: &str, token: &str) {
    if let Err(error) = store.leave_lease(name, token).await {
        tracing::warn!(lease = name, %error, "the lease of the {name} was not given back; it will run out");
    }
}

/// Keeps the lease; comes back when it is lost, or may be at any moment.
async fn lost(store: &Store, name: &str, token: &str) {
    let mut kept = Instant::now();
    loop {
        tokio::time::sleep(BEAT).await;
        let asked = Instant::now();
        let left = SILENCE.saturating_sub(kept.elapsed());
        match tokio::time::timeout(left, store.keep_lease(name, token, LEASE)).await {
            Ok(Ok(true)) => kept = asked,
            Ok(Ok(false)) | Err(_) => return,
            Ok(Err(error)) => {
                tracing::warn!(lease = name, %error, "the lease of the {name} was not renewed");
                if kept.elapsed() + BEAT >= SILENCE {
                    return;
                }
            }
        }
    }
}
