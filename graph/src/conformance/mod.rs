//! One suite that every [`Checkpointer`](crate::checkpoint::Checkpointer) passes: what it promises, and what must not happen to it.
//!
//! A case is an async function that gets a [`Lab`] with a fresh, migrated database and panics when a promise is broken.
//! [`checkpointer_conformance!`](crate::checkpointer_conformance) makes one `#[tokio::test]` of each:
//!
//! ```
//! # struct My;
//! mod my_database {
//!     async fn lab() -> graph::conformance::Lab {
//!         let dir = tempfile::tempdir().expect("a directory");
//!         let path = dir.path().join("threads.db");
//!         graph::conformance::Lab::new(
//!             move || {
//!                 let path = path.clone();
//!                 async move { graph::sqlite::SqliteCheckpointer::open(path).await.expect("opens") }
//!             },
//!             dir,
//!         )
//!         .await
//!     }
//!
//!     graph::checkpointer_conformance!(lab());
//! }
//! ```
//!
//! Not for testing the engine: that a node runs when it should is not a checkpointer's business.

pub mod bells;
pub mod cache;
pub mod claims;
pub mod commits;
pub mod concurrency;
pub mod copies;
pub mod deletion;
pub mod documents;
pub mod history;
pub mod journal;
mod lab;
pub mod retention;
pub mod signals;
pub mod threads;
pub mod writes;

pub use lab::Lab;

/// Makes a `#[tokio::test]` of every case of [`graph::conformance`](crate::conformance).
///
/// The argument is an expression of a future that gives a [`Lab`]; it is evaluated once in each test.
#[macro_export]
macro_rules! checkpointer_conformance {
    ($lab:expr) => {
        $crate::checkpointer_conformance!(@cases $lab;
            threads::a_new_thread_is_as_it_was_given,
            threads::creating_a_thread_again_changes_nothing,
            threads::what_is_missing_is_said_to_be_missing,
            threads::threads_are_listed_by_every_filter_in_the_order_of_their_ids,
            threads::a_deleted_thread_leaves_the_others_and_the_journal,
            threads::a_lease_of_a_deleted_thread_is_no_good_for_its_namesake,
            threads::values_of_every_kind_come_back,
            threads::ten_megabytes_come_back,
            threads::only_a_failed_or_cancelled_thread_can_be_reopened,
            threads::migrating_again_and_at_the_same_time_is_harmless,
            signals::a_signal_arrives_once,
            signals::signals_are_numbered_in_the_order_of_arrival,
            signals::signals_at_the_same_time_get_numbers_without_gaps,
            signals::the_same_signal_at_the_same_time_arrives_once,
            signals::an_answer_needs_an_open_wait,
            signals::an_answer_after_its_time_is_refused,
            signals::a_full_mailbox_refuses,
            signals::a_signal_wakes_a_waiting_thread,
            signals::a_signal_wakes_an_ended_thread_only_if_it_revives,
            signals::what_arrives_during_a_run_is_not_slept_over,
            signals::a_request_to_cancel_reaches_the_thread_once,
            signals::a_request_to_cancel_is_forgotten_when_the_thread_ends,
            claims::a_thread_is_claimed_once,
            claims::a_thread_is_created_with_a_lease_or_due,
            claims::a_claim_brings_nothing_but_what_loading_reads,
            claims::two_claimers_never_get_one_thread,
            claims::tokens_grow_with_every_claim,
            claims::only_the_graphs_asked_for_are_claimed,
            claims::urgent_threads_are_claimed_first,
            claims::a_low_thread_that_waited_long_goes_first,
            claims::an_expired_lease_is_taken_over,
            claims::progress_forgets_the_takeovers,
            claims::a_renewed_lease_is_kept_and_a_lost_one_is_said_to_be_lost,
            claims::an_expired_lease_that_nobody_took_still_counts,
            claims::broken_leases_are_claimed_at_once,
            claims::a_timer_wakes_by_the_clock_of_the_database,
            claims::a_yielded_thread_is_due_at_once,
            claims::loading_needs_the_lease,
            commits::a_commit_comes_back,
            commits::all_parts_of_a_commit_land,
            commits::a_stale_lease_writes_nothing_at_all,
            commits::a_lease_that_was_given_back_writes_nothing,
            commits::only_the_tip_grows,
            writes::pending_writes_are_replaced_by_their_key,
            writes::pending_writes_belong_to_the_newest_checkpoint,
            writes::pending_writes_are_forgotten_when_they_became_part_of_a_checkpoint,
            writes::single_pending_writes_are_forgotten,
            commits::consumed_signals_leave_the_mailbox_and_their_keys_stay,
            commits::a_child_is_started_once,
            commits::the_end_of_a_child_wakes_its_parent,
            commits::signals_go_to_itself_and_to_new_children,
            commits::cancels_reach_the_living,
            commits::waits_are_replaced_and_cleared,
            commits::an_ended_thread_tells_how,
            concurrency::threads_commit_at_the_same_time,
            concurrency::threads_that_signal_each_other_at_the_same_time_get_through,
            concurrency::commits_of_one_stale_and_one_valid_lease_do_not_hurt_each_other,
            concurrency::a_caller_that_goes_away_takes_nobody_with_it,
            history::checkpoints_are_listed_newest_first,
            history::state_is_rebuilt_from_the_newest_snapshot,
            history::append_items_from_before_the_snapshot_are_kept,
            history::state_at_any_checkpoint,
            history::a_fork_grows_beside_its_origin,
            history::a_fork_of_a_fork_knows_its_whole_way,
            history::a_new_head_fences_the_run_and_goes_on_from_its_tip,
            history::unknown_checkpoints_and_branches_are_refused,
            retention::what_is_pruned_is_gone_and_the_state_at_the_rest_is_what_it_was,
            retention::pruning_again_and_again_keeps_the_state_and_few_rows,
            retention::pruning_without_the_snapshots_it_needs_changes_nothing,
            retention::young_checkpoints_are_kept_by_the_clock_of_the_database,
            retention::branches_are_pruned_without_touching_what_others_grew_from,
            retention::a_branch_of_which_nothing_is_left_is_gone_for_good,
            retention::a_head_that_is_older_than_what_stays_is_kept,
            retention::pending_writes_of_the_head_survive_pruning,
            retention::pruning_reading_and_running_at_the_same_time,
            copies::a_copy_is_what_the_original_was,
            copies::a_copy_sleeps_as_its_original_or_is_due,
            copies::copies_need_an_original_and_a_free_id,
            deletion::threads_are_deleted_by_filter,
            deletion::a_deleted_thread_of_many_rows_leaves_nothing_to_its_namesake,
            deletion::forgotten_keys_are_new_again,
            deletion::a_survey_goes_through_the_threads_in_the_order_of_their_ids,
            journal::entries_are_numbered_without_gaps_in_their_streams,
            journal::an_entry_with_an_id_is_appended_once,
            journal::the_same_entry_at_the_same_time_is_appended_once,
            journal::filters_choose_streams_and_threads,
            journal::a_reader_that_follows_misses_nothing_and_sees_nothing_twice,
            journal::commits_at_the_same_time_leave_no_gap_in_a_shared_stream,
            journal::the_journal_outlives_its_thread,
            bells::what_is_rung_is_heard_by_all_who_listen_in_order,
            bells::a_long_message_is_carried_and_nobody_needs_to_listen,
        );
    };
    (@cases $lab:expr; $($module:ident :: $case:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let lab: $crate::conformance::Lab = $lab.await;
                $crate::conformance::$module::$case(&lab).await;
            }
        )*
    };
}

/// Makes a `#[tokio::test]` of every case of [`conformance::documents`](crate::conformance::documents), for the
/// [store](crate::checkpoint::Checkpointer::documents) beside the threads of a [`Lab`].
#[macro_export]
macro_rules! documents_conformance {
    ($lab:expr) => {
        $crate::checkpointer_conformance!(@cases $lab;
            documents::a_document_comes_back_as_it_was_put,
            documents::a_deleted_document_is_gone,
            documents::batches_are_written_as_one_and_read_in_order,
            documents::what_cannot_be_a_document_is_refused,
            documents::a_prefix_means_whole_labels,
            documents::comparisons_are_typed,
            documents::paths_lead_through_objects,
            documents::what_is_found_comes_in_order_and_in_pages,
            documents::namespaces_are_listed_by_prefix_and_depth,
            documents::what_has_expired_is_not_there,
            documents::reading_refreshes_when_asked,
            documents::documents_live_beside_threads,
        );
    };
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_case_is_in_the_list() {
        let list = include_str!("mod.rs");
        for (module, source) in [
            ("threads", include_str!("threads.rs")),
            ("signals", include_str!("signals.rs")),
            ("claims", include_str!("claims.rs")),
            ("commits", include_str!("commits.rs")),
            ("concurrency", include_str!("concurrency.rs")),
            ("history", include_str!("history.rs")),
            ("retention", include_str!("retention.rs")),
            ("copies", include_str!("copies.rs")),
            ("deletion", include_str!("deletion.rs")),
            ("journal", include_str!("journal.rs")),
            ("bells", include_str!("bells.rs")),
            ("documents", include_str!("documents.rs")),
        ] {
            for line in source.lines() {
                if let Some(rest) = line.strip_prefix("pub async fn ") {
                    let name = rest.split('(').next().expect("a name");
                    assert!(
                        list.contains(&format!("{module}::{name},")),
                        "{module}::{name} is not run by checkpointer_conformance!"
                    );
                }
            }
        }
    }
}
