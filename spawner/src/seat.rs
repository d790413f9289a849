//! Who works in a workspace: one attempt at a time, in this process and in others, and never an older one after a newer one.

use crate::places::{self, Places};
use crate::stop::{Stop, Why};
use crate::{keeping, mirror};
use protocol::SpawnRequest;
use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

/// How long a former attempt in the same workspace may take to end.
const HANDOVER: Duration = Duration::from_mins(1);
/// How often it is looked whether another process has left a workspace.
const LOOK: Duration = Duration::from_millis(100);

/// How long a full disk is waited for: somebody may make room, and until then no attempt can begin here.
const FULL: Duration = Duration::from_mins(10);
/// How often it is looked whether there is room again.
const ROOM: Duration = Duration::from_secs(1);

/// All workspaces in which somebody works, or wants to.
#[derive(Default)]
pub(crate) struct Desks(Mutex<HashMap<PathBuf, Arc<Desk>>>);

/// A workspace, as far as attempts compete for it.
#[derive(Debug, Default)]
struct Desk {
    lock: Arc<tokio::sync::Mutex<()>>,
    sitting: Mutex<Option<(u64, Stop)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Desks {
    /// Waits for the workspace, ending an older attempt that works in it. `full` is told when a full disk is waited for.
    pub(crate) async fn sit_down(
        &self,
        places: &Places,
        request: &SpawnRequest,
        stop: &Stop,
        full: impl Fn() + Send,
    ) -> Seat {
        let until = Instant::now() + FULL;
        let mut is_told = false;
        loop {
            match self.try_sit_down(places, request, stop).await {
                Seat::Unusable(error) if is_full(&error) && Instant::now() < until => {
                    if !is_told {
                        tracing::error!(%error, "a job waits for room on the disk");
                        full();
                        is_told = true;
                    }
                }
                seat => return seat,
            }
            tokio::select! {
                biased;
                () = stop.stopped_for_good() => return Seat::Stopped,
                () = tokio::time::sleep(ROOM) => {}
            }
        }
    }

    async fn try_sit_down(&self, places: &Places, request: &SpawnRequest, stop: &Stop) -> Seat {
        let mine = request.fencing_token;
        let desk = {
            let mut desks = lock(&self.0);
            desks.retain(|_, desk| Arc::strong_count(desk) > 1);
            Arc::clone(desks.entry(places.workspace.clone()).or_default())
        };
        let waiting = Arc::clone(&desk.lock).lock_owned();
        tokio::pin!(waiting);
        let until = tokio::time::sleep(HANDOVER);
        tokio::pin!(until);
        let mut look = tokio::time::interval(LOOK);
        let guard = loop {
            tokio::select! {
                biased;
                () = stop.stopped_for_good() => return Seat::Stopped,
                guard = &mut waiting => break guard,
                // Again each time: an older one that has waited for longer sits down before us.
                _ = look.tick() => {
                    if let Some((token, other)) = lock(&desk.sitting).as_ref() {
                        if *token > mine {
                            return Seat::Stale;
                        }
                        other.stop(Why::Superseded);
                    }
                }
                () = &mut until => return Seat::Taken,
            }
        };
        // Another spawner on this machine may share the workspaces, and hold this one until it finds that the job is not
        // its own any more. The kernel lets go of the lock of one that died.
        let shut = tokio::select! {
            biased;
            () = stop.stopped_for_good() => return Seat::Stopped,
            shut = shut(&places.state) => shut,
        };
        let elsewhere = match shut {
            Ok(Some(lock)) => lock,
            Ok(None) => return Seat::Taken,
            Err(error) => return Seat::unusable(&error, "lock", &places.state),
        };
        // The highest token that ever worked here is kept, so that an old job that comes late,
        // after a restart for example, changes nothing.
        let path = places.state.join("fencing");
        let kept = std::fs::read_to_string(&path)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok());
        if kept.is_some_and(|kept| kept > mine) {
            return Seat::Stale;
        }
        if let Err(error) = places::write_whole(&path, mine.to_string().as_bytes()) {
            return Seat::unusable(&error, "write", &path);
        }
        // From now on there may be work here that nobody has.
        if let Err(error) = places::remove_any(&places.state.join(keeping::DELIVERED)) {
            return Seat::unusable(&error, "tidy", &places.state);
        }
        *lock(&desk.sitting) = Some((mine, stop.clone()));
        Seat::Free(Sitting {
            shared_desk: desk,
            _guard: guard,
            _elsewhere: elsewhere,
        })
    }
}

/// Whether an attempt may work.
pub(crate) enum Seat {
    Free(Sitting),
    /// A later attempt was here.
    Stale,
    /// It could not be had in time.
    Taken,
    /// Nobody can work there before somebody has looked at the disk.
    Unusable(std::io::Error),
    /// The attempt was stopped before.
    Stopped,
}

impl Seat {
    fn unusable(error: &std::io::Error, what: &str, path: &Path) -> Self {
        let message = format!("cannot {what} {}: {error}", path.display());
        Self::Unusable(std::io::Error::new(error.kind(), message))
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// The right to work in a workspace.
#[derive(Debug)]
pub(crate) struct Sitting {
    shared_desk: Arc<Desk>,
    _guard: OwnedMutexGuard<()>,
    /// Keeps spawners in other processes out.
    _elsewhere: File,
}

impl Drop for Sitting {
    fn drop(&mut self) {
        *lock(&self.shared_desk.sitting) = None;
    }
}

/// Whether a process that lives, this one or another one, works in a workspace.
pub(crate) fn is_taken(places: &Places) -> bool {
    // Without making what is not there.
    File::open(places.state.join("lock"))
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Does something about a workspace in which nobody works, and keeps everybody out meanwhile; none: somebody does work there, or
/// nobody ever did.
pub(crate) fn if_free<T>(places: &Places, what: impl FnOnce() -> T) -> Option<T> {
    let file = File::open(places.state.join("lock")).ok()?;
    file.try_lock().ok()?;
    // Let go of when the file is closed.
    Some(what())
}

/// Locks a workspace against other processes; none when it could not be had in time.
async fn shut(state: &Path) -> std::io::Result<Option<File>> {
    let until = Instant::now() + HANDOVER;
    loop {
        // Again each time: what nobody needs any more is removed with its lock, perhaps while we come.
        let made = std::fs::create_dir_all(state);
        match made.and_then(|()| mirror::try_lock_file(&state.join("lock"), File::try_lock)) {
            Ok(Some(file)) => {
                // Says when somebody worked here last.
                file.set_modified(std::time::SystemTime::now())?;
                return Ok(Some(file));
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn what_takes_its_time_in_a_workspace_keeps_it_also_when_its_attempt_is_stopped() {
        let home = tempfile::tempdir().unwrap();
        let desks = Desks::default();
        let request = protocol::suite::request("r");
        let mut places = Places::of(home.path(), &request);
        let Seat::Free(seat) = desks
            .sit_down(&places, &request, &Stop::default(), || ())
            .await
        else {
            panic!("nobody works there");
        };
        places.seat = Some(Arc::new(seat));
        let (begun, begins) = mpsc::channel();
        let (go, goes) = mpsc::channel::<()>();
        let work = places.blocking(move || {
            begun.send(()).unwrap();
            // Until nobody holds it up any more.
            let _ = goes.recv();
            Ok(())
        });
        tokio::select! {
            biased;
            done = work => panic!("it cannot be done: {done:?}"),
            () = tokio::task::yield_now() => {}
        }
        begins.recv().unwrap();
        places.seat = None;
        let next = Stop::default();
        let waits = desks.sit_down(&places, &request, &next, || ());
        tokio::pin!(waits);
        assert!(
            tokio::time::timeout(Duration::from_millis(1), &mut waits)
                .await
                .is_err()
        );
        assert!(is_taken(&places));
        drop(go);
        assert!(matches!(waits.await, Seat::Free(_)));
    }
}
