//! Workers: cancelled, listened to, taken over, tried again.

use super::*;

#[tokio::test]
async fn while_a_worker_runs_no_lease_is_held_and_cancelling_ends_it_within_3_seconds() {
    let mut tape = one();
    works(&mut tape, "sleep 98771", 1);
    let home = home(&tape);
    let mut up = up(&home).await;
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let project = new.event("task.attempt", SOON).await["project"]
        .as_str()
        .unwrap()
        .to_owned();
    eventually("the worker runs", SOON, || async {
        (!processes("sleep 98771").is_empty()).then_some(())
    })
    .await;
    eventually("no lease is held", SOON, || async {
        let threads = threads(&home, &project).await;
        assert_eq!(threads.len(), 3, "{threads:?}");
        threads.values().all(|(_, leased)| !leased).then_some(())
    })
    .await;
    for _ in 0..3 {
        for (name, (status, leased)) in threads(&home, &project).await {
            assert!(status == "waiting" && !leased, "{name} is {status}");
        }
    }

    // What a command takes that does nothing says how busy the machine is, before and after.
    let nothing = async || {
        let before = Instant::now();
        home.run(&["threads", &project]).await.success();
        before.elapsed()
    };
    let idle = nothing().await;
    let before = Instant::now();
    home.run(&["cancel", &project]).await.success();
    let took = before.elapsed();
    let idle = idle.max(nothing().await);
    let most = Duration::from_secs(3) + 20 * idle;
    assert!(
        took < most,
        "it took {took:?}, and a command alone {idle:?}"
    );
    assert_eq!(processes("sleep 98771"), []);
    let threads = threads(&home, &project).await;
    for name in ["job-1", "job-1/hello"] {
        assert_eq!(threads[name], ("cancelled".to_owned(), false), "{name}");
    }
    assert_eq!(new.ended(SOON).await, 1, "{:#?}", new.seen);
    let end: Value = serde_json::from_str(new.seen.last().unwrap()).unwrap();
    assert_eq!(end["status"], "cancelled");
    let report = home.status(&project).await;
    assert_eq!(report["job"]["status"], "cancelled", "{report:#}");
    assert_eq!(report["tasks"][0]["status"], "cancelled", "{report:#}");
    let again = home.run(&["cancel", &project]).await.code(1);
    assert!(again.stderr.contains("no job"), "{again:#?}");
    assert_eq!(up.terminate(SOON).await, 0);
}

#[tokio::test]
async fn what_a_worker_says_and_is_refused_is_read_while_it_works() {
    let mut tape = one();
    let command = "curl -sS -m 20 http://packages.example/index; sleep 98773";
    works(&mut tape, command, 1);
    let home = home(&tape);
    let mut up = up(&home).await;
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let attempt = new.event("task.attempt", SOON).await;
    let project = attempt["project"].as_str().unwrap();
    let mut follows = home.start(&["logs", project, "--task", "hello", "-f"]);
    follows
        .line("the refusal", SOON, |line| {
            line.contains("attempt 1: was refused packages.example:80: ")
        })
        .await;
    eventually("all of it is kept", SOON, || async {
        let args = ["logs", project, "--task", "hello", "--json"];
        let said = home.run(&args).await.success().json();
        let has = |kind: &str, words: &str| {
            said.iter()
                .any(|one| one["kind"] == kind && one["text"].as_str().unwrap().contains(words))
        };
        assert!(said.iter().all(|one| one["attempt"] == 1), "{said:#?}");
        (has("phase", "running: step 1")
            && has("log", "curl -sS")
            && has("refused", "packages.example:80"))
        .then_some(())
    })
    .await;
    let ran = home
        .run(&["logs", project, "--task", "hello", "-n", "2"])
        .await
        .success();
    assert_eq!(ran.stdout.lines().count(), 2, "{ran:#?}");
    let ran = home.run(&["logs", project, "--task", "bye"]).await.code(1);
    assert!(
        ran.stderr.contains("no worker of") && ran.stderr.contains("hello"),
        "{ran:#?}"
    );
    home.run(&["cancel", project]).await.success();
    assert_eq!(new.ended(SOON).await, 1, "{:#?}", new.seen);
    assert_eq!(up.terminate(SOON).await, 0);
}

#[tokio::test]
async fn a_second_process_takes_the_job_over_from_one_that_was_killed() {
    let mut tape = one();
    works(
        &mut tape,
        "sleep 2; echo hello > hello.txt; git add -A; git commit -qm hello; git log --oneline",
        3,
    );
    let mut home = home(&tape);
    home.on_postgres().await;
    let mut first = up(&home).await;
    let mut second = home.start(&["up"]);
    second
        .line("it waits", SOON, |line| {
            line.contains("takes over when it ends")
        })
        .await;
    // It only says what is wanted; whoever is up does it.
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let project = new.event("task.attempt", SOON).await["project"]
        .as_str()
        .unwrap()
        .to_owned();
    new.kill().await;
    first.kill().await;
    second
        .line("it took over", SOON, |line| line.contains(UP))
        .await;
    let report = becomes(&home, &project, "deployed").await;
    let url = &report["project"]["url"];
    assert_eq!(get(&page(url, "hello.txt")).await.1, "hello\n");
    let events = events(&home, &project).await;
    for name in ["job.started", "task.merged", "deploy.ended", "job.ended"] {
        assert_eq!(count(&events, name), 1, "{name}: {events:#?}");
    }
    home.run(&["remove", &project, "--yes"]).await.success();
    assert_eq!(second.terminate(SOON).await, 0);
}

#[tokio::test]
async fn what_up_was_doing_when_it_was_told_to_stop_is_done_by_its_next_start() {
    let mut tape = one();
    works(
        &mut tape,
        "sleep 2; echo hello > hello.txt; git add -A; git commit -qm hello; git log --oneline",
        3,
    );
    let home = home(&tape);
    let mut running = up(&home).await;
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let project = new.event("task.attempt", SOON).await["project"]
        .as_str()
        .unwrap()
        .to_owned();
    new.kill().await;
    assert_eq!(running.terminate(SOON).await, 0);
    let report = home.status(&project).await;
    assert_ne!(report["project"]["status"], "deployed", "{report:#}");

    let mut running = up(&home).await;
    becomes(&home, &project, "deployed").await;
    let events = events(&home, &project).await;
    for name in ["job.started", "task.merged", "deploy.ended", "job.ended"] {
        assert_eq!(count(&events, name), 1, "{name}: {events:#?}");
    }
    home.run(&["remove", &project, "--yes"]).await.success();
    assert_eq!(running.terminate(SOON).await, 0);
}

#[tokio::test]
async fn a_task_in_a_persons_hands_is_tried_again_in_its_workspace() {
    let mut tape = one();
    works(
        &mut tape,
        "echo x >> .artel/tries; test $(wc -l < .artel/tries) -lt 5 || { echo hello > hello.txt; git add hello.txt; git commit -qm hello; }; git log --oneline",
        6,
    );
    let home = home(&tape);
    home.run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
    let ran = home
        .run(&["retry", "one", "hello", "--json"])
        .await
        .success();
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    let report = home.status("one").await;
    assert_eq!(report["tasks"][0]["attempts"], 3, "{report:#}");
    let ran = home.run(&["retry", "one"]).await.code(1);
    assert!(ran.stderr.contains("nothing of one waits"), "{ran:#?}");
    home.run(&["remove", "one", "--yes"]).await.success();
}
