//! What a server answers that cannot do what it is asked for, and what a person is told of it.

use super::*;

fn set(look: &mut redis::Connection, name: &str, value: &str) {
    let mut command = redis::cmd("CONFIG");
    command.arg("SET").arg(name).arg(value);
    command.exec(look).unwrap();
}

/// With little patience.
async fn connect(remote: &Remote) -> Result<RedisTransport, TransportError> {
    let options = Options {
        patience: Duration::from_millis(200),
        ..remote.options()
    };
    RedisTransport::with(options).await
}

#[track_caller]
fn says<T>(outcome: Result<T, TransportError>, parts: &[&str]) {
    let said = outcome.err().expect("it is refused").to_string();
    for part in parts {
        assert!(said.contains(part), "{part:?} is not said in: {said}");
    }
}

#[tokio::test]
async fn who_is_not_let_in_is_told_what_to_put_into_the_address() {
    let remote = Remote::new().await;
    let mut look = remote.0.look();
    set(&mut look, "requirepass", "s3cret");
    says(connect(&remote).await, &["NOAUTH", "REDIS_URL", "password"]);
    let wrong = Options::new(format!("{}?pass=wr0ng", remote.0.url()));
    let refused = RedisTransport::with(wrong).await;
    assert!(!format!("{:?}", refused.as_ref().err()).contains("wr0ng"));
    says(refused, &["REDIS_URL", "password"]);
    let mut user = redis::cmd("ACL");
    user.arg("SETUSER")
        .arg("default")
        .arg("-evalsha")
        .arg("-eval");
    user.exec(&mut look).unwrap();
    let right = Options::new(format!("{}?pass=s3cret", remote.0.url()));
    says(RedisTransport::with(right).await, &["REDIS_URL", "may not"]);
}

#[tokio::test]
async fn a_server_whose_memory_is_full_refuses_what_is_new_and_hands_out_what_it_has() {
    let remote = Remote::new().await;
    let bus = connect(&remote).await.unwrap();
    for id in ["a", "b", "c"] {
        bus.publish_job(&suite::request(id)).await.unwrap();
    }
    bus.publish_result(&suite::result("z", "x")).await.unwrap();
    let mut look = remote.0.look();
    set(&mut look, "maxmemory", "1");
    says(
        bus.publish_job(&suite::request("d")).await,
        &["OOM", "memory is full", "maxmemory"],
    );
    let jobs = [
        bus.next_job(Duration::ZERO).await.unwrap().unwrap(),
        bus.next_job(Duration::ZERO).await.unwrap().unwrap(),
        bus.next_job(Duration::ZERO).await.unwrap().unwrap(),
    ];
    assert_eq!(jobs.each_ref().map(|job| job.deliveries), [1, 1, 1]);
    bus.renew_job(&jobs[0].receipt).await.unwrap();
    bus.ack_job(&jobs[0].receipt).await.unwrap();
    bus.release_job(&jobs[1].receipt).await.unwrap();
    let result = bus.next_result(Duration::ZERO).await.unwrap().unwrap();
    bus.ack_result(&result.receipt).await.unwrap();
    set(&mut look, "maxmemory", "0");
    bus.publish_job(&suite::request("d")).await.unwrap();
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_waited_for_and_told_of() {
    let remote = Remote::new().await;
    let (short, long) = (connect(&remote).await.unwrap(), remote.open().await);
    let mut look = remote.0.look();
    let mut follow = |whom: [&str; 2]| {
        let mut command = redis::cmd("REPLICAOF");
        command.arg(&whom[..]);
        command.exec(&mut look).unwrap();
    };
    follow(["127.0.0.1", "1"]);
    let request = suite::request("a");
    says(short.publish_job(&request).await, &["replica", "REDIS_URL"]);
    let waits = tokio::spawn(async move { long.publish_job(&request).await });
    follow(["NO", "ONE"]);
    assert_eq!(waits.await.unwrap().unwrap(), Published::New);
}
