//! Without a sandbox.

use crate::stage::{Cleanup, PROGRAM, Stage, assert_succeeded, runs, says};
use spawner::runtime::Local;
use std::sync::Arc;

#[tokio::test]
async fn the_shipped_tape_runs_where_there_is_no_sandbox() {
    let sandbox = sandbox::Sandbox::unconfined(sandbox::Unconfined::ShippedTape);
    let runtime = Arc::new(Local::new(sandbox, PROGRAM));
    let folder = tempfile::tempdir().unwrap();
    let commit = "echo hello > hello.txt && git add hello.txt && git commit -q -m 'Add hello'";
    let script = [runs(commit), says("done")];
    let stage = Stage::with(folder, runtime, Cleanup(None), script).await;
    assert_succeeded(&stage.run(&stage.request("r1", 1)).await);
    stage.push([
        runs("echo bye >> hello.txt; git commit -qam Bye"),
        says("done"),
    ]);
    let mut second = stage.request("r2", 2);
    second.task.body_markdown = "Say goodbye, too.".into();
    assert_succeeded(&stage.run(&second).await);
    assert_eq!(stage.show("hello.txt"), "hello\nbye\n");
}
