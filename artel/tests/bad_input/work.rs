//! What models and workers do.

use serde_json::{Value, json};

use crate::tapes::{home, one, plan, policy, processes, works};
use crate::{built, count, question, says, sentence};

#[tokio::test]
async fn a_plan_that_cannot_be_carried_out_goes_back_three_times_and_then_to_a_person() {
    let task = |id: &str, on: &[&str]| json!({"id": id, "title": id, "description": "Write it.", "acceptance": [], "depends_on": on});
    for (tasks, parts) in [
        (
            [task("a", &["b"]), task("b", &["a"])],
            &["circle", "a → b"][..],
        ),
        (
            [task("a", &[]), task("b", &["zz"])],
            &["\"b\" depends on \"zz\"", "not in the plan"],
        ),
        (
            [task("a", &[]), task("a", &[])],
            &["two tasks", "\"a\"", "unique"],
        ),
    ] {
        let mut tape = one();
        plan(&mut tape)["tasks"] = json!(tasks);
        let answers = tape["answers"]["architect"]["job-1"]
            .as_array_mut()
            .unwrap();
        *answers = std::iter::repeat_n(answers[0].clone(), 6).collect();
        let home = home(&tape);
        let ran = built(&home, 3).await;
        let asked = question(&ran);
        if parts[0] == "circle" {
            says(&asked, &["circle"]);
            assert!(
                asked.contains("a → b → a") || asked.contains("b → a → b"),
                "{asked}"
            );
        } else {
            says(&asked, parts);
        }
        says(&asked, &["4 times in a row"]);
        let calls = ran
            .json()
            .iter()
            .filter(|line| {
                line["event"] == "model.used" && line["data"]["spend"]["role"] == "architect"
            })
            .count();
        assert_eq!(calls, 4, "once, and three times sent back: {ran:#?}");

        // It waits, and a person can end it.
        let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
        let ran = home.run(&["reject", &wait, "--json"]).await.code(1);
        assert_eq!(ran.end()["status"], "failed", "{ran:#?}");
        let ran = home.run(&["approve", &wait]).await.code(1);
        says(sentence(&ran), &["answered before", "nothing changed"]);
    }
}

#[tokio::test]
async fn a_worker_that_exits_0_without_a_commit_ends_in_a_persons_hands() {
    let mut home = home(&one());
    home.set("ARTEL_AGENT", "command");
    home.set("ARTEL_AGENT_COMMAND", "[\"true\"]");
    let ran = built(&home, 3).await;
    says(&question(&ran), &["Hello", "commit"]);
    assert_eq!(count(&ran.json(), "task.attempt"), 2, "{ran:#?}");
    let report = home.status("one").await;
    assert_eq!(report["tasks"][0]["attempts"], 2, "{report:#}");
    assert_eq!(report["tasks"][0]["pull_request"], Value::Null);

    // A person gives the task up, then the job; nobody is asked a third time.
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["reject", &wait, "--json"]).await.code(3);
    says(&question(&ran), &["hello"]);
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["reject", &wait, "--json"]).await.code(1);
    assert_eq!(ran.end()["status"], "failed", "{ran:#?}");
}

#[tokio::test]
async fn a_task_that_changes_nothing_ends_in_a_persons_hands() {
    let mut tape = one();
    works(&mut tape, "git log --oneline", 4);
    let home = home(&tape);
    let ran = built(&home, 3).await;
    says(&question(&ran), &["Hello", "commit"]);
    assert_eq!(count(&ran.json(), "task.attempt"), 2, "{ran:#?}");
}

#[tokio::test]
async fn checks_that_never_end_are_ended_and_count_as_failed() {
    let mut tape = one();
    plan(&mut tape)["manifest"]["checks"] = json!("echo looking; sleep 98761");
    works(
        &mut tape,
        "date +%s%N >> hello.txt; git add -A; git commit -qm hello; git log --oneline",
        2,
    );
    let home = home(&tape);
    policy(&home, "checks_wall_s = 1\nmax_review_rounds = 2");
    let ran = built(&home, 3).await;
    says(
        &question(&ran),
        &[
            "sent back 2 times",
            "did not end in time",
            "within 1 s",
            "looking",
        ],
    );
    assert_eq!(count(&ran.json(), "task.checked"), 2, "{ran:#?}");
    assert_eq!(processes("98761"), []);
}
