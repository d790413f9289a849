//! The transport over Redis, on a real server: the common suite, and what only it has (what is on the wire, a server that goes
//! away, poison, a flood, clusters and sentinels).

mod down;
mod holds;
mod letters;
mod refusals;
mod server;

use async_trait::async_trait;
use futures::StreamExt as _;
use protocol::redis::Options;
use protocol::suite::{self, Harness};
use protocol::{Published, RedisTransport, Room, Size, Transport, TransportError, names};
use server::Server;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const SOON: Duration = Duration::from_mins(1);

struct Remote(Server);

impl Remote {
    async fn new() -> Self {
        Self(Server::start().await)
    }

    fn options(&self) -> Options {
        Options {
            lease: self.lease(),
            ..Options::new(self.0.url())
        }
    }
}

#[async_trait]
impl Harness for Remote {
    async fn open_for(&self, lease: Duration) -> Arc<dyn Transport> {
        let options = Options {
            lease,
            ..self.options()
        };
        Arc::new(RedisTransport::with(options).await.unwrap())
    }

    async fn open_remembering(&self, lives: Duration, lately: Duration) -> Arc<dyn Transport> {
        let options = Options {
            lives,
            lately,
            ..self.options()
        };
        Arc::new(RedisTransport::with(options).await.unwrap())
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(700)
    }
}

protocol::transport_suite!(Remote::new().await);

#[tokio::test]
async fn a_server_whose_settings_may_lose_messages_is_found_out() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    let mut look = remote.0.look();
    let mut set = |name: &str, value: &str| {
        redis::cmd("CONFIG")
            .arg("SET")
            .arg(name)
            .arg(value)
            .exec(&mut look)
            .unwrap();
    };
    set("appendonly", "yes");
    assert_eq!(bus.may_lose().await.unwrap(), None);
    set("maxmemory-policy", "allkeys-lru");
    set("maxmemory", "100mb");
    let said = bus.may_lose().await.unwrap().unwrap();
    assert!(
        said.contains("allkeys-lru") && said.contains("noeviction"),
        "{said}"
    );
    set("maxmemory-policy", "noeviction");
    assert_eq!(bus.may_lose().await.unwrap(), None);
    set("appendonly", "no");
    let said = bus.may_lose().await.unwrap().unwrap();
    assert!(said.contains("appendonly"), "{said}");
}

#[tokio::test]
async fn messages_stand_under_the_names_that_others_rely_on() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    let request = suite::request("a");
    bus.publish_job(&request).await.unwrap();
    bus.cancel("a").await.unwrap();
    bus.publish_result(&suite::result("a", "x")).await.unwrap();
    let mut look = remote.0.look();
    let jobs: Vec<(String, Vec<(String, String)>)> = redis::cmd("XRANGE")
        .arg("worker:jobs")
        .arg("-")
        .arg("+")
        .query(&mut look)
        .unwrap();
    assert_eq!(jobs[0].1[0].0, "data");
    let found = protocol::decode::request(jobs[0].1[0].1.as_bytes()).unwrap();
    assert_eq!(found, request);
    let result: String = redis::cmd("GET")
        .arg("worker:result:a")
        .query(&mut look)
        .unwrap();
    assert_eq!(
        protocol::decode::result(result.as_bytes())
            .unwrap()
            .request_id,
        "a"
    );
    for (key, days) in [("worker:result:a", 1), ("worker:cancel:a", 30)] {
        let left: i64 = redis::cmd("TTL").arg(key).query(&mut look).unwrap();
        let most = days * 86_400;
        assert!((1..=most).contains(&left), "{key} is kept for {left} s");
    }
    let groups: Vec<redis::Value> = redis::cmd("XINFO")
        .arg("GROUPS")
        .arg("worker:results")
        .query(&mut look)
        .unwrap();
    assert_eq!(groups.len(), 1);
}

#[tokio::test]
async fn what_a_former_version_noted_of_a_job_does_not_hide_whose_worker_runs_already() {
    let remote = Remote::new().await;
    let bus = remote.open_for(Duration::from_mins(10)).await;
    bus.publish_job(&suite::request("a")).await.unwrap();
    // Looked at by somebody who has no place, and noted as a former version did: without the request.
    let full = Room {
        free: Size::ZERO,
        ..Room::unlimited()
    };
    let (sender, rooms) = watch::channel(full);
    assert!(
        bus.next_job_for(&rooms, Duration::ZERO)
            .await
            .unwrap()
            .is_none()
    );
    let mut look = remote.0.look();
    let about = "{worker:jobs}:about";
    let noted: Vec<(String, String)> = redis::cmd("HGETALL").arg(about).query(&mut look).unwrap();
    let [(entry, text)] = &noted[..] else {
        panic!("{noted:?}");
    };
    let (former, request) = text.split_once('\n').unwrap();
    assert_eq!(request, "a");
    redis::cmd("HSET")
        .arg(about)
        .arg(entry)
        .arg(former)
        .query::<()>(&mut look)
        .unwrap();
    sender.send_modify(|room| room.ours = vec!["a".to_owned()]);
    let held = bus.next_job_for(&rooms, SOON).await.unwrap().unwrap();
    assert_eq!(held.request.request_id, "a");
}

#[tokio::test]
async fn a_heartbeat_that_nobody_can_read_hides_no_other_spawner() {
    let remote = Remote::new().await;
    let bus = remote.open_remembering(SOON, SOON).await;
    bus.heartbeat(&suite::beat("good", Size::ZERO))
        .await
        .unwrap();
    let mut look = remote.0.look();
    for (name, text) in [("newer", r#"{"version": 9}"#), ("broken", "not JSON")] {
        for command in [
            redis::cmd("SET")
                .arg(names::heartbeat(name))
                .arg(text)
                .arg("PX")
                .arg(60_000),
            redis::cmd("SADD").arg("spawner:heartbeats").arg(name),
            redis::cmd("HSET")
                .arg(names::SEEN_BEATS)
                .arg(name)
                .arg(text),
            redis::cmd("ZADD")
                .arg(names::SEEN)
                .arg("4000000000000")
                .arg(name),
        ] {
            command.query::<()>(&mut look).unwrap();
        }
    }
    let alive = bus.spawners().await.unwrap();
    assert_eq!(alive.len(), 1);
    assert_eq!(alive[0].spawner, "good");
    let seen = bus.seen_spawners().await.unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].last.spawner, "good");
}

#[tokio::test]
async fn a_cancel_is_remembered_for_as_long_as_its_job_may_wait() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    bus.publish_job(&suite::request("a")).await.unwrap();
    bus.cancel("a").await.unwrap();
    let mut look = remote.0.look();
    let mut left = |key: &str| -> i64 { redis::cmd("TTL").arg(key).query(&mut look).unwrap() };
    let waits = left("{worker:jobs}:known:a");
    assert!(waits > 86_400, "{waits} s");
    assert!(
        left(&names::cancel("a")) >= waits,
        "a job that waits for days would begin"
    );
}
