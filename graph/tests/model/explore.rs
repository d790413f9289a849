//! All worlds that the limits allow, by the checker of `stateright`, on the real [`MemoryCheckpointer`]: each step is taken by a
//! copy of it.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use futures::FutureExt as _;
use graph::{MemoryCheckpointer, ThreadStatus, checkpoint::ClaimRequest};
use stateright::{Model, Property};

use crate::{
    flaws::{Database, Flaw},
    run::{HOUR, LATER, Names, Role},
    world::{Action, Limits, View, World},
};

/// Nothing in memory is ever waited for.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    work.now_or_never().expect("memory answers at once")
}

/// One moment of one world.
#[derive(Clone)]
pub struct Moment {
    world: World,
    store: MemoryCheckpointer,
    view: View,
    /// All that matters for what happens next: two moments that are described alike are one.
    text: String,
}

impl Moment {
    fn new(world: World, store: MemoryCheckpointer) -> Self {
        let view = at_once(View::of(&store, &world.names));
        Self {
            text: format!("{}\n{}", view.text, world.in_words(&view)),
            world,
            store,
            view,
        }
    }

    pub fn begin(limits: Limits) -> Self {
        let (world, store) = (
            World::new(Names::default(), limits),
            MemoryCheckpointer::new(),
        );
        at_once(world.begin(&store));
        Self::new(world, store)
    }

    pub fn actions(&self) -> Vec<Action> {
        self.world.actions(&self.view, false)
    }

    pub fn fair_actions(&self) -> Vec<Action> {
        self.world.actions(&self.view, true)
    }

    pub fn after(&self, action: Action, flaw: Option<Flaw>) -> Option<Self> {
        let (mut world, store) = (self.world.clone(), self.store.duplicate());
        let db = Database {
            store: &store,
            flaw,
        };
        if action == Action::Late {
            store.advance(LATER);
        }
        at_once(world.act(&db, &self.view, action)).then(|| Self::new(world, store))
    }

    /// Whether a claim made now gets the thread.
    fn is_claimable(&self, role: Role) -> bool {
        let claimed = at_once(graph::checkpoint::Checkpointer::claim(
            &self.store.duplicate(),
            ClaimRequest {
                owner: "somebody",
                graphs: &[self.world.names.graph(role)],
                limit: 10,
                lease: HOUR,
            },
        ));
        !claimed.expect("claims").claims.is_empty()
    }

    /// What became of the child's question, in its own words.
    fn outcomes(&self) -> (bool, bool) {
        let child = self.world.names.thread(Role::Child);
        let said = |name: &str| {
            let mut journal = self.view.journal.iter();
            journal.any(|it| it.stream == child && it.name == name)
        };
        (said("got t"), said("got expired"))
    }
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Moment {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Hash for Moment {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

pub const TOKENS: &str = "only the newest lease writes";
pub const SIGNALS: &str = "a signal is used once, or is still there";
pub const WAKES: &str = "what a thread waits for wakes it";
pub const ONE_OUTCOME: &str =
    "a question is answered or expires, for whoever answers and whoever asks";
pub const CAN_EXPIRE: &str = "a question can expire";
pub const CHILD: &str = "a child is started once";
pub const ENDS: &str = "the end of a child reaches its parent once";
pub const JOURNAL: &str = "the journal has no gaps and says nothing twice";
pub const HISTORY: &str = "the history is a line that ends at the head";
pub const NOBODY_STUCK: &str = "when nothing more happens, all have ended";
pub const CAN_END: &str = "both can end";
pub const CAN_BE_STALE: &str = "a run can go on with a void lease";

/// All worlds within limits, with at most one flaw.
pub struct Worlds {
    pub limits: Limits,
    pub flaw: Option<Flaw>,
}

impl Model for Worlds {
    type State = Moment;
    type Action = Action;

    fn init_states(&self) -> Vec<Moment> {
        vec![Moment::begin(self.limits.clone())]
    }

    fn actions(&self, moment: &Moment, actions: &mut Vec<Action>) {
        // What has gone wrong need not go on.
        if moment.world.wrong.is_none() {
            actions.extend(moment.actions());
        }
    }

    fn next_state(&self, last: &Moment, action: Action) -> Option<Moment> {
        last.after(action, self.flaw)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(TOKENS, |_: &Self, moment: &Moment| {
                moment.world.wrong.is_none()
            }),
            Property::always(SIGNALS, |_: &Self, moment: &Moment| {
                let names = &moment.world.names;
                moment
                    .world
                    .taken()
                    .all(|(to, key)| moment.view.count(names, to, key) == 1)
            }),
            Property::always(ONE_OUTCOME, |_: &Self, moment: &Moment| {
                let (answered, expired) = moment.outcomes();
                let mut taken = moment.world.taken();
                let is_taken = taken.any(|letter| letter == (Role::Child, "t"));
                !(expired && (answered || is_taken))
            }),
            Property::always(WAKES, wakes),
            Property::always(CHILD, |_: &Self, moment: &Moment| {
                let view = &moment.view;
                let steps = |role: Role| view.threads.get(&role).map_or(0, |it| it.record.step);
                let children = usize::from(view.threads.contains_key(&Role::Child));
                // It is there as soon as the step has landed that starts it.
                children + view.strangers.len() == usize::from(steps(Role::Parent) > 0)
            }),
            Property::always(ENDS, |_: &Self, moment: &Moment| {
                let told = moment.view.count(&moment.world.names, Role::Parent, "end");
                told == usize::from(moment.view.has_ended(Role::Child))
            }),
            Property::always(JOURNAL, |_: &Self, moment: &Moment| is_whole(&moment.view)),
            Property::always(HISTORY, |_: &Self, moment: &Moment| {
                moment.view.threads.values().all(|seen| {
                    let mut oldest_first = seen.history.iter().rev().zip(1..);
                    let is_line = oldest_first
                        .all(|(it, n)| (it.checkpoint, it.parent, it.step) == (n, n - 1, n));
                    let head = seen.history.len() as u64;
                    is_line && (seen.record.checkpoint, seen.record.step) == (head, head)
                })
            }),
            Property::always(NOBODY_STUCK, |_: &Self, moment: &Moment| {
                nobody_is_stuck(moment)
            }),
            Property::sometimes(CAN_END, |_: &Self, moment: &Moment| {
                [Role::Parent, Role::Child]
                    .iter()
                    .all(|role| moment.view.has_ended(*role))
            }),
        ];
        if self.limits.deadline {
            properties.push(Property::sometimes(
                CAN_EXPIRE,
                |_: &Self, moment: &Moment| moment.outcomes().1,
            ));
        }
        if self.limits.lapses > 0 {
            properties.push(Property::sometimes(
                CAN_BE_STALE,
                |_: &Self, moment: &Moment| {
                    let mut runs = moment.world.runs.iter().flatten();
                    runs.any(|run| !World::is_valid(run, &moment.view))
                },
            ));
        }
        properties
    }
}

/// A thread that waits for what is in its mailbox, or is to be cancelled, is held by a live lease, or can be claimed now.
fn wakes(_: &Worlds, moment: &Moment) -> bool {
    moment.view.threads.iter().all(|(role, seen)| {
        let record = &seen.record;
        if record.status.is_ended() || seen.is_live {
            return true;
        }
        let waits = record.waits.iter().flat_map(|wait| &wait.signals);
        let has_come = waits
            .into_iter()
            .any(|kind| seen.mailbox.iter().any(|mail| mail.kind == *kind));
        let is_over = moment.world.late && record.waits.iter().any(|wait| wait.until.is_some());
        let comes = has_come || is_over || record.cancel.is_some();
        let sleeps = record.status == ThreadStatus::Waiting && !comes;
        sleeps || moment.is_claimable(*role)
    })
}

/// Each stream is numbered from 1, in the order of the cursors, and has each entry once.
fn is_whole(view: &View) -> bool {
    let mut streams: Vec<&str> = view.journal.iter().map(|it| it.stream.as_str()).collect();
    streams.dedup();
    streams.into_iter().all(|stream| {
        let said: Vec<_> = view
            .journal
            .iter()
            .filter(|it| it.stream == stream)
            .collect();
        let mut names: Vec<_> = said.iter().map(|it| &it.name).collect();
        names.sort();
        names.dedup();
        let is_numbered = said.iter().zip(1..).all(|(it, n)| it.number == n);
        let is_ordered = said.is_sorted_by(|a, b| a.cursor < b.cursor);
        is_numbered && is_ordered && names.len() == said.len()
    })
}

/// Nothing fair is left to happen: then both have ended, and have said all there is to say. (Who is cancelled may have said less.)
pub fn nobody_is_stuck(moment: &Moment) -> bool {
    let (world, view) = (&moment.world, &moment.view);
    if !world.actions(view, true).is_empty() {
        return true;
    }
    let Some(parent) = view.threads.get(&Role::Parent) else {
        return false;
    };
    let said = |stream: &str| -> Vec<&str> {
        let journal = view.journal.iter().filter(|it| it.stream == stream);
        journal.map(|it| it.name.as_str()).collect()
    };
    let all_have_ended = view.threads.values().all(|it| it.record.status.is_ended());
    let is_done = parent.record.status == ThreadStatus::Done;
    let all_is_said = !is_done
        || (said("parent").first() == Some(&"spawned")
            && said("parent").last() == Some(&"done")
            && said("parent").len() == 4
            && (said("parent/kid") == ["asks", "got t", "done"]
                || world.late && said("parent/kid") == ["asks", "got expired", "done"]));
    all_have_ended && all_is_said && (is_done || world.cancelled)
}
