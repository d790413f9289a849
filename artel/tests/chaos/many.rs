//! Fifty jobs at eight at a time.

use crate::crew::{commits, task};
use crate::engine::Engine;
use crate::support::eventually;
use crate::{House, SOON};
use std::time::Duration;

const AT_A_TIME: usize = 8;

/// All of them end once, eight run at a time and never a ninth, and nothing is left.
async fn many(engine: Option<Engine>, jobs: usize) {
    // The workspaces are looked into from here, also when their jobs are over.
    let house = House::with(&[("SPAWNER_DISK", "polled")], engine, AT_A_TIME).await;
    // The first ones wait for one another.
    let crew = house
        .crew(|n| {
            let wait = "touch here; while [ ! -e go ]; do sleep 0.1; done; rm here go\n";
            format!(
                "{}{}",
                if n < AT_A_TIME { wait } else { "" },
                commits(n, "0")
            )
        })
        .await;
    for n in 0..jobs {
        crew.send(n, 1).await;
    }
    let workspace = |n: usize| house.home.file(&format!("workspaces/p/job-1/{}", task(n)));
    eventually("eight work at a time", SOON, || async {
        let working = (0..AT_A_TIME).filter(|n| workspace(*n).join("here").exists());
        (working.count() == AT_A_TIME).then_some(())
    })
    .await;
    for n in AT_A_TIME..jobs {
        assert!(!workspace(n).exists(), "{n} did not wait for its turn");
    }
    for n in 0..AT_A_TIME {
        std::fs::write(workspace(n).join("go"), "").unwrap();
    }
    crew.until_all_is_done(Duration::from_mins(4)).await;
    assert_eq!(crew.every_job_ended_once(jobs), 0, "nothing was lost");
    for n in 0..jobs {
        let runs = std::fs::read_to_string(workspace(n).join(".git/runs")).unwrap();
        assert_eq!(runs, "run\n", "{n} ran once");
    }
    house.nothing_is_left(jobs).await;
}

#[tokio::test]
async fn fifty_jobs_at_eight_at_a_time_end_once_each_and_leave_nothing() {
    many(None, 50).await;
}

#[tokio::test]
async fn fifty_jobs_in_containers_at_eight_at_a_time_end_once_each_and_leave_nothing() {
    many(Some(Engine::shared()), 50).await;
}
