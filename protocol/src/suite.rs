//! What every transport has to pass, written against [`Transport`] alone.
//!
//! A transport's tests give a [`Harness`] and call [`crate::transport_suite!`], which makes one
//! test of every case here. A case panics when the transport is wrong, as tests do.

use crate::{
    Agent, Control, EventKind, Failure, JobDelivery, Limits, Network, Published, Repository,
    ResultDelivery, ResultStatus, Room, Rooms, Size, Source, SpawnRequest, TaskBrief, Transport,
    TransportError, VERSION, WorkerEvent, WorkerResult,
};
use async_trait::async_trait;
use futures::StreamExt as _;
use jiff::Timestamp;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

mod rooms;
mod spawners;

pub use rooms::*;
pub use spawners::*;

/// How the cases get at a transport.
#[async_trait]
pub trait Harness: Send + Sync {
    /// A transport as a freshly started program opens it, every time on the same store. The former
    /// one has been dropped without ceremony, as by `kill -9`.
    ///
    /// What it hands out stays held: a machine that stands still for a moment does not hand it out again.
    async fn open(&self) -> Arc<dyn Transport> {
        self.open_for(LONG).await
    }

    /// The same, with another lease.
    async fn open_for(&self, lease: Duration) -> Arc<dyn Transport>;

    /// The same, with a lease that does not run out in a test: a heartbeat counts for so long, and a spawner is remembered for so
    /// long.
    async fn open_remembering(&self, lives: Duration, lately: Duration) -> Arc<dyn Transport>;

    /// How long an unrenewed delivery is held; a second at most, so that tests are quick.
    fn lease(&self) -> Duration;
}

/// Makes a `#[tokio::test]` of every case; the argument is an expression that makes a [`Harness`].
#[macro_export]
macro_rules! transport_suite {
    ($harness:expr) => {
        $crate::transport_suite!(@cases $harness;
            a_job_is_handed_out_once_and_forgotten_when_acknowledged
            publishing_a_request_again_changes_nothing
            jobs_come_in_the_order_of_publishing
            an_unfinished_job_is_offered_again_after_a_crash
            a_released_job_is_offered_again
            a_job_is_taken_only_by_who_has_room_for_it
            a_waiting_spawner_takes_a_job_when_its_room_grows
            place_is_kept_for_a_job_that_was_passed_over_for_too_long
            a_job_whose_worker_runs_here_already_needs_no_room_and_comes_first
            a_job_that_fits_nobody_is_handed_out_when_its_grace_is_over
            a_project_with_forty_waiting_jobs_does_not_hold_up_another_one
            what_is_handed_out_alternates_between_projects_by_what_they_hold
            a_project_whose_spawner_died_does_not_count_as_running
            a_job_that_is_not_renewed_goes_to_somebody_else
            two_spawners_never_hold_the_same_job
            a_waiting_spawner_wakes_when_a_job_is_published
            a_dead_letter_keeps_its_reason_and_is_not_offered_again
            an_unacknowledged_result_is_delivered_again_after_a_crash
            a_released_result_is_delivered_again
            the_first_result_of_a_request_is_its_result
            a_request_that_is_over_is_not_taken_up_again
            a_cancel_is_durable_and_reaches_listeners
            a_drain_reaches_listeners
            events_are_kept_for_latecomers_and_end_with_the_result
            events_that_nobody_reads_hold_nobody_up
            a_spawner_that_lives_is_listed
            a_spawner_that_was_heard_of_lately_may_come_back_until_it_says_farewell
            a_spawner_that_is_silent_for_too_long_is_forgotten
            of_too_many_spawners_those_are_forgotten_that_were_silent_for_the_longest_time
            what_a_job_may_use_is_known_while_it_waits
            a_message_that_is_wrong_is_refused
        );
    };
    (@cases $harness:expr; $($case:ident)*) => {
        $(
            #[tokio::test]
            async fn $case() {
                $crate::suite::$case(&$harness).await;
            }
        )*
    };
}

/// Bound of every wait.
const SOON: Duration = Duration::from_mins(1);
const NOT_NOW: Duration = Duration::from_millis(50);
/// A lease that does not run out in a test.
const LONG: Duration = Duration::from_mins(10);

/// A request with this id, otherwise ordinary.
pub fn request(id: &str) -> SpawnRequest {
    SpawnRequest {
        version: VERSION,
        request_id: id.to_owned(),
        project_id: "project".to_owned(),
        job_id: "job".to_owned(),
        task_id: format!("task-{id}"),
        attempt: 1,
        fencing_token: 7,
        repository: Repository {
            source: Source::Path("/repository.git".to_owned()),
            base_sha: "3f786850e387550fdab836ed7e6dc881de23001b".to_owned(),
            branch: format!("task/{id}"),
            workflows: false,
        },
        task: TaskBrief {
            title: "A title".to_owned(),
            body_markdown: "A body".to_owned(),
            acceptance: vec![],
        },
        agent: Agent {
            adapter: "artel-agent".to_owned(),
            command: vec![],
            model: None,
        },
        limits: Limits::default(),
        docker: false,
        network: Network::default(),
        secrets: vec![],
        trace_context: None,
        created_at: Timestamp::now(),
    }
}

/// A failed result for [`request`] of the same id.
pub fn result(id: &str, kind: &str) -> WorkerResult {
    WorkerResult {
        failure: Some(Failure {
            kind: kind.to_owned(),
            message: "It did not work.".to_owned(),
            evidence: String::new(),
        }),
        ..WorkerResult::of(&request(id), ResultStatus::Failed, Timestamp::now())
    }
}

async fn job(bus: &Arc<dyn Transport>) -> JobDelivery {
    bus.next_job(SOON).await.unwrap().expect("a job comes")
}

async fn no_job(bus: &Arc<dyn Transport>) {
    let job = bus.next_job(NOT_NOW).await.unwrap();
    assert!(job.is_none(), "nothing should be offered, but got {job:?}");
}

async fn outcome(bus: &Arc<dyn Transport>) -> ResultDelivery {
    bus.next_result(SOON)
        .await
        .unwrap()
        .expect("a result comes")
}

async fn no_outcome(bus: &Arc<dyn Transport>) {
    let result = bus.next_result(NOT_NOW).await.unwrap();
    assert!(
        result.is_none(),
        "nothing should be delivered, but got {result:?}"
    );
}

async fn publish(bus: &Arc<dyn Transport>, id: &str) {
    let published = bus.publish_job(&request(id)).await.unwrap();
    assert_eq!(published, Published::New);
}

/// See the name.
pub async fn a_job_is_handed_out_once_and_forgotten_when_acknowledged(harness: &dyn Harness) {
    let bus = harness.open().await;
    no_job(&bus).await;
    publish(&bus, "a").await;
    let held = job(&bus).await;
    assert_eq!(held.request.request_id, "a");
    assert_eq!(held.request.task, request("a").task);
    assert_eq!(held.deliveries, 1);
    no_job(&bus).await;
    bus.ack_job(&held.receipt).await.unwrap();
    let again = bus.ack_job(&held.receipt).await;
    assert!(
        matches!(again, Err(TransportError::NotHeld { .. })),
        "{again:?}"
    );
    drop(bus);
    no_job(&harness.open().await).await;
}

/// See the name.
pub async fn publishing_a_request_again_changes_nothing(harness: &dyn Harness) {
    let bus = harness.open().await;
    publish(&bus, "a").await;
    let again = bus.publish_job(&request("a")).await.unwrap();
    assert_eq!(again, Published::Known);
    let held = job(&bus).await;
    let again = bus.publish_job(&request("a")).await.unwrap();
    assert_eq!(again, Published::Known, "also while it is held");
    no_job(&bus).await;
    bus.publish_result(&result("a", "first")).await.unwrap();
    bus.ack_job(&held.receipt).await.unwrap();
    no_job(&bus).await;
}

/// See the name.
pub async fn jobs_come_in_the_order_of_publishing(harness: &dyn Harness) {
    let bus = harness.open().await;
    let ids = ["c", "a", "b"];
    for id in ids {
        publish(&bus, id).await;
    }
    drop(bus);
    let bus = harness.open().await;
    for id in ids {
        assert_eq!(job(&bus).await.request.request_id, id);
    }
}

/// See the name.
pub async fn an_unfinished_job_is_offered_again_after_a_crash(harness: &dyn Harness) {
    let bus = harness.open().await;
    publish(&bus, "held").await;
    publish(&bus, "waiting").await;
    let held = job(&bus).await;
    assert_eq!(held.request.request_id, "held");
    drop(bus);
    let bus = harness.open_for(harness.lease()).await;
    let mut seen = Vec::new();
    for _ in 0..2 {
        let held = job(&bus).await;
        bus.ack_job(&held.receipt).await.unwrap();
        seen.push((held.request.request_id, held.deliveries));
    }
    seen.sort();
    assert_eq!(
        seen,
        [("held".to_owned(), 2), ("waiting".to_owned(), 1)],
        "deliveries survive a restart"
    );
    no_job(&bus).await;
}

/// See the name.
pub async fn a_released_job_is_offered_again(harness: &dyn Harness) {
    let bus = harness.open().await;
    publish(&bus, "a").await;
    let first = job(&bus).await;
    bus.release_job(&first.receipt).await.unwrap();
    let second = job(&bus).await;
    assert_eq!(second.deliveries, 2);
    let stale = bus.ack_job(&first.receipt).await;
    assert!(
        matches!(stale, Err(TransportError::NotHeld { .. })),
        "{stale:?}"
    );
    bus.ack_job(&second.receipt).await.unwrap();
}

/// See the name.
pub async fn a_job_that_is_not_renewed_goes_to_somebody_else(harness: &dyn Harness) {
    // On a machine that stands still for a moment, renewals come too late and the job goes elsewhere: then the lease is longer.
    let (mut lease, mut tries) = (harness.lease(), 1);
    let (bus, held) = loop {
        let bus = harness.open_for(lease).await;
        publish(&bus, &format!("renewed-{tries}")).await;
        if let Some(held) = renewed_for_longer_than_its_lease(&bus, lease).await {
            break (bus, held);
        }
        assert!(tries < 6, "a renewed job stays, with a lease of {lease:?}");
        (lease, tries) = (lease * 2, tries + 1);
    };
    let taken = job(&bus).await;
    assert_eq!(taken.request.request_id, held.request.request_id);
    let late = bus.renew_job(&held.receipt).await;
    assert!(
        matches!(late, Err(TransportError::NotHeld { .. })),
        "{late:?}"
    );
    let late = bus.ack_job(&held.receipt).await;
    assert!(
        matches!(late, Err(TransportError::NotHeld { .. })),
        "{late:?}"
    );
    bus.ack_job(&taken.receipt).await.unwrap();
}

/// Takes a job and renews it for one and a half leases. Nothing when it was offered again meanwhile, which may only be when
/// nobody came to renew it for as long as its lease.
async fn renewed_for_longer_than_its_lease(
    bus: &Arc<dyn Transport>,
    lease: Duration,
) -> Option<JobDelivery> {
    let mut since = Instant::now();
    let held = job(bus).await;
    for _ in 0..6 {
        if let Some(again) = bus.next_job(lease / 4).await.unwrap() {
            assert!(since.elapsed() >= lease, "a renewed job stays");
            bus.ack_job(&again.receipt).await.unwrap();
            return None;
        }
        let before = Instant::now();
        bus.renew_job(&held.receipt).await.unwrap();
        since = before;
    }
    Some(held)
}

/// See the name.
pub async fn two_spawners_never_hold_the_same_job(harness: &dyn Harness) {
    let bus = harness.open().await;
    for n in 0..8 {
        publish(&bus, &format!("job-{n}")).await;
    }
    let take = || async {
        let mut ids = Vec::new();
        for _ in 0..4 {
            let held = job(&bus).await;
            ids.push(held.request.request_id);
            bus.ack_job(&held.receipt).await.unwrap();
        }
        ids
    };
    let (one, two) = futures::join!(take(), take());
    let mut all = [one, two].concat();
    all.sort();
    let expected: Vec<_> = (0..8).map(|n| format!("job-{n}")).collect();
    assert_eq!(all, expected);
    no_job(&bus).await;
}

/// See the name.
pub async fn a_waiting_spawner_wakes_when_a_job_is_published(harness: &dyn Harness) {
    let bus = harness.open().await;
    let (held, ()) = futures::join!(job(&bus), async {
        tokio::task::yield_now().await;
        publish(&bus, "a").await;
    });
    assert_eq!(held.request.request_id, "a");
}

/// See the name.
pub async fn a_dead_letter_keeps_its_reason_and_is_not_offered_again(harness: &dyn Harness) {
    let bus = harness.open().await;
    publish(&bus, "poison").await;
    let held = job(&bus).await;
    bus.dead_letter(&held.receipt, "it broke five spawners")
        .await
        .unwrap();
    no_job(&bus).await;
    drop(bus);
    let bus = harness.open().await;
    no_job(&bus).await;
    let letters = bus.dead_letters(10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].0, "it broke five spawners");
    let body = crate::decode::request(letters[0].1.as_bytes()).unwrap();
    assert_eq!(body.request_id, "poison");
}

/// See the name.
pub async fn an_unacknowledged_result_is_delivered_again_after_a_crash(harness: &dyn Harness) {
    let bus = harness.open().await;
    bus.publish_result(&result("a", "x")).await.unwrap();
    let first = outcome(&bus).await;
    assert_eq!(first.result.request_id, "a");
    no_outcome(&bus).await;
    drop(bus);
    let bus = harness.open_for(harness.lease()).await;
    let second = outcome(&bus).await;
    assert_eq!(second.result, first.result);
    bus.ack_result(&second.receipt).await.unwrap();
    drop(bus);
    let bus = harness.open().await;
    no_outcome(&bus).await;
    assert_eq!(
        bus.result("a").await.unwrap(),
        Some(first.result),
        "still readable"
    );
}

/// See the name.
pub async fn a_released_result_is_delivered_again(harness: &dyn Harness) {
    let bus = harness.open().await;
    bus.publish_result(&result("a", "x")).await.unwrap();
    let first = outcome(&bus).await;
    bus.release_result(&first.receipt).await.unwrap();
    let second = outcome(&bus).await;
    let stale = bus.ack_result(&first.receipt).await;
    assert!(
        matches!(stale, Err(TransportError::NotHeld { .. })),
        "{stale:?}"
    );
    bus.ack_result(&second.receipt).await.unwrap();
}

/// See the name.
pub async fn the_first_result_of_a_request_is_its_result(harness: &dyn Harness) {
    let bus = harness.open().await;
    let first = bus.publish_result(&result("a", "first")).await.unwrap();
    assert_eq!(first, Published::New);
    let second = bus.publish_result(&result("a", "second")).await.unwrap();
    assert_eq!(second, Published::Known);
    let delivered = outcome(&bus).await;
    assert_eq!(delivered.result.failure.unwrap().kind, "first");
    bus.ack_result(&delivered.receipt).await.unwrap();
    let third = bus.publish_result(&result("a", "third")).await.unwrap();
    assert_eq!(third, Published::Known, "also after it was acknowledged");
    no_outcome(&bus).await;
}

/// See the name.
pub async fn a_request_that_is_over_is_not_taken_up_again(harness: &dyn Harness) {
    let bus = harness.open().await;
    publish(&bus, "a").await;
    let held = job(&bus).await;
    bus.publish_result(&result("a", "x")).await.unwrap();
    bus.ack_job(&held.receipt).await.unwrap();
    let again = bus.publish_job(&request("a")).await.unwrap();
    assert_eq!(again, Published::Known);
    let delivered = outcome(&bus).await;
    bus.ack_result(&delivered.receipt).await.unwrap();
    drop(bus);
    let bus = harness.open().await;
    let again = bus.publish_job(&request("a")).await.unwrap();
    assert_eq!(again, Published::Known);
    no_job(&bus).await;
}

/// See the name.
pub async fn a_cancel_is_durable_and_reaches_listeners(harness: &dyn Harness) {
    let bus = harness.open().await;
    let mut orders = bus.controls().await.unwrap();
    assert!(!bus.cancelled("a").await.unwrap());
    bus.cancel("a").await.unwrap();
    let order = tokio::time::timeout(SOON, orders.next()).await.unwrap();
    assert_eq!(
        order,
        Some(Control::Cancel {
            request_id: "a".to_owned()
        })
    );
    drop((orders, bus));
    let bus = harness.open().await;
    assert!(bus.cancelled("a").await.unwrap());
    assert!(!bus.cancelled("b").await.unwrap());
}

/// See the name.
pub async fn a_drain_reaches_listeners(harness: &dyn Harness) {
    let bus = harness.open().await;
    let mut orders = bus.controls().await.unwrap();
    bus.unpaid("a").await.unwrap();
    let order = tokio::time::timeout(SOON, orders.next()).await.unwrap();
    let unpaid = Control::Unpaid {
        request_id: "a".to_owned(),
    };
    assert_eq!(order, Some(unpaid));
    assert!(!bus.cancelled("a").await.unwrap());
    bus.drain(Some("here")).await.unwrap();
    let order = tokio::time::timeout(SOON, orders.next()).await.unwrap();
    assert_eq!(
        order,
        Some(Control::Drain {
            spawner: Some("here".to_owned())
        })
    );
}

fn progress(id: &str, seq: u64) -> WorkerEvent {
    WorkerEvent::new(
        &request(id),
        seq,
        EventKind::Progress {
            text: format!("step {seq}"),
            step: None,
        },
    )
}

/// See the name.
pub async fn events_are_kept_for_latecomers_and_end_with_the_result(harness: &dyn Harness) {
    let bus = harness.open().await;
    let early = bus.events("a").await.unwrap();
    bus.publish_event(&progress("a", 1)).await.unwrap();
    bus.publish_event(&progress("other", 1)).await.unwrap();
    let late = bus.events("a").await.unwrap();
    bus.publish_event(&progress("a", 2)).await.unwrap();
    bus.publish_result(&result("a", "x")).await.unwrap();
    for stream in [early, late] {
        let seen = tokio::time::timeout(SOON, stream.collect::<Vec<_>>())
            .await
            .expect("the stream ends");
        let seen: Vec<_> = seen
            .iter()
            .map(|e| (e.request_id.as_str(), e.seq))
            .collect();
        assert_eq!(seen, [("a", 1), ("a", 2)]);
    }
}

/// See the name.
pub async fn events_that_nobody_reads_hold_nobody_up(harness: &dyn Harness) {
    let bus = harness.open().await;
    let unread = bus.events("a").await.unwrap();
    for seq in 1..=2000 {
        bus.publish_event(&progress("a", seq)).await.unwrap();
    }
    bus.publish_result(&result("a", "x")).await.unwrap();
    let seen = tokio::time::timeout(SOON, unread.collect::<Vec<_>>())
        .await
        .expect("the stream ends");
    assert!(seen.len() < 2000, "what is kept is bounded");
    assert_eq!(
        seen.last().map(|e| e.seq),
        Some(2000),
        "the newest are kept"
    );
}

/// See the name.
pub async fn a_message_that_is_wrong_is_refused(harness: &dyn Harness) {
    let bus = harness.open().await;
    let refused = bus.publish_job(&request("../escape")).await;
    assert!(
        matches!(refused, Err(TransportError::Message(_))),
        "{refused:?}"
    );
    let mut large = request("large");
    large.task.body_markdown = "x".repeat(crate::decode::MAX_REQUEST_BYTES);
    let refused = bus.publish_job(&large).await;
    assert!(
        matches!(refused, Err(TransportError::Message(_))),
        "{refused:?}"
    );
    let mut hollow = result("a", "x");
    hollow.status = ResultStatus::Succeeded;
    let refused = bus.publish_result(&hollow).await;
    assert!(
        matches!(refused, Err(TransportError::Message(_))),
        "{refused:?}"
    );
    let refused = bus.cancel("a/b").await;
    assert!(
        matches!(refused, Err(TransportError::Message(_))),
        "{refused:?}"
    );
    no_job(&bus).await;
}
