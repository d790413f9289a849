//! The connection for commands: made when it is needed, made anew when it breaks, within a bound.

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster_async::ClusterConnection;
use redis::{
    Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisFuture, RedisResult, Value,
};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::address::Address;
use crate::TransportError;

/// The first pause before a command is tried again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// An open connection; clones share it.
#[derive(Clone)]
pub(super) enum Live {
    Direct(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Live {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Direct(connection) => connection.req_packed_command(cmd),
            Self::Cluster(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Direct(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Cluster(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Direct(connection) => connection.get_db(),
            Self::Cluster(connection) => connection.get_db(),
        }
    }
}

/// A way to Redis that outlives its connections.
pub(super) struct Link {
    pub address: Arc<Address>,
    /// How long a command is tried before it fails.
    patience: Duration,
    live: Mutex<Option<(u64, Live)>>,
}

impl Link {
    pub fn new(address: Arc<Address>, patience: Duration) -> Self {
        Self {
            address,
            patience,
            live: Mutex::new(None),
        }
    }

    /// Runs commands, again on a new connection when the connection is what failed. Whatever is run must bear being run
    /// twice: an answer may get lost on its way.
    pub async fn run<T, F>(&self, run: impl Fn(Live) -> F) -> Result<T, TransportError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let deadline = Instant::now() + self.patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.live().await {
                Ok((number, live)) => match run(live).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => {
                        if !matches!(error.retry_method(), redis::RetryMethod::NoRetry) {
                            self.give_up(number).await;
                        }
                        error
                    }
                },
                Err(error) => error,
            };
            let lasting = matches!(error.retry_method(), redis::RetryMethod::NoRetry)
                || error.kind() == ErrorKind::AuthenticationFailed;
            if lasting || Instant::now() + pause >= deadline {
                let reason = match what_to_do(&error) {
                    Some(advice) => format!("{error}; {advice}"),
                    None => error.to_string(),
                };
                return Err(TransportError::Remote {
                    place: self.address.shown().to_owned(),
                    reason,
                });
            }
            tracing::debug!(%error, "trying again in {pause:?}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One command; see [`Link::run`].
    pub async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, TransportError> {
        self.run(|mut live| async move { command.query_async(&mut live).await })
            .await
    }

    async fn live(&self) -> RedisResult<(u64, Live)> {
        let mut place = self.live.lock().await;
        if let Some((number, live)) = &*place {
            return Ok((*number, live.clone()));
        }
        let live = self.address.connect().await?;
        let number = NUMBERS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        *place = Some((number, live.clone()));
        Ok((number, live))
    }

    /// Forgets a broken connection, unless somebody else has replaced it already.
    async fn give_up(&self, number: u64) {
        let mut place = self.live.lock().await;
        if place
            .as_ref()
            .is_some_and(|(present, _)| *present == number)
        {
            *place = None;
        }
    }
}

/// What of a server's answers a person can do something about.
fn what_to_do(error: &RedisError) -> Option<&'static str> {
    if error.kind() == ErrorKind::AuthenticationFailed {
        return Some(LOGIN);
    }
    Some(match error.code()? {
        "NOAUTH" | "WRONGPASS" => LOGIN,
        "NOPERM" => {
            "the user of REDIS_URL may not do this; let its server's admin allow it scripts, and the keys and channels that begin with worker:, spawner:, {worker: and {spawner:"
        }
        "OOM" => {
            "its memory is full; give it more (maxmemory), or wait until workers have done what is there"
        }
        "MISCONF" => "it cannot write to its disk; make room there, then it goes on by itself",
        "READONLY" => {
            "this is a replica; name the master in REDIS_URL, or its sentinels as redis+sentinel://HOST,HOST/MASTER/DB"
        }
        "LOADING" => "it still reads what it had stored; it goes on by itself when it has",
        "CLUSTERDOWN" | "MASTERDOWN" => {
            "a part of it is away; let its server's admin bring that back"
        }
        _ => return None,
    })
}

const LOGIN: &str = "put user and password into REDIS_URL, as in redis://USER:PASSWORD@HOST:PORT/DB (no user: redis://:PASSWORD@HOST)";

/// Tells connections apart.
static NUMBERS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
