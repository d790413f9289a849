use ports::{
    Audience, CheckStatus, DeploymentStatus, Event, JobKind, JobStatus, ReviewVerdict,
    StatusReport, WaitKind,
};
use serde_json::json;

use crate::journal::{Journal, P, spec};
use crate::world::World;

on_both!(
    a_task_says_where_it_is,
    a_task_waits_while_a_person_is_asked,
    a_project_says_where_it_is,
    a_failed_thread_fails_its_work_until_it_is_retried,
    the_crews_word_counts_more_than_the_engines,
    a_cancelled_job_takes_its_tasks_and_questions_with_it,
    a_cancelled_task_does_not_come_back_by_a_late_result,
    a_release_gives_way_to_the_one_that_answers,
);

impl World {
    async fn now(&self, journal: &Journal) -> StatusReport {
        self.projector.catch_up(journal).await.unwrap();
        self.store.status_report(&P.into()).await.unwrap().unwrap()
    }
}

fn building() -> Journal {
    let mut journal = Journal::new();
    journal
        .founded()
        .specified("notes")
        .job("job-1", JobKind::New { spec: spec() })
        .planned(&[("a", &[]), ("b", &["a"])]);
    journal
}

async fn a_task_says_where_it_is(world: &World) {
    let mut journal = building();
    macro_rules! at {
        ($status:expr) => {
            assert_eq!(world.now(&journal).await.tasks[0].status, $status)
        };
    }
    at!("planned");
    journal.task("a");
    at!("working");
    journal.attempt(1).pull_request(1, "h1");
    at!("checking");
    journal.checked(CheckStatus::Failed);
    at!("working");
    journal.attempt(2).pull_request(1, "h2");
    journal.checked(CheckStatus::TimedOut);
    at!("working");
    journal.attempt(3).checked(CheckStatus::Passed);
    at!("reviewing");
    journal.reviewed(1, ReviewVerdict::SendBack);
    at!("working");
    journal
        .attempt(4)
        .pull_request(1, "h3")
        .checked(CheckStatus::Passed)
        .reviewed(2, ReviewVerdict::Approve);
    at!("merging");
    journal.pull_request(1, "rebased");
    at!("checking");
    journal.checked(CheckStatus::Passed);
    at!("merging");
    journal.merged(1);
    at!("merged");
    let task = &world.now(&journal).await.tasks[0];
    assert_eq!((task.attempts, task.review_rounds), (4, 2));
    let pull_request = task.pull_request.as_ref().unwrap();
    assert_eq!(
        (pull_request.number, pull_request.status.as_str()),
        (1, "merged")
    );

    journal
        .task("b")
        .pull_request(2, "h1")
        .say(Event::TaskEnded {
            status: "failed".to_owned(),
            failure: None,
        });
    let report = world.now(&journal).await;
    assert_eq!(report.tasks[1].status, "failed");
    assert_eq!(
        report.tasks[1].pull_request.as_ref().unwrap().status,
        "closed"
    );
}

async fn a_task_waits_while_a_person_is_asked(world: &World) {
    let mut journal = building();
    journal
        .task("a")
        .asks("w1", WaitKind::Help, Audience::Owner)
        .task("b")
        .attempt(1);
    let report = world.now(&journal).await;
    assert_eq!(report.tasks[0].status, "waiting");
    assert_eq!(report.job.unwrap().status, "running", "b goes on meanwhile");
    assert_eq!(report.project.status, "building");
    assert_eq!(report.waits.len(), 1);

    journal.pull_request(1, "h").say(Event::TaskEnded {
        status: "cancelled".to_owned(),
        failure: None,
    });
    let report = world.now(&journal).await;
    assert_eq!(report.tasks[1].status, "cancelled");
    assert_eq!(
        report.job.unwrap().status,
        "waiting",
        "nothing else can go on"
    );
    assert_eq!(report.project.status, "waiting");

    journal.answered("w1", Some("try again"));
    let report = world.now(&journal).await;
    assert_eq!(report.tasks[0].status, "working");
    assert_eq!(report.job.unwrap().status, "running");
    assert_eq!(report.waits, []);
}

async fn a_project_says_where_it_is(world: &World) {
    let mut journal = Journal::new();
    macro_rules! at {
        ($status:expr, $url:expr) => {{
            let project = world.now(&journal).await.project;
            assert_eq!(
                (project.status.as_str(), project.url.is_some()),
                ($status, $url)
            );
        }};
    }
    journal.founded();
    at!("draft", false);
    journal.asks("w1", WaitKind::Spec, Audience::Owner);
    at!("waiting", false);
    journal.answered("w1", Some("approve"));
    at!("draft", false);
    journal.specified("notes");
    at!("building", false);
    journal.job("job-1", JobKind::New { spec: spec() });
    at!("building", false);
    journal.asks("w2", WaitKind::Budget, Audience::Admins);
    at!("waiting", false);
    journal.answered("w2", None).ended(JobStatus::Failed);
    at!("failed", false);
    journal.job("job-2", JobKind::Redeploy);
    at!("building", false);
    journal
        .deployed(1, DeploymentStatus::Live)
        .ended(JobStatus::Deployed);
    at!("deployed", true);
    journal.job("job-3", JobKind::Redeploy);
    at!("building", true);
    journal
        .deployed(2, DeploymentStatus::RolledBack)
        .ended(JobStatus::Failed);
    at!("deployed", true);
    journal.about(P, None, None).service("stopped");
    at!("stopped", false);
    journal.service("started");
    at!("deployed", true);
    journal.service("archived");
    at!("archived", false);
    journal.job("job-4", JobKind::Redeploy);
    at!("building", false);
    journal
        .deployed(3, DeploymentStatus::Live)
        .ended(JobStatus::Deployed)
        .service("removed");
    at!("stopped", false);
    let details = world.store.project(&P.into()).await.unwrap().unwrap();
    assert_eq!(details.port, None);
}

async fn a_failed_thread_fails_its_work_until_it_is_retried(world: &World) {
    world
        .store
        .set_admin_chats("telegram", &["1".to_owned()])
        .await
        .unwrap();
    let mut journal = building();
    journal.node("developers").task("a").on(None);
    journal.entry(
        &format!("{P}/job-1/a"),
        "thread.failed",
        json!({"error": "the disk is full"}),
    );
    let report = world.now(&journal).await;
    assert_eq!(report.tasks[0].status, "failed");
    assert_eq!(report.job.unwrap().status, "running");

    journal.entry(
        &format!("{P}/job-1"),
        "thread.failed",
        json!({"error": "out of memory"}),
    );
    let report = world.now(&journal).await;
    assert_eq!(report.job.unwrap().status, "failed");
    assert_eq!(report.project.status, "failed");
    let notices = world.store.next_deliveries("telegram", 5).await.unwrap();
    assert!(
        notices[0].text.contains("the disk is full") && notices[0].text.contains("artel retry"),
        "{notices:?}"
    );

    journal.node("developers").on(Some("a")).attempt(2);
    let report = world.now(&journal).await;
    assert_eq!(report.job.unwrap().status, "running");
    assert_eq!(report.tasks[0].status, "working");
    assert_eq!(report.project.status, "building");
}

async fn the_crews_word_counts_more_than_the_engines(world: &World) {
    let mut journal = building();
    journal.ended(JobStatus::Cancelled).ended(JobStatus::Failed);
    journal.entry(
        &format!("{P}/job-1"),
        "thread.failed",
        json!({"error": "x"}),
    );
    journal.node("developers");
    let job = world.now(&journal).await.job.unwrap();
    assert_eq!((job.status.as_str(), job.node), ("cancelled", None));

    journal.job("job-2", JobKind::Redeploy);
    journal.entry(
        &format!("{P}/job-2"),
        "thread.cancelled",
        json!({"reason": "x"}),
    );
    journal.ended(JobStatus::Failed);
    assert_eq!(world.now(&journal).await.job.unwrap().status, "failed");
}

async fn a_cancelled_job_takes_its_tasks_and_questions_with_it(world: &World) {
    let mut journal = building();
    journal
        .whole_task("a", 1)
        .task("b")
        .pull_request(2, "h")
        .asks("w1", WaitKind::Help, Audience::Owner)
        .about(P, Some("job-10"), None)
        .asks("w2", WaitKind::Help, Audience::Owner)
        .about(P, Some("job-1"), None);
    journal.entry(
        &format!("{P}/job-1"),
        "thread.cancelled",
        json!({"reason": "asked to"}),
    );
    world.projector.catch_up(&journal).await.unwrap();
    let tasks = world.store.tasks(&P.into(), &"job-1".into()).await.unwrap();
    assert_eq!(tasks[0].status, "merged");
    assert_eq!(tasks[1].status, "cancelled");
    assert_eq!(tasks[1].pull_request.as_ref().unwrap().status, "closed");
    let waits = world.store.open_waits(Some(&P.into())).await.unwrap();
    assert_eq!(waits.len(), 1);
    assert_eq!(waits[0].id.as_str(), "w2", "job-10 is not below job-1");
}

async fn a_cancelled_task_does_not_come_back_by_a_late_result(world: &World) {
    let mut journal = building();
    journal.task("a").say(Event::TaskEnded {
        status: "cancelled".to_owned(),
        failure: None,
    });
    journal
        .attempt(2)
        .pull_request(1, "h")
        .checked(CheckStatus::Passed);
    assert_eq!(world.now(&journal).await.tasks[0].status, "cancelled");
    journal.task("a");
    assert_eq!(
        world.now(&journal).await.tasks[0].status,
        "working",
        "started anew"
    );
}

async fn a_release_gives_way_to_the_one_that_answers(world: &World) {
    let mut journal = building();
    macro_rules! at {
        ($expected:expr) => {{
            let report = world.now(&journal).await;
            let found: Vec<_> = report
                .deployments
                .iter()
                .map(|d| (d.release, d.status.as_str()))
                .collect();
            assert_eq!(found, $expected);
        }};
    }
    journal.deployed(1, DeploymentStatus::Live);
    at!([(1, "live")]);
    let first = world.now(&journal).await.deployments[0].at;
    journal.deployed(2, DeploymentStatus::Live);
    at!([(2, "live"), (1, "superseded")]);
    journal.deployed(3, DeploymentStatus::RolledBack);
    at!([(3, "rolled_back"), (2, "live"), (1, "superseded")]);
    // A person goes back.
    journal.deployed(1, DeploymentStatus::Live);
    at!([(3, "rolled_back"), (2, "rolled_back"), (1, "live")]);
    assert_eq!(world.now(&journal).await.deployments[2].at, first);
    journal.deployed(4, DeploymentStatus::Failed);
    at!([
        (4, "failed"),
        (3, "rolled_back"),
        (2, "rolled_back"),
        (1, "live")
    ]);
}
