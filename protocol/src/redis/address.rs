//! Where a Redis is: one server, a set watched by sentinels, or a cluster.

use crate::TransportError;
use redis::aio::PubSub;
use redis::cluster::ClusterClient;
use redis::sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, IntoConnectionInfo as _, RedisError, RedisResult,
};
use std::time::Duration;
use tokio::sync::Mutex;

use super::link::Live;

/// How long one try to connect may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long one command may take. None of ours blocks in the server.
const RESPONSE: Duration = Duration::from_secs(5);

/// A parsed `REDIS_URL`.
pub(super) struct Address {
    /// For people: without user and password.
    shown: String,
    servers: Servers,
}

enum Servers {
    One(Box<Client>),
    Sentinels(Box<Mutex<SentinelClient>>),
    Cluster {
        client: Box<ClusterClient>,
        /// Any of them hears what is published on any of them.
        nodes: Vec<Client>,
    },
}

impl Address {
    /// Reads `redis://`, `rediss://`, `redis+unix://`, `redis+sentinel://HOST,HOST/MASTER[/DB]` or `redis+cluster://HOST,HOST`.
    pub fn parse(url: &str) -> Result<Self, TransportError> {
        // The URL is not part of the error: it may hold a password.
        let wrong = |reason: String| TransportError::Remote {
            place: "REDIS_URL".to_owned(),
            reason: format!(
                "{reason}; it looks like redis://HOST:PORT/DB, redis+sentinel://HOST,HOST/MASTER/DB or redis+cluster://HOST,HOST"
            ),
        };
        let refused = |error: RedisError| wrong(error.to_string());
        if let Some(rest) = url.strip_prefix("redis+sentinel://") {
            let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
            let (master, database) = path.split_once('/').unwrap_or((path, ""));
            if master.is_empty() {
                return Err(wrong("the name of the master is missing".to_owned()));
            }
            let (login, hosts) = login(hosts);
            let sentinels = nodes("", hosts, "", 26379).map_err(refused)?;
            let nodes = nodes(login, "unused", database, 6379).map_err(refused)?;
            let mut about = SentinelNodeConnectionInfo::default();
            if let Some(node) = nodes.first() {
                about = about.set_redis_connection_info(node.redis_settings().clone());
            }
            let client =
                SentinelClient::build(sentinels, master, Some(about), SentinelServerType::Master)
                    .map_err(refused)?;
            return Ok(Self {
                shown: format!("Redis (master {master} of the sentinels {hosts})"),
                servers: Servers::Sentinels(Box::new(Mutex::new(client))),
            });
        }
        if let Some(rest) = url.strip_prefix("redis+cluster://") {
            let (login, hosts) = login(rest.trim_end_matches('/'));
            let nodes = nodes(login, hosts, "", 6379).map_err(refused)?;
            let client = ClusterClient::builder(nodes.clone())
                .connection_timeout(CONNECT)
                .response_timeout(RESPONSE)
                .retries(3)
                .build()
                .map_err(refused)?;
            return Ok(Self {
                shown: format!("Redis (cluster {hosts})"),
                servers: Servers::Cluster {
                    client: Box::new(client),
                    nodes: nodes
                        .into_iter()
                        .map(Client::open)
                        .collect::<RedisResult<_>>()
                        .map_err(refused)?,
                },
            });
        }
        let client = Client::open(url).map_err(refused)?;
        Ok(Self {
            shown: format!("Redis ({})", client.get_connection_info().addr()),
            servers: Servers::One(Box::new(client)),
        })
    }

    /// For messages to people; holds no password.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// A connection for commands.
    pub async fn connect(&self) -> RedisResult<Live> {
        let config = || {
            AsyncConnectionConfig::new()
                .set_connection_timeout(Some(CONNECT))
                .set_response_timeout(Some(RESPONSE))
        };
        let client = match &self.servers {
            Servers::One(client) => Client::clone(client),
            Servers::Sentinels(sentinels) => sentinels.lock().await.async_get_client().await?,
            Servers::Cluster { client, .. } => {
                return Ok(Live::Cluster(client.get_async_connection().await?));
            }
        };
        let direct = client
            .get_multiplexed_async_connection_with_config(&config())
            .await?;
        Ok(Live::Direct(direct))
    }

    /// A connection that listens. `attempt` chooses among the nodes of a cluster.
    pub async fn listen(&self, attempt: usize) -> RedisResult<PubSub> {
        let client = match &self.servers {
            Servers::One(client) => Client::clone(client),
            Servers::Sentinels(sentinels) => sentinels.lock().await.async_get_client().await?,
            Servers::Cluster { nodes, .. } => nodes[attempt % nodes.len()].clone(),
        };
        tokio::time::timeout(CONNECT, client.get_async_pubsub())
            .await
            .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
    }
}

/// `user:password@` with its `@` (or nothing), and the rest.
fn login(text: &str) -> (&str, &str) {
    match text.rfind('@') {
        Some(at) => text.split_at(at + 1),
        None => ("", text),
    }
}

/// Each host of a list, as the driver reads a URL of one.
fn nodes(login: &str, hosts: &str, database: &str, port: u16) -> RedisResult<Vec<ConnectionInfo>> {
    hosts
        .split(',')
        .map(|host| {
            let has_port = host
                .rsplit_once(':')
                .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            let port = if has_port {
                String::new()
            } else {
                format!(":{port}")
            };
            format!("redis://{login}{host}{port}/{database}").into_connection_info()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        match Address::parse(url) {
            Ok(address) => address.shown().to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_address_is_shown_without_its_password() {
        for url in [
            "redis://user:s3cret@127.0.0.1:6379/2",
            "redis+sentinel://user:s3cret@127.0.0.1:26379,127.0.0.2/main/1",
            "redis+cluster://user:s3cret@127.0.0.1:7000,127.0.0.2:7001",
            "http://user:s3cret@127.0.0.1",
        ] {
            let shown = shown(url);
            assert!(!shown.contains("s3cret"), "{shown}");
        }
    }

    #[test]
    fn sentinels_and_clusters_name_their_hosts() {
        assert_eq!(
            shown("redis+sentinel://127.0.0.1:26379,127.0.0.2/main"),
            "Redis (master main of the sentinels 127.0.0.1:26379,127.0.0.2)"
        );
        assert_eq!(
            shown("redis+cluster://127.0.0.1:7000,127.0.0.2"),
            "Redis (cluster 127.0.0.1:7000,127.0.0.2)"
        );
    }

    #[test]
    fn a_wrong_address_says_what_a_right_one_looks_like() {
        for url in ["postgres://x", "redis+sentinel://127.0.0.1", "nonsense"] {
            let text = shown(url);
            assert!(
                text.contains("it looks like redis://HOST:PORT/DB"),
                "{text}"
            );
        }
    }
}
