//! What cannot be read: it is answered, kept with its reason within bounds, and nothing of it stays for ever.

use super::*;

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
    // One says whose result it is, and that one is told.
    let told = bus.next_result(SOON).await.unwrap().unwrap();
    assert_eq!(told.result.failure.unwrap().kind, "bad_result");
    bus.ack_result(&told.receipt).await.unwrap();
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
            let told = bus.next_result(SOON).await.unwrap().unwrap();
            bus.ack_result(&told.receipt).await.unwrap();
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

/// Puts a body into a stream, as somebody does who does not know us.
fn put(look: &mut redis::Connection, stream: &str, body: &str) {
    let mut add = redis::cmd("XADD");
    let add = add.arg(stream).arg("*").arg("data").arg(body);
    add.query::<()>(look).unwrap();
}

#[tokio::test]
async fn a_request_whose_answer_would_be_too_large_is_put_aside_and_holds_nobody_up() {
    let remote = Remote::new().await;
    let bus = remote.open_for(Duration::from_mins(10)).await;
    let mut look = remote.0.look();
    // What is wrong with it would be said in its own words, each of which is written with a backslash more.
    let mut wrong = serde_json::to_value(suite::request("wrong")).unwrap();
    wrong["attempt"] = "\"".repeat(400_000).into();
    put(&mut look, names::JOBS, &wrong.to_string());
    // Its answer would have to repeat a name without an end.
    let mut long = serde_json::to_value(suite::request("long")).unwrap();
    long["task_id"] = "x".repeat(2 << 20).into();
    put(&mut look, names::JOBS, &long.to_string());
    bus.publish_job(&suite::request("good")).await.unwrap();
    let job = bus.next_job(SOON).await.unwrap().unwrap();
    assert_eq!(job.request.request_id, "good");
    let letters = bus.dead_letters(10).await.unwrap();
    assert_eq!(letters.len(), 2);
    for (reason, _) in &letters {
        assert!(reason.len() <= 2048, "{} bytes", reason.len());
    }
    let answer = bus.next_result(SOON).await.unwrap().unwrap().result;
    let failure = answer.failure.unwrap();
    assert_eq!(
        (answer.request_id.as_str(), failure.kind.as_str()),
        ("wrong", "bad_request")
    );
    assert!(
        failure.message.len() <= 4096,
        "{} bytes",
        failure.message.len()
    );
    assert!(bus.next_result(Duration::ZERO).await.unwrap().is_none());
}

#[tokio::test]
async fn an_entry_with_its_message_twice_is_put_aside_with_both() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    let mut look = remote.0.look();
    let (one, two) = (suite::request("one"), suite::request("two"));
    let [one, two] = [one, two].map(|request| serde_json::to_string(&request).unwrap());
    let mut add = redis::cmd("XADD");
    let add = add.arg(names::JOBS).arg("*").arg("data").arg(&one);
    add.arg("data").arg(&two).query::<()>(&mut look).unwrap();
    assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
    let letters = bus.dead_letters(10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].1, format!("{one}\n{two}"));
    let answer = bus.next_result(SOON).await.unwrap().unwrap().result;
    assert_eq!(answer.request_id, "one");
}

#[tokio::test]
async fn a_result_that_nobody_can_read_ends_its_attempt_and_is_kept() {
    let remote = Remote::new().await;
    let bus = remote.open().await;
    let mut result = serde_json::to_value(suite::result("a", "x")).unwrap();
    result["version"] = 9.into();
    put(&mut remote.0.look(), names::RESULTS, &result.to_string());
    let told = bus.next_result(SOON).await.unwrap().unwrap();
    let expected = suite::result("a", "x");
    assert_eq!(told.result.request_id, "a");
    assert_eq!(told.result.task_id, expected.task_id);
    assert_eq!(told.result.attempt, expected.attempt);
    assert_eq!(told.result.fencing_token, expected.fencing_token);
    assert_eq!(told.result.status, protocol::ResultStatus::Failed);
    let failure = told.result.failure.unwrap();
    assert_eq!(failure.kind, "bad_result");
    assert!(failure.message.contains("version 9"), "{failure:#?}");
    assert!(failure.message.contains("an admin has to"), "{failure:#?}");
    bus.ack_result(&told.receipt).await.unwrap();
    assert!(bus.next_result(Duration::ZERO).await.unwrap().is_none());
    let letters = bus.dead_letters(10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].1, result.to_string());
}
