//! What holds in all worlds; and that it would be noticed if it did not.

use stateright::{Checker, HasDiscoveries, Model};

use crate::{
    explore::{CHILD, ENDS, JOURNAL, NOBODY_STUCK, ONE_OUTCOME, SIGNALS, TOKENS, WAKES, Worlds},
    flaws::Flaw,
    long,
    run::Role,
    world::Limits,
};

/// A signal for each that waits; the parent's is sent twice.
pub fn letters() -> Vec<(Role, &'static str, &'static str)> {
    vec![
        (Role::Parent, "go", "g"),
        (Role::Parent, "go", "g"),
        (Role::Child, "tick", "t"),
    ]
}

/// The same, and news for the child, which it does not wait for, but which wakes it.
fn letters_and_news() -> Vec<(Role, &'static str, &'static str)> {
    vec![
        (Role::Parent, "go", "g"),
        (Role::Child, "tick", "t"),
        (Role::Child, "news", "n"),
    ]
}

fn holds(limits: Limits, at_least: usize) {
    let model = Worlds { limits, flaw: None };
    let checker = model.checker().threads(2).spawn_dfs().join();
    let found = checker.unique_state_count();
    println!(
        "{found} worlds, the longest with {} moments",
        checker.max_depth()
    );
    checker.assert_properties();
    assert!(found >= at_least, "only {found} worlds");
}

#[test]
fn all_holds_while_runs_die_and_lose_their_leases() {
    let limits = Limits {
        runners: 2,
        crashes: long(2, 1),
        lapses: long(2, 1),
        fresh: true,
        letters: letters(),
        ..Limits::default()
    };
    holds(limits, 1000);
}

#[test]
fn all_holds_while_commits_are_not_answered() {
    let limits = Limits {
        runners: 2,
        lapses: 1,
        lost: long(3, 1),
        letters: letters(),
        ..Limits::default()
    };
    holds(limits, 1000);
}

#[test]
fn all_holds_when_the_parent_is_cancelled_at_any_moment() {
    let limits = Limits {
        runners: 2,
        crashes: long(2, 1),
        lapses: long(1, 0),
        lost: long(1, 0),
        cancels: true,
        fresh: true,
        letters: letters(),
        ..Limits::default()
    };
    holds(limits, 1000);
}

#[test]
fn all_holds_when_the_time_of_a_question_is_over_at_any_moment() {
    let limits = Limits {
        runners: 2,
        crashes: 1,
        lapses: long(1, 0),
        lost: long(1, 0),
        deadline: true,
        fresh: true,
        letters: letters_and_news(),
        ..Limits::default()
    };
    holds(limits, 1000);
}

#[test]
fn all_holds_when_the_time_of_a_question_is_over_and_commits_are_not_answered() {
    let limits = Limits {
        runners: 1,
        lost: long(2, 1),
        cancels: long(true, false),
        deadline: true,
        letters: letters_and_news(),
        ..Limits::default()
    };
    holds(limits, 1000);
}

/// Looks for a flaw until it is found, and says how.
fn finds(flaw: Flaw, limits: Limits, properties: &[&'static str]) {
    let model = Worlds {
        limits,
        flaw: Some(flaw),
    };
    let checker = model
        .checker()
        .finish_when(HasDiscoveries::AnyOf(properties.iter().copied().collect()))
        .spawn_bfs()
        .join();
    let found = checker.discoveries();
    let broken: Vec<&str> = properties
        .iter()
        .copied()
        .filter(|name| found.contains_key(name))
        .collect();
    for name in &broken {
        let way: Vec<String> = found[name]
            .clone()
            .into_actions()
            .iter()
            .map(|action| format!("{action:?}"))
            .collect();
        println!("{flaw:?}: not so: {name}: {}", way.join(", "));
    }
    assert!(
        !broken.is_empty(),
        "{flaw:?} was not found, but {:?}",
        found.keys()
    );
}

macro_rules! finds {
    ($name:ident, $flaw:ident, $limits:expr, $properties:expr) => {
        #[test]
        fn $name() {
            finds(
                Flaw::$flaw,
                Limits {
                    letters: if $limits.deadline {
                        letters_and_news()
                    } else {
                        letters()
                    },
                    runners: 2,
                    ..$limits
                },
                &$properties,
            );
        }
    };
}

fn crash() -> Limits {
    Limits {
        crashes: 1,
        ..Limits::default()
    }
}

fn lapse() -> Limits {
    Limits {
        lapses: 1,
        ..Limits::default()
    }
}

fn lost() -> Limits {
    Limits {
        lost: 1,
        ..Limits::default()
    }
}

finds!(
    a_fence_that_is_not_checked_is_found,
    FenceNotChecked,
    lapse(),
    [TOKENS]
);
finds!(
    a_live_lease_that_is_handed_out_again_is_found,
    ClaimsLiveLeases,
    Limits::default(),
    [TOKENS]
);
finds!(
    a_refused_commit_that_leaves_a_trace_is_found,
    RefusedHalfway,
    lapse(),
    [TOKENS]
);
finds!(
    a_suspension_that_does_not_look_again_is_found,
    SleepsOverNews,
    Limits::default(),
    [WAKES, NOBODY_STUCK]
);
finds!(
    keys_that_are_not_compared_are_found,
    KeysNotCompared,
    Limits::default(),
    [SIGNALS, TOKENS]
);
finds!(
    a_used_signal_that_stays_is_found,
    UsedStays,
    Limits::default(),
    [SIGNALS]
);
finds!(
    a_signal_that_is_used_before_its_step_has_landed_is_found,
    UsedTooEarly,
    lost(),
    [SIGNALS]
);
finds!(
    a_child_that_is_started_before_its_step_is_found,
    SpawnsAtOnce,
    lost(),
    [CHILD]
);
finds!(
    an_end_that_is_told_before_it_has_landed_is_found,
    TellsEndTooEarly,
    lost(),
    [ENDS]
);
finds!(
    events_that_are_said_before_their_step_are_found,
    SaysTooEarly,
    lost(),
    [JOURNAL, SIGNALS]
);
finds!(
    a_commit_that_is_made_again_blindly_is_found,
    CommitsAgainBlindly,
    lost(),
    [JOURNAL]
);
finds!(
    a_parent_that_forgets_its_children_is_found,
    ForgetsChildren,
    Limits {
        cancels: true,
        ..crash()
    },
    [NOBODY_STUCK]
);

fn deadline() -> Limits {
    Limits {
        deadline: true,
        ..Limits::default()
    }
}

finds!(
    a_run_that_trusts_its_clock_is_found,
    TrustsItsClock,
    deadline(),
    [ONE_OUTCOME]
);
finds!(
    an_answer_that_is_taken_too_late_is_found,
    AnswersLate,
    deadline(),
    [TOKENS]
);
finds!(
    a_deadline_that_is_overslept_is_found,
    Oversleeps,
    deadline(),
    [WAKES, NOBODY_STUCK]
);
