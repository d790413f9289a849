//! The transport over Redis, on a real server: the common suite, and what only it has (what is on the wire, a server that goes
//! away, poison, a flood, clusters and sentinels).

mod server;

use async_trait::async_trait;
use futures::StreamExt as _;
use protocol::redis::Options;
use protocol::suite::{self, Harness};
use protocol::{Published, RedisTransport, Room, Size, Transport, TransportError, names};
use server::{Cluster, Server, Watched};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(10);

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
    for key in ["worker:result:a", "worker:cancel:a"] {
        let left: i64 = redis::cmd("TTL").arg(key).query(&mut look).unwrap();
        assert!((1..=86_400).contains(&left), "{key} is kept for {left} s");
    }
    let groups: Vec<redis::Value> = redis::cmd("XINFO")
        .arg("GROUPS")
        .arg("worker:results")
        .query(&mut look)
        .unwrap();
    assert_eq!(groups.len(), 1);
}

#[tokio::test]
async fn a_message_that_cannot_be_read_becomes_a_dead_letter_with_its_body() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    let mut look = remote.0.look();
    let bodies = [
        r#"{"version": 9}"#,
        "not JSON",
        r#"{"version": 1, "request_id": "x"}"#,
    ];
    for stream in [names::JOBS, names::RESULTS] {
        for body in bodies {
            redis::cmd("XADD")
                .arg(stream)
                .arg("*")
                .arg("data")
                .arg(body)
                .query::<()>(&mut look)
                .unwrap();
        }
        redis::cmd("XADD")
            .arg(stream)
            .arg("*")
            .arg("other")
            .arg("field")
            .query::<()>(&mut look)
            .unwrap();
    }
    bus.publish_job(&suite::request("good")).await.unwrap();
    bus.publish_result(&suite::result("good", "x"))
        .await
        .unwrap();
    let job = bus.next_job(SOON).await.unwrap().unwrap();
    assert_eq!(job.request.request_id, "good");
    let result = bus.next_result(SOON).await.unwrap().unwrap();
    assert_eq!(result.result.request_id, "good");
    let letters = bus.dead_letters(100).await.unwrap();
    assert_eq!(letters.len(), 8, "{letters:?}");
    assert!(letters[0].0.contains("version 9"), "{letters:?}");
    assert_eq!(letters[0].1, bodies[0]);
    assert!(letters[2].0.contains("lacks the field"), "{letters:?}");
    let pending: (u64, redis::Value, redis::Value, redis::Value) = redis::cmd("XPENDING")
        .arg(names::JOBS)
        .arg(names::GROUP_SPAWNERS)
        .query(&mut look)
        .unwrap();
    assert_eq!(pending.0, 1, "only the good one is held");
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
async fn a_request_that_nobody_can_read_is_answered_with_what_is_wrong_and_who_can_mend_it() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    let mut look = remote.0.look();
    let with = |id: &str, edit: &dyn Fn(&mut serde_json::Value)| {
        let mut request = serde_json::to_value(suite::request(id)).unwrap();
        edit(&mut request);
        request.to_string()
    };
    let huge = "x".repeat(10 << 20);
    let bodies = [
        (
            "of-another-version",
            "version 9",
            with("of-another-version", &|r| r["version"] = 9.into()),
        ),
        (
            "without-a-field",
            "`agent`",
            with("without-a-field", &|r| {
                r.as_object_mut().unwrap().remove("agent");
            }),
        ),
        (
            "of-10-mb",
            "at most 1048576",
            with("of-10-mb", &|r| {
                r["task"]["body_markdown"] = huge.as_str().into();
            }),
        ),
    ];
    for (id, words, body) in &bodies {
        redis::cmd("XADD")
            .arg(names::JOBS)
            .arg("*")
            .arg("data")
            .arg(body)
            .query::<()>(&mut look)
            .unwrap();
        assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
        let result = bus.next_result(SOON).await.unwrap().unwrap();
        bus.ack_result(&result.receipt).await.unwrap();
        let result = result.result;
        assert_eq!(result.request_id, *id);
        assert_eq!((result.attempt, result.fencing_token), (1, 7));
        assert_eq!(result.status, protocol::ResultStatus::Failed);
        let failure = result.failure.unwrap();
        assert_eq!(failure.kind, "bad_request");
        assert!(failure.message.contains(words), "{failure:#?}");
        assert!(failure.message.contains("an admin has to"), "{failure:#?}");
        assert!(failure.evidence.contains(&format!("{} bytes", body.len())));
        assert!(failure.evidence.len() < 2048);
    }
    let letters = bus.dead_letters(10).await.unwrap();
    assert_eq!(letters.len(), 3);
    assert!(letters.iter().all(|(_, body)| body.len() <= 1 << 20));
    let left: u64 = redis::cmd("XLEN")
        .arg(names::JOBS)
        .query(&mut look)
        .unwrap();
    assert_eq!(left, 0);
}

/// How long a key is kept, in seconds; -1: for ever, -2: it is not there.
fn left(look: &mut redis::Connection, key: &str) -> i64 {
    redis::cmd("TTL").arg(key).query(look).unwrap()
}

#[tokio::test]
async fn dead_letters_are_bounded_in_number_size_and_time() {
    let remote = Remote::new().await;
    let options = Options {
        letters: 3,
        ..remote.options()
    };
    let bus = RedisTransport::with(options).await.unwrap();
    let mut look = remote.0.look();
    let huge = "x".repeat(2 << 20);
    for body in ["1", "2", "3", "4", &huge] {
        let mut add = redis::cmd("XADD");
        let add = add.arg(names::JOBS).arg("*").arg("data").arg(body);
        add.query::<()>(&mut look).unwrap();
    }
    assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
    let letters = bus.dead_letters(10).await.unwrap();
    let bodies: Vec<&str> = letters.iter().map(|(_, body)| body.as_str()).collect();
    assert_eq!(bodies[..2], ["3", "4"], "the oldest are gone");
    assert_eq!((bodies.len(), bodies[2].len()), (3, 128 << 10));
    assert!(left(&mut look, names::DEAD) > 0);
}

#[tokio::test]
async fn nothing_stays_for_ever_of_what_was_lost_or_could_not_be_read() {
    let remote = Remote::new().await;
    let bus = remote.open_for(Duration::from_mins(10)).await;
    let mut look = remote.0.look();
    // Of another version, by whoever published it as we do.
    for (stream, id) in [(names::JOBS, "job"), (names::RESULTS, "result")] {
        let known = format!("{{{stream}}}:known:{id}");
        let body = format!(r#"{{"version": 9, "request_id": "{id}"}}"#);
        redis::cmd("SET")
            .arg(&known)
            .arg("")
            .query::<()>(&mut look)
            .unwrap();
        let mut add = redis::cmd("XADD");
        let add = add.arg(stream).arg("*").arg("data").arg(body);
        add.query::<()>(&mut look).unwrap();
        assert_eq!(left(&mut look, &known), -1);
        if stream == names::JOBS {
            assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
        } else {
            // What answers the job is there as well.
            assert!(bus.next_result(SOON).await.unwrap().is_some());
            assert!(bus.next_result(Duration::ZERO).await.unwrap().is_none());
        }
        assert!((1..=86_400).contains(&left(&mut look, &known)), "{known}");
    }
    // Deleted by hand while it waits, and after it was looked at.
    let none = Room {
        free: Size::ZERO,
        ..Room::unlimited()
    };
    let (_sender, rooms) = watch::channel(none);
    bus.publish_job(&suite::request("gone")).await.unwrap();
    let waits = bus.next_job_for(&rooms, Duration::ZERO).await.unwrap();
    assert!(waits.is_none(), "there is no place: {waits:?}");
    let about = "{worker:jobs}:about";
    let noted: u64 = redis::cmd("HLEN").arg(about).query(&mut look).unwrap();
    assert_eq!(noted, 1);
    let entries: Vec<(String, redis::Value)> = redis::cmd("XRANGE")
        .arg(names::JOBS)
        .arg(&["-", "+"])
        .query(&mut look)
        .unwrap();
    for (entry, _) in entries {
        let mut delete = redis::cmd("XDEL");
        let delete = delete.arg(names::JOBS).arg(entry);
        delete.query::<()>(&mut look).unwrap();
    }
    // Found out by whoever looks for a job: first what is pending, then what is known of it.
    for _ in 0..2 {
        assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
    }
    let pending: (u64, redis::Value, redis::Value, redis::Value) = redis::cmd("XPENDING")
        .arg(names::JOBS)
        .arg(names::GROUP_SPAWNERS)
        .query(&mut look)
        .unwrap();
    assert_eq!(pending.0, 0);
    let streams = [names::JOBS, names::RESULTS];
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut look).unwrap();
    for key in keys.iter().filter(|key| !streams.contains(&key.as_str())) {
        assert!(left(&mut look, key) >= 0, "{key} has no end");
    }
}

#[tokio::test]
async fn a_process_that_is_gone_is_forgotten_when_it_holds_nothing_and_not_before() {
    let remote = Remote::new().await;
    let open = |holder: &str, forget: Duration| {
        let options = Options {
            holder: Some(holder.to_owned()),
            lease: Duration::from_mins(10),
            forget,
            ..remote.options()
        };
        async { RedisTransport::with(options).await.unwrap() }
    };
    let (day, moment) = (Duration::from_hours(24), Duration::from_millis(1));
    let mut look = remote.0.look();
    let mut consumers = move || -> Vec<String> {
        let all: Vec<HashMap<String, redis::Value>> = redis::cmd("XINFO")
            .arg("CONSUMERS")
            .arg(names::JOBS)
            .arg(names::GROUP_SPAWNERS)
            .query(&mut look)
            .unwrap();
        let name = |mut about: HashMap<_, _>| about.remove("name").unwrap();
        let names = all.into_iter().map(name);
        let names = names.map(|name| redis::from_redis_value(name).unwrap());
        names.filter(|name| name != "nobody").collect()
    };
    for (holder, id) in [("gone", "a"), ("holds", "b")] {
        let bus = open(holder, day).await;
        bus.publish_job(&suite::request(id)).await.unwrap();
        let job = bus.next_job(SOON).await.unwrap().unwrap();
        if holder == "gone" {
            bus.ack_job(&job.receipt).await.unwrap();
        }
    }
    drop(open("next", day).await);
    assert_eq!(consumers(), ["gone", "holds"], "it was there a moment ago");
    let start = tokio::time::Instant::now();
    while consumers() != ["holds"] {
        assert!(start.elapsed() < SOON * 3, "{:?}", consumers());
        drop(open("next", moment).await);
    }
    // What it held is handed out again, and then it is forgotten as well.
    let next = open("next", moment).await;
    assert_eq!(next.abandon("holds").await.unwrap(), 1);
    let start = tokio::time::Instant::now();
    while !consumers().is_empty() {
        assert!(start.elapsed() < SOON * 3, "{:?}", consumers());
        drop(open("other", moment).await);
    }
    let job = next.next_job(SOON).await.unwrap().unwrap();
    assert_eq!((job.request.request_id.as_str(), job.deliveries), ("b", 2));
}

#[tokio::test]
async fn what_a_dead_process_held_is_handed_out_again_at_once_and_nobody_elses_is() {
    let remote = Remote::new().await;
    let open = |holder: &str| {
        let options = Options {
            lease: Duration::from_mins(10),
            holder: Some(holder.to_owned()),
            ..remote.options()
        };
        async { RedisTransport::with(options).await.unwrap() }
    };
    let (dead, alive, next) = (open("a/1").await, open("b").await, open("c").await);
    for n in 0..250 {
        let id = format!("job-{n}");
        dead.publish_job(&suite::request(&id)).await.unwrap();
        let holder = if n == 100 { &alive } else { &dead };
        holder.next_job(SOON).await.unwrap().unwrap();
    }
    dead.publish_result(&suite::result("x", "x")).await.unwrap();
    dead.next_result(SOON).await.unwrap().unwrap();
    assert!(next.next_job(Duration::ZERO).await.unwrap().is_none());
    assert_eq!(next.abandon("nobody").await.unwrap(), 0);
    assert_eq!(next.abandon("a/1").await.unwrap(), 250);
    assert_eq!(
        next.abandon("a/1").await.unwrap(),
        0,
        "it holds nothing now"
    );
    assert_eq!(next.abandon("nobody").await.unwrap(), 0);
    for n in (0..250).filter(|n| *n != 100) {
        let job = next.next_job(Duration::ZERO).await.unwrap().unwrap();
        assert_eq!(job.request.request_id, format!("job-{n}"));
        assert_eq!(job.deliveries, 2);
        next.ack_job(&job.receipt).await.unwrap();
    }
    assert!(next.next_job(Duration::ZERO).await.unwrap().is_none());
    let result = next.next_result(Duration::ZERO).await.unwrap().unwrap();
    assert_eq!(result.result.request_id, "x");
}

#[tokio::test]
async fn an_expired_hold_is_found_behind_a_page_of_others() {
    let remote = Remote::new().await;
    let holder = remote.open().await;
    let other = remote.open().await;
    let mut held = Vec::new();
    for n in 0..40 {
        holder
            .publish_job(&suite::request(&format!("job-{n:02}")))
            .await
            .unwrap();
        held.push(holder.next_job(SOON).await.unwrap().unwrap());
    }
    // All are renewed but the last one, which is far beyond the first page of what is pending.
    let lost = held.pop().unwrap();
    let taken = loop {
        for job in &held {
            holder.renew_job(&job.receipt).await.unwrap();
        }
        if let Some(taken) = other.next_job(Duration::ZERO).await.unwrap() {
            break taken;
        }
    };
    assert_eq!(taken.request.request_id, lost.request.request_id);
    assert_eq!(taken.deliveries, 2);
}

#[tokio::test]
async fn nothing_that_is_pending_is_ever_trimmed_and_what_is_done_is_gone() {
    let remote = Remote::new().await;
    let bus = RedisTransport::with(Options {
        capacity: 10,
        lease: Duration::from_mins(1),
        ..remote.options()
    })
    .await
    .unwrap();
    for n in 0..10 {
        bus.publish_job(&suite::request(&format!("job-{n}")))
            .await
            .unwrap();
    }
    let refused = bus.publish_job(&suite::request("more")).await.unwrap_err();
    assert!(
        matches!(refused, TransportError::Full { limit: 10, .. }),
        "{refused}"
    );
    let mut held = Vec::new();
    while let Some(job) = bus.next_job(Duration::ZERO).await.unwrap() {
        held.push(job);
    }
    assert_eq!(held.len(), 10, "a full queue has lost nothing");
    for n in 0..50 {
        let done = held.remove(0);
        bus.ack_job(&done.receipt).await.unwrap();
        bus.publish_job(&suite::request(&format!("next-{n}")))
            .await
            .unwrap();
        held.push(bus.next_job(Duration::ZERO).await.unwrap().unwrap());
    }
    let length: u64 = redis::cmd("XLEN")
        .arg(names::JOBS)
        .query(&mut remote.0.look())
        .unwrap();
    assert_eq!(length, 10, "acknowledged entries are gone");
    for job in held {
        bus.ack_job(&job.receipt).await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_is_killed_and_comes_back_has_lost_nothing() {
    let mut remote = Remote::new().await;
    let bus = remote.open().await;
    let mut orders = bus.controls().await.unwrap();
    bus.publish_job(&suite::request("a")).await.unwrap();
    let held = bus.next_job(SOON).await.unwrap().unwrap();
    bus.publish_job(&suite::request("b")).await.unwrap();
    remote.0.kill();
    // Whoever asks meanwhile waits, and gets its answer when the server is back.
    let asked = tokio::spawn({
        let bus = bus.clone();
        async move { bus.publish_result(&suite::result("a", "x")).await }
    });
    remote.0.up().await;
    assert_eq!(asked.await.unwrap().unwrap(), Published::New);
    bus.renew_job(&held.receipt).await.unwrap();
    bus.ack_job(&held.receipt).await.unwrap();
    assert_eq!(
        bus.next_job(SOON)
            .await
            .unwrap()
            .unwrap()
            .request
            .request_id,
        "b"
    );
    assert!(bus.next_result(SOON).await.unwrap().is_some());
    // The listener has come back as well: an order that is given until it is heard is heard.
    let heard = async {
        loop {
            bus.drain(None).await.unwrap();
            if tokio::time::timeout(Duration::from_millis(200), orders.next())
                .await
                .is_ok()
            {
                return;
            }
        }
    };
    tokio::time::timeout(SOON, heard)
        .await
        .expect("orders are heard again");
}

#[tokio::test]
async fn a_server_that_has_lost_everything_is_used_from_the_beginning() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    bus.publish_job(&suite::request("a")).await.unwrap();
    let held = bus.next_job(SOON).await.unwrap().unwrap();
    redis::cmd("FLUSHALL")
        .query::<()>(&mut remote.0.look())
        .unwrap();
    let gone = bus.renew_job(&held.receipt).await.unwrap_err();
    assert!(
        matches!(
            gone,
            TransportError::NotHeld { .. } | TransportError::Remote { .. }
        ),
        "{gone}"
    );
    let again = bus.publish_job(&suite::request("a")).await.unwrap();
    assert_eq!(again, Published::New);
    assert!(bus.next_job(SOON).await.unwrap().is_some());
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error_within_its_bound_and_without_a_password() {
    let bus = RedisTransport::with(Options {
        patience: Duration::from_millis(200),
        ..Options::new("redis://user:s3cret@127.0.0.1:1/")
    })
    .await;
    let error = format!("{:?}", bus.err().expect("nobody is there"));
    assert!(error.contains("127.0.0.1:1"), "{error}");
    assert!(!error.contains("s3cret"), "{error}");
}

#[tokio::test]
async fn a_cluster_serves_jobs_results_orders_and_events() {
    let cluster = Cluster::start().await;
    let open = || async { RedisTransport::connect(&cluster.url()).await.unwrap() };
    let (crew, spawner) = (open().await, open().await);
    let mut orders = spawner.controls().await.unwrap();
    for n in 0..20 {
        let id = format!("job-{n}");
        crew.publish_job(&suite::request(&id)).await.unwrap();
        let job = spawner.next_job(SOON).await.unwrap().unwrap();
        assert_eq!(job.request.request_id, id);
        spawner.renew_job(&job.receipt).await.unwrap();
        spawner
            .publish_result(&suite::result(&id, "x"))
            .await
            .unwrap();
        spawner.ack_job(&job.receipt).await.unwrap();
        let result = crew.next_result(SOON).await.unwrap().unwrap();
        assert_eq!(result.result.request_id, id);
        crew.ack_result(&result.receipt).await.unwrap();
        let again = crew.publish_job(&suite::request(&id)).await.unwrap();
        assert_eq!(again, Published::Known);
    }
    crew.cancel("job-x").await.unwrap();
    assert!(spawner.cancelled("job-x").await.unwrap());
    let order = tokio::time::timeout(SOON, orders.next()).await.unwrap();
    assert!(order.is_some());
}

#[tokio::test]
async fn a_fail_over_by_sentinel_is_followed_to_the_new_master() {
    let mut watched = Watched::start().await;
    let bus = RedisTransport::with(Options {
        patience: Duration::from_mins(1),
        ..Options::new(watched.url())
    })
    .await
    .unwrap();
    bus.publish_job(&suite::request("a")).await.unwrap();
    bus.publish_job(&suite::request("b")).await.unwrap();
    let held = bus.next_job(SOON).await.unwrap().unwrap();
    watched.wait_for_replica().await;
    watched.fail_over().await;
    bus.ack_job(&held.receipt).await.unwrap();
    let next = bus.next_job(SOON).await.unwrap().unwrap();
    assert_eq!(next.request.request_id, "b");
    bus.publish_result(&suite::result("a", "x")).await.unwrap();
    assert!(bus.next_result(SOON).await.unwrap().is_some());
}
