//! Who holds what: processes that are gone, holds that run out, and what may be trimmed.

use super::*;

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
        assert!(start.elapsed() < SOON, "{:?}", consumers());
        drop(open("next", moment).await);
    }
    // What it held is handed out again, and then it is forgotten as well.
    let next = open("next", moment).await;
    assert_eq!(next.abandon("holds").await.unwrap(), 1);
    let start = tokio::time::Instant::now();
    while !consumers().is_empty() {
        assert!(start.elapsed() < SOON, "{:?}", consumers());
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
    let lease = Duration::from_mins(10);
    let (holder, other) = (remote.open_for(lease).await, remote.open_for(lease).await);
    let mut held = Vec::new();
    for n in 0..40 {
        holder
            .publish_job(&suite::request(&format!("job-{n:02}")))
            .await
            .unwrap();
        held.push(holder.next_job(SOON).await.unwrap().unwrap());
    }
    // As if nobody had renewed the last one, which is far beyond the first page of what is pending.
    let lost = held.pop().unwrap();
    let mut receipt = lost.receipt.split('/');
    let (entry, consumer) = receipt.next().zip(receipt.next()).unwrap();
    redis::cmd("XCLAIM")
        .arg(&[names::JOBS, names::GROUP_SPAWNERS, consumer, "0", entry])
        .arg("IDLE")
        .arg(lease.as_secs() * 1000 + 1)
        .arg("JUSTID")
        .exec(&mut remote.0.look())
        .unwrap();
    let taken = other.next_job(Duration::ZERO).await.unwrap().unwrap();
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
