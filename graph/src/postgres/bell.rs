//! Messages between processes, as notifications of the server: never in the transaction of a commit, and on connections of
//! their own, so that neither waits for the other.

use std::{io, time::Duration};

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt, unfold};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use sqlx::{
    Connection, PgConnection, PgPool,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::sync::OnceCell;

use crate::{
    checkpoint::{Bell, StorageError},
    stored::Fault,
};

/// How long connecting and sending may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection that was used before may take to send.
const PROMPTLY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct PostgresBell {
    /// Says where the server is, and in which schema the tables are.
    pool: PgPool,
    sending: OnceCell<Sending>,
}

#[derive(Debug)]
struct Sending {
    channel: String,
    /// The connection of the last message. Whoever sends takes it out, so that one that failed or hangs is not used again.
    connection: Mutex<Option<PgConnection>>,
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
                    channel: format!("graph_{}", hex::encode(&hash[..8])),
                    connection: Mutex::default(),
                })
            })
            .await
    }

    /// A connection for sending.
    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let options = self.pool.connect_options();
        let mut connection = PgConnection::connect_with(&options).await?;
        // What is told is in the database already: it need not wait for a disk.
        sqlx::raw_sql("set synchronous_commit = off")
            .execute(&mut connection)
            .await?;
        Ok(connection)
    }

    /// A pool of one connection, which is opened when it is needed.
    fn connection(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(PATIENCE)
            .connect_lazy_with(self.pool.connect_options().as_ref().clone())
    }
}

async fn notify(
    connection: &mut PgConnection,
    channel: &str,
    message: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("select pg_notify($1, $2)")
        .bind(channel)
        .bind(message)
        .execute(connection)
        .await?;
    Ok(())
}

#[async_trait]
impl Bell for PostgresBell {
    async fn ring(&self, message: &str) -> Result<(), StorageError> {
        let run = async {
            let sending = self.sending().await?;
            let kept = sending.connection.lock().take();
            // One that was not used for a while may have been closed by the server, or by somebody between. That shows when it
            // is used; then another one is opened.
            if let Some(mut connection) = kept
                && let send = notify(&mut connection, &sending.channel, message)
                && let Ok(Ok(())) = tokio::time::timeout(PROMPTLY, send).await
            {
                *sending.connection.lock() = Some(connection);
                return Ok(());
            }
            let mut connection = self.connect().await?;
            notify(&mut connection, &sending.channel, message).await?;
            *sending.connection.lock() = Some(connection);
            Ok(())
        };
        let run = async {
            match tokio::time::timeout(PATIENCE, run).await {
                Ok(result) => result,
                Err(_) => Err(sqlx::Error::Io(io::ErrorKind::TimedOut.into()).into()),
            }
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
