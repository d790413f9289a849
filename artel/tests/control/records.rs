//! What is written down: drawn, recorded, replayed, and made again.

use super::*;

#[tokio::test]
async fn the_crew_is_drawn_with_its_seven_nodes() {
    let home = home(&one());
    for (format, begins) in [
        ("mermaid", "flowchart"),
        ("dot", "digraph"),
        ("svg", "<svg"),
    ] {
        let ran = home.run(&["graph", "--format", format]).await.success();
        assert!(ran.stdout.contains(begins), "{format}: {}", ran.stdout);
        for node in [
            "brainstorm",
            "zavhoz",
            "architect",
            "developers",
            "developer",
            "reviewer",
            "devops",
        ] {
            assert!(ran.stdout.contains(node), "{node} in {format}");
        }
    }
}

#[tokio::test]
async fn a_run_is_recorded_replayed_looked_at_and_its_projections_made_again() {
    let first = home(&one());
    let ran = first
        .run(&[
            "new",
            "Say hello",
            "--yes",
            "--json",
            "--record",
            "recorded.yaml",
        ])
        .await
        .success();
    let project = ran.end()["project"].as_str().unwrap().to_owned();

    // The recording is a tape of its own.
    let mut second = Home::new();
    second.set(
        "ARTEL_TAPE",
        &first.file("recorded.yaml").display().to_string(),
    );
    let ran = second
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .success();
    let url = ran.end()["url"].clone();
    assert_eq!(get(&page(&url, "hello.txt")).await.1, "hello\n");
    second.run(&["remove", "one", "--yes"]).await.success();

    // Threads and their history.
    let threads = threads(&first, "one").await;
    let names: Vec<_> = threads.keys().map(String::as_str).collect();
    assert_eq!(names, ["", "job-1", "job-1/hello"]);
    assert_eq!(threads["job-1"].0, "done");
    let thread = format!("{project}/job-1");
    let history = first.run(&["history", &thread, "--json"]).await.success();
    let steps = history.json();
    assert!(steps.len() >= 4, "{steps:#?}");
    let checkpoint = steps[steps.len() / 2]["checkpoint"].to_string();
    let ran = first.run(&["replay", &thread, &checkpoint]).await.code(1);
    assert!(ran.stderr.contains("--live"), "{ran:#?}");
    let ran = first
        .run(&["fork", &thread, &checkpoint, "--json"])
        .await
        .success();
    assert!(ran.end()["branch"].as_u64().unwrap() > 0, "{ran:#?}");
    let ran = first.run(&["fork", &thread, "first"]).await.code(1);
    assert!(ran.stderr.contains("artel history"), "{ran:#?}");

    // What is made from the journal can be thrown away.
    let status = first.status("one").await;
    let spoken = events(&first, "one").await.len();
    first
        .run(&["migrate", "--rebuild-projections"])
        .await
        .success();
    assert_eq!(first.status("one").await, status);
    assert_eq!(events(&first, "one").await.len(), spoken);
    first.run(&["remove", "one", "--yes"]).await.success();
}

#[tokio::test]
async fn projections_are_made_again_on_postgresql_too() {
    let mut home = home(&one());
    home.on_postgres().await;
    home.run(&["new", "Say hello", "--yes"]).await.success();
    let status = home.status("one").await;
    home.run(&["migrate", "--rebuild-projections"])
        .await
        .success();
    assert_eq!(home.status("one").await, status);
    home.run(&["remove", "one", "--yes"]).await.success();
}

#[tokio::test]
async fn a_database_of_another_data_folder_is_refused() {
    let mut first = Home::with_tape();
    first.on_postgres().await;
    first.run(&["projects"]).await.success();
    let mut second = Home::with_tape();
    second.set("DATABASE_URL", first.setting("DATABASE_URL").unwrap());
    let refused = second.run(&["projects"]).await.code(1);
    for part in ["another data folder", "ARTEL_HOME", "DATABASE_URL"] {
        assert!(refused.stderr.contains(part), "{part} in {refused:#?}");
    }
    first.run(&["projects"]).await.success();
}
