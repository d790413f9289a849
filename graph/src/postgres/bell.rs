//! Messages between processes, as notifications of the server: never in the transaction of a commit, and on connections of
//! their own, so that neither waits for the other.

use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt, unfold};
use sha2::{Digest, Sha256};
use sqlx::{
    PgPool,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::sync::OnceCell;

use crate::{
    checkpoint::{Bell, StorageError},
    stored::Fault,
};

/// How long connecting may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that had nothing to send for so long is closed.
const IDLE: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub(super) struct PostgresBell {
    /// Says where the server is, and in which schema the tables are.
    pool: PgPool,
    sending: OnceCell<Sending>,
}

#[derive(Debug)]
struct Sending {
    pool: PgPool,
    channel: String,
}

impl PostgresBell {
    pub fn new(pool: PgPool) -> Self {
        Self {
            pool,
            sending: OnceCell::new(),
        }
    }

    async fn sending(&self) -> Result<&Sending, Fault> {
        self.sending
            .get_or_try_init(|| async {
                // Channels belong to the whole database, threads to a schema of it.
                let schema: Option<String> = sqlx::query_scalar("select current_schema()::text")
                    .fetch_one(&self.pool)
                    .await?;
                let hash = Sha256::digest(schema.unwrap_or_default());
                Ok(Sending {
                    pool: self.connection(),
                    channel: format!("graph_{}", hex::encode(&hash[..8])),
                })
            })
            .await
    }

    /// A pool of one connection, which is opened when it is needed.
    fn connection(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(PATIENCE)
            .idle_timeout(IDLE)
            .after_connect(|connection, _| {
                // What is told is in the database already: it need not wait for a disk.
                Box::pin(async move {
                    sqlx::raw_sql("set synchronous_commit = off")
                        .execute(connection)
                        .await?;
                    Ok(())
                })
            })
            .connect_lazy_with(self.pool.connect_options().as_ref().clone())
    }
}

#[async_trait]
impl Bell for PostgresBell {
    async fn ring(&self, message: &str) -> Result<(), StorageError> {
        let run = async {
            let sending = self.sending().await?;
            sqlx::query("select pg_notify($1, $2)")
                .bind(&sending.channel)
                .bind(message)
                .execute(&sending.pool)
                .await?;
            Ok(())
        };
        run.await
            .map_err(|fault: Fault| fault.during("telling other processes"))
    }

    async fn listen(&self) -> Result<BoxStream<'static, String>, StorageError> {
        let run = async {
            let channel = &self.sending().await?.channel;
            let mut listener = PgListener::connect_with(&self.connection()).await?;
            // The engine listens again by itself, and looks at everything then.
            listener.eager_reconnect(false);
            listener.listen(channel).await?;
            Ok(listener)
        };
        let listener = run
            .await
            .map_err(|fault: Fault| fault.during("listening to other processes"))?;
        let heard = unfold(listener, |mut listener| async move {
            match listener.try_recv().await {
                Ok(Some(notification)) => Some((notification.payload().to_owned(), listener)),
                Ok(None) => None,
                Err(error) => {
                    tracing::debug!(%error, "the connection on which other processes were heard is lost");
                    None
                }
            }
        });
        Ok(heard.boxed())
    }
}
