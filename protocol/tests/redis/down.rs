//! Servers that go away, come back, forget, or hand over to another one.

use super::*;
use server::{Cluster, Watched};

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
    assert!(matches!(gone, TransportError::NotHeld { .. }), "{gone}");
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

#[tokio::test]
async fn who_held_something_of_a_stream_that_was_deleted_is_told_so() {
    let remote = Remote::new().await;
    let options = Options {
        lease: Duration::from_mins(10),
        holder: Some("holder".to_owned()),
        ..remote.options()
    };
    let bus = RedisTransport::with(options).await.unwrap();
    bus.publish_job(&suite::request("a")).await.unwrap();
    let job = bus.next_job(SOON).await.unwrap().unwrap().receipt;
    bus.publish_result(&suite::result("a", "x")).await.unwrap();
    let result = bus.next_result(SOON).await.unwrap().unwrap().receipt;
    let mut delete = redis::cmd("DEL");
    let delete = delete.arg(names::JOBS).arg(names::RESULTS);
    delete.query::<()>(&mut remote.0.look()).unwrap();
    for (what, told) in [
        ("renew", bus.renew_job(&job).await),
        ("release", bus.release_job(&job).await),
        ("dead letter", bus.dead_letter(&job, "poison").await),
        ("acknowledge", bus.ack_job(&job).await),
        ("release a result", bus.release_result(&result).await),
        ("acknowledge a result", bus.ack_result(&result).await),
    ] {
        let told = told.unwrap_err();
        assert!(
            matches!(told, TransportError::NotHeld { .. }),
            "{what}: {told}"
        );
    }
    assert_eq!(bus.abandon("holder").await.unwrap(), 0);
    assert_eq!(bus.dead_letters(10).await.unwrap(), []);
}

#[tokio::test]
async fn what_was_deleted_by_hand_can_be_published_again_and_what_is_over_cannot() {
    let remote = Remote::new().await;
    let bus = remote.open_for(Duration::from_mins(10)).await;
    let mut look = remote.0.look();
    bus.publish_job(&suite::request("over")).await.unwrap();
    let over = bus.next_job(SOON).await.unwrap().unwrap();
    bus.ack_job(&over.receipt).await.unwrap();
    for stream in [names::JOBS, names::RESULTS] {
        for how in ["DEL", "XTRIM"] {
            let id = format!("{}-{how}", &stream["worker:".len()..]);
            let published = async || match stream {
                names::JOBS => bus.publish_job(&suite::request(&id)).await.unwrap(),
                _ => bus.publish_result(&suite::result(&id, "x")).await.unwrap(),
            };
            assert_eq!(published().await, Published::New);
            assert_eq!(published().await, Published::Known);
            let mut delete = redis::cmd(how);
            delete.arg(stream);
            if how == "XTRIM" {
                delete.arg("MAXLEN").arg(0);
            }
            delete.query::<()>(&mut look).unwrap();
            assert_eq!(published().await, Published::New, "{id}");
            assert_eq!(published().await, Published::Known, "{id}");
            // Found out by whoever looks: an entry that is gone may have been looked at.
            let found = async {
                loop {
                    match stream {
                        names::JOBS => {
                            if let Some(job) = bus.next_job(SOON).await.unwrap() {
                                bus.ack_job(&job.receipt).await.unwrap();
                                return job.request.request_id;
                            }
                        }
                        _ => {
                            if let Some(result) = bus.next_result(SOON).await.unwrap() {
                                bus.ack_result(&result.receipt).await.unwrap();
                                return result.result.request_id;
                            }
                        }
                    }
                }
            };
            assert_eq!(tokio::time::timeout(SOON, found).await.unwrap(), id);
            assert_eq!(published().await, Published::Known, "{id} is over");
        }
    }
    let again = bus.publish_job(&suite::request("over")).await.unwrap();
    assert_eq!(again, Published::Known);
}
