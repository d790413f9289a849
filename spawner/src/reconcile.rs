//! What is ours on the engine and what is known here, brought together: at the start and ever after.
//!
//! A worker whose job is offered to us again is adopted by its attempt; here is what has no attempt. It is removed when its
//! result is known, killed when its time is over, and kept as evidence when nobody has asked for it yet, but not for ever.
//! Nothing that does not carry our label is ever looked at, and nothing in whose workspace a living process works: that is its
//! own, even if it has our home.

use crate::capacity::Load;
use crate::places::Places;
use crate::runtime::{LeftOver, Part};
use crate::trouble::chain;
use crate::{Options, broker, seat};
use jiff::Timestamp;
use std::time::Duration;
use tokio::sync::watch;

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(10);
/// How long an ended worker that nobody asks for is kept: as long as a transport keeps results.
const KEEP: Duration = Duration::from_hours(25);

/// What is to be done with something that is left over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stays,
    Killed,
    Removed,
}

/// Looks again and again, and says in `looked` how often it has. `is_running` says whether a request has an attempt here.
pub(crate) async fn forever(
    options: &Options,
    load: &Load,
    looked: &watch::Sender<u64>,
    is_running: impl Fn(&str) -> bool,
) {
    if !options.runtime.outlives() {
        looked.send_modify(|looked| *looked += 1);
        return;
    }
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(left) = look(options, load).await else {
            continue;
        };
        looked.send_modify(|looked| *looked += 1);
        if let Err(error) = options.runtime.end_strays().await {
            let error = chain(&error);
            tracing::warn!(error, "strays of the engine stay; trying again");
        }
        clear(options, load, left, &is_running).await;
    }
}

/// What nobody watches, after it was counted; none when it cannot be seen.
async fn look(options: &Options, load: &Load) -> Option<Vec<LeftOver>> {
    load.look();
    let mut left = match options.runtime.left_over().await {
        Ok(all) => all,
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "what is left of former workers cannot be looked at; trying again"
            );
            return None;
        }
    };
    left.retain(|left| !seat::is_taken(&Places::of_task(&options.home, &left.who)));
    let working = left
        .iter()
        .filter(|left| left.running && left.part == Part::Agent);
    load.found(working.map(|left| (left.who.request.clone(), left.size)));
    Some(left)
}

/// Clears away what of it nobody needs any more.
async fn clear(
    options: &Options,
    load: &Load,
    left: Vec<LeftOver>,
    is_running: &impl Fn(&str) -> bool,
) {
    // An attempt is known here before anything of it is made: whatever was on the list and is not known now has none.
    for left in left {
        let request = left.who.request.as_str();
        if is_running(request) {
            continue;
        }
        let is_over = match options.transport.result(request).await {
            Ok(result) => result.is_some(),
            Err(error) => {
                tracing::warn!(%error, "the state of job {request} cannot be read; trying again");
                continue;
            }
        };
        // Its job may have been offered to us, or to a neighbour, while the result was read.
        if is_running(request) || seat::is_taken(&Places::of_task(&options.home, &left.who)) {
            continue;
        }
        let fate = fate(&left, is_over, Timestamp::now().as_second());
        let done = match fate {
            Fate::Stays => continue,
            Fate::Killed => options.runtime.kill(&left.id).await,
            Fate::Removed => options.runtime.remove(&left.id).await,
        };
        match done {
            Ok(()) => {
                load.gone(request);
                let is_gone = fate == Fate::Removed && left.part == Part::Agent;
                if is_gone {
                    forget_broker(&Places::of_task(&options.home, &left.who));
                }
                tracing::info!(
                    request,
                    ?fate,
                    "a worker that nobody watches is taken care of"
                );
            }
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(
                    error,
                    request,
                    ?fate,
                    "a worker that nobody watches is still there"
                );
            }
        }
    }
}

/// The worker's way to the broker of a process that died: nobody comes any more who would use it, or remove it.
fn forget_broker(places: &Places) {
    let forgotten = seat::if_free(places, || broker::forget(&places.state));
    if let Some(Err(error)) = forgotten {
        let state = places.state.display();
        tracing::warn!(%error, "the socket of a worker that is gone stays in {state}");
    }
}

fn fate(left: &LeftOver, is_over: bool, now_s: i64) -> Fate {
    let keep_s = i64::try_from(KEEP.as_secs()).unwrap_or(i64::MAX);
    if is_over || left.part == Part::Refresh {
        return Fate::Removed;
    }
    if left.running {
        return if now_s > left.deadline_s {
            Fate::Killed
        } else {
            Fate::Stays
        };
    }
    let over_s = left.made_at_s.max(left.deadline_s);
    if now_s.saturating_sub(over_s) > keep_s {
        Fate::Removed
    } else {
        Fate::Stays
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Identity;
    use protocol::Size;

    fn left(running: bool, deadline_s: i64) -> LeftOver {
        LeftOver {
            id: "c".to_owned(),
            who: Identity {
                project: "p".to_owned(),
                job: "j".to_owned(),
                task: "t".to_owned(),
                request: "r".to_owned(),
                attempt: 1,
            },
            part: Part::Agent,
            size: Size::ZERO,
            running,
            made_at_s: 1000,
            deadline_s,
        }
    }

    #[test]
    fn what_nobody_watches_is_kept_for_the_next_attempt_and_not_for_ever() {
        assert_eq!(fate(&left(true, 2000), false, 1500), Fate::Stays);
        assert_eq!(fate(&left(false, 2000), false, 1500), Fate::Stays);
        assert_eq!(fate(&left(true, 2000), false, 2001), Fate::Killed);
        assert_eq!(
            fate(&left(false, 2000), false, 2001),
            Fate::Stays,
            "its evidence is wanted"
        );
        assert_eq!(
            fate(&left(false, 2000), false, 2000 + 26 * 3600),
            Fate::Removed
        );
        assert_eq!(
            fate(&left(true, 2000), true, 1500),
            Fate::Removed,
            "somebody has its result"
        );
        assert_eq!(fate(&left(false, 2000), true, 1500), Fate::Removed);
        let refresh = LeftOver {
            part: Part::Refresh,
            ..left(true, 2000)
        };
        assert_eq!(fate(&refresh, false, 1500), Fate::Removed);
    }
}
