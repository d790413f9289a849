//! Bringing a workspace up to date, by workers whose ends are known beforehand.

use super::*;
use crate::runtime::{Error, Worker};
use async_trait::async_trait;
use sandbox::Line;
use std::collections::VecDeque;
use std::sync::Mutex;
use tokio::sync::mpsc;

/// Workers that have ended so, one after the other.
struct Ends(Mutex<VecDeque<Ended>>);

struct HasEnded(Ended);

#[async_trait]
impl Runtime for Ends {
    fn describe(&self) -> String {
        "known ends".to_owned()
    }

    fn check(&self) -> Result<(), crate::Error> {
        Ok(())
    }

    fn owner(&self) -> Option<(u32, u32)> {
        None
    }

    async fn start(&self, work: &Work) -> Result<Box<dyn Worker>, Error> {
        assert_eq!(work.part, Part::Refresh);
        let end = self.0.lock().unwrap().pop_front();
        Ok(Box::new(HasEnded(end.expect("no more than these"))))
    }
}

#[async_trait]
impl Worker for HasEnded {
    fn take_lines(&mut self) -> Option<mpsc::Receiver<Line>> {
        None
    }

    fn tail(&self) -> String {
        "its words".to_owned()
    }

    fn stop(&self, _grace: Duration) {}

    async fn wait(&mut self) -> Result<Ended, Error> {
        Ok(self.0.clone())
    }
}

fn end(reason: Reason, from_outside: Option<&str>) -> Ended {
    Ended {
        reason,
        wall_s: 0.0,
        cpu_s: 0.0,
        peak_memory_mb: 0,
        evidence: String::new(),
        from_outside: from_outside.map(str::to_owned),
    }
}

/// What comes of these ends, and how many of them were left over.
async fn refreshed(ends: impl IntoIterator<Item = Ended>) -> (Result<Refreshed, Trouble>, usize) {
    let home = tempfile::tempdir().unwrap();
    let request = protocol::suite::request("r1");
    let places = Places::of(home.path(), &request);
    let ends = Ends(Mutex::new(ends.into_iter().collect()));
    let refreshed = refresh(&ends, &places, &request, home.path()).await;
    (refreshed, ends.0.into_inner().unwrap().len())
}

const ENGINE: Option<&str> = Some("the engine went away while it ran");

#[tokio::test(start_paused = true)]
async fn what_something_else_has_ended_is_run_again_and_the_workspace_is_kept() {
    let ends = [
        end(Reason::Exited(255), ENGINE),
        end(Reason::Signalled(9), ENGINE),
        end(Reason::Exited(0), None),
    ];
    assert!(matches!(refreshed(ends).await, (Ok(Refreshed::Done), 0)));
}

#[tokio::test(start_paused = true)]
async fn what_git_has_ended_itself_says_that_the_workspace_is_broken_at_once() {
    let ends = [Reason::Exited(128), Reason::Exited(0)].map(|reason| end(reason, None));
    let (refreshed, left) = refreshed(ends).await;
    assert!(matches!(refreshed, Ok(Refreshed::Broken(said)) if said.contains("its words")));
    assert_eq!(left, 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_ended_from_outside_again_and_again_ends_the_attempt_and_keeps_the_workspace() {
    let tries = usize::try_from(REFRESHES).unwrap();
    let ends = (0..=tries).map(|_| end(Reason::Exited(255), ENGINE));
    let (refreshed, left) = refreshed(ends).await;
    let Err(trouble) = refreshed else {
        panic!("the workspace is not known to be broken")
    };
    assert_eq!(trouble.kind, kind::CLONE_FAILED, "{trouble:?}");
    assert!(trouble.message.contains(ENGINE.unwrap()), "{trouble:?}");
    assert_eq!(left, 1);
}
